"""Gated positional self-attention against its definition, written out over all pairs of tokens in float64."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vision_gates.gates import GatedPositionalSelfAttention

GRIDS = [(4, 16), (16, 4), (8, 8), (1, 5), (1, 1)]


def randomised(dim=12, *, num_heads=3, scale=0.3, **kwargs) -> GatedPositionalSelfAttention:
    """A gate in float64 with every parameter random, so that each of them matters."""
    mixer = GatedPositionalSelfAttention(dim, num_heads=num_heads, **kwargs).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            nn.init.normal_(parameter, std=scale)
    return mixer


def positional_definition(weight_h3, H, W):
    """Softmax over all N keys of w . (dx, dy, dx^2 + dy^2), (h, N, N)."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    dx, dy = (axis[None, :] - axis[:, None] for axis in (x, y))
    offsets = torch.stack((dx, dy, dx**2 + dy**2), dim=-1).to(weight_h3.dtype)
    return (offsets @ weight_h3.T).permute(2, 0, 1).softmax(dim=-1)


def definition(mixer, x_BHWC):
    """(1 - s) softmax(q k^T / sqrt d) + s softmax(w . r) for all pairs of tokens, applied to the values."""
    B, H, W, C = x_BHWC.shape
    heads = mixer.num_heads
    q, k, v = (part.view(B, H * W, heads, C // heads).transpose(1, 2) for part in mixer.qkv(x_BHWC).chunk(3, dim=-1))
    content = (q @ k.transpose(-2, -1) / (C // heads) ** 0.5).softmax(dim=-1)
    s = torch.sigmoid(mixer.gate_logit).view(heads, 1, 1)
    attention = (1 - s) * content + s * positional_definition(mixer.pos_weight, H, W)
    assert attention.shape[-2:] == (H * W, H * W)
    return mixer.proj((attention @ v).transpose(1, 2).reshape(B, H, W, C))


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_output_and_gradients_are_those_of_the_definition(grid, qkv_bias):
    mixer = randomised(qkv_bias=qkv_bias)
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, *grid, 12, dtype=torch.float64)
    leaves = {"input": x} | dict(mixer.named_parameters())
    results = []
    for run in (mixer, lambda x: definition(mixer, x)):
        output = run(x)
        assert output.shape == x.shape
        results.append((output, torch.autograd.grad((output * cotangent).sum(), list(leaves.values()))))
    (output, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for name, gradient, wanted in zip(leaves, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
        if grid != (1, 1) and not (grid == (1, 5) and name == "pos_weight"):
            assert wanted.abs().max() > 1e-6, f"{name} is not tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(8, 8), (3, 20)])
def test_errors_are_at_most_twice_those_of_the_definition_in_the_same_dtype(grid, dtype):
    exact = randomised(24, num_heads=4)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.to(dtype))
    mixer = copy.deepcopy(exact).to(dtype)
    x, cotangent = (torch.randn(2, *grid, 24).to(dtype) for _ in range(2))
    results = []
    for module, run in ((exact, definition), (mixer, definition), (mixer, lambda module, x: module(x))):
        leaf = x.to(module.proj.weight.dtype, copy=True).requires_grad_()
        output = run(module, leaf)
        gradients = torch.autograd.grad((output * cotangent).sum(), [leaf, *module.parameters()])
        results.append([value.double() for value in (output, *gradients)])
    names = ["output", "input", *dict(exact.named_parameters())]
    for name, wanted, plain, ours in zip(names, *results, strict=True):
        size = wanted.abs().max()
        error, allowed = (ours - wanted).abs().max() / size, 2 * (plain - wanted).abs().max() / size + 1e-6
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("grid", GRIDS)
def test_positional_attention_is_the_kronecker_product_of_its_axes(grid):
    mixer = randomised(scale=1.0)
    rows, columns = mixer.positional_attention(*grid)
    whole = torch.stack([torch.kron(a, b) for a, b in zip(rows, columns, strict=True)])
    torch.testing.assert_close(whole, positional_definition(mixer.pos_weight, *grid), rtol=1e-10, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator gives, backward too."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_no_tensor_holds_all_pairs_of_tokens():
    mixer = GatedPositionalSelfAttention(8, num_heads=1)
    x = torch.randn(1, 32, 16, 8, requires_grad=True)
    with LargestTensor() as seen:
        mixer(x).square().sum().backward()
    assert 512 * 24 <= seen.largest < 512 * 512 / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e4, -1e4, 3e4])
def test_large_weights_stay_finite(dtype, scale):
    mixer = GatedPositionalSelfAttention(8, num_heads=4)
    with torch.no_grad():
        mixer.pos_weight.copy_(scale * torch.tensor([[1.0, 0, 0], [0, -1, 1], [1, 1, -1], [2, -1, 0.5]]))
    mixer = mixer.to(dtype)
    x = torch.randn(1, 20, 64, 8, dtype=dtype, requires_grad=True)
    for part in mixer.positional_attention(20, 64):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.sum(-1), torch.ones_like(part[..., 0]))
    output = mixer(x)
    output.float().square().mean().backward()
    assert output.isfinite().all() and x.grad.isfinite().all()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("num_heads, side", [(1, 1), (4, 2), (9, 3), (16, 4)])
def test_initial_heads_look_at_the_neighbours_of_a_square(num_heads, side):
    mixer = GatedPositionalSelfAttention(4 * num_heads, num_heads=num_heads)
    size, query = 31, 15
    mixer.requires_grad_(False)
    weights = positional_definition(mixer.pos_weight.double(), size, size)[:, query * size + query]
    weights = weights.view(num_heads, size, size)
    offset = torch.arange(size, dtype=torch.float64) - query
    rows, columns = mixer.positional_attention(size, size)
    for head in range(num_heads):
        # Official order: the row varies fastest over the heads.
        dy, dx = (index - (side - 1) / 2 for index in (head % side, head // side))
        torch.testing.assert_close(float((weights[head].sum(1) * offset).sum()), dy, rtol=0, atol=1e-6)
        torch.testing.assert_close(float((weights[head].sum(0) * offset).sum()), dx, rtol=0, atol=1e-6)
        torch.testing.assert_close(float(rows[head, query] @ offset.float()), dy, rtol=0, atol=1e-5)
        torch.testing.assert_close(float(columns[head, query] @ offset.float()), dx, rtol=0, atol=1e-5)


def test_rest_of_the_initialisation():
    mixer = GatedPositionalSelfAttention(20, num_heads=5, qkv_bias=True, locality_strength=0.5)
    assert torch.equal(mixer.qkv.weight[40:], torch.eye(20))
    assert mixer.qkv.bias.abs().max() == 0 and mixer.proj.bias.abs().max() == 0
    assert 0.015 < mixer.qkv.weight[:40].std() < 0.025
    torch.testing.assert_close(mixer.gate, torch.full((5,), 1 / (1 + torch.e**-1)))
    expected = 0.5 * torch.tensor([[-1.0, -1, -1], [-1, 1, -1], [1, -1, -1], [1, 1, -1]])
    torch.testing.assert_close(mixer.pos_weight[:4], expected)
    assert 0 < mixer.pos_weight[4].abs().max() < 0.1  # the fifth head has no place in the square


@pytest.mark.parametrize("logit, s", [(100.0, 1.0), (-100.0, 0.0)])
def test_gate_chooses_between_position_and_content(logit, s):
    mixer = randomised()
    nn.init.constant_(mixer.gate_logit, logit)
    torch.testing.assert_close(mixer.gate, torch.full((3,), s, dtype=torch.float64))
    x = torch.randn(1, 5, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), definition(mixer, x))
    other = copy.deepcopy(mixer)
    with torch.no_grad():
        if s:
            other.qkv.weight[:24].normal_()  # queries and keys
        else:
            other.pos_weight.normal_()
    torch.testing.assert_close(other(x), mixer(x))


def test_bfloat16_after_a_forward_in_float32_and_on_another_grid():
    mixer = randomised(24, num_heads=4).float()
    with torch.no_grad():
        mixer(torch.randn(2, 8, 8, 24))
        x = torch.randn(2, 5, 40, 24)
        expected = definition(copy.deepcopy(mixer).double(), x.double())
        half = mixer.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and mixer.gate.dtype == torch.float32
        assert (half.double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_mistakes():
    for dim, heads in ((12, 5), (12, 0), (0, 1), (12, -3)):
        with pytest.raises(ValueError, match=f"multiple of num_heads = {heads}, got {dim}"):
            GatedPositionalSelfAttention(dim, num_heads=heads)
    mixer = GatedPositionalSelfAttention(12, num_heads=3)
    for shape in ((2, 16, 12), (2, 12, 4, 4)):
        with pytest.raises(ValueError, match=re.escape(f"(B, H, W, 12), got {shape}")):
            mixer(torch.zeros(shape))
    assert "num_heads=3" in repr(mixer)
