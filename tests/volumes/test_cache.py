"""Prepared cases on disk: made once, found again, made anew when files or settings change."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from vision_gates.errors import DataError
from vision_gates.volumes.cache import CaseCache, default_cache
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.preprocessing import Prepared


def _prepared() -> Prepared:
    geometry = Geometry((3, 4, 5), np.diag([1.0, 2.0, 3.0, 1.0]))
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 2, 3], labels[0, 0, :2] = 2, 1
    return Prepared(np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5), labels, geometry, geometry)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "image.nii"
    path.write_bytes(b"first")
    return path


def test_a_case_comes_back_as_it_was(tmp_path: Path, file: Path) -> None:
    case = CaseCache(tmp_path / "cache", "settings").find("case", [file], _prepared)
    expected = _prepared()
    np.testing.assert_array_equal(case.image, expected.image)
    np.testing.assert_array_equal(case.labels, expected.labels)
    assert isinstance(case.image, np.memmap)
    found = {case.labelled_place(np.random.default_rng(seed)) for seed in range(50)}
    assert found == {(0, 0, 0), (0, 0, 1), (1, 2, 3)}
    assert not case.geometry.differences(expected.geometry)
    assert not case.source.differences(expected.source)
    copy = pickle.loads(pickle.dumps(case))
    assert len(pickle.dumps(case)) < 1000, "a worker gets a path, not the voxels"
    np.testing.assert_array_equal(copy.image, expected.image)


def test_made_once_for_the_same_files_and_settings(tmp_path: Path, file: Path) -> None:
    made = []

    def make() -> Prepared:
        made.append(1)
        return _prepared()

    cache = CaseCache(tmp_path / "cache", "settings")
    first = cache.find("case", [file], make)
    assert cache.find("case", [file], make).folder == first.folder
    assert len(made) == 1
    assert CaseCache(tmp_path / "cache", "others").find("case", [file], make).folder != first.folder
    file.write_bytes(b"second, longer")
    assert cache.find("case", [file], make).folder != first.folder
    assert len(made) == 3
    assert not list((tmp_path / "cache").glob(".writing-*"))


def test_a_case_that_cannot_be_made_leaves_nothing(tmp_path: Path, file: Path) -> None:
    def make() -> Prepared:
        raise DataError("image.nii: damaged")

    with pytest.raises(DataError, match="damaged"):
        CaseCache(tmp_path / "cache", "settings").find("case", [file], make)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data.cache: prepared volumes cannot be written to .*cache"):
        CaseCache(tmp_path / "cache", "settings").find("case", [file], _prepared)


def test_damaged_voxels_are_named(tmp_path: Path, file: Path) -> None:
    case = CaseCache(tmp_path / "cache", "settings").find("case", [file], _prepared)
    (case.folder / "image.npy").write_bytes(b"short")
    with pytest.raises(DataError, match=r"image.npy: a prepared volume cannot be read .*; delete"):
        _ = case.image


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VISION_GATES_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("VISION_GATES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "vision_gates"
