"""locality_gate: the reference against the equations, the kernels against the reference, on a GPU and interpreted."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from vision_gates.gates import LocalityGate
from vision_gates.kernels import locality_gate as operator
from vision_gates.kernels.locality_gate import bench, locality_gate
from vision_gates.kernels.locality_gate.reference import locality_gate_reference

NAMES = ("y", "do", "dl", "dg_logits", "dw_o", "dw_l", "dgate_bias")
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
both_activations = pytest.mark.parametrize("activation", [False, True])
with_and_without_bias = pytest.mark.parametrize("biased", [False, True])

# (B, N, H, V): one row, odd sizes, several tiles with a remainder, more tiles than rows of a tile.
SMALL_SHAPES = [(1, 1, 1, 8), (2, 3, 2, 5), (2, 35, 2, 64), (1, 5, 3, 100), (1, 2, 1, 1024)]
MODEL_SHAPES = [(128, 196, 3, 64), (8, 4096, 3, 64), (32, 196, 12, 64), (4, 3136, 2, 48), (16, 49, 3, 32)]
ODD_SHAPES = [(3, 1, 5, 64), (2, 777, 5, 24), (7, 301, 1, 100), (5, 33, 4, 8), (3, 50, 2, 769), (2, 9, 3, 1024)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(shape=(2, 9, 3, 8), *, device="cpu", dtype=torch.float32, weight_dtype=torch.float32, biased=False, seed=0):
    """[o, l, g_logits, w_o, w_l], `biased` gate_bias, and an upstream gradient; gates open, closed and in between."""
    rng = torch.Generator().manual_seed(seed)
    o, local, logits, dy = (torch.randn(shape, generator=rng) for _ in range(4))
    weights = [(torch.rand(shape[-1], generator=rng) + 0.5).to(device, weight_dtype) for _ in range(2)]
    biases = [torch.randn(shape[-2:], generator=rng).to(device, weight_dtype)] if biased else []
    return [*(x.to(device, dtype) for x in (2 * o, local, 3 * logits)), *weights, *biases], dy.to(device, dtype)


def positional(o, local, logits, w_o, w_l, gate_bias=None, **kwargs):
    return locality_gate(o, local, logits, w_o, w_l, gate_bias=gate_bias, **kwargs)


def run(function, tensors, dy, **kwargs):
    """The output and the gradient of each tensor."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def run_triton(tensors, dy, **kwargs):
    return run(positional, tensors, dy, backend="triton", **kwargs)


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def assert_as_good_as_reference(got, tensors, dy, **kwargs):
    """Each error is at most twice that of plain PyTorch in the same dtype, plus 1e-6."""
    wanted = run(locality_gate_reference, [x.double() for x in tensors], dy.double(), **kwargs)
    plain = run(locality_gate_reference, tensors, dy, **kwargs)
    for name, a, b, c in zip(NAMES[: len(got)], got, plain, wanted, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, PyTorch {error(b, c):.2e}"


def assert_equal(got, wanted):
    for name, a, b in zip(NAMES[: len(got)], got, wanted, strict=True):
        assert torch.equal(a, b), name


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
    assert passed and int(passed[1]) >= 67, result.stdout


# ------------------------------------------------------------------------------------------------------- reference


@both_activations
def test_reference_equation(activation):
    (o, local, logits, w_o, w_l), _ = make(dtype=torch.float64, weight_dtype=torch.float64)

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    s = torch.sigmoid(logits)
    expected = rms(o, w_o) * s + rms(local, w_l) * (1 - s)
    expected = expected * torch.sigmoid(expected) if activation else expected
    torch.testing.assert_close(locality_gate(o, local, logits, w_o, w_l, eps=1e-3, activation=activation), expected)
    bias = torch.randn(3, 8, dtype=torch.float64)
    y = locality_gate(o, local, logits - bias, w_o, w_l, gate_bias=bias, eps=1e-3, activation=activation)
    torch.testing.assert_close(y, expected)


@both_activations
@with_and_without_bias
def test_reference_gradients(biased, activation):
    tensors, _ = make((2, 2, 2, 3), dtype=torch.float64, weight_dtype=torch.float64, biased=biased)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: positional(*x, activation=activation), leaves)


