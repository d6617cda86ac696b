"""Learning rate, parameter groups, mixing."""

import math

import numpy as np
import pytest
import timm
import torch

from vision_gates.engine.optim import build_mixup, build_optimizer, build_schedule, is_better, mix
from vision_gates.errors import ConfigError


def test_schedule_is_linear_then_cosine(make_config):
    config = make_config(
        "optim.lr=0.1",
        "schedule.epochs=10",
        "schedule.warmup_epochs=2",
        "schedule.min_lr=0.001",
        "schedule.warmup_lr=0",
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = build_schedule(config, optimizer, updates_per_epoch=5)
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 51):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [0.1 * u / 10 for u in range(10)]
    expected += [0.001 + 0.5 * 0.099 * (1 + math.cos(math.pi * u / 40)) for u in range(41)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_layer_decay_scales_by_depth(make_config):
    config = make_config("model.name=test_vit", "optim.layer_decay=0.5", "optim.lr=0.01")
    model = timm.create_model("test_vit", num_classes=2)
    optimizer = build_optimizer(config, model)
    build_schedule(config, optimizer, updates_per_epoch=3)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(model.head.weight)] == pytest.approx(0.01)
    blocks = [rate[id(block.attn.qkv.weight)] for block in model.blocks]
    assert all(later == pytest.approx(2 * earlier) for earlier, later in zip(blocks, blocks[1:], strict=False))
    assert rate[id(model.patch_embed.proj.weight)] == pytest.approx(blocks[0] / 2)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model.head.weight)] == 0.05 and decay[id(model.head.bias)] == 0.0


def test_optimizer_that_cannot_be_built(make_config):
    with pytest.raises(ConfigError, match="optim: bnbadam cannot be built: "):
        build_optimizer(make_config("optim.name=bnbadam"), torch.nn.Linear(2, 2))


def test_mix_is_a_function_of_its_seed(make_config):
    mixup = build_mixup(make_config("augment.mixup=0.5", "augment.cutmix=0.5"), 3)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    first = mix(mixup, images.clone(), labels, seed=1)
    assert np.array_equal(np.random.get_state()[1], state), "the global generator must be put back"
    np.random.seed(6)
    again = mix(mixup, images.clone(), labels, seed=1)
    other = mix(mixup, images.clone(), labels, seed=2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(4))


def test_is_better():
    nan = math.nan
    assert is_better(0.5, None, monitor="accuracy") and is_better(nan, None, monitor="accuracy")
    assert is_better(0.6, 0.5, monitor="dice") and not is_better(0.5, 0.5, monitor="dice")
    assert is_better(0.4, 0.5, monitor="loss") and not is_better(0.6, 0.5, monitor="loss")
    assert not is_better(nan, 0.1, monitor="auc") and is_better(0.1, nan, monitor="auc")
