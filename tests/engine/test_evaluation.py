"""Evaluation of fake networks whose result is known, and of runs that the trainer has made."""

import csv
import io
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vision_gates.engine.evaluation import evaluate_model, evaluate_run, evaluation_table, write_evaluation
from vision_gates.engine.overlays import MAX_SIDE, UNSCORED, read_overlays
from vision_gates.engine.run_directory import read_metrics
from vision_gates.engine.trainer import train
from vision_gates.errors import UserError
from vision_gates.losses import SegmentationLoss
from vision_gates.metrics import ClassificationMetrics, SegmentationMetrics


class Scans(Dataset):
    """Image i holds its answer in its pixels: class 1 where it is above 0.5. In the truth i rows of class 1 are gone,
    so image 0 is predicted perfectly and the last one worst."""

    def __init__(self, count: int = 10, side: int = 12) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        image = torch.zeros(1, self.side, self.side)
        image[:, :, : self.side // 2] = 1.0
        target = (image[0] > 0.5).long()
        target[:i] = 0
        return {"image": image, "target": target, "name": f"scan_{i}", "index": i}


class Threshold(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - x, x - 0.5], dim=1)


def _evaluate(data: Dataset, *, batch_size: int = 3, **arguments):
    metrics = SegmentationMetrics(("background", "lesion"))
    return evaluate_model(Threshold(), DataLoader(data, batch_size=batch_size), metrics, device="cpu", **arguments)


def test_result_rows_and_loss():
    loss = SegmentationLoss(num_classes=2)
    done = _evaluate(Scans(), loss=loss)
    # Image i: 12 - i of 12 rows are right: Dice = 2 (12 - i) / (24 - i).
    expected = [2 * (12 - i) / (24 - i) for i in range(10)]
    assert [row["dice"] for row in done.rows] == pytest.approx(expected)
    assert done.result.metrics["dice"] == pytest.approx(np.mean(expected))
    assert done.result.images == 10 and done.task == "segmentation" and done.seconds > 0
    # The mean over images, not over batches: the last batch is smaller.
    batches = list(DataLoader(Scans(), batch_size=3))
    values = [float(loss(Threshold()(b["image"]), b["target"])) * len(b["target"]) for b in batches]
    assert done.loss == pytest.approx(sum(values) / 10, rel=1e-6)
    assert _evaluate(Scans()).loss is None


def test_mode_gradient_and_autocast():
    class Probe(Threshold):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    @contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    seen: list[tuple[bool, bool, bool]] = []
    loader, metrics = DataLoader(Scans(4), batch_size=2), SegmentationMetrics(("background", "lesion"))
    probe = Probe().train()
    evaluate_model(probe, loader, metrics, device="cpu", autocast=autocast)
    assert seen == [(False, False, True)] * 2
    assert probe.training, "the mode must be as before"
    frozen = Threshold().eval()
    evaluate_model(frozen, loader, SegmentationMetrics(("background", "lesion")), device="cpu")
    assert not frozen.training


def test_what_a_model_caches_while_evaluated_can_be_trained_with():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.cache = nn.Parameter(torch.ones(())), None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones_like(x[:1])
            x = x * self.scale * self.cache  # the gradient of scale needs the cached tensor
            return torch.cat([0.5 - x, x - 0.5], dim=1)

    model, loader = Caching(), DataLoader(Scans(2), batch_size=2)
    evaluate_model(model, loader, SegmentationMetrics(("background", "lesion")), device="cpu")
    model(next(iter(loader))["image"]).sum().backward()
    assert model.scale.grad is not None


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_overlays_are_evenly_spaced_and_the_worst_whatever_the_batches(batch_size):
    done = _evaluate(Scans(), batch_size=batch_size, collect=5)
    chosen = [(o["index"], o["worst"]) for o in done.overlays]
    # Evenly spaced: 0, 4 (or 5), 9; the worst two: 9, 8. Image 9 is both and comes with the worst.
    assert chosen == [(0, False), (4, False), (9, True), (8, True)]
    worst = done.overlays[2]
    assert worst["name"] == "scan_9" and worst["score"] == pytest.approx(2 * 3 / 15)
    assert worst["image"].shape == (12, 12) and worst["image"].min() == 0.0 and worst["image"].max() == 1.0
    np.testing.assert_array_equal(worst["prediction"][:, :6], 1)
    np.testing.assert_array_equal(worst["target"][:9], 0)


def test_a_perfect_or_empty_sample_is_never_among_the_worst():
    class Perfect(Scans):
        def __getitem__(self, i):
            sample = super().__getitem__(0) | {"name": str(i), "index": i}
            if i == 1:  # nothing to find, nothing found: no Dice
                sample |= {"image": torch.zeros(1, 12, 12), "target": torch.zeros(12, 12, dtype=torch.long)}
            return sample

    done = _evaluate(Perfect(4), collect=8)
    assert [(o["index"], o["worst"]) for o in done.overlays] == [(0, False), (1, False), (2, False), (3, False)]
    assert done.overlays[1]["score"] is None


