"""The table of exported models: a row a model, kept, not measured twice; faults are rows, too."""

import pytest

from vision_gates.errors import UserError

pytest.importorskip("onnxscript", reason="the [export] extra is not installed")
pytest.importorskip("onnxruntime", reason="the [export] extra is not installed")

from vision_gates.export import table  # noqa: E402
from vision_gates.networks import create_network  # noqa: E402


def tiny(**options):
    network = create_network("attention_unet", in_channels=1, num_classes=2, widths=(4, 8), **options)
    return network, (1, 32, 32)


def test_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_SECONDS", 0.01)
    built = []

    def build():
        built.append(1)
        return tiny()

    monkeypatch.setattr(table, "candidates", lambda patterns: {"tiny": build})
    path = tmp_path / "rows.csv"
    (row,) = table.write_table(path)
    assert float(row["relative_difference"]) < 1e-4 and row["open_axes"] == "batch height width"
    assert row["torch_ms"] > 0 and row["onnxruntime_ms"] > 0 and row["nodes"] > 10
    assert not list(table.write_table(path)) and len(built) == 1
    (kept,) = table.read_rows(path)
    assert tuple(kept) == table.COLUMNS and kept["model"] == "tiny"
    line = table.to_markdown([kept]).splitlines()[-1]
    assert line.startswith("| `tiny` | 1 x 32 x 32 | ") and line.count("|") == 11


def test_a_fault_is_a_row(monkeypatch):
    def fail(*arguments, **named):
        raise UserError("differs from PyTorch")

    monkeypatch.setattr(table, "to_onnx", fail)
    row = table.measure("tiny", tiny)
    assert row["problem"] == "differs from PyTorch" and "torch_ms" not in row
    assert "differs from PyTorch" in table.to_markdown([dict.fromkeys(table.COLUMNS, "") | row])


def test_what_is_measured():
    names = list(table.candidates())
    assert {"vg_vig_tiny", "attention_unet 2-D", "attention_unet 3-D"} <= set(names)
    assert list(table.candidates(["vg_*_atto"])) == [n for n in names if n.startswith("vg_") and n.endswith("_atto")]
    assert table.measure("ear_unet 3-D", table.candidates(["ear_unet 3-D"])["ear_unet 3-D"]) is None
    with pytest.raises(UserError, match="no model matches nothing; there are "):
        table.candidates(["nothing"])
