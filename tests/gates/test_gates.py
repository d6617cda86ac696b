"""The reusable gates against their equations, in float64."""

import pytest
import torch
import torch.nn.functional as F

from vision_gates.gates import BidirectionalGatedLinearAttention, LocalityGate, SwiGLU
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


@pytest.mark.parametrize("activation", [True, False])
def test_mixer_equations(activation):
    dim, heads = 24, 3
    mixer = BidirectionalGatedLinearAttention(dim, num_heads=heads, activation=activation).double()
    x = torch.randn(2, 3, 5, dim, dtype=torch.float64)

    local = F.conv2d(x.permute(0, 3, 1, 2), mixer.local_conv.weight, padding=1, groups=dim).flatten(2).transpose(1, 2)
    act = F.silu if activation else torch.nn.Identity()
    local = act(local)
    q, k, v = (local @ mixer.qkv.weight.T).split([dim // 2, dim // 2, dim], dim=-1)
    logits = (local @ mixer.decay_down.weight.T) @ mixer.decay_up.weight.T + mixer.decay_up.bias
    forward, backward = (torch.log(torch.sigmoid(logits)) / 16).chunk(2, dim=-1)
    split = [t.view(2, 15, heads, -1) for t in (q, k, v, forward, backward)]
    o = bidirectional_gla_definition(*split)
    s = torch.sigmoid(local @ mixer.gate.weight.T + mixer.gate.bias).view(2, 15, heads, -1)
    y = rms(o, mixer.locality_gate.global_norm.weight) * s
    y = y + rms(local.view(2, 15, heads, -1), mixer.locality_gate.local_norm.weight) * (1 - s)
    expected = (act(y.reshape(2, 15, dim)) @ mixer.proj.weight.T).view(2, 3, 5, dim)
    torch.testing.assert_close(mixer(x), expected)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of 2 \\* num_heads = 10, got 24"):
        BidirectionalGatedLinearAttention(24, num_heads=5, activation=True)
