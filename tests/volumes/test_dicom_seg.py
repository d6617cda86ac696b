"""DICOM segmentations: the labels and the grid come back, identifiers are those of the series."""

from pathlib import Path

import numpy as np
import pytest

from vision_gates.errors import DataError
from vision_gates.volumes.dicom_seg import write_dicom_seg
from vision_gates.volumes.reading import read_volume

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom", reason="the extra dicom-seg is not installed")

NAMES = ["background", "liver", "spleen", "kidney"]


def _series(folder: Path, *, bare: bool = False) -> Path:
    folder.mkdir()
    uid = pydicom.uid.generate_uid
    study, series, frame = (uid(entropy_srcs=[word]) for word in ("study", "series", "frame"))
    for number in range(4):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = uid(entropy_srcs=["image", str(number)])
        if not bare:
            ds.SOPClassUID = pydicom.uid.CTImageStorage
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
            ds.PatientID = "42"
        ds.Modality, ds.Rows, ds.Columns = "CT", 6, 5
        ds.PixelSpacing, ds.SliceThickness = [0.5, 0.75], 3
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0.8, 0.6]
        ds.ImagePositionPatient = [10.0, 20.0 - 0.6 * 3 * number, 30 + 0.8 * 3 * number]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.PixelData = np.full((6, 5), number, np.int16).tobytes()
        ds.save_as(folder / f"{9 - number}.dcm", enforce_file_format=True)
    return folder


def _labels() -> np.ndarray:
    labels = np.zeros((5, 6, 4), np.uint8)
    labels[1:3, 2:5, 0:2] = 1
    labels[4, 5, 3] = 3
    return labels


@pytest.mark.parametrize("bare", [False, True])
def test_labels_and_grid_come_back(tmp_path: Path, bare: bool) -> None:
    source = _series(tmp_path / "series", bare=bare)
    write_dicom_seg(tmp_path / "seg.dcm", _labels(), source, names=NAMES, model="attention_unet")
    written = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [segment.SegmentLabel for segment in written.SegmentSequence] == ["liver", "kidney"]
    volume = written.get_volume(combine_segments=True)
    geometry = read_volume(source).geometry
    found = np.argwhere(volume.array > 0)  # slice, row, column
    ras = np.diag([-1, -1, 1]) @ (volume.affine[:3, :3] @ found.T + volume.affine[:3, 3:])
    voxels = (np.linalg.inv(geometry.affine) @ np.vstack([ras, np.ones(len(found))]))[:3].T
    np.testing.assert_allclose(voxels, voxels.round(), atol=1e-4)
    values = np.array([0, 1, 3])[volume.array[tuple(found.T)]]
    restored = np.zeros_like(_labels())
    restored[tuple(voxels.round().astype(int).T)] = values
    np.testing.assert_array_equal(restored, _labels())
    if not bare:
        assert written.PatientID == "42"
        first = pydicom.dcmread(next(source.iterdir()))
        assert written.StudyInstanceUID == first.StudyInstanceUID
        assert written.SeriesInstanceUID != first.SeriesInstanceUID


def test_mistakes_leave_no_file(tmp_path: Path) -> None:
    source = _series(tmp_path / "series")
    with pytest.raises(DataError, match="nothing was found in .*series"):
        write_dicom_seg(tmp_path / "seg.dcm", np.zeros((5, 6, 4), np.uint8), source, names=NAMES, model="m")
    with pytest.raises(ValueError, match=r"labels of \(6, 5, 4\) for 4 slices of 5 x 6"):
        write_dicom_seg(tmp_path / "seg.dcm", np.ones((6, 5, 4), np.uint8), source, names=NAMES, model="m")
    with pytest.raises(DataError, match="cannot be written"):
        write_dicom_seg(tmp_path / "missing" / "seg.dcm", _labels(), source, names=NAMES, model="m")
    assert [path.name for path in tmp_path.iterdir()] == ["series"]
