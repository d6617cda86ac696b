"""positional_attention: the reference against the dense matrix, the kernels against both, on a GPU and interpreted."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from vision_gates.gates.gated_positional_attention import GatedPositionalSelfAttention
from vision_gates.kernels import positional_attention as operator
from vision_gates.kernels.positional_attention import bench, positional_attention
from vision_gates.kernels.positional_attention.reference import positional_attention_reference

ARGUMENTS = ("content_BNhD", "v_BNhD", "rows_hHH", "columns_hWW", "gate_h")
NAMES = ("out", "dcontent", "dv", "drows", "dcolumns", "dgate")
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

# (B, H, W, h, D)
SMALL_SHAPES = [(2, 1, 1, 1, 1), (1, 1, 5, 3, 8), (3, 3, 4, 1, 12), (2, 5, 2, 2, 16), (1, 17, 3, 1, 17)]
MODEL_SHAPES = [(16, 14, 14, 4, 48), (4, 14, 14, 9, 48), (3, 32, 32, 4, 48), (1, 64, 64, 2, 48)]
ODD_SHAPES = [
    (2, 7, 7, 3, 32), (1, 1, 512, 1, 64), (1, 300, 2, 2, 24), (2, 33, 65, 1, 40), (1, 17, 31, 5, 1), (1, 5, 9, 1, 256),
    (900, 2, 2, 1, 8), (1, 100, 100, 1, 16),
]  # fmt: skip
HALF_CASES = [(shape, torch.bfloat16) for shape in SMALL_SHAPES + MODEL_SHAPES + ODD_SHAPES]
CASES = HALF_CASES + [(x, dtype) for dtype in (torch.float32, torch.float16) for x in MODEL_SHAPES + ODD_SHAPES[3:5]]


def make(shape=(2, 3, 4, 2, 5), *, device="cpu", dtype=torch.float32, seed=0):
    """[content, v, rows, columns, gate] as the gate makes them, and an upstream gradient."""
    B, H, W, h, D = shape
    rng = torch.Generator().manual_seed(seed)
    content = torch.randn(B, h, H * W, D, generator=rng).to(device, dtype).transpose(1, 2)
    v = torch.randn(B, H * W, 3, h, D, generator=rng).to(device, dtype)[:, :, 2]
    dout = torch.randn(B, H * W, h, D, generator=rng).to(device, dtype)
    rows, columns = ((2 * torch.randn(h, size, size, generator=rng)).softmax(-1) for size in (H, W))
    tables = (rows, columns, torch.rand(h, generator=rng))
    return [content, v, *(x.to(device, torch.promote_types(dtype, torch.float32)) for x in tables)], dout


def run(function, tensors, dout, **kwargs):
    """The output and the five gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def dense(content, v, rows, columns, gate):
    """The definition, with a matrix of all pairs of tokens."""
    pairs = torch.stack([torch.kron(a, b) for a, b in zip(rows, columns, strict=True)])
    position = torch.einsum("hnm,bmhd->bnhd", pairs, v)
    return (1 - gate[:, None]) * content + gate[:, None] * position


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def assert_as_good_as_reference(got, tensors, dout):
    """Each error is at most twice that of plain PyTorch in the same dtype, plus 1e-6.

    That of dgate, a number a head, may be nothing by luck: it is held to that of dcolumns, a sum of the same products.
    """
    doubles = [x.double() for x in tensors]
    definition = dense if tensors[0].shape[1] <= 1024 else positional_attention_reference
    wanted = run(definition, doubles, dout.double())
    plain = run(positional_attention_reference, tensors, dout)
    errors = [error(b, c) for b, c in zip(plain, wanted, strict=True)]
    errors[-1] = max(errors[-2:])
    for name, a, b, c, limit in zip(NAMES, got, plain, wanted, errors, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        assert error(a, c) <= 2 * limit + 1e-6, f"{name}: {error(a, c):.2e}, PyTorch {limit:.2e}"
    assert got[0].is_contiguous()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing was written to holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


@pytest.fixture
def small_blocks(monkeypatch):
    """Grids of more than 16 tokens a side take several blocks."""
    from vision_gates.kernels.positional_attention import kernel

    monkeypatch.setattr(kernel, "_BLOCK", 16)


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 26, result.stdout


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_reference_is_the_dense_matrix(shape):
    tensors, dout = make(shape, dtype=torch.float64)
    pairs = zip(run(positional_attention, tensors, dout), run(dense, tensors, dout), strict=True)
    for name, (got, wanted) in zip(NAMES, pairs, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_reference_gradients():
    tensors, _ = make((1, 2, 3, 2, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(positional_attention, [x.requires_grad_() for x in tensors])


def test_the_layer_is_the_dense_definition():
    """ConViT's layer, which calls the operator, against attention matrices of all pairs of tokens."""
    layer = GatedPositionalSelfAttention(12, num_heads=3).double()
    torch.nn.init.normal_(layer.pos_weight)
    x = torch.randn(2, 5, 4, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 3, 4)).unbind(2)
    content = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 2).softmax(-1)
    position = torch.stack([torch.kron(*tables) for tables in zip(*layer.positional_attention(5, 4), strict=True)])
    gate = layer.gate[:, None, None]
    mixed = torch.einsum("bhnm,bmhd->bnhd", (1 - gate) * content + gate * position, v)
    torch.testing.assert_close(layer(x), layer.proj(mixed.flatten(2)).unflatten(1, (5, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_under_autocast(dtype):
    (content, v, *tables), _ = make(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = positional_attention(content, v, *tables)
    assert torch.equal(got, positional_attention(content.bfloat16(), v.bfloat16(), *tables))


class _Module(nn.Module):
    def forward(self, *tensors):
        return positional_attention(*tensors)


def test_export_with_dynamic_sizes():
    tensors, _ = make((2, 3, 4, 2, 5))
    program = torch.export.export(
        _Module(), tuple(tensors), dynamic_shapes=(tuple({0: torch.export.Dim.AUTO} for _ in tensors),)
    )
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)  # plain operators only
    tensors, _ = make((3, 3, 4, 2, 5), seed=1)
    torch.testing.assert_close(program.module()(*tensors), positional_attention(*tensors))


def test_onnx():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    tensors, _ = make()
    model = torch.onnx.export(
        _Module().eval(), tuple(tensors), dynamo=True, verbose=False
    ).model_proto.SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), tensors, strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, inputs)[0]), positional_attention(*tensors))


# ------------------------------------------------------------------------------------------------------------ kernels


@either_device
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_small_shapes(shape, device, poisoned):
    tensors, dout = make(shape, device=device)
    got = run(positional_attention, tensors, dout, backend="triton")
    assert_as_good_as_reference(got, tensors, dout)


@either_device
@pytest.mark.parametrize("shape", [(1, 17, 3, 1, 3), (2, 2, 18, 1, 9)])
def test_several_blocks(shape, device, poisoned, small_blocks):
    tensors, dout = make(shape, device=device, dtype=torch.float16)
    got = run(positional_attention, tensors, dout, backend="triton")
    assert_as_good_as_reference(got, tensors, dout)


@either_device
def test_half(device, poisoned):
    """float16: the interpreter multiplies the bits of bfloat16 matrices as integers."""
    tensors, dout = make((2, 5, 3, 2, 12), device=device, dtype=torch.float16)
    got = run(positional_attention, tensors, dout, backend="triton")
    assert_as_good_as_reference(got, tensors, dout)


@on_gpu
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_all_shapes(shape, dtype, device, poisoned):
    tensors, dout = make(shape, device=device, dtype=dtype)
    got = run(positional_attention, tensors, dout)
    assert_as_good_as_reference(got, tensors, dout)


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, dout = make((1, 3, 4, 1, 3), device=device)
    right = run(positional_attention, tensors, dout, backend="triton")
    for i, name in enumerate(NAMES):
        got = list(right)
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, dout)


