"""gated_depthwise: the reference against the equations, the kernels against it, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.kernels import gated_depthwise as operator
from vision_gates.kernels.gated_depthwise import bench, gated_depthwise
from vision_gates.kernels.gated_depthwise.reference import gated_depthwise_reference

NAMES = ("y", "dx", "dgate", "dweight", "dbias")
SCALE = 0.7
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

# (B, H, W, C) and K: several images in a block; one pixel; strips that overlap, whole strips, a strip's halo that is
# partly outside; two blocks of channels; an image smaller than the taps.
SMALL_CASES = [
    ((3, 2, 5, 3), 3),
    ((1, 1, 1, 1), 7),
    ((1, 9, 2, 2), 7),
    ((2, 14, 1, 1), 5),
    ((1, 10, 2, 2), 3),
    ((1, 2, 3, 33), 3),
]
MODEL_SHAPES = [(32, 56, 56, 32), (32, 28, 28, 128), (128, 14, 14, 32), (128, 14, 14, 256), (64, 7, 7, 512)]
ODD_SHAPES = [(5, 7, 7, 24), (2, 1, 300, 40), (2, 301, 1, 24), (3, 33, 17, 31), (1, 17, 9, 1), (70000, 1, 1, 2)]


def make(shape=(2, 5, 6, 3), K=3, *, device="cpu", dtype=torch.float32, weight_dtype=None, seed=0):
    """[x, gate, weight, bias] and an upstream gradient."""
    rng = torch.Generator().manual_seed(seed)
    x, gate, dy = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(3))
    weight, bias = torch.randn(shape[-1], 1, K, K, generator=rng) / K, torch.randn(shape[-1], generator=rng)
    return [x, gate, *(tensor.to(device, weight_dtype or dtype) for tensor in (weight, bias))], dy


def run(function, tensors, dy, **kwargs):
    """The output and the gradients, None for an absent gate or bias."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
    y = function(*leaves, **kwargs)
    gradients = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], dy.to(y.dtype)))
    return [y.detach(), *(None if x is None else next(gradients) for x in leaves)]


def kernels(tensors, dy, **kwargs):
    return run(gated_depthwise, tensors, dy, **({"scale": SCALE, "backend": "triton"} | kwargs))


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def assert_same(got, wanted):
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def assert_as_good_as_reference(got, tensors, dy, factor=2.0):
    """Each error is at most twice that of plain PyTorch in the same dtype, plus 1e-6.

    The bias gradient of few channels is few numbers, whose roundings may happen to cancel: one more is allowed.
    """
    rounding = torch.finfo(dy.dtype).eps / 2 if dy.dtype != torch.float32 else 0.0
    doubles = [x if x is None else x.double() for x in tensors]
    wanted = run(gated_depthwise_reference, doubles, dy.double(), scale=SCALE)
    plain = run(gated_depthwise_reference, tensors, dy, scale=SCALE)
    for name, a, b, c in zip(NAMES, got, plain, wanted, strict=True):
        if c is None:
            assert a is None, name
            continue
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        assert a.is_contiguous(), name
        slack = 1e-6 + (rounding if name == "dbias" else 0.0)
        assert error(a, c) <= factor * error(b, c) + slack, f"{name}: {error(a, c):.2e}, PyTorch {error(b, c):.2e}"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing was written to holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 24, result.stdout


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("K", [1, 3, 5])
def test_reference_equation(K):
    (x, gate, weight, bias), _ = make(K=K, dtype=torch.float64)
    B, H, W, C = x.shape
    wanted = bias.expand(x.shape).clone()
    for h in range(H):
        for w in range(W):
            for i in range(K):
                for j in range(K):
                    if 0 <= h + i - K // 2 < H and 0 <= w + j - K // 2 < W:
                        wanted[:, h, w] += weight[:, 0, i, j] * x[:, h + i - K // 2, w + j - K // 2]
    torch.testing.assert_close(gated_depthwise(x, gate, weight, bias, scale=SCALE), gate * SCALE * wanted)
    torch.testing.assert_close(gated_depthwise(x, None, weight, bias), wanted)


def test_reference_is_the_step_of_hornet():
    conv = nn.Conv2d(6, 6, kernel_size=7, padding=3, groups=6)
    x, gate = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    wanted = gate * (conv(x.permute(0, 3, 1, 2)) * 0.25).permute(0, 2, 3, 1)
    got = gated_depthwise(x, gate, conv.weight, conv.bias, scale=0.25)
    torch.testing.assert_close(got, wanted)
    assert got.is_contiguous()


def test_reference_gradients():
    tensors, _ = make((1, 2, 3, 2), dtype=torch.float64)
    arguments = tuple(x.requires_grad_() for x in tensors)
    assert torch.autograd.gradcheck(lambda *tensors: gated_depthwise(*tensors, scale=SCALE), arguments)


def test_reference_takes_float32_weights_beside_half_maps():
    (x, gate, weight, bias), _ = make(dtype=torch.bfloat16, weight_dtype=torch.float32)
    got = gated_depthwise(x, gate, weight, bias)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, gated_depthwise(x, gate, weight.bfloat16(), bias.bfloat16()))


