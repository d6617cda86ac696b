"""Reading: values and places agree with nibabel and SimpleITK; whatever is wrong with a file ends in one line."""

import gzip
import os
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes import dicom, reading
from vision_gates.volumes.geometry import Geometry, reorient
from vision_gates.volumes.reading import (
    VOLUME_SUFFIXES,
    find_series,
    is_volume,
    read_geometry,
    read_labels,
    read_volume,
    stem,
)

pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")

SHAPE = (5, 6, 7)
# Orthonormal and oblique: I - 2 n n^T mirrors, so with one axis turned round it rotates.
NORMAL = np.array([0.9, -0.3, 0.1]) / np.linalg.norm([0.9, -0.3, 0.1])
ROTATION = (np.eye(3) - 2 * np.outer(NORMAL, NORMAL)) @ np.diag([-1, 1, 1])


def oblique():
    affine = np.eye(4)
    affine[:3, :3] = ROTATION @ np.diag([-0.75, 0.8, 3.0])
    affine[:3, 3] = (40.0, -35.5, -804.25)
    return affine


def numbers(dtype=np.int16, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 120, shape).astype(dtype)


def nifti(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(array, oblique() if affine is None else affine)
    image.set_qform(image.affine, code=1)
    for field, value in header.items():
        image.header[field] = value
    nibabel.save(image, path)
    return path


def itk(path, array=None, *, compress=False):
    """The array [i, j, k] on an oblique grid, through SimpleITK alone."""
    image = sitk.GetImageFromArray((numbers() if array is None else array).T)
    place = Geometry(SHAPE, oblique()).to_itk()
    image.SetSpacing(place["spacing"])
    image.SetOrigin(place["origin"])
    image.SetDirection(place["direction"])
    sitk.WriteImage(image, str(path), compress)
    return path


def itk_geometry(image):
    return Geometry.from_itk(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def fault(path, read=read_volume, **options):
    """The message of the one error that reading ends in."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 700
    return message


# Names


def test_names():
    assert VOLUME_SUFFIXES == (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
    assert stem("a/b/case.nii.gz") == stem(Path("case.NII")) == stem("case") == "case"
    assert stem("a/1.2.840.seg.nrrd") == "1.2.840.seg" and stem("scan.v2") == "scan.v2"
    assert is_volume("x/a.NII.GZ") and is_volume("a.mhd")
    assert not any(is_volume(name) for name in ("a.gz", "a.png", "nii", "._a.nii.gz", ".nii"))


# NIfTI, NRRD, MetaImage: values and places


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_nifti(tmp_path, suffix, dtype):
    array = numbers(dtype)
    path = nifti(tmp_path / "made.nii.gz" if suffix == ".NII.GZ" else tmp_path / f"a{suffix}", array)
    path = path.rename(tmp_path / f"a{suffix}")
    volume = read_volume(path)
    assert volume.array.dtype == np.float32 and volume.source == path and volume.modality is None
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.geometry.affine, oblique(), rtol=1e-5, atol=1e-5)
    assert read_geometry(str(path)).differences(volume.geometry, tolerance=1e-12) == []
    volume.array[0, 0, 0] = 1  # ours to change: no read-only map of the file


def test_nifti_agrees_with_itk(tmp_path):
    path = nifti(tmp_path / "a.nii", numbers())
    assert itk_geometry(sitk.ReadImage(str(path))).differences(read_geometry(path), tolerance=1e-5) == []


def test_nifti_2_and_other_byte_order(tmp_path):
    nibabel.save(nibabel.Nifti2Image(numbers(), oblique()), tmp_path / "two.nii")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(numbers(), oblique(), header), tmp_path / "big.nii.gz")
    for name in ("two.nii", "big.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, numbers())
        labels = read_labels(tmp_path / name)
        np.testing.assert_array_equal(labels.array, numbers())
        assert labels.array.dtype == np.uint8 and labels.array.dtype.isnative


def edited(path, edits):
    """Overwrites parts of a NIfTI header, {offset: bytes}: nibabel would set most fields by itself."""
    content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    for offset, value in edits.items():
        content[offset : offset + len(value)] = value
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_slope_and_intercept(tmp_path, suffix):
    path = edited(nifti(tmp_path / f"a{suffix}", numbers()), {112: struct.pack("<2f", 0.5, -1024)})
    np.testing.assert_array_equal(read_volume(path).array, numbers() * 0.5 - 1024)
    assert "no integers" in fault(path, read_labels)
    path = edited(nifti(tmp_path / f"b{suffix}", numbers()), {112: struct.pack("<2f", 2, -10)})
    labels = read_labels(path)
    np.testing.assert_array_equal(labels.array, numbers() * 2 - 10)
    assert labels.array.dtype == np.int16


@pytest.mark.parametrize(("qcode", "scode"), [(1, 1), (0, 2), (1, 0), (0, 0)])
def test_nifti_sform_before_qform_before_spacing(tmp_path, qcode, scode):
    path = nifti(tmp_path / "a.nii", numbers())
    edited(path, {252: struct.pack("<2h", qcode, scode), 268: struct.pack("<3f", 1, 2, 3)})  # the qform's origin
    geometry = read_geometry(path)
    np.testing.assert_allclose(geometry.spacing, (0.75, 0.8, 3.0), rtol=1e-6)
    if scode or qcode:
        np.testing.assert_allclose(geometry.direction, oblique()[:3, :3] / (0.75, 0.8, 3.0), atol=1e-6)
        np.testing.assert_allclose(geometry.origin, oblique()[:3, 3] if scode else (1, 2, 3), rtol=1e-6)


@pytest.mark.parametrize(("unit", "factor"), [("micron", 0.001), ("meter", 1000), ("unknown", 1), ("mm", 1)])
def test_nifti_units(tmp_path, unit, factor):
    image = nibabel.Nifti1Image(numbers(), oblique())
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    geometry = read_geometry(tmp_path / "a.nii")
    np.testing.assert_allclose(geometry.spacing, np.array([0.75, 0.8, 3.0]) * factor, rtol=1e-5)
    np.testing.assert_allclose(geometry.spacing, sitk.ReadImage(str(tmp_path / "a.nii")).GetSpacing(), rtol=1e-5)


def test_axes_of_size_one(tmp_path):
    np.testing.assert_array_equal(read_volume(nifti(tmp_path / "a.nii", numbers()[..., None, None])).array, numbers())
    thin = read_volume(nifti(tmp_path / "thin.nii.gz", numbers()[:, :, :1]))
    np.testing.assert_array_equal(thin.array, numbers()[:, :, :1])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_itk_formats(tmp_path, suffix, compress):
    path = itk(tmp_path / f"a{suffix}", compress=compress)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32 and volume.array.shape == SHAPE
    np.testing.assert_array_equal(volume.array, numbers())
    np.testing.assert_allclose(volume.geometry.affine, oblique(), rtol=1e-9, atol=1e-6)
    assert read_geometry(path).differences(volume.geometry, tolerance=1e-12) == []
    assert read_labels(path).array.dtype == np.uint8


def test_nrrd_in_its_own_spaces(tmp_path):
    text = (
        "NRRD0004\ntype: uint8\ndimension: 3\nspace: {space}\nsizes: 2 3 4\nencoding: raw\n"
        "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (5,6,7)\n\n"
    )
    for space, signs in (("right-anterior-superior", 1), ("left-posterior-superior", -1)):
        path = tmp_path / f"{space}.nrrd"
        path.write_bytes(text.format(space=space).encode() + bytes(range(24)))
        volume = read_volume(path)
        expected = np.diag([signs, signs, 1, 1]) @ [[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]]
        np.testing.assert_allclose(volume.geometry.affine, expected, atol=1e-9)
        assert volume.array[1, 0, 0] == 1 and volume.array[0, 1, 0] == 2 and volume.array[0, 0, 1] == 6


# Labels


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, np.uint8), (0, 256, np.int16), (-1, 3, np.int16), (0, 32768, np.int32), (-(2**31), 2**31 - 1, np.int32)],
)
@pytest.mark.parametrize("stored", [np.int32, np.float64])
def test_labels_in_the_smallest_type(tmp_path, low, high, dtype, stored):
    array = np.zeros(SHAPE, stored)
    array[0, 0, 0], array[1, 2, 3] = low, high
    for path in (nifti(tmp_path / "a.nii.gz", array), itk(tmp_path / "a.nrrd", array)):
        labels = read_labels(path)
        assert labels.array.dtype == dtype
        np.testing.assert_array_equal(labels.array, array)


def test_what_are_no_labels(tmp_path):
    array = numbers(np.float32)
    array[1, 1, 1], array[2, 2, 2] = 0.25, 7.5
    message = fault(nifti(tmp_path / "a.nii", array), read_labels)
    assert "2 of 210 voxels are no integers (0.25, 7.5 ...)" in message and "nearest neighbours" in message
    array = numbers(np.uint32)
    array[0, 0, 0] = 2**31
    message = fault(itk(tmp_path / "a.nrrd", array), read_labels)
    assert "labels from 0 to 2147483648 do not fit in 32 bits" in message


# Faults of files


def test_paths(tmp_path):
    assert fault(tmp_path / "none.nii").endswith("there is no such file or folder")
    (tmp_path / "a.png").write_bytes(b"not a volume")
    message = fault(tmp_path / "a.png")
    assert "known are .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd and folders that hold a DICOM series" in message


def test_forbidden(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(reading, "is_dicom", forbidden)
    monkeypatch.setattr(dicom, "is_dicom", forbidden)
    for path in (tmp_path / "a", tmp_path):
        assert "cannot be opened ([Errno 13] Permission denied" in fault(path)


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"\x00" * 1000, b"\x1f\x8b" + b"rubbish" * 100, b"text\n" * 100])
def test_rubbish(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for read in (read_volume, read_labels, read_geometry):
        assert "the header cannot be read, the file is cut short or damaged" in fault(path, read)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_cut_short(tmp_path, suffix, compress, part):
    path, array = tmp_path / f"a{suffix}", np.random.default_rng(0).integers(0, 2**15, (16, 16, 16)).astype(np.int16)
    if suffix.startswith(".nii"):
        nifti(path, array)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path), compress)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "cut short or damaged" in fault(path) and "copy it again" in fault(path, read_labels)


def test_a_damaged_gzip_stream_is_noticed_though_all_its_bytes_are_there(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", numbers(shape=(40, 40, 40)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the checksum, which nibabel does not reach
    path.write_bytes(content)
    assert "the voxels cannot be read" in fault(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_that_claims_more_than_it_holds(tmp_path, suffix):
    path = edited(nifti(tmp_path / f"a{suffix}", numbers()), {42: struct.pack("<3h", 32000, 32000, 32000)})  # 65 TB
    for read in (read_volume, read_labels, read_geometry):
        assert "the header claims 65,536,000,000,352 bytes of voxels" in fault(path, read)
    path = edited(nifti(tmp_path / f"b{suffix}", numbers()), {42: struct.pack("<3h", 5, 6, 8)})
    assert "cut short or damaged" in fault(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [False, True])
def test_itk_formats_that_claim_more_than_they_hold(tmp_path, suffix, compress):
    path = itk(tmp_path / f"a{suffix}", compress=compress)
    path.write_bytes(path.read_bytes().replace(b" 5 6 7\n", b" 9000 9000 9000\n"))
    assert "the header claims 1,458,000,000,000 bytes of voxels but a" in fault(path)


def test_a_file_that_compresses_well_is_no_fault(tmp_path):
    array = np.zeros((200, 200, 200), np.uint8)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nibabel.Nifti1Image(array, np.eye(4)).to_bytes(), 9))
    assert path.stat().st_size < array.nbytes / 900
    assert read_labels(path).array.sum() == 0


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_a_header_without_its_voxels(tmp_path, suffix, compress):
    path = itk(tmp_path / f"a{suffix}", compress=compress)
    (stored,) = [other for other in tmp_path.iterdir() if other != path]
    content = stored.read_bytes()
    if not compress:
        stored.write_bytes(content[:-1])
        assert f"but {stored.name} holds only 419; it is cut short" in fault(path)
    stored.unlink()
    for read in (read_volume, read_geometry):
        assert f"its voxels belong in {stored}, which is missing" in fault(path, read)


@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (5, 6, 1, 3), (5, 6, 7, 1, 3)])
def test_more_than_three_axes(tmp_path, shape):
    message = fault(nifti(tmp_path / "a.nii.gz", numbers(shape=shape)))
    assert f"({' x '.join(map(str, shape))}); split it into 3-D files, one per channel" in message


def test_four_axes_and_vectors_through_itk(tmp_path):
    four = sitk.JoinSeries([sitk.GetImageFromArray(numbers())] * 2)
    vectors = sitk.GetImageFromArray(numbers(shape=(*SHAPE, 3)), isVector=True)
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(four, str(tmp_path / f"four{suffix}"))
        assert "has 4 axes (7 x 6 x 5 x 2); split it" in fault(tmp_path / f"four{suffix}")
        sitk.WriteImage(vectors, str(tmp_path / f"vectors{suffix}"))
        assert "holds a vector of 16-bit signed integer a voxel" in fault(tmp_path / f"vectors{suffix}")
        sitk.WriteImage(sitk.JoinSeries(sitk.GetImageFromArray(numbers())), str(tmp_path / f"one{suffix}"))
        np.testing.assert_array_equal(read_volume(tmp_path / f"one{suffix}").array, numbers().T)


def test_two_axes(tmp_path):
    assert "a 2-D image (5 x 6), not a volume" in fault(nifti(tmp_path / "a.nii", numbers()[:, :, 0]))
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(sitk.GetImageFromArray(numbers()[0]), str(tmp_path / f"a{suffix}"))
        assert "a 2-D image (7 x 6), not a volume" in fault(tmp_path / f"a{suffix}")


def test_complex_numbers_and_colours(tmp_path):
    assert "holds complex numbers" in fault(nifti(tmp_path / "a.nii", numbers(np.complex64)))
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert "holds colours" in fault(nifti(tmp_path / "b.nii", colours), read_labels)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path, suffix, value):
    array = numbers(np.float32)
    array[1, 2, 3] = array[4, 0, 0] = value
    path = (nifti if suffix.startswith(".nii") else itk)(tmp_path / f"a{suffix}", array)
    for read in (read_volume, read_labels):
        message = fault(path, read)
        assert "2 of 210 voxels are NaN or infinite, the first at (1, 2, 3)" in message
    assert read_geometry(path).shape == SHAPE


def test_beyond_float32(tmp_path):
    array = numbers(np.float64)
    array[0, 0, 1] = 1e300
    assert "1 of 210 voxels are NaN or infinite, the first at (0, 0, 1)" in fault(nifti(tmp_path / "a.nii", array))


def test_singular_affine(tmp_path):
    path = nifti(tmp_path / "a.nii", numbers())
    edited(path, {280: struct.pack("<12f", 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0)})
    assert "axes do not span space" in fault(path) and "mend the sform and qform" in fault(path, read_geometry)


def test_missing_packages(tmp_path, monkeypatch):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n")
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"needs SimpleITK: pip install 'vision-gates\[volumes\]'"):
        read_volume(tmp_path / "a.nrrd")


# DICOM

UID = "1.2.826.0.1.3680043.8.498.1"
COUNT = 6


def slices(folder, *, shape=(7, 5, COUNT), affine=None, order=None, names=None, change=None, **attributes):
    """Writes a series of CT slices; ``change(dataset, k)`` edits one, and leaves it out by returning False.

    Returns:
        The stored values, (I, J, K), and the geometry that the slices are written with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if affine is None:  # oblique, in LPS+
        affine = np.eye(4)
        affine[:3, :3] = ROTATION @ np.diag([0.75, 0.8, 2.5])
        affine[:3, 3] = (-120.5, 35.25, -804.0)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    stored = np.random.default_rng(0).integers(-500, 500, shape).astype(np.int16)
    for k in range(shape[2]):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{UID}.{k + 1}"
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.Modality = UID, "1.2.3", "CT"
        dataset.SeriesDescription = "thorax"
        dataset.Columns, dataset.Rows = shape[:2]
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 1, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        dataset.SliceThickness, dataset.InstanceNumber = 99.0, 1  # both lie
        dataset.ImageOrientationPatient = [round(v, 10) for v in (affine[:3, :2] / spacing[:2]).T.ravel()]
        dataset.ImagePositionPatient = [round(v, 6) for v in (affine @ (0, 0, k, 1))[:3]]
        dataset.PixelData = stored[:, :, k].T.tobytes()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        if change is None or change(dataset, k) is not False:
            name = names(k) if names else f"{(k * 5 + 2) % 7:02d}.dcm"
            dataset.save_as(folder / name, enforce_file_format=True)
    return stored, Geometry(shape, np.diag([-1, -1, 1, 1]) @ affine)


@pytest.mark.parametrize("names", [None, lambda k: f"IM{9 - k}", lambda k: f"1.2.{k * 5 % 7}.{k}"])
def test_dicom(tmp_path, names):
    stored, geometry = slices(tmp_path / "s", names=names, RescaleSlope=2, RescaleIntercept=-1024)
    volume = read_volume(tmp_path / "s")
    assert volume.array.dtype == np.float32 and volume.modality == "CT" and volume.source == tmp_path / "s"
    np.testing.assert_array_equal(volume.array, stored * 2.0 - 1024)
    np.testing.assert_allclose(volume.geometry.affine, geometry.affine, atol=1e-5)
    assert read_geometry(tmp_path / "s").differences(volume.geometry, tolerance=1e-12) == []

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, volume.array)
    assert itk_geometry(image).differences(volume.geometry, tolerance=1e-5) == []


def test_dicom_slices_run_along_the_normal(tmp_path):
    """Written from head to foot: the order, and with it the last axis, is the other way round."""
    affine = np.diag([0.5, 0.5, -2.0, 1.0])
    stored, geometry = slices(tmp_path / "s", affine=affine)
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, stored[:, :, ::-1])
    assert (geometry.orientation, volume.geometry.orientation) == ("LPI", "LPS")
    assert volume.geometry.origin[2] == -2.0 * (COUNT - 1)


