"""What is written is what nibabel and SimpleITK read, at the same place; nothing is left of a write that fails."""

import json
import os

import nibabel
import numpy as np
import pytest

from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes import writing
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.reading import read_geometry, read_labels, read_volume
from vision_gates.volumes.writing import write_labels, write_volume

sitk = pytest.importorskip("SimpleITK")

SHAPE = (5, 6, 7)
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
NAMES = ("background", "liver", "tumour")


def grid(kind="oblique"):
    turn = np.eye(3)
    if kind != "straight":
        for plane, angle in (((1, 2), 0.3), ((0, 1), -0.2)):
            one = np.eye(3)
            one[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            turn = one @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.75, 0.8, 3.0])
    if kind == "sheared":  # a tilted gantry
        affine[:3, 2] += 0.2 * affine[:3, 1]
    affine[:3, 3] = (120.125, -35.5, -804.3)
    return Geometry(SHAPE, affine)


def random_labels(high=3, dtype=np.int64):
    return np.random.default_rng(0).integers(0, high, SHAPE).astype(dtype)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["straight", "oblique", "sheared"])
def test_labels_come_back_at_the_same_place(tmp_path, suffix, kind):
    path, labels, geometry = tmp_path / f"a.b{suffix}", random_labels(), grid(kind)
    write_labels(path, labels, geometry, names=NAMES)
    back = read_labels(path)
    np.testing.assert_array_equal(back.array, labels)
    assert back.array.dtype == np.uint8 and os.listdir(tmp_path) == [path.name]
    np.testing.assert_allclose(back.geometry.affine, geometry.affine, rtol=1e-6, atol=1e-6)
    assert read_geometry(path).differences(geometry, tolerance=1e-5) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_itk_sees_the_same_place(tmp_path, suffix):
    path, labels, geometry = tmp_path / f"case{suffix}", random_labels(), grid()
    write_labels(path, labels, geometry, names=NAMES)
    image = sitk.ReadImage(str(path))
    assert image.GetPixelID() == sitk.sitkUInt8
    for index in ((0, 0, 0), (4, 5, 6), (1, 4, 2)):
        assert image[index] == labels[index]
        left, back, up = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((-left, -back, up), (geometry.affine @ (*index, 1))[:3], atol=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_intensities(tmp_path, suffix):
    array = np.random.default_rng(0).normal(0, 1000, SHAPE)
    write_volume(tmp_path / f"image{suffix}", array[::-1], grid())  # a view with a negative stride
    back = read_volume(tmp_path / f"image{suffix}")
    assert back.array.dtype == np.float32
    np.testing.assert_array_equal(back.array, array[::-1].astype(np.float32))
    assert back.geometry.differences(grid(), tolerance=1e-5) == []


def test_nifti_header(tmp_path):
    write_labels(tmp_path / "a.nii.gz", random_labels(), grid(), names=NAMES)
    image = nibabel.load(tmp_path / "a.nii.gz")
    (qform, qcode), (sform, scode) = image.get_qform(coded=True), image.get_sform(coded=True)
    assert (qcode, scode) == (1, 1) and image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(sform, grid().affine, rtol=1e-6)
    np.testing.assert_allclose(qform, grid().affine, rtol=1e-5, atol=1e-5)
    comment = json.loads(image.header.extensions[0].get_content())
    assert comment == {"labels": {"0": "background", "1": "liver", "2": "tumour"}}


def test_a_quaternion_cannot_hold_a_shear(tmp_path):
    write_labels(tmp_path / "a.nii", random_labels(), grid("sheared"), names=NAMES)
    image = nibabel.load(tmp_path / "a.nii")
    assert image.get_qform(coded=True)[1] == 0 and image.get_sform(coded=True)[1] == 1
    np.testing.assert_allclose(image.affine, grid("sheared").affine, rtol=1e-6)


def test_nrrd_names_the_segments_as_slicer_expects(tmp_path):
    write_labels(tmp_path / "a.seg.nrrd", random_labels(), grid(), names=NAMES)
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"))
    for number, name in enumerate(NAMES[1:]):
        assert image.GetMetaData(f"Segment{number}_Name") == name
        assert image.GetMetaData(f"Segment{number}_LabelValue") == str(number + 1)
    assert not image.HasMetaDataKey("Segment2_Name")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("highest", "stored"), [(255, "uint8"), (256, "uint16"), (65535, "uint16")])
def test_many_labels(tmp_path, suffix, highest, stored):
    labels = random_labels(dtype=np.int32)
    labels[1, 2, 3] = highest
    write_labels(tmp_path / f"a{suffix}", labels, grid(), names=NAMES)
    assert sitk.ReadImage(str(tmp_path / f"a{suffix}")).GetPixelIDTypeAsString().startswith(f"{stored[4:]}-bit uns")
    np.testing.assert_array_equal(read_labels(tmp_path / f"a{suffix}").array, labels)


def test_truth_values_are_labels(tmp_path):
    write_labels(tmp_path / "a.nrrd", random_labels(2, bool), grid(), names=NAMES[:2])
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nrrd").array, random_labels(2))


def test_the_same_labels_make_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_labels(tmp_path / folder / "a.nii.gz", random_labels(), grid(), names=NAMES)
    assert (tmp_path / "one" / "a.nii.gz").read_bytes() == (tmp_path / "two" / "a.nii.gz").read_bytes()
    assert (tmp_path / "one" / "a.nii.gz").read_bytes()[4:8] == bytes(4)  # no time of day


def test_more_voxels_in_a_row_than_nifti_1_can_count(tmp_path):
    labels = np.arange(40000, dtype=np.uint16).reshape(-1, 1, 1)
    write_labels(tmp_path / "a.nii.gz", labels, Geometry(labels.shape, grid().affine), names=NAMES)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz").array, labels)


def test_unknown_suffix(tmp_path):
    for name in ("a.dcm", "a.nhdr", "nii", "a.gz"):
        with pytest.raises(ConfigError, match=rf"{name}: volumes are written as .nii.gz, .nii, .nrrd, .mha"):
            write_labels(tmp_path / name, random_labels(), grid(), names=NAMES)
    assert os.listdir(tmp_path) == []


def test_faults_of_the_caller(tmp_path):
    path = tmp_path / "a.nii.gz"
    with pytest.raises(ValueError, match=r"\(5, 6, 8\) does not lie on a grid of \(5, 6, 7\)"):
        write_labels(path, np.zeros((5, 6, 8), np.uint8), grid(), names=NAMES)
    for labels in (random_labels() - 1, random_labels(dtype=np.float32), random_labels() + 65535):
        with pytest.raises(ValueError, match="labels must be integers from 0 to 65535"):
            write_labels(path, labels, grid(), names=NAMES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    write_labels(path, random_labels(), grid(), names=NAMES)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(DataError, match=rf"a{suffix}: cannot be written \(.*No space left.*\); check the folder"):
        write_labels(path, 1 - random_labels(2), grid(), names=NAMES)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_save_nifti", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_labels(tmp_path / "a.nii", random_labels(), grid(), names=NAMES)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_folder(tmp_path, suffix):
    with pytest.raises(DataError, match="cannot be written") as caught:
        write_labels(tmp_path / "none" / f"a{suffix}", random_labels(), grid(), names=NAMES)
    assert "\n" not in str(caught.value)
