"""``vision-gates score``: masks in files against the truth in files."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from vision_gates.cli import score
from vision_gates.engine import score_files as score_files_module
from vision_gates.engine.score_files import score_files
from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.writing import write_labels

GEOMETRY = Geometry((8, 8, 8), np.diag([1.0, 1.0, 2.0, 1.0]))


def _write(path: Path, *, shift: int = 0, geometry: Geometry = GEOMETRY) -> Path:
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2 + shift : 6 + shift, 2:6, 2:6] = 1
    labels[0, 0, 0] = 2
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(path, labels, geometry, names=["background", "a", "b"])
    return path


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mask, truth = _write(tmp_path / "mask.nii.gz", shift=1), _write(tmp_path / "truth.nrrd")
    summary = score_files(mask, truth)
    assert [row["name"] for row in summary.per_label] == ["label 1", "label 2"]
    assert summary.per_label[0]["dice"] == pytest.approx(0.75)
    assert score([str(mask), str(truth), "names=background,ventricle,cyst", f"out={tmp_path / 'scores'}"]) == 0
    assert "ventricle" in capsys.readouterr().out
    written = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert "ventricle" in json.dumps(written)


def test_two_folders(tmp_path: Path) -> None:
    for name, shift in (("one", 0), ("two", 2)):
        _write(tmp_path / "masks" / f"{name}.nii.gz", shift=shift)
        _write(tmp_path / "truth" / f"{name}.mha")
    journal = tmp_path / "masks" / "segment.jsonl"
    journal.write_text(json.dumps({"about": {}, "class_names": ["background", "left", "right"]}) + '\n{"begun": "on')
    seen = []
    summary = score_files(tmp_path / "masks", tmp_path / "truth", progress=lambda *done: seen.append(done))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert [row["name"] for row in summary.per_label] == ["left", "right"]
    assert summary.cases == 2 and summary.per_label[0]["dice"] == pytest.approx((1 + 0.5) / 2)
    journal.write_text('{"about": {}}\n')
    with pytest.raises(DataError, match=r"segment\.jsonl, line 1: damaged \(no class_names\); give names="):
        score_files(tmp_path / "masks", tmp_path / "truth")


def test_one_pair_at_a_time_is_in_memory_and_mistakes_come_first(tmp_path: Path, monkeypatch) -> None:
    for name in ("one", "three", "two"):
        _write(tmp_path / "masks" / f"{name}.nii.gz")
        _write(tmp_path / "truth" / f"{name}.nii.gz")
    read, held, most = score_files_module.read_labels, [], []

    def watched(path):
        labels = read(path)
        held.append(weakref.ref(labels.array))
        most.append(sum(array() is not None for array in held))
        return labels

    monkeypatch.setattr(score_files_module, "read_labels", watched)
    assert score_files(tmp_path / "masks", tmp_path / "truth").cases == 3
    assert len(most) == 12 and max(most) <= 4  # the pair before goes when the next one is there
    _write(tmp_path / "truth" / "two.nii.gz", geometry=Geometry((8, 8, 8), np.diag([1.0, 1.0, 3.0, 1.0])))
    monkeypatch.setattr(score_files_module, "score_case", None)
    with pytest.raises(DataError, match=r"two.nii.gz: not on the grid"):
        score_files(tmp_path / "masks", tmp_path / "truth")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mask = _write(tmp_path / "masks" / "one.nii.gz")
    shifted = Geometry((8, 8, 8), np.diag([1.0, 1.0, 3.0, 1.0]))
    elsewhere = _write(tmp_path / "truth" / "other.nii.gz", geometry=shifted)
    with pytest.raises(DataError, match=r"one.nii.gz: not on the grid of .*other.nii.gz: spacing 1 x 1 x 2 mm, not"):
        score_files(mask, elsewhere)
    with pytest.raises(DataError, match="no truth for one"):
        score_files(tmp_path / "masks", tmp_path / "truth")
    with pytest.raises(ConfigError, match="two files or two folders"):
        score_files(mask, tmp_path / "truth")
    with pytest.raises(DataError, match="missing.nii.gz: no such file"):
        score_files(tmp_path / "missing.nii.gz", elsewhere)
    assert score([str(mask)]) == 2 and "PREDICTION and TRUTH are needed" in capsys.readouterr().err
    assert score([str(mask), str(mask), "tolerance=wide"]) == 2
    assert "tolerance=wide: a number of millimetres" in capsys.readouterr().err
    for text in ("-1", "nan", "inf"):
        assert score([str(mask), str(mask), f"tolerance={text}", "out=scores"]) == 2
        assert f"tolerance={text}: millimetres are needed, 0 or more" in capsys.readouterr().err
    assert score([str(mask), str(mask), "--tolerance"]) == 2
    assert "tolerance=: a number of millimetres" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["tolerance=0.5"], ["--tolerance", "0.5"], ["--tolerance=0.5"]])
def test_tolerance_of_surfaces(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    mask, truth = _write(tmp_path / "mask.nii.gz", shift=1), _write(tmp_path / "truth.nii.gz")
    assert score_files(mask, truth).per_label[0]["nsd"] == 1, "all surfaces are within 2 mm"
    assert score([str(mask), str(truth), *arguments, f"out={tmp_path / 'scores'}"]) == 0
    assert "NSD 0.5 mm" in capsys.readouterr().out
    written = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert written["tolerance_mm"] == 0.5 and written["per_label"][0]["nsd"] < 1
