"""Global-local filter: half of the channels see their neighbours, half the whole map through its spectrum.

Papers: HorNet, arXiv 2207.14284, section 3.2 ("GF"); the global filter: GFNet, arXiv 2107.00645. Written from them.
Suffixes: B batch, C channels, H W height and width, V = W // 2 + 1 columns of the spectrum of a real map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.gnconv import DepthwiseConv2d
from vision_gates.kernels.launching import is_exporting, surely_equal

__all__ = ["GlobalLocalFilter", "circular_filter", "circular_filter_by_products", "resize_spectrum"]


class GlobalLocalFilter(nn.Module):
    """LayerNorm; a depthwise 3x3 convolution beside a learned circular convolution of the whole map; LayerNorm.

    The first half of the channels goes through the 3x3 convolution (no bias), the second through a product with a
    learned complex map in the frequency domain; channels of the two halves then alternate. Maps of any size work: the
    learned spectrum is resized bilinearly.

    The Fourier transform runs in float32 (float64 for float64 inputs), whatever the dtype of weights and inputs and
    under autocast too. torch.export and ONNX get a form without Fourier operators, made of matrix products.

    Args:
        dim: channels, even.
        size: rows and columns (H, W // 2 + 1) of the learned spectrum: (14, 8) suits maps of 14x14.
        eps: of the normalisations.

    Raises:
        ValueError: an odd ``dim``, or a ``size`` that is not positive; at run time an input that is not (B, H, W, C).
    """

    def __init__(self, dim: int, *, size: tuple[int, int] = (14, 8), eps: float = 1e-6) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even, one half is filtered locally and one globally, got {dim}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be two positive numbers, rows and columns of the spectrum, got {size}")
        self.pre_norm = nn.LayerNorm(dim, eps=eps)
        self.local_conv = DepthwiseConv2d(dim // 2, 3, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, *size, 2))  # real and imaginary part
        self.post_norm = nn.LayerNorm(dim, eps=eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Real and imaginary parts N(0, 0.02)."""
        nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C), in the dtype of the input."""
        if x_BHWC.ndim != 4:
            raise ValueError(f"input must have the axes (B, H, W, C), got the shape {tuple(x_BHWC.shape)}")
        local_BHWC, global_BHWC = self.pre_norm(x_BHWC).chunk(2, dim=-1)
        local_BHWC = self.local_conv(local_BHWC)
        exporting = is_exporting() or torch.onnx.is_in_onnx_export()
        filter_map = circular_filter_by_products if exporting else circular_filter
        global_BHWC = filter_map(global_BHWC, self.complex_weight).to(local_BHWC.dtype)
        mixed_BHWC = torch.stack((local_BHWC, global_BHWC), dim=-1).flatten(-2)
        return self.post_norm(mixed_BHWC).to(x_BHWC.dtype)


def resize_spectrum(weight_CHV2: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a complex map (C, rows, columns, 2) bilinearly, corners on corners; the official rule."""
    if surely_equal(weight_CHV2.shape[1:3], size):
        return weight_CHV2
    maps_2CHV = weight_CHV2.permute(3, 0, 1, 2)
    return F.interpolate(maps_2CHV, size=size, mode="bilinear", align_corners=True).permute(1, 2, 3, 0)


def _operands(x_BHWC: Tensor, weight_CHV2: Tensor) -> tuple[Tensor, Tensor]:
    """The map, and the spectrum at its size as (2, H, V, C), both in the dtype of the transform."""
    dtype = torch.float64 if x_BHWC.dtype == torch.float64 else torch.float32
    size = (x_BHWC.shape[1], x_BHWC.shape[2] // 2 + 1)
    return x_BHWC.to(dtype), resize_spectrum(weight_CHV2.to(dtype), size).permute(3, 1, 2, 0)


def circular_filter(x_BHWC: Tensor, weight_CHV2: Tensor) -> Tensor:
    """Convolve each channel circularly: multiply its orthonormal real Fourier transform by a complex map.

    Args:
        x_BHWC: (B, H, W, C).
        weight_CHV2: (C, rows, columns, 2), real and imaginary parts, resized to H rows and W // 2 + 1 columns.

    Returns:
        (B, H, W, C) in float32, float64 for float64 inputs.
    """
    x_BHWC, weight_2HVC = _operands(x_BHWC, weight_CHV2)
    spectrum_BHVC = torch.fft.rfft2(x_BHWC, dim=(1, 2), norm="ortho") * torch.complex(*weight_2HVC.unbind())
    return torch.fft.irfft2(spectrum_BHVC, s=x_BHWC.shape[1:3], dim=(1, 2), norm="ortho")


def circular_filter_by_products(x_BHWC: Tensor, weight_CHV2: Tensor) -> Tensor:
    """:func:`circular_filter` in real arithmetic without Fourier operators: a matrix product an axis and direction."""
    kind = x_BHWC.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _filter_by_products(x_BHWC, weight_CHV2)
    return _filter_by_products(x_BHWC, weight_CHV2)


def _filter_by_products(x_BHWC: Tensor, weight_CHV2: Tensor) -> Tensor:
    x_BHWC, weight_2HVC = _operands(x_BHWC, weight_CHV2)
    B, H, W, C = x_BHWC.shape
    V = W // 2 + 1
    # exp(-i t) = cos t - i sin t. Complex numbers are two rows of a matrix, and along H also two columns.
    cos_HH, sin_HH = _angles(H, H, like=x_BHWC)
    cos_VW, sin_VW = _angles(V, W, like=x_BHWC)
    along_W = torch.cat((cos_VW, -sin_VW))
    along_H = torch.cat((torch.cat((cos_HH, sin_HH), dim=1), torch.cat((-sin_HH, cos_HH), dim=1)))
    spectrum = torch.matmul(along_W, x_BHWC).view(B, H, 2, V, C).transpose(1, 2)
    spectrum = torch.matmul(along_H, spectrum.reshape(B, 2 * H, V * C)).view(B, 2, H, V, C)
    (real, imaginary), (weight_real, weight_imaginary) = spectrum.unbind(1), weight_2HVC.unbind()
    spectrum = torch.stack(
        (real * weight_real - imaginary * weight_imaginary, real * weight_imaginary + imaginary * weight_real), dim=1
    )
    # Both matrices have orthonormal rows but for the columns of the spectrum that a real map leaves out: all but the
    # first and, of an even width, the last count twice.
    spectrum = torch.matmul(along_H.T, spectrum.view(B, 2 * H, V * C)).view(B, 2, H, V, C)
    column = torch.arange(V, device=x_BHWC.device)
    counts = 2.0 - ((column == 0) | (2 * column == W)).to(x_BHWC.dtype)
    spectrum = spectrum.transpose(1, 2).reshape(B, H, 2 * V, C)
    return torch.matmul(along_W.T * counts.repeat(2), spectrum)


def _angles(rows: int, period: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi k n / period over sqrt(period), k < rows, n < period, in the dtype of ``like``."""
    k, n = torch.arange(rows, device=like.device), torch.arange(period, device=like.device)
    turn = n[-1] + 1  # the period as a tensor, since a graph that leaves it open has no number for it
    # The product is reduced as an integer: a float32 angle of many turns would be coarse.
    angle = (k[:, None] * n[None, :] % turn).to(like.dtype) * (2 * math.pi / turn.to(like.dtype))
    norm = turn.to(like.dtype).rsqrt()
    return angle.cos() * norm, angle.sin() * norm
