"""The preflight of volumes: what it counts, what it warns of, and every fault in one line."""

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from rich.console import Console

from vision_gates.datasets.volumes.checking import _BLOCK, _count, check_cases
from vision_gates.datasets.volumes.layouts import Layout, find_layout
from vision_gates.errors import DataError

SHAPE = (6, 5, 4)


def write(path: Path, array: np.ndarray, *, spacing: tuple[float, ...] = (1, 1, 2), origin=(0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def labels_of(*values: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A voxel of each value; the rest is 0."""
    labels = np.zeros(shape, np.int16)
    labels.flat[: len(values)] = values
    return labels


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes an nnU-Net data set: case -> its labels."""

    def write_all(channels: int = 1, names: tuple[str, ...] = ("background", "a", "b"), **cases: np.ndarray) -> Path:
        for case, labels in cases.items():
            for channel in range(channels):
                write(tmp_path / f"imagesTr/{case}_{channel:04d}.nii.gz", np.ones(labels.shape, np.float32))
            write(tmp_path / f"labelsTr/{case}.nii.gz", labels)
        about = {
            "channel_names": {str(c): f"c{c}" for c in range(channels)},
            "labels": {name: value for value, name in enumerate(names)},
            "file_ending": ".nii.gz",
        }
        (tmp_path / "dataset.json").write_text(json.dumps(about))
        return tmp_path

    return write_all


def fault(layout: Layout) -> str:
    with pytest.raises(DataError) as caught:
        check_cases(layout)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"data set at {layout.root}: ")
    return message.removeprefix(f"data set at {layout.root}: ")


def shown(report) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def test_facts_of_a_good_set(make):
    root = make(channels=2, p_t1=labels_of(1, 1, 2), p_t2=labels_of(1, shape=(8, 9, 10)), q=labels_of(2))
    steps = []
    report = check_cases(find_layout(root), progress=lambda done, total: steps.append((done, total)), workers=3)
    assert steps == [(1, 3), (2, 3), (3, 3)] and report.warnings == ()
    first = report.cases[0]
    assert (first.name, first.patient, first.shape, first.orientation) == ("p_t1", "p", SHAPE, "RAS")
    assert first.spacing == (1, 1, 2) and first.labels == {0: 117, 1: 2, 2: 1}
    assert report.label_voxels == {0: 117 + 719 + 119, 1: 3, 2: 2} and report.empty == []
    assert check_cases(find_layout(root)) == report


def test_table_and_dictionary(make):
    root = make(p_t1=labels_of(1, 1, 2), p_t2=labels_of(shape=(8, 9, 10)), q=labels_of(2))
    write(root / "imagesTs/t_0000.nii.gz", np.ones(SHAPE, np.float32))
    report = check_cases(find_layout(root))
    text = shown(report)
    for part in (
        "3 of 2 patients",
        "6 x 5 x 4 to 8 x 9 x 10, median 6 x 5 x 4",
        "1 x 1 x 2 in all",
        "RAS (3)",
        "label 2 b",
        "2: 0.208 % of the voxels, in 2 cases",
        "1: p_t2",
        "test cases",
    ):
        assert part in text
    told = json.loads(json.dumps(report.to_dict()))
    assert told["label_voxels"] == {"background": 956, "a": 2, "b": 2} and told["empty"] == ["p_t2"]
    assert told["cases"][0]["labels"] == {"0": 117, "1": 2, "2": 1} and told["cases"][0]["shape"] == list(SHAPE)
    assert [(case["name"], case["labels"]) for case in told["test_cases"]] == [("t", None)]


def test_warnings(make):
    root = make(
        names=("background", "a", "b", "c"), thin=labels_of(1, shape=(6, 5, 3)), void=labels_of(), full=labels_of(1, 2)
    )
    thin, empty, missing = check_cases(find_layout(root)).warnings
    assert thin.startswith("1 case with fewer than 4 voxels along an axis: thin (6 x 5 x 3)")
    assert empty == "1 of 3 cases are all background: void"
    assert missing == "no training case has a voxel of c"


def test_all_faults_in_one_line(make):
    """Each kind of fault names its files; a kind with many shows three of them and counts the others."""
    root = make(**{f"g{i}": labels_of(1, 2) for i in range(5)}, ok=labels_of(1), bad=labels_of(7), cut=labels_of(1))
    for i in range(5):
        write(root / f"labelsTr/g{i}.nii.gz", labels_of(1, 2), origin=(3, 0, 0))
    (root / "imagesTr/cut_0000.nii.gz").write_bytes(b"no volume")
    message = fault(find_layout(root))
    assert f"{root}/imagesTr/cut_0000.nii.gz: " in message
    assert f"{root}/labelsTr/g2.nii.gz: origin (3.00, 0.00, 0.00), not (0.00, 0.00, 0.00) as imagesTr/g2" in message
    assert "labelsTr/g3" not in message and "and 2 further faults of this kind; resample these" in message
    assert "labels outside 0..2 in 1 file: labelsTr/bad.nii.gz; values found: 0: 119 voxels, 7: 1 voxel;" in message


def test_grids_that_differ(make):
    root = make(channels=2, p=labels_of(1), q=labels_of(1), r=labels_of(1), s=labels_of(1))
    write(root / "imagesTr/p_0001.nii.gz", np.ones((6, 5, 5), np.float32))
    write(root / "labelsTr/q.nii.gz", labels_of(1), spacing=(1, 1, 2.5))
    write(root / "labelsTr/r.nii.gz", labels_of(1), spacing=(1, 1, 2.0001), origin=(0, 0.005, 0))  # rounding
    flipped = np.diag([-1.0, 1, 2, 1])
    nibabel.save(nibabel.Nifti1Image(labels_of(1), flipped), root / "labelsTr/s.nii.gz")
    message = fault(find_layout(root))
    assert "imagesTr/p_0001.nii.gz: size 6 x 5 x 5, not 6 x 5 x 4 as imagesTr/p_0000.nii.gz;" in message
    assert "labelsTr/q.nii.gz: spacing 1 x 1 x 2.5 mm, not 1 x 1 x 2 mm as imagesTr/q_0000.nii.gz;" in message
    assert "labelsTr/s.nii.gz: orientation LAS, not RAS" in message
    assert "labelsTr/r" not in message


@pytest.mark.parametrize(
    "values, names, remedy",
    [
        ((255,), 2, "0: 119 voxels, 255: 1 voxel; these are 0/255 masks: write 1 instead of 255"),
        ((1, 255), 3, "255 often marks voxels without a label: set data.ignore_index=255"),
        ((1, 2, 3), 3, "there are 4 classes: name them all, in labels in dataset.json"),
        ((1, 40), 3, "renumber the label files to 0, 1, 2 ..., or correct labels in dataset.json"),
        ((-1,), 3, "values found: -1: 1 voxel, 0: 119 voxels; renumber the label files"),
    ],
)
def test_label_values_without_a_class(make, values, names, remedy):
    layout = find_layout(make(names=("background", "a", "b")[:names], case=labels_of(*values)))
    assert remedy in fault(layout)
    if 255 in values:
        report = check_cases(replace(layout, ignore_index=255))
        assert report.name_of(255) == "ignored" and report.empty == (["case"] if values == (255,) else [])


def test_many_label_values_are_summed_up(make):
    message = fault(find_layout(make(a=labels_of(*range(100)), b=labels_of(3))))
    assert "in 2 files: labelsTr/a.nii.gz, labelsTr/b.nii.gz; values found: 0: 140 voxels" in message
    assert "and 92 rarer values" in message


def test_labels_of_pairs_have_no_names_yet(tmp_path):
    for folder, array in (("images", np.ones(SHAPE, np.float32)), ("labels", labels_of(1, 4))):
        write(tmp_path / folder / "a.nii.gz", array)
    layout = find_layout(tmp_path)
    report = check_cases(layout)
    assert report.label_voxels == {0: 118, 1: 1, 4: 1} and report.name_of(4) == "class_4"
    assert "label 4 class_4" in shown(report)
    assert "or correct data.class_names" in fault(replace(layout, class_names=("background", "a")))
    write(tmp_path / "labels/a.nii.gz", labels_of(-2))
    assert "labels outside 0, 1, 2 ... in 1 file: labels/a.nii.gz" in fault(layout)


def test_files_that_are_no_volumes_of_this_kind(make):
    root = make(flat=labels_of(1, shape=(6, 5, 1)), four=labels_of(1), soft=labels_of(1))
    write(root / "imagesTr/four_0000.nii.gz", np.ones((*SHAPE, 2), np.float32))
    write(root / "labelsTr/soft.nii.gz", np.full(SHAPE, 0.5, np.float32))
    message = fault(find_layout(root))
    assert "imagesTr/flat_0000.nii.gz: a single slice (6 x 5 x 1 voxels), not a volume" in message
    assert "imagesTr/four_0000.nii.gz: has 4 axes (6 x 5 x 4 x 2); split it into 3-D files" in message
    assert "labelsTr/soft.nii.gz: " in message


def test_wrong_number_of_channels(make):
    layout = find_layout(make(a=labels_of(1)))
    message = fault(replace(layout, channel_names=("T1", "T2")))
    assert "a_0000.nii.gz: case a has 1 image, but there are 2 channels (T1, T2)" in message


def test_test_cases_are_checked_but_not_counted(make):
    root = make(a=labels_of(1, 2))
    write(root / "imagesTs/t_0000.nii.gz", np.ones(SHAPE, np.float32))
    write(root / "labelsTs/t.nii.gz", labels_of(2, 2))
    report = check_cases(find_layout(root))
    assert report.label_voxels == {0: 118, 1: 1, 2: 1} and report.test_cases[0].labels == {0: 118, 2: 2}
    write(root / "labelsTs/t.nii.gz", labels_of(3))
    assert "labelsTs/t.nii.gz" in fault(find_layout(root))


def test_images_are_not_read(make):
    """Only their headers are: voxels that are missing after the header do not show."""
    root = make(a=labels_of(1, 2))
    path = root / "imagesTr/a_0000.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:352]))
    assert check_cases(find_layout(root)).cases[0].shape == SHAPE


def test_counting_in_blocks():
    labels = np.random.default_rng(0).integers(0, 3, _BLOCK + 5, dtype=np.uint8)
    assert _count(labels) == {value: int((labels == value).sum()) for value in range(3)}
    assert _count(np.asfortranarray([[70_000, 0], [0, 5]])) == {0: 2, 5: 1, 70_000: 1}


def test_real_data_is_clean(data_folder):
    acdc = check_cases(find_layout(data_folder / "acdc"), workers=2)
    assert acdc.warnings == () and acdc.label_voxels[3] > 100_000 and len(acdc.cases) == 30
    hippocampus = check_cases(find_layout(data_folder / "hippocampus"), workers=2)
    assert hippocampus.warnings == () and len(hippocampus.cases) == 50
    assert {case.spacing for case in hippocampus.cases} == {(1, 1, 1)}
