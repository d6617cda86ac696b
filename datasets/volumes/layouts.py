"""The cases of a folder of volumes: nnU-Net v2, Medical Segmentation Decathlon, or images/ beside labels/.

- ``nnunet``: dataset.json with ``labels`` {name: value}, ``channel_names`` and ``file_ending``; a file a channel,
  imagesTr/CASE_0000.nii.gz, and labelsTr/CASE.nii.gz; imagesTs and labelsTs where they exist. The label named "ignore"
  is not scored. A key ``dataset`` that lists the files of each case is followed instead of imagesTr and labelsTr.
- ``msd``: dataset.json with ``labels`` {value: name}, ``modality``, ``training`` [{"image": ..., "label": ...}] and
  ``test`` [...]. Where image x.nii.gz is missing but x_0000.nii.gz is there, these are its channels (nnU-Net v1).
- ``pairs``: no dataset.json; images/CASE.nii.gz or CASE_0000.nii.gz a channel, or a sub-folder of DICOM files a case,
  and labels/CASE.nii.gz. Nothing names the classes there.

Files that dataset.json names must lie below the root, symbolic links followed. Hidden files, such as the "._" copies in
archives made on macOS, are left out.

Which cases are of one patient tells ``groups``: a regular expression whose first group is the patient; None, every case
is a patient; or "auto": sub-01_ses-02 is patient sub-01 (BIDS), and from other names the trailing parts that tell a
time go (_frame01, _t1, _tp2, _time3, _timepoint3, _phase2, _visit3, _ses-02, _session2, _run-1, _baseline, _followup1,
_ED, _ES), provided that some cases then have the same name.

Sources: https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md; Antonelli et al., "The Medical
Segmentation Decathlon", Nature Communications 2022; https://bids-specification.readthedocs.io.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vision_gates.datasets.base import few, group_names, how_many, resolve_root
from vision_gates.datasets.folders import sub_folders
from vision_gates.datasets.volumes.description import Description, short
from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.reading import VOLUME_SUFFIXES, is_volume, stem

__all__ = ["Case", "Layout", "find_layout", "patients_of"]

Kind = Literal["nnunet", "msd", "pairs"]
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_LONGEST_NAME = 200
_CASE = re.compile(rf"(?!\.)[^/\\\x00-\x1f\x7f]{{1,{_LONGEST_NAME}}}")
_BIDS = re.compile(r"(sub-[A-Za-z0-9]+)(?:_|$)")
_TIME = re.compile(
    r"[_-](?:(?:frame|t|tp|time|timepoint|phase|visit|ses|session|run)[_-]?\d+|(?:baseline|followup)[_-]?\d*|ED|ES)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Case:
    """One image with its labels. images: a file or DICOM folder per channel. labels: None where there are none."""

    name: str
    patient: str
    images: tuple[Path, ...]
    labels: Path | None


@dataclass(frozen=True)
class Layout:
    """What a data set consists of.

    Attributes:
        kind: how it is laid out, see the module's text.
        root: absolute.
        cases: with labels, sorted by name.
        test_cases: set apart by the data set, sorted by name; most have no labels.
        class_names: index = label value, background first; empty for ``pairs``.
        channel_names: one for each image of a case.
        ignore_index: label value that is not scored.
    """

    kind: Kind
    root: Path
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...]
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    ignore_index: int | None


def find_layout(
    root: str | Path,
    *,
    kind: Literal["auto", "nnunet", "msd", "pairs"] = "auto",
    images: str = "images",
    labels: str = "labels",
    groups: str | None = "auto",
) -> Layout:
    """Finds the cases of a data set without opening a volume.

    Args:
        root: its folder.
        kind: see the module's text; "auto" tells by dataset.json and the folders.
        images: folder of the images below root, for ``pairs``.
        labels: folder of the labels below root, for ``pairs``.
        groups: how a case's name tells the patient, see the module's text.

    Raises:
        DataError: files are missing or have no counterpart, or dataset.json cannot be used.
        ConfigError: ``groups`` is not a regular expression with a group.
    """
    folder = resolve_root(str(root))
    chosen = _guess(folder, images, labels) if kind == "auto" else kind
    if chosen == "pairs":
        layout = _find_pairs(folder, images, labels)
    else:
        about = Description(folder / "dataset.json")
        layout = _find_nnunet(folder, about) if chosen == "nnunet" else _find_msd(folder, about)
    if not layout.cases:
        raise DataError(f"{folder}: no training case with labels")
    both = [*layout.cases, *layout.test_cases]
    named = [
        replace(case, patient=patient)
        for case, patient in zip(both, patients_of([case.name for case in both], groups), strict=True)
    ]
    count = len(layout.cases)
    return replace(layout, cases=_by_name(named[:count]), test_cases=_by_name(named[count:]))


def patients_of(names: Sequence[str], groups: str | None = "auto") -> list[str]:
    """The patient of each case; see the module's text for ``groups``. Raises as :func:`find_layout`."""
    if groups != "auto":
        try:
            if groups is not None and re.compile(groups).groups < 1:
                raise ConfigError(f"data.groups: {groups!r} needs a group (...) around the part that names the patient")
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"data.groups: {groups!r} is not a regular expression ({error})") from error
        return group_names(names, groups)
    stripped = [_without_time(name) for name in names]
    return stripped if len(set(stripped)) < len(set(names)) else list(names)


