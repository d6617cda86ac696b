"""bidirectional_gla: both paths of the reference against the float64 definition, and all that the operator promises."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vision_gates.kernels import bidirectional_gla as operator
from vision_gates.kernels.bidirectional_gla import bench, bidirectional_gla, reference
from vision_gates.kernels.bidirectional_gla.cpu_op import bidirectional_gla_cpu
from vision_gates.kernels.bidirectional_gla.reference import (
    bidirectional_gla_definition,
    bidirectional_gla_reference,
)

NAMES = ("o", "dq", "dk", "dv", "dg_forward", "dg_backward")
TOLERANCE = 1e-5

# Each makes one gate of the given shape; mild ones may take the mild path.
MILD_DECAYS = {
    "none": lambda shape, rng: torch.zeros(shape),
    "vig": lambda shape, rng: F.logsigmoid(torch.randn(shape, generator=rng)) / 16,
    "long_chunk_limit": lambda shape, rng: -1.25 * torch.rand(shape, generator=rng),
    "short_chunk_limit": lambda shape, rng: torch.full(shape, -2.0),
    "mostly_none": lambda shape, rng: torch.where(torch.rand(shape, generator=rng) < 0.1, -1.99, 0.0),
}
HARSH_DECAYS = {
    "uniform_50": lambda shape, rng: torch.full(shape, -50.0),
    "rarely_200": lambda shape, rng: torch.where(torch.rand(shape, generator=rng) < 0.05, -200.0, 0.0),
    "rarely_inf": lambda shape, rng: torch.where(torch.rand(shape, generator=rng) < 0.05, -math.inf, -0.01),
    "often_inf": lambda shape, rng: torch.where(torch.rand(shape, generator=rng) < 0.7, -math.inf, -0.5),
    "all_scales": lambda shape, rng: -torch.exp(4 * torch.randn(shape, generator=rng)),
    "inf": lambda shape, rng: torch.full(shape, -math.inf),
}
DECAYS = MILD_DECAYS | HARSH_DECAYS
PATHS = [(decays, "mild") for decays in MILD_DECAYS] + [(decays, "safe") for decays in DECAYS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(shape=(2, 100, 2, 8, 12), decays="vig", seed=0):
    """[q, k, v, g_forward, g_backward] and an upstream gradient, float32."""
    n_batch, n_tokens, n_heads, key_size, value_size = shape
    rng = torch.Generator().manual_seed(seed)
    key_shape, value_shape = (n_batch, n_tokens, n_heads, key_size), (n_batch, n_tokens, n_heads, value_size)
    q, k = (torch.randn(key_shape, generator=rng) for _ in range(2))
    v, do = (torch.randn(value_shape, generator=rng) for _ in range(2))
    return [q, k, v, *(DECAYS[decays](key_shape, rng) for _ in range(2))], do


def run(function, tensors, do, dtype=None, **kwargs):
    """The output and the five gradients."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    o = function(*leaves, **kwargs)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def exact(tensors, do, **kwargs):
    return run(bidirectional_gla_definition, tensors, do, torch.float64, **kwargs)


def assert_right(got, wanted, tolerance=TOLERANCE):
    """The largest error of each tensor is at most `tolerance` of its largest value; zero has to be zero."""
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        assert a.shape == b.shape, name
        assert bool(a.isfinite().all()), f"{name} is not finite"
        error, size = float((a.double() - b).abs().max()), float(b.abs().max())
        assert error <= tolerance * size, f"{name}: error {error:.2e}, largest value {size:.2e}"


def test_definition_is_the_unrolled_sum():
    tensors, _ = make((2, 6, 2, 3, 4), "all_scales")
    q, k, v, gf, gb = (x.double() for x in tensors)
    o = torch.zeros_like(v)
    for t in range(6):
        for s in range(6):
            decays = []
            if s <= t:
                decays.append(gf[:, s + 1 : t + 1].sum(1).exp())
            if s >= t:
                decays.append(gb[:, t:s].sum(1).exp())
            for decay in decays:
                o[:, t] += 0.5 * 3**-0.5 * (q[:, t] * k[:, s] * decay).sum(-1, keepdim=True) * v[:, s]
    torch.testing.assert_close(bidirectional_gla_definition(q, k, v, gf, gb), o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("decays", "path"), PATHS)
