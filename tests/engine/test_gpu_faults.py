"""What can only go wrong on a GPU, there: too little memory, and a loss that is NaN in a CUDA graph or in float16."""

import math

import pytest
import torch
from torch import nn

from vision_gates.engine.run_directory import read_metrics
from vision_gates.engine.trainer import Trainer, train
from vision_gates.errors import UserError
from vision_gates.volumes.inference import predict_labels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture
def little_memory():
    """``little_memory(megabytes)``: from then on PyTorch may use so much more than now."""

    def limit(megabytes):
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + megabytes * 1e6) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_in_training(make_config, quiet, little_memory):
    config = make_config("trainer.device=auto", "data.image_size=512", "data.batch_size=24", "trainer.resume=true")
    little_memory(100)
    with pytest.raises(UserError, match=r"run: out of memory \(CUDA out of memory. Tried .*\); lower data.batch_size"):
        train(config, console=quiet)
    little_memory(2000)
    run = train(make_config("trainer.device=auto", "data.image_size=512", "trainer.resume=true"), console=quiet)
    assert len(read_metrics(run / "metrics.jsonl")) == 2


def test_fewer_windows_where_memory_is_short(little_memory):
    torch.manual_seed(0)
    network, sizes = nn.Sequential(nn.Conv3d(1, 512, 1), nn.ReLU(), nn.Conv3d(512, 3, 1)).cuda(), []
    image = torch.randn(1, 64, 64, 64)  # a window's activations take 226 MB a layer

    def counted(x):
        sizes.append(len(x))
        return network(x)

    settings = dict(num_classes=3, patch_size=(48, 48, 48), spatial_dims=3, batch_size=8, device="cuda")
    expected = predict_labels(counted, image, **settings)
    assert max(sizes) == 8
    sizes.clear()
    little_memory(700)
    assert (predict_labels(counted, image, **settings) == expected).all()
    assert sizes[0] == 8 and min(sizes) < 4


@pytest.mark.parametrize(
    "changes",
    [("trainer.cuda_graph=true",), ("trainer.precision=fp16",), ("trainer.cuda_graph=true", "trainer.ema_decay=0.9")],
)
def test_a_skipped_update_changes_nothing(make_config, quiet, monkeypatch, changes):
    original, step, skip, seen = Trainer.forward_backward, Trainer.step_optimizer, Trainer.skip_update, []

    def state(self):
        return {key: value.clone() for key, value in self.network.state_dict().items()} | {
            f"ema {key}": value.clone() for key, value in (self.ema.module.state_dict() if self.ema else {}).items()
        }

    def poisoned(self, batch, **place):
        if self.state.update == 4:
            batch = batch | {"image": torch.full_like(batch["image"], math.nan)}
        return original(self, batch, **place)

    def stepping(self):
        step(self)
        seen.append(state(self))

    def skipping(self, update):
        skip(self, update)
        torch.testing.assert_close(state(self), seen[-1], rtol=0, atol=0)
        seen.append("skipped")

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    monkeypatch.setattr(Trainer, "step_optimizer", stepping)
    monkeypatch.setattr(Trainer, "skip_update", skipping)
    run = train(
        make_config("trainer.device=auto", "trainer.nan=skip", "model.name=test_resnet", *changes), console=quiet
    )
    assert seen[4] == "skipped" and len(seen) == 12
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert math.isfinite(last["train"]["loss"]) and math.isfinite(last["val"]["loss"])
