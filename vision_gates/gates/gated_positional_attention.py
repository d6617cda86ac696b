"""Gated positional self-attention: ConViT's token mixer, exact and without a matrix of all pairs of tokens.

Paper: ConViT, arXiv 2103.10697, section 3. Written from the paper.
Suffixes: B batch, H W height and width, N = H * W tokens, C channels, h heads, D channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.plain_linear import wide_linear
from vision_gates.kernels.positional_attention import positional_attention

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

    gate_kind = "gated positional attention"
    gate_unit = "head"
    gate_meaning = "1 attends by position alone, 0 by content alone"

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

    def positional_map(self, height: int, width: int, *, query: tuple[int, int] | None = None) -> Tensor:
        """Positional attention of one query over the grid: where each head looks, whatever the image.

        Args:
            height: rows of the grid.
            width: columns of the grid.
            query: its row and column; None is the middle of the grid.

        Returns:
            (num_heads, height, width), each map sums to one; float32 or better.
        """
        row, column = (height // 2, width // 2) if query is None else query
        rows_hHH, columns_hWW = self.positional_attention(height, width)
        return rows_hHH[:, row, :, None] * columns_hWW[:, column, None, :]

    def gate_map(self, x_BHWC: Tensor) -> Tensor:
        """Return the share of the positional attention in each head, (num_heads,), for any input."""
        return self.gate

    def neighbourhoods(self, x_BHWC: Tensor) -> Tensor:
        """:meth:`positional_map` of the input's grid from its middle, relative to the maximum: (num_heads, H, W)."""
        position_hHW = self.positional_map(*x_BHWC.shape[1:3])
        return position_hHW / position_hHW.amax(dim=(1, 2), keepdim=True)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C), already normalised, to (B, H, W, C); the grid may have any H and W."""
        if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != self.dim:
            raise ValueError(f"expected tokens of shape (B, H, W, {self.dim}), got {tuple(x_BHWC.shape)}")
        H, W = x_BHWC.shape[1:3]
        qkv_BN3hD = wide_linear(x_BHWC.flatten(1, 2), self.qkv).unflatten(-1, (3, self.num_heads, -1))
        q_BNhD, k_BNhD, v_BNhD = qkv_BN3hD.unbind(2)
        content_BhND = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q_BNhD, k_BNhD, v_BNhD)))
        # Attention is linear in its matrix: the gate weighs two results as it would weigh two matrices.
        tables = self.positional_attention(H, W)
        mixed_BNhD = positional_attention(content_BhND.transpose(1, 2), v_BNhD, *tables, self.gate)
        return self.proj(mixed_BNhD.flatten(2)).unflatten(1, (H, W))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, locality_strength={self.locality_strength}"


def _axis_attention(linear_h11: Tensor, square_h11: Tensor, size: int) -> Tensor:
    """Softmax over keys j of linear * (j - i) + square * (j - i)^2, (h, size, size)."""
    position = torch.arange(size, device=linear_h11.device, dtype=linear_h11.dtype)
    offset = position - position[:, None]
    return (linear_h11 * offset + square_h11 * offset.square()).softmax(dim=-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
