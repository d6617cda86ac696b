"""The kinds of files that are fuzzed: how each is made, changed and read."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzzing.damage import Files, Rng, damage, in_json, in_yaml
from fuzzing.fields import in_dicom, in_header, in_network, in_nifti, in_npz, in_picture, in_tiff, in_weights
from fuzzing.images import make_image, make_npz, make_overlays, make_tiff, read_npz, read_overlay_file
from fuzzing.networks import make_network, read_network
from fuzzing.results import in_lines, make_results, read_results
from fuzzing.runs import (
    make_checkpoint,
    make_config,
    make_run,
    make_sidecar,
    make_weights,
    read_checkpoint_folder,
    read_run,
    read_sidecar,
    read_weights,
    sealed,
)
from fuzzing.seeds import every
from fuzzing.volumes import make_dicom, make_itk, make_layout, make_nifti, read_layout


def _config(path: Path) -> None:
    from vision_gates.config import load_config

    load_config(path)


def _volume(path: Path) -> None:
    from vision_gates.volumes.reading import read_volume

    read_volume(path)


def _label_map(path: Path) -> None:
    from vision_gates.volumes.reading import read_labels

    read_labels(path)


def _image(path: Path) -> None:
    from vision_gates.datasets.images import read_image

    read_image(path)


def _mask(path: Path) -> None:
    from vision_gates.datasets.images import read_mask

    read_mask(path)


Change = Callable[[Rng, bytes, bytes], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file: ``make`` writes a folder for each seed ("trap_*", "largest*"), ``read`` reads such a folder."""

    make: Callable[[Path, Path], None]
    read: Callable[[Path], object]
    change: Change
    real: tuple[str, ...] = ()  # suffixes of real files; "": of none
    mutable: str = ".*"  # names of files that are changed
    seal: Callable[[Files], Files] | None = None


KINDS = {
    "config": Kind(make_config, every(_config), in_yaml, (".yaml",)),
    "run": Kind(make_run, read_run, in_json, mutable="run.json"),
    "results": Kind(make_results, read_results, in_lines, mutable=r".*\.jsonl?"),
    "checkpoint": Kind(make_checkpoint, read_checkpoint_folder, in_weights, seal=sealed),
    "weights": Kind(make_weights, read_weights, in_weights),
    "nifti": Kind(make_nifti, every(_volume, _label_map), in_nifti, (".nii", ".nii.gz")),
    "itk": Kind(make_itk, every(_volume, _label_map), in_header, (".mha", ".nrrd")),
    "dicom": Kind(make_dicom, _volume, in_dicom, ("", ".dcm")),
    "image": Kind(make_image, every(_image, _mask), in_picture, (".png", ".jpg", ".jpeg", ".bmp", ".webp")),
    "tiff": Kind(make_tiff, every(_image, _mask), in_tiff, (".tif", ".tiff")),
    "npz": Kind(make_npz, read_npz, in_npz, (".npz",)),
    "overlays": Kind(make_overlays, read_overlay_file, in_npz),
    "layout": Kind(make_layout, read_layout, in_json, mutable="dataset.json"),
    "sidecar": Kind(make_sidecar, read_sidecar, in_json),
    "network": Kind(make_network, read_network, in_network),
}


def real_files(kind: Kind, folder: Path | None) -> list[Files]:
    """Real files of a folder and below, the smallest 24."""
    if folder is None:
        return []
    paths = [path for path in folder.rglob("*") if path.is_file() and "".join(path.suffixes[-2:]) in kind.real]
    paths = sorted(
        (path for path in paths if path.stat().st_size < 2**20), key=lambda path: (path.stat().st_size, path)
    )
    return [{path.name: path.read_bytes()} for path in paths[:24]]


def mutant(rng: Rng, kind: Kind, seeds: Sequence[Files]) -> Files:
    """A seed with one file changed: in its format's own fields, or anywhere."""
    files = seeds[int(rng.integers(len(seeds)))]
    names = [name for name in files if re.fullmatch(kind.mutable, Path(name).name)]
    name = names[int(rng.integers(len(names)))]
    others = [file for seed in seeds for file in seed.values() if isinstance(file, bytes)]
    other = others[int(rng.integers(len(others)))]
    change = kind.change if rng.random() < 0.7 else damage
    if name.endswith(".json"):
        change = in_json if change is not damage else damage
    elif name.endswith(".npy"):
        change = in_npz if change is not damage else damage
    try:
        data = change(rng, files[name], other)
    except Exception:  # a form that its mutator does not know
        data = damage(rng, files[name], other)
    changed = files | {name: data}
    if kind.seal is not None and not name.endswith(".json"):
        changed = kind.seal(changed)
    return changed