@both_activations
def test_reference_result_is_contiguous(activation):
    tensors, _ = make()
    tensors[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]]
    assert locality_gate(*tensors, activation=activation).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_takes_float32_weights(dtype):
    tensors, dy = make(dtype=dtype, biased=True)
    got = run(positional, tensors, dy)
    assert [x.dtype for x in got] == [dtype] * 4 + [torch.float32] * 3
    rounded = [*tensors[:3], *(x.to(dtype) for x in tensors[3:])]
    assert torch.equal(got[0], positional(*rounded))


@with_and_without_bias
def test_compiled_reference(biased):
    tensors, dy = make(biased=biased)
    compiled = torch.compile(positional, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, dy), run(positional, tensors, dy), strict=True):
        torch.testing.assert_close(a, b)


@both_activations
@with_and_without_bias
def test_export_has_plain_operators_only(biased, activation):
    gate = LocalityGate(8, activation=activation)
    bias = [torch.randn(24).view(3, 8)] if biased else []
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = (*({0: batch},) * 3, *(None for _ in bias))
    program = torch.export.export(gate, (*make()[0][:3], *bias), dynamic_shapes=dynamic)
    assert not any("vision_gates" in str(node.target) for node in program.graph.nodes)
    views = make((5, 9, 3, 8), seed=1)[0][:3]
    torch.testing.assert_close(program.module()(*views, *bias), gate(*views, *bias))


def test_module_adds_the_bias_to_the_logits():
    gate, (views, bias) = LocalityGate(8), (make()[0][:3], torch.randn(3, 8))
    torch.testing.assert_close(gate(*views, bias), gate(*views[:2], views[2] + bias))


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    gate, views = LocalityGate(8, activation=True), make()[0][:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(gate, tuple(views), dynamo=True, verbose=False)
    program.save(tmp_path / "gate.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "gate.onnx")
    (y,) = session.run(None, {x.name: view.numpy() for x, view in zip(session.get_inputs(), views, strict=True)})
    torch.testing.assert_close(torch.from_numpy(y), gate(*views).detach())


# --------------------------------------------------------------------------------------------------------- kernels


@either_device
@both_activations
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_small_shapes(shape, activation, device, poisoned):
    tensors, dy = make(shape, device=device)
    got = run_triton(tensors, dy, activation=activation)
    assert_as_good_as_reference(got, tensors, dy, activation=activation)


@either_device
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype, weight_dtype, device, poisoned):
    tensors, dy = make((2, 9, 3, 16), device=device, dtype=dtype, weight_dtype=weight_dtype or dtype)
    assert_as_good_as_reference(run_triton(tensors, dy, activation=True), tensors, dy, activation=True)


@either_device
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 2, 5), (1, 2, 12, 4), (4, 8), (2, 3, 2, 2, 3, 8)])
def test_gate_bias(shape, device, poisoned):
    """Also of one head, of more heads than tokens, without leading axes and with many."""
    tensors, dy = make(shape, device=device, biased=True)
    assert_as_good_as_reference(run_triton(tensors, dy), tensors, dy)


@either_device
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_gate_bias_beside_half(bias_dtype, device, poisoned):
    tensors, dy = make((2, 9, 3, 16), device=device, dtype=torch.bfloat16, biased=True)
    tensors[5] = tensors[5].to(bias_dtype)
    got = run_triton(tensors, dy, activation=True)
    assert_as_good_as_reference(got, tensors, dy, activation=True)
    wanted = run(locality_gate_reference, [x.double() for x in tensors], dy.double(), activation=True)
    if bias_dtype == torch.float32:  # nothing on the way was rounded to half precision
        assert error(got[6], wanted[6]) < 1e-6


@either_device
def test_gate_bias_is_part_of_the_logits(device):
    """Kernels that add it and kernels that are handed the sum agree."""
    tensors, dy = make(device=device, biased=True)
    *views, bias = tensors
    y, *gradients = run_triton([*views[:2], views[2] + bias, *views[3:]], dy)
    got = run_triton(tensors, dy)
    for a, b in zip(got, [y, *gradients, gradients[2].sum((0, 1))], strict=True):
        torch.testing.assert_close(a, b)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 196, 3, 64), (32, 196, 12, 64), (4, 3136, 2, 48), (2, 777, 5, 24)])
def test_model_shapes_with_bias(shape, dtype, device, poisoned):
    tensors, dy = make(shape, device=device, dtype=dtype, biased=True)
    got = run(positional, tensors, dy, activation=True)
    assert_as_good_as_reference(got, tensors, dy, activation=True)


