"""The benchmark's bookkeeping: complete rows, readable tables, mistakes named; no assertion about speed itself."""

import csv
import io
import json

import pytest
from rich.console import Console

from vision_gates.benchmark import bench_models, rows_table, write_rows


@pytest.fixture(scope="module")
def rows():
    names = ["vg_vig_h_atto", "test_resnet"]
    return bench_models(names, size=32, batch=2, mode="inference", rounds=3, device="cpu")


def test_rows_carry_what_a_comparison_needs(rows):
    assert [row["model"] for row in rows] == ["vg_vig_h_atto", "test_resnet"]
    assert rows[0]["parameters"] == 943_112
    for row in rows:
        assert row["milliseconds"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
        assert all(row[key] for key in ("device", "torch", "timm", "triton", "commit", "peer", "dtype"))
    assert rows[1]["ratio"] == 1.0, "the peer is compared with itself"


def test_training_times_a_backward_pass_too():
    (row,) = bench_models(
        ["vg_vig_h_atto"], size=32, batch=1, mode="training", rounds=1, device="cpu", dtype="bfloat16"
    )
    assert row["mode"] == "training" and row["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "test"}, "mode must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"rounds": 0}, "at least 1, got 0"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        bench_models(["vg_vig_h_atto"], **change)


def test_table_fits_a_terminal(rows):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(
        rows_table([row | {"model": row["model"].replace("test_resnet", "deit_tiny_patch16_224")} for row in rows])
    )
    text = console.export_text()
    assert "deit_tiny_patch16_224" in text and "vg_vig_h_atto" in text and "943,112" in text and "…" not in text
    with pytest.raises(ValueError, match="nothing to show"):
        rows_table([])


def test_rows_are_written(rows, tmp_path):
    write_rows(rows, tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["vg_vig_h_atto", "test_resnet"]
    write_rows(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())[0]["parameters"] == 943_112
    with pytest.raises(ValueError, match="csv or .json"):
        write_rows(rows, tmp_path / "rows.txt")
