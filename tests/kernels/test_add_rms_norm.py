"""add_rms_norm: the reference against the equations, the kernels against the reference, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vision_gates.kernels import add_rms_norm as operator
from vision_gates.kernels.add_rms_norm import add_rms_norm, bench
from vision_gates.kernels.add_rms_norm.reference import add_rms_norm_reference

NAMES = ("y", "s", "dx", "dresidual", "dweight")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
IN_INTERPRETER = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, in test_kernels_in_the_interpreter"),
]
either_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_GPU), pytest.param("cpu", marks=IN_INTERPRETER)]
)

# One row; one channel; several programs; a remainder of rows and of channels.
SMALL_SHAPES = [(1, 8), (3, 1), (70, 64), (37, 100)]
MODEL_SHAPES = [(25088, 192), (6000, 384), (6000, 768), (6000, 96), (6001, 1024), (1, 192)]
ODD_SHAPES = [(4097, 33), (301, 200), (77, 2048), (50, 8192), (100000, 3)]
DTYPES = {  # of x, residual, weight and out_dtype
    "float32": (torch.float32, torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    "float16": (torch.float16, torch.float16, torch.float16, None),
    "autocast": (torch.bfloat16, torch.float32, torch.float32, None),
    "half_result": (torch.float16, torch.float32, torch.float32, torch.float16),
    "half_stream": (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    "two_halves": (torch.bfloat16, torch.float16, torch.bfloat16, None),
    "plain": (torch.float32, None, torch.float32, None),
    "plain_bfloat16": (torch.bfloat16, None, torch.float32, torch.float32),
}


def make(shape=(9, 24), dtypes="float32", *, device="cpu", seed=0):
    """[x, residual or None, weight], keyword arguments, and gradients of y and s."""
    x_dtype, residual_dtype, weight_dtype, out_dtype = DTYPES[dtypes]
    rng = torch.Generator().manual_seed(seed)
    x, residual, dy, ds = (torch.randn(shape, generator=rng).to(device) for _ in range(4))
    weight = 1 + 0.1 * torch.randn(shape[-1], generator=rng).to(device)
    residual = None if residual_dtype is None else (3 * residual).to(residual_dtype)
    return [x.to(x_dtype), residual, weight.to(weight_dtype)], dict(out_dtype=out_dtype), (dy, ds)


def run(function, tensors, grads, **kwargs):
    """y, s and the gradients of the tensors that are there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y, s = function(*leaves, **kwargs)
    taken = [x for x in leaves if x is not None]
    grads = [grad.to(result.dtype) for grad, result in zip(grads, (y, s), strict=True)]
    return [y.detach(), s.detach(), *torch.autograd.grad((y, s), taken, grads)]


def exact(tensors, grads):
    return run(add_rms_norm_reference, [None if x is None else x.double() for x in tensors], grads)


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def names(tensors):
    return [name for name in NAMES if name != "dresidual" or tensors[1] is not None]


def assert_as_good_as_reference(got, tensors, grads, **kwargs):
    """Each error is at most twice that of plain PyTorch in the same dtypes, plus 1e-6."""
    plain, wanted = run(add_rms_norm_reference, tensors, grads, **kwargs), exact(tensors, grads)
    for name, a, b, c in zip(names(tensors), got, plain, wanted, strict=True):
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
    assert passed and int(passed[1]) >= 30, result.stdout