@on_gpu
@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MODEL_SHAPES + ODD_SHAPES)
def test_model_shapes(shape, dtype, activation, device, poisoned):
    tensors, dy = make(shape, device=device, dtype=dtype)
    got = run(locality_gate, tensors, dy, activation=activation)
    assert_as_good_as_reference(got, tensors, dy, activation=activation)


@either_device
def test_one_channel(device):
    """A normalised single channel hardly depends on itself: an eps of its size keeps the gradients worth comparing."""
    tensors, dy = make((2, 9, 3, 1), device=device)
    assert_as_good_as_reference(run_triton(tensors, dy, eps=0.5), tensors, dy, eps=0.5)


@either_device
def test_a_fault_of_a_thousandth_is_seen(device):
    tensors, dy = make(device=device, biased=True)
    right = run_triton(tensors, dy)
    for i, name in enumerate(NAMES):
        got = [1.001 * x if i == j else x for j, x in enumerate(right)]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_as_good_as_reference(got, tensors, dy)


@either_device
@both_activations
@pytest.mark.parametrize("logit", [12.0, -12.0])
def test_nearly_shut_gates_are_relatively_accurate(logit, activation, device):
    """What a nearly shut side gets is small everywhere, and right."""
    tensors, dy = make(device=device)
    tensors[2] = tensors[2] / 8 + logit
    got = run_triton(tensors, dy, activation=activation)
    wanted = run(locality_gate_reference, [x.double() for x in tensors], dy.double(), activation=activation)
    for name, a, b in zip(NAMES[: len(got)], got, wanted, strict=True):
        assert error(a, b) < 3e-6, name


@either_device
@both_activations
@pytest.mark.parametrize("logit", [1e4, -1e4, torch.inf, -torch.inf])
def test_saturated_gates_choose_one_side(logit, activation, device):
    tensors, dy = make(device=device)
    tensors[2] = torch.full_like(tensors[2], logit)
    y, *gradients = run_triton(tensors, dy, activation=activation)
    x, weight = (tensors[0], tensors[3]) if logit > 0 else (tensors[1], tensors[4])
    chosen = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    torch.testing.assert_close(y, F.silu(chosen) if activation else chosen)
    assert all(bool(x.isfinite().all()) for x in gradients)


@either_device
def test_nan_stays_in_its_row(device):
    for i in range(3):
        tensors, dy = make(device=device)
        tensors[i][0, 4, 1, 2] = torch.nan
        y, do, dl, dg, *_ = run_triton(tensors, dy, activation=True)
        rows = torch.zeros(2, 9, 3, dtype=torch.bool, device=device)
        rows[0, 4, 1] = True
        for x in (y, do, dl, dg):
            assert bool(x[~rows].isfinite().all())
        assert bool(y[0, 4, 1, 2].isnan()) and bool(dg[0, 4, 1, 2].isnan())


@either_device
def test_rows_outside_a_tile_leave_no_trace(device):
    """They are zeros, whose root mean square is not to be divided by where eps is 0, too."""
    tensors, dy = make(device=device, biased=True)
    assert_as_good_as_reference(run_triton(tensors, dy, eps=0.0), tensors, dy, eps=0.0)


@either_device
@with_and_without_bias
@pytest.mark.parametrize("layout", ["projection", "odd_projection", "heads_first", "images", "tokens", "channels"])
def test_strides_do_not_matter(layout, biased, device):
    shape = (2, 7, 3, 8)
    tensors, dy = make(shape, device=device, biased=biased)
    wanted = run_triton(tensors, dy, activation=True)
    o, local, logits, *weights = tensors
    flat = logits.flatten(2)
    if layout == "projection":  # what models do: the logits are a slice of a wider projection
        logits = torch.cat((flat, flat, flat), dim=-1)[..., 24:48].unflatten(-1, (3, 8))
    elif layout == "odd_projection":
        logits = F.pad(flat, (1, 4))[..., 1:-4].unflatten(-1, (3, 8))
    elif layout == "heads_first":
        local, logits, dy = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (local, logits, dy))
    elif layout == "images":
        o, logits, dy = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (o, logits, dy))
    elif layout == "tokens":  # nothing folds
        o, local = (torch.stack((x, x), dim=2)[:, :, 1] for x in (o, local))
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "channels":  # copied
        o, dy = (x.mT.contiguous().mT for x in (o, dy))
        weights = [torch.stack((x, x), dim=-1)[..., 0] for x in weights]
    assert not all(x.is_contiguous() for x in (o, local, logits))
    got = run_triton([o, local, logits, *weights], dy, activation=True)
    assert all(x.is_contiguous() for x in got[:4])
    for name, a, b in zip(NAMES[: len(got)], got, wanted, strict=True):
        if name in ("dw_o", "dw_l", "dgate_bias"):  # rows may be summed in another order
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), name


