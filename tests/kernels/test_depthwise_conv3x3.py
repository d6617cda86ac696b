"""depthwise_conv3x3: the reference against the equations, the kernels against it, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.kernels import depthwise_conv3x3 as operator
from vision_gates.kernels.depthwise_conv3x3 import bench, depthwise_conv3x3
from vision_gates.kernels.depthwise_conv3x3.reference import depthwise_conv3x3_reference

NAMES = ("y", "dx", "dweight")
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
activations = pytest.mark.parametrize("activation", [False, True])

# (B, H, W, C) and activation: several images in a block of patches; one pixel; unequal strips; two blocks of channels.
SMALL_CASES = [
    ((3, 2, 5, 3), False),
    ((3, 2, 5, 3), True),
    ((1, 1, 1, 1), True),
    ((1, 17, 2, 4), True),
    ((1, 2, 3, 33), False),
]
MODEL_SHAPES = [(64, 14, 14, 192), (4, 64, 64, 192), (1, 128, 128, 192), (16, 14, 14, 768), (8, 56, 56, 96)]
ODD_SHAPES = [(5, 7, 7, 384), (2, 1, 300, 40), (2, 301, 1, 24), (3, 33, 17, 31), (1, 17, 9, 1), (70000, 1, 1, 2)]


def make(shape=(2, 5, 6, 3), *, device="cpu", dtype=torch.float32, weight_dtype=None, seed=0):
    """[x, weight] and an upstream gradient."""
    rng = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(2))
    weight = (torch.randn(shape[-1], 1, 3, 3, generator=rng) / 3).to(device, weight_dtype or dtype)
    return [x, weight], dy


def run(function, tensors, dy, **kwargs):
    """The output and the two gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def assert_as_good_as_reference(got, tensors, dy, activation, factor=2.0):
    """Each error is at most twice that of plain PyTorch in the same dtype, plus 1e-6."""
    doubles = [x.double() for x in tensors]
    wanted = run(depthwise_conv3x3_reference, doubles, dy.double(), activation=activation)
    plain = run(depthwise_conv3x3_reference, tensors, dy, activation=activation)
    for name, a, b, c in zip(NAMES, got, plain, wanted, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        assert a.is_contiguous(), name
        assert error(a, c) <= factor * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, PyTorch {error(b, c):.2e}"


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


@activations
def test_reference_equation(activation):
    (x, weight), _ = make(dtype=torch.float64)
    B, H, W, C = x.shape
    wanted = torch.zeros_like(x)
    for h in range(H):
        for w in range(W):
            for i in range(3):
                for j in range(3):
                    if 0 <= h + i - 1 < H and 0 <= w + j - 1 < W:
                        wanted[:, h, w] += weight[:, 0, i, j] * x[:, h + i - 1, w + j - 1]
    wanted = wanted * torch.sigmoid(wanted) if activation else wanted
    torch.testing.assert_close(depthwise_conv3x3(x, weight, activation=activation), wanted)


def test_reference_is_the_layer_of_vig():
    conv = nn.Conv2d(6, 6, kernel_size=3, padding=1, groups=6, bias=False)
    x = torch.randn(2, 4, 5, 6)
    wanted = F.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    got = depthwise_conv3x3(x, conv.weight, activation=True)
    assert torch.equal(got, wanted) and got.is_contiguous()


@activations
def test_reference_gradients(activation):
    (x, weight), _ = make((1, 2, 3, 2), dtype=torch.float64)
    arguments = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *tensors: depthwise_conv3x3(*tensors, activation=activation), arguments)


