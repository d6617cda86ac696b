"""Honest files and traps of images: PNG, JPEG, BMP, WebP, TIFF, npy, and npz of data sets and of reports."""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.seeds import Code, npy_bytes, npz_bytes, picture_bytes, write


def make_image(root: Path, canary: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 4, (9, 12)).astype(np.uint8), rng.integers(0, 255, (16, 20, 3)).astype(np.uint8)
    write(root / "grey", a__png=picture_bytes(".png", grey))
    write(root / "deep", a__png=picture_bytes(".png", colour.astype(np.uint16) * 99))
    write(root / "jpeg", a__jpg=picture_bytes(".jpg", colour))
    write(root / "bmp", a__bmp=picture_bytes(".bmp", colour))
    write(root / "webp", a__webp=picture_bytes(".webp", colour))
    for name, mode, options in (
        ("palette", "P", {}),
        ("bit", "1", {}),
        ("progressive", "L", {"format": "JPEG", "progressive": True}),
    ):
        stream = io.BytesIO()
        Image.fromarray(colour).convert(mode).save(stream, **({"format": "PNG"} | options))
        write(root / name, **{"a__jpg" if options else "a__png": stream.getvalue()})
    write(root / "npy", a__npy=npy_bytes(grey))
    write(root / "largest_png", a__png=picture_bytes(".png", np.zeros((4096, 4096), np.uint8)))
    write(root / "largest_jpg", a__jpg=picture_bytes(".jpg", np.zeros((2048, 2048), np.uint8)))
    png = picture_bytes(".png", grey)
    body = b"IHDR" + struct.pack(">2I", 10**6, 10**6) + png[24:29]
    write(root / "trap_claim", a__png=png[:12] + body + struct.pack(">I", zlib.crc32(body)) + png[33:])
    body = b"IHDR" + struct.pack(">2I", 13_000, 13_000) + png[24:29]
    write(root / "trap_claim_less", a__png=png[:12] + body + struct.pack(">I", zlib.crc32(body)) + png[33:])
    jpeg = picture_bytes(".jpg", colour)
    at = jpeg.find(b"\xff\xc0")
    write(root / "trap_claim_jpg", a__jpg=jpeg[: at + 5] + struct.pack(">2H", 13_000, 13_000) + jpeg[at + 9 :])
    bmp = picture_bytes(".bmp", colour)
    write(root / "trap_claim_bmp", a__bmp=bmp[:18] + struct.pack("<2i", 13_000, 13_000) + bmp[26:])
    write(
        root / "trap_postscript",
        a__png=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    )
    write(root / "trap_claim_npy", a__npy=npy_bytes(grey).replace(b"(9, 12), }", b"(1000000, 1000000), }"))
    write(root / "trap_npz", a__npy=npz_bytes(a=grey))
    write(root / "trap_pickle", a__npy=npy_bytes(np.array([Code(canary)], dtype=object)))


def make_tiff(root: Path, canary: Path) -> None:
    import tifffile

    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 4, (9, 12)).astype(np.uint8), rng.integers(0, 255, (16, 20, 3)).astype(np.uint8)

    def save(name: str, array: Any, **options: Any) -> bytes:
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, **options)
        write(root / name, a__tif=stream.getvalue())
        return stream.getvalue()

    plain = save("grey", grey)
    save("colour", colour, photometric="rgb", compression="deflate")
    save("pages", rng.normal(size=(3, 9, 12)).astype(np.float32), photometric="minisblack", rowsperstrip=3)
    save("big", grey, bigtiff=True)
    save("tiles", np.tile(colour.astype(np.uint16), (3, 3, 1)), tile=(16, 16), photometric="rgb")
    save("imagej", rng.integers(0, 9, (4, 9, 12)).astype(np.uint16), imagej=True)
    save("ome", rng.integers(0, 9, (4, 9, 12)).astype(np.uint8), ome=True)
    write(root / "lzw", a__tif=picture_bytes(".tif", colour))
    save("largest", np.zeros((4096, 2048), np.uint8), compression="deflate")
    claim = plain
    for tag in (256, 257):  # width and length
        at = claim.find(struct.pack("<2H", tag, 3))
        at = at if at >= 0 else claim.find(struct.pack("<2H", tag, 4))
        claim = claim[: at + 2] + struct.pack("<HII", 4, 1, 10**6) + claim[at + 12 :]
    write(root / "trap_claim", a__tif=claim)
    write(root / "trap_overlap", a__tif=overlapping_directories())
    write(root / "trap_big_claim", a__tif=_big_claim())
    shaped = plain.replace(b'{"shape": [9, 12]}', b'{"shape":[9999,9]}') if b'{"shape": [9, 12]}' in plain else claim
    write(root / "trap_shape", a__tif=shaped + b"\0" if shaped is claim else claim)


