"""low_rank_decay: the reference against the equation, the kernels against the reference, on a GPU and interpreted."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.kernels import low_rank_decay as operator
from vision_gates.kernels.low_rank_decay import bench
from vision_gates.kernels.low_rank_decay.reference import low_rank_decay_reference

NAMES = ("g", "dlow_rank", "dweight", "dbias")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
IN_INTERPRETER = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, in test_kernels_in_the_interpreter"),
]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
either_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_GPU), pytest.param("cpu", marks=IN_INTERPRETER)]
)

# (M, R, K): one row; nothing a multiple of anything; several tiles each way; sums of several steps, with a remainder.
SMALL_SHAPES = [(1, 16, 16), (5, 7, 3), (131, 16, 72), (70, 1, 65), (20, 100, 24)]
MODEL_SHAPES = [(1, 16, 192), (25088, 16, 192), (25088, 16, 384), (32768, 16, 192), (5000, 16, 768)]
ODD_SHAPES = [(777, 24, 130), (300, 64, 2752), (301, 200, 33), (64, 769, 512), (4097, 3, 17)]
TEMPERATURE = 16

low_rank_decay = partial(operator.low_rank_decay, temperature=TEMPERATURE)
reference = partial(low_rank_decay_reference, temperature=TEMPERATURE)
low_rank_decay_triton = partial(low_rank_decay, backend="triton")


def make(shape=(9, 24, 20), *, device="cpu", dtype=torch.float32, seed=0):
    """[low_rank, weight, bias] and an upstream gradient; low_rank is the end of wider rows, as in a model."""
    M, R, K = shape
    rng = torch.Generator().manual_seed(seed)
    wide, weight, bias, dg = (torch.randn(size, generator=rng) for size in ((M, 3 * K + R), (K, R), (K,), (M, K)))
    wide, weight, bias, dg = (x.to(device, dtype) for x in (wide, 2 * weight * R**-0.5, bias, dg))
    return [wide[:, 3 * K :], weight, bias], dg


def run(function, tensors, dg):
    """The output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    g = function(*leaves)
    return [g.detach(), *torch.autograd.grad(g, leaves, dg.to(g.dtype))]


def exact(tensors, dg):
    return run(reference, [x.double() for x in tensors], dg.double())


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def assert_equal(got, wanted):
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def assert_equal_kernels(got, wanted, limit=1e-6):
    """Equal results of the kernel; cuBLAS and Inductor may sum the gradients in another order."""
    assert torch.equal(got[0], wanted[0])
    assert all(error(a, b.double()) < limit for a, b in zip(got[1:], wanted[1:], strict=True))


def assert_as_good_as_reference(got, tensors, dg):
    """Each error is at most twice that of plain PyTorch in the same dtype, plus 1e-6."""
    wanted = exact(tensors, dg)
    for name, a, b, c in zip(NAMES, got, run(reference, tensors, dg), wanted, strict=True):
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
    assert passed and int(passed[1]) >= 31, result.stdout


def test_reference_equation():
    (low_rank, weight, bias), _ = make(dtype=torch.float64)
    decay = torch.sigmoid(low_rank @ weight.T + bias) ** (1 / TEMPERATURE)
    torch.testing.assert_close(reference(low_rank, weight, bias).exp(), decay)