def test_dicom_rescales_every_slice_by_itself(tmp_path):
    def change(dataset, k):
        dataset.RescaleSlope, dataset.RescaleIntercept = -0.5 - k, 100 * k

    stored, _ = slices(tmp_path / "s", change=change, Modality="PT")
    k = np.arange(COUNT)
    np.testing.assert_allclose(read_volume(tmp_path / "s").array, stored * (-0.5 - k) + 100 * k)


def test_dicom_rescales_mr_too(tmp_path):
    stored, _ = slices(tmp_path / "s", SOPClassUID=pydicom.uid.MRImageStorage, Modality="MR", RescaleSlope=3)
    volume = read_volume(tmp_path / "s")
    assert volume.modality == "MR"
    np.testing.assert_array_equal(volume.array, 3 * stored)


def test_dicom_labels(tmp_path):
    stored, _ = slices(tmp_path / "s")
    labels = read_labels(tmp_path / "s")
    assert labels.array.dtype == np.int16
    np.testing.assert_array_equal(labels.array, stored)


def test_dicom_skips_what_is_no_image(tmp_path):
    def report(dataset, k):
        for keyword in ("Rows", "Columns", "PixelData"):
            delattr(dataset, keyword)
        return k == 0

    stored, _ = slices(tmp_path / "s")
    slices(tmp_path / "s", change=report, names=lambda k: "report", SeriesInstanceUID="1.9")
    (tmp_path / "s" / "notes.txt").write_text("notes")
    (tmp_path / "s" / ".hidden").write_bytes(b"")
    (tmp_path / "s" / "thumbnails").mkdir()
    np.testing.assert_array_equal(read_volume(tmp_path / "s").array, stored)


