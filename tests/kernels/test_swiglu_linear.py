"""swiglu_linear: the reference against the equations, the kernels against the reference, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.gates import SwiGLU
from vision_gates.kernels import swiglu_linear as operator
from vision_gates.kernels.swiglu_linear import bench, swiglu_linear
from vision_gates.kernels.swiglu_linear.reference import swiglu_linear_reference

NAMES = ("h", "dx", "dweight")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
IN_INTERPRETER = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, in test_kernels_in_the_interpreter"),
]
either_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_GPU), pytest.param("cpu", marks=IN_INTERPRETER)]
)

# (M, C, D): one row; nothing a multiple of anything; several tiles each way; sums with and without a remainder.
SMALL_SHAPES = [(1, 16, 16), (5, 7, 3), (131, 40, 72), (70, 64, 96)]
MODEL_SHAPES = [(1, 192, 512), (25088, 192, 512), (5000, 384, 1024), (5000, 768, 2048), (5000, 96, 256)]
ODD_SHAPES = [(777, 128, 352), (300, 1024, 2752), (301, 100, 33), (64, 769, 512), (200, 24, 130)]


def make(shape=(9, 24, 20), *, device="cpu", dtype=torch.float32, seed=0):
    """[x, weight] and an upstream gradient: products of size one, as in a trained network."""
    M, C, D = shape
    rng = torch.Generator().manual_seed(seed)
    x, weight, dh = (torch.randn(size, generator=rng) for size in ((M, C), (2 * D, C), (M, D)))
    return [x.to(device, dtype), (weight * C**-0.5).to(device, dtype)], dh.to(device, dtype)


def run(function, tensors, dh, **kwargs):
    """The output and the two gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    h = function(*leaves, **kwargs)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(h.dtype))]