def test_dense_channels_are_never_copied():
    pytest.importorskip("triton")
    from vision_gates.kernels.locality_gate.kernel import _plan

    dense = torch.zeros(2, 7, 3, 8)
    sliced = torch.zeros(2, 7, 100)[..., 4:28].unflatten(-1, (3, 8))
    heads_first = torch.zeros(2, 3, 7, 8).transpose(1, 2)
    expanded = torch.zeros(1, 7, 1, 8).expand(2, -1, 3, -1)
    one_head = dense.as_strided((2, 7, 1, 8), (56, 8, 1, 1))  # its stride along heads is of no account
    for tensors, keep_heads, sizes, unit in [
        ((dense, dense), False, (1, 42, 1), 8),
        ((dense, sliced), False, (1, 14, 3), 4),
        ((dense, heads_first), False, (2, 7, 3), 8),
        ((dense, sliced, heads_first, expanded), False, (2, 7, 3), 4),
        ((dense, dense), True, (1, 14, 3), 8),
        ((dense, sliced, heads_first, expanded), True, (2, 7, 3), 4),
        ((dense[:1, :1],), True, (1, 1, 3), 8),
        ((one_head,), True, (1, 14, 1), 8),
    ]:
        read, walk = _plan(*tensors, keep_heads=keep_heads)
        assert all(a is b for a, b in zip(read, tensors, strict=True))
        assert (walk.n_A, walk.n_T, walk.n_H) == sizes and walk.unit == unit
    (read, _), _ = _plan(dense.mT.contiguous().mT, dense)
    assert read.is_contiguous()


@either_device
def test_expanded_tensors(device):
    tensors, _ = make((1, 5, 1, 8), device=device)
    leaves = [x.requires_grad_() for x in tensors]
    y = locality_gate(*(x.expand(3, -1, 2, -1) for x in leaves[:3]), *leaves[3:], backend="triton")
    y.sum().backward()  # sends an expanded gradient
    got = [y.detach()[1:2, :, :1], *(x.grad / 6 for x in leaves)]
    assert_as_good_as_reference(got, [x.detach() for x in tensors], torch.ones(1, 5, 1, 8, device=device))


@either_device
@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 2, 2, 3)])
def test_any_number_of_leading_axes(leading, device):
    tensors, dy = make((*leading, 8), device=device)
    wanted = run_triton(tensors, dy)
    assert_as_good_as_reference(wanted, tensors, dy)
    if len(leading) > 3:  # more axes than a kernel walks
        tensors[0] = tensors[0].permute(4, 3, 2, 1, 0, 5).contiguous().permute(4, 3, 2, 1, 0, 5)
        assert_equal(run_triton(tensors, dy), wanted)


@either_device
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8)])
def test_no_rows(shape, device):
    tensors, dy = make(shape, device=device, biased=True)
    got = run_triton(tensors, dy)
    assert [x.shape for x in got] == [dy.shape, *(x.shape for x in tensors)]
    assert not any(x.any() for x in got[4:])
    assert not any(x.any() for x in run_triton(tensors[:5], dy)[4:])


@either_device
@pytest.mark.parametrize(("programs", "biased"), [(3, False), (2, True), (7, True)])
def test_more_tiles_than_programs(programs, biased, device, monkeypatch):
    from vision_gates.kernels.locality_gate import kernel

    monkeypatch.setattr(kernel, "_BACKWARD_TILE", 16)
    monkeypatch.setattr(kernel, "_BACKWARD_PROGRAMS", programs)
    tensors, dy = make(device=device, biased=biased)
    assert_as_good_as_reference(run_triton(tensors, dy), tensors, dy)


@either_device
def test_only_some_need_gradients(device):
    tensors, dy = make(device=device, biased=True)
    wanted = run_triton(tensors, dy)
    for i in range(6):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        y = positional(*leaves, backend="triton")
        assert torch.equal(torch.autograd.grad(y, leaves[i], dy)[0], wanted[1 + i]), NAMES[1 + i]
    with torch.no_grad():
        y = positional(*leaves, backend="triton")
    assert y.grad_fn is None and torch.equal(y, wanted[0])