def test_dicom_without_preamble(tmp_path):
    stored, _ = slices(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(read_volume(tmp_path / "s").array, stored)


def test_dicom_without_series_uid(tmp_path):
    def change(dataset, k):
        del dataset.SeriesInstanceUID

    stored, geometry = slices(tmp_path / "s", change=change)
    (series,) = find_series(tmp_path / "s")
    assert series.uid == "no-uid" and len(series.files) == COUNT
    np.testing.assert_array_equal(read_volume(tmp_path / "s").array, stored)
    slices(tmp_path / "s", change=change, shape=(4, 4, 3), names=lambda k: f"small{k}")
    assert {one.uid: len(one.files) for one in find_series(tmp_path / "s")} == {"no-uid": 3, "no-uid-2": COUNT}
    np.testing.assert_array_equal(read_volume(tmp_path / "s", series="no-uid-2").array, stored)


def test_several_series(tmp_path):
    stored, _ = slices(tmp_path / "s")
    other, _ = slices(
        tmp_path / "s",
        shape=(4, 4, 3),
        names=lambda k: f"z{k}",
        SeriesInstanceUID="1.2.5",
        Modality="MR",
        SeriesDescription="t1 tse",
    )
    assert [(one.uid, one.modality, one.description, len(one.files)) for one in find_series(tmp_path / "s")] == [
        ("1.2.5", "MR", "t1 tse", 3),
        (UID, "CT", "thorax", COUNT),
    ]
    message = fault(tmp_path / "s")
    assert f"holds 2 DICOM series, choose one with series=UID: 1.2.5 (MR, 't1 tse', 3 files); {UID} (CT, 't" in message
    np.testing.assert_array_equal(read_volume(tmp_path / "s", series=UID).array, stored)
    np.testing.assert_array_equal(read_volume(tmp_path / "s", series="1.2.5").array, other)
    assert read_geometry(tmp_path / "s", series="1.2.5").shape == (4, 4, 3)
    assert "none is series='9.9': 1.2.5 (MR" in fault(tmp_path / "s", series="9.9")


def test_folders_without_dicom(tmp_path):
    with pytest.raises(DataError, match="none: there is no such folder"):
        find_series(tmp_path / "none")
    assert find_series(tmp_path) == []
    assert "holds no DICOM images; pass the folder of the slices" in fault(tmp_path)
    slices(tmp_path / "inner")
    assert fault(tmp_path).endswith("holds no DICOM images; pass one of its folders: inner")


def test_one_slice_of_a_series(tmp_path):
    slices(tmp_path / "s", names=lambda k: f"{k}")
    message = fault(tmp_path / "s" / "3")
    assert message.endswith(f"one slice of a DICOM series; pass the folder of all its slices: {tmp_path / 's'}")


def test_missing_slice(tmp_path):
    slices(tmp_path / "s", affine=np.diag([1.0, 1, 2.5, 1]), names=lambda k: f"{k}.dcm", change=lambda _, k: k != 3)
    message = fault(tmp_path / "s")
    assert "slices are missing between 2.dcm (5.00 mm) and 4.dcm (10.00 mm): 5.00 mm apart, others 2.50 mm" in message
    assert fault(tmp_path / "s", read_geometry) == message


def test_doubled_slices(tmp_path):
    slices(tmp_path / "s", names=lambda k: f"a{k}")
    slices(tmp_path / "s", names=lambda k: f"b{k}", change=lambda _, k: k in (2, 4))
    message = fault(tmp_path / "s")
    assert "a2 and b2 lie at the same place (" in message and "mm; 2 such pairs); keep one copy" in message


def test_uneven_slices(tmp_path):
    def change(dataset, k):
        dataset.ImagePositionPatient = [0, 0, (0, 2, 4, 5.2, 7.2, 9.2)[k]]

    slices(tmp_path / "s", affine=np.diag([1.0, 1, 2, 1]), names=lambda k: f"{k}", change=change)
    assert "not evenly stacked: 1.20 to 2.00 mm apart" in fault(tmp_path / "s")


def test_slices_that_drift_aside(tmp_path):
    def change(dataset, k):
        dataset.ImagePositionPatient = [5.0 if k == 3 else 0.0, 0, 2 * k]

    slices(tmp_path / "s", affine=np.diag([1.0, 1, 2, 1]), names=lambda k: f"{k}", change=change)
    assert "not evenly stacked: 2.00 to 2.00 mm apart, 3 lies 5.00 mm from its place" in fault(tmp_path / "s")


def test_rounded_positions_are_even_and_upright(tmp_path):
    def change(dataset, k):
        dataset.ImagePositionPatient = [0.01 * (-1) ** k, 0, round(0.625 * k, 2)]

    slices(tmp_path / "s", affine=np.diag([0.7, 0.7, 0.625, 1]), shape=(4, 4, 40), names=str, change=change)
    geometry = read_geometry(tmp_path / "s")
    np.testing.assert_allclose(geometry.direction, np.diag([-1.0, -1, 1]), atol=1e-12)
    assert geometry.spacing[2] == pytest.approx(0.625, abs=1e-3)


def test_tilted_gantry(tmp_path):
    """Each slice is shifted against the one before: the affine is sheared, and every slice keeps its place."""
    affine = np.diag([0.7, 0.7, 5.0, 1.0])
    affine[1, 2] = -1.5
    _, geometry = slices(tmp_path / "s", affine=affine)
    np.testing.assert_allclose(read_geometry(tmp_path / "s").affine, geometry.affine, atol=1e-6)


@pytest.mark.parametrize(
    ("keyword", "value", "problem"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 0.8, 0.6], "differ in orientation: 0 (1, 0, 0, 0, 1, 0), 3 (1, 0, 0,"),
        ("PixelSpacing", [1.0, 1.5], "differ in pixel spacing: 0 (1, 1), 3 (1, 1.5)"),
        ("ImagePositionPatient", None, "3 has no ImagePositionPatient"),
        ("ImageOrientationPatient", None, "3 has no ImageOrientationPatient"),
        ("PixelSpacing", None, "3 has no PixelSpacing"),
        ("SamplesPerPixel", 3, "3 is a colour image"),
        ("NumberOfFrames", 4, "3 has 4 frames and does not say where each lies"),
    ],
)
def test_slices_that_do_not_fit(tmp_path, keyword, value, problem):
    def change(dataset, k):
        if k == 3:
            setattr(dataset, keyword, value)

    slices(tmp_path / "s", affine=np.diag([1.0, 1, 2, 1]), names=str, change=change)
    assert problem in fault(tmp_path / "s")