def test_of_equally_bad_samples_the_first_are_shown():
    class Alike(Scans):
        def __getitem__(self, i):
            return super().__getitem__(3) | {"name": f"scan_{i}", "index": i}

    done = _evaluate(Alike(40), collect=6)
    assert [o["index"] for o in done.overlays if o["worst"]] == [0, 1, 2]


def test_of_a_small_split_at_most_a_quarter_is_worst():
    done = _evaluate(Scans(4), collect=12)
    assert [(o["index"], o["worst"]) for o in done.overlays] == [(0, False), (1, False), (2, False), (3, True)]


def test_confident_mistakes_come_first():
    class Labels(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):  # every second prediction is wrong, with growing confidence
            logits = torch.tensor([float(i), 0.0])
            return {"image": logits.view(2, 1, 1), "target": i % 2, "name": str(i), "index": i}

    metrics = ClassificationMetrics(("a", "b"))
    model = nn.Flatten()
    done = evaluate_model(model, DataLoader(Labels(), batch_size=4), metrics, device="cpu", collect=4)
    assert [(o["index"], o["worst"]) for o in done.overlays] == [(0, False), (5, True), (3, True)]
    assert done.overlays[1]["score"] == pytest.approx(1 / (1 + math.exp(-5)))
    assert (done.overlays[1]["target"], done.overlays[1]["prediction"]) == (1, 0)


def test_display_undoes_the_normalisation_and_thins_out_large_images():
    class Colour(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            image = torch.zeros(3, 500, 800)
            image[0, :, 400:], image[1, :, 400:], image[2, :, 400:] = 1.0, 0.5, 0.0
            target = torch.zeros(500, 800, dtype=torch.long)
            target[:100] = 255
            mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
            return {"image": (image - mean) / std, "target": target, "name": "x", "index": 0}

    class Background(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], dim=1)

    metrics = SegmentationMetrics(("background", "lesion"), ignore_index=255)
    done = evaluate_model(
        Background(), DataLoader(Colour()), metrics, device="cpu", collect=1, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)
    )
    (overlay,) = done.overlays
    assert max(overlay["image"].shape[:2]) <= MAX_SIDE and overlay["image"].shape[:2] == overlay["target"].shape
    np.testing.assert_allclose(overlay["image"][-1, -1], [1.0, 0.5, 0.0], atol=1e-5)
    assert overlay["target"][0, 0] == UNSCORED and overlay["target"][-1, -1] == 0


def test_several_processes_give_the_result_of_one(monkeypatch):
    """Two processes take turns; the second's share is padded with an image of the first."""
    whole = _evaluate(Scans(), collect=4, loss=SegmentationLoss(num_classes=2))
    shares: list = []

    def all_gather_object(out, mine):
        shares.append(mine)
        out[:] = shares if len(shares) == 2 else [mine, mine]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)

    class Share:
        def __init__(self, indices):
            self.dataset, self.indices = Scans(), indices

        def __iter__(self):
            for i in self.indices:
                yield torch.utils.data.default_collate([self.dataset[i]])

    for indices in ([1, 3, 5, 7, 9, 0], [0, 2, 4, 6, 8]):
        metrics = SegmentationMetrics(("background", "lesion"))
        merged = evaluate_model(Threshold(), Share(indices), metrics, device="cpu", collect=4)
    assert merged.result == whole.result and merged.rows == whole.rows
    assert [(o["index"], o["worst"]) for o in merged.overlays] == [(o["index"], o["worst"]) for o in whole.overlays]


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        _evaluate([])


# ---------------------------------------------------------------- files


def test_written_files(tmp_path):
    done = _evaluate(Scans(), collect=4)
    done.rows[3]["name"] = "no UTF-8: \udcff"
    path = write_evaluation(tmp_path / "brain", "test", done)
    assert path == tmp_path / "brain" / "evaluation" / "test.json"
    content = json.loads(path.read_text())
    assert (content["split"], content["task"], content["images"]) == ("test", "segmentation", 10)
    assert (content["run"], content["checkpoint"]) == ("brain", "best")
    assert content["class_names"] == ["background", "lesion"] and content["confusion"] is None
    assert content["metrics"]["dice"] == pytest.approx(done.result.metrics["dice"])
    assert content["per_class"][1]["n"] == 10 and "N is" in content["convention"]
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text(encoding="utf-8"))))
    assert [float(row["dice lesion"]) for row in rows] == [row["dice lesion"] for row in done.rows]
    assert rows[3]["name"] == "no UTF-8: \\udcff"
    overlays = read_overlays(path.parent / "test_overlays.npz")
    assert [(o["name"], o["worst"]) for o in overlays] == [(o["name"], o["worst"]) for o in done.overlays]
    assert overlays[0]["image"].dtype == np.uint8 and overlays[0]["image"].max() == 255
    np.testing.assert_array_equal(overlays[-1]["prediction"], done.overlays[-1]["prediction"])
    assert sorted(p.name for p in path.parent.iterdir()) == ["test.csv", "test.json", "test_overlays.npz"]
    # Without overlays those of before must not stay: they are of other weights.
    write_evaluation(tmp_path / "brain", "test", _evaluate(Scans()))
    assert sorted(p.name for p in path.parent.iterdir()) == ["test.csv", "test.json"]