def test_float32_agrees_with_the_definition(decays, path):
    tensors, do = make(decays=decays)
    assert_right(run(bidirectional_gla_reference, tensors, do, path=path), exact(tensors, do))


@pytest.mark.parametrize(("decays", "path"), PATHS)
def test_float64_agrees_with_the_definition(decays, path):
    tensors, do = make(decays=decays, seed=1)
    got = run(bidirectional_gla_reference, tensors, do, torch.float64, path=path)
    assert_right(got, exact(tensors, do), tolerance=1e-13)


def test_a_fault_of_a_thousandth_is_seen():
    tensors, do = make()
    wanted = exact(tensors, do)
    assert_right(run(bidirectional_gla_reference, tensors, do), wanted)
    for i, name in enumerate(NAMES):
        got = run(bidirectional_gla_reference, tensors, do)
        got[i] = 1.001 * got[i]
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            assert_right(got, wanted)


def test_decay_gradients_are_relatively_accurate_when_tiny():
    tensors, do = make(decays="uniform_50")
    wanted = exact(tensors, do)
    assert 0 < float(wanted[4].abs().max()) < 1e-18  # else this checks nothing
    assert_right(run(bidirectional_gla, tensors, do), wanted, tolerance=1e-6)


@pytest.mark.parametrize("path", ["mild", "safe"])
@pytest.mark.parametrize("n_tokens", [2, 3, 17, 49, 64, 65, 131, 196])
def test_any_number_of_tokens(n_tokens, path):
    tensors, do = make((2, n_tokens, 2, 4, 5))
    assert_right(run(bidirectional_gla_reference, tensors, do, path=path), exact(tensors, do))


@pytest.mark.parametrize("decays", DECAYS)
def test_one_token(decays):
    tensors, do = make((2, 1, 2, 4, 5), decays)
    got = run(bidirectional_gla, tensors, do)
    assert_right(got, exact(tensors, do))
    assert not got[4].any() and not got[5].any()


@pytest.mark.parametrize("path", ["mild", "safe"])
@pytest.mark.parametrize(
    ("n_tokens", "key_size", "value_size"), [(2, 1, 1), (2, 8, 3), (70, 1, 1), (70, 1, 40), (70, 40, 1)]
)
def test_any_head_size(n_tokens, key_size, value_size, path):
    tensors, do = make((1, n_tokens, 1, key_size, value_size))
    assert_right(run(bidirectional_gla_reference, tensors, do, path=path), exact(tensors, do))


def test_scale():
    tensors, do = make()
    for path in ("mild", "safe"):
        got = run(bidirectional_gla_reference, tensors, do, scale=-2.5, path=path)
        assert_right(got, exact(tensors, do, scale=-2.5))


@pytest.mark.parametrize(("decays", "node"), [("vig", "_MildGLA"), ("mostly_none", "_MildGLA"), ("rarely_inf", "Mul")])
def test_the_decays_choose_the_path(decays, node):
    tensors, _ = make(decays=decays)
    o = bidirectional_gla(*(x.requires_grad_() for x in tensors))
    assert o.grad_fn.name().startswith(node)


def test_nan_is_passed_on():
    tensors, _ = make()
    tensors[3][1, 50, 0, 2] = math.nan
    o = bidirectional_gla(*tensors)
    assert bool(o[1, 50:, 0].isnan().all()) and bool(o[0].isfinite().all()) and bool(o[1, :50].isfinite().all())


def test_the_mild_path_refuses_harsh_decays():
    tensors, _ = make(decays="rarely_200")
    with pytest.raises(ValueError, match="mild path needs .* decays of at least -2"):
        bidirectional_gla_reference(*tensors, path="mild")


