"""The reusable gates against their equations, in float64."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.gates import BidirectionalGatedLinearAttention, LocalityGate, SwiGLU, add_norm
from vision_gates.kernels.bidirectional_gla.reference import bidirectional_gla_definition


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_locality_gate_equation():
    gate = LocalityGate(6).double()
    torch.nn.init.normal_(gate.global_norm.weight)
    torch.nn.init.normal_(gate.local_norm.weight)
    o, local, logits = torch.randn(3, 2, 5, 4, 6, dtype=torch.float64).unbind()
    s = torch.sigmoid(logits)
    expected = rms(o, gate.global_norm.weight) * s + rms(local, gate.local_norm.weight) * (1 - s)
    torch.testing.assert_close(gate(o, local, logits), expected)


@pytest.mark.parametrize("logit, chosen", [(1e4, "global"), (-1e4, "local")])
def test_locality_gate_saturates_to_one_side(logit, chosen):
    gate = LocalityGate(8)
    views = {"global": torch.randn(1, 3, 2, 8), "local": torch.randn(1, 3, 2, 8)}
    result = gate(views["global"], views["local"], torch.full((1, 3, 2, 8), logit))
    torch.testing.assert_close(result, rms(views[chosen], 1.0))


def test_swiglu_equation():
    layer = SwiGLU(6, hidden_dim=10).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    a, b = (x @ layer.in_proj.weight.T).split(10, dim=-1)
    torch.testing.assert_close(layer(x), (a * torch.sigmoid(a) * b) @ layer.out_proj.weight.T)


def official_state(mixer, *, rank=16):
    """Random values for a mixer in the layout of official checkpoints: three projections of l apart, and the gate."""
    dim = mixer.gate_bias.numel()
    shapes = {
        "local_conv.weight": (dim, 1, 3, 3),
        "qkv.weight": (2 * dim, dim),
        "gate.weight": (dim, dim),
        "gate.bias": (dim,),
        "decay_down.weight": (rank, dim),
        "decay_up.weight": (dim, rank),
        "decay_up.bias": (dim,),
        "locality_gate.global_norm.weight": (dim // mixer.num_heads,),
        "locality_gate.local_norm.weight": (dim // mixer.num_heads,),
        "proj.weight": (dim, dim),
    }
    return {name: torch.randn(shape, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def mixer_by_hand(x, state, *, heads, activation):
    """The mixer's equations, with one product for each projection."""
    B, H, W, dim = x.shape
    act = F.silu if activation else nn.Identity()
    local = F.conv2d(x.permute(0, 3, 1, 2), state["local_conv.weight"], padding=1, groups=dim).flatten(2).mT
    local = act(local)
    q, k, v = F.linear(local, state["qkv.weight"]).split([dim // 2, dim // 2, dim], dim=-1)
    logits = F.linear(F.linear(local, state["decay_down.weight"]), state["decay_up.weight"], state["decay_up.bias"])
    forward, backward = (torch.log(torch.sigmoid(logits)) / 16).chunk(2, dim=-1)
    o = bidirectional_gla_definition(*(t.reshape(B, H * W, heads, -1) for t in (q, k, v, forward, backward)))
    s = torch.sigmoid(F.linear(local, state["gate.weight"], state["gate.bias"])).view_as(o)
    y = rms(o, state["locality_gate.global_norm.weight"]) * s
    y = y + rms(local.view_as(o), state["locality_gate.local_norm.weight"]) * (1 - s)
    return F.linear(act(y.reshape(B, H * W, dim)), state["proj.weight"]).view(x.shape)


@pytest.mark.parametrize("activation", [True, False])
def test_mixer_equations_and_official_layout(activation):
    mixer = BidirectionalGatedLinearAttention(24, num_heads=3, activation=activation).double()
    state = official_state(mixer)
    names = list(state)
    mixer.load_state_dict(state, strict=True)
    assert list(state) == names, "the caller's dictionary stays as it was"
    x = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mixer_by_hand(x, state, heads=3, activation=activation))


def test_mixer_gradients_reach_every_projection():
    mixer = BidirectionalGatedLinearAttention(24, num_heads=3, activation=True).double()
    state = {name: value.requires_grad_() for name, value in official_state(mixer).items()}
    mixer.load_state_dict(state)
    x = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    dy = torch.randn_like(x)
    mixer_by_hand(x, state, heads=3, activation=True).backward(dy)
    mixer(x).backward(dy)
    joined = torch.cat([state[f"{name}.weight"].grad for name in ("qkv", "gate", "decay_down")])
    torch.testing.assert_close(mixer.in_proj.weight.grad, joined)
    torch.testing.assert_close(mixer.gate_bias.grad, state["gate.bias"].grad)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_mixer_loads_either_layout_at_any_depth(duplicate):
    blocks = nn.ModuleList(BidirectionalGatedLinearAttention(24, num_heads=3, activation=True) for _ in range(2))
    states = [official_state(mixer) for mixer in blocks]
    official = {f"{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}
    blocks.load_state_dict(official, strict=True)
    for mixer, state in zip(blocks, states, strict=True):
        rows = torch.cat([state[f"{name}.weight"] for name in ("qkv", "gate", "decay_down")])
        torch.testing.assert_close(mixer.in_proj.weight.detach(), rows.float())
        torch.testing.assert_close(mixer.gate_bias.detach(), state["gate.bias"].float())
    twin = duplicate(blocks)  # as an averaged model: it loads on its own
    for own in (blocks.state_dict(), official):
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        twin.load_state_dict(own, strict=True)
        for a, b in zip(twin.parameters(), blocks.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("missing", ["qkv.weight", "gate.weight", "decay_down.weight", "gate.bias"])
def test_incomplete_official_layout_is_refused(missing):
    mixer = BidirectionalGatedLinearAttention(24, num_heads=3, activation=True)
    state = official_state(mixer)
    del state[missing]
    with pytest.raises(
        RuntimeError, match="Missing key.*gate_bias" if missing == "gate.bias" else "Missing key.*in_proj"
    ):
        mixer.load_state_dict(state, strict=True)


def test_mixer_initialisation_is_that_of_separate_projections():
    """Each part has Xavier's bound for its own fan, not for that of the joined matrix."""
    dim = 64
    mixer = BidirectionalGatedLinearAttention(dim, num_heads=2, activation=True)
    for parameter in mixer.parameters():
        nn.init.ones_(parameter)
    mixer.init_weights()
    qkv, gate, decay_down = mixer.in_proj.weight.detach().split([2 * dim, dim, 16])
    for weight, fan_in, fan_out in (
        (qkv, dim, 2 * dim),
        (gate, dim, dim),
        (decay_down, dim, 16),
        (mixer.decay_up.weight.detach(), 16, dim),
        (mixer.local_conv.weight.detach(), 9, 9 * dim),
        (mixer.proj.weight.detach(), dim, dim),
    ):
        bound = 2**-2.5 * (6 / (fan_in + fan_out)) ** 0.5
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert abs(float(weight.std()) - bound / 3**0.5) < 0.1 * bound
    assert not mixer.gate_bias.any() and not mixer.decay_up.bias.any()


@pytest.mark.parametrize(("dim", "heads", "rank"), [(24, 3, 16), (192, 3, 16), (64, 2, 8)])
def test_mixer_parameters_are_the_papers(dim, heads, rank):
    mixer = BidirectionalGatedLinearAttention(dim, num_heads=heads, activation=True, decay_rank=rank)
    official = official_state(mixer, rank=rank)
    assert sum(x.numel() for x in mixer.parameters()) == sum(x.numel() for x in official.values())


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of 2 \\* num_heads = 10, got 24"):
        BidirectionalGatedLinearAttention(24, num_heads=5, activation=True)


def make_norm(kind, channels=8):
    norm = {
        "rms": nn.RMSNorm(channels, eps=1e-6),
        "rms_default_eps": nn.RMSNorm(channels),
        "layer": nn.LayerNorm(channels),
        "identity": nn.Identity(),
    }[kind]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("kind", ["rms", "rms_default_eps", "layer", "identity"])
def test_add_norm_is_a_sum_and_its_norm(kind, with_residual, compiled):
    norm = make_norm(kind).double()
    leaves = [torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(1 + with_residual)]
    function = torch.compile(add_norm, fullgraph=True, backend="aot_eager") if compiled else add_norm
    got = function(leaves[0], leaves[1] if with_residual else None, norm)
    total = sum(leaves[1:], leaves[0])
    grads = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).unbind()
    taken = [*leaves, *norm.parameters()]
    torch.testing.assert_close(got, (norm(total), total))
    torch.testing.assert_close(
        torch.autograd.grad(got, taken, grads), torch.autograd.grad((norm(total), total), taken, grads)
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_add_norm_without_a_residual_hands_x_on(kind):
    x = torch.randn(2, 3, 8)
    assert add_norm(x, None, make_norm(kind))[1] is x


def test_add_norm_under_autocast():
    """The stream stays in float32; what the next layer casts anyway comes in half precision, rounded once."""
    norm = make_norm("rms")
    x, residual = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = add_norm(x, residual, norm)
        layer_y, _ = add_norm(x, residual, make_norm("layer"))
    assert (y.dtype, total.dtype, layer_y.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, norm(x + residual).bfloat16(), rtol=2**-7, atol=1e-6)
    assert add_norm(x, residual, norm)[0].dtype == torch.float32


def test_add_norm_of_something_like_an_rms_norm_calls_it():
    class Doubled(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(3, 8)
    torch.testing.assert_close(add_norm(x, x, Doubled(8, eps=1e-6))[0], 2 * rms(2 * x, 1.0))


@pytest.mark.parametrize("norm", [nn.RMSNorm(8), nn.RMSNorm(8, elementwise_affine=False, eps=1e-6), nn.RMSNorm((4, 8))])
def test_add_norm_takes_norms_that_the_operator_does_not(norm):
    x, residual = torch.randn(2, 3, 4, 8).unbind()
    normed, total = add_norm(x, residual, norm)
    torch.testing.assert_close(normed, norm(x + residual))
    torch.testing.assert_close(total, x + residual)


def test_hooks_on_a_norm_run():
    norm, seen = nn.RMSNorm(8, eps=1e-6), []
    norm.register_forward_hook(lambda *_: seen.append(True))
    add_norm(torch.randn(3, 8), None, norm)
    assert seen


@pytest.mark.parametrize("name", ["in_proj", "decay_up"])
def test_another_projection_is_called(name):
    """As LoRA and quantisation put it in place of the Linear."""
    mixer = BidirectionalGatedLinearAttention(16, num_heads=2, activation=True).double()
    nn.init.normal_(mixer.gate_bias)
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    expected = mixer(x)
    setattr(mixer, name, nn.Sequential(getattr(mixer, name)))
    torch.testing.assert_close(mixer(x), expected)
    with torch.no_grad():
        getattr(mixer, name)[0].weight *= 2
    assert not torch.allclose(mixer(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim, num_heads", [(192, 3), (384, 6)])  # a projection of less and of more than 1024 columns
def test_compiled_mixer_copies_no_part_of_the_projection(dim, num_heads):
    from torch._inductor.utils import run_and_get_code

    mixer = BidirectionalGatedLinearAttention(dim, num_heads=num_heads, activation=False).to("cuda", torch.bfloat16)
    x = torch.randn(2, 14, 14, dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = mixer(x)
        got, code = run_and_get_code(torch.compile(mixer, fullgraph=True), x)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert not re.findall(r"def (triton_\w*split\w*)", code[0])