def test_reference_takes_float32_weights_beside_half_images():
    (x, weight), _ = make(dtype=torch.bfloat16, weight_dtype=torch.float32)
    got = depthwise_conv3x3(x, weight)
    assert got.dtype == torch.bfloat16 and torch.equal(got, depthwise_conv3x3(x, weight.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_under_autocast(dtype):
    (x, weight), _ = make(dtype=dtype, weight_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = depthwise_conv3x3(x, weight, activation=True)
    assert torch.equal(got, depthwise_conv3x3(x.bfloat16(), weight.bfloat16(), activation=True))


class _Module(nn.Module):
    def forward(self, x, weight):
        return depthwise_conv3x3(x, weight, activation=True)


def test_export_with_dynamic_sizes():
    (x, weight), _ = make()
    sizes = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(_Module(), (x, weight), dynamic_shapes=(sizes, None))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)  # plain operators only
    (x, weight), _ = make((3, 9, 4, 3), seed=1)
    torch.testing.assert_close(program.module()(x, weight), depthwise_conv3x3(x, weight, activation=True))


# ------------------------------------------------------------------------------------------------------------ kernels


@either_device
@pytest.mark.parametrize(("shape", "activation"), SMALL_CASES)
def test_small_shapes(shape, activation, device, poisoned):
    tensors, dy = make(shape, device=device)
    got = run(depthwise_conv3x3, tensors, dy, activation=activation, backend="triton")
    assert_as_good_as_reference(got, tensors, dy, activation)


@either_device
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_half(dtype, weight_dtype, device, poisoned):
    tensors, dy = make((2, 3, 5, 3), device=device, dtype=dtype, weight_dtype=weight_dtype)
    got = run(depthwise_conv3x3, tensors, dy, activation=True, backend="triton")
    # The interpreter cuts bfloat16 off instead of rounding it: twice the error, in dz and again in dx.
    factor = 4.0 if INTERPRETED and dtype == torch.bfloat16 else 2.0
    assert_as_good_as_reference(got, tensors, dy, True, factor)


@on_gpu
@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_model_shapes(shape, dtype, activation, device, poisoned):
    tensors, dy = make(shape, device=device, dtype=dtype)
    got = run(depthwise_conv3x3, tensors, dy, activation=activation)
    assert_as_good_as_reference(got, tensors, dy, activation)


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, dy = make((1, 3, 4, 3), device=device)
    right = run(depthwise_conv3x3, tensors, dy, activation=True, backend="triton")
    for i, name in enumerate(NAMES):
        got = list(right)
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, dy, True)


@either_device
def test_strides_do_not_matter(device):
    (x, weight), dy = make((2, 3, 2, 4), device=device)
    wanted = run(depthwise_conv3x3, [x, weight], dy, activation=True, backend="triton")

    def slices(x):  # of a wider projection, of a larger image
        return F.pad(x, (3, 5, 1, 2, 1, 1))[:, 1:-1, 1:-2, 3:-5]

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def channels_first(x):
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    for stride in (slices, transposed, channels_first):
        got = run(depthwise_conv3x3, [stride(x), weight], stride(dy), activation=True, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), stride.__name__


@either_device
def test_expanded_tensors(device):
    (x, weight), _ = make((1, 3, 4, 3), device=device)
    x, weight = x.expand(2, 3, 4, 3), weight[:1].expand(3, 1, 3, 3)
    dy = torch.ones((), device=device).expand(x.shape)
    got = run(depthwise_conv3x3, [x, weight], dy, activation=True, backend="triton")
    assert_as_good_as_reference(got, [x, weight], dy, True)


@either_device
def test_only_what_needs_a_gradient_gets_one(device):
    (x, weight), dy = make((1, 3, 4, 3), device=device)
    _, dx, dweight = run(depthwise_conv3x3, [x, weight], dy, backend="triton")
    y = depthwise_conv3x3(x.requires_grad_(), weight, backend="triton")
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dx)
    y = depthwise_conv3x3(x.detach(), weight.requires_grad_(), backend="triton")
    assert torch.equal(torch.autograd.grad(y, weight, dy)[0], dweight)
    with torch.no_grad():
        assert not depthwise_conv3x3(x, weight, backend="triton").requires_grad


@either_device
def test_no_images(device):
    tensors, dy = make((0, 3, 4, 3), device=device)
    y, dx, dweight = run(depthwise_conv3x3, tensors, dy, activation=True, backend="triton")
    assert y.shape == dx.shape == (0, 3, 4, 3) and not dweight.any()


@either_device
def test_more_blocks_than_programs(device, monkeypatch):
    from vision_gates.kernels.depthwise_conv3x3 import kernel

    tensors, dy = make((9, 2, 8, 2), device=device)
    monkeypatch.setattr(kernel, "_GRADIENT_PROGRAMS", 2)
    got = run(depthwise_conv3x3, tensors, dy, activation=True, backend="triton")
    assert_as_good_as_reference(got, tensors, dy, True)


