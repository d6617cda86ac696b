"""Any feature pyramid of timm, ours (``vg_*``) or timm's, as a backbone of mmsegmentation.

Suffixes: B batch, C channels, H W height and width.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import adapt_input_conv, group_parameters
from timm.models import load_state_dict as read_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision_gates.errors import ConfigError

__all__ = ["VisionGatesBackbone"]


@MODELS.register_module()
class VisionGatesBackbone(BaseModule):
    """The levels of a timm model built with ``features_only=True``, finest first.

    ``out_channels`` and ``strides`` list what comes out; a head's ``in_channels`` must be the former. Plain networks
    (``vg_vig_*``, ``vg_convit_*``) give one stride at several depths; mmseg's ``Feature2Pyramid`` makes a pyramid of
    it.

    Args:
        model_name: a model of timm.
        in_channels: channels of the image.
        out_indices: which levels, rising: stages of a hierarchical network, blocks of a plain one; None: the model's
            own choice, all stages or the ends of the four quarters.
        out_image: give the image itself, stride 1, as the first level, for heads that gate it.
        out_norm: normalise every level over its channels, as Swin's and HorNet's segmentation networks do.
        pretrained: True: timm's weights, from the disk or the hub; a path: those of a file, in the model's own or its
            official layout.
        drop_path_rate: stochastic depth; None leaves the model's own.
        frozen_stages: -1: nothing; 0: the stem; k: the first k stages, too (of a plain network, blocks). Frozen layers
            stay in evaluation mode.
        norm_eval: keep batch normalisation in evaluation mode.
        with_cp: recompute layers in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=path)``, another way to write ``pretrained=path``.
        options: further arguments of ``timm.create_model``, for example ``img_size``.

    Raises:
        ConfigError: no such model or level, a model without features or without layers to freeze, weights that are
            missing or do not fit.
    """

    def __init__(
        self,
        model_name: str,
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        out_image: bool = False,
        out_norm: bool = False,
        pretrained: bool | str | None = False,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            pretrained = _checkpoint_of(init_cfg)
        if drop_path_rate is not None:
            options["drop_path_rate"] = drop_path_rate
        self.model_name, self.norm_eval, self.out_image = model_name, norm_eval, out_image
        self.model = _create(model_name, out_indices, pretrained is True, in_chans=in_channels, **options)
        if isinstance(pretrained, str):
            _load(self._network, Path(pretrained).expanduser(), model_name=model_name, in_chans=in_channels)
        levels: list[int] = self.model.feature_info.channels()
        self.out_channels = ([in_channels] if out_image else []) + levels
        self.strides: list[int] = ([1] if out_image else []) + self.model.feature_info.reduction()
        self.out_norms = nn.ModuleList(LayerNorm2d(channels) if out_norm else nn.Identity() for channels in levels)
        if with_cp:
            if not hasattr(self._network, "set_grad_checkpointing"):
                raise ConfigError(f"backbone.with_cp: {model_name} cannot recompute its layers; set it to False")
            self._network.set_grad_checkpointing()
        self._frozen = self._freeze(frozen_stages)
        self.train()

    @property
    def _network(self) -> Any:
        return getattr(self.model, "model", self.model)  # timm's feature getter wraps the model whole

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, in_channels, H, W) to levels (B, out_channels[i], about H / strides[i], W / strides[i])."""
        levels = [norm(level) for norm, level in zip(self.out_norms, self.model(x_BCHW), strict=True)]
        return (x_BCHW, *levels) if self.out_image else tuple(levels)

    def init_weights(self) -> None:
        """Nothing: timm initialises, and pretrained weights are loaded, when the model is built."""
        self._is_init = True

    def train(self, mode: bool = True) -> "VisionGatesBackbone":
        """Set training mode, except where it is frozen."""
        super().train(mode)
        if mode:
            norms = [m for m in self.modules() if isinstance(m, _BatchNorm)] if self.norm_eval else []
            for module in (*self._frozen, *norms):
                module.eval()
        return self

    def parameter_layers(self, *, coarse: bool = False) -> dict[str, int]:
        """Layer of each parameter of the timm model, by its name here: 0 is the stem, then blocks, ``coarse`` stages.

        Raises:
            ConfigError: timm has flattened the model, so that its layers are unknown.
        """
        if not hasattr(self._network, "group_matcher"):
            raise ConfigError(
                f"backbone: {self.model_name} does not keep its layers, which frozen_stages and layer decay need; "
                'add feature_cls="getter", or leave them out'
            )
        prefix = "model.model." if self._network is not self.model else "model."
        layers: dict[str, int] = group_parameters(
            self._network, self._network.group_matcher(coarse=coarse), reverse=True
        )
        return {f"{prefix}{name}": layer for name, layer in layers.items()}

    def no_weight_decay(self) -> set[str]:
        """Parameters that the model wants without weight decay, by their names here."""
        names = self._network.no_weight_decay() if hasattr(self._network, "no_weight_decay") else set()
        prefix = "model.model." if self._network is not self.model else "model."
        return {f"{prefix}{name}" for name in names}

    def _freeze(self, stages: int) -> list[nn.Module]:
        """Take gradients from the stem and so many stages; return the modules that hold nothing else."""
        if stages < 0:
            return []
        layers = self.parameter_layers(coarse=True)
        if stages > max(layers.values()):
            raise ConfigError(
                f"backbone.frozen_stages={stages}: {self.model_name} has {max(layers.values())} stages here; "
                "-1 freezes nothing, 0 the stem"
            )
        frozen = set()
        for name, parameter in self.named_parameters():
            if layers.get(name, stages + 1) <= stages:
                parameter.requires_grad_(False)
                frozen.add(parameter)
        return [module for module in self.modules() if (own := set(module.parameters())) and own <= frozen]


