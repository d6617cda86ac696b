"""A batch's computation as a CUDA graph: the same losses, gradients, batch statistics and runs as without."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vision_gates.engine.cuda_graph import GraphedStep
from vision_gates.engine.trainer import train
from vision_gates.errors import ConfigError

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def test_it_is_refused_where_it_cannot_be(build_config, tmp_path):
    with pytest.raises(ConfigError, match="trainer.cuda_graph=true: needs a GPU"):
        train(build_config(tmp_path / "run", "trainer.cuda_graph=true"))
    with pytest.raises(ConfigError, match="cannot go with optim.accumulate=2"):
        build_config(tmp_path / "run", "trainer.cuda_graph=true", "optim.accumulate=2")


@gpu
@needs_gpu
def test_replays_equal_plain_steps():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)).cuda()
    other = copy.deepcopy(plain)

    def step_of(model):
        def step(image, target):
            loss = nn.functional.cross_entropy(model(image), target)
            loss.backward()
            return loss.detach()

        return step

    graphed = GraphedStep(step_of(other), other)
    for _ in range(3):
        image, target = torch.randn(4, 2, 16, 16, device="cuda"), torch.randint(0, 3, (4, 14, 14), device="cuda")
        plain.zero_grad()
        torch.testing.assert_close(graphed(image, target), step_of(plain)(image, target))
        for mine, its in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(its.grad, mine.grad)
        for mine, its in zip(plain.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(its, mine)
    with pytest.raises(ValueError, match="the graph is of images"):
        graphed(image[:2], target[:2])


@gpu
@needs_gpu
def test_another_thread_may_pin_memory_during_the_capture():
    """As a loader's does, whose batches come when they come."""
    model = nn.Conv2d(2, 3, 1).cuda()

    def step(image, target):
        pinning = threading.Thread(target=lambda: torch.empty(3_000_017).pin_memory())
        pinning.start()
        pinning.join()
        loss = nn.functional.cross_entropy(model(image), target)
        loss.backward()
        return loss.detach()

    image, target = torch.randn(4, 2, 8, 8, device="cuda"), torch.randint(0, 3, (4, 8, 8), device="cuda")
    with torch.no_grad():  # a graph of autograd's on another stream would spoil the capture
        expected = nn.functional.cross_entropy(model(image), target)
    torch.testing.assert_close(GraphedStep(step, model)(image, target), expected)


@gpu
@needs_gpu
def test_a_graphed_run_ends_with_the_same_weights(build_config, tmp_path):
    runs = []
    for graph in ("false", "true"):
        config = build_config(
            tmp_path / graph, "trainer.device=auto", f"trainer.cuda_graph={graph}", task="segmentation"
        )
        runs.append(load_file(train(config) / "checkpoints" / "last" / "weights.safetensors"))
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