def test_slices_of_two_sizes(tmp_path):
    def change(dataset, k):
        if k == 3:
            dataset.Rows, dataset.PixelData = 4, dataset.PixelData[: 7 * 4 * 2]

    slices(tmp_path / "s", names=str, change=change)
    assert "the slices differ in size: 0 (7, 5), 3 (7, 4)" in fault(tmp_path / "s")


def test_a_single_slice(tmp_path):
    affine = np.diag([0.5, 0.5, 4.0, 1.0])
    stored, _ = slices(tmp_path / "a", affine=affine, shape=(7, 5, 1), SliceThickness=3)
    assert read_geometry(tmp_path / "a").spacing == (0.5, 0.5, 3.0)
    np.testing.assert_array_equal(read_volume(tmp_path / "a").array, stored)
    slices(tmp_path / "b", affine=affine, shape=(7, 5, 1), SliceThickness=3, SpacingBetweenSlices=4)
    assert read_geometry(tmp_path / "b").spacing == (0.5, 0.5, 4.0)
    slices(tmp_path / "c", affine=affine, shape=(7, 5, 1), SliceThickness=None)
    assert read_geometry(tmp_path / "c").spacing == (0.5, 0.5, 1.0)


def test_damaged_slices(tmp_path):
    slices(tmp_path / "s", names=str)
    content = (tmp_path / "s" / "3").read_bytes()
    (tmp_path / "s" / "3").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"s/3: the pixels cannot be read, the file is cut short or damaged"):
        read_volume(tmp_path / "s")
    (tmp_path / "s" / "3").write_bytes(b"")
    with pytest.raises(DataError, match=r"s/3: the file is empty; copy it again"):
        read_geometry(tmp_path / "s")