def overlapping_directories(count: int = 4000) -> bytes:
    """A chain of directories, each six bytes after the one before and with 2,000 entries."""
    counts = struct.pack("<HI", 2000, 0) * count
    links = b"".join(struct.pack("<IH", 8 + 6 * (i + 1), 0) for i in range(count - 1)) + bytes(6)
    return b"II*\0" + struct.pack("<I", 8) + (counts + bytes(24_002))[:24_002] + links


def _big_claim() -> bytes:
    """BigTIFF with 2^62 entries."""
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**62) + bytes(200)


def make_npz(root: Path, canary: Path) -> None:
    rng = np.random.default_rng(0)

    def arrays(shape: tuple[int, ...], kind: Any, labels: tuple[int, ...]) -> dict[str, Any]:
        return {
            **{f"{split}_images": rng.integers(0, 99, (5, *shape)).astype(kind) for split in ("train", "val", "test")},
            **{
                f"{split}_labels": rng.integers(0, 3, (5, *labels)).astype(np.uint8)
                for split in ("train", "val", "test")
            },
        }

    grey = arrays((9, 9), np.uint8, (1,))
    data = npz_bytes(**grey)
    write(root / "grey", a__npz=data)
    stream = io.BytesIO()
    np.savez(stream, **arrays((7, 8, 3), np.float32, ()))
    write(root / "colour", a__npz=stream.getvalue())
    zeros = {
        key: np.zeros((300, 224, 224), np.uint8) if "images" in key else np.zeros((300, 1), np.uint8) for key in grey
    }
    write(root / "largest", a__npz=npz_bytes(**zeros))

    def with_member(name: str, body: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, body if info.filename == name else old.read(info))
            if name not in old.namelist():
                new.writestr(name, body)
        return made.getvalue()

    claim = npy_bytes(grey["train_images"]).replace(b"(5, 9, 9), }", b"(5, 1000000, 1000000), }")
    write(root / "trap_claim", a__npz=with_member("train_images.npy", claim))
    write(
        root / "trap_less", a__npz=with_member("train_images.npy", claim.replace(b"1000000, 1000000", b"20000, 20000"))
    )
    write(
        root / "trap_object",
        a__npz=with_member("train_labels.npy", npy_bytes(np.array([Code(canary)] * 5, dtype=object))),
    )
    write(root / "trap_pickle", a__npz=pickle.dumps(Code(canary)))
    write(root / "trap_raw", a__npz=with_member("train_images.npy", pickle.dumps(Code(canary))))
    write(root / "trap_path", a__npz=with_member("../../train_images.npy", b"x").replace(b"val_labels", b"../_labels"))
    write(root / "trap_npy", a__npz=npy_bytes(grey["train_images"]))
    write(root / "trap_method", a__npz=data.replace(b"\x08\x00", b"\x63\x00"))


def read_npz(place: Path) -> None:
    from vision_gates.datasets import base

    for path in place.iterdir():
        config = base.data_config_type("medmnist")(type="medmnist", root=str(path), image_size=8)  # type: ignore[call-arg]
        for _, split in base.load_splits(config).items():
            for index in range(min(len(split), 8)):
                split.read(index)


def make_overlays(root: Path, canary: Path) -> None:
    from vision_gates.engine.overlays import pack_overlays

    rng = np.random.default_rng(0)
    picture = {
        "image": rng.random((8, 9)),
        "target": rng.integers(0, 3, (8, 9)),
        "prediction": rng.integers(0, 3, (8, 9)),
    }
    plain = {"name": "a", "index": 0, "score": 0.5, "worst": False, **picture}
    words = {"caption": "c", "letters": ["L", "R", "A", "P"]}
    data = pack_overlays([plain, plain | {"name": "b", "index": 1, "score": None}])
    write(root / "image", a__npz=data)
    write(root / "volume", a__npz=pack_overlays([plain | words | {"further": [picture | words]}]))
    zeros = {key: np.zeros((3000, 3000)) for key in picture}
    write(root / "largest", a__npz=pack_overlays([plain | zeros]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        arrays = {name[:-4]: archive.read(name) for name in archive.namelist()}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in arrays.items():
            archive.writestr(f"{name}.npy", body.replace(b"(8, 9), }", b"(1000000, 1000000), }"))
    write(root / "trap_claim", a__npz=made.getvalue())
    write(root / "trap_object", a__npz=npz_bytes(names=np.array([Code(canary)], dtype=object)))


def read_overlay_file(place: Path) -> None:
    from vision_gates.engine.overlays import read_overlays

    for path in place.iterdir():
        read_overlays(path)