def test_reference_equation():
    (x, residual, weight), _, _ = make()
    y, s = add_rms_norm_reference(x.double(), residual.double(), weight.double(), eps=0.5)
    torch.testing.assert_close(s, x.double() + residual.double())
    torch.testing.assert_close(y, s / (s.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight.double())


@pytest.mark.parametrize("with_residual", [True, False])
def test_reference_gradients(with_residual):
    tensors = [x.double().requires_grad_() for x in make((3, 4))[0]]
    if not with_residual:
        tensors[1] = None
    assert torch.autograd.gradcheck(lambda *x: add_rms_norm(*x, eps=0.1), tensors)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_of_the_reference(dtypes):
    tensors, kwargs, grads = make(dtypes=dtypes)
    x, residual, weight = tensors
    y, s, *gradients = run(add_rms_norm, tensors, grads, **kwargs)
    assert s.dtype == (x if residual is None else x + residual).dtype
    assert y.dtype == (kwargs["out_dtype"] or s.dtype)
    assert [x.dtype for x in gradients] == [x.dtype for x in tensors if x is not None]
    torch.testing.assert_close(y, F.rms_norm(s.double(), (24,), weight.double(), 1e-6).to(y.dtype))


def test_reference_without_residual_returns_x():
    (x, _, weight), _, _ = make()
    assert add_rms_norm(x, None, weight)[1] is x


@either_device
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_small_shapes(shape, device, poisoned):
    tensors, _, grads = make(shape, device=device)
    assert_as_good_as_reference(run(add_rms_norm, tensors, grads, backend="triton"), tensors, grads)


@either_device
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, device, poisoned):
    tensors, kwargs, grads = make((70, 40), dtypes, device=device)
    got = run(add_rms_norm, tensors, grads, backend="triton", **kwargs)
    assert_as_good_as_reference(got, tensors, grads, **kwargs)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_model_shapes(shape, dtypes, device, poisoned):
    tensors, kwargs, grads = make(shape, dtypes, device=device)
    assert_as_good_as_reference(run(add_rms_norm, tensors, grads, **kwargs), tensors, grads, **kwargs)


@either_device
def test_several_turns_of_the_loop(device, monkeypatch, poisoned):
    from vision_gates.kernels.add_rms_norm import kernel

    monkeypatch.setattr(kernel, "_BACKWARD_PROGRAMS", 2)
    tensors, _, grads = make((23, 600), device=device)  # blocks of two rows
    assert_as_good_as_reference(run(add_rms_norm, tensors, grads, backend="triton"), tensors, grads)


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, _, grads = make(device=device)
    for i, name in enumerate(NAMES):
        got = run(add_rms_norm, tensors, grads, backend="triton")
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, grads)


@either_device
def test_eps(device, poisoned):
    tensors, _, grads = make((5, 24), device=device)  # fewer rows than a block: with eps = 0 the others must not be NaN
    for eps in (0.0, 0.5):
        got = run(add_rms_norm, tensors, grads, eps=eps, backend="triton")
        for a, b in zip(got, run(add_rms_norm_reference, tensors, grads, eps=eps), strict=True):
            torch.testing.assert_close(a, b)