def _compressed(name):
    path = Path(pydicom.__file__).parent / "data" / "test_files" / name
    return path if path.is_file() else pytest.skip(f"this pydicom comes without {name}")


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm"])
def test_compressed_pixels(tmp_path, name):
    """Lossless copies of one image, by whichever library decodes them; the slope is applied either way."""
    for folder, source in (("plain", "MR_small.dcm"), ("compressed", name)):
        dataset = pydicom.dcmread(_compressed(source))
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -7
        (tmp_path / folder).mkdir()
        dataset.save_as(tmp_path / folder / "a")
    plain, compressed = read_volume(tmp_path / "plain"), read_volume(tmp_path / "compressed")
    stored = pydicom.dcmread(_compressed("MR_small.dcm")).pixel_array
    np.testing.assert_array_equal(plain.array[:, :, 0], stored.T * 2.0 - 7)
    np.testing.assert_array_equal(compressed.array, plain.array)
    assert compressed.geometry.differences(plain.geometry) == []


def test_itk_decodes_to_stored_values():
    dataset = pydicom.dcmread(_compressed("MR_small_jpeg_ls_lossless.dcm"))
    dataset.SOPClassUID = pydicom.uid.CTImageStorage  # a kind of image whose slope ITK would apply
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -7
    stored = pydicom.dcmread(_compressed("MR_small.dcm")).pixel_array
    np.testing.assert_array_equal(dicom._decode_with_itk(dataset).squeeze(), stored)


