"""bidirectional_gla: the reference against the float64 definition, the kernels as close to it, all that is promised."""

import math
import os
import re
import subprocess
import sys
import time
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
from vision_gates.kernels.timing import measure

NAMES = ("o", "dq", "dk", "dv", "dg_forward", "dg_backward")
TOLERANCE = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
IN_INTERPRETER = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1, in test_kernels_in_the_interpreter"),
]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
in_interpreter = pytest.mark.parametrize("device", [pytest.param("cpu", marks=IN_INTERPRETER)])
either_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_GPU), pytest.param("cpu", marks=IN_INTERPRETER)]
)

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


def make(shape=(2, 100, 2, 8, 12), decays="vig", seed=0, *, device="cpu", dtype=torch.float32, gate_dtype=None):
    """[q, k, v, g_forward, g_backward] and an upstream gradient."""
    n_batch, n_tokens, n_heads, key_size, value_size = shape
    rng = torch.Generator().manual_seed(seed)
    key_shape, value_shape = (n_batch, n_tokens, n_heads, key_size), (n_batch, n_tokens, n_heads, value_size)
    q, k = (torch.randn(key_shape, generator=rng) for _ in range(2))
    v, do = (torch.randn(value_shape, generator=rng) for _ in range(2))
    gates = [DECAYS[decays](key_shape, rng).to(device, gate_dtype or dtype) for _ in range(2)]
    return [*(x.to(device, dtype) for x in (q, k, v)), *gates], do.to(device, dtype)


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
    """What torch.compile sees of float64 tensors on a GPU, and of any on a device without Triton."""
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
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("vision_gates" in name for name in operators)  # plain ones only
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


@on_gpu
@pytest.mark.parametrize("decays", DECAYS)
def test_reference_on_cuda(decays, device):
    tensors, do = make(decays=decays)
    got = run(bidirectional_gla, [x.to(device) for x in tensors], do.to(device), backend="reference")
    assert_right([x.cpu() for x in got], exact(tensors, do))


# --------------------------------------------------------------------------------------------------------- kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, N, H, K, V): the model's; several segments; sizes that are no powers of two, of several blocks; one token.
SHAPES = [
    (2, 196, 3, 32, 64),
    (1, 1000, 2, 16, 32),
    (2, 577, 2, 48, 96),
    (1, 70, 1, 8, 8),
    (1, 300, 1, 128, 256),
    (1, 130, 1, 256, 256),
    (3, 1, 2, 32, 64),
]


def run_triton(tensors, do, **kwargs):
    return run(bidirectional_gla, tensors, do, backend="triton", **kwargs)


def error(got, wanted):
    """Norm of the difference over the norm; infinite for anything but zero where zero is right."""
    size = float(wanted.norm())
    if size == 0:
        return math.inf if bool(got.any()) else 0.0
    return float((got.double() - wanted).norm()) / size


def assert_as_good_as_reference(got, tensors, do, **kwargs):
    """Each error is at most twice that of plain PyTorch in the same dtypes, plus 1e-6."""
    plain = run(bidirectional_gla_reference, tensors, do, **kwargs)
    if do.is_cuda:  # the definition would launch kernels token by token
        wanted = run(bidirectional_gla_reference, tensors, do, torch.float64, path="safe", **kwargs)
    else:
        wanted = exact(tensors, do, **kwargs)
    for name, a, b, c in zip(NAMES, got, plain, wanted, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and a.is_contiguous(), name
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, PyTorch {error(b, c):.2e}"


def assert_equal(got, wanted):
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a, b), f"result {i}"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing was written to holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 64 tokens, so that few tokens make several."""
    kernel = pytest.importorskip("vision_gates.kernels.bidirectional_gla.kernel")
    for name in ("_WHOLE", "_FORWARD_SEGMENT", "_BACKWARD_SEGMENT"):
        monkeypatch.setattr(kernel, name, 64)


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "interpreter", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 44, result.stdout


@either_device
@pytest.mark.parametrize("decays", DECAYS)
def test_kernel_takes_any_decays(decays, device, poisoned):
    tensors, do = make((1, 40, 1, 4, 5), decays, device=device)
    assert_as_good_as_reference(run_triton(tensors, do), tensors, do)


@either_device
@pytest.mark.parametrize("n_tokens", [1, 2, 31, 33, 70])
def test_kernel_takes_any_number_of_tokens(n_tokens, device, poisoned):
    tensors, do = make((1, n_tokens, 2, 4, 5), device=device)
    got = run_triton(tensors, do)
    assert_as_good_as_reference(got, tensors, do)
    if n_tokens == 1:
        assert not got[4].any() and not got[5].any()


@either_device
@pytest.mark.parametrize(("key_size", "value_size"), [(1, 1), (5, 7), (24, 40), (4, 70), (70, 3)])
def test_kernel_takes_any_head_size(key_size, value_size, device, poisoned):
    tensors, do = make((1, 35, 1, key_size, value_size), device=device)
    assert_as_good_as_reference(run_triton(tensors, do), tensors, do)


@either_device
@pytest.mark.parametrize(("shape", "decays"), [((1, 66, 2, 4, 5), "vig"), ((1, 150, 1, 4, 5), "often_inf")])
def test_several_segments(shape, decays, device, poisoned, short_segments):
    tensors, do = make(shape, decays, device=device)
    assert_as_good_as_reference(run_triton(tensors, do), tensors, do)


@either_device
def test_several_segments_and_blocks_of_values(device, poisoned, short_segments):
    """The output alone: the interpreter takes ten seconds for the gradients, which test_matrix has."""
    tensors, do = make((1, 66, 1, 4, 70), device=device)
    assert_right([bidirectional_gla(*tensors, backend="triton").cpu()], exact([x.cpu() for x in tensors], do.cpu()))


def make_harsh_at(tokens, shape, **kwargs):
    """As `make` with ViG's decays; at some tokens every other channel has decays of any size, the rest passes by."""
    tensors, do = make(shape, "vig", **kwargs)
    harsh, _ = make(shape, "all_scales", **kwargs)
    for g, harsh_g in zip(tensors[3:], harsh[3:], strict=True):
        g[:, tokens, :, ::2] = harsh_g[:, tokens, :, ::2]
    return tensors, do