def test_reference_gradients():
    tensors, _ = make((2, 3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(low_rank_decay, tuple(x.requires_grad_() for x in tensors))


@either_device
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_small_shapes(shape, device, poisoned):
    tensors, dg = make(shape, device=device)
    assert_as_good_as_reference(run(low_rank_decay_triton, tensors, dg), tensors, dg)


@either_device
def test_half(device, poisoned):
    """float16: the interpreter multiplies the bits of bfloat16 matrices as integers."""
    tensors, dg = make((131, 16, 70), device=device, dtype=torch.float16)
    assert_as_good_as_reference(run(low_rank_decay_triton, tensors, dg), tensors, dg)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_model_shapes(shape, dtype, device, poisoned):
    tensors, dg = make(shape, device=device, dtype=dtype)
    assert_as_good_as_reference(run(low_rank_decay, tensors, dg), tensors, dg)


@either_device
@pytest.mark.parametrize("temperature", [1, 0.3, 1e4])
def test_temperatures(temperature, device):
    tensors, dg = make(device=device)
    got = run(partial(low_rank_decay_triton, temperature=temperature), tensors, dg)
    wanted = run(partial(reference, temperature=temperature), [x.double() for x in tensors], dg.double())
    assert all(error(a, b) < 2e-6 for a, b in zip(got, wanted, strict=True))


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, dg = make(device=device)
    for i, name in enumerate(NAMES):
        got = run(low_rank_decay_triton, tensors, dg)
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, dg)


@either_device
@pytest.mark.parametrize("logit", [-60.0, -3.0, 0.0, 3.0, 12.0, 40.0, 80.0])
def test_relatively_accurate_at_every_logit(logit, device):
    """Also where nothing is forgotten, and log(1 + e) in float32 is 0."""
    logits = logit + torch.linspace(-2, 2, 64, device=device)
    tensors = [torch.ones(64, 1, device=device), torch.zeros(64, 1, device=device), logits]
    got = run(low_rank_decay_triton, tensors, torch.ones(64, 64, device=device))
    wanted = exact(tensors, torch.ones(64, 64, device=device))
    for i in (0, 3):
        assert float((got[i].double() / wanted[i] - 1).abs().max()) < 1e-5


@either_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinite_logits_and_nan(dtype, device):
    bias = torch.tensor([torch.inf, -torch.inf, torch.nan, 6e4, -6e4, 0.0], device=device, dtype=dtype)
    tensors = [torch.zeros(3, 2, device=device, dtype=dtype), torch.ones(6, 2, device=device, dtype=dtype), bias]
    dg = torch.ones(3, 6, device=device, dtype=dtype)
    got, wanted = run(low_rank_decay_triton, tensors, dg), run(reference, tensors, dg)
    for i in (0, 3):
        torch.testing.assert_close(got[i], wanted[i], equal_nan=True)
    assert got[0][0, 1] == -torch.inf and not got[3][0]


@either_device
def test_nan_stays_in_its_row(device):
    (low_rank, weight, bias), dg = make((70, 16, 20), device=device)
    poor = low_rank.clone()
    poor[3] = torch.nan
    got, wanted = (run(low_rank_decay_triton, [x, weight, bias], dg)[:2] for x in (poor, low_rank))
    for a, b in zip(got, wanted, strict=True):
        assert a[3].isnan().all()
        a[3] = b[3]
        assert torch.equal(a, b)


@either_device
def test_strides_do_not_matter(device):
    tensors, dg = make((12, 24, 20), device=device)
    wanted = run(low_rank_decay_triton, [x.contiguous() for x in tensors], dg)
    arguments = [*tensors, dg]
    slices = [F.pad(x, (3, 5))[..., 3:-5] for x in arguments]
    transposed = [x.t().contiguous().t() for x in arguments]
    every_other = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in arguments]
    for *strided, dg_strided in (arguments, slices, transposed, every_other):
        assert_equal_kernels(run(low_rank_decay_triton, strided, dg_strided), wanted)


@either_device
def test_rows_of_a_projection_are_not_copied(device):
    from vision_gates.kernels.launching import as_rows

    wide = torch.randn(2, 5, 3 * 20 + 16, device=device)
    low_rank = wide[..., 60:]
    assert as_rows(low_rank).data_ptr() == low_rank.data_ptr() and as_rows(low_rank).stride() == (76, 1)
    (_, weight, bias), dg = make((10, 16, 20), device=device)
    got = run(low_rank_decay_triton, [low_rank, weight, bias], dg.view(2, 5, 20))
    assert got[0].is_contiguous() and got[1].shape == (2, 5, 16)
    wanted = run(low_rank_decay_triton, [low_rank.reshape(10, 16), weight, bias], dg)
    assert_equal_kernels([x.reshape(y.shape) for x, y in zip(got, wanted, strict=True)], wanted)