def test_undefined_numbers_become_null(tmp_path):
    metrics = ClassificationMetrics(("a", "b"))
    data = [{"image": torch.zeros(1, 2), "target": torch.zeros(1).long(), "name": ["x"], "index": torch.tensor([0])}]
    path = write_evaluation(tmp_path, "val", evaluate_model(nn.Identity(), data, metrics, device="cpu"))
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["metrics"]["auc"] is None and "AUC is undefined" in content["notes"][1]
    assert "-" in _shown(evaluation_table(path))


def _shown(table) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_table_says_how_misses_count_and_shows_names_as_they_are(tmp_path):
    metrics = SegmentationMetrics(("background", "[red]lesion[/red]"))
    done = evaluate_model(Threshold(), DataLoader(Scans(), batch_size=5), metrics, device="cpu")
    text = _shown(evaluation_table(done))
    assert "[red]lesion[/red]" in text and f"{done.result.per_class[1]['dice']:.4f}" in text
    assert " ".join(done.result.convention.split()) in " ".join(text.split())
    path = write_evaluation(tmp_path, "test", done)
    assert _shown(evaluation_table(path)).split() == ["test,", *text.split()]


# ---------------------------------------------------------------- finished runs


@pytest.fixture(scope="module", params=["classification", "segmentation"])
def run(request, build_config, quiet, tmp_path_factory) -> Path:
    config = build_config(tmp_path_factory.mktemp(request.param) / "run", "schedule.epochs=1", task=request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as conftest.py does for each test; this fixture is set up before them
    try:
        return train(config, console=quiet)
    finally:
        torch.set_num_threads(threads)


def test_evaluate_run_repeats_what_the_trainer_found(run):
    before = json.loads((run / "evaluation" / "test.json").read_text())
    done = evaluate_run(run)
    assert (done.split, done.path, done.report) == ("test", run / "evaluation" / "test.json", run / "report.html")
    after = json.loads(done.path.read_text())
    for content in (before, after):
        content.pop("seconds"), content.pop("loss")
    assert after == before
    # The only epoch is the best one, so the validation metrics are those of its row.
    (row,) = read_metrics(run / "metrics.jsonl")
    done = evaluate_run(str(run), split="val", overrides=["data.batch_size=2"])
    assert done.result.metrics == pytest.approx({key: row["val"][key] for key in done.result.metrics}, abs=1e-6)
    page = (run / "report.html").read_text()
    assert "Test images" in page and "Val images" in page
    assert len(evaluate_run(run, split="train").rows) == {"classification": 24, "segmentation": 12}[done.task]


def _error(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        evaluate_run(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_mistakes_are_told_in_one_line(run, tmp_path):
    assert "did you mean val?" in _error(run, split="vall")
    missing = _error(run.with_name("rum"))
    assert "no such folder" in missing and f"did you mean {run}?" in missing
    (tmp_path / "empty").mkdir()
    assert "it has no config.yaml" in _error(tmp_path / "empty")
    assert "optim" in _error(run, overrides=["optim.lrr=1"])
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints", "evaluation"))
    assert "no such checkpoint" in _error(bare)
    assert f"runs: {bare}" in _error(tmp_path / "empty")
    assert not (bare / "evaluation").exists(), "nothing may be written before the run is known to be complete"
    other = "model.name=test_resnet" if "classification" in str(run) else "model.decoder.channels=4"
    assert "does not fit model.name" in _error(run, overrides=[other])


def test_data_of_other_classes_or_without_the_split(run, images, scans, tmp_path):
    classes = "classification" in str(run)
    other = tmp_path / "data"
    shutil.copytree(images if classes else scans, other)
    shutil.rmtree(other / "test")
    assert "split=test" in _error(run, overrides=[f"data.root={other}"])
    if classes:
        for part in ("train", "val"):
            (other / part / "light").rename(other / part / "bright")
        message = _error(run, split="val", overrides=[f"data.root={other}"])
        assert "bright" in message and "dark, light" in message
    else:
        message = _error(run, split="val", overrides=["data.num_classes=3"])
        assert "trained on" in message
