"""gnConv and the global-local filter against their equations, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.gates import GlobalLocalFilter, GnConv
from vision_gates.gates.global_local_filter import circular_filter, circular_filter_by_products

CHANNELS_LAST = {2: (0, 2, 3, 1), 3: (0, 2, 3, 4, 1)}
CHANNELS_FIRST = {2: (0, 3, 1, 2), 3: (0, 4, 1, 2, 3)}


def relative_error(result, expected):
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).abs().max() / expected.abs().max())


def randomise(module):
    """Every parameter N(0, 1) / sqrt(fan in), so that nothing is too small to be seen."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(max(parameter[0].numel(), 1)))
    return module


def gnconv_definition(layer, x_BSC, *, order, dims, scale, combine):
    """The paper's equations with channels first, and 1x1 convolutions, from the layer's parameters."""
    conv = F.conv2d if dims == 2 else F.conv3d
    widths = [x_BSC.shape[-1] // 2 ** (order - 1 - i) for i in range(order)]

    def pointwise(x, linear):
        return conv(x, linear.weight[(...,) + (None,) * dims], linear.bias)

    x = pointwise(x_BSC.permute(*CHANNELS_FIRST[dims]), layer.proj_in)
    p, q = x[:, : widths[0]], x[:, widths[0] :]
    dw = layer.spatial_filter
    d = scale * conv(q, dw.weight, dw.bias, padding=dw.weight.shape[-1] // 2, groups=q.shape[1])
    start = 0
    for i, width in enumerate(widths):
        if i > 0:
            p = pointwise(p, layer.widen[i - 1])
        gate = d[:, start : start + width]
        p = p * gate if combine == "mul" else p + gate
        start += width
    assert start == d.shape[1]
    return pointwise(p, layer.proj_out).permute(*CHANNELS_LAST[dims])


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("scale", [1 / 3, 1.0])
@pytest.mark.parametrize("dims, order, kernel_size", [(2, 1, 3), (2, 2, 7), (2, 5, 7), (2, 3, 1), (3, 2, 3), (3, 4, 5)])
def test_gnconv_is_the_papers_equation(dims, order, kernel_size, scale, combine):
    options = dict(order=order, scale=scale, combine=combine)
    layer = randomise(GnConv(32, kernel_size=kernel_size, spatial_dims=dims, **options).double())
    x = torch.randn(2, *(5, 7, 3)[:dims], 32, dtype=torch.float64, requires_grad=True)
    result, expected = layer(x), gnconv_definition(layer, x, dims=dims, **options)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    inputs = (x, *layer.parameters())
    upstream = torch.randn_like(result)
    for got, wanted in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("side", [1, 2, 9])
def test_gnconv_takes_maps_of_any_size_and_layout(dims, side):
    layer = randomise(GnConv(16, order=3, kernel_size=7, spatial_dims=dims))
    x = torch.randn(2, side, *(5, 4)[: dims - 1], 16)
    strided = x.permute(*CHANNELS_FIRST[dims]).contiguous().permute(*CHANNELS_LAST[dims])
    assert layer(x).shape == x.shape
    torch.testing.assert_close(layer(strided), layer(x))


@pytest.mark.parametrize("spatial_filter", [None, GlobalLocalFilter])
def test_gnconv_in_bfloat16(spatial_filter):
    layer = randomise(GnConv(32, order=3, scale=1.0, spatial_filter=spatial_filter))
    x = torch.randn(2, 6, 10, 32)
    exact = copy.deepcopy(layer).double()(x.double())
    assert relative_error(layer(x), exact) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
        mixed.sum().backward()
    assert mixed.dtype == torch.bfloat16 and relative_error(mixed, exact) < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half, exact) < 0.05


def test_gnconv_takes_another_filter():
    layer = GnConv(32, order=2, scale=1.0, spatial_filter=lambda dim: nn.Linear(dim, dim, bias=False), spatial_dims=3)
    assert layer.spatial_filter.in_features == 32 + 16
    assert layer(torch.randn(1, 2, 3, 4, 32)).shape == (1, 2, 3, 4, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dim=24, order=5), r"multiple of 2\^\(order-1\) = 16 for order 5, got 24"),
        (dict(dim=24, order=0), "order must be at least 1, got 0"),
        (dict(dim=24, order=2, kernel_size=6), "kernel_size must be odd and positive.*got 6"),
        (dict(dim=24, order=2, kernel_size=-1), "kernel_size must be odd and positive.*got -1"),
        (dict(dim=24, order=2, kernel_size=4, spatial_dims=3), "kernel_size must be odd.*got 4"),
        (dict(dim=24, order=2, spatial_dims=1), "spatial_dims must be 2 or 3, got 1"),
        (dict(dim=24, order=2, combine="max"), "combine must be 'mul' or 'add', got 'max'"),
    ],
)
def test_gnconv_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        GnConv(options.pop("dim"), **options)


def test_inputs_of_other_axes_are_refused():
    for dims, axes in ((2, r"\(B, H, W, C\)"), (3, r"\(B, D, H, W, C\)")):
        with pytest.raises(ValueError, match=rf"axes {axes}, got the shape \(2, 5, 16\)"):
            GnConv(16, order=2, spatial_dims=dims)(torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match=r"axes \(B, H, W, C\), got the shape \(2, 4, 4, 4, 16\)"):
        GlobalLocalFilter(16)(torch.zeros(2, 4, 4, 4, 16))