@either_device
def test_mild_and_harsh_chunks_meet(device, poisoned):
    tensors, do = make_harsh_at(slice(64, 90), (1, 100, 1, 4, 5), device=device)
    assert_as_good_as_reference(run_triton(tensors, do), tensors, do)


@in_interpreter
@pytest.mark.parametrize("decays", ["vig", "long_chunk_limit", "uniform_50", "rarely_inf"])
def test_plan_of_bfloat16(decays, device, poisoned, monkeypatch):
    """Its chunks, its limit of mild decays and its products, on float32: the interpreter cannot multiply bfloat16."""
    from vision_gates.kernels.bidirectional_gla import kernel

    plan = kernel._plan
    monkeypatch.setattr(kernel, "_plan", lambda *x, **kwargs: plan(*(t.bfloat16() for t in x), **kwargs))
    tensors, do = make((1, 100, 1, 4, 5), decays, device=device)
    assert_right(run_triton(tensors, do), exact(tensors, do))


@either_device
@pytest.mark.parametrize("gate_dtype", [None, torch.float32])
def test_float16(gate_dtype, device, poisoned):
    tensors, do = make((1, 40, 1, 4, 5), device=device, dtype=torch.float16, gate_dtype=gate_dtype)
    assert_as_good_as_reference(run_triton(tensors, do), tensors, do)


@either_device
def test_scale_of_the_kernel(device):
    tensors, do = make((1, 20, 1, 4, 5), device=device)
    assert_as_good_as_reference(run_triton(tensors, do, scale=-2.5), tensors, do, scale=-2.5)


@either_device
def test_a_fault_of_a_thousandth_in_a_kernel_is_seen(device):
    tensors, do = make((1, 20, 1, 4, 5), device=device)
    right = run_triton(tensors, do)
    for i, name in enumerate(NAMES):
        got = [1.001 * x if i == j else x for j, x in enumerate(right)]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, do)


@either_device
@pytest.mark.parametrize("layout", ["projection", "heads_first", "channels_apart"])
def test_kernel_takes_any_strides(layout, device):
    tensors, do = make((2, 35, 2, 4, 6), device=device)
    if layout == "projection":  # as in a model: slices of one projection
        joined = torch.cat([x.flatten(2) for x in tensors], dim=-1)
        strided = [part.unflatten(-1, (2, -1)) for part in joined.split([8, 8, 12, 8, 8], dim=-1)]
        strided_do = F.pad(do, (1, 2))[..., 1:-2]
    elif layout == "heads_first":
        *strided, strided_do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*tensors, do))
    else:  # copied
        *strided, strided_do = (x.mT.contiguous().mT for x in (*tensors, do))
    assert not any(x.is_contiguous() for x in (*strided, strided_do))
    got = run_triton(strided, strided_do)
    assert_as_good_as_reference(got, tensors, do)