def exact(tensors, dh):
    return run(swiglu_linear_reference, [x.double() for x in tensors], dh.double())


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def assert_as_good_as_reference(got, tensors, dh):
    """Each error is at most twice that of plain PyTorch in the same dtype, plus 1e-6."""
    wanted = exact(tensors, dh)
    for name, a, b, c in zip(NAMES, got, run(swiglu_linear_reference, tensors, dh), wanted, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, PyTorch {error(b, c):.2e}"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing was written to holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 16, result.stdout


def test_reference_equation():
    (x, weight), _ = make(dtype=torch.float64)
    a, b = x @ weight[:20].T, x @ weight[20:].T
    torch.testing.assert_close(swiglu_linear_reference(x, weight), a * torch.sigmoid(a) * b)


def test_reference_gradients():
    (x, weight), _ = make((2, 3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu_linear, (x.requires_grad_(), weight.requires_grad_()))


@either_device
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_small_shapes(shape, device, poisoned):
    tensors, dh = make(shape, device=device)
    assert_as_good_as_reference(run(swiglu_linear, tensors, dh, backend="triton"), tensors, dh)


@either_device
def test_half(device, poisoned):
    """float16: the interpreter multiplies the bits of bfloat16 matrices as integers."""
    tensors, dh = make((131, 72, 70), device=device, dtype=torch.float16)
    assert_as_good_as_reference(run(swiglu_linear, tensors, dh, backend="triton"), tensors, dh)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_model_shapes(shape, dtype, device, poisoned):
    tensors, dh = make(shape, device=device, dtype=dtype)
    assert_as_good_as_reference(run(swiglu_linear, tensors, dh), tensors, dh)


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, dh = make(device=device)
    for i, name in enumerate(NAMES):
        got = run(swiglu_linear, tensors, dh, backend="triton")
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, dh)


@either_device
def test_strides_do_not_matter(device):
    (x, weight), dh = make((12, 24, 20), device=device)
    wanted = run(swiglu_linear, [x, weight], dh, backend="triton")
    slices = [F.pad(tensor, (3, 5))[:, 3:-5] for tensor in (x, weight, dh)]
    transposed = [tensor.T.contiguous().T for tensor in (x, weight, dh)]
    for x_strided, weight_strided, dh_strided in (slices, transposed):
        got = run(swiglu_linear, [x_strided, weight_strided], dh_strided, backend="triton")
        assert torch.equal(got[0], wanted[0])
        for gradient, like in zip(got[1:], wanted[1:], strict=True):  # cuBLAS may sum in another order
            torch.testing.assert_close(gradient, like)


@either_device
def test_leading_axes_and_expanded_tensors(device):
    (x, weight), _ = make((6, 24, 20), device=device)
    leaves = [x.view(2, 1, 3, 24).requires_grad_(), weight.requires_grad_()]
    h = swiglu_linear(leaves[0].expand(-1, 4, -1, -1), leaves[1], backend="triton")
    assert h.shape == (2, 4, 3, 20)
    h.sum().backward()  # sends an expanded gradient
    got = [h.detach()[:, 0].reshape(6, 20), leaves[0].grad.view(6, 24) / 4, leaves[1].grad / 4]
    assert_as_good_as_reference(got, [x.detach(), weight.detach()], torch.ones(6, 20, device=device))


@either_device
def test_one_vector_and_no_rows(device):
    (x, weight), dh = make((1, 24, 20), device=device)
    h, dx, _ = run(swiglu_linear, [x[0], weight], dh[0], backend="triton")
    assert (h.shape, dx.shape) == ((20,), (24,))
    torch.testing.assert_close(h, swiglu_linear_reference(x[0], weight))
    h, dx, dweight = run(swiglu_linear, [x[:0], weight], dh[:0], backend="triton")
    assert (h.shape, dx.shape) == ((0, 20), (0, 24)) and not dweight.any()


@either_device
def test_only_one_needs_a_gradient(device):
    tensors, dh = make(device=device)
    wanted = run(swiglu_linear, tensors, dh, backend="triton")
    for i in range(2):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        h = swiglu_linear(*leaves, backend="triton")
        assert torch.equal(torch.autograd.grad(h, leaves[i], dh)[0], wanted[1 + i])
    with torch.no_grad():
        h = swiglu_linear(*leaves, backend="triton")
    assert h.grad_fn is None and torch.equal(h, wanted[0])


@either_device
def test_extreme_gates_stay_finite(device):
    x = torch.tensor([[1e4], [-1e4], [0.0]], device=device)
    weight = torch.ones(2, 1, device=device)
    h, dx, _ = run(swiglu_linear, [x, weight], torch.ones(3, 1, device=device), backend="triton")
    torch.testing.assert_close(h.flatten().cpu(), torch.tensor([1e8, 0.0, 0.0]))
    torch.testing.assert_close(dx.flatten().cpu(), torch.tensor([2e4, 0.0, 0.0]))


@either_device
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_autocast(x_dtype, device):
    (x, weight), dh = make((70, 64, 96), device=device)
    x = x.to(x_dtype)

    def under_autocast(x, weight, backend):
        with torch.autocast(device, torch.float16):
            return swiglu_linear(x, weight, backend=backend)

    got = run(under_autocast, [x, weight], dh, backend="triton")
    plain = run(under_autocast, [x, weight], dh, backend="reference")
    assert got[0].dtype == torch.float16
    for name, a, b, c in zip(NAMES, got, plain, exact([x, weight], dh), strict=True):
        assert a.dtype == b.dtype and error(a, c) <= 2 * error(b, c) + 1e-6, name


@either_device
def test_opcheck(device):
    tensors, _ = make((3, 4, 5), device=device)
    from vision_gates.kernels.swiglu_linear.kernel import _backward_operator, _operator

    torch.library.opcheck(_operator, tuple(x.requires_grad_() for x in tensors))
    torch.library.opcheck(_backward_operator, (torch.randn(3, 5, device=device), *(x.detach() for x in tensors)))


@either_device
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast, device):
    tensors, dh = make((6, 24, 20), device=device)

    def function(x, weight):
        with torch.autocast(device, torch.float16, enabled=autocast):
            return swiglu_linear(x, weight, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for a, b in zip(run(compiled, tensors, dh), run(function, tensors, dh), strict=True):
        assert torch.equal(a, b)


def test_compiled_reference():
    tensors, dh = make()
    compiled = torch.compile(swiglu_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, dh), run(swiglu_linear, tensors, dh), strict=True):
        torch.testing.assert_close(a, b)