def enhanced(path, *, order=range(COUNT), drop=()):
    """An enhanced multi-frame file of a coronal stack, its frames in the given order."""
    sequence, item = pydicom.Sequence, pydicom.Dataset
    folder = path.parent / "classic"
    affine = np.array([[0.5, 0, 0, -10], [0, 0, 3.0, -20], [0, -0.5, 0, 30], [0, 0, 0, 1]])  # LPS+
    stored, geometry = slices(folder, affine=affine, names=str)
    datasets = [pydicom.dcmread(folder / str(k)) for k in order]
    whole = pydicom.dcmread(folder / "0")
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
    whole.NumberOfFrames, whole.Modality = len(datasets), "MR"
    whole.PixelData = b"".join(dataset.PixelData for dataset in datasets)
    measures, turned = item(), item()
    measures.PixelSpacing, measures.SliceThickness = whole.PixelSpacing, 3
    turned.ImageOrientationPatient = whole.ImageOrientationPatient
    shared = item()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = sequence([measures]), sequence([turned])
    frames = []
    for number, dataset in enumerate(datasets):
        frame, place, values = item(), item(), item()
        place.ImagePositionPatient = dataset.ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = number + 1, 0, "US"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = sequence([place]), sequence([values])
        frames.append(frame)
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = sequence([shared]), sequence(frames)
    for keyword in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", *drop):
        delattr(whole, keyword)
    whole.save_as(path)
    return stored[:, :, list(order)] * np.arange(1, COUNT + 1), geometry  # in the order of the frames


