"""The report: complete, self-contained, escaped, quick; and its figures, read back as XML and PNG."""

import base64
import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from vision_gates.config import parse_config, save_config
from vision_gates.engine.evaluation import Evaluation, write_evaluation
from vision_gates.engine.figures import (
    Series,
    class_colour,
    confusion_matrix,
    error_mask,
    heat_bar,
    heat_colours,
    heat_mask,
    heat_table,
    label_mask,
    line_chart,
    png_uri,
)
from vision_gates.engine.gate_views import (
    MAX_SIDE,
    GateTable,
    GateView,
    GateViews,
    Neighbourhood,
    gate_tables,
    gate_views,
    pack_gate_views,
    read_gate_views,
)
from vision_gates.engine.overlays import UNSCORED
from vision_gates.engine.report import write_report
from vision_gates.engine.run_directory import append_line, to_json
from vision_gates.engine.trainer import train
from vision_gates.errors import UserError
from vision_gates.gate_maps import GateMap
from vision_gates.metrics import create_metrics

EVIL = '<script>alert("1")</script>'
_VOID = {"meta", "img", "br", "link", "input"}


class _Page(HTMLParser):
    """Checks that tags close in order; collects tags, text and every address the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = re.findall(r"url\(([^)]{0,40})", text)
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def _page(path: Path) -> _Page:
    """The parsed page, once it is known to need nothing from outside."""
    page = _Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    return page


def _run(path: Path, *, task: str = "classification", epochs: int = 0, planned: int = 10, name: str = "run") -> Path:
    """A run directory as the trainer leaves it after some epochs, without training."""
    run = path / name
    run.mkdir(parents=True)
    data = {"type": "digits", "image_size": 32} if task == "classification" else {"type": "mni152", "image_size": 96}
    raw = {"task": {"type": task}, "data": data, "model": {"name": "test_convnext"}, "schedule": {"epochs": planned}}
    save_config(parse_config(raw), run / "config.yaml")
    for epoch in range(1, epochs + 1):
        loss = math.exp(-epoch / 3)
        val = {"loss": loss + 0.1, "accuracy": 1 - loss, "dice": 1 - loss}
        row = {"epoch": epoch, "step": epoch, "lr": 1e-3, "train": {"loss": loss}, "seconds": 60.0}
        append_line(run / "metrics.jsonl", to_json(row | {"val": val if epoch % 2 == 0 else None}))
    return run


def _evaluated(run: Path, task: str, names: tuple[str, ...], *, file_name: str = "a.png") -> None:
    import torch

    metrics = create_metrics(task, names)
    if task == "segmentation":
        target = torch.zeros(1, 8, 8, dtype=torch.long)
        target[:, 2:6, 2:6] = 1
        prediction = target.roll(1, dims=1)
        metrics.update(prediction, target, [file_name])
        masks = {"target": target[0].numpy(), "prediction": prediction[0].numpy()}
        overlay = {"image": np.random.default_rng(0).random((8, 8)), "score": 0.75, **masks}
    else:
        metrics.update(torch.tensor([[3.0, 0.0]]), torch.tensor([1]), [file_name])
        overlay = {"image": np.zeros((8, 8, 3)), "score": 0.95, "target": 1, "prediction": 0}
    overlays = [overlay | {"name": file_name, "index": 0, "worst": True}]
    done = Evaluation(metrics.compute(), metrics.rows(), None, overlays, 1.0, task, names)
    write_evaluation(run, "test", done)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_report_of_a_real_run(task, make_config, quiet):
    config = make_config("schedule.epochs=2", task=task)
    run = train(config, command=["vision-gates", "train", "my config.yaml"], console=quiet)
    page = _page(run / "report.html")
    text = " ".join(page.text)
    metrics = json.loads((run / "evaluation" / "test.json").read_text())["metrics"]
    assert f"{metrics['accuracy' if task == 'classification' else 'dice']:.4f}" in text
    for part in ("epoch 2 of 2", "my config.yaml", "Test images", "test_convnext", "M parameters", "torch ", "CPU"):
        assert part in text
    for part in ("seed", "N", "Loss", "Learning rate"):
        assert part in page.text
    assert (run / "config.yaml").read_text() in "".join(page.text), "the resolved configuration, whole"
    if task == "segmentation":
        assert "truth" in page.text and "prediction" in page.text and "false alarms" in page.text
        assert "scores 0 there" in text and page.tags.count("figure") == 4
        assert sum(bool(re.search(r"scan\d\d\.png", part)) for part in page.text) == 4
    else:
        assert "confusion matrix" in (run / "report.html").read_text()
        assert "Evenly spaced samples" in page.text
    before = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before, "the same run gives the same page"
    assert not list(run.glob(".*")), "nothing is left of the atomic write"


def test_a_run_grows_from_nothing(tmp_path):
    page = _page(write_report(_run(tmp_path, name="new")))
    assert "not started" in " ".join(page.text) and "svg" not in page.tags
    page = _page(write_report(_run(tmp_path, epochs=5, name="going")))
    text = " ".join(page.text)
    assert "epoch 5 of 10" in text and "best so far, epoch 4" in text and "5 min 0 s" in text
    assert f"{1 - math.exp(-4 / 3):.4f}" in text
    assert page.tags.count("svg") == 3


def test_best_epoch_of_a_monitored_loss_is_the_lowest(tmp_path):
    run = _run(tmp_path, epochs=6)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("monitor: accuracy", "monitor: loss"))
    assert "monitor: loss" in (run / "config.yaml").read_text()
    page = _page(write_report(run))
    assert "best so far, epoch 6" in " ".join(page.text)
    assert page.tags.count("svg") == 2, "the monitored loss is in the first chart already"


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_names_from_outside_are_escaped(tmp_path, task):
    run = _run(tmp_path, task=task, epochs=2, name="run <b>")
    _evaluated(run, task, ("background", EVIL), file_name=f"{EVIL}\udcff.png")
    (run / "run.json").write_text(
        json.dumps({"class_names": ["background", EVIL], "in_chans": 1, "images": {"train": 3}})
    )
    (run / "environment.json").write_text(json.dumps({"command": ["train", EVIL], "device": EVIL, "threads": 1}))
    page = _page(write_report(run))
    assert sum(EVIL in part for part in page.text) >= 5
    assert any(f"{EVIL}\\udcff.png" in part for part in page.text), "a name that is no UTF-8 stays readable"


def test_undefined_numbers_are_dashes_and_explained(tmp_path):
    run = _run(tmp_path, epochs=2)
    _evaluated(run, "classification", ("a", "b"))
    text = " ".join(_page(write_report(run)).text)
    assert "–" in text and "AUC is undefined: all 1 image(s) are of one class." in text
    assert "nan" not in text.lower().replace("nan: stop", "")  # a key of the configuration, which the page shows


def test_curves_of_a_run_by_the_clock_end_where_it_ended(tmp_path):
    run = _run(tmp_path, epochs=4, planned=200)
    write_report(run)
    assert "epoch 4 of 200" in (run / "report.html").read_text() and ">200<" in (run / "report.html").read_text()
    raw = parse_config(yaml.safe_load((run / "config.yaml").read_text()), ["schedule.minutes=2.5"])
    save_config(raw, run / "config.yaml")
    write_report(run)
    assert "epoch 4 in 2.5 minutes" in (run / "report.html").read_text()
    assert ">200<" not in (run / "report.html").read_text()


def test_curves_are_quick(tmp_path):
    run = _run(tmp_path, epochs=300, planned=300)
    write_report(run)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        write_report(run)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5


def test_no_run_directory(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        (
            "segmentation",
            ["model.name=vg_vig_h_atto", "model.decoder={type: attention_unet, channels: 8, detail_channels: 4}"],
            ["attention gate, gate 5 of 5", "32 x 32 positions", "image and prediction", "locality gate, layer 6 of 6"],
        ),
        (
            "classification",
            ["model.name=vg_convit_atto", "model.options={patch_size: 8, img_size: 32}"],
            ["Gated positional attention, head by head", "Where layer 1 of 5 looks by position", "head 4"],
        ),
        (
            "classification",
            ["model.name=vg_vig_atto", "model.options={patch_size: 8, img_size: 32}"],
            ["locality gate, layer 3 of 6, mean of 3 heads", "4 x 4 positions", "image, predicted", "head by head"],
        ),
    ],
)
def test_report_shows_what_the_gates_did(task, model, words, make_config, quiet):
    run = train(make_config("schedule.epochs=1", *model, task=task), console=quiet)
    text = " ".join(_page(run / "report.html").text)
    for part in ["What the gates do", *words]:
        assert part in text, part
    gates = read_gate_views(run / "evaluation" / "test_gates.npz")
    assert len(gates.samples) == (0 if "convit" in model[0] else 4 if task == "segmentation" else 2)
    assert (run / "report.html").stat().st_size < 1_000_000

    (run / "evaluation" / "test_gates.npz").unlink()
    old = " ".join(_page(write_report(run)).text)
    assert "What the gates do" not in old and "Test images" in old, "a run of before has no maps, but a report"


def test_a_network_without_gates_has_no_gate_file(make_config, quiet):
    run = train(make_config("schedule.epochs=1"), console=quiet)
    assert not (run / "evaluation" / "test_gates.npz").exists()


def _map(values, kind="attention gate", name="gate", **words) -> GateMap:
    import torch

    values = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    labels = tuple(f"head {i}" for i in range(values.shape[1 if values.ndim > 1 else 0]))
    return GateMap(name, kind, values, labels, unit="head", **words)


def test_views_are_bounded_and_evenly_spread():
    single = [_map(np.full((1, 1, 600, 300), i / 10), name=f"g{i}") for i in range(10)]
    heads = [_map(np.stack([np.zeros((1, 4, 4)), np.ones((1, 4, 4))], 1), "locality gate", f"h{i}") for i in range(12)]
    views = gate_views([*heads, *single], (600, 300))
    assert [v.name for v in views if v.kind == "locality gate"] == ["h0", "h6", "h11"]
    assert [v.name for v in views if v.kind == "attention gate"] == ["g0", "g2", "g4", "g5", "g7", "g9"]
    assert all(max(v.values.shape) <= MAX_SIDE for v in views) and views[3].grid == (600, 300)
    assert views[0].title == "layer 1 of 12, mean of 2 heads" and np.all(views[0].values == 0.5)
    volume = _map(np.zeros((1, 1, 4, 4, 4)))
    assert gate_views([volume, _map([0.5, 0.5])], (4, 4)) == []


def test_padding_is_cut_off_a_view():
    values = np.zeros((1, 1, 4, 4))
    values[..., 3] = 1.0  # the padding at the right of an image of 64 x 48
    (view,) = gate_views([_map(values)], (64, 48), divisor=64)
    assert view.values.shape == (64, 48) and view.values[:, :40].max() == 0 and view.values.max() <= 0.5


def test_tables_are_means_of_samples_and_positions():
    first, second = _map(np.zeros((1, 2, 3, 3)), "k", "a"), _map(np.full((1, 2, 3, 3), 0.5), "k", "a")
    wide = _map([0.25, 0.5, 0.75], "k", "b")
    (table,) = gate_tables([[first, wide], [second, wide]])
    assert table.values == ((0.25, 0.25, None), (0.25, 0.5, 0.75)) and table.names == ("a", "b")
    assert gate_tables([[_map(np.ones((1, 2, 3, 3)), "k", relative=True)]]) == []
    assert gate_tables([[_map(np.ones((1, 1, 3, 3)))]]) == [] and gate_tables([]) == []


def test_gate_file_keeps_everything_and_words_are_escaped(tmp_path):
    run = _run(tmp_path, task="segmentation", epochs=2)
    _evaluated(run, "segmentation", ("background", "a"))
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    views = GateViews(
        {0: [GateView(EVIL, EVIL, EVIL, EVIL, (4, 4), values)], 7: [GateView("n", "k", "t", "m", (4, 4), values)]},
        [GateTable(EVIL, EVIL, EVIL, (EVIL, "b"), ((0.5, None), (0.25, 1.0)))],
        [Neighbourhood(EVIL, EVIL, EVIL, np.stack([values, values]))],
    )
    path = run / "evaluation" / "test_gates.npz"
    path.write_bytes(pack_gate_views(views))
    read = read_gate_views(path)
    assert list(read.samples) == [0, 7] and read.samples[0][0].title == EVIL
    np.testing.assert_allclose(read.samples[0][0].values, values, atol=1 / 255)
    assert read.tables[0].values == [[0.5, None], [0.25, 1.0]] and read.neighbourhoods[0].values.shape == (2, 4, 4)
    page = _page(write_report(run))
    assert sum(EVIL in part for part in page.text) >= 5, "and the sample that is not shown any more is left out"


# ---------------------------------------------------------------- figures


def _pixels(uri: str) -> np.ndarray:
    """RGB(A) or grey pixels of a data URI."""
    data = np.frombuffer(base64.b64decode(uri.partition("base64,")[2]), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_png_keeps_pixels_and_channel_order(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(_pixels(png_uri(image)), image)


def test_masks_show_classes_outlines_and_errors():
    target = np.zeros((300, 300), dtype=np.uint16)
    target[50:150, 50:150], target[200:, :] = 2, UNSCORED
    rgba = _pixels(label_mask(target, 3))
    assert rgba.shape == (300, 300, 4)
    colour = [int(class_colour(2)[i : i + 2], 16) for i in (1, 3, 5)]
    assert rgba[100, 100, :3].tolist() == colour
    assert 0 < rgba[100, 100, 3] < rgba[50, 100, 3] == 255, "an outline is opaque, the inside tinted"
    assert rgba[10, 10, 3] == 0 and rgba[250, 10, 3] == 0, "background and unscored pixels are clear"
    small = _pixels(label_mask(target[40:70, 40:70], 3))
    assert min(small.shape[:2]) >= 280, "small masks are enlarged, so that outlines are thin"
    prediction = np.zeros_like(target)
    prediction[100:150, 50:150] = 2
    wrong = _pixels(error_mask(target, prediction, 3))[..., 3] > 0
    expected = np.zeros((300, 300), bool)
    expected[50:100, 50:150] = True
    np.testing.assert_array_equal(wrong, expected)


def test_heat_is_brighter_and_more_opaque_where_the_value_is_larger():
    rgba = _pixels(heat_mask(np.linspace(0, 1, 64)[None])).astype(int)[0]
    assert (np.diff(rgba[:, :3].sum(axis=1)) >= -2).all() and rgba[0, :3].sum() < 20 and rgba[-1, :3].sum() > 600
    assert (np.diff(rgba[:, 3]) >= 0).all() and 60 < rgba[0, 3] < rgba[-1, 3] < 200, "the image shines through"
    assert _pixels(heat_mask(np.zeros((2, 3)), opaque=True))[..., 3].min() == 255
    np.testing.assert_array_equal(heat_colours(np.array([-1.0, 2.0])), heat_colours(np.array([0.0, 1.0])))


def test_heat_table_and_bar():
    table = _svg(heat_table([[0.5, None], [0.0, 1.0]], rows=["a", "<b>"], columns=["x", "y"], titles=["m", "n"]))
    assert [cell.text for cell in table.iter("td")] == ["a", "0.50", None, "<b>", "0.00", "1.00"]
    assert [cell.get("style", "")[-4:] for cell in table.iter("td")][4:] == ["#fff", "#000"]
    bar = _svg(heat_bar("<dark>", "bright"))
    assert [part.text for part in bar.iter("span")] == ["0 <dark>", "1 bright"]


def test_colours_of_many_classes_differ():
    colours = [class_colour(label) for label in range(1, 30)]
    assert len(set(colours)) == 29 and all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in colours)


def _svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_line_chart_places_points_and_skips_gaps():
    points = [(1, 1.0), (2, None), (3, float("nan")), (4, 0.0)]
    chart = _svg(line_chart("Loss <1>", [Series("train", "a", points), Series("none", "b", [(1, None)])], last_x=8))
    (line,) = chart.findall("polyline")
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line.get("points").split())
    assert x1 < x2 and y1 < y2, "SVG's y axis points down"
    assert len(chart.findall("circle")) == 2
    texts = [element.text for element in chart.findall("text")]
    assert texts[0] == "Loss <1>" and "train 0" in texts and {"0", "0.5", "1", "8"} <= set(texts)
    assert line_chart("Loss", [Series("train", "a", [(1, None)])], last_x=8) == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-7, 1e7])
def test_line_chart_of_a_constant_or_single_value(value):
    for points in ([(1, value)], [(1, value), (2, value)]):
        chart = _svg(line_chart("x", [Series("s", "a", points)], last_x=1, mark=(1.0, "best")))
        coordinates = [float(c) for p in chart.find("polyline").get("points").split() for c in p.split(",")]
        assert all(math.isfinite(c) and 0 <= c <= 360 for c in coordinates)


def test_small_numbers_have_exponents():
    chart = _svg(line_chart("lr", [Series("rate", "c", [(1, 1e-4), (2, 2e-3), (3, 1e-6)])], last_x=3))
    texts = {element.text for element in chart.findall("text")}
    assert {"2e-3", "5e-4", "rate 1e-6"} <= texts


@pytest.mark.parametrize("classes", [2, 12, 30, 70])
def test_confusion_matrix(classes):
    counts = np.random.default_rng(0).integers(0, 5, (classes, classes)) + 40 * np.eye(classes, dtype=int)
    matrix = _svg(confusion_matrix(counts.tolist(), [f"class <{c}>" for c in range(classes)]))
    if classes > 60:
        pixels = _pixels(matrix.find("image").get("href"))
        assert pixels.shape == (classes, classes, 4)
        assert (pixels[..., 3].argmax(axis=1) == np.arange(classes)).all()
        return
    cells = [group.find("title").text for group in matrix.findall("g")]
    assert len(cells) == classes**2
    share = counts[0, 1] / counts[0].sum()
    assert cells[1] == f"class <0> predicted as class <1>: {counts[0, 1]} ({share:.1%})"
    written = [int(group.find("text").text) for group in matrix.findall("g") if group.find("text") is not None]
    assert written == ([] if classes > 24 else counts[counts > 0].tolist())