def test_reference_under_autocast():
    (x, gate, weight, bias), _ = make()
    wanted = gated_depthwise(*(tensor.bfloat16() for tensor in (x, gate, weight, bias)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_depthwise(x, gate, weight, bias), wanted)
        assert torch.equal(gated_depthwise(x, gate.bfloat16(), weight, bias), wanted)


class _Module(nn.Module):
    def forward(self, x, gate, weight, bias):
        return gated_depthwise(x, gate, weight, bias, scale=SCALE)


def test_export_with_dynamic_sizes():
    tensors, _ = make()
    sizes = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(_Module(), tuple(tensors), dynamic_shapes=(sizes, sizes, None, None))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)  # plain operators only
    tensors, _ = make((3, 9, 4, 3), seed=1)
    torch.testing.assert_close(program.module()(*tensors), gated_depthwise(*tensors, scale=SCALE))


# ------------------------------------------------------------------------------------------------------------ kernels


@either_device
@pytest.mark.parametrize(("shape", "K"), SMALL_CASES)
def test_small_shapes(shape, K, device, poisoned):
    tensors, dy = make(shape, K, device=device)
    assert_as_good_as_reference(kernels(tensors, dy), tensors, dy)


@either_device
@pytest.mark.parametrize("absent", [(1,), (3,), (1, 3)], ids=["gate", "bias", "gate and bias"])
def test_absent_arguments(absent, device, poisoned):
    tensors, dy = make((1, 3, 4, 3), device=device)
    tensors = [None if i in absent else x for i, x in enumerate(tensors)]
    assert_as_good_as_reference(kernels(tensors, dy), tensors, dy)


@either_device
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_half(dtype, weight_dtype, device, poisoned):
    tensors, dy = make((2, 3, 5, 3), device=device, dtype=dtype, weight_dtype=weight_dtype)
    # The interpreter cuts bfloat16 off instead of rounding it: twice the error, in dd and again in dx.
    factor = 4.0 if INTERPRETED and dtype == torch.bfloat16 else 2.0
    assert_as_good_as_reference(kernels(tensors, dy), tensors, dy, factor)


@on_gpu
@pytest.mark.parametrize("K", [3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_model_shapes(shape, dtype, K, device, poisoned):
    tensors, dy = make(shape, K, device=device, dtype=dtype)
    assert_as_good_as_reference(kernels(tensors, dy, backend=None), tensors, dy)


@on_gpu
@pytest.mark.parametrize("H", range(1, 20))
def test_every_height(H, device, poisoned):
    tensors, dy = make((2, H, 5, 8), 7, device=device, dtype=torch.bfloat16, weight_dtype=torch.float32)
    assert_as_good_as_reference(kernels(tensors, dy), tensors, dy)


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, dy = make((1, 3, 4, 3), device=device)
    right = kernels(tensors, dy)
    for i, name in enumerate(NAMES):
        got = list(right)
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, dy)


@either_device
def test_strides_do_not_matter(device):
    (x, gate, weight, bias), dy = make((2, 3, 2, 4), device=device)
    wanted = kernels([x, gate, weight, bias], dy)

    def slices(x):  # of a wider projection, of a larger map
        return F.pad(x, (3, 5, 1, 2, 1, 1))[:, 1:-1, 1:-2, 3:-5]

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def channels_first(x):
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    for stride in (slices, transposed, channels_first):
        assert_same(kernels([stride(x), stride(gate), weight, bias], stride(dy)), wanted)


@either_device
def test_slices_are_not_copied(device, monkeypatch):
    (wide, _, weight, bias), _ = make((1, 3, 2, 8), device=device)
    x, gate = wide.split(4, dim=-1)
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.shape) or contiguous(x))
    gated_depthwise(x, gate, weight[:4], bias[:4], backend="triton")
    assert x.shape not in copied


@either_device
def test_expanded_tensors(device):
    (x, gate, weight, bias), _ = make((1, 3, 4, 3), device=device)
    tensors = [x.expand(2, 3, 4, 3), gate[:, :1].expand(2, 3, 4, 3), weight[:1].expand(3, 1, 3, 3), bias[:1].expand(3)]
    dy = torch.ones((), device=device).expand(2, 3, 4, 3)
    assert_as_good_as_reference(kernels(tensors, dy), tensors, dy)