@pytest.mark.parametrize("path", ["mild", "safe"])
def test_gradcheck(path, monkeypatch):
    for name in ("_MILD_CHUNK", "_SAFE_CHUNK"):  # several chunks of few tokens
        monkeypatch.setattr(reference, name, 4)
    tensors, _ = make((1, 10, 1, 2, 2))
    leaves = [x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: bidirectional_gla_reference(*x, path=path), leaves, fast_mode=False)


@pytest.mark.parametrize("path", ["mild", "safe"])
def test_strides_do_not_matter(path):
    tensors, do = make((2, 70, 3, 8, 16))
    wanted = exact(tensors, do)
    # As slices of one projection, the layout that models have.
    joined = torch.cat([x.flatten(2) for x in tensors], dim=-1)
    sizes = [x.shape[2] * x.shape[3] for x in tensors]
    slices = [part.unflatten(-1, (3, -1)) for part in joined.split(sizes, dim=-1)]
    do_strided = do.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not any(x.is_contiguous() for x in [*slices, do_strided])
    assert_right(run(bidirectional_gla_reference, slices, do_strided, path=path), wanted)
    # Transposed heads, the layout of attention.
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert_right(run(bidirectional_gla_reference, transposed, do, path=path), wanted)


@pytest.mark.parametrize("path", ["mild", "safe"])
def test_expanded_tensors(path):
    tensors, _ = make((1, 70, 1, 8, 16))
    expanded = [x.expand(3, -1, 2, -1) for x in tensors]
    ones = torch.ones(()).expand(3, 70, 2, 16)  # what o.sum().backward() sends
    assert_right(run(bidirectional_gla_reference, expanded, ones, path=path), exact(expanded, ones))
    leaves = [x.clone().requires_grad_() for x in tensors]
    bidirectional_gla_reference(*(x.expand(3, -1, 2, -1) for x in leaves), path=path).sum().backward()
    one_head = exact(tensors, torch.ones(1, 70, 1, 16))
    assert_right([x.grad / 6 for x in leaves], one_head[1:])


@pytest.mark.parametrize("path", ["mild", "safe"])
def test_no_side_effects_and_repeatable(path):
    tensors, do = make()
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = bidirectional_gla_reference(*leaves, path=path)
    first = torch.autograd.grad(o, leaves, do, retain_graph=True)
    second = torch.autograd.grad(o, leaves, do)
    third = run(bidirectional_gla_reference, tensors, do, path=path)[1:]
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for leaf, x in zip(leaves, tensors, strict=True):
        assert torch.equal(leaf.detach(), x)


@pytest.mark.parametrize("path", ["mild", "safe"])
def test_only_some_need_gradients(path):
    tensors, do = make()
    wanted = exact(tensors, do)
    for i in range(5):
        leaf = tensors[i].clone().requires_grad_()
        o = bidirectional_gla_reference(*tensors[:i], leaf, *tensors[i + 1 :], path=path)
        (got,) = torch.autograd.grad(o, leaf, do)
        assert_right([got], [wanted[i + 1]])


@pytest.mark.parametrize("path", ["mild", "safe"])
@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, gate_dtype, path):
    tensors, do = make()
    tensors = [x.to(dtype) for x in tensors[:3]] + [x.to(gate_dtype or dtype) for x in tensors[3:]]
    do = do.to(dtype)
    got, wanted = run(bidirectional_gla_reference, tensors, do, path=path), exact(tensors, do)
    assert [x.dtype for x in got] == [dtype] + [x.dtype for x in tensors]
    # Only the final rounding may cost more than float32 does.
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        limit = 0.51 * torch.finfo(a.dtype).eps * b.abs() + TOLERANCE * b.abs().max()
        assert bool(((a.double() - b).abs() <= limit).all()), name


