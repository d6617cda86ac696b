"""upsample_concat: the reference against its equation, the kernel against the reference, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from vision_gates.kernels import upsample_concat as operator
from vision_gates.kernels.upsample_concat import bench, upsample_concat
from vision_gates.kernels.upsample_concat.reference import upsample_concat_reference

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

# Batch and size of the coarse map, channels of skip and coarse map: one position; lines and planes of one; odd sizes;
# several blocks of positions, of channels.
SMALL_CASES = [
    ((1, 1, 1), (1, 1)),
    ((2, 3, 5), (2, 3)),
    ((1, 1, 7), (5, 8)),
    ((1, 4, 1), (8, 1)),
    ((1, 1, 1, 1), (1, 2)),
    ((2, 2, 3, 1), (3, 9)),
    ((1, 1, 2, 5), (4, 16)),
    ((1, 3, 1, 20), (1, 40)),
    ((1, 1, 2, 2), (150, 130)),
]
MODEL_CASES = [((2, 64, 64, 64), (32, 64)), ((2, 16, 16, 16), (128, 256)), ((16, 64, 64), (16, 32))]
ODD_CASES = [((3, 17, 5, 33), (7, 11)), ((2, 101, 63), (129, 257)), ((1, 1, 1, 1000), (3, 3))]


def make(case=((2, 3, 5), (2, 3)), *, device="cpu", dtype=torch.float32):
    """Skip connection, coarse map and a gradient of the result."""
    (batch, *size), (skip, coarse) = case
    generator = torch.Generator().manual_seed(0)
    fine = [2 * n for n in size]
    shapes = (batch, skip, *fine), (batch, coarse, *size), (batch, skip + coarse, *fine)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def run(function, skip, coarse, dy, **kwargs):
    """The result and both gradients."""
    leaves = [x.detach().requires_grad_() for x in (skip, coarse)]
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def assert_right(got, tensors):
    """Errors at most twice those of the reference in the same dtype, plus 1e-6."""
    exact = run(upsample_concat_reference, *(x.double() for x in tensors))
    reference = run(upsample_concat_reference, *tensors)
    for g, r, e in zip(got, reference, exact, strict=True):
        assert (g.shape, g.dtype, g.device) == (r.shape, r.dtype, r.device)
        assert error(g, e) <= 2 * error(r, e) + 1e-6


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
    assert passed and int(passed[1]) >= 15, result.stdout


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("axes", [2, 3])
def test_reference_equation(axes):
    skip, coarse, _ = make(((2, *(3, 5, 4)[:axes]), (2, 3)))
    wanted = coarse
    for axis in range(2, 2 + axes):
        n = wanted.shape[axis]
        before = wanted.index_select(axis, torch.arange(n).sub(1).clamp_min(0))
        after = wanted.index_select(axis, torch.arange(n).add(1).clamp_max(n - 1))
        even, odd = 0.75 * wanted + 0.25 * before, 0.75 * wanted + 0.25 * after
        wanted = torch.stack((even, odd), dim=axis + 1).flatten(axis, axis + 1)
    y = upsample_concat(skip, coarse)
    assert torch.equal(y[:, :2], skip)
    torch.testing.assert_close(y[:, 2:], wanted)


@pytest.mark.parametrize("size", [(3, 5), (6, 10), (7, 9), (2, 3, 4)])
def test_reference_takes_any_ratio(size):
    skip, coarse = torch.randn(1, 2, *size), torch.randn(1, 3, *[2] * len(size))
    y = upsample_concat(skip, coarse)
    assert y.shape == (1, 5, *size) and torch.equal(y[:, :2], skip)
    assert y[:, 2:].min() >= coarse.min() - 1e-6 and y[:, 2:].max() <= coarse.max() + 1e-6


class _Module(nn.Module):
    def forward(self, skip, coarse):
        return upsample_concat(skip, coarse)


def test_export():
    skip, coarse, _ = make()
    program = torch.export.export(_Module(), (skip, coarse))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)  # plain operators only
    assert torch.equal(program.module()(skip, coarse), upsample_concat(skip, coarse))


# ------------------------------------------------------------------------------------------------------------- kernel


@either_device
@pytest.mark.parametrize("case", SMALL_CASES)
def test_small_shapes(case, device, poisoned):
    tensors = make(case, device=device)
    got = run(upsample_concat, *tensors, backend="triton")
    assert_right(got, tensors)
    assert got[0].movedim(1, -1).is_contiguous()


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cuda", torch.bfloat16, marks=ON_GPU),
        pytest.param("cuda", torch.float16, marks=ON_GPU),
        pytest.param("cpu", torch.float16, marks=IN_INTERPRETER),  # which cuts bfloat16 off instead of rounding it
    ],
)
def test_half(device, dtype, poisoned):
    for case in (((1, 3, 4), (4, 8)), ((1, 2, 2, 3), (3, 5))):
        tensors = make(case, device=device, dtype=dtype)
        assert_right(run(upsample_concat, *tensors, backend="triton"), tensors)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MODEL_CASES + ODD_CASES)
def test_model_shapes(case, dtype, device, poisoned):
    tensors = make(case, device=device, dtype=dtype)
    assert_right(run(upsample_concat, *tensors, backend="triton"), tensors)


@either_device
def test_strides_do_not_matter(device):
    tensors = make(((2, 3, 5), (4, 6)), device=device)
    wanted = run(upsample_concat, *tensors, backend="triton")

    def channels_last(x):
        return x.to(memory_format=torch.channels_last)

    def slices(x):
        return torch.cat((x, x), dim=1).repeat_interleave(2, dim=3)[:, : x.shape[1], :, ::2]

    for stride in (channels_last, slices):
        got = run(upsample_concat, *map(stride, tensors), backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), stride.__name__


@either_device
def test_expanded_tensors_and_one_gradient(device):
    skip, coarse, dy = make(((2, 3, 5), (4, 6)), device=device)
    y = upsample_concat(skip, coarse[:1, :1].expand(2, 6, -1, -1), backend="triton")
    torch.testing.assert_close(y[0, 4], y[1, 9])
    for wanted in (skip, coarse):
        leaf = wanted.clone().requires_grad_()
        arguments = [leaf if x is wanted else x for x in (skip, coarse)]
        ones = torch.ones((), device=device).expand(dy.shape)
        (got,) = torch.autograd.grad(upsample_concat(*arguments, backend="triton"), leaf, ones)
        (reference,) = torch.autograd.grad(upsample_concat(*arguments, backend="reference"), leaf, ones)
        torch.testing.assert_close(got, reference)
    assert upsample_concat(skip, coarse, backend="triton").grad_fn is None


@either_device
def test_no_images(device):
    y, d_skip, d_coarse = run(upsample_concat, *make(((0, 2, 3), (2, 3)), device=device), backend="triton")
    assert (y.shape, d_skip.shape, d_coarse.shape) == ((0, 5, 4, 6), (0, 2, 4, 6), (0, 3, 2, 3))


@either_device
def test_opcheck(device):
    from vision_gates.kernels.upsample_concat.kernel import _backward_operator, _operator

    for case in (((1, 2, 3), (2, 3)), ((1, 2, 1, 2), (1, 2))):
        skip, coarse, dy = make(case, device=device)
        torch.library.opcheck(_operator, (skip.requires_grad_(), coarse.requires_grad_()))
        torch.library.opcheck(_backward_operator, (dy.movedim(1, -1).contiguous().movedim(-1, 1), coarse.shape[1]))


@either_device
def test_compiled_with_changing_sizes(device):
    def function(skip, coarse):
        return upsample_concat(2 * skip, coarse, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for size in ((2, 3, 5), (3, 4, 2)):
        tensors = make((size, (2, 3)), device=device)
        for a, b in zip(run(compiled, *tensors), run(function, *tensors), strict=True):
            assert torch.equal(a, b)


@on_gpu
def test_cuda_graph(device):
    skip, coarse, dy = make(MODEL_CASES[-1], device=device, dtype=torch.bfloat16)
    run(upsample_concat, skip, coarse, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(upsample_concat, skip, coarse, dy)
    coarse.mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(upsample_concat, skip, coarse, dy), strict=True))


@on_gpu
def test_more_than_two_to_the_31_elements(device):
    skip = torch.zeros((2, 192, 192, 192, 33), device=device, dtype=torch.bfloat16).movedim(-1, 1)
    coarse = torch.zeros((2, 96, 96, 96, 130), device=device, dtype=torch.bfloat16).movedim(-1, 1)
    coarse[-1:] = torch.randn_like(coarse[-1:])
    y = upsample_concat(skip, coarse)
    assert y.numel() > 2**31 and not y[0].any()
    assert torch.equal(y[1:, 33:], upsample_concat(skip[1:, :1], coarse[1:])[:, 1:])
    leaf = coarse.requires_grad_()
    (gradient,) = torch.autograd.grad(upsample_concat(skip, leaf), leaf, torch.ones_like(y))
    assert torch.equal(gradient[1, 0, 1:-1, 1:-1, 1:-1], torch.full_like(gradient[1, 0, 1:-1, 1:-1, 1:-1], 8.0))


@on_gpu
def test_the_default_is_the_kernel_at_the_ratio_two(device):
    skip, coarse, _ = make(device=device)
    assert upsample_concat(skip, coarse).movedim(1, -1).is_contiguous()
    assert upsample_concat(skip[..., :-1], coarse).shape[-1] == skip.shape[-1] - 1


# ------------------------------------------------------------------------------------------------ arguments and bench


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("skip", None, TypeError, "skip must be a tensor, got NoneType"),
        ("coarse", torch.zeros(2, 3, 3, 5).byte(), TypeError, "coarse must be float64, .* got torch.uint8"),
        ("coarse", torch.zeros(2, 3, 3, 5).double(), TypeError, "one dtype, got torch.float32 and torch.float64"),
        ("skip", torch.zeros(2, 6, 10), ValueError, r"skip must have shape \(B, C, H, W\) or .* got \(2, 6, 10\)"),
        ("skip", torch.zeros(2, 0, 6, 10), ValueError, r"C and sizes at least 1, got \(2, 0, 6, 10\)"),
        ("coarse", torch.zeros(2, 3, 3, 5, 1), ValueError, "as many axes and the same batch size"),
        ("coarse", torch.zeros(1, 3, 3, 5), ValueError, "as many axes and the same batch size"),
        ("coarse", torch.zeros(2, 3, 3, 5, device="meta"), ValueError, "on one device, got cpu and meta"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_arguments(name, value, kind, message):
    skip, coarse, _ = make()
    with pytest.raises(kind, match=message):
        upsample_concat(**({"skip": skip, "coarse": coarse} | {name: value}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_backends(monkeypatch):
    skip, coarse, _ = make()
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, got one on cpu: .* TRITON_INTERPRET=1"):
        upsample_concat(skip, coarse, backend="triton")
    with pytest.raises(ValueError, match=r"doubles the size, got \(3, 5\) for \(6, 9\): use"):
        upsample_concat(skip[..., :-1], coarse, backend="triton")
    with pytest.raises(TypeError, match="no float64"):
        upsample_concat(skip.double(), coarse.double(), backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        upsample_concat(skip, coarse, backend="triton")


def test_bench_rows():
    (row,) = bench.rows("cpu", shapes=[((1, 4, 6), (2, 3))], min_seconds=0.01)
    assert (row["op"], row["backend"], row["shape"]) == ("upsample_concat", "reference", (1, 4, 6, 2, 3))
    assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
    assert {"dtype", "device", "torch", "triton", "commit"} <= row.keys() and row["worst_error"] < 1e-6
    function, inputs, upstream = bench.example(torch.device("cpu"))
    assert function(*inputs).shape == upstream.shape


def test_bench_refuses_a_fault(monkeypatch):
    def fault(skip, coarse):
        return 1.05 * upsample_concat_reference(skip, coarse)

    monkeypatch.setattr(operator, "upsample_concat_reference", fault)
    with pytest.raises(RuntimeError, match="error is 5.0e-02, above its limit"):
        bench.rows("cpu", shapes=[((1, 4, 6), (2, 3))], min_seconds=0.01)
