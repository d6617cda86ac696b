"""Honest files and traps of what belongs to a run: configuration, run.json, checkpoint, weights, an export's JSON."""

import hashlib
import io
import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fuzzing.damage import Files, Rng
from fuzzing.fields import in_zip
from fuzzing.seeds import Code, collect, put, write

_CLASSIFICATION = """task: {type: classification, label_smoothing: 0.1, class_weights: balanced}
seed: 3
data: {type: image_folder, root: images, image_size: [24, 32], batch_size: 4, normalize: dataset, groups: "(p)"}
model: {name: test_convnext, drop_path_rate: 0.1, options: {}}
optim: {name: adamw, lr: 1.0e-3, betas: [0.9, 0.99], clip_grad: 1.0}
schedule: {epochs: 3, warmup_epochs: 1.5}
augment:
  train: [{HorizontalFlip: {p: 0.5}}, {Affine: {scale: [0.9, 1.1], p: 0.9}}]
  mixup: 0.2
trainer: {run_dir: runs/a, ema_decay: 0.99, monitor: accuracy, patience: 3}
"""
_SEGMENTATION = """task:
  type: segmentation
  overlap: region_tversky
  region_grid: [4, 4, 2]
data:
  type: volumes
  root: scans
  mode: 3d
  patch_size: [16, 16, 8]
  spacing: [1.0, 1.0, 2.5]
  batch_size: 2
model:
  name: attention_unet
  options: {widths: [4, 8], norm: instance}
augment:
  batch: [{Spatial: {flip: [0, 1]}}, {Noise: {}}]
  train: [{RandFlip: {prob: 0.5, spatial_axis: 0}}]
trainer: {precision: bf16, checkpoint_minutes: null}
"""
INFO = {
    **{"class_names": ["a", "b"], "in_chans": 1, "mean": [0.5], "std": [0.2], "class_weights": [1.0, 2.0]},
    **{"counts": {"train": [4, 4]}, "images": {"train": 8, "val": 2}, "slices": None},
    "volumes": {
        "preprocessing": {"spacing": [1.0, 1.0, 2.0], "channels": [{"kind": "zscore", "nonzero": True}]},
        **{"spatial_dims": 3, "patch_size": [16, 16, 8], "channel_names": ["MRI"]},
    },
}


def make_config(root: Path, canary: Path) -> None:
    write(root / "image", config__yaml=_CLASSIFICATION)
    write(root / "volume", config__yaml=_SEGMENTATION)
    write(root / "largest", config__yaml=_CLASSIFICATION + "# " + "x" * 20_000)
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    traps = {
        "laughs": laughs + _CLASSIFICATION,
        "laughs_within": _CLASSIFICATION.replace("options: {}", "options: {x: *a9}").replace(
            "task:", laughs + "task:", 1
        ),
        "code": f"task: !!python/object/apply:os.mkdir ['{canary}']\n",
        "circle": "task: &a {type: *a}\n",
        "deep": "task: " + "[" * 20_000,
        "deep_blocks": "- " * 20_000,
        "date": _CLASSIFICATION.replace("seed: 3", "seed: 2001-99-99"),
        "escape": _CLASSIFICATION.replace("seed: 3", 'seed: "\\UFFFFFFFF"'),
        "digits": _CLASSIFICATION.replace("seed: 3", "seed: " + "9" * 5000),
        "long": _CLASSIFICATION + "\n- x" * 2_000_000,
        "empty_step": _SEGMENTATION.replace("{Noise: {}}", "{}"),
        "bytes": b"\xff\xfe\x00\x01" * 9,
    }
    for name, text in traps.items():
        write(root / f"trap_{name}", config__yaml=text)


def make_run(root: Path, canary: Path) -> None:
    for name, text, info in (("image", _CLASSIFICATION, INFO | {"volumes": None}), ("volume", _SEGMENTATION, INFO)):
        write(root / name, config__yaml=text, run__json=json.dumps(info))
    for name, text in (
        ("list", "[1, 2]"),
        ("deep", "[" * 100_000),
        ("digits", "9" * 5000),
        ("number", "3"),
        ("cut", '{"a'),
    ):
        write(root / f"trap_{name}", config__yaml=_CLASSIFICATION, run__json=text)
    write(root / "largest", config__yaml=_CLASSIFICATION, run__json=json.dumps(INFO))


def read_run(place: Path) -> None:
    from vision_gates.engine.building import load_run

    load_run(place)[1].to_dict()


def sealed(files: Files) -> Files:
    place = next(name for name in files if name.endswith("manifest.json"))
    manifest = json.loads(files[place])
    for name, entry in manifest["files"].items():
        entry["sha256"] = hashlib.sha256(files[place.replace("manifest.json", name)]).hexdigest()
    return files | {place: json.dumps(manifest).encode()}