@either_device
def test_leading_axes_and_expanded_tensors(device):
    (low_rank, weight, bias), _ = make((6, 24, 20), device=device)
    leaves = [low_rank.reshape(2, 1, 3, 24).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    g = low_rank_decay_triton(leaves[0].expand(-1, 4, -1, -1), *leaves[1:])
    assert g.shape == (2, 4, 3, 20)
    g.sum().backward()  # sends an expanded gradient
    got = [g.detach()[:, 0].reshape(6, 20), leaves[0].grad.view(6, 24) / 4, leaves[1].grad / 4, leaves[2].grad / 4]
    tensors = [low_rank, weight.detach(), bias.detach()]
    assert_as_good_as_reference(got, tensors, torch.ones(6, 20, device=device))


@either_device
def test_one_vector_and_no_rows(device):
    (low_rank, weight, bias), dg = make((1, 24, 20), device=device)
    g, dlow_rank, *_ = run(low_rank_decay_triton, [low_rank[0], weight, bias], dg[0])
    assert (g.shape, dlow_rank.shape) == ((20,), (24,))
    torch.testing.assert_close(g, reference(low_rank[0], weight, bias))
    g, dlow_rank, dweight, dbias = run(low_rank_decay_triton, [low_rank[:0], weight, bias], dg[:0])
    assert (g.shape, dlow_rank.shape) == ((0, 20), (0, 24)) and not dweight.any() and not dbias.any()


@either_device
def test_only_some_need_gradients(device):
    tensors, dg = make(device=device)
    wanted = run(low_rank_decay_triton, tensors, dg)
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        g = low_rank_decay_triton(*leaves)
        assert torch.equal(torch.autograd.grad(g, leaves[i], dg)[0], wanted[1 + i])
    with torch.no_grad():
        g = low_rank_decay_triton(*leaves)
    assert g.grad_fn is None and torch.equal(g, wanted[0])


@either_device
def test_only_the_arguments_are_saved(device):
    tensors, _ = make(device=device)
    leaves, saved = [x.requires_grad_() for x in tensors], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        low_rank_decay_triton(*leaves)
    assert saved == [x.data_ptr() for x in leaves]


@either_device
@pytest.mark.parametrize("low_rank_dtype", [torch.float32, torch.float16])
def test_autocast(low_rank_dtype, device):
    (low_rank, weight, bias), dg = make((70, 16, 96), device=device)
    tensors = [low_rank.to(low_rank_dtype), weight, bias]

    def under_autocast(*tensors, backend):
        with torch.autocast(device, torch.float16):
            return low_rank_decay(*tensors, backend=backend)

    got = run(partial(under_autocast, backend="triton"), tensors, dg)
    plain = run(partial(under_autocast, backend="reference"), tensors, dg)
    assert got[0].dtype == plain[0].dtype == torch.float16
    for name, a, b, c in zip(NAMES, got, plain, exact(tensors, dg), strict=True):
        assert a.dtype == b.dtype and error(a, c) <= 2 * error(b, c) + 1e-6, name


@either_device
def test_opcheck(device):
    tensors, dg = make((3, 4, 5), device=device)
    from vision_gates.kernels.low_rank_decay.kernel import _backward_operator, _operator

    torch.library.opcheck(_operator, (*(x.requires_grad_() for x in tensors), 16.0))
    torch.library.opcheck(_backward_operator, (dg, *(x.detach() for x in tensors), 16.0))


@either_device
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast, device):
    """As in a model: low_rank is cut from its projection inside; the second size makes it dynamic."""
    torch.compiler.reset()

    def function(wide, weight, bias):
        with torch.autocast(device, torch.float16, enabled=autocast):
            return low_rank_decay_triton(wide[..., 60:], weight, bias)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for n_tokens in (6, 70, 197):
        (_, weight, bias), dg = make((2 * n_tokens, 16, 20), device=device)
        tensors = [torch.randn(2, n_tokens, 76, device=device), weight, bias]
        dg = dg.view(2, n_tokens, 20)
        got, wanted = run(compiled, tensors, dg), run(function, tensors, dg)
        assert_equal_kernels(got, wanted, limit=1e-3 if autocast else 1e-6)


def test_compiled_reference():
    tensors, dg = make()
    compiled = torch.compile(low_rank_decay, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, dg), run(low_rank_decay, tensors, dg), strict=True):
        torch.testing.assert_close(a, b)


class _Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 20)

    def forward(self, low_rank):
        return low_rank_decay(low_rank, self.up.weight, self.up.bias)


def test_export_has_plain_operators_only():
    decay, batch = _Decay(), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(decay, (torch.randn(4, 16),), dynamic_shapes=({0: batch},))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)
    low_rank = torch.randn(7, 16)
    torch.testing.assert_close(program.module()(low_rank), decay(low_rank))


@on_gpu
def test_repeatable(device):
    tensors, dg = make((5000, 16, 384), device=device, dtype=torch.bfloat16)
    assert_equal(*(run(low_rank_decay, tensors, dg) for _ in range(2)))


@on_gpu
def test_cuda_graph(device):
    tensors, dg = make((300, 16, 192), device=device, dtype=torch.bfloat16)
    run(low_rank_decay, tensors, dg)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(low_rank_decay, tensors, dg)
    tensors[0].mul_(-2)
    graph.replay()
    assert_equal(captured, run(low_rank_decay, tensors, dg))


