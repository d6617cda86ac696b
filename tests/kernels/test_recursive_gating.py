"""recursive_gating: the chain of gnConv on the kernels of gated_depthwise, against plain PyTorch and gnConv itself."""

import os
import re
import subprocess
import sys

import pytest
import torch

from vision_gates.gates import GnConv
from vision_gates.kernels.gated_depthwise import recursive_gating
from vision_gates.kernels.gated_depthwise.reference import recursive_gating_reference

SCALE = 0.5
NAMES = ("y", "projected", "weight", "bias", "matrices", "offsets")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
IN_INTERPRETER = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, in test_kernels_in_the_interpreter"),
]
either_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_GPU), pytest.param("cpu", marks=IN_INTERPRETER)]
)
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])


def make(widths=(2, 4), size=(2, 4, 3), K=3, *, device="cpu", dtype=torch.float32, weight_dtype=None):
    """[projected, weight, bias, matrices, offsets] and a gradient of the result."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape, kind=dtype):
        return torch.randn(shape, generator=rng).to(device, kind)

    S, taps = sum(widths), weight_dtype or dtype
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    matrices = [draw(c, before) / before**0.5 for c, before in pairs]
    arguments = [draw(*size, widths[0] + S), draw(S, 1, K, K, kind=taps) / K, draw(S, kind=taps), matrices]
    return [*arguments, [draw(c) for c, _ in pairs]], draw(*size, widths[-1])


def run(function, arguments, dy, **kwargs):
    """The result and all gradients, those of a list joined."""
    leaves = [[y.detach().requires_grad_() for y in (x if isinstance(x, list) else [x])] for x in arguments]
    y = function(*(a[0] if not isinstance(x, list) else a for a, x in zip(leaves, arguments, strict=True)), **kwargs)
    flat = iter(torch.autograd.grad(y, [x for group in leaves for x in group], dy.to(y.dtype)))
    joined = [torch.cat([next(flat).flatten() for _ in group] or [y.new_zeros(1)]) for group in leaves]
    return [y.detach(), *joined]


def doubled(arguments):
    return [[y.double() for y in x] if isinstance(x, list) else x.double() for x in arguments]


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def assert_right(got, arguments, dy):
    """Errors at most twice those of plain PyTorch in the same dtype, plus 1e-6 and a rounding of few numbers."""
    exact = run(recursive_gating_reference, doubled(arguments), dy.double(), scale=SCALE)
    plain = run(recursive_gating_reference, arguments, dy, scale=SCALE)
    slack = 1e-6 + (torch.finfo(dy.dtype).eps / 2 if dy.dtype != torch.float32 else 0.0)
    for name, a, b, c in zip(NAMES, got, plain, exact, strict=True):
        assert error(a, c) <= 2 * error(b, c) + slack, f"{name}: {error(a, c):.2e}, PyTorch {error(b, c):.2e}"


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 6, result.stdout


@pytest.mark.parametrize("order", [1, 2, 4])
def test_reference_is_gnconv(order):
    conv = GnConv(8, order=order, kernel_size=3, scale=SCALE).double()
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    matrices, offsets = [m.weight for m in conv.widen], [m.bias for m in conv.widen]
    taps = conv.spatial_filter
    y = recursive_gating(conv.proj_in(x), taps.weight, taps.bias, matrices, offsets, scale=SCALE)
    torch.testing.assert_close(conv.proj_out(y), conv(x))


@either_device
@pytest.mark.parametrize("widths", [(3,), (2, 4), (1, 2, 4)])
def test_result_and_gradients(widths, device):
    arguments, dy = make(widths, device=device)
    assert_right(run(recursive_gating, arguments, dy, scale=SCALE, backend="triton"), arguments, dy)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "widths, size", [((32, 64, 128, 256), (8, 14, 14)), ((32, 64), (2, 56, 56)), ((5, 9), (3, 7, 9))]
)
def test_model_shapes(widths, size, dtype, device):
    arguments, dy = make(widths, size, 7, device=device, dtype=dtype)
    assert_right(run(recursive_gating, arguments, dy, scale=SCALE), arguments, dy)


@either_device
def test_autocast_and_compiled(device):
    arguments, dy = make(device=device)

    def function(projected, *others):
        return recursive_gating(2 * projected, *others, scale=SCALE, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.autocast(device, torch.bfloat16):
        results = [run(f, arguments, dy) for f in (function, compiled)]
    assert results[0][0].dtype == torch.bfloat16 and results[0][1].dtype == torch.float32
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@either_device
def test_opcheck(device):
    from vision_gates.kernels.gated_depthwise.recursion import _operator

    arguments, _ = make((1, 2), (1, 2, 2), device=device)
    torch.library.opcheck(_operator, (arguments[0].requires_grad_(), *arguments[1:], SCALE))


@either_device
def test_keeps_the_results_of_the_orders_only(device):
    arguments, _ = make((2, 4, 8), device=device)
    arguments[0].requires_grad_()
    y = recursive_gating(*arguments, scale=SCALE, backend="triton")
    given = {x.data_ptr() for x in (*arguments[:3], *arguments[3], *arguments[4])}
    kept = [x for x in y.grad_fn.saved_tensors if x.data_ptr() not in given]
    assert [x.shape[-1] for x in kept] == [2, 4]


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({0: torch.zeros(2, 4, 3, 9)}, ValueError, "9 channels for orders of"),
        ({0: torch.zeros(2, 4, 8)}, ValueError, r"x must have shape \(B, H, W, C\)"),
        ({3: [torch.zeros(4, 3)]}, ValueError, r"matrices\[0\] and offsets\[0\] must have the shapes \(4, 2\)"),
        ({4: [torch.zeros(4).double()]}, TypeError, r"offsets\[0\] must be torch.float32, got torch.float32"),
        ({1: torch.zeros(6, 1, 4, 4)}, ValueError, "an odd K"),
    ],
)
def test_bad_arguments(change, kind, message):
    arguments, _ = make()
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(kind, match=message):
        recursive_gating(*arguments)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_backends():
    arguments, _ = make()
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        recursive_gating(*arguments, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        recursive_gating(*arguments, backend="cuda")