@either_device
def test_kernel_takes_expanded_tensors(device):
    tensors, _ = make((1, 20, 1, 4, 5), device=device)
    leaves = [x.requires_grad_() for x in tensors]
    o = bidirectional_gla(*(x.expand(3, -1, 2, -1) for x in leaves), backend="triton")
    o.sum().backward()  # sends an expanded gradient
    got = [o.detach()[1:2, :, 1:].contiguous(), *(x.grad / 6 for x in leaves)]
    assert_as_good_as_reference(got, [x.detach() for x in tensors], torch.ones(1, 20, 1, 5, device=device))


@either_device
def test_kernel_passes_nan_on(device):
    for i, rows in ((0, slice(9, 10)), (1, slice(None)), (3, slice(9, None)), (4, slice(9))):
        tensors, do = make((1, 20, 2, 4, 5), device=device)
        tensors[i][0, 9, 0, 2] = math.nan
        got = run_triton(tensors, do)
        assert bool(got[0][0, rows, 0].isnan().all())
        assert all(bool(x[:, :, 1].isfinite().all()) for x in got), "the other head knows nothing of it"


@either_device
def test_kernel_is_repeatable(device):
    tensors, do = make((1, 35, 1, 4, 5), "all_scales", device=device)
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = bidirectional_gla(*leaves, backend="triton")
    first = [o.detach(), *torch.autograd.grad(o, leaves, do, retain_graph=True)]
    second = [o.detach(), *torch.autograd.grad(o, leaves, do)]
    assert_equal(first, second)
    assert_equal(first, run_triton(tensors, do))
    for leaf, x in zip(leaves, tensors, strict=True):
        assert torch.equal(leaf.detach(), x)


@either_device
def test_kernel_where_only_some_need_gradients(device):
    tensors, do = make((1, 20, 1, 4, 5), device=device)
    wanted = run_triton(tensors, do)
    saved = []
    for i in range(5):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
            o = bidirectional_gla(*leaves, backend="triton")
        assert saved == [x.data_ptr() for x in leaves], "only the arguments are kept for the backward pass"
        assert torch.equal(torch.autograd.grad(o, leaves[i], do)[0], wanted[1 + i]), NAMES[1 + i]
        saved.clear()
    with torch.no_grad():
        o = bidirectional_gla(*leaves, backend="triton")
    assert o.grad_fn is None and torch.equal(o, wanted[0])


@either_device
def test_kernel_takes_an_empty_batch(device):
    tensors, do = make((0, 20, 2, 4, 8), device=device)
    assert [x.shape for x in run_triton(tensors, do)] == [do.shape] + [x.shape for x in tensors]


@either_device
def test_autocast_does_not_change_the_kernel(device):
    tensors, do = make((1, 20, 1, 4, 70), device=device)
    with torch.autocast(device, torch.bfloat16):
        got = run_triton(tensors, do)
    assert_equal(got, run_triton(tensors, do))


@either_device
def test_opcheck_of_the_kernel(device):
    from vision_gates.kernels.bidirectional_gla.kernel import _backward_operator, _operator

    tensors, do = make((1, 3, 1, 2, 3), device=device)
    torch.library.opcheck(_operator, (*(x.requires_grad_() for x in tensors), 0.5))
    torch.library.opcheck(_backward_operator, (do, *(x.detach() for x in tensors), 0.5))