@on_gpu
def test_tf32_is_used_only_when_allowed(device, monkeypatch):
    tensors, dg = make((300, 16, 192), device=device)
    wanted = exact(tensors, dg)[0]
    assert error(low_rank_decay(*tensors), wanted) < 2e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert 2e-5 < error(low_rank_decay(*tensors), wanted) < 2e-3


@on_gpu
def test_more_than_two_to_the_31_elements(device):
    (_, weight, bias), _ = make((1, 16, 512), device=device, dtype=torch.bfloat16)
    wide = torch.randn(2**22 + 77, 516, device=device, dtype=torch.bfloat16)
    dg = torch.randn(2**22 + 77, 512, device=device, dtype=torch.bfloat16)
    g, dlow_rank, *_ = run(low_rank_decay, [wide[:, 500:], weight, bias], dg)
    assert g.numel() > 2**31
    wanted = exact([wide[-100:, 500:], weight, bias], dg[-100:])
    assert error(g[-100:], wanted[0]) < 0.01 and error(dlow_rank[-100:], wanted[1]) < 0.01


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"),
    [
        ("low_rank", None, TypeError, "low_rank must be a tensor, got NoneType"),
        ("weight", [1.0], TypeError, "weight must be a tensor, got list"),
        ("bias", None, TypeError, "bias must be a tensor, got NoneType"),
        ("low_rank", torch.zeros(3, 24, dtype=torch.int64), TypeError, "low_rank must be float64, .* torch.int64"),
        ("weight", torch.zeros(20, 24).half(), TypeError, "weight must be torch.float32 like low_rank, .*float16"),
        ("bias", torch.zeros(20).double(), TypeError, "bias must be torch.float32 like low_rank, got torch.float64"),
        ("low_rank", torch.zeros(()), ValueError, r"low_rank must have shape \(..., R\) .* at least 1, got \(\)"),
        ("low_rank", torch.zeros(3, 0), ValueError, r"low_rank must have shape \(..., R\) .*, got \(3, 0\)"),
        ("low_rank", torch.zeros(3, 25), ValueError, r"weight must have as many columns .*, 25, got \(20, 24\)"),
        ("weight", torch.zeros(0, 24), ValueError, r"weight must have shape \(K, R\) .*, got \(0, 24\)"),
        ("weight", torch.zeros(24), ValueError, r"weight must have shape \(K, R\) .*, got \(24,\)"),
        ("weight", torch.zeros(20, 24, device="meta"), ValueError, "weight must be on low_rank's device cpu, got meta"),
        ("bias", torch.zeros(21), ValueError, r"bias must have shape \(20,\) like weight's rows, got \(21,\)"),
        ("temperature", 0, ValueError, "temperature must be positive and finite, got 0"),
        ("temperature", float("nan"), ValueError, "temperature must be positive and finite, got nan"),
        ("temperature", float("inf"), ValueError, "temperature must be positive and finite, got inf"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_arguments(name, value, exception, message):
    (low_rank, weight, bias), _ = make()
    with pytest.raises(exception, match=message):
        low_rank_decay(**(dict(low_rank=low_rank, weight=weight, bias=bias) | {name: value}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_backends(monkeypatch):
    tensors, _ = make()
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, got one on cpu: .* TRITON_INTERPRET=1"):
        low_rank_decay_triton(*tensors)
    with pytest.raises(TypeError, match="no float64"):
        low_rank_decay_triton(*(x.double() for x in tensors))
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        low_rank_decay_triton(*tensors)
    assert low_rank_decay(*(x.to("meta") for x in tensors)).shape == (9, 20)


def test_bench_rows():
    (row,) = bench.rows("cpu", shapes=[(20, 8, 16)], min_seconds=0.01)
    assert (row["op"], row["backend"]) == ("low_rank_decay", "reference")
    assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and row["worst_error"] < 1e-6
    assert {"shape", "dtype", "device", "torch", "triton", "commit"} <= row.keys()
    function, inputs, upstream = bench.example(torch.device("cpu"))
    assert function(*inputs).shape == upstream.shape


def test_bench_refuses_a_fault(monkeypatch):
    monkeypatch.setattr(
        operator,
        "low_rank_decay_reference",
        lambda *tensors, temperature: 1.001 * low_rank_decay_reference(*tensors, temperature=temperature),
    )
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(20, 8, 16)], min_seconds=0.01)