@pytest.mark.parametrize("decays", ["vig", "rarely_inf"])
def test_autocast_keeps_float32_products(decays):
    tensors, do = make(decays=decays)
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        o = bidirectional_gla(*leaves)
        half = bidirectional_gla(*(x.bfloat16() for x in leaves))
    assert o.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert_right([o.detach(), *torch.autograd.grad(o, leaves, do)], exact(tensors, do))
    wanted = exact([x.bfloat16() for x in tensors], do)[0]
    assert_right([half.detach()], [wanted], tolerance=2**-8)
    assert torch.is_autocast_enabled("cpu") is False


def test_autocast_during_backward_of_the_mild_path():
    tensors, do = make()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(bidirectional_gla, tensors, do)
    assert_right(got, exact(tensors, do))


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("path", ["mild", "safe"])
def test_memory_is_linear_in_tokens(path):
    def largest_and_saved(n_tokens):
        tensors, do = make((1, n_tokens, 1, 32, 64))
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with _LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(bidirectional_gla_reference, tensors, do, path=path)
        return largest.elements, sum(storages.values())

    largest_1, saved_1 = largest_and_saved(1024)
    largest_2, saved_2 = largest_and_saved(4096)
    assert largest_2 <= 4.01 * largest_1 and saved_2 <= 4.1 * saved_1
    assert largest_2 < 4096 * 4096 // 8


def test_long_sequences():
    tensors, do = make((1, 1030, 1, 4, 4))
    wanted = exact(tensors, do)
    for path in ("mild", "safe"):
        assert_right(run(bidirectional_gla_reference, tensors, do, path=path), wanted)


def test_empty_batch():
    tensors, do = make((0, 20, 2, 4, 8))
    assert [x.shape for x in run(bidirectional_gla, tensors, do)] == [do.shape] + [x.shape for x in tensors]


class _Module(torch.nn.Module):
    def forward(self, q, k, v, gf, gb):
        return bidirectional_gla(q, k, v, gf, gb)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_sees_one_graph(backend):
    compiled = torch.compile(bidirectional_gla, fullgraph=True, backend=backend)
    for decays in ("vig", "rarely_inf"):  # one graph, either path
        tensors, do = make((2, 70, 2, 4, 4), decays)
        assert_right(run(compiled, tensors, do), exact(tensors, do))