def test_enhanced_multi_frame_file(tmp_path):
    (tmp_path / "s").mkdir()
    order = [3, 1, 0, 5, 2, 4]
    values, geometry = enhanced(tmp_path / "s" / "a", order=order)
    expected = values[:, :, np.argsort(order)]
    for path in (tmp_path / "s" / "a", tmp_path / "s"):  # alone and in a folder of its own
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, expected)
        np.testing.assert_allclose(volume.geometry.affine, geometry.affine, atol=1e-6)
        assert volume.modality == "MR" and volume.geometry.orientation == "LIP"


def test_enhanced_multi_frame_faults(tmp_path):
    enhanced(tmp_path / "a", order=[0, 1, 2, 2, 4, 5])
    assert "a frame 3 and a frame 4 lie at the same place" in fault(tmp_path / "a")
    enhanced(tmp_path / "c")
    dataset = pydicom.dcmread(tmp_path / "c")
    del dataset.PerFrameFunctionalGroupsSequence[-1]
    dataset.save_as(tmp_path / "c")
    assert "c has 6 frames and does not say where each lies" in fault(tmp_path / "c")
    enhanced(tmp_path / "b", drop=["PerFrameFunctionalGroupsSequence"])
    assert "b has 6 frames and does not say where each lies; convert it to NIfTI" in fault(tmp_path / "b")


# Real data


def test_real_nifti(data_folder):
    for path in sorted((data_folder / "ct").glob("*.nii.gz")):
        volume = (read_labels if "_seg" in path.name else read_volume)(path)
        np.testing.assert_array_equal(volume.array, nibabel.load(path).get_fdata(dtype=np.float32))
        assert itk_geometry(sitk.ReadImage(str(path))).differences(volume.geometry) == []


def test_real_dicom_series_and_its_mask(data_folder):
    volume = read_volume(data_folder / "ct" / "dicom_series")
    labels = read_labels(data_folder / "ct" / "dicom_series_seg.nii.gz")
    assert (volume.modality, volume.geometry.orientation, labels.geometry.orientation) == ("CT", "LPS", "LAS")
    array, geometry = reorient(volume.array, volume.geometry, labels.geometry.orientation)
    assert labels.geometry.differences(geometry) == []
    inside = array[labels.array > 0]
    assert np.median(inside) > -200 > np.median(array)  # organs lie on the body, not on the air beside it

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(os.fspath(volume.source)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reader.Execute()).T, volume.array)
