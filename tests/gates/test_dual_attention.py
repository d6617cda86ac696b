"""Dual attention against its dense definition in float64, and the promises of the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision_gates.gates import ChannelAttention, DualAttention, PositionAttention

SIZES = {2: (7, 5), 3: (3, 4, 5)}


def randomised(module: nn.Module) -> nn.Module:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point():
            nn.init.normal_(value, std=0.5)
    return module


def dense_position(x, state):
    """The definition, with the matrix of weights between all positions."""

    def project(name):
        return torch.einsum("oc,bcn->bon", state[f"{name}.weight"].flatten(1), x.flatten(2))

    query, key, value = map(project, ("query", "key", "value"))
    weights = torch.einsum("bdi,bdj->bij", query, key).softmax(dim=-1)
    assert weights.sum(-1).allclose(torch.ones((), dtype=x.dtype))
    return x + state["gamma"] * torch.einsum("bij,bcj->bci", weights, value).view_as(x)


def dense_channel(x, state):
    flat = x.flatten(2)
    weights = torch.einsum("bin,bjn->bij", flat, flat).softmax(dim=-1)
    return x + state["gamma"] * torch.einsum("bij,bjn->bin", weights, flat).view_as(x)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("channels", [16, 8, 4, 20, 17, 1])
def test_position_attention_is_the_dense_one(channels, spatial_dims):
    module = randomised(PositionAttention(channels, spatial_dims=spatial_dims)).double()
    assert module.query.weight.shape[0] == max(channels // 8, 1)
    x = torch.randn(2, channels, *SIZES[spatial_dims], dtype=torch.float64)
    torch.testing.assert_close(module(x), dense_position(x, module.state_dict()))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_channel_attention_is_the_dense_one(spatial_dims):
    module = randomised(ChannelAttention()).double()
    x = 0.3 * torch.randn(2, 6, *SIZES[spatial_dims], dtype=torch.float64)
    torch.testing.assert_close(module(x), dense_channel(x, module.state_dict()))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_dual_attention_is_its_equation(spatial_dims, norm):
    module = randomised(DualAttention(16, spatial_dims=spatial_dims, norm=norm)).double().eval()
    x = 0.3 * torch.randn(2, 16, *SIZES[spatial_dims], dtype=torch.float64)
    state = module.state_dict()
    conv = {2: F.conv2d, 3: F.conv3d}[spatial_dims]

    def normalised(value, prefix):
        weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
        if norm == "batch":
            return F.batch_norm(value, state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"], weight, bias)
        return F.group_norm(value, {"instance": 16, "group": 4}[norm], weight, bias)

    def refined(value, name):
        value = conv(value, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=1)
        value = normalised(value, f"{name}.1").clamp(min=0)
        return conv(value, state[f"{name}.4.weight"], state[f"{name}.4.bias"], padding=1)

    position = dense_position(x, {key.removeprefix("position."): value for key, value in state.items()})
    channel = dense_channel(x, {"gamma": state["channel.gamma"]})
    total = refined(position, "refine_position") + refined(channel, "refine_channel")
    expected = normalised(conv(total, state["proj.1.weight"], state["proj.1.bias"]), "proj.2")
    torch.testing.assert_close(module(x), expected)


def test_attentions_start_as_the_identity():
    x = torch.randn(2, 16, 6, 5)
    for module in (PositionAttention(16), ChannelAttention()):
        assert torch.equal(module(x), x)
        assert module.gamma.item() == 0


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_parameters_by_hand(spatial_dims):
    channels, kernel = 24, 3**spatial_dims
    attention = 2 * channels * 3 + channels**2 + 2
    refine = 2 * (channels**2 * kernel + channels) + 2 * channels
    proj = channels**2 + channels + 2 * channels
    module = DualAttention(channels, spatial_dims=spatial_dims)
    assert sum(p.numel() for p in module.parameters()) == attention + 2 * refine + proj


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradients(spatial_dims):
    module = randomised(DualAttention(8, spatial_dims=spatial_dims, norm="group", dropout=0.0)).double()
    x = torch.randn(1, 8, *(3, 2, 2)[:spatial_dims], dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.abs().max() > 0, name
    assert torch.autograd.gradcheck(module.position, x)
    assert torch.autograd.gradcheck(module.channel, x)


def test_dropout_is_of_whole_channels_in_training_only():
    module = DualAttention(16, norm="group", dropout=0.5)
    x = torch.randn(2, 16, 6, 6)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    assert {type(layer) for layer in module.modules() if "Dropout" in type(layer).__name__} == {nn.Dropout2d}


@pytest.mark.filterwarnings("ignore:Flash attention")
@pytest.mark.parametrize("channels", [64, 20, 17])
def test_no_matrix_of_all_positions(channels):
    """The fused kernel, which makes none, takes the tensors as they are; alone, it would refuse others."""
    module, x = PositionAttention(channels), torch.randn(1, channels, 16, 16, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        module(x).sum().backward()
        wide = torch.randn(1, 1, 256, channels)
        with pytest.raises(RuntimeError, match="No available kernel"):
            F.scaled_dot_product_attention(wide[..., :2], wide[..., :2], wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_channels_sums_finite(dtype):
    module = randomised(ChannelAttention())
    x = 20 * torch.randn(1, 4, 64, 64).to(dtype)  # squares sum to 1.6e6, float16 ends at 65504
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
    torch.testing.assert_close(y.double(), dense_channel(x.double(), module.double().state_dict()), rtol=2e-2, atol=0.3)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_compile_and_export(spatial_dims):
    torch.compiler.reset()
    module = randomised(DualAttention(12, spatial_dims=spatial_dims)).eval()
    x = 0.3 * torch.randn(2, 12, *SIZES[spatial_dims])
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(channels=0), "channels must be at least 1, got 0"),
        (dict(channels=8, spatial_dims=1), "spatial_dims must be 2 or 3, got 1"),
        (dict(channels=8, norm="layer"), "norm must be 'batch', 'instance' or 'group', got 'layer'"),
        (dict(channels=8, dropout=1.0), "dropout must be from 0 up to, not including, 1, got 1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DualAttention(**arguments)


@pytest.mark.parametrize("shape", [(1, 8, 4, 4, 4), (1, 6, 4, 4)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"input must be \(batch, 8 channels, 2 spatial axes\), got shape"):
        DualAttention(8)(torch.zeros(shape))