@either_device
def test_strides_do_not_matter(device):
    tensors, _, grads = make((12, 24), device=device)
    wanted = run(add_rms_norm, tensors, grads, backend="triton")
    *rows, weight = (tensors[0], tensors[1], *grads, tensors[2])
    strided_weight = torch.stack((weight, weight), dim=1)[:, 0]
    slices = [F.pad(tensor, (3, 5))[:, 3:-5] for tensor in rows]
    transposed = [tensor.T.contiguous().T for tensor in rows]
    for x, residual, dy, ds in (slices, transposed):
        got = run(add_rms_norm, [x, residual, strided_weight], (dy, ds), backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@either_device
def test_leading_axes_and_expanded_tensors(device):
    tensors, _, _ = make((6, 24), device=device)
    x, residual, weight = (tensor.requires_grad_() for tensor in tensors)
    wide = [tensor.view(2, 1, 3, 24).expand(-1, 4, -1, -1) for tensor in (x, residual)]
    y, s = add_rms_norm(*wide, weight, backend="triton")
    assert y.shape == s.shape == (2, 4, 3, 24)
    (y.sum() + s.sum()).backward()  # sends expanded gradients
    got = [y.detach()[:, 0].reshape(6, 24), s.detach()[:, 0].reshape(6, 24)]
    got += [tensor.grad / 4 for tensor in (x, residual, weight)]
    ones = torch.ones(6, 24, device=device)
    assert_as_good_as_reference(got, [tensor.detach() for tensor in tensors], (ones, ones))


@either_device
def test_leaves_do_not_share_their_gradient(device):
    tensors, _, (dy, ds) = make(device=device)
    x, residual, weight = (tensor.requires_grad_() for tensor in tensors)
    torch.autograd.backward(add_rms_norm(x, residual, weight, backend="triton"), (dy, ds))
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


@either_device
def test_one_vector_and_no_rows(device):
    (x, residual, weight), _, (dy, ds) = make((1, 24), device=device)
    y, s, dx, *_ = run(add_rms_norm, [x[0], residual[0], weight], (dy[0], ds[0]), backend="triton")
    assert y.shape == s.shape == dx.shape == (24,)
    y, s, dx, _, dweight = run(add_rms_norm, [x[:0], residual[:0], weight], (dy[:0], ds[:0]), backend="triton")
    assert y.shape == s.shape == dx.shape == (0, 24)
    assert dweight.shape == (24,) and not dweight.any()


@either_device
@pytest.mark.parametrize("dtypes", ["float32", "autocast", "plain"])
def test_some_results_used_and_some_gradients_needed(dtypes, device):
    tensors, _, (dy, ds) = make(dtypes=dtypes, device=device)
    for k, grad in enumerate((dy, ds)):
        for i, tensor in enumerate(tensors):
            if tensor is None or (k == 1 and (i == 2 or tensors[1] is None)):
                continue  # s does not depend on it, or is x
            gradients = []
            for backend in ("triton", "reference"):
                leaves = [t.clone().requires_grad_() if i == j else t for j, t in enumerate(tensors)]
                result = add_rms_norm(*leaves, backend=backend)[k]
                gradients += torch.autograd.grad(result, leaves[i], grad.to(result.dtype))
            torch.testing.assert_close(*gradients)
    with torch.no_grad():
        y, s = add_rms_norm(*leaves, backend="triton")
    assert y.grad_fn is None and (s.grad_fn is None or s is leaves[0])


@either_device
def test_autocast_changes_nothing(device):
    tensors, kwargs, grads = make(dtypes="autocast", device=device)
    wanted = run(add_rms_norm, tensors, grads, backend="triton", **kwargs)
    with torch.autocast(device, torch.bfloat16):
        got = run(add_rms_norm, tensors, grads, backend="triton", **kwargs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@either_device
@pytest.mark.parametrize("dtypes", ["float32", "half_result", "plain"])
def test_opcheck(dtypes, device):
    from vision_gates.kernels.add_rms_norm.kernel import _backward_operator, _operator

    tensors, kwargs, (dy, ds) = make((3, 5), dtypes, device=device)
    x, residual, weight = (None if tensor is None else tensor.requires_grad_() for tensor in tensors)
    torch.library.opcheck(_operator, (x, residual, weight, 1e-6, kwargs["out_dtype"] or torch.float32))
    residual_dtype = x.dtype if residual is None else residual.dtype
    given = (dy, None if residual is None else ds, ds, weight.detach(), 1e-6, x.dtype, residual_dtype, True)
    torch.library.opcheck(_backward_operator, given)


@either_device
@pytest.mark.parametrize("dtypes", ["float32", "half_result", "plain"])
def test_compiled(dtypes, device):
    tensors, kwargs, grads = make((6, 24), dtypes, device=device)

    def function(*tensors):
        return add_rms_norm(*tensors, backend="triton", **kwargs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for a, b in zip(run(compiled, tensors, grads), run(function, tensors, grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compiled_reference():
    tensors, _, grads = make()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, grads), run(add_rms_norm, tensors, grads), strict=True):
        torch.testing.assert_close(a, b)


class _Module(torch.nn.Module):
    def forward(self, x, residual, weight):
        return add_rms_norm(x, residual, weight)


def test_export_has_plain_operators_only():
    tensors, _, _ = make((4, 24))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(_Module(), tuple(tensors), dynamic_shapes=({0: batch}, {0: batch}, None))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)
    tensors, _, _ = make((7, 24))
    for a, b in zip(program.module()(*tensors), add_rms_norm(*tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_repeatable(device):
    tensors, _, grads = make((25088, 192), "bfloat16", device=device)
    first, second = (run(add_rms_norm, tensors, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_cuda_graph(device):
    tensors, _, grads = make((300, 192), "autocast", device=device)
    run(add_rms_norm, tensors, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(add_rms_norm, tensors, grads)
    tensors[0].mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(add_rms_norm, tensors, grads), strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_more_than_two_to_the_31_elements(device):
    M, C = 2**21 + 77, 1024
    x = torch.randn(M, C, device=device, dtype=torch.bfloat16)
    weight = torch.ones(C, device=device, dtype=torch.bfloat16)
    y, s, dx, dresidual, _ = run(add_rms_norm, [x, x, weight], (x, x))
    assert s.numel() > 2**31
    last = x[-100:]
    wanted = exact([last, last, weight], (last, last))
    for a, b in zip((y, s, dx, dresidual), wanted, strict=False):
        assert error(a[-100:], b) < 0.01


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"),
    [
        ("x", None, TypeError, "x must be a tensor, got NoneType"),
        ("residual", 1.0, TypeError, "residual must be a tensor, got float"),
        ("x", torch.zeros(9, 24, dtype=torch.int64), TypeError, "x must be float64, .* got torch.int64"),
        ("out_dtype", torch.int8, TypeError, "out_dtype must be float64, .* got torch.int8"),
        ("x", torch.zeros(()), ValueError, r"x must have shape \(..., C\) with C at least 1, got \(\)"),
        ("x", torch.zeros(3, 0), ValueError, r"x must have shape \(..., C\) with C at least 1, got \(3, 0\)"),
        ("residual", torch.zeros(24), ValueError, r"residual must have shape \(9, 24\) to fit x, got \(24,\)"),
        ("weight", torch.zeros(23), ValueError, r"weight must have shape \(24,\) to fit x, got \(23,\)"),
        ("residual", torch.zeros(9, 24, device="meta"), ValueError, "residual must be on x's device cpu, got meta"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_arguments(name, value, exception, message):
    tensors = dict(zip(("x", "residual", "weight"), make()[0], strict=True))
    with pytest.raises(exception, match=message):
        add_rms_norm(**(tensors | {name: value}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_backends(monkeypatch):
    tensors, _, _ = make()
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got one on cpu: .* TRITON_INTERPRET=1"):
        add_rms_norm(*tensors, backend="triton")
    with pytest.raises(ValueError, match="takes half and float32 tensors .* got torch.float64 and 24"):
        add_rms_norm(*(x.double() for x in tensors), backend="triton")
    with pytest.raises(ValueError, match="up to 8192 channels, got torch.float32 and 8193"):
        add_rms_norm(torch.zeros(1, 8193), None, torch.zeros(8193), backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        add_rms_norm(*tensors, backend="triton")


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(20, 8)], min_seconds=0.01)
    assert [(row["op"], row["backend"]) for row in rows] == [("add_rms_norm", "reference"), ("add, rms_norm", "torch")]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
        assert {"shape", "dtype", "device", "torch", "triton", "commit"} <= row.keys()
    assert rows[0]["worst_error"] < 1e-6


def test_bench_sends_both_gradients():
    function, inputs, dy = bench.example(torch.device("cpu"))
    *leaves, ds = inputs
    got = torch.autograd.grad(function(*inputs), leaves, dy)
    wanted = torch.autograd.grad(add_rms_norm(*leaves), leaves, (dy, ds))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(*tensors, **options):
        y, s = add_rms_norm_reference(*tensors, **options)
        return y, 1.001 * s

    monkeypatch.setattr(operator, "add_rms_norm_reference", faulty)
    with pytest.raises(RuntimeError, match="error of s is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(20, 8)], min_seconds=0.01)
