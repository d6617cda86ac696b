"""Attention gates against their equations in plain functional float64, and the promises of the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.gates import AttentionGate
from vision_gates.gates.attention_gate import norm_layer

STYLES = ("grid", "additive", "concat")
CONV = {2: F.conv2d, 3: F.conv3d}
MODE = {2: "bilinear", 3: "trilinear"}
SIZES = {2: ((9, 13), (4, 3)), 3: ((5, 8, 7), (2, 4, 3))}


def make(style="grid", spatial_dims=2, norm="batch", **kwargs):
    gate = AttentionGate(6, 10, spatial_dims=spatial_dims, style=style, norm=norm, **kwargs)
    for name, value in [*gate.named_parameters(), *gate.named_buffers()]:
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point():
            nn.init.normal_(value, std=0.7)
    return gate


def inputs(spatial_dims, dtype=torch.float32, batch=2):
    size, gating_size = SIZES[spatial_dims]
    return torch.randn(batch, 6, *size, dtype=dtype), torch.randn(batch, 10, *gating_size, dtype=dtype)


def normalised(norm, x, state, prefix):
    weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
    if norm == "batch":
        return F.batch_norm(x, state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"], weight, bias)
    if norm == "instance":
        return F.instance_norm(x, weight=weight, bias=bias)
    return F.group_norm(x, 1, weight, bias)  # too few channels for more groups


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_grid_equation(spatial_dims, norm):
    gate = make("grid", spatial_dims, norm, inter_channels=5).double().eval()
    x, gating = inputs(spatial_dims, torch.float64)
    state, conv = gate.state_dict(), CONV[spatial_dims]
    theta = conv(x, state["theta.weight"], stride=2)
    phi = conv(gating, state["phi.weight"], state["phi.bias"])
    phi = F.interpolate(phi, size=theta.shape[2:], mode=MODE[spatial_dims], align_corners=False)
    a = conv((theta + phi).clamp(min=0), state["psi.weight"], state["psi.bias"])
    a = F.interpolate(1 / (1 + (-a).exp()), size=x.shape[2:], mode=MODE[spatial_dims], align_corners=False)
    y = normalised(norm, conv(a * x, state["proj.0.weight"], state["proj.0.bias"]), state, "proj.1")
    torch.testing.assert_close(gate(x, gating), y)
    torch.testing.assert_close(gate.attention_map(x, gating), a)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("style", ["additive", "concat"])
def test_additive_and_concatenating_equation(style, spatial_dims, norm):
    gate = make(style, spatial_dims, norm, inter_channels=5).double().eval()
    x, gating = inputs(spatial_dims, torch.float64)
    state, conv = gate.state_dict(), CONV[spatial_dims]

    def branch(name, value):
        value = conv(value, state[f"{name}.0.weight"], state[f"{name}.0.bias"])
        return normalised(norm, value, state, f"{name}.1")

    up = F.interpolate(gating, size=x.shape[2:], mode=MODE[spatial_dims], align_corners=False)
    theta, phi = branch("theta", x), branch("phi", up)
    joint = theta + phi if style == "additive" else torch.cat([phi, theta], dim=1)
    a = 1 / (1 + (-branch("psi", joint.clamp(min=0))).exp())
    torch.testing.assert_close(gate(x, gating), a * x)
    torch.testing.assert_close(gate.attention_map(x, gating), a)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("style", STYLES)
def test_a_hook_sees_the_map(style, spatial_dims):
    gate = make(style, spatial_dims)
    x, gating = inputs(spatial_dims)
    seen = []
    gate.map.register_forward_hook(lambda module, args, output: seen.append(output))
    y = gate(x, gating)
    (a,) = seen
    assert y.shape == x.shape
    assert a.shape == (2, 1, *x.shape[2:])
    assert a.min() >= 0 and a.max() <= 1 and a.std() > 0.01
    if style != "grid":
        torch.testing.assert_close(y, a * x)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (17, 4)])
@pytest.mark.parametrize("gating_size", [(1, 1), (5, 2), (20, 20)])
def test_any_size(style, size, gating_size):
    gate = make(style).eval()
    with torch.no_grad():
        assert gate(torch.randn(1, 6, *size), torch.randn(1, 10, *gating_size)).shape == (1, 6, *size)


@pytest.mark.parametrize("sub_sample", [1, 3])
def test_sub_sample_is_thetas_stride(sub_sample):
    gate = make(sub_sample=sub_sample).eval()
    with torch.no_grad():
        x, gating = torch.randn(1, 6, 12, 9), torch.randn(1, 10, 4, 3)
        assert gate.theta(x).shape[2:] == (12 // sub_sample, 9 // sub_sample)
        assert gate(x, gating).shape == x.shape


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("style", STYLES)
def test_gradients(style, spatial_dims):
    gate = AttentionGate(6, 10, spatial_dims=spatial_dims, style=style, norm="group").double()
    x, gating = inputs(spatial_dims, torch.float64)
    gate(x.requires_grad_(), gating.requires_grad_()).square().sum().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert x.grad.abs().max() > 0 and gating.grad.abs().max() > 0
    assert torch.autograd.gradcheck(gate, (x[:1, :, :3, :3].detach().requires_grad_(), gating[:1].detach()))


@pytest.mark.parametrize("style, inter_channels", [("grid", None), ("additive", None), ("concat", None), ("grid", 7)])
def test_inner_channels(style, inter_channels):
    gate = make(style, inter_channels=inter_channels)
    weight = gate.state_dict()["phi.weight" if style == "grid" else "phi.0.weight"]
    assert weight.shape == (inter_channels or 3, 10, 1, 1)
    assert AttentionGate(1, 1)(torch.randn(2, 1, 4, 4), torch.randn(2, 1, 2, 2)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("channels, groups", [(1, 1), (7, 1), (8, 2), (12, 2), (16, 4), (32, 8), (36, 4), (256, 8)])
def test_groups_hold_four_channels_or_more(channels, groups):
    assert norm_layer("group", channels, spatial_dims=2).num_groups == groups


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(spatial_dims=1), "spatial_dims must be 2 or 3, got 1"),
        (dict(style="soft"), "style must be 'grid', 'additive' or 'concat', got 'soft'"),
        (dict(norm="layer"), "norm must be 'batch', 'instance' or 'group', got 'layer'"),
        (dict(in_channels=0), "in_channels must be at least 1, got 0"),
        (dict(gating_channels=-1), "gating_channels must be at least 1, got -1"),
        (dict(inter_channels=0), "inter_channels must be at least 1, got 0"),
        (dict(sub_sample=0), "sub_sample must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionGate(**(dict(in_channels=6, gating_channels=10) | arguments))


@pytest.mark.parametrize(
    "x, gating, message",
    [
        ((1, 6, 8), (1, 10, 4, 4), r"x must have 4 axes .*got shape \(1, 6, 8\)"),
        ((1, 6, 8, 8), (1, 10, 4, 4, 4), r"gating must have 4 axes .*got shape \(1, 10, 4, 4, 4\)"),
        ((1, 5, 8, 8), (1, 10, 4, 4), "x must have 6 channels, got 5"),
        ((1, 6, 8, 8), (1, 6, 4, 4), "gating must have 10 channels, got 6"),
        ((2, 6, 8, 8), (1, 10, 4, 4), "same batch size, got 2 and 1"),
    ],
)
def test_bad_inputs(x, gating, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(x), torch.zeros(gating))


@pytest.mark.parametrize("style", STYLES)
def test_compile_and_export(style):
    torch.compiler.reset()
    gate, (x, gating) = make(style).eval(), inputs(2)
    with torch.no_grad():
        expected = gate(x, gating)
        torch.testing.assert_close(torch.compile(gate, fullgraph=True, backend="aot_eager")(x, gating), expected)
        torch.testing.assert_close(torch.export.export(gate, (x, gating)).module()(x, gating), expected)