def make_checkpoint(root: Path, canary: Path) -> None:
    import torch

    from vision_gates.engine.checkpoint import write_checkpoint

    def seed(name: str, state: dict[str, Any], size: int = 3) -> Files:
        weights = {"a.weight": torch.arange(4.0 * size).reshape(4, size), "b": torch.ones(3, dtype=torch.bfloat16)}
        write_checkpoint(root / name, "last", weights=weights, state=state, about={"epoch": 3, "metric": None})
        return collect(root / name)

    step = {"exp_avg": torch.ones(2, 3), "step": torch.tensor(4.0), "numbers": torch.arange(9)}
    files = seed(
        "plain", {"epoch": 3, "optimizer": {"state": {0: step}, "lr": [1e-3, None, True]}, "rng": torch.get_rng_state()}
    )
    seed("small", {"a": torch.zeros(5, dtype=torch.int8)[1:3], "b": "text", "c": (1, 2.5)})
    seed("largest", {"a": torch.zeros(300_000)}, 100_000)
    manifest, weights, state = "last/manifest.json", "last/weights.safetensors", "last/state.pt"
    code = io.BytesIO()
    torch.save({"a": Code(canary)}, code)
    huge = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    traps = {
        "code": files | {state: code.getvalue()},
        "plain_pickle": files | {state: pickle.dumps(Code(canary))},
        "numel": files | {state: _more_numbers(files[state])},
        "claim": files | {weights: struct.pack("<Q", len(huge)) + huge},
        "empty": files | {weights: b"", state: b""},
    }
    for name, trap in traps.items():
        put(sealed(trap), root / f"trap_{name}")
    for name, text in (
        ("list", '{"format": 2, "files": ["weights.safetensors", "state.pt"]}'),
        ("deep", "[" * 100_000),
    ):
        put(files | {manifest: text.encode()}, root / f"trap_{name}")
    outside = json.loads(files[manifest])
    outside["files"] = {"../../../etc/passwd": outside["files"]["state.pt"]}
    put(files | {manifest: json.dumps(outside).encode()}, root / "trap_outside")


def _more_numbers(data: bytes) -> bytes:
    """A file of torch.save whose storages claim 2^20 times the elements that they have."""

    def change(rng: Rng, name: str, body: bytes) -> bytes:
        return re.sub(rb"K.t(q.)Q", lambda match: b"J\x00\x00\x60\x00t" + match[1] + b"Q", body, flags=re.DOTALL)

    for draw in range(100):  # in_zip draws its member: try until it was the pickle
        changed = in_zip(np.random.default_rng(draw), data, b"", change)
        if b"J\x00\x00\x60\x00t" in changed:
            return changed
    raise AssertionError("torch writes its pickles in another way than was thought here")


def read_checkpoint_folder(place: Path) -> None:
    from vision_gates.engine.checkpoint import find_weights, read_checkpoint

    found = read_checkpoint(place, "last")
    if found is not None:
        _touch([found.weights, found.state])
        find_weights(place, "last")


def _touch(tree: Any) -> None:
    """Look at every number: memory that is not there shows as a crash."""
    import torch

    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided and tree.device.type == "cpu":
            tree.contiguous().view(-1).view(torch.uint8).sum() if not tree.is_quantized and tree.numel() else None
    elif isinstance(tree, dict | list | tuple):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            _touch(inner)


def _network() -> tuple[Any, Any]:
    from vision_gates.config import parse_config
    from vision_gates.engine.building import RunInfo

    raw = yaml.safe_load(_SEGMENTATION)
    return parse_config(raw), RunInfo.from_dict(INFO)


def make_weights(root: Path, canary: Path) -> None:
    import safetensors.torch
    import torch

    from vision_gates.engine.building import build_model

    weights = build_model(*_network()).state_dict()

    def saved(content: Any, **options: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(content, stream, **options)
        return stream.getvalue()

    write(root / "safe", weights__safetensors=safetensors.torch.save(dict(weights)))
    write(root / "zip", weights__pt=saved({"model": weights, "epoch": 3}))
    write(root / "largest_old", weights__pth=saved(weights, _use_new_zipfile_serialization=False))
    write(root / "old", weights__pth=saved(weights, _use_new_zipfile_serialization=False))
    write(root / "trap_code", weights__pt=saved({**weights, "a": Code(canary)}))
    write(root / "trap_code_old", weights__pth=saved(Code(canary), _use_new_zipfile_serialization=False))
    write(root / "trap_pickle", weights__bin=pickle.dumps(Code(canary)))
    write(root / "trap_list", weights__pt=saved([1, 2]))
    write(root / "trap_words", weights__pt=saved({key: "x" for key in weights}))
    write(root / "trap_numbers", weights__pt=saved({1: 2}))
    write(root / "trap_empty", weights__safetensors=b"")


def read_weights(place: Path) -> None:
    from vision_gates.engine.building import build_model

    config, info = _network()
    for path in place.iterdir():
        model = config.model.model_copy(update={"checkpoint": str(path)})
        build_model(config.model_copy(update={"model": model}), info)


def make_sidecar(root: Path, canary: Path) -> None:
    about = {
        **{
            "task": "segmentation",
            "spatial_dims": 3,
            "in_chans": 1,
            "input_size": [16, 16, 8],
            "class_names": ["a", "b"],
        },
        **{"dynamic_axes": ["batch"], "volumes": INFO["volumes"], "model": {"name": "x"}, "versions": {"torch": "2"}},
    }
    write(root / "volume", a__json=json.dumps(about))
    image = {
        "images": {"size": [24, 32], "mean": [0.5], "std": [0.2]},
        "volumes": None,
        "spatial_dims": 2,
        "input_size": [24, 32],
    }
    write(root / "image", a__json=json.dumps(about | image))
    write(root / "largest", a__json=json.dumps(about))
    write(root / "trap_deep", a__json="[" * 100_000)
    write(root / "trap_digits", a__json='{"in_chans": ' + "9" * 5000 + "}")


def read_sidecar(place: Path) -> None:
    from vision_gates.export.sidecar import Sidecar

    for path in place.iterdir():
        Sidecar.from_json(path.read_text(encoding="utf-8", errors="surrogateescape"), source=path)