@either_device
def test_only_what_needs_a_gradient_gets_one(device):
    tensors, dy = make((1, 1, 2, 2), device=device)
    wanted = kernels(tensors, dy)
    for i, gradient in enumerate(wanted[1:]):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        y = gated_depthwise(*leaves, scale=SCALE, backend="triton")
        assert torch.equal(torch.autograd.grad(y, leaves[i], dy)[0], gradient)
    with torch.no_grad():
        assert not gated_depthwise(*leaves, backend="triton").requires_grad


@either_device
def test_no_images(device):
    tensors, dy = make((0, 3, 4, 3), device=device)
    y, dx, dgate, dweight, dbias = kernels(tensors, dy)
    assert y.shape == dx.shape == dgate.shape == (0, 3, 4, 3) and not dweight.any() and not dbias.any()


@either_device
def test_more_strips_and_blocks_than_programs(device, monkeypatch):
    from vision_gates.kernels.gated_depthwise import kernel

    tensors, dy = make((3, 3, 5, 2), device=device)
    monkeypatch.setattr(kernel, "_TAP_ROWS", 2)
    monkeypatch.setattr(kernel, "_TAP_PROGRAMS", 2)
    assert_as_good_as_reference(kernels(tensors, dy), tensors, dy)


@either_device
def test_tiles_do_not_matter(device, monkeypatch):
    from vision_gates.kernels.gated_depthwise import kernel

    tensors, dy = make((1, 4, 5, 9), device=device, dtype=torch.float16)
    wanted = kernels(tensors, dy)
    monkeypatch.setattr(kernel, "_CONV_TILE", {"BLOCK_P": 8, "BLOCK_C": 32, "num_warps": 2})
    assert_same(kernels(tensors, dy), wanted)


@either_device
def test_autocast(device):
    (x, gate, weight, bias), _ = make((1, 2, 3, 2), device=device)
    with torch.autocast(device, torch.bfloat16):
        got = gated_depthwise(x, gate.bfloat16(), weight, bias, backend="triton")
    assert torch.equal(got, gated_depthwise(x.bfloat16(), gate.bfloat16(), weight, bias, backend="triton"))


@either_device
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "without gate and bias"])
def test_opcheck(whole, device):
    from vision_gates.kernels.gated_depthwise.kernel import _operator

    tensors, _ = make((1, 1, 1, 2), device=device, dtype=torch.float16, weight_dtype=torch.float32)
    tensors = [x.requires_grad_() if whole or i in (0, 2) else None for i, x in enumerate(tensors)]
    torch.library.opcheck(_operator, (*tensors, SCALE))


@either_device
def test_compiled_is_eager(device):
    (wide, _, weight, bias), dy = make((1, 3, 4, 8), device=device)
    tensors, dy = [wide, weight[:4], bias[:4]], dy[..., :4]

    def function(wide, weight, bias):
        x, gate = (2 * wide).split(4, dim=-1)
        return gated_depthwise(x, gate, weight, bias, scale=SCALE, backend="triton")

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        pair = [run(f, tensors, dy) for f in (function, compiled)]
    assert pair[0][0].dtype == torch.bfloat16
    assert_same(*pair)


@either_device
def test_same_bits_every_time(device):
    shape = (16, 28, 28, 64) if device == "cuda" else (1, 2, 5, 3)
    tensors, dy = make(shape, device=device, dtype=torch.float16)
    first = kernels(tensors, dy)
    for _ in range(5 if device == "cuda" else 1):
        assert_same(kernels(tensors, dy), first)


@on_gpu
def test_cuda_graph(device):
    tensors, dy = make((4, 14, 14, 64), 7, device=device, dtype=torch.bfloat16)
    kernels(tensors, dy)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels(tensors, dy)
    tensors[0].mul_(0.5)
    graph.replay()
    assert_same(captured, kernels(tensors, dy))


@on_gpu
def test_offsets_beyond_two_to_the_31(device):
    """The last image of a tensor of more than 2**31 elements, forward and backward."""
    B, H, W, C = 170, 256, 256, 193
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    assert B * H * W * C > 2**31
    x, gate, dy = (torch.zeros((B, H, W, C), device=device, dtype=torch.bfloat16) for _ in range(3))
    (x[-1:], gate[-1:], weight, bias), dy[-1:] = make((1, H, W, C), device=device, dtype=torch.bfloat16)
    got = kernels([x, gate, weight, bias], dy)
    wanted = kernels([x[-1:], gate[-1:], weight, bias], dy[-1:])
    assert all(torch.equal(a[-1:], b) for a, b in zip(got[:3], wanted[:3], strict=True))
    assert all(error(a, b.double()) < 1e-2 for a, b in zip(got[3:], wanted[3:], strict=True))


