"""Gated positional self-attention: ConViT's token mixer, exact and without a matrix of all pairs of tokens.

Paper: ConViT, arXiv 2103.10697, section 3. Written from the paper.
Suffixes: B batch, H W height and width, N = H * W tokens, C channels, h heads, D channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedPositionalSelfAttention"]


class GatedPositionalSelfAttention(nn.Module):
    """Each head attends by content and by position, and a gate s of its own weighs the two.

    With logits w . (dx, dy, dx^2 + dy^2) of the offset (dx, dy) from query to key, in tokens, a head's attention is

        A = (1 - s) softmax(q k^T / sqrt(D)) + s softmax(w . (dx, dy, dx^2 + dy^2)),  s = sigmoid(gate_logit).

    The positional logits are a sum of a term in dx and one in dy, and the grid is a product of rows and columns: the
    softmax over all positions is exactly that over columns times that over rows. A v is therefore two small products,
    O(N (H + W)), beside an attention that no gate touches (flash, where there is one); A itself is never formed.

    Args:
        dim: channels in and out.
        num_heads: must divide ``dim``.
        qkv_bias: biases of queries, keys and values.
        locality_strength: scale of the initial positional weights; larger is sharper.

    Raises:
        ValueError: ``num_heads`` is not positive or does not divide ``dim``; at run time an input that is not
            (B, H, W, dim).
    """

    def __init__(self, dim: int, *, num_heads: int, qkv_bias: bool = False, locality_strength: float = 1.0) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim must be a positive multiple of num_heads = {num_heads}, got {dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.locality_strength = locality_strength
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.pos_weight = nn.Parameter(torch.empty(num_heads, 3))  # of dx, dy, dx^2 + dy^2
        self.gate_logit = nn.Parameter(torch.empty(num_heads))
        self.proj = nn.Linear(dim, dim)
        self.init_weights()

    @property
    def gate(self) -> Tensor:
        """Share of the positional attention in each head, (num_heads,), in float32 or better."""
        return torch.sigmoid(_at_least_float32(self.gate_logit))

    def init_weights(self) -> None:
        """Start as a convolution: values are the input, head (a, b) of a square looks at its own neighbour.

        The heads' neighbours form a square of floor(sqrt(num_heads)) tokens a side around the query, head a + side * b
        looks at row a and column b of it. Heads beyond that square start without a preferred direction (N(0, 0.02)).
        """
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.ones_(self.gate_logit)
        nn.init.trunc_normal_(self.pos_weight, std=0.02)
        side = math.isqrt(self.num_heads)
        with torch.no_grad():
            nn.init.eye_(self.qkv.weight[2 * self.dim :])
            offsets = torch.arange(side, dtype=self.pos_weight.dtype, device=self.pos_weight.device) - (side - 1) / 2
            dx, dy = offsets.repeat_interleave(side), offsets.repeat(side)
            # -|r - d|^2 = 2 d . r - |r|^2 - |d|^2: a Gaussian around the neighbour d; the last term cancels.
            self.pos_weight[: side * side] = torch.stack((2 * dx, 2 * dy, -torch.ones_like(dx)), dim=1)
            self.pos_weight.mul_(self.locality_strength)

    def positional_attention(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positional attention of a grid along each axis; the whole is their Kronecker product.

        Args:
            height: rows of the grid.
            width: columns of the grid.

        Returns:
            From rows to rows (num_heads, height, height), and from columns to columns (num_heads, width, width):
            [head, query, key], each row sums to one; float32 or better.
        """
        linear_x, linear_y, square = _at_least_float32(self.pos_weight)[..., None, None].unbind(1)
        return _axis_attention(linear_y, square, height), _axis_attention(linear_x, square, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C), already normalised, to (B, H, W, C); the grid may have any H and W."""
        if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != self.dim:
            raise ValueError(f"expected tokens of shape (B, H, W, {self.dim}), got {tuple(x_BHWC.shape)}")
        H, W = x_BHWC.shape[1:3]
        qkv_BN3hD = self.qkv(x_BHWC.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        q_BhND, k_BhND, v_BhND = qkv_BN3hD.permute(2, 0, 3, 1, 4).unbind(0)
        content_BhND = F.scaled_dot_product_attention(q_BhND, k_BhND, v_BhND)

        rows_hHH, columns_hWW = self.positional_attention(H, W)
        v_BhHWD = v_BhND.unflatten(2, (H, W))
        position_BhHWD = torch.einsum("hxw,bhpwd->bhpxd", columns_hWW.to(v_BhHWD.dtype), v_BhHWD)
        position_BhHWD = torch.einsum("hyp,bhpxd->bhyxd", rows_hHH.to(v_BhHWD.dtype), position_BhHWD)

        # Attention is linear in its matrix: the gate weighs two results as it would weigh two matrices.
        gate = self.gate.to(content_BhND.dtype).view(-1, 1, 1)
        mixed_BhND = torch.lerp(content_BhND, position_BhHWD.flatten(2, 3), gate)
        return self.proj(mixed_BhND.transpose(1, 2).flatten(2)).unflatten(1, (H, W))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, locality_strength={self.locality_strength}"


def _axis_attention(linear_h11: Tensor, square_h11: Tensor, size: int) -> Tensor:
    """Softmax over keys j of linear * (j - i) + square * (j - i)^2, (h, size, size)."""
    position = torch.arange(size, device=linear_h11.device, dtype=linear_h11.dtype)
    offset = position - position[:, None]
    return (linear_h11 * offset + square_h11 * offset.square()).softmax(dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