@either_device
def test_compiled_kernel_equals_eager(device):
    """As in a model, on slices of one projection, strided in both."""
    tensors, do = make((1, 20, 2, 4, 6), device=device)
    joined = torch.cat([x.flatten(2) for x in tensors], dim=-1)

    def function(joined):
        slices = joined.split([8, 8, 12, 8, 8], dim=-1)
        return bidirectional_gla(*(x.unflatten(-1, (2, -1)) for x in slices), backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    assert_equal(run(compiled, [joined], do), run(function, [joined], do))


@on_gpu
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrix(shape, dtype, decays, device, poisoned):
    tensors, do = make(shape, decays, device=device, dtype=dtype)
    assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("decays", ["vig", "short_chunk_limit", "all_scales", "often_inf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 196, 3, 32, 64), (1, 577, 2, 48, 96)])
def test_float32_gates_of_half_tensors(shape, dtype, decays, device, poisoned):
    tensors, do = make(shape, decays, device=device, dtype=dtype, gate_dtype=torch.float32)
    assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("decay", [-0.1, -0.24, -0.26, -0.5, -1.05, -1.12, -2.15, -2.25, -4.35, -4.4, -8.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decays_around_the_limit_of_mild_chunks(dtype, decay, device):
    tensors, do = make((1, 196, 2, 32, 64), device=device, dtype=dtype)
    tensors[3:] = [torch.full_like(g, decay) for g in tensors[3:]]
    assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_mild_and_harsh_segments_meet(dtype, device, poisoned):
    tensors, do = make_harsh_at(slice(300, 400), (2, 1500, 2, 32, 64), device=device, dtype=dtype)
    assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("decays", ["vig", "rarely_200"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", bench.CUDA_SHAPES)
def test_shapes_of_the_benchmark(shape, dtype, decays, device, poisoned):
    tensors, do = make((min(shape[0], 2), *shape[1:]), decays, device=device, dtype=dtype)
    assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("n_tokens", [15, 16, 17, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1024, 1025, 20001])
def test_numbers_of_tokens_around_chunks_and_segments(n_tokens, device, poisoned):
    for decays in ("vig", "rarely_inf"):
        tensors, do = make((1, n_tokens, 2, 32, 64), decays, device=device, dtype=torch.bfloat16)
        assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("decays", ["vig", "often_inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hundreds_of_segments(dtype, decays, device, poisoned, short_segments):
    tensors, do = make((2, 20001, 2, 16, 70), decays, device=device, dtype=dtype)
    assert_as_good_as_reference(run(bidirectional_gla, tensors, do), tensors, do)


@on_gpu
@pytest.mark.parametrize("decays", ["vig", "all_scales"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 196, 12, 32, 64), (2, 4096, 3, 32, 64), (1, 1000, 2, 128, 256)])
def test_kernel_is_deterministic(shape, dtype, decays, device):
    tensors, do = make(shape, decays, device=device, dtype=dtype)
    wanted = run(bidirectional_gla, tensors, do)
    for _ in range(4):
        assert_equal(run(bidirectional_gla, tensors, do), wanted)


@on_gpu
@pytest.mark.parametrize("shape", [(2, 196, 3, 32, 64), (1, 1000, 2, 32, 64)])
def test_strides_of_a_model(shape, device, poisoned):
    tensors, do = make(shape, device=device, dtype=torch.bfloat16)
    sizes = [x.shape[2] * x.shape[3] for x in tensors]
    joined = torch.cat([x.flatten(2) for x in tensors] + [tensors[2].flatten(2)[..., :7]], dim=-1)  # an odd row
    strided = [x.unflatten(-1, (shape[2], -1)) for x in joined.split([*sizes, 7], dim=-1)[:5]]
    got = run(bidirectional_gla, strided, do.transpose(1, 2).contiguous().transpose(1, 2))
    assert_as_good_as_reference(got, tensors, do)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_cuda(dtype, device):
    tensors, do = make((2, 577, 2, 32, 130), device=device)
    wanted = run(bidirectional_gla, tensors, do)
    wanted_half = run(bidirectional_gla, [x.to(dtype) for x in tensors], do)
    with torch.autocast(device, dtype):
        assert_equal(run(bidirectional_gla, tensors, do), wanted)
        assert_equal(run(bidirectional_gla, [x.to(dtype) for x in tensors], do), wanted_half)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_on_cuda(dtype, device):
    torch.compiler.reset()
    compiled = torch.compile(bidirectional_gla, fullgraph=True)
    for n_tokens in (70, 196, 577, 600):  # the second size makes it dynamic
        tensors, do = make((2, n_tokens, 2, 32, 64), device=device, dtype=dtype)
        assert_equal(run(compiled, tensors, do), run(bidirectional_gla, tensors, do))


@on_gpu
def test_exported_from_cuda_has_plain_operators_only(device):
    tensors, do = make((2, 35, 2, 4, 4), device=device)
    program = torch.export.export(_Module(), tuple(tensors))
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)
    assert_right([program.module()(*tensors).cpu()], exact([x.cpu() for x in tensors], do.cpu()))


@on_gpu
@pytest.mark.parametrize("shape", [(2, 196, 3, 32, 64), (1, 2048, 2, 32, 64)])
def test_cuda_graph(shape, device):
    tensors, do = make(shape, device=device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        run(bidirectional_gla, tensors, do)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(bidirectional_gla, tensors, do)
    for decays in ("vig", "rarely_inf"):
        others, other_do = make(shape, decays, seed=1, device=device, dtype=torch.bfloat16)
        for x, other in zip((*tensors, do), (*others, other_do), strict=True):
            x.copy_(other)
        graph.replay()
        assert_equal(captured, run(bidirectional_gla, others, other_do))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one(device):
    tensors, do = make((2, 577, 2, 32, 64), device=device)
    got = run(bidirectional_gla, [x.to("cuda:1") for x in tensors], do.to("cuda:1"))
    assert_equal([x.to("cuda:0") for x in got], run(bidirectional_gla, tensors, do))


@on_gpu
@pytest.mark.parametrize("shape", bench.CUDA_SHAPES)
def test_memory(shape, device):
    """Beyond inputs and results: a quarter of them forward, 60 % in training."""
    columns = measure(bidirectional_gla, *bench._inputs(shape, device, torch.bfloat16), min_seconds=0.01)
    assert columns["peak_extra_percent_forward"] <= 25
    assert columns["peak_extra_percent_forward_backward"] <= 60


@on_gpu
def test_new_numbers_of_tokens_compile_next_to_nothing(device):
    triton = pytest.importorskip("triton")
    from vision_gates.kernels.bidirectional_gla import kernel

    def n_compiled():
        functions = [x for x in vars(kernel).values() if isinstance(x, triton.JITFunction)]
        return sum(len(cache[0]) for function in functions for cache in function.device_caches.values())

    def seconds(n_tokens):
        tensors, do = make((2, n_tokens, 2, 24, 40), device=device, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(bidirectional_gla, tensors, do)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(197)
    before = n_compiled()
    assert before > 0
    assert max(seconds(400), seconds(500)) < 2
    assert n_compiled() <= before + 1


@on_gpu
def test_a_cold_process_compiles_quickly(device):
    from vision_gates.benchmark.cold import first_call  # takes long to import

    assert first_call("bidirectional_gla", torch.device(device))["cold_seconds"] < 15


def skip_below_60_gb():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory")


@on_gpu
@pytest.mark.parametrize(("key_size", "value_size"), [(8, 64), (64, 8)])
def test_more_than_two_to_the_31_elements(key_size, value_size, device):
    skip_below_60_gb()
    small, small_do = make((1, 64, 1, key_size, value_size), device=device, dtype=torch.bfloat16)
    *tensors, do = (x.expand(2**19 + 3, -1, -1, -1).contiguous() for x in (*small, small_do))
    assert max(x.numel() for x in tensors) > 2**31
    got = run(bidirectional_gla, tensors, do)
    for name, x, wanted in zip(NAMES, got, run(bidirectional_gla, small, small_do), strict=True):
        assert torch.equal(x, wanted.expand_as(x)), name  # every image is the same


@on_gpu
def test_more_than_two_to_the_31_elements_of_one_sequence(device):
    skip_below_60_gb()
    shape, last = (1, 2**21 + 256, 16), 2048
    q, k = (torch.randn(*shape, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    v, do = (torch.randn(*shape, 8, device=device, dtype=torch.bfloat16) for _ in range(2))
    g = torch.full((64,), -1.0, device=device, dtype=torch.bfloat16).expand_as(q)
    assert q.numel() > 2**31
    tensors = [q, k, v, g, g]
    got = run(bidirectional_gla, tensors, do)
    # exp(-1024) is 0: the last half of the last 2048 tokens knows nothing of those before.
    tail = [x[:, -last:] for x in tensors]
    wanted = run(bidirectional_gla_reference, tail, do[:, -last:], torch.float64, path="safe")
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert error(a[:, -last // 2 :], b[:, -last // 2 :]) < 0.01, name


# ------------------------------------------------------------------------------------------- arguments and benchmark


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


def test_backends(monkeypatch):
    tensors, _ = make()
    assert torch.equal(bidirectional_gla(*tensors), bidirectional_gla(*tensors, backend="reference"))
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        bidirectional_gla(*tensors, backend="cuda")
    monkeypatch.setattr(operator, "_HAS_TRITON", True)
    monkeypatch.setattr(operator, "_INTERPRETED", False)
    with pytest.raises(RuntimeError, match="takes CUDA tensors .* got torch.float32 on cpu: .* TRITON_INTERPRET=1"):
        bidirectional_gla(*tensors, backend="triton")
    monkeypatch.setattr(operator, "_INTERPRETED", True)
    with pytest.raises(RuntimeError, match="float32 or half precision, got torch.float64 on cpu: use 'reference'"):
        bidirectional_gla(*(x.double() for x in tensors), backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"):
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
    assert rows[0]["worst_error"] < 1e-6
    function, inputs, upstream = bench.example(torch.device("cpu"))
    assert function(*inputs).shape == upstream.shape


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(*tensors, **options):
        return 1.001 * bidirectional_gla_reference(*tensors, **options)

    monkeypatch.setattr(operator, "bidirectional_gla_reference", faulty)
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(2, 20, 1, 4, 8)], min_seconds=0.01)


def test_meta_tensors_have_shapes():
    tensors = [torch.zeros(1, 5, 2, size, device="meta") for size in (4, 4, 6, 4, 4)]
    assert bidirectional_gla(*tensors).shape == (1, 5, 2, 6)