@either_device
def test_only_the_arguments_are_saved(device):
    tensors, _ = make(device=device, biased=True)
    leaves = [x.requires_grad_() for x in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        positional(*leaves, activation=True, backend="triton")
    assert sorted(saved) == sorted(x.data_ptr() for x in leaves)


@either_device
@with_and_without_bias
def test_opcheck(biased, device):
    tensors, dy = make((1, 2, 2, 4), device=device, biased=biased)
    from vision_gates.kernels.locality_gate.kernel import _backward_operator, _operator

    none = [] if biased else [None]
    torch.library.opcheck(_operator, (*(x.requires_grad_() for x in tensors), *none, 1e-6, True))
    torch.library.opcheck(_backward_operator, (dy, *(x.detach() for x in tensors), *none, 1e-6, True))


@either_device
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled(dtype, biased, device):
    tensors, dy = make((2, 5, 3, 8), device=device, dtype=dtype, biased=biased)
    tensors[2] = F.pad(tensors[2].flatten(2), (8, 16))[..., 8:-16].unflatten(-1, (3, 8))

    def function(*tensors):
        return positional(*tensors, activation=True, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    assert_equal(run(compiled, tensors, dy), run(function, tensors, dy))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_under_autocast(dtype, device):
    gate = LocalityGate(64, activation=True).to(device)
    tensors, dy = make((4, 196, 3, 64), device=device, dtype=dtype, biased=True)
    views, bias = [x.requires_grad_() for x in tensors[:3]], tensors[5].requires_grad_()
    with torch.autocast(device, dtype):
        y = gate(*views, bias)
    leaves = [*views, gate.global_norm.weight, gate.local_norm.weight, bias]
    got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert_as_good_as_reference(got, [x.detach() for x in leaves], dy, activation=True)


@on_gpu
def test_repeatable(device):
    tensors, dy = make((128, 196, 3, 64), device=device, dtype=torch.bfloat16, biased=True)
    assert_equal(run(positional, tensors, dy), run(positional, tensors, dy))


@on_gpu
def test_cuda_graph(device):
    tensors, dy = make((4, 196, 3, 64), device=device, dtype=torch.bfloat16, biased=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(positional, tensors, dy)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(positional, tensors, dy)
    tensors[0].mul_(-2)
    graph.replay()
    assert_equal(captured, run(positional, tensors, dy))


@on_gpu
@with_and_without_bias
def test_one_compilation_for_any_number_of_tokens(biased, device):
    from vision_gates.kernels.locality_gate.kernel import _locality_gate_backward_kernel, _locality_gate_forward_kernel

    def compiled():
        caches = [
            cache
            for kernel in (_locality_gate_forward_kernel, _locality_gate_backward_kernel)
            for cache in kernel.device_caches.values()
        ]
        return sum(len(cache[0]) for cache in caches)

    def run_sizes(*sizes):
        for n_batch, n_tokens in sizes:
            tensors, dy = make((n_batch, n_tokens, 3, 40), device=device, biased=biased)
            run(positional, tensors, dy)

    run_sizes((2, 9))
    before = compiled()
    run_sizes((1, 1), (1, 16), (3, 196), (16, 64), (5, 4097))
    assert compiled() == before


@on_gpu
def test_more_than_two_to_the_31_elements(device):
    shape = (2**19 + 3, 64, 64)
    if torch.cuda.mem_get_info()[0] < 10 * 2 * 2**31 * 1.1:
        pytest.skip("needs 48 GB of free memory")
    o, dy = (torch.randn(1, 64, 64, device=device, dtype=torch.bfloat16).expand(shape).contiguous() for _ in range(2))
    assert o.numel() > 2**31
    weights = [torch.ones(64, device=device)] * 2
    y, do, dl, dg, *_ = run(locality_gate, [o, o, o, *weights], dy)
    for x in (y, do, dl, dg):  # every image is the same
        assert torch.equal(x[-1], x[0])
    wanted = run(locality_gate, [*[o[:1]] * 3, *weights], dy[:1])
    assert_equal([x[:1] for x in (y, do, dl, dg)] + wanted[4:], wanted)


# ------------------------------------------------------------------------------------------- arguments and benchmark


@pytest.mark.parametrize(
    ("name", "value", "exception", "message"),
    [
        ("o", None, TypeError, "o must be a tensor, got NoneType"),
        ("w_l", [1.0], TypeError, "w_l must be a tensor, got list"),
        ("o", torch.zeros(2, 9, 3, 8, dtype=torch.int64), TypeError, "o must be float64, .* got torch.int64"),
        ("l", torch.zeros(2, 9, 3, 8).half(), TypeError, "l must be torch.float32 like o, got torch.float16"),
        ("w_o", torch.ones(8, dtype=torch.int32), TypeError, "w_o must be float64, .* got torch.int32"),
        ("o", torch.zeros(()), ValueError, r"o must have shape \(B, N, H, V\) with at least one channel, got \(\)"),
        ("o", torch.zeros(2, 9, 3, 0), ValueError, r"at least one channel, got \(2, 9, 3, 0\)"),
        ("l", torch.zeros(2, 9, 1, 8), ValueError, r"l must have o's shape \(2, 9, 3, 8\), got \(2, 9, 1, 8\)"),
        ("g_logits", torch.zeros(2, 9, 3, 1), ValueError, r"g_logits must have o's shape .*, got \(2, 9, 3, 1\)"),
        ("w_o", torch.zeros(24), ValueError, r"w_o must have shape \(8,\), o's channels, got \(24,\)"),
        ("w_l", torch.zeros(8, device="meta"), ValueError, "w_l must be on o's device cpu, got meta"),
        ("gate_bias", 1.0, TypeError, "gate_bias must be a tensor, got float"),
        ("gate_bias", torch.zeros(3, 8).int(), TypeError, "gate_bias must be float64, .* got torch.int32"),
        ("gate_bias", torch.zeros(24), ValueError, r"gate_bias must have shape \(H, V\), .* got \(24,\) for o of"),
        ("gate_bias", torch.zeros(8, 3), ValueError, r"gate_bias must have shape \(H, V\), .* got \(8, 3\) for o of"),
        ("gate_bias", torch.zeros(3, 8, device="meta"), ValueError, "gate_bias must be on o's device cpu, got meta"),
        ("backend", "cuda", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_arguments(name, value, exception, message):
    arguments = dict(zip(("o", "l", "g_logits", "w_o", "w_l"), make()[0], strict=True))
    with pytest.raises(exception, match=message):
        locality_gate(**(arguments | {name: value}))


@pytest.mark.parametrize("shape", [(8,), (2, 9, 0, 8)])
def test_bias_needs_heads(shape):
    tensors, _ = make(shape)
    with pytest.raises(ValueError, match="at least one head"):
        locality_gate(*tensors, gate_bias=torch.zeros(shape[-2:]))


def test_backends(monkeypatch):
    tensors, _ = make()
    assert torch.equal(locality_gate(*tensors), locality_gate(*tensors, backend="reference"))
    with pytest.raises(ValueError, match="takes half and float32 .* got torch.float64 and 8: use"):
        locality_gate(*(x.double() for x in tensors), backend="triton")
    with pytest.raises(ValueError, match="up to 1024 channels, got torch.float32 and 1025: use"):
        locality_gate(*make((1, 1, 1, 1025))[0], backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", True)
    monkeypatch.setattr(operator, "_INTERPRETED", False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu; .* TRITON_INTERPRET=1"):
        locality_gate(*tensors, backend="triton")
    monkeypatch.setattr(operator, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        locality_gate(*tensors, backend="triton")
    assert locality_gate(*(x.to("meta") for x in tensors)).shape == (2, 9, 3, 8)


def test_bench_rows():
    rows = bench.rows("cpu", shapes=[(2, 5, 1, 8)], min_seconds=0.01)
    assert [(row["op"], row["backend"]) for row in rows] == [("locality_gate", "reference")]
    for row in rows:
        assert 0 < row["ms_forward"] and 0 < row["ms_forward_backward"] and 0 < row["gb_per_second_forward"]
        assert {"shape", "dtype", "device", "torch", "triton", "commit", "worst_error"} <= row.keys()


def test_bench_refuses_a_fault(monkeypatch):
    def faulty(*tensors, **options):
        y = locality_gate_reference(*tensors, **options)
        return y if y.dtype == torch.float64 else 1.001 * y

    monkeypatch.setattr(operator, "locality_gate_reference", faulty)
    with pytest.raises(RuntimeError, match="error of the output is 1.0e-03, above its limit"):
        bench.rows("cpu", shapes=[(2, 5, 1, 8)], min_seconds=0.01)