def circular_convolution(x_BHWC, spectrum_HVC):
    """Sum over shifts with the kernel that the spectrum's inverse transform gives; no transform of the map."""
    _, H, W, _ = x_BHWC.shape
    # An orthonormal pair of transforms divides by sqrt(HW) twice, once more than the kernel's own "backward" norm.
    kernel_HWC = torch.fft.irfft2(spectrum_HVC, s=(H, W), dim=(0, 1), norm="backward")
    result = torch.zeros_like(x_BHWC)
    for i in range(H):
        for j in range(W):
            result += kernel_HWC[i, j] * x_BHWC.roll((i, j), dims=(1, 2))
    return result


def bilinear(weight_CHV2, size):
    """Align-corners resizing written out."""

    def matrix(old, new):
        result = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            at = i * (old - 1) / (new - 1) if new > 1 else 0.0
            low = min(int(at), max(old - 2, 0))
            result[i, low] += 1 - (at - low)
            result[i, min(low + 1, old - 1)] += at - low
        return result

    rows, columns = matrix(weight_CHV2.shape[1], size[0]), matrix(weight_CHV2.shape[2], size[1])
    return torch.einsum("ih,jv,chvz->ijcz", rows, columns, weight_CHV2.double())


SIZES = [(6, 8), (6, 7), (5, 8), (1, 1), (1, 2), (3, 1), (14, 14), (9, 13)]


@pytest.mark.parametrize("size", SIZES)
def test_global_filter_is_a_circular_convolution(size):
    weight = torch.randn(3, 6, 5, 2, dtype=torch.float64)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    spectrum = torch.view_as_complex(bilinear(weight, (size[0], size[1] // 2 + 1)).contiguous())
    expected = circular_convolution(x, spectrum)
    torch.testing.assert_close(circular_filter(x, weight), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(circular_filter_by_products(x, weight), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [*SIZES, (56, 80)])
def test_products_equal_transforms_in_float32(size):
    weight = torch.randn(4, 14, 8, 2, requires_grad=True)
    x = torch.randn(2, *size, 4, requires_grad=True)
    exact = circular_filter(x.double(), weight)
    upstream = torch.randn(exact.shape)
    exact_gradients = torch.autograd.grad(exact, (x, weight), upstream.double())
    for form in (circular_filter, circular_filter_by_products):
        result = form(x, weight)
        assert result.dtype == torch.float32 and relative_error(result, exact) < 2e-6
        for got, wanted in zip(torch.autograd.grad(result, (x, weight), upstream), exact_gradients, strict=True):
            assert relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (5, 9), (2, 1)])
def test_global_local_filter_equation(size):
    layer = randomise(GlobalLocalFilter(12, size=(14, 8)).double())
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    normed = F.layer_norm(x, (12,), layer.pre_norm.weight, layer.pre_norm.bias, 1e-6)
    local = F.conv2d(normed[..., :6].permute(0, 3, 1, 2), layer.local_conv.weight, padding=1, groups=6)
    spectrum = bilinear(layer.complex_weight, (size[0], size[1] // 2 + 1)).contiguous()
    distant = circular_convolution(normed[..., 6:], torch.view_as_complex(spectrum))
    mixed = torch.empty_like(x)
    mixed[..., 0::2], mixed[..., 1::2] = local.permute(0, 2, 3, 1), distant
    expected = F.layer_norm(mixed, (12,), layer.post_norm.weight, layer.post_norm.bias, 1e-6)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [circular_filter, circular_filter_by_products])
def test_transforms_stay_in_float32(form, dtype):
    """Half-precision operands are the only error: the transform of those, in float64, is met to float32's precision."""
    x, weight = torch.randn(2, 7, 10, 4).to(dtype), torch.randn(4, 14, 8, 2).to(dtype)
    exact = circular_filter(x.double(), weight.double())
    assert relative_error(form(x, weight), exact) < 2e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(form(x, weight), exact) < 2e-6


def test_global_local_filter_returns_the_dtype_of_its_input():
    layer = randomise(GlobalLocalFilter(12))
    x = torch.randn(2, 5, 9, 12)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        mixed = layer(x.bfloat16())
    assert mixed.dtype == torch.bfloat16 and relative_error(mixed, exact) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert half.dtype == dtype and relative_error(half, exact) < 0.05


@pytest.mark.parametrize("size", [(14, 14), (7, 9)])
def test_export_holds_no_fourier_operator(size):
    layer = randomise(GlobalLocalFilter(12)).eval()
    x = torch.randn(2, *size, 12)
    program = torch.export.export(layer, (x,))
    assert not any("fft" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(x), layer(x)) < 1e-5
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "dim, size, message",
    [
        (7, (14, 8), "dim must be even.*got 7"),
        (8, (0, 8), r"size must be two positive numbers.*got \(0, 8\)"),
        (8, (4, 4, 4), "size must be two positive numbers"),
    ],
)
def test_global_local_filter_says_what_is_wrong(dim, size, message):
    with pytest.raises(ValueError, match=message):
        GlobalLocalFilter(dim, size=size)
