"""patch_rows: the reference against F.unfold, the kernel against the reference, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.kernels import patch_rows as operator
from vision_gates.kernels.patch_rows import bench, patch_rows
from vision_gates.kernels.patch_rows.reference import patch_rows_reference
from vision_gates.models import _stem
from vision_gates.models._stem import embed_patches

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

# (B, C, H, W) and (kernel_size, stride, padding): ViG; one pixel; no overlap; gaps between windows; only padding above
# and below; several blocks of positions, of output rows, of columns.
SMALL_CASES = [
    ((2, 3, 20, 33), (9, 8, 1)),
    ((1, 1, 1, 1), (1, 1, 0)),
    ((2, 4, 8, 6), (2, 2, 0)),
    ((1, 3, 7, 10), (2, 4, 1)),
    ((1, 2, 1, 3), (2, 1, 3)),
    ((1, 1, 3, 70), (3, 2, 1)),
    ((1, 1, 19, 3), (3, 1, 1)),
    ((1, 17, 5, 6), (3, 2, 1)),
]
MODEL_CASES = [((128, 3, 224, 224), (9, 8, 1)), ((2, 3, 1024, 1024), (9, 8, 1)), ((8, 3, 224, 224), (3, 2, 1))]
ODD_CASES = [
    ((3, 3, 227, 515), (9, 8, 1)),
    ((2, 4, 97, 31), (17, 16, 1)),
    ((70000, 1, 2, 3), (2, 1, 1)),
    ((2, 40, 30, 41), (5, 4, 0)),
    ((1, 1, 5000, 7), (7, 7, 3)),
]


def window(sizes):
    return dict(zip(("kernel_size", "stride", "padding"), sizes, strict=True))


VIG = window((9, 8, 1))


def make(shape=(2, 3, 20, 33), *, device="cpu", dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(function, x, dy=None, **kwargs):
    """The output and the gradient of x."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if dy is None else dy
    return y.detach(), torch.autograd.grad(y, leaf, dy.to(y))[0]


def unfolded(x, *, kernel_size, stride, padding):
    """The definition, by F.unfold."""
    B, C, *image = x.shape
    columns = F.unfold(x, kernel_size, stride=stride, padding=padding).transpose(1, 2)
    positions = ((size + 2 * padding - kernel_size) // stride + 1 for size in image)
    return F.pad(columns.reshape(B, *positions, -1), (0, -C * kernel_size**2 % 8))


def assert_right(got, x, **sizes):
    """The output exactly; the gradient's error at most twice that of the reference in the same dtype, plus 1e-6."""
    wanted, exact = run(unfolded, x.double(), **sizes)
    assert (got[0].dtype, got[0].device) == (x.dtype, x.device) and got[0].is_contiguous()
    assert torch.equal(got[0], wanted.to(x.dtype))
    reference = run(patch_rows_reference, x, **sizes)[1]
    assert (got[1].shape, got[1].dtype) == (x.shape, x.dtype)
    assert error(got[1], exact) <= 2 * error(reference, exact) + 1e-6


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


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
    assert passed and int(passed[1]) >= 17, result.stdout


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(("shape", "sizes"), SMALL_CASES)
def test_reference(shape, sizes):
    x = make(shape)
    assert_right(run(patch_rows, x, **window(sizes)), x, **window(sizes))


def test_reference_equation():
    x, y = make((1, 2, 5, 6)), patch_rows(make((1, 2, 5, 6)), kernel_size=3, stride=2, padding=1)
    assert y.shape == (1, 3, 3, 24)
    assert y[0, 1, 2, 9 + 3 * 2 + 0] == x[0, 1, 2 * 1 + 2 - 1, 2 * 2 + 0 - 1]
    assert not y[0, 0, :, :3].any() and not y[..., 18:].any()


def test_reference_gradients():
    x = make((1, 2, 5, 6)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_rows(x, kernel_size=3, stride=2, padding=1), x)


def test_reference_is_contiguous_for_any_strides():
    for x in (make((2, 8, 3, 4)), make((2, 8, 3, 4)).to(memory_format=torch.channels_last)):
        assert patch_rows(x, kernel_size=1, stride=1, padding=0).is_contiguous()


class _Module(nn.Module):
    def forward(self, x):
        return patch_rows(x, **VIG)


def test_export_with_dynamic_sizes():
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("height", min=15, max=999)}
    program = torch.export.export(_Module(), (make(),), dynamic_shapes=(sizes,))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)  # plain operators only
    x = make((3, 3, 41, 33))
    assert torch.equal(program.module()(x), patch_rows(x, **VIG))


