"""Label maps as DICOM segmentation objects, which a PACS stores beside the series that they were made from.

One binary segment a label, each marked as made by an algorithm. Standard: DICOM PS3.3, A.51; written by highdicom.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vision_gates
from vision_gates.errors import DataError
from vision_gates.volumes.dicom import needs, slice_files

__all__ = ["write_dicom_seg"]


_MORE = ("AccessionNumber", "ReferringPhysicianName")  # of the study; may be empty, not absent


def write_dicom_seg(
    path: str | Path,
    labels: NDArray[Any],
    source: str | Path,
    *,
    names: Sequence[str],
    model: str,
    series: str | None = None,
) -> None:
    """Write labels on the grid of a DICOM series as a segmentation of that series.

    Patient and study are those of the series. Identifiers that the series lacks are made from its files, the same each
    time; a viewer then cannot tell the two belong together.

    Args:
        path: file to write, replaced at once and whole.
        labels: (I, J, K) integers on the grid that `read_volume` gives for the folder.
        source: folder of the series, a file a slice.
        names: of the labels from 0 on, background first.
        model: what made them, for the header.
        series: SeriesInstanceUID, where the folder holds several.

    Raises:
        DataError: the folder's series cannot be used, there is no label to write, or the file cannot be written.
        ConfigError: highdicom is not installed.
        ValueError: the labels have not the shape of the series.
    """
    highdicom, pydicom = needs("highdicom"), needs("pydicom")
    path, source = Path(path), Path(source)
    slices = [_complete(pydicom.dcmread(file)) for file in slice_files(source, series)]
    if labels.shape != (slices[0].Columns, slices[0].Rows, len(slices)):
        raise ValueError(f"labels of {labels.shape} for {len(slices)} slices of {slices[0].Columns} x {slices[0].Rows}")
    found = [int(label) for label in np.unique(labels) if label > 0]
    if not found:
        raise DataError(f"{path}: nothing was found in {source}, and a DICOM segmentation cannot be empty")
    number = {label: index for index, label in enumerate(found, start=1)}  # segments count from 1 without gaps
    frames = np.zeros(labels.shape, dtype=np.uint16 if len(found) > 255 else np.uint8)
    for label, segment in number.items():
        frames[labels == label] = segment
    codes = highdicom.sr.coding.CodedConcept
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=model, version=vision_gates.__version__, family=pydicom.sr.codedict.codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=segment,
            segment_label=names[label] if label < len(names) else f"label {label}",
            segmented_property_category=codes("85756007", "SCT", "Tissue"),
            segmented_property_type=codes("85756007", "SCT", "Tissue"),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for label, segment in number.items()
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=frames.transpose(2, 1, 0),  # slices, rows, columns
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=900,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="vision_gates",
        manufacturer_model_name=model,
        software_versions=vision_gates.__version__,
        device_serial_number="0",
        series_description=f"segmentation by {model}"[:64],
    )
    writing = path.with_name(f".{path.name}.writing")
    try:
        segmentation.save_as(str(writing))
        os.replace(writing, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        writing.unlink(missing_ok=True)


def _complete(header: Any) -> Any:
    """The slice with the identifiers that a segmentation has to repeat; made up from the patient's where missing."""
    pydicom = needs("pydicom")
    about = [str(header.get(key, "")) for key in ("PatientID", "PatientName", "StudyDate", "ImageOrientationPatient")]
    for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if not header.get(key):
            setattr(header, key, pydicom.uid.generate_uid(entropy_srcs=[key, *about]))
    if not header.get("SOPInstanceUID"):
        place = str(header.get("ImagePositionPatient", ""))
        header.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["SOPInstanceUID", place, *about])
    if not header.get("SOPClassUID"):
        kind = {"CT": "CTImageStorage", "MR": "MRImageStorage"}.get(
            header.get("Modality"), "SecondaryCaptureImageStorage"
        )
        header.SOPClassUID = getattr(pydicom.uid, kind)
    for key in (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "StudyID",
        *_MORE,
    ):
        if key not in header:
            setattr(header, key, "")
    return header