@either_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, device):
    (x, weight), _ = make((1, 2, 3, 2), device=device, dtype=dtype, weight_dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        got = depthwise_conv3x3(x, weight, activation=True, backend="triton")
    assert torch.equal(got, depthwise_conv3x3(x.bfloat16(), weight, activation=True, backend="triton"))


@either_device
def test_opcheck(device):
    from vision_gates.kernels.depthwise_conv3x3.kernel import _operator

    (x, weight), _ = make((1, 2, 3, 2), device=device, dtype=torch.float16, weight_dtype=torch.float32)
    torch.library.opcheck(_operator, (x.requires_grad_(), weight.requires_grad_(), True))


@either_device
def test_compiled_is_eager(device):
    (x, weight), dy = make((1, 3, 4, 3), device=device, dtype=torch.float16, weight_dtype=torch.float32)

    def function(x, weight):
        return depthwise_conv3x3(2 * x, weight, activation=True, backend="triton")

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        pair = [run(f, [x, weight], dy) for f in (function, compiled)]
    assert pair[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@on_gpu
@activations
def test_same_bits_every_time(activation, device):
    tensors, dy = make((16, 56, 56, 96), device=device, dtype=torch.bfloat16)
    first = run(depthwise_conv3x3, tensors, dy, activation=activation)
    for _ in range(5):
        again = run(depthwise_conv3x3, tensors, dy, activation=activation)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@on_gpu
def test_cuda_graph(device):
    (x, weight), dy = make((4, 14, 14, 192), device=device, dtype=torch.bfloat16)
    run(depthwise_conv3x3, [x, weight], dy, activation=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(depthwise_conv3x3, [x, weight], dy, activation=True)
    x.mul_(0.5)
    graph.replay()
    wanted = run(depthwise_conv3x3, [x, weight], dy, activation=True)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@on_gpu
def test_offsets_beyond_two_to_the_31(device):
    """The last image of a tensor of more than 2**31 elements, forward and backward."""
    B, H, W, C = 170, 256, 256, 193
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    assert B * H * W * C > 2**31
    x = torch.zeros((B, H, W, C), device=device, dtype=torch.bfloat16)
    dy = torch.zeros_like(x)
    (x[-1:], weight), dy[-1:] = make((1, H, W, C), device=device, dtype=torch.bfloat16)
    got = run(depthwise_conv3x3, [x, weight], dy, activation=True)
    wanted = run(depthwise_conv3x3, [x[-1:], weight], dy[-1:], activation=True)
    assert torch.equal(got[0][-1:], wanted[0]) and torch.equal(got[1][-1:], wanted[1])
    assert error(got[2], wanted[2].double()) < 1e-2


@on_gpu
def test_sizes_do_not_compile_again(device):
    from vision_gates.kernels.depthwise_conv3x3 import kernel

    def variants():
        kernels = (kernel._conv_kernel, kernel._gradient_kernel, kernel._sum_kernel)
        return [len(caches[0]) for jit in kernels for caches in jit.device_caches.values()]

    def visit(shape):
        run(depthwise_conv3x3, *make(shape, device=device, dtype=torch.bfloat16), activation=True)

    visit((2, 14, 14, 192))
    before = variants()
    for shape in ((1, 16, 16, 192), (3, 1, 1, 192), (16, 32, 7, 192)):
        visit(shape)
    assert variants() == before


# ------------------------------------------------------------------------------------------------ arguments and bench


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("x", None, TypeError, "x must be a tensor, got NoneType"),
        ("x", torch.zeros(2, 5, 3), ValueError, r"x must have shape \(B, H, W, C\) .* got \(2, 5, 3\)"),
        ("x", torch.zeros(2, 0, 5, 3), ValueError, r"with H, W and C at least 1, got \(2, 0, 5, 3\)"),
        ("x", torch.zeros(2, 5, 6, 3, dtype=torch.int64), TypeError, "x must be float64, .* got torch.int64"),
        ("weight", torch.zeros(4, 1, 3, 3), ValueError, r"weight must have shape \(3, 1, 3, 3\) to fit x, got \(4"),
        (
            "weight",
            torch.zeros(3, 1, 3, 3).half(),
            TypeError,
            "weight must be torch.float32 like x .* got torch.float16",
        ),
        ("x", torch.zeros(2, 5, 6, 3).double(), TypeError, "weight must be torch.float64 like x, got torch.float32"),
        ("weight", torch.zeros(3, 1, 3, 3, device="meta"), ValueError, "weight must be on x's device cpu, got meta"),
    ],
)
def test_bad_arguments(name, value, kind, message):
    tensors = dict(zip(("x", "weight"), make()[0], strict=True))
    with pytest.raises(kind, match=message):
        depthwise_conv3x3(**(tensors | {name: value}))


def test_backends(monkeypatch):
    tensors, _ = make()
    assert torch.equal(depthwise_conv3x3(*tensors), depthwise_conv3x3(*tensors, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        depthwise_conv3x3(*tensors, backend="cuda")
    monkeypatch.setattr(operator, "_INTERPRETED", False)
    if operator._HAS_TRITON:
        with pytest.raises(TypeError, match="no float64"):
            depthwise_conv3x3(*(x.double() for x in tensors), backend="triton")
        with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
            depthwise_conv3x3(*tensors, backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        depthwise_conv3x3(*tensors, backend="triton")


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(1, 4, 5, 6)], min_seconds=0.01)
    assert [(row["op"], row["backend"], row["activation"]) for row in rows] == [
        ("depthwise_conv3x3", "reference", False),
        ("depthwise_conv3x3", "reference", True),
    ]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
        assert {"shape", "dtype", "device", "torch", "triton", "commit", "worst_error"} <= row.keys()


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(x, weight, *, activation):
        y = depthwise_conv3x3_reference(x, weight, activation=activation)
        return y if x.dtype == torch.float64 else 1.001 * y

    monkeypatch.setattr(operator, "depthwise_conv3x3_reference", faulty)
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(1, 4, 5, 6)], min_seconds=0.01)