def test_compile_on_the_cpu_sees_one_node():
    nodes = []

    def backend(graph_module, example_inputs):
        nodes.extend(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module

    torch.compile(bidirectional_gla, fullgraph=True, dynamic=False, backend=backend)(*make()[0])
    assert len(nodes) == 1 and "bidirectional_gla_cpu" in nodes[0]


@pytest.mark.parametrize("decays", ["vig", "rarely_inf"])
def test_compiled_under_autocast(decays):
    tensors, do = make((2, 70, 2, 4, 4), decays)
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        o = torch.compile(bidirectional_gla, fullgraph=True, backend="aot_eager")(*leaves)
    assert_right([o.detach(), *torch.autograd.grad(o, leaves, do)], exact(tensors, do))


def test_the_safe_path_can_be_traced():
    """What torch.compile sees of CUDA tensors."""
    tensors, do = make((2, 5, 2, 4, 4), "rarely_inf")
    compiled = torch.compile(bidirectional_gla_reference, fullgraph=True, backend="aot_eager")
    assert_right(run(compiled, tensors, do), exact(tensors, do))


@pytest.mark.parametrize("decays", ["vig", "rarely_inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(decays, dtype):
    tensors, _ = make((2, 70, 2, 4, 4), decays)
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    torch.library.opcheck(bidirectional_gla_cpu, (*tensors, 0.5))


@pytest.mark.parametrize(("decays", "strict"), [("vig", False), ("rarely_inf", True)])
def test_export_with_dynamic_batch(decays, strict):
    tensors, _ = make((2, 35, 2, 4, 4), decays)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(_Module(), tuple(tensors), dynamic_shapes=({0: batch},) * 5, strict=strict)
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)  # plain operators only
    for n_batch in (1, 5):
        tensors, do = make((n_batch, 35, 2, 4, 4), decays, seed=2)
        assert_right([program.module()(*tensors)], exact(tensors, do))


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    tensors, _ = make((2, 35, 2, 4, 4), "rarely_inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Module(), tuple(tensors), dynamo=True, dynamic_shapes=({0: "batch"},) * 5, verbose=False
        )
    program.save(tmp_path / "gla.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "gla.onnx")
    names = [x.name for x in session.get_inputs()]
    for decays in ("vig", "rarely_inf", "uniform_50"):
        tensors, do = make((3, 35, 2, 4, 4), decays, seed=3)
        (o,) = session.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
        assert_right([torch.from_numpy(o)], exact(tensors, do))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decays", DECAYS)
def test_reference_on_cuda(decays):
    tensors, do = make(decays=decays)
    got = run(bidirectional_gla, [x.cuda() for x in tensors], do.cuda(), backend="reference")
    assert_right([x.cpu() for x in got], exact(tensors, do))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", None, TypeError, "q must be a tensor, got NoneType"),
        ("q", torch.zeros(2, 5, 8), ValueError, r"q must have shape \(B, N, H, K\), got \(2, 5, 8\)"),
        ("v", torch.zeros(2, 5, 8), ValueError, r"v must have shape \(B, N, H, V\), got \(2, 5, 8\)"),
        ("k", torch.zeros(2, 5, 3, 9), ValueError, r"k must have q's shape \(2, 5, 3, 8\), got \(2, 5, 3, 9\)"),
        ("v", torch.zeros(2, 6, 3, 4), ValueError, r"v must have shape \(2, 5, 3, V\) to fit q, got \(2, 6, 3, 4\)"),
        ("v", torch.zeros(2, 5, 3, 0), ValueError, r"sizes must be at least 1, got .* v \(2, 5, 3, 0\)"),
        ("g_forward", torch.zeros(2, 5, 3, 1), ValueError, r"g_forward must have q's shape .*, got \(2, 5, 3, 1\)"),
        ("g_backward", torch.zeros(1, 5, 3, 8), ValueError, r"g_backward must have q's shape .*, got \(1, 5, 3, 8\)"),
        ("q", torch.zeros(2, 5, 3, 8, dtype=torch.int64), TypeError, "q must be float64, .* got torch.int64"),
        ("k", torch.zeros(2, 5, 3, 8).half(), TypeError, "k must be torch.float32 like q, got torch.float16"),
        ("g_forward", torch.zeros(2, 5, 3, 8).double(), TypeError, "g_forward must be .* got torch.float64"),
        ("v", torch.zeros(2, 5, 3, 4, device="meta"), ValueError, "v must be on q's device cpu, got meta"),
    ],
)
def test_bad_arguments(name, value, error, message):
    tensors = dict(zip(("q", "k", "v", "g_forward", "g_backward"), make((2, 5, 3, 8, 4))[0], strict=True))
    with pytest.raises(error, match=message):
        bidirectional_gla(**(tensors | {name: value}))


def test_backends():
    tensors, _ = make()
    assert torch.equal(bidirectional_gla(*tensors), bidirectional_gla(*tensors, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        bidirectional_gla(*tensors, backend="cuda")
    if not operator._HAS_KERNEL:
        with pytest.raises(RuntimeError, match="not available in this version"):
            bidirectional_gla(*tensors, backend="triton")


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(2, 20, 1, 4, 8)], min_seconds=0.01)
    assert [(row["op"], row["backend"]) for row in rows] == [
        ("bidirectional_gla", "reference"),
        ("scaled_dot_product_attention", "torch"),
    ]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"]
        assert {"shape", "dtype", "device", "torch", "triton", "commit"} <= row.keys()


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(*tensors, **options):
        return 1.001 * bidirectional_gla_reference(*tensors, **options)

    monkeypatch.setattr(operator, "bidirectional_gla_reference", faulty)
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(2, 20, 1, 4, 8)], min_seconds=0.01)
