"""Building through timm, and finding weights: on disk first, then on the hub; a readable error otherwise."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg

__all__ = ["build_model", "weights_folder"]

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def weights_folder() -> Path:
    """Folder that is searched for weights: ``$VISION_GATES_WEIGHTS``, else torch hub's checkpoint folder."""
    return Path(os.environ.get("VISION_GATES_WEIGHTS") or Path(torch.hub.get_dir()) / "checkpoints")


def build_model(model_cls: type, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build ``variant`` through timm; with ``pretrained`` from a local file or, failing that, from its hub repository.

    A local file is ``<weights_folder>/<variant>`` with one of the suffixes .safetensors, .pth, .pt, .bin.

    Raises:
        RuntimeError: no weights exist, or they are not on disk and the hub cannot be reached; says which file to put
            where.
    """
    if pretrained and not (kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")):
        kwargs["pretrained_cfg_overlay"] = dict(file=str(_find_weights(variant)))
    return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)


def _find_weights(variant: str) -> Path:
    folder = weights_folder()
    for suffix in _SUFFIXES:
        if (path := folder / f"{variant}{suffix}").is_file():
            return path
    cfg = get_pretrained_cfg(variant, allow_unregistered=False)
    hub_id = cfg and cfg.hf_hub_id
    wanted = folder / f"{variant}.pth"
    if not hub_id and cfg and cfg.url:
        raise RuntimeError(
            f"no weights for {variant}: {wanted} does not exist. Download this variant's checkpoint, which {cfg.url} "
            f"links to, and save it there (or set VISION_GATES_WEIGHTS to the folder that holds {wanted.name})"
        )
    if not hub_id:
        raise RuntimeError(f"no pretrained weights exist for {variant}: use pretrained=False")
    try:
        return _download(variant, hub_id)
    except Exception as error:  # every way a hub can fail (offline, proxy, renamed file) has the same remedy
        raise RuntimeError(
            f"no weights for {variant}: {wanted} does not exist and the hub repository {hub_id} gave none "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}). Download the "
            f"checkpoint of this variant from https://huggingface.co/{hub_id} on a machine with network access and "
            f"save it as {wanted} (or set VISION_GATES_WEIGHTS to the folder that holds {wanted.name})"
        ) from error


def _download(variant: str, hub_id: str) -> Path:
    """Download the one file of ``hub_id`` whose name says ``variant``: vg_vig_h_tiny -> vig-h-t, vig_h_tiny ..."""
    from huggingface_hub import hf_hub_download, list_repo_files

    family, size = variant.removeprefix("vg_").rsplit("_", 1)
    family = family.replace("_", "[-_]?")
    pattern = re.compile(rf"(^|[^a-z0-9]){family}[-_]?({size}|{size[0]})([^a-z0-9]|$)", re.IGNORECASE)
    names = [name for name in list_repo_files(hub_id) if name.endswith(_SUFFIXES)]
    # A repository of one model may call its file just that; timm's do.
    matches = [name for name in names if pattern.search(Path(name).name)] or [
        name for name in names if name == "model.safetensors"
    ]
    if len(matches) != 1:
        raise FileNotFoundError(f"{len(matches)} of the files {', '.join(names) or '(none)'} look like {variant}")
    return Path(hf_hub_download(hub_id, matches[0]))