def _without_time(name: str) -> str:
    bids = _BIDS.match(name)
    if bids:
        return bids[1]
    while match := _TIME.search(name):
        if match.start() == 0:
            break
        name = name[: match.start()]
    return name


def _by_name(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(sorted(cases, key=lambda case: case.name))


def _guess(root: Path, images: str, labels: str) -> Kind:
    """The layout a folder has; `DataError` telling what was looked for if none fits."""
    path = root / "dataset.json"
    if path.exists():
        content = Description(path).content
        if "file_ending" in content:
            return "nnunet"
        if "training" in content:
            return "msd"
        raise DataError(
            f"{path}: has neither the key 'file_ending' (nnU-Net v2) nor 'training' (Medical Segmentation Decathlon)"
        )
    if (root / images).is_dir() and (root / labels).is_dir():
        return "pairs"
    there = [folder.name for folder in sub_folders(root)]
    if {"imagesTr", "labelsTr"} <= set(there):
        hint = "imagesTr and labelsTr without it can be read with data.images=imagesTr data.labels=labelsTr"
    else:
        hint = f"folders there: {few(there, limit=6) or 'none'}; set data.images and data.labels to their names"
    raise DataError(
        f"{root}: looked for dataset.json (nnU-Net, Medical Segmentation Decathlon) and for the folders {images} and "
        f"{labels}; {hint}"
    )


def _visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def _no_volumes(folder: Path, wanted: Sequence[str]) -> DataError:
    """The error where a folder has no file of a known ending: what it has instead."""
    endings = {
        next((suffix for suffix in VOLUME_SUFFIXES if path.name.lower().endswith(suffix)), path.suffix)
        for path in _visible_files(folder)
    }
    found = f"it holds files with {few(sorted(ending or 'no ending' for ending in endings), limit=6)}"
    return DataError(
        f"{folder}: no file with {', '.join(wanted)} ({found if endings else 'it holds no files'}); images of two "
        f"dimensions are read by data.type=image_mask_folder"
    )


class _Faults:
    """Everything wrong with the files of a data set, raised at once."""

    def __init__(self, where: object) -> None:
        self._where, self._found = where, list[str]()

    def add(self, items: Sequence[object], noun: str, what: str) -> None:
        if items:
            self._found.append(f"{how_many(len(items), noun)} {what}: {few(items)}")

    def raise_any(self) -> None:
        if self._found:
            raise DataError(f"{self._where}: {'; '.join(self._found)}; add, rename or remove them")


def _complete(
    found: dict[str, dict[int, Path]], channels: int, suffix: str, faults: _Faults
) -> dict[str, tuple[Path, ...]]:
    """The images of each case, in the order of the channels; gaps are faults. found: case -> channel -> image."""
    missing = [f"{case}_{c:04d}{suffix}" for case, files in found.items() for c in range(channels) if c not in files]
    faults.add(missing, "channel file", "missing")
    extra = [path.name for files in found.values() for c, path in files.items() if c >= channels]
    faults.add(extra, "file", f"numbered beyond the {how_many(channels, 'channel')}")
    return {case: tuple(files[c] for c in sorted(files)) for case, files in found.items()}


def _find_nnunet(root: Path, about: Description) -> Layout:
    class_names, ignore_index = about.classes()
    channel_names = about.channels("channel_names", "modality")
    ending = about.get("file_ending", str, '".nii.gz"')
    if ending not in VOLUME_SUFFIXES:
        raise DataError(
            f"{about.path}: file_ending is {ending!r}; read are {', '.join(VOLUME_SUFFIXES)} (images of two "
            f"dimensions: data.type=image_mask_folder)"
        )
    faults = _Faults(root)

    def images_in(folder: Path) -> dict[str, tuple[Path, ...]]:
        found: dict[str, dict[int, Path]] = {}
        unnumbered, others = [], []
        for path in _visible_files(folder):
            match = _CHANNEL.fullmatch(path.name.removesuffix(ending))
            if not path.name.endswith(ending):
                others += [path.name] if is_volume(path) else []
            elif match is None:
                unnumbered.append(path.name)
            else:
                found.setdefault(match[1], {})[int(match[2])] = path
        if not found and not unnumbered:
            raise _no_volumes(folder, [ending])
        faults.add(unnumbered, "file", f"in {folder.name} without a channel number (CASE_0000{ending})")
        faults.add(others, "file", f"in {folder.name} with another ending than {ending}")
        return _complete(found, len(channel_names), ending, faults)

    def labels_in(folder: Path) -> dict[str, Path]:
        files = [path for path in _visible_files(folder) if path.name.endswith(ending)]
        return {path.name.removesuffix(ending): path for path in files}

    if "dataset" in about.content:
        entries = about.get("dataset", dict, '{"case": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}')
        cases = _listed(root, about, "dataset", entries.items(), 1, faults)
    else:
        images = images_in(_folder(root, "imagesTr", "nnU-Net keeps the training images there"))
        labels = labels_in(_folder(root, "labelsTr", "nnU-Net keeps the training labels there"))
        faults.add([name for name in images if name not in labels], "image", "without labels in labelsTr")
        faults.add([name for name in labels if name not in images], "label file", "without an image in imagesTr")
        cases = [Case(name, "", files, labels.get(name)) for name, files in images.items()]
    tests = []
    if (root / "imagesTs").is_dir() and any(is_volume(path) for path in _visible_files(root / "imagesTs")):
        known = labels_in(root / "labelsTs") if (root / "labelsTs").is_dir() else {}
        tests = [Case(name, "", files, known.get(name)) for name, files in images_in(root / "imagesTs").items()]
    faults.raise_any()
    return Layout("nnunet", root, tuple(cases), tuple(tests), class_names, channel_names, ignore_index)


def _folder(root: Path, name: str, remedy: str) -> Path:
    if not (root / name).is_dir():
        there = few([folder.name for folder in sub_folders(root)], limit=6) or "none"
        raise DataError(f"{root / name}: no such folder (folders in {root}: {there}); {remedy}")
    return root / name


def _find_msd(root: Path, about: Description) -> Layout:
    class_names, ignore_index = about.classes()
    channel_names = about.channels("modality", "channel_names")
    faults = _Faults(root)
    example = '[{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]'
    training = [(None, entry) for entry in about.get("training", list, example)]
    cases = _listed(root, about, "training", training, len(channel_names), faults)
    tests = []
    if about.content.get("test"):
        listed = about.get("test", list, '["./imagesTs/a.nii.gz"]')
        test = [(None, {"image": entry} if isinstance(entry, str) else entry) for entry in listed]
        tests = _listed(root, about, "test", test, len(channel_names), faults)
    faults.raise_any()
    return Layout("msd", root, tuple(cases), tuple(tests), class_names, channel_names, ignore_index)


def _listed(
    root: Path,
    about: Description,
    key: str,
    entries: Iterable[tuple[str | None, Any]],
    channels: int,
    faults: _Faults,
) -> list[Case]:
    """The cases that dataset.json lists under ``key``: (name or None, {"image" or "images": ..., "label": ...})."""
    cases: dict[str, Case] = {}
    missing, twice = [], []
    for number, (given, entry) in enumerate(entries):
        known = entry if isinstance(entry, dict) else {}
        texts: Any = known.get("images") if "images" in known else [known.get("image")]
        label = known.get("label")
        right = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        if not right or not (isinstance(label, str) or (label is None and key == "test")):
            raise DataError(
                f"{about.path}: {key}: entry {given or number} is {short(entry)}; it must name the files, such as "
                '{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}'
            )
        images = [_below(root, about, key, text) for text in texts]
        labels = None if label is None else _below(root, about, key, label)
        if any(path.name.startswith("._") for path in images):
            continue
        name = given or stem(images[0])
        if not _CASE.fullmatch(name):  # a case's name becomes those of files that are written
            raise DataError(
                f"{about.path}: {key}: the case {short(name)} cannot name a file; use letters, digits, _ and -, at "
                f"most {_LONGEST_NAME}"
            )
        if len(images) == 1 and not images[0].exists():
            suffix = images[0].name.removeprefix(stem(images[0]))
            folder = Path(texts[0]).parent
            numbered = [(folder / f"{stem(images[0])}_{c:04d}{suffix}").as_posix() for c in range(channels)]
            if (root / numbered[0]).exists():
                images = [_below(root, about, key, text) for text in numbered]
        files = images if labels is None else [*images, labels]
        missing += [path.relative_to(root).as_posix() for path in files if not path.is_file()]
        twice += [name] if name in cases else []
        cases[name] = Case(name, "", tuple(images), labels)
    faults.add(missing, "file", f"missing that dataset.json lists under {key}")
    faults.add(twice, "name", f"more than once in dataset.json under {key}")
    return list(cases.values())


def _below(root: Path, about: Description, key: str, text: str) -> Path:
    """The file that dataset.json names; `DataError` if it lies outside the root, where a download has no business."""
    try:
        path, inner = (root / text).resolve(), root.resolve()
        inside = not Path(text).is_absolute() and path.is_relative_to(inner) and path != inner
        path.exists()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a null character, a name that is too long
        inside = False
    if not inside:
        raise DataError(f"{about.path}: {key}: {short(text)} is not a file below {root}; name files relative to it")
    return root / text


def _find_pairs(root: Path, images: str, labels: str) -> Layout:
    image_folder = _folder(root, images, "set data.images to its name")
    label_folder = _folder(root, labels, "set data.labels to its name")
    if image_folder.resolve() == label_folder.resolve():
        raise DataError(f"{image_folder}: data.images and data.labels must be two folders")
    faults = _Faults(root)

    def by_stem(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
        if not paths:
            raise _no_volumes(folder, VOLUME_SUFFIXES)
        found: dict[str, Path] = {}
        twice = [path.name for path in paths if found.setdefault(stem(path), path) != path]
        faults.add(twice, "file", f"in {folder.name} named as another, but for the ending")
        return found

    series = [path for path in sub_folders(image_folder) if any(path.iterdir())]
    image_paths = by_stem(image_folder, [path for path in _visible_files(image_folder) if is_volume(path)] + series)
    label_paths = by_stem(label_folder, [path for path in _visible_files(label_folder) if is_volume(path)])
    found: dict[str, dict[int, Path]] = {}
    lonely, twice = [], []
    for name, path in image_paths.items():
        match = _CHANNEL.fullmatch(name)
        if name not in label_paths and not (match and match[1] in label_paths):
            lonely.append(path.name)
            continue
        case, channel = (name, 0) if name in label_paths or match is None else (match[1], int(match[2]))
        if found.setdefault(case, {}).setdefault(channel, path) != path:
            twice.append(path.name)
    faults.add(lonely, "image", f"without labels in {labels}")
    faults.add(twice, "image", "of a channel that has one")
    alone = [path.name for name, path in label_paths.items() if name not in found]
    faults.add(alone, "label file", f"without an image in {images}")
    channels = len({channel for files in found.values() for channel in files})
    complete = _complete(found, channels, "", faults)
    faults.raise_any()
    cases = tuple(Case(name, "", files, label_paths[name]) for name, files in complete.items())
    return Layout("pairs", root, cases, (), (), tuple(f"channel_{c}" for c in range(channels)), None)
