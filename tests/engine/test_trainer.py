"""Training runs of a second each: do they learn, and does every option do what its description says?"""

import json
import math
from functools import partialmethod
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from vision_gates.engine import resuming
from vision_gates.engine.building import RunInfo, _load_weights, build_model, load_run
from vision_gates.engine.data import derive_seed
from vision_gates.engine.evaluation import evaluate_run
from vision_gates.engine.run_directory import read_metrics
from vision_gates.engine.trainer import Trainer, train
from vision_gates.errors import ConfigError, UserError
from vision_gates.networks import create_network

PLAIN_SGD = ("optim.name=momentum", "optim.lr=0.05", "optim.momentum=0", "optim.weight_decay=0", "schedule.min_lr=0")


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / name / "weights.safetensors")


def initial(config) -> dict[str, torch.Tensor]:
    """The weights that a run starts from."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return build_model(config, RunInfo(("dark", "light"), 3, None, None, None, {}, {})).state_dict()


def test_classification_learns(make_config, quiet):
    config = make_config("schedule.epochs=4", "task.class_weights=balanced", "optim.layer_decay=0.9")
    run = train(config, command=["vision-gates", "train", "x.yaml"], console=quiet)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and [row["step"] for row in rows] == [6, 12, 18, 24]
    assert rows[-1]["train"]["loss"] < 0.5 * rows[0]["train"]["loss"]
    assert set(rows[-1]["val"]) == {"loss", "accuracy", "balanced_accuracy", "auc", "f1"}
    evaluation = json.loads((run / "evaluation" / "test.json").read_text())
    assert evaluation["metrics"]["accuracy"] == 1.0 and evaluation["images"] == 6

    expected = {"config.yaml", "run.json", "environment.json", "metrics.jsonl", "log.txt", "report.html"}
    assert expected | {"checkpoints", "evaluation", "tensorboard"} == {path.name for path in run.iterdir()}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last", "previous", "best"}
    state = torch.load(run / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert state["place"]["update"] == 24 and state["place"]["finished"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"][1] == "train" and environment["versions"]["torch"] and environment["device"] == "cpu"
    assert list((run / "tensorboard").iterdir())
    loaded, info = load_run(run)
    assert loaded == config
    assert info.class_names == ("dark", "light") and info.images == {"train": 24, "val": 6, "test": 6}
    assert info.class_weights == (1.0, 1.0) and len(info.mean) == 3


def test_segmentation_learns(make_config, quiet):
    config = make_config(
        "schedule.epochs=4", "optim.lr=5e-3", "augment.train=[{VerticalFlip: {}}]", task="segmentation"
    )
    run = train(config, console=quiet)
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["train"]["loss"] < 0.7 * rows[0]["train"]["loss"]
    assert set(rows[-1]["val"]) == {"loss", "dice", "iou", "accuracy", "dice_pooled"}
    assert json.loads((run / "evaluation" / "test.json").read_text())["metrics"]["dice"] > 0.5


AGUNET = ("model.name=agunet", "model.decoder=null", "model.options={widths: [4, 8, 8]}")


@pytest.mark.parametrize(
    "options",
    [
        ["optim.accumulate=2", "trainer.ema_decay=0.5"],
        ["task.deep_supervision_weights=[1, 1]", "trainer.compile=true", "schedule.epochs=2"],
    ],
    ids=["accumulated", "compiled"],
)
def test_a_network_with_deep_supervision_learns(make_config, quiet, monkeypatch, options):
    quick = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # no C++ compiler for a list of outputs
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    config = make_config("schedule.epochs=6", "optim.lr=2e-2", *AGUNET, *options, task="segmentation")
    run = train(config, console=quiet)
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["train"]["loss"] < (0.7 if len(rows) == 6 else 0.95) * rows[0]["train"]["loss"]
    assert set(rows[-1]["val"]) == {"loss", "dice", "iou", "accuracy", "dice_pooled"}
    assert rows[-1]["val"]["loss"] < 1.5
    assert any(key.startswith("heads.2.") for key in weights(run))
    trained = json.loads((run / "evaluation" / "test.json").read_text())["metrics"]
    assert evaluate_run(run).result.metrics == pytest.approx(trained)


def test_weights_of_a_volume_network_are_one_line(make_config, tmp_path):
    info = RunInfo(("a", "b"), 3, None, None, None, {}, {})
    deep = create_network("agunet", in_channels=3, num_classes=2, spatial_dims=3, widths=(4, 8, 8))
    torch.save(deep.state_dict(), tmp_path / "deep.pth")
    config = make_config(*AGUNET, f"model.checkpoint={tmp_path / 'deep.pth'}", task="segmentation")
    with pytest.raises(
        ConfigError, match="model.checkpoint: .*deep.pth: weights of a 3-D network .* spatial_dims=3"
    ) as e:
        build_model(config, info)
    assert "\n" not in str(e.value)
    flat = create_network("agunet", in_channels=3, num_classes=5, widths=(4, 8, 8))  # classes may be others
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    built = build_model(make_config(*AGUNET, f"model.checkpoint={tmp_path / 'flat.pth'}", task="segmentation"), info)
    assert torch.equal(built.state_dict()["up.1.0.weight"], flat.state_dict()["up.1.0.weight"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*AGUNET, "task.deep_supervision_weights=[1, 1, 1]"], "_weights: 3 numbers for a network with 2 outputs in"),
        (["task.deep_supervision_weights=[1, 1]"], "_weights: 2 numbers for a network with 1 output in"),
        ([*AGUNET, "optim.layer_decay=0.9"], "optim.layer_decay: agunet does not say how its layers follow"),
        (
            [*AGUNET, "model.options={widths: [4, 8], spatial_dims: 3}"],
            "model.name=agunet: fails on .* must have 5 axes",
        ),
    ],
)
def test_mistakes_with_whole_networks_leave_nothing_behind(make_config, quiet, overrides, message):
    config = make_config(*overrides, task="segmentation")
    with pytest.raises(ConfigError, match=message) as error:
        train(config, console=quiet)
    assert "\n" not in str(error.value)
    assert not Path(config.trainer.run_dir).exists()


def test_same_seed_same_run_other_seed_other_run(make_config, quiet):
    runs = [
        train(make_config("schedule.epochs=1", f"seed={seed}", run=name), console=quiet)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = map(weights, runs)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_accumulated_halves_equal_the_whole(make_config, quiet):
    whole = train(make_config(*PLAIN_SGD, "data.batch_size=8", run="whole"), console=quiet)
    halves = train(make_config(*PLAIN_SGD, "data.batch_size=4", "optim.accumulate=2", run="halves"), console=quiet)
    one, other = weights(whole), weights(halves)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)
    assert [r["step"] for r in read_metrics(whole / "metrics.jsonl")] == [3, 6]
    assert [r["step"] for r in read_metrics(halves / "metrics.jsonl")] == [3, 6]


def test_incomplete_group_of_batches_is_averaged(make_config, quiet):
    """6 batches in groups of 4: the last update averages 2, not 2 of 4."""
    run = train(make_config(*PLAIN_SGD, "optim.accumulate=4", "schedule.epochs=1"), console=quiet)
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 2


def test_gradient_is_clipped(make_config, quiet):
    """One update of plain SGD moves the weights by learning rate x clipped norm."""
    config = make_config(*PLAIN_SGD, "optim.clip_grad=0.01", "optim.lr=1.0", "data.batch_size=24", "schedule.epochs=1")
    before, after = initial(config), weights(train(config, console=quiet))
    moved = math.sqrt(sum(float((after[key] - before[key]).double().square().sum()) for key in after))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_moving_average(make_config, quiet, monkeypatch):
    """weights.safetensors holds the average, state.pt the weights that are trained on."""
    history = []
    original = Trainer.step_optimizer

    def step(self):
        original(self)
        history.append({key: value.clone() for key, value in self.network.state_dict().items()})

    monkeypatch.setattr(Trainer, "step_optimizer", step)
    config = make_config("trainer.ema_decay=0.7", "schedule.epochs=1")
    expected = initial(config)
    run = train(config, console=quiet)
    for update, current in enumerate(history, start=1):
        # timm's warm-up of the decay: 0 at the first update, then at most 1 - update^(-2/3).
        decay = min(0.7, 1 - update ** (-2 / 3)) if update > 1 else 0.0
        expected = {key: decay * value + (1 - decay) * current[key] for key, value in expected.items()}
    for key, value in weights(run).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    state = torch.load(run / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert all(torch.equal(state["tensors"][f"network/{key}"], history[-1][key]) for key in history[-1])


def scripted(monkeypatch, accuracies: list[float]) -> list[dict[str, torch.Tensor]]:
    """Make validation report these accuracies; returns the list that collects the weights of each epoch."""
    collected: list[dict[str, torch.Tensor]] = []
    original = Trainer.evaluate

    def evaluate(self, split, **options):
        evaluation = original(self, split, **options)
        if split == "val":
            evaluation.result.metrics["accuracy"] = accuracies[len(collected)]
            collected.append({key: value.clone() for key, value in self.network.state_dict().items()})
        return evaluation

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return collected


def test_best_checkpoint_is_the_best_epochs(make_config, quiet, monkeypatch):
    collected = scripted(monkeypatch, [math.nan, 0.5, 0.9, 0.9, 0.7])
    run = train(make_config("schedule.epochs=5"), console=quiet)
    best = weights(run, "best")
    matches = [all(torch.equal(best[key], epoch[key]) for key in best) for epoch in collected]
    assert matches == [False, False, True, False, False]
    manifest = json.loads((run / "checkpoints" / "best" / "manifest.json").read_text())
    assert manifest["accuracy"] == 0.9
    assert read_metrics(run / "metrics.jsonl")[0]["val"]["accuracy"] is None


def test_early_stop_counts_evaluations(make_config, quiet, monkeypatch):
    scripted(monkeypatch, [0.5, 0.6, 0.6, 0.1, 0.9])
    run = train(make_config("schedule.epochs=30", "trainer.patience=2", "trainer.eval_every=2"), console=quiet)
    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) == 8 and [row["val"] is None for row in rows] == [True, False] * 4
    assert "early stop" in (run / "log.txt").read_text()


def test_last_epoch_is_always_evaluated(make_config, quiet):
    run = train(make_config("schedule.epochs=3", "trainer.eval_every=2"), console=quiet)
    assert [row["val"] is None for row in read_metrics(run / "metrics.jsonl")] == [True, False, False]


def test_loss_that_is_not_a_number(make_config, quiet):
    config = make_config(*PLAIN_SGD, "optim.lr=1e30", "trainer.checkpoint_steps=1")
    with pytest.raises(UserError) as error:
        train(config, console=quiet)
    message = str(error.value)
    assert "epoch 1, update 2" in message and "optim.clip_grad" in message and "\n" not in message
    assert any(f"{name}0" in message or f"{name}1" in message for name in ("dark", "light"))
    run = Path(config.trainer.run_dir)
    assert json.loads((run / "checkpoints" / "last" / "manifest.json").read_text())["step"] == 1


def test_bfloat16_on_the_cpu(make_config, quiet):
    run = train(make_config("trainer.precision=bf16", "schedule.epochs=1"), console=quiet)
    assert all(value.dtype == torch.float32 for value in weights(run).values())
    plain = train(make_config("schedule.epochs=1", run="plain"), console=quiet)
    one, other = weights(run), weights(plain)
    assert any(not torch.equal(one[key], other[key]) for key in one), "it was computed in float32"


def test_half_precision_needs_a_gpu(make_config, quiet):
    config = make_config("trainer.precision=fp16")
    with pytest.raises(ConfigError, match="trainer.precision=fp16: needs a GPU"):
        train(config, console=quiet)
    assert not Path(config.trainer.run_dir).exists()


def test_start_from_weights_in_another_layout(tmp_path):
    """ViG's mixer joins projections that official checkpoints hold apart, when it loads them."""
    source, target = (timm.create_model("vg_vig_atto", depth=1, num_classes=2) for _ in range(2))
    apart = {}
    for key, value in source.state_dict().items():
        if key.endswith("mixer.in_proj.weight"):
            names, sizes = ("qkv", "gate", "decay_down"), (192, 96, 16)
            for name, part in zip(names, value.split(sizes), strict=True):
                apart[key.replace("in_proj", name)] = part.clone()
        else:
            apart[key.replace("gate_bias", "gate.bias")] = value
    torch.save(apart, tmp_path / "apart.pth")
    _load_weights(target, str(tmp_path / "apart.pth"))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_start_from_a_checkpoint(make_config, quiet, monkeypatch):
    """The weights of a run, by its directory; other classes keep their own head; another network is an error."""
    first = train(make_config("schedule.epochs=1", run="first"), console=quiet)
    config = make_config(f"model.checkpoint={first}", run="second")
    info = RunInfo(("dark", "light"), 3, None, None, None, {}, {})
    best = weights(first, "best")
    built = build_model(config, info).state_dict()
    assert all(torch.equal(built[key], best[key]) for key in best)
    three = build_model(config, RunInfo(("a", "b", "c"), 3, None, None, None, {}, {})).state_dict()
    assert three["head.fc.weight"].shape[0] == 3
    assert all(torch.equal(three[key], best[key]) for key in best if not key.startswith("head.fc"))
    with pytest.raises(ConfigError, match="model.checkpoint: .* tensors are missing or of another shape"):
        build_model(make_config(f"model.checkpoint={first}", "model.name=test_resnet"), info)
    with pytest.raises(ConfigError, match="model.checkpoint: nowhere.pt: no such weights file"):
        build_model(make_config("model.checkpoint=nowhere.pt"), info)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.options={nonsense: 3}"], "model: test_convnext cannot be built with options .*nonsense"),
        (["model.name=deit_tiny_patch16_224"], "fails on images of 32 x 32 with 3 channels: "),
        (["task.class_weights=[1, 2, 3]"], "task.class_weights: 3 numbers for 2 classes"),
        (["task={type: segmentation}", "model.name=test_convnext"], "task.type=segmentation: .* classification data"),
        (["data.root=/nowhere"], "/nowhere"),
        (["augment.train=[{RandomCrop: {height: 99, width: 99}}]"], "augment.train: fails on "),
    ],
)
def test_mistakes_leave_nothing_behind(make_config, quiet, overrides, message):
    config = make_config(*overrides)
    with pytest.raises(UserError, match=message) as error:
        train(config, console=quiet)
    assert "\n" not in str(error.value)
    assert not Path(config.trainer.run_dir).exists()


def test_checkpoints_by_time(make_config, quiet, monkeypatch):
    saved = []
    monkeypatch.setattr(resuming, "write_checkpoint", lambda root, name, **_: saved.append(name))
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train(make_config("trainer.checkpoint_minutes=1e-9", "schedule.epochs=1"), console=quiet)
    assert saved == ["last"] * 5 + ["best", "last"]