@either_device
@pytest.mark.parametrize("side", [3, 17])
def test_strides_do_not_matter(side, device, small_blocks):
    tensors, dout = make((1, side, 2, 2, 2), device=device)
    tensors, dout = [x.contiguous() for x in tensors], dout.contiguous()
    wanted = run(positional_attention, tensors, dout, backend="triton")

    def packed(x):
        return torch.stack((x, x + 1, x - 1), dim=2)[:, :, 0] if x.ndim == 4 else x

    def heads_first(x):
        return x.transpose(0, -2).contiguous().transpose(0, -2) if x.ndim > 1 else x

    def channels_first(x):
        return x.transpose(1, -1).contiguous().transpose(1, -1) if x.ndim > 1 else x

    for stride in (packed, heads_first, channels_first) if side == 3 else (packed,):
        got = run(positional_attention, [stride(x) for x in tensors], stride(dout), backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), stride.__name__


@either_device
def test_expanded_tensors(device):
    (content, v, rows, columns, gate), _ = make((1, 3, 4, 1, 4), device=device)
    content, v, gate = content.expand(2, -1, 2, -1), v.expand(2, -1, 2, -1), gate.expand(2)
    tensors = [content, v, rows.expand(2, -1, -1), columns.expand(2, -1, -1), gate]
    dout = torch.ones((), device=device).expand(content.shape)
    assert_as_good_as_reference(run(positional_attention, tensors, dout, backend="triton"), tensors, dout)