def test_compiled_reference():
    x = make()
    compiled = torch.compile(patch_rows, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, **VIG), run(patch_rows, x, **VIG), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- kernel


@either_device
@pytest.mark.parametrize(("shape", "sizes"), SMALL_CASES)
def test_small_shapes(shape, sizes, device, poisoned):
    x = make(shape, device=device)
    assert_right(run(patch_rows, x, **window(sizes), backend="triton"), x, **window(sizes))


@either_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype, device, poisoned):
    x = make(device=device, dtype=dtype)
    assert_right(run(patch_rows, x, **VIG, backend="triton"), x, **VIG)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "sizes"), MODEL_CASES + ODD_CASES)
def test_model_shapes(shape, sizes, dtype, device, poisoned):
    x = make(shape, device=device, dtype=dtype)
    assert_right(run(patch_rows, x, **window(sizes)), x, **window(sizes))


@either_device
def test_strides_do_not_matter(device):
    x = make((2, 3, 10, 7), device=device)
    wanted = run(patch_rows, x, **VIG, backend="triton")

    def channels_last(x):
        return x.to(memory_format=torch.channels_last)

    def slices(x):  # of a larger image with more channels
        return F.pad(x, (3, 5, 1, 2, 1, 1)).repeat_interleave(2, dim=3)[:, 1:-1, 1:-2, 6:-10:2]

    def transposed(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for stride in (channels_last, slices, transposed):
        assert not stride(x).is_contiguous()
        got = run(patch_rows, stride(x), **VIG, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), stride.__name__


@either_device
def test_expanded_tensors(device):
    x = make((1, 1, 10, 7), device=device).expand(2, 3, -1, -1)
    y = patch_rows(x, **VIG, backend="triton")
    assert torch.equal(y, patch_rows(x.contiguous(), **VIG, backend="triton"))
    dy = torch.ones((), device=device).expand(y.shape)
    got, wanted = (run(patch_rows, x, dy, **VIG, backend=backend)[1] for backend in ("triton", "reference"))
    torch.testing.assert_close(got, wanted)


@either_device
def test_offsets_of_64_bits(device):
    """Channels 2**30 elements apart: the third begins where 32 bits with a sign end."""
    storage = torch.empty(2**31 + 70, device=device, dtype=torch.float16)
    x = storage.as_strided((1, 3, 10, 7), (2**31, 2**30, 7, 1)).copy_(make((1, 3, 10, 7)))
    y = patch_rows(x, **VIG, backend="triton")
    assert torch.equal(y, patch_rows(x.contiguous(), **VIG, backend="triton"))


@either_device
def test_no_images(device):
    y, dx = run(patch_rows, make((0, 3, 10, 13), device=device), **VIG, backend="triton")
    assert y.shape == (0, 1, 1, 248) and dx.shape == (0, 3, 10, 13)


@either_device
def test_without_gradients_and_twice_differentiable(device):
    x = make((1, 1, 4, 5), device=device).requires_grad_()
    sizes = window((3, 2, 1))
    with torch.no_grad():
        assert patch_rows(x, **sizes, backend="triton").grad_fn is None
    y = patch_rows(x, **sizes, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(dx, 2 * x * run(patch_rows, x, torch.ones_like(y), **sizes)[1])
    torch.testing.assert_close(ddx, dx.detach() / x.detach())


@either_device
def test_opcheck(device):
    from vision_gates.kernels.patch_rows.kernel import _backward_operator, _operator

    x = make((1, 2, 3, 4), device=device)
    dy = patch_rows_reference(x, kernel_size=2, stride=2, padding=0)
    torch.library.opcheck(_operator, (x.requires_grad_(), 2, 2, 0))
    torch.library.opcheck(_backward_operator, (dy, 2, 3, 4, 2, 2, 0))


@either_device
def test_compiled_with_changing_sizes(device):
    def function(x):
        return patch_rows(2 * x, **VIG, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for shape in ((2, 3, 10, 7), (3, 3, 17, 15)):
        x = make(shape, device=device)
        for a, b in zip(run(compiled, x), run(function, x), strict=True):
            assert torch.equal(a, b)


@on_gpu
def test_cuda_graph(device):
    x = make((4, 3, 224, 224), device=device, dtype=torch.bfloat16)
    run(patch_rows, x, **VIG)
    dy = torch.randn(4, 28, 28, 248, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(patch_rows, x, dy, **VIG)
    x.mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(patch_rows, x, dy, **VIG), strict=True))


@on_gpu
def test_more_than_two_to_the_31_elements(device):
    x = torch.zeros((230, 3, 1792, 1792), device=device, dtype=torch.bfloat16)
    x[-1:] = make((1, 3, 1792, 1792))
    y = patch_rows(x, **VIG)
    assert x.numel() > 2**31 and y.numel() > 2**31
    assert torch.equal(y[-1:], patch_rows_reference(x[-1:], **VIG)) and not y[:-1].any()


@on_gpu
def test_sizes_do_not_compile_again(device):
    from vision_gates.kernels.patch_rows import kernel

    def variants():
        return [len(caches[0]) for caches in kernel._patch_rows_kernel.device_caches.values()]

    patch_rows(make((2, 3, 224, 224), device=device), **VIG)
    before = variants()
    for shape in ((1, 3, 9, 9), (3, 3, 256, 512), (16, 3, 37, 1000)):
        patch_rows(make(shape, device=device), **VIG)
    assert variants() == before


# ----------------------------------------------------------------------------------------------- the stem of the models


def vig_conv(**kwargs):
    return nn.Conv2d(3, 5, **({"kernel_size": 9, "stride": 8, "padding": 1} | kwargs))


@pytest.mark.parametrize("bias", [True, False])
def test_rows_and_product_are_the_convolution(bias):
    conv, x = vig_conv(bias=bias).double(), make().double()
    assert _stem._is_plain_square_conv(conv)
    got, wanted = _stem._embed_rows(x, conv), conv(x)
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous(memory_format=torch.channels_last)
    gradients = (torch.autograd.grad(y.square().sum(), list(conv.parameters())) for y in (got, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_gathered_in_the_dtype_of_autocast(dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(_stem, "patch_rows", lambda x, **sizes: seen.append(x.dtype) or patch_rows(x, **sizes))
    conv, x = vig_conv(), make(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = _stem._embed_rows(x, conv)
        wanted = conv(x)
    assert seen == [torch.bfloat16] and y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


class _Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _with(change):
    conv = vig_conv()
    change(conv)
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        _Doubled(3, 5, kernel_size=9),
        nn.Sequential(vig_conv()),
        vig_conv(padding=(1, 2)),
        vig_conv(kernel_size=(9, 7)),
        vig_conv(stride=(8, 4)),
        vig_conv(stride=1, padding="same"),
        vig_conv(padding="valid"),
        vig_conv(dilation=2),
        vig_conv(padding_mode="reflect"),
        nn.Conv2d(3, 6, kernel_size=9, groups=3),
        _with(lambda conv: conv.register_forward_hook(lambda *_: None)),
        _with(lambda conv: conv.register_forward_pre_hook(lambda *_: None)),
        _with(lambda conv: conv.register_full_backward_hook(lambda *_: None)),
        _with(lambda conv: setattr(conv, "forward", conv.forward)),
        _with(nn.utils.parametrizations.weight_norm),
        _with(nn.utils.spectral_norm),
    ],
)
def test_a_module_that_is_more_than_a_plain_convolution_is_called(conv):
    assert not _stem._is_plain_square_conv(conv)
    x = make()
    assert torch.equal(embed_patches(x, conv.eval()), conv(x))


@on_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_stem_on_a_gpu(autocast, device):
    conv, x = vig_conv(), make((2, 3, 64, 72))
    wanted = conv.double()(x.double()).float().to(device)
    conv, x = conv.float().to(device), x.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        got = embed_patches(x, conv)
        compiled = torch.compile(embed_patches, fullgraph=True)(x, conv)
    assert got.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert got.is_contiguous(memory_format=torch.channels_last)
    rounding = {"rtol": 0.02, "atol": 0.02} if autocast else {}  # Inductor does not round where eager mode does
    torch.testing.assert_close(got.float(), wanted, **rounding)
    torch.testing.assert_close(compiled, got, **rounding)


# ------------------------------------------------------------------------------------------------ arguments and bench


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("x", None, TypeError, "x must be a tensor, got NoneType"),
        ("x", torch.zeros(2, 3, 9, 9).byte(), TypeError, "x must be float64, .* got torch.uint8"),
        ("x", torch.zeros(3, 9, 9), ValueError, r"x must have shape \(B, C, H, W\) .* got \(3, 9, 9\)"),
        ("x", torch.zeros(2, 0, 9, 9), ValueError, r"with C, H and W at least 1, got \(2, 0, 9, 9\)"),
        (
            "x",
            torch.zeros(2, 3, 9, 6),
            ValueError,
            "an image of 9x6 pixels with a padding of 1 is too small for a kernel of 9: each side needs at least 7",
        ),
        ("kernel_size", (9, 9), TypeError, "kernel_size must be an integer, got tuple"),
        ("kernel_size", 0, ValueError, "kernel_size must be at least 1, got 0"),
        ("stride", 0, ValueError, "stride must be at least 1, got 0"),
        ("padding", -1, ValueError, "padding must be at least 0, got -1"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_arguments(name, value, kind, message):
    with pytest.raises(kind, match=message):
        patch_rows(**({"x": make(), **VIG} | {name: value}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_backends(monkeypatch):
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, got one on cpu: .* TRITON_INTERPRET=1"):
        patch_rows(make(), **VIG, backend="triton")
    with pytest.raises(TypeError, match="no float64"):
        patch_rows(make().double(), **VIG, backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        patch_rows(make(), **VIG, backend="triton")
    assert patch_rows(make().to("meta"), **VIG).shape == (2, 2, 4, 248)


def test_bench_rows():
    (row,) = bench.rows("cpu", shapes=[(1, 3, 20, 33)], min_seconds=0.01)
    assert (row["op"], row["backend"], row["shape"]) == ("patch_rows", "reference", (1, 3, 20, 33))
    assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
    assert {"dtype", "device", "torch", "triton", "commit"} <= row.keys() and row["worst_error"] < 1e-6
    function, inputs, upstream = bench.example(torch.device("cpu"))
    assert function(*inputs).shape == upstream.shape


def test_bench_refuses_a_fault(monkeypatch):
    def wrong_output(x, **sizes):
        return 1.001 * patch_rows_reference(x, **sizes)

    def wrong_gradient(x, **sizes):
        y = patch_rows_reference(x, **sizes)
        y.register_hook(lambda dy: 1.001 * dy)
        return y

    for fault, message in ((wrong_output, "the output is not that"), (wrong_gradient, "error of dx is 1.0e-03, above")):
        monkeypatch.setattr(operator, "patch_rows_reference", fault)
        with pytest.raises(RuntimeError, match=message):
            bench.rows("cpu", shapes=[(1, 3, 20, 33)], min_seconds=0.01)
