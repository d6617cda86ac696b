"""Honest files and traps of volumes: NIfTI, NRRD and MetaImage, DICOM, dataset.json."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.damage import Files
from fuzzing.seeds import put, write


def make_nifti(root: Path, canary: Path) -> None:
    import nibabel

    numbers = np.random.default_rng(0).integers(0, 200, (9, 8, 7))

    def save(
        name: str, array: Any, *, suffix: str = ".nii.gz", kind: Any = nibabel.Nifti1Image, **fields: Any
    ) -> bytes:
        image = kind(array, np.diag([-1.0, 1.5, 2.0, 1.0]))
        image.header.set_xyzt_units("mm")
        for key, value in fields.items():
            image.header[key] = value
        data = image.to_bytes()
        (root / name).mkdir()
        (root / name / f"a{suffix}").write_bytes(gzip.compress(data, 6, mtime=0) if suffix.endswith("gz") else data)
        return bytes(data)

    save("plain", numbers.astype(np.int16), suffix=".nii")
    save("gz", numbers.astype(np.float32) / 7)
    save("labels", (numbers // 50).astype(np.uint8))
    save("second", numbers.astype(np.int32), suffix=".nii", kind=nibabel.Nifti2Image)
    scaled = save("scaled", numbers.astype(np.uint16)[..., None], scl_slope=0.5, scl_inter=-3)
    save("largest", np.zeros((256, 256, 128), np.uint8))
    second = (root / "second" / "a.nii").read_bytes()
    claim = second[:16] + struct.pack("<4q", 3, 10**6, 10**6, 1) + second[48:]
    write(root / "trap_claim", a__nii=claim)
    (root / "trap_claim_gz").mkdir()
    (root / "trap_claim_gz" / "a.nii.gz").write_bytes(gzip.compress(claim))
    for name, data in (
        ("bomb", scaled + bytes(2**27)),
        ("far", scaled[:108] + struct.pack("<f", 1.5e9) + scaled[112:] + bytes(2**20)),
        ("spacing", scaled[:80] + struct.pack("<3f", 1e30, 1e30, 1e30) + scaled[92:252] + bytes(4) + scaled[256:]),
    ):
        (root / f"trap_{name}").mkdir()
        (root / f"trap_{name}" / "a.nii.gz").write_bytes(gzip.compress(data, 6, mtime=0))


def make_itk(root: Path, canary: Path) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.random.default_rng(0).integers(0, 200, (7, 8, 9)).astype(np.int16))
    image.SetSpacing((1.0, 1.5, 2.0))
    for name, suffix, packed in (
        ("a", ".mha", False),
        ("b", ".mha", True),
        ("c", ".nrrd", False),
        ("d", ".nrrd", True),
    ):
        (root / name).mkdir()
        SimpleITK.WriteImage(image, str(root / name / f"a{suffix}"), packed)
    for name, suffix in (("largest_a", ".mha"), ("largest_b", ".nrrd")):
        (root / name).mkdir()
        zeros = SimpleITK.GetImageFromArray(np.zeros((64, 256, 256), np.uint8))
        SimpleITK.WriteImage(zeros, str(root / name / f"a{suffix}"), True)
    mha, nrrd = (root / "a" / "a.mha").read_bytes(), (root / "c" / "a.nrrd").read_bytes()
    assert b"DimSize = 9 8 7" in mha and b"sizes: 9 8 7" in nrrd
    write(root / "trap_claim", a__mha=mha.replace(b"DimSize = 9 8 7", b"DimSize = 1000000 1000000 7"))
    write(root / "trap_claim_nrrd", a__nrrd=nrrd.replace(b"sizes: 9 8 7", b"sizes: 1000000 1000000 7"))
    write(root / "trap_axes", a__mha=mha.replace(b"NDims = 3", b"NDims = -1"))
    for name, target in (("absolute", "/etc/passwd"), ("above", "../../../../../../../../etc/passwd")):
        head = mha.split(b"ElementDataFile")[0].replace(b"DimSize = 9 8 7", b"DimSize = 2 2 2")
        for trap, line in (("step", "%03d.raw 1 9 0"), ("printf", "%s%n%s 1 9 1")):
            write(root / f"trap_{trap}", a__mhd=head + f"ElementDataFile = {line}\n".encode())
        write(root / f"trap_{name}", a__mhd=head + f"ElementDataFile = {target}\n".encode())
        head = nrrd.split(b"\n\n")[0].replace(b"sizes: 9 8 7", b"sizes: 2 2 2")
        write(root / f"trap_{name}_nrrd", a__nhdr=head + f"\ndata file: {target}\n\n".encode())
        write(root / f"trap_{name}_list", a__nhdr=head + f"\ndata file: LIST\n{target}\n".encode())
        late = head + f"\ndata file: {target}\ndatafile:=LOCAL\n\n".encode()
        write(root / f"trap_{name}_twice", a__nhdr=late + bytes(99))


def make_dicom(root: Path, canary: Path) -> None:
    import pydicom
    from pydicom.data import get_testdata_file

    for name in ("MR_small", "MR_small_implicit", "MR_small_RLE", "MR_small_jpeg_ls_lossless", "MR_small_jp2klossless"):
        path = get_testdata_file(f"{name}.dcm", download=False)
        if path is not None:
            write(root / name, a=Path(path).read_bytes())
    twelve = get_testdata_file("JPGExtended.dcm", read=True, download=False)
    if twelve is not None:  # of 12 bits: pydicom leaves it to SimpleITK
        twelve.PixelSpacing, twelve.ImageOrientationPatient = [1.5, 1], [1, 0, 0, 0, 1, 0]
        twelve.ImagePositionPatient = [0, 0, 0]
        (root / "twelve").mkdir()
        twelve.save_as(root / "twelve" / "a.dcm")

    def slices(name: str, count: int = 3, **changes: Any) -> None:
        for k in range(count):
            one = pydicom.Dataset()
            one.file_meta = pydicom.dataset.FileMetaDataset()
            one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = pydicom.uid.CTImageStorage
            one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = f"1.2.3.{k + 1}"
            one.SeriesInstanceUID, one.Modality, one.Rows, one.Columns = "1.2.3", "CT", 8, 9
            one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, "MONOCHROME2", 1
            one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
            one.PixelSpacing, one.ImageOrientationPatient, one.SliceThickness = [1.5, 1], [1, 0, 0, 0, 1, 0], 2
            one.ImagePositionPatient, one.RescaleSlope, one.RescaleIntercept = [0, 0, 2 * k], 1, -1024
            one.PixelData = np.random.default_rng(k).integers(0, 99, (8, 9)).astype("<i2").tobytes()
            for key, value in changes.items():
                setattr(one, key, value)
            (root / name).mkdir(exist_ok=True)
            one.save_as(root / name / f"{k}.dcm", enforce_file_format=True)

    slices("stack")
    slices("largest", 2, Rows=1024, Columns=1024, PixelData=bytes(2**21))
    slices("trap_claim", Rows=65535, Columns=65535)
    slices("trap_frames", 1, NumberOfFrames="2147483647")
    slices("trap_spacing", PixelSpacing=[1e30, 1e30])
    slices("trap_bits", BitsAllocated=32, BitsStored=32)
    for name, source in (("deflated", "stack"), ("largest_deflated", "largest")):
        deflated = pydicom.dcmread(root / source / "0.dcm")
        deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        (root / name).mkdir()
        deflated.save_as(root / name / "0.dcm", enforce_file_format=True)


_LABELS = {"background": 0, "a": 1, "ignore": 2}
_NNUNET = {"labels": _LABELS, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "numTraining": 2}
_MSD = {
    **{"labels": {"0": "background", "1": "a"}, "modality": {"0": "MRI"}},
    "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"],
    "test": ["./imagesTs/c.nii.gz"],
}


def make_layout(root: Path, canary: Path) -> None:
    volumes = {f"{folder}/{name}.nii.gz": b"x" for folder in ("imagesTr", "labelsTr") for name in "ab"}
    numbered = {f"imagesTr/{name}_0000.nii.gz": b"x" for name in "ab"} | {
        f"labelsTr/{name}.nii.gz": b"x" for name in "ab"
    }
    listed = {n: {"images": [f"imagesTr/{n}_0000.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in "ab"}

    def save(name: str, files: Files, about: Any) -> None:
        text = about if isinstance(about, bytes) else json.dumps(about).encode()
        put(files | {"dataset.json": text}, root / name)

    save("nnunet", numbered, _NNUNET)
    save("listed", numbered, _NNUNET | {"dataset": listed})
    save("msd", volumes | {"imagesTs/c.nii.gz": b"x"}, _MSD)
    save("largest", volumes | {"imagesTs/c.nii.gz": b"x"}, _MSD)
    for name, target in (
        ("above", "../../../../../../etc/passwd"),
        ("absolute", "/etc/passwd"),
        ("itself", "."),
        ("around", "imagesTr/../../../../../../etc/passwd"),
        ("null", "a\0b"),
        ("long", "x" * 5000),
        ("link", "imagesTr/link.nii.gz"),
        ("channel_link", "imagesTr/channel.nii.gz"),
        ("loop", "imagesTr/loop.nii.gz"),
    ):
        links = {"link.nii.gz": "/etc/passwd", "channel_0000.nii.gz": "/etc/passwd", "loop.nii.gz": "loop.nii.gz"}
        files = volumes | {f"imagesTr/{link}": to for link, to in links.items()}
        save(f"trap_{name}", files, _MSD | {"training": [{"image": target, "label": "labelsTr/a.nii.gz"}]})
    for name, case in (
        ("case_above", "../../evil"),
        ("case_null", "a\0"),
        ("case_long", "_t1" * 50_000),
        ("case_lines", "a\nb"),
    ):
        save(f"trap_{name}", numbered, _NNUNET | {"dataset": {case: listed["a"]}})
    save("trap_deep", volumes, b"[" * 100_000)
    save("trap_digits", volumes, _MSD | {"labels": {"9" * 5000: "a", "0": "b"}})


def read_layout(place: Path) -> None:
    from vision_gates.datasets.volumes.layouts import find_layout

    layout = find_layout(place)
    for case in (*layout.cases, *layout.test_cases):
        assert case.name and not set(case.name) & set("/\\\0\n") and case.name not in (".", ".."), (
            f"case name {case.name!r}"
        )
        for path in (*case.images, *([] if case.labels is None else [case.labels])):
            assert path.resolve().is_relative_to(place.resolve()), f"{path} lies outside of the data set"
