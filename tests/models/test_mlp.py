"""The MLP that keeps one wide result less: timm's values and gradients, and what it keeps."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp

from vision_gates.models._mlp import LeanMlp


def _saved_elements(function) -> int:
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_timms(scaled: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    lean, plain = LeanMlp(8, hidden_dim=32).double(), Mlp(8, hidden_features=32).double()
    plain.load_state_dict(lean.state_dict())
    scale = torch.rand(8, dtype=torch.float64, requires_grad=True) if scaled else None
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    run = torch.compile(lean, backend="aot_eager", fullgraph=True) if compiled else lean
    y, expected = run(x, scale), plain(x) if scale is None else scale * plain(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    inputs = [x, *([] if scale is None else [scale])]
    got = torch.autograd.grad(y, [*inputs, *lean.parameters()], dy)
    want = torch.autograd.grad(expected, [*inputs, *plain.parameters()], dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_differentiable(scaled: bool) -> None:
    torch.manual_seed(0)
    mlp = LeanMlp(3, hidden_dim=5).double()
    scale = torch.rand(3, dtype=torch.float64, requires_grad=True) if scaled else None
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *([] if scale is None else [scale]), *mlp.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: mlp(x, scale), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lean, plain = LeanMlp(8, hidden_dim=32), Mlp(8, hidden_features=32)
    plain.load_state_dict(lean.state_dict())
    scale, x = torch.rand(8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    gradients = []
    for run, parameters in (
        (lambda: lean(x, scale), lean.parameters()),
        (lambda: scale * plain(x), plain.parameters()),
    ):
        with torch.autocast("cpu", dtype):
            y = run()
        gradients.append(torch.autograd.grad(y.float().square().sum(), [x, scale, *parameters]))
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02)


def test_inference_changes_nothing_that_somebody_watches() -> None:
    lean = LeanMlp(8, hidden_dim=32).eval()
    x, seen = torch.randn(2, 8), []
    with torch.no_grad():
        expected = lean(x)
        lean.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(lean(x), expected)
        torch.testing.assert_close(seen[0], torch.nn.functional.linear(x, lean.fc1.weight, lean.fc1.bias))


def test_layers_in_the_linears_place_are_called() -> None:
    lean = LeanMlp(8, hidden_dim=32)
    x = torch.randn(2, 8)
    expected = lean(x)
    lean.fc2 = torch.nn.Sequential(lean.fc2)
    torch.testing.assert_close(lean(x), expected)


def test_training_keeps_the_wide_result_once() -> None:
    lean, plain = LeanMlp(8, hidden_dim=32), Mlp(8, hidden_features=32)
    x = torch.randn(64, 8, requires_grad=True)
    wide = 64 * 32
    assert _saved_elements(lambda: plain(x)) - _saved_elements(lambda: lean(x)) >= wide
    lean.eval()
    assert _saved_elements(lambda: lean(x)) == _saved_elements(lambda: plain(x))


@pytest.mark.parametrize(
    ("name", "depth"), [("vg_convit_atto", dict(depth=2, local_depth=1)), ("vg_hornet_atto", dict(depths=(1, 1, 2, 1)))]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_inside_a_checkpointed_block(name: str, depth: dict[str, Any], compiled: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **depth).double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        gradients.append(torch.autograd.grad(run(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients)