@either_device
@pytest.mark.parametrize("side", [3, 17])
def test_wide_offsets(side, device, monkeypatch, small_blocks):
    from vision_gates.kernels.positional_attention import kernel

    tensors, dout = make((1, side, 1, 1, 3), device=device)
    wanted = run(positional_attention, tensors, dout, backend="triton")
    monkeypatch.setattr(kernel, "_is_wide", lambda *_: True)
    got = run(positional_attention, tensors, dout, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@either_device
def test_only_what_needs_a_gradient_gets_one(device):
    tensors, dout = make((1, 3, 2, 1, 2), device=device)
    wanted = run(positional_attention, tensors, dout, backend="triton")[1:]
    for i, gradient in enumerate(wanted):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        out = positional_attention(*leaves, backend="triton")
        assert torch.equal(torch.autograd.grad(out, leaves[i], dout)[0], gradient), NAMES[i + 1]
    with torch.no_grad():
        assert not positional_attention(*leaves, backend="triton").requires_grad


@either_device
@pytest.mark.parametrize("side", [3, 17])
def test_no_images(side, device, small_blocks):
    tensors, dout = make((0, side, 2, 2, 4), device=device)
    out, dcontent, dv, *dtables = run(positional_attention, tensors, dout, backend="triton")
    assert out.shape == dcontent.shape == dv.shape == dout.shape and not any(x.any() for x in dtables)


@either_device
@pytest.mark.parametrize("side", [3, 17])
def test_more_items_than_programs(side, device, monkeypatch, small_blocks):
    from vision_gates.kernels.positional_attention import kernel

    monkeypatch.setattr(kernel, "_IMAGE_PROGRAMS", {4: 2, 8: 2})
    monkeypatch.setattr(kernel, "_TABLE_PROGRAMS", 2)
    tensors, dout = make((3, side, 2, 1, 2), device=device)
    assert_as_good_as_reference(run(positional_attention, tensors, dout, backend="triton"), tensors, dout)


@either_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast(dtype, device):
    (content, v, *tables), _ = make((1, 2, 3, 1, 2), device=device, dtype=dtype)
    with torch.autocast(device, torch.float16):
        got = positional_attention(content, v, *tables, backend="triton")
    assert got.dtype == torch.float16
    assert torch.equal(got, positional_attention(content.half(), v.half(), *tables, backend="triton"))


@either_device
@pytest.mark.parametrize("side", [2, 17])
def test_opcheck(side, device, small_blocks):
    from vision_gates.kernels.positional_attention.kernel import _operator

    tensors, _ = make((1, side, 2, 1, 2), device=device, dtype=torch.float16)
    torch.library.opcheck(_operator, tuple(x.requires_grad_() for x in tensors))


@either_device
@pytest.mark.parametrize("side", [2, 17])
def test_compiled_is_eager(side, device, small_blocks):
    (_, _, *tables), dout = make((1, side, 3, 1, 8), device=device, dtype=torch.float16)
    packed = torch.randn(1, side * 3, 3, 1, 8, device=device, dtype=torch.float16)

    def function(packed, *tables):
        content, _, v = packed.unbind(2)
        return positional_attention(content, v, *tables, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for got, wanted in zip(*(run(f, [packed, *tables], dout) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # Inductor adds parts up in its own order


@on_gpu
@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_same_bits_every_time(shape, device):
    tensors, dout = make(shape, device=device, dtype=torch.bfloat16)
    first = run(positional_attention, tensors, dout)
    for _ in range(5):
        again = run(positional_attention, tensors, dout)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, in test_kernels_in_the_interpreter")
def test_same_bits_twice_in_the_interpreter():
    tensors, dout = make((2, 3, 2, 1, 3))
    pair = [run(positional_attention, tensors, dout, backend="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@on_gpu
def test_nothing_is_copied(device):
    """Forward and backward allocate their results, parts of the tables' gradients, and no copy of their arguments."""
    tensors, dout = make((64, 14, 14, 4, 48), device=device, dtype=torch.bfloat16)
    run(positional_attention, tensors, dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(positional_attention, tensors, dout)
    assert torch.cuda.max_memory_allocated() - before < 3.9 * dout.nbytes


@on_gpu
def test_cuda_graph(device):
    tensors, dout = make((4, 14, 14, 4, 48), device=device, dtype=torch.bfloat16)
    run(positional_attention, tensors, dout)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(positional_attention, tensors, dout)
    tensors[1].mul_(0.5)
    graph.replay()
    wanted = run(positional_attention, tensors, dout)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@on_gpu
@pytest.mark.parametrize("shape", [(2800, 32, 32, 8, 96), (43, 512, 512, 2, 96)])
def test_offsets_beyond_two_to_the_31(shape, device):
    """The last image of a tensor of more than 2**31 elements, forward and backward."""
    B, H, W, h, D = shape
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    content, v, dout = (torch.zeros((B, H * W, h, D), device=device, dtype=torch.bfloat16) for _ in range(3))
    assert v.numel() > 2**31
    (content[-1:], v[-1:], *tables), dout[-1:] = make((1, *shape[1:]), device=device, dtype=torch.bfloat16)
    got = run(positional_attention, [content, v, *tables], dout)
    wanted = run(positional_attention, [content[-1:], v[-1:], *tables], dout[-1:])
    assert all(torch.equal(a[-1:], b) for a, b in zip(got[:3], wanted[:3], strict=True))
    assert all(error(a, b.double()) < 1e-5 for a, b in zip(got[3:], wanted[3:], strict=True))


@on_gpu
def test_sizes_do_not_compile_again(device):
    from vision_gates.kernels.positional_attention import kernel

    def variants():
        kernels = (kernel._forward_kernel, kernel._backward_kernel)
        return [len(caches[0]) for jit in kernels for caches in jit.device_caches.values()]

    def visit(shape):
        run(positional_attention, *make(shape, device=device, dtype=torch.bfloat16))

    visit((2, 14, 14, 4, 48))
    before = variants()
    for shape in ((1, 16, 16, 4, 48), (3, 2, 9, 4, 48), (16, 13, 7, 9, 48)):
        visit(shape)
    assert variants() == before


# ------------------------------------------------------------------------------------------------ arguments and bench


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("content_BNhD", None, TypeError, "content_BNhD must be a tensor, got NoneType"),
        ("gate_h", 0.5, TypeError, "gate_h must be a tensor, got float"),
        ("content_BNhD", torch.zeros(2, 12, 5), ValueError, r"content_BNhD must have shape \(B, N, h, D\).*\(2, 12, 5"),
        ("content_BNhD", torch.zeros(2, 12, 2, 0), ValueError, r"with N, h and D at least 1, got \(2, 12, 2, 0\)"),
        ("content_BNhD", torch.zeros(2, 12, 2, 5, dtype=torch.int64), TypeError, "must be float64, .* got torch.int64"),
        ("v_BNhD", torch.zeros(2, 12, 2, 6), ValueError, r"content's shape \(2, 12, 2, 5\), got \(2, 12, 2, 6\)"),
        ("v_BNhD", torch.zeros(2, 12, 2, 5).half(), TypeError, "v_BNhD must be torch.float32 .* got torch.float16"),
        ("rows_hHH", torch.zeros(2, 3, 4), ValueError, "rows_hHH must be a square table for each of 2 heads, got"),
        ("columns_hWW", torch.zeros(3, 4, 4), ValueError, "columns_hWW must be a square table for each of 2 heads"),
        ("rows_hHH", torch.zeros(2, 4, 4), ValueError, "a grid of 4 rows and 4 columns, by the tables, .* 12 tokens"),
        ("columns_hWW", torch.zeros(2, 4, 4).half(), TypeError, "columns_hWW must be torch.float32 beside .*float16"),
        ("gate_h", torch.zeros(3), ValueError, r"gate_h must have shape \(2,\), one for each head, got \(3,\)"),
        ("gate_h", torch.zeros(2).double(), TypeError, "gate_h must be torch.float32 beside .* got torch.float64"),
        ("gate_h", torch.zeros(2, device="meta"), ValueError, "gate_h must be on content's device cpu, got meta"),
    ],
)
def test_bad_arguments(name, value, kind, message):
    tensors = dict(zip(ARGUMENTS, make()[0], strict=True))
    with pytest.raises(kind, match=message):
        positional_attention(**(tensors | {name: value}))


def test_backends(monkeypatch):
    tensors, _ = make()
    assert torch.equal(positional_attention(*tensors), positional_attention(*tensors, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        positional_attention(*tensors, backend="cuda")
    monkeypatch.setattr(operator, "_INTERPRETED", False)
    if operator._HAS_TRITON:
        with pytest.raises(TypeError, match="no float64"):
            positional_attention(*(x.double() for x in tensors), backend="triton")
        with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
            positional_attention(*tensors, backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        positional_attention(*tensors, backend="triton")


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(1, 3, 4, 2, 8)], min_seconds=0.01)
    assert [(row["op"], row["backend"]) for row in rows] == [
        ("positional_attention", "reference"),
        ("dense matrix of pairs", "torch"),
    ]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
        assert {"shape", "dtype", "device", "torch", "triton", "commit", "worst_error"} <= row.keys()


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(content, *tensors):
        out = positional_attention_reference(content, *tensors)
        return out if content.dtype == torch.float64 else 1.001 * out

    monkeypatch.setattr(operator, "positional_attention_reference", faulty)
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(1, 3, 4, 2, 8)], min_seconds=0.01)
