"""npz files in MedMNIST's layout."""

import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

from vision_gates.errors import ConfigError, DataError


def _arrays(*, shape: tuple[int, ...] = (8, 8), classes: int = 3, dtype: type = np.uint8) -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = (rng.random((count, *shape)) * 255).astype(dtype)
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return arrays


@pytest.mark.parametrize(
    ("shape", "dtype", "channels"),
    [((8, 8), np.uint8, 1), ((8, 9, 3), np.uint8, 3), ((8, 8, 5), np.uint16, 5), ((8, 8), np.float64, 1)],
)
def test_own_file(data, tmp_path, shape, dtype, channels):
    arrays = _arrays(shape=shape, dtype=dtype)
    np.savez_compressed(tmp_path / "mine.npz", **arrays)
    splits, statistics = data.check("medmnist", root=str(tmp_path / "mine.npz"))
    assert splits.in_chans == channels and splits.class_names == ("class_0", "class_1", "class_2")
    assert statistics.images == {"train": 12, "val": 6, "test": 6} and statistics.counts["train"] == [4, 4, 4]
    sample = splits.val.read(4)
    np.testing.assert_array_equal(sample.image.reshape(shape), arrays["val_images"][4].astype(sample.image.dtype))
    assert sample.target == 1 and sample.name == "val_000004"
    copy = pickle.loads(pickle.dumps(splits))
    np.testing.assert_array_equal(copy.val.read(4).image, sample.image)
    assert len(pickle.dumps(splits.train)) < 2000


def test_folder_and_flag(data, tmp_path):
    np.savez(tmp_path / "pneumoniamnist.npz", **_arrays(classes=2))
    np.savez(tmp_path / "bloodmnist_64.npz", **_arrays(shape=(64, 64, 3), classes=8))
    assert len(data.load("medmnist", root=str(tmp_path), flag="pneumoniamnist").class_names) == 2
    assert data.load("medmnist", root=str(tmp_path), flag="bloodmnist", size=64).in_chans == 3
    with pytest.raises(DataError, match=r"octmnist.npz does not exist \(npz files there: bloodmnist_64.npz, pneum"):
        data.load("medmnist", root=str(tmp_path), flag="octmnist")
    with pytest.raises(ConfigError, match="data.flag: name the set"):
        data.load("medmnist", root=str(tmp_path))


def test_class_names_come_from_the_package(data, tmp_path):
    pytest.importorskip("medmnist")
    np.savez(tmp_path / "pneumoniamnist.npz", **_arrays(classes=2))
    assert data.load("medmnist", root=str(tmp_path / "pneumoniamnist.npz")).class_names == ("normal", "pneumonia")


def test_missing_file_and_folder(data, tmp_path):
    assert f"data.root: {tmp_path}/no.npz does not exist" in data.fault("medmnist", root=str(tmp_path / "no.npz"))
    message = data.fault("medmnist", root=str(tmp_path / "no"), flag="octmnist")
    assert f"data.root: {tmp_path}/no does not exist" in message


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("chestmnist", "several labels an image, which is not supported yet"),
        ("organmnist3d", "organmnist3d holds 3-D images, which are not supported yet"),
        ("catmnist", "there is no set 'catmnist'; .*pathmnist"),
    ],
)
def test_unsupported_sets(data, tmp_path, flag, message):
    with pytest.raises(ConfigError, match=f"data.flag: .*{message}"):
        data.load("medmnist", root=str(tmp_path), flag=flag)


def test_unsupported_content(data, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **_arrays(shape=(8, 8, 8)))
    assert "3-D images are not supported yet" in data.fault("medmnist", root=str(path))
    np.savez(path, **(_arrays() | {"train_labels": np.zeros((12, 14), dtype=np.uint8)}))
    assert "only one integer label an image" in data.fault("medmnist", root=str(path))
    np.savez(path, **(_arrays() | {"val_labels": np.zeros((5, 1), dtype=np.uint8)}))
    assert "6 val_images but 5 val_labels" in data.fault("medmnist", root=str(path))
    np.savez(path, images=np.zeros(3))
    assert "no array train_images, train_labels, val_images, val_labels" in data.fault("medmnist", root=str(path))


def test_truncated_file(data, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **_arrays(shape=(64, 64)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: not a readable npz file" in data.fault("medmnist", root=str(path))
    damaged = bytearray(whole)
    damaged[2000:2100] = bytes(100)
    path.write_bytes(damaged)
    assert f"{path}: array 'train_images' cannot be read" in data.fault("medmnist", root=str(path))


def test_nan_and_labels_are_found(data, tmp_path):
    arrays = _arrays(dtype=np.float32)
    arrays["train_images"][3, 0, :2] = np.nan
    arrays["val_labels"] = arrays["val_labels"].astype(np.int64) - 1
    np.savez(tmp_path / "mine.npz", **arrays)
    message = data.fault("medmnist", root=str(tmp_path / "mine.npz"))
    assert "train_000003 holds 2 NaN or infinite values" in message
    assert "labels outside 0..2 in 2 images: val_000000, val_000003; values found: -1: 2 images" in message


def test_download_uses_the_package(data, tmp_path, monkeypatch):
    class BreastMNIST:
        def __init__(self, *, split: str, download: bool, root: str, size: int) -> None:
            assert download
            np.savez(f"{root}/breastmnist_{size}.npz", **_arrays(classes=2))

    package = ModuleType("medmnist")
    package.__spec__ = sys.modules[__name__].__spec__
    package.INFO, package.BreastMNIST = {"breastmnist": {"python_class": "BreastMNIST"}}, BreastMNIST
    info = ModuleType("medmnist.info")
    info.INFO = {"breastmnist": {"label": {"0": "malignant", "1": "benign"}}}
    monkeypatch.setitem(sys.modules, "medmnist", package)
    monkeypatch.setitem(sys.modules, "medmnist.info", info)
    root = tmp_path / "new" / "folder"
    options = {"root": str(root), "flag": "breastmnist", "size": 64, "download": True}
    assert data.load("medmnist", **options).class_names == ("malignant", "benign")
    monkeypatch.setattr(package, "BreastMNIST", None)  # the file is there now: no second download
    assert len(data.load("medmnist", **options).train) == 12


def test_download_without_network_or_package(data, tmp_path, monkeypatch):
    def offline(**options: object) -> None:
        raise RuntimeError("\n  Automatic download failed!\n")

    package = ModuleType("medmnist")
    package.__spec__ = sys.modules[__name__].__spec__
    package.INFO, package.OCTMNIST = {"octmnist": {"python_class": "OCTMNIST"}}, offline
    monkeypatch.setitem(sys.modules, "medmnist", package)
    options = {"root": str(tmp_path), "flag": "octmnist", "download": True}
    message = data.fault("medmnist", **options)
    assert f"octmnist could not be downloaded to {tmp_path} (no network?); fetch octmnist.npz from https://" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the medmnist package: pip install" in data.fault("medmnist", **options)


def test_pneumoniamnist(data, data_folder):
    splits, statistics = data.check("medmnist", root=str(data_folder / "pneumoniamnist.npz"), image_size=28)
    assert splits.in_chans == 1 and len(splits.class_names) == 2
    assert statistics.images == {"train": 3882, "val": 524, "test": 624}
    assert sum(statistics.counts["train"]) == 3882 and min(statistics.counts["train"]) > 300
    with np.load(data_folder / "pneumoniamnist.npz") as arrays:
        images = arrays["train_images"] / 255
    np.testing.assert_allclose([*statistics.mean, *statistics.std], [images.mean(), images.std()], rtol=1e-9)
