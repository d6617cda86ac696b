"""The model table against the registry and against networks that are really built."""

import csv
import io
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

from vision_gates.errors import UserError
from vision_gates.model_table import (
    main,
    model_rows,
    model_table,
    network_rows,
    network_table,
    networks_to_markdown,
    to_csv,
    to_markdown,
)
from vision_gates.networks import available_networks


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return model_rows()


def test_every_model_of_the_package_has_a_row_and_a_source(rows):
    assert [row["name"] for row in rows] == timm.list_models("vg_*")
    for row in rows:
        assert row["paper"].startswith("arXiv:") and row["code"].startswith("https://") and row["licence"], row["name"]
        assert row["input"] == ("384 x 384" if "384" in row["name"] else "224 x 224")
        # A result in a paper comes with released weights; what is ours alone has neither.
        assert row["top1"] is None or row["weights"] != "none", row["name"]
        assert not row["name"].endswith("_atto") or (row["top1"], row["weights"]) == (None, "none")
        assert row["top1"] is None or 50 < row["top1"] < 95


def test_numbers_are_those_of_the_network(rows):
    by_name = {row["name"]: row for row in rows}
    for name in ("vg_vig_atto", "vg_vig_h_atto"):
        row, model = by_name[name], timm.create_model(name)
        assert row["parameters"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        assert row["family"] == "vig"
        features = timm.create_model(name, features_only=True)
        shapes = [tuple(f.shape) for f in features(torch.zeros(1, 3, 64, 64))]
        assert row["channels"] == tuple(shape[1] for shape in shapes)
        assert row["reductions"] == tuple(64 // shape[2] for shape in shapes)
    tiny = by_name["vg_vig_tiny"]
    assert tiny["top1"] == 77.2 and tiny["paper"] == "arXiv:2405.18425" and tiny["weights"] == "hub: hustvl/ViG"
    assert by_name["vg_vig_atto"]["weights"] == "none"


def test_a_foreign_model_without_these_fields():
    (row,) = model_rows("resnet18")
    assert row["parameters"] == 11.69 and row["family"] == "resnet" and row["top1"] is None
    assert row["reductions"] == (2, 4, 8, 16, 32) and row["weights"].startswith("hub: ")
    assert "| `resnet18` |" in to_markdown([row])


def test_csv_keeps_every_field(rows):
    back = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["name"] for row in back] == [row["name"] for row in rows]
    assert list(back[0]) == list(rows[0])
    assert [float(row["parameters"]) for row in back] == [row["parameters"] for row in rows]
    assert back[0]["reductions"] == " ".join(map(str, rows[0]["reductions"]))


def test_markdown_is_a_table_with_links(rows):
    lines = to_markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {10}
    (tiny,) = [line for line in lines if "`vg_vig_tiny`" in line]
    assert "[arXiv:2405.18425](https://arxiv.org/abs/2405.18425), [code](https://github.com/hustvl/ViG)" in tiny
    assert "| 5.83 |" in tiny and "| 77.2 |" in tiny


@pytest.mark.parametrize("width", [80, 120])
def test_names_and_numbers_stay_whole_on_a_terminal(rows, width):
    console = Console(width=width, file=io.StringIO())
    console.print(model_table(rows))
    text = console.file.getvalue()
    lines = [line.split() for line in text.splitlines()]
    for row in rows:
        (line,) = [line for line in lines if line and line[0] == row["name"]]
        top1 = "-" if row["top1"] is None else str(row["top1"])
        fine, *_, coarse = (*row["reductions"], row["reductions"][-1])
        strides = str(fine) if fine == coarse else f"{fine}-{coarse}"
        parameters = f"{row['parameters']:.2f}"
        size, paper, weights = (
            row["input"].split()[0],
            row["paper"].removeprefix("arXiv:"),
            row["weights"].split(":")[0],
        )
        assert line[1:] == [parameters, size, strides, paper, row["licence"], top1, weights]


def test_networks():
    rows = network_rows()
    assert [row["name"] for row in rows] == available_networks()
    by_name = {row["name"]: row for row in rows}
    assert by_name["agunet"]["parameters"] == 2.38 and by_name["daunet"]["parameters"] == 5.13
    assert all(row["about"].endswith(".") and ": " in row["about"] for row in rows)
    assert [row["name"] for row in network_rows("?aunet")] == ["daunet"]
    console = Console(width=80, file=io.StringIO())
    console.print(network_table(rows))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    for row in rows:
        assert [row["name"], f"{row['parameters']:.2f}"] in [line[:2] for line in lines]
    assert "| `agunet` | 2.38 | AGUNet: a U-Net" in networks_to_markdown(rows)


def test_main_shows_networks(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.index("vg_vig_tiny") < text.index("daunet")
    for form in ("table", "markdown", "csv"):
        assert main(["agu*", f"format={form}"]) == 0
        text = capsys.readouterr().out
        assert "agunet" in text and "2.38" in text and "vig" not in text
    assert main(["vg_vig_t*"]) == 0
    assert "unet" not in capsys.readouterr().out


def test_main(capsys):
    assert main(["vg_vig_t*", "format=csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("vg_vig_tiny,vig,5.83,")
    assert main(["vg_vig_t*", "format=markdown"]) == 0
    assert "| `vg_vig_tiny` |" in capsys.readouterr().out
    assert main(["vg_vig_t*"]) == 0
    assert "vg_vig_tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vg_vig_tinny"], "nearest name: vg_vig_tiny"),
        (["vg_*", "convit*"], "one pattern"),
        (["--markdown"], "one pattern"),
        (["format=xml"], "format=xml: the only setting"),
        (["colour=red"], "colour=red: the only setting"),
    ],
)
def test_mistakes(argv, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")) as caught:
        main(argv)
    assert "\n" not in str(caught.value)


def test_readme_shows_this_table():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    for table in (to_markdown(model_rows()), networks_to_markdown(network_rows())):
        assert table.strip() in readme, "paste the output of: python tools/models.py format=markdown"