@on_gpu
def test_sizes_do_not_compile_again(device):
    from vision_gates.kernels.gated_depthwise import kernel

    def variants():
        jits = (kernel._conv_kernel, kernel._tap_kernel, kernel._sum_kernel)
        return [len(caches[0]) for jit in jits for caches in jit.device_caches.values()]

    def visit(shape):
        kernels(*make(shape, 7, device=device, dtype=torch.bfloat16))

    visit((2, 14, 14, 64))
    before = variants()
    for shape in ((1, 21, 16, 64), (3, 7, 1, 64), (16, 14, 7, 64)):
        visit(shape)
    assert variants() == before


# ------------------------------------------------------------------------------------------------ arguments and bench

_X, _WEIGHT = torch.zeros(2, 5, 6, 3), torch.zeros(3, 1, 3, 3)


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("x", None, TypeError, "x must be a tensor, got NoneType"),
        ("gate", 1.0, TypeError, "gate must be a tensor, got float"),
        ("x", torch.zeros(2, 5, 3), ValueError, r"x must have shape \(B, H, W, C\) .* got \(2, 5, 3\)"),
        ("x", torch.zeros(2, 0, 5, 3), ValueError, r"with H, W and C at least 1, got \(2, 0, 5, 3\)"),
        ("gate", torch.zeros(2, 5, 1, 3), ValueError, r"gate must have x's shape \(2, 5, 6, 3\), got \(2, 5, 1, 3\)"),
        ("weight", torch.zeros(4, 1, 3, 3), ValueError, r"weight must have shape \(3, 1, K, K\) .* got \(4, 1, 3, 3\)"),
        ("weight", torch.zeros(3, 1, 4, 4), ValueError, r"with an odd K to fit x, got \(3, 1, 4, 4\)"),
        ("weight", torch.zeros(3, 1, 3, 5), ValueError, r"with an odd K to fit x, got \(3, 1, 3, 5\)"),
        ("weight", torch.zeros(()), ValueError, r"with an odd K to fit x, got \(\)"),
        ("bias", torch.zeros(4), ValueError, r"bias must have shape \(3,\) to fit x, got \(4,\)"),
        ("x", _X.long(), TypeError, "x must be float64, .* got torch.int64"),
        ("gate", _X.half(), TypeError, "gate must be torch.float32 like x, got torch.float16"),
        ("weight", _WEIGHT.half(), TypeError, "weight must be torch.float32 like x, got torch.float16"),
        ("bias", torch.zeros(3).double(), TypeError, "bias must be torch.float32 like x, got torch.float64"),
        ("gate", _X.to("meta"), ValueError, "gate must be on x's device cpu, got meta"),
        ("weight", _WEIGHT.to("meta"), ValueError, "weight must be on x's device cpu, got meta"),
    ],
)
def test_bad_arguments(name, value, kind, message):
    tensors = dict(zip(("x", "gate", "weight", "bias"), make()[0], strict=True))
    with pytest.raises(kind, match=message):
        gated_depthwise(**(tensors | {name: value}))


def test_half_maps_take_no_other_half_weights():
    (x, gate, weight, bias), _ = make(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="weight must be torch.bfloat16 like x or torch.float32, got torch.float16"):
        gated_depthwise(x, gate, weight.half(), bias)


def test_backends(monkeypatch):
    tensors, _ = make()
    assert torch.equal(gated_depthwise(*tensors), gated_depthwise(*tensors, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        gated_depthwise(*tensors, backend="cuda")
    monkeypatch.setattr(operator, "_INTERPRETED", False)
    if operator._HAS_TRITON:
        with pytest.raises(TypeError, match="no float64"):
            gated_depthwise(*(x.double() for x in tensors), backend="triton")
        with pytest.raises(ValueError, match="K up to 7, got 9"):
            gated_depthwise(*make(K=9)[0], backend="triton")
        with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
            gated_depthwise(*tensors, backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        gated_depthwise(*tensors, backend="triton")


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(1, 4, 5, 6)], min_seconds=0.01)
    assert [(row["op"], row["backend"]) for row in rows] == [("gated_depthwise", "reference")]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
        assert {"shape", "kernel_size", "dtype", "device", "torch", "triton", "commit", "worst_error"} <= row.keys()


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(x, *args, **kwargs):
        y = gated_depthwise_reference(x, *args, **kwargs)
        return y if x.dtype == torch.float64 else 1.001 * y

    monkeypatch.setattr(operator, "gated_depthwise_reference", faulty)
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(1, 4, 5, 6)], min_seconds=0.01)