def _checkpoint_of(init_cfg: Mapping[str, Any]) -> str:
    if init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}:
        raise ConfigError(
            f'backbone.init_cfg: dict(type="Pretrained", checkpoint=PATH) or None is needed, found {dict(init_cfg)}; '
            "timm's models initialise themselves"
        )
    return str(init_cfg["checkpoint"])


def _create(model_name: str, out_indices: Sequence[int] | None, pretrained: bool, **options: Any) -> Any:
    if ":" not in model_name and not timm.is_model(model_name):  # with a colon a place, such as local-dir:
        near = difflib.get_close_matches(model_name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"backbone.model_name: timm and vision_gates have no model {model_name!r}{hint}")
    if out_indices is not None:
        options["out_indices"] = tuple(out_indices)
        if not out_indices or list(out_indices) != sorted(set(out_indices)):
            raise ConfigError(f"backbone.out_indices={list(out_indices)}: rising numbers of levels are needed")
    try:
        return timm.create_model(model_name, features_only=True, pretrained=pretrained, **options)
    except (AssertionError, IndexError) as error:
        if out_indices is None:
            raise
        options.pop("out_indices")
        features: Any = timm.create_model(model_name, features_only=True, **options)
        count = len(features.feature_info.info)
        raise ConfigError(
            f"backbone.out_indices={list(out_indices)}: {model_name} has {count} levels, 0 to {count - 1}"
        ) from error
    except (RuntimeError, TypeError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"backbone: {model_name} cannot be built as a feature pyramid: {reason}") from error


def _load(model: nn.Module, path: Path, *, model_name: str, in_chans: int) -> None:
    """Load a file of weights into a model without its head, and refuse one that leaves a parameter as it was."""
    if not path.is_file():
        raise ConfigError(f"backbone.pretrained: {path}: no such file; nothing is downloaded but with pretrained=True")
    try:
        weights = read_state_dict(str(path), weights_only=True)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            weights = convert(weights, model)
        own = model.state_dict()
        first = getattr(model, "pretrained_cfg", {}).get("first_conv")
        for name in (first,) if isinstance(first, str) else (first or ()):
            key = f"{name}.weight"
            if key in weights and key in own and weights[key].shape[1] != own[key].shape[1]:
                weights[key] = adapt_input_conv(in_chans, weights[key])
        weights = {k: v for k, v in weights.items() if k not in own or v.shape == own[k].shape}
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except Exception as error:  # whatever the file's reader raises, the file is the cause
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"backbone.pretrained: {path}: cannot be loaded into {model_name}: {reason}") from error
    if missing:
        raise ConfigError(
            f"backbone.pretrained: {path}: {len(missing)} of {len(own)} tensors of {model_name} are missing or of "
            f"another shape, first {missing[0]}; the file must be of this model"
        )
