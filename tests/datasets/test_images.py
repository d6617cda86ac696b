"""Reading of images and masks: every format's values, and every way a file can be broken."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from vision_gates.datasets.images import read_image, read_mask, set_channels, to_float
from vision_gates.errors import DataError

GREY8 = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
RGB8 = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY16 = np.random.default_rng(2).integers(0, 65536, (9, 7), dtype=np.uint16)
RGB16 = np.random.default_rng(3).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
FLOAT5 = np.random.default_rng(4).normal(size=(40, 30, 5)).astype(np.float32)


def _check(path: Path, expected: np.ndarray) -> None:
    image = read_image(path)
    assert image.dtype == expected.dtype and image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(image, expected[:, :, None] if expected.ndim == 2 else expected)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_8_bit_colour(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB8).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    _check(path, RGB8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_8_bit_grey(tmp_path, suffix):
    Image.fromarray(GREY8).save(tmp_path / f"a{suffix}")
    _check(tmp_path / f"a{suffix}", GREY8)


def test_jpeg(tmp_path):
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (64, 64, 1) and np.abs(image[:, :, 0].astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("pixels", [GREY16, RGB16], ids=["grey", "colour"])
def test_16_bit_keeps_every_value(tmp_path, suffix, pixels):
    # OpenCV writes its TIFF with LZW compression, which is the other decoder's path too.
    bgr = pixels if pixels.ndim == 2 else pixels[:, :, ::-1]
    assert cv2.imwrite(str(tmp_path / f"a{suffix}"), np.ascontiguousarray(bgr))
    _check(tmp_path / f"a{suffix}", pixels)


def test_alpha_and_palette_of_png(tmp_path):
    alpha = np.full((9, 7, 1), 128, dtype=np.uint8)
    Image.fromarray(np.concatenate([RGB8, alpha], axis=2)).save(tmp_path / "rgba.png")
    _check(tmp_path / "rgba.png", RGB8)
    Image.fromarray(np.stack([GREY8, alpha[:, :, 0]], axis=2)).save(tmp_path / "la.png")
    _check(tmp_path / "la.png", GREY8)
    palette = Image.fromarray(RGB8).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png")
    _check(tmp_path / "p.png", np.asarray(palette.convert("RGB")))
    bits = GREY8 > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    _check(tmp_path / "bits.png", bits.astype(np.uint8) * 255)


def test_exif_orientation_is_applied(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(np.repeat(RGB8, 8, axis=1)).save(tmp_path / "a.jpg", exif=tag)
    assert read_image(tmp_path / "a.jpg").shape == (56, 9, 3)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_multi_channel_tiff(tmp_path, compression):
    contiguous, planar, pages = tmp_path / "contiguous.tif", tmp_path / "planar.tif", tmp_path / "pages.tif"
    options = {"photometric": "minisblack", "compression": compression}
    tifffile.imwrite(contiguous, FLOAT5, planarconfig="contig", **options)
    tifffile.imwrite(planar, FLOAT5.transpose(2, 0, 1), planarconfig="separate", **options)
    with tifffile.TiffWriter(pages) as writer:
        for channel in FLOAT5.transpose(2, 0, 1):
            writer.write(channel, contiguous=False, metadata=None, **options)
    for path in (contiguous, planar, pages):
        _check(path, FLOAT5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_multi_channel_tiff_written_without_a_word(tmp_path):
    tifffile.imwrite(tmp_path / "last.tif", FLOAT5)
    tifffile.imwrite(tmp_path / "first.tif", np.ascontiguousarray(FLOAT5.transpose(2, 0, 1)))
    _check(tmp_path / "last.tif", FLOAT5)
    _check(tmp_path / "first.tif", FLOAT5)


def test_compressed_tiff_pages(tmp_path):
    pages = [Image.fromarray(np.ascontiguousarray(RGB8[:, :, c])) for c in range(3)]
    pages[0].save(tmp_path / "a.tif", compression="tiff_lzw", save_all=True, append_images=pages[1:])
    _check(tmp_path / "a.tif", RGB8)
    Image.fromarray(RGB8).save(tmp_path / "b.tif", compression="tiff_lzw")
    _check(tmp_path / "b.tif", RGB8)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "c.tif", compression="tiff_lzw")
    _check(tmp_path / "c.tif", ramp)


def test_white_is_zero_tiff_is_inverted(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", 255 - GREY8, photometric="miniswhite")
    _check(tmp_path / "a.tif", GREY8)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), 255 - GREY8)


def test_other_numbers_become_float(tmp_path):
    for dtype in (np.int16, np.float64, np.float16, np.uint32):
        pixels = (FLOAT5[:, :, 0] * 100).clip(0 if dtype == np.uint32 else None).astype(dtype)
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        _check(tmp_path / "a.tif", pixels.astype(np.float32))


def test_suffix_of_another_format(tmp_path):
    Image.fromarray(RGB8).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a.png")
    _check(tmp_path / "a.png", RGB8)


def _encode(suffix: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    kind, _, compression = suffix.partition(":")
    Image.fromarray(pixels).save(stream, kind, **({"compression": compression} if compression else {}))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp", "tiff", "tiff:tiff_lzw", "tiff:tiff_deflate"])
@pytest.mark.parametrize("lost", [1, 6, 13, 200, 0.5, 0.99])
def test_truncated_file(tmp_path, kind, lost):
    data, path = _encode(kind), tmp_path / f"a.{kind.partition(':')[0]}"
    path.write_bytes(data)
    assert read_image(path).shape == (48, 48, 3)
    path.write_bytes(data[: -lost if isinstance(lost, int) else round(len(data) * (1 - lost))])
    with pytest.raises(DataError, match="a\\.[a-z]+: cannot be decoded") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_truncated_pages_are_not_fewer_channels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for channel in FLOAT5.transpose(2, 0, 1):
            writer.write(channel, contiguous=False, metadata=None)
    data = (tmp_path / "a.tif").read_bytes()
    for keep in (0.3, 0.6, 0.9):
        (tmp_path / "a.tif").write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(DataError, match="truncated"):
            read_image(tmp_path / "a.tif")


def test_damaged_png_fails_its_checksum(tmp_path):
    data = bytearray(_encode("png"))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded \(damaged: wrong checksum in its IDAT chunk"):
        read_image(tmp_path / "a.png")


def test_short_png_with_valid_chunks(tmp_path):
    # The chunks are whole but the compressed pixels end early.
    pixels = zlib.compress(b"\0" * 10)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 48, 48, 8, 2, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "a.png")


def test_no_image_empty_or_missing(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "text.tif").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name, message in (
        ("text.png", "not an image"),
        ("text.tif", "not a TIFF file"),
        ("empty.png", "the file is empty"),
        ("missing.png", "No such file"),
    ):
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            read_image(tmp_path / name)


def test_nan_in_tiff_is_counted(tmp_path):
    pixels = FLOAT5[:, :, 0].copy()
    pixels[0, :3] = np.nan
    pixels[1, 0] = np.inf
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(DataError, match=r"a\.tif: 4 of 1,200 values are not finite \(3 NaN, 1 infinite\)"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".npy"])
def test_mask_values_are_kept(tmp_path, suffix):
    labels = (GREY8 % 5).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    np.save(path, labels) if suffix == ".npy" else Image.fromarray(labels).save(path)
    mask = read_mask(path)
    assert mask.dtype == np.int64
    np.testing.assert_array_equal(mask, labels)


def test_mask_of_a_palette_holds_indices(tmp_path):
    labels = (GREY8 % 3).astype(np.uint8)
    image = Image.new("P", (7, 9))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    image.putdata(labels.ravel().tolist())
    for name in ("a.png", "a.tif"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), labels)
    assert read_image(tmp_path / "a.tif").shape == read_image(tmp_path / "a.png").shape == (9, 7, 3)


def test_mask_of_16_bits_one_bit_or_equal_channels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY16)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), GREY16)
    bits = GREY8 > 127
    for name, options in (("b.png", {}), ("b.tif", {}), ("c.tif", {"compression": "group4"})):
        Image.fromarray(bits).save(tmp_path / name, **options)
        np.testing.assert_array_equal(read_mask(tmp_path / name), bits)
    Image.fromarray(np.repeat(GREY8[:, :, None], 3, axis=2)).save(tmp_path / "d.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "d.png"), GREY8)


def test_mask_threshold(tmp_path):
    blob = np.zeros((32, 32), dtype=np.uint8)
    blob[5:21, 7:26] = 255
    Image.fromarray(blob).convert("RGB").save(tmp_path / "a.jpg", quality=70)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.jpg")))) > 2
    np.testing.assert_array_equal(read_mask(tmp_path / "a.jpg", threshold=127), blob // 255)


def test_mask_that_is_none(tmp_path):
    Image.fromarray(RGB8).save(tmp_path / "colour.png")
    tifffile.imwrite(tmp_path / "fraction.tif", FLOAT5[:, :, 0])
    np.save(tmp_path / "volume.npy", np.zeros((3, 4, 5), dtype=np.uint8))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    for name, message in (
        ("colour.png", "3 differing channels"),
        ("fraction.tif", "mask values are fractions"),
        ("volume.npy", r"shape \(3, 4, 5\)"),
        ("objects.npy", "cannot be read as a NumPy array"),
    ):
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            read_mask(tmp_path / name)


def test_to_float():
    np.testing.assert_allclose(to_float(np.array([0, 51, 255], dtype=np.uint8)), [0, 0.2, 1])
    np.testing.assert_allclose(to_float(np.array([0, 13107, 65535], dtype=np.uint16)), [0, 0.2, 1])
    values = np.array([-1000, 3.5], dtype=np.float32)
    np.testing.assert_array_equal(to_float(values), values)
    with pytest.raises(ValueError, match="int64"):
        to_float(np.array([1]))


@pytest.mark.parametrize("pixels", [RGB8, RGB16, RGB16.astype(np.float32)], ids=["uint8", "uint16", "float32"])
def test_set_channels(pixels):
    path = Path("a.png")
    grey = set_channels(pixels, 1, path)
    expected = pixels.astype(float) @ [0.299, 0.587, 0.114]
    assert grey.shape == (9, 7, 1) and grey.dtype == pixels.dtype
    np.testing.assert_allclose(grey[:, :, 0], expected, rtol=1e-4, atol=1)
    assert (set_channels(grey, 3, path) == grey).all() and set_channels(grey, 3, path).shape == (9, 7, 3)
    assert set_channels(pixels, None, path) is pixels
    with pytest.raises(DataError, match=r"a\.png: 5 channels"):
        set_channels(FLOAT5, 3, path)
