"""Dividing cases into folds and parts, so that all cases of a patient stay together."""

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vision_gates.datasets.base import few, how_many, split_by_hash
from vision_gates.datasets.volumes.layouts import Case
from vision_gates.errors import ConfigError, DataError

__all__ = ["check_leakage", "hold_out", "k_folds", "named_split"]

Parts = tuple[list[int], list[int], list[int]]
_HASHED = 2**20  # bytes at each end of a file


def k_folds(cases: Sequence[Case], *, folds: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """The validation cases of each fold: indices into ``cases``, in order; every case is in one fold.

    Patients stay together, and folds differ in size by no more than the patient with the most cases. The result
    depends on the patients' names and the seed alone, not on the platform or the order of the cases.

    Raises:
        ConfigError: fewer than two folds.
        DataError: fewer patients than folds.
    """
    if folds < 2:
        raise ConfigError(f"data.folds={folds}: cross-validation needs at least 2 folds")
    members = _members(cases)
    if len(members) < folds:
        raise DataError(
            f"data.folds={folds}: {how_many(len(cases), 'case')} of only {how_many(len(members), 'patient')}, "
            f"{few(list(members))}; use at most {len(members)} folds, or correct data.groups if these are more patients"
        )

    def rank(patient: str) -> tuple[int, bytes]:
        return -len(members[patient]), hashlib.sha256(f"{seed}:{patient}".encode()).digest()

    held_out: list[list[int]] = [[] for _ in range(folds)]
    for patient in sorted(members, key=rank):
        min(held_out, key=len).extend(members[patient])  # the first of the smallest
    return tuple(tuple(sorted(fold)) for fold in held_out)


def hold_out(cases: Sequence[Case], *, val_fraction: float, test_fraction: float, seed: int) -> Parts:
    """Indices of the training, validation and test cases; the fractions are of the patients, see `split_by_hash`.

    A fraction of 0 leaves its part empty; another one gives it at least one patient.

    Raises:
        ConfigError: the fractions leave nothing for training.
        DataError: too few patients for all parts.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction={val_fraction:g} and data.test_fraction={test_fraction:g}: both must be 0 or more and "
            f"their sum below 1"
        )
    train, val, test = split_by_hash(
        [case.patient for case in cases], val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
    )
    if not train or (val_fraction > 0 and not val) or (test_fraction > 0 and not test):
        needed = 1 + (val_fraction > 0) + (test_fraction > 0)
        raise DataError(
            f"{how_many(len(cases), 'case')} of {how_many(len(_members(cases)), 'patient')}: training, validation and "
            f"test as asked for need at least {needed} patients; set a fraction to 0, or correct data.groups"
        )
    return train, val, test


def named_split(cases: Sequence[Case], *, val: Sequence[str], test: Sequence[str] = ()) -> Parts:
    """Indices of the training, validation and test cases, where the latter two are named and training has the rest.

    Args:
        cases: all of them.
        val: names of patients, each of which stands for all its cases, or of cases.
        test: as ``val``.

    Raises:
        DataError: a name is unknown, is in both lists or leaves a patient in two parts; nothing is left for training.
    """
    members = _members(cases)
    of_case = {case.name: [index] for index, case in enumerate(cases)}
    unknown = []
    chosen: dict[str, set[int]] = {"val": set(), "test": set()}
    for part, names in (("val", val), ("test", test)):
        for name in names:
            if name not in members and name not in of_case:
                near = difflib.get_close_matches(name, [*members, *of_case], n=1)
                unknown.append(f"data.{part}: {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
            chosen[part].update(members.get(name) or of_case.get(name, []))
    if unknown:
        known = few(list(of_case), limit=4)
        raise DataError(f"no case or patient has the name {few(unknown, limit=4)}; the cases are {known}")
    both = sorted(chosen["val"] & chosen["test"])
    if both:
        raise DataError(
            f"data.val and data.test both name {few([cases[i].name for i in both])}; keep each in one of the lists"
        )
    train = [index for index in range(len(cases)) if index not in chosen["val"] | chosen["test"]]
    if not train:
        raise DataError(f"data.val and data.test name all of {how_many(len(cases), 'case')}; leave some for training")
    held_out, tests = sorted(chosen["val"]), sorted(chosen["test"])
    check_leakage(cases, {"train": train, "val": held_out, "test": tests})
    return train, held_out, tests


def check_leakage(cases: Sequence[Case], parts: Mapping[str, Sequence[int]], *, contents: bool = False) -> None:
    """Checks that no patient, and with ``contents`` no image file, is in two parts.

    Args:
        cases: what the parts index.
        parts: name -> indices of its cases.
        contents: compare the image files too: by size, and those of equal size by their first and last MB. A file that
            was compressed again differs.

    Raises:
        DataError: naming the patients or files and the parts.
    """
    owner: dict[str, str] = {}
    shared: dict[str, str] = {}
    for part, indices in parts.items():
        for index in indices:
            patient = cases[index].patient
            first = owner.setdefault(patient, part)
            if first != part:
                shared.setdefault(patient, f"{patient} ({first} and {part})")
    if shared:
        raise DataError(
            f"{how_many(len(shared), 'patient')} of {len(owner):,} in more than one part: "
            f"{few(list(shared.values()))}; keep all cases of a patient in one part (data.groups tells the patient)"
        )
    if contents:
        _check_copies(cases, parts)


def _members(cases: Sequence[Case]) -> dict[str, list[int]]:
    """Patient -> indices of the cases."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        members[case.patient].append(index)
    return dict(members)


def _files(image: Path) -> list[Path]:
    return sorted(path for path in image.rglob("*") if path.is_file()) if image.is_dir() else [image]


def _check_copies(cases: Sequence[Case], parts: Mapping[str, Sequence[int]]) -> None:
    by_size: dict[tuple[int, ...], list[tuple[str, Path]]] = defaultdict(list)
    for part, indices in parts.items():
        for image in (image for index in indices for image in cases[index].images):
            by_size[tuple(_size(file) for file in _files(image))].append((part, image))
    copies = []
    for images in by_size.values():
        if len({part for part, _ in images}) < 2:  # most sizes are those of one file: nothing to read
            continue
        first: dict[bytes, tuple[str, Path]] = {}
        for part, image in images:
            other_part, other = first.setdefault(_digest(image), (part, image))
            if other_part != part:
                copies.append(f"{image} ({part}) and {other} ({other_part})")
    if copies:
        raise DataError(
            f"{how_many(len(copies), 'image file')} with the content of one in another part: {few(copies)}; remove the "
            f"copies, or give them one patient (data.groups)"
        )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _ends(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as stream:
            yield stream.read(_HASHED)
            stream.seek(max(_HASHED, _size(file) - _HASHED))
            yield stream.read()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _digest(image: Path) -> bytes:
    digest = hashlib.sha256()
    for file in _files(image):
        for block in _ends(file):
            digest.update(block)
    return digest.digest()
