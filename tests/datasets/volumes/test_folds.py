"""Dividing cases: patients stay together, sizes are balanced, draws do not change, leaks are found."""

from pathlib import Path

import numpy as np
import pytest

from vision_gates.datasets.volumes.folds import check_leakage, hold_out, k_folds, named_split
from vision_gates.datasets.volumes.layouts import Case, find_layout
from vision_gates.errors import ConfigError, DataError


def make(*counts: int) -> list[Case]:
    """counts: cases of the patients p0, p1 ..."""
    return [Case(f"p{p}_{i}", f"p{p}", (), None) for p, count in enumerate(counts) for i in range(count)]


def patients(cases: list[Case], indices: tuple[int, ...] | list[int]) -> set[str]:
    return {cases[i].patient for i in indices}


@pytest.mark.parametrize(
    "counts, folds", [((1,) * 10, 5), ((2,) * 15, 5), ((1, 5, 2, 1, 3, 1, 1, 2), 3), ((9, 1, 1), 3)]
)
def test_folds_are_balanced_and_keep_patients(counts, folds):
    cases = make(*counts)
    drawn = k_folds(cases, folds=folds, seed=3)
    assert sorted(i for fold in drawn for i in fold) == list(range(len(cases)))
    assert all(list(fold) == sorted(fold) for fold in drawn)
    owners = [patients(cases, fold) for fold in drawn]
    assert sum(len(owner) for owner in owners) == len(set.union(*owners)) == len(counts)
    sizes = [len(fold) for fold in drawn]
    assert min(sizes) > 0 and max(sizes) - min(sizes) <= max(counts)
    check_leakage(cases, {str(number): fold for number, fold in enumerate(drawn)})


def test_folds_are_the_same_everywhere():
    """Written down: another platform or Python version must draw the same folds."""
    cases = make(*[1] * 8)
    assert k_folds(cases, folds=3, seed=0) == ((2, 5, 6), (0, 1, 7), (3, 4))
    assert k_folds(cases, folds=3, seed=1) != k_folds(cases, folds=3, seed=0)
    turned = cases[::-1]
    drawn = [[{group[i].name for i in fold} for fold in k_folds(group, folds=3, seed=0)] for group in (cases, turned)]
    assert drawn[0] == drawn[1]


def test_too_few_patients_for_the_folds():
    with pytest.raises(DataError) as caught:
        k_folds(make(4, 4, 4), folds=5, seed=0)
    assert str(caught.value).startswith("data.folds=5: 12 cases of only 3 patients, p0, p1, p2; use at most 3 folds")
    with pytest.raises(ConfigError, match="data.folds=1: cross-validation needs at least 2 folds"):
        k_folds(make(1, 1), folds=1, seed=0)


def test_hold_out():
    cases = make(*[2] * 20)
    train, val, test = hold_out(cases, val_fraction=0.2, test_fraction=0.1, seed=0)
    assert [len(part) for part in (train, val, test)] == [28, 8, 4]
    assert sorted(train + val + test) == list(range(40))
    check_leakage(cases, {"train": train, "val": val, "test": test})
    assert hold_out(cases, val_fraction=0.2, test_fraction=0.1, seed=1) != (train, val, test)
    assert hold_out(cases, val_fraction=0, test_fraction=0, seed=0) == (list(range(40)), [], [])


def test_hold_out_of_too_few():
    with pytest.raises(DataError, match="4 cases of 2 patients: .* need at least 3 patients"):
        hold_out(make(2, 2), val_fraction=0.2, test_fraction=0.2, seed=0)
    with pytest.raises(DataError, match="2 cases of 1 patient: .* need at least 2 patients"):
        hold_out(make(2), val_fraction=0.2, test_fraction=0, seed=0)
    for val, test in ((0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(ConfigError, match="data.val_fraction"):
            hold_out(make(*[1] * 9), val_fraction=val, test_fraction=test, seed=0)


def test_named_split():
    cases = make(2, 1, 1, 2)
    assert named_split(cases, val=["p0"], test=["p1_0", "p2"]) == ([4, 5], [0, 1], [2, 3])
    assert named_split(cases, val=["p3_1", "p3_0"]) == ([0, 1, 2, 3], [4, 5], [])


def test_names_that_do_not_fit():
    cases = make(2, 1, 1, 2)
    for lists, message in (
        ({"val": ["p0", "q9"], "test": ["p3_l"]}, r"data.val: 'q9'.*, data.test: 'p3_l' \(did you mean 'p3_[01]'\?\);"),
        ({"val": ["p0"], "test": ["p0_1"]}, "data.val and data.test both name p0_1"),
        ({"val": ["p0_0"]}, r"1 patient of 4 in more than one part: p0 \(train and val\)"),
        ({"val": ["p0", "p1"], "test": ["p2", "p3"]}, "name all of 6 cases; leave some for training"),
    ):
        with pytest.raises(DataError, match=message):
            named_split(cases, **lists)


def test_a_patient_in_two_parts():
    cases = make(2, 2, 1)
    check_leakage(cases, {"train": [0, 1], "val": [2, 3], "test": [4]})
    with pytest.raises(DataError) as caught:
        check_leakage(cases, {"train": [0, 2], "val": [1], "test": [3, 4]})
    assert "2 patients of 3 in more than one part: p0 (train and val), p1 (train and test);" in str(caught.value)


def test_copies_of_an_image_in_two_parts(tmp_path):
    rng = np.random.default_rng(0)

    def case(name: str, content: bytes) -> Case:
        path = tmp_path / f"{name}.nii"
        path.write_bytes(content)
        return Case(name, name, (path,), None)

    big = rng.bytes(2_500_000)
    ends_differ = big[:-1] + bytes([big[-1] ^ 1])
    cases = [case("a", big), case("b", ends_differ), case("c", big), case("d", b"small"), case("e", b"other")]
    parts = {"train": [0, 3], "val": [1, 4]}
    check_leakage(cases, parts, contents=True)
    check_leakage(cases, {"train": [0, 2], "val": [1]}, contents=True)  # twice in one part is no leak
    check_leakage(cases, {"train": [0], "val": [2]})
    with pytest.raises(DataError) as caught:
        check_leakage(cases, parts | {"test": [2]}, contents=True)
    assert "1 image file with the content of one in another part" in str(caught.value)
    assert f"{tmp_path}/c.nii (test) and {tmp_path}/a.nii (train)" in str(caught.value)
    Path(cases[2].images[0]).unlink()
    with pytest.raises(DataError, match="c.nii: cannot be read"):
        check_leakage(cases, parts | {"test": [2]}, contents=True)


def test_copies_of_a_dicom_folder(tmp_path):
    cases = []
    for name, last in (("a", b"2"), ("b", b"3"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1").write_bytes(b"first")
        (tmp_path / name / "2").write_bytes(last)
        cases.append(Case(name, name, (tmp_path / name,), None))
    check_leakage(cases, {"train": [0], "val": [1]}, contents=True)
    with pytest.raises(DataError, match="content of one in another part"):
        check_leakage(cases, {"train": [0], "val": [2]}, contents=True)


def test_real_patients_stay_together(data_folder):
    cases = find_layout(data_folder / "acdc").cases
    drawn = k_folds(cases, folds=5, seed=0)
    assert [len(fold) for fold in drawn] == [6] * 5
    check_leakage(cases, {str(number): fold for number, fold in enumerate(drawn)}, contents=True)