def test_export_has_plain_operators_only():
    layer = SwiGLU(24, hidden_dim=20)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(4, 24),), dynamic_shapes=({0: batch},))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 24)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_repeatable(device):
    tensors, dh = make((5000, 384, 1024), device=device, dtype=torch.bfloat16)
    first, second = (run(swiglu_linear, tensors, dh) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_cuda_graph(device):
    tensors, dh = make((300, 192, 512), device=device, dtype=torch.bfloat16)
    run(swiglu_linear, tensors, dh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(swiglu_linear, tensors, dh)
    tensors[0].mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(swiglu_linear, tensors, dh), strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_tf32_is_used_only_when_allowed(device, monkeypatch):
    tensors, dh = make((300, 192, 512), device=device)
    wanted = exact(tensors, dh)[0]
    assert error(swiglu_linear(*tensors), wanted) < 2e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert 5e-5 < error(swiglu_linear(*tensors), wanted) < 2e-3


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_more_than_two_to_the_31_elements(device):
    M, C, D = 2**22 + 77, 16, 512
    (x, weight), dh = make((M, C, D), device=device, dtype=torch.bfloat16)
    h, dx, _ = run(swiglu_linear, [x, weight], dh)
    assert h.numel() > 2**31
    wanted = exact([x[-100:], weight], dh[-100:])
    assert error(h[-100:], wanted[0]) < 0.01 and error(dx[-100:], wanted[1]) < 0.01


def test_swiglu_reads_its_projection():
    layer = SwiGLU(24, hidden_dim=20)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "in_proj.weight": (40, 24),
        "out_proj.weight": (24, 20),
    }
    x = torch.randn(2, 3, 24)
    gate, value = layer.in_proj(x).chunk(2, dim=-1)
    assert torch.equal(layer(x), layer.out_proj(F.silu(gate) * value))


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _doubled_by_forward(layer):
    forward = layer.in_proj.forward
    layer.in_proj.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize(
    "double",
    [
        lambda layer: setattr(layer, "in_proj", _Doubled(24, 40, bias=False)),
        lambda layer: setattr(layer, "in_proj", nn.Sequential(nn.Linear(24, 40), nn.Hardtanh())),
        lambda layer: setattr(layer, "in_proj", nn.Linear(24, 40)),
        lambda layer: layer.in_proj.register_forward_hook(lambda module, args, output: 2 * output),
        lambda layer: layer.in_proj.register_forward_pre_hook(lambda module, args: 2 * args[0]),
        _doubled_by_forward,
    ],
    ids=["subclass", "sequence", "bias", "hook", "pre_hook", "forward"],
)
def test_swiglu_calls_a_projection_that_is_more_than_linear(double):
    layer, x = SwiGLU(24, hidden_dim=20), torch.randn(3, 24)
    double(layer)
    gate, value = layer.in_proj(x).chunk(2, dim=-1)
    assert torch.equal(layer(x), layer.out_proj(F.silu(gate) * value))
    if isinstance(layer.in_proj, nn.Linear):
        assert not torch.equal(gate, F.linear(x, layer.in_proj.weight[:20]))  # else reading the weight would do


def test_swiglu_with_backward_hook():
    layer, seen = SwiGLU(24, hidden_dim=20), []
    layer.in_proj.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    layer(torch.randn(3, 24, requires_grad=True)).sum().backward()
    assert seen == [(3, 40)]


def test_swiglu_compiles_to_one_graph():
    layer, x = SwiGLU(24, hidden_dim=20), torch.randn(3, 24)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"),
    [
        ("x", None, TypeError, "x must be a tensor, got NoneType"),
        ("weight", [1.0], TypeError, "weight must be a tensor, got list"),
        ("x", torch.zeros(3, 24, dtype=torch.int64), TypeError, "x must be float64, .* got torch.int64"),
        ("weight", torch.zeros(40, 24).half(), TypeError, "weight must be torch.float32 like x, got torch.float16"),
        ("x", torch.zeros(()), ValueError, r"x must have shape \(..., C\) with C at least 1, got \(\)"),
        ("x", torch.zeros(3, 0), ValueError, r"x must have shape \(..., C\) with C at least 1, got \(3, 0\)"),
        ("x", torch.zeros(3, 25), ValueError, r"weight must have as many columns .*, 25, got \(40, 24\)"),
        ("weight", torch.zeros(41, 24), ValueError, r"weight must have shape \(2 \* D, C\) .*, got \(41, 24\)"),
        ("weight", torch.zeros(24), ValueError, r"weight must have shape \(2 \* D, C\) .*, got \(24,\)"),
        ("weight", torch.zeros(40, 24, device="meta"), ValueError, "weight must be on x's device cpu, got meta"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_arguments(name, value, exception, message):
    (x, weight), _ = make()
    with pytest.raises(exception, match=message):
        swiglu_linear(**(dict(x=x, weight=weight) | {name: value}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_backends(monkeypatch):
    (x, weight), _ = make()
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, got one on cpu: .* TRITON_INTERPRET=1"):
        swiglu_linear(x, weight, backend="triton")
    with pytest.raises(TypeError, match="no float64"):
        swiglu_linear(x.double(), weight.double(), backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        swiglu_linear(x, weight, backend="triton")
    assert swiglu_linear(x.to("meta"), weight.to("meta")).shape == (9, 20)


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(20, 8, 16)], min_seconds=0.01)
    assert [(row["op"], row["backend"]) for row in rows] == [("swiglu_linear", "reference"), ("linear", "torch")]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["tflops_forward"]
        assert {"shape", "dtype", "device", "torch", "triton", "commit"} <= row.keys()
    assert rows[0]["worst_error"] < 1e-6
    function, inputs, upstream = bench.example(torch.device("cpu"))
    assert function(*inputs).shape == upstream.shape


def test_bench_refuses_a_fault(monkeypatch):
    monkeypatch.setattr(operator, "swiglu_linear_reference", lambda x, w: 1.001 * swiglu_linear_reference(x, w))
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(20, 8, 16)], min_seconds=0.01)
