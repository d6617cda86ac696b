"""Attention gates of Attention U-Net: a coarse gating signal decides where a skip connection may pass, in 2-D and 3-D.

Paper: Attention U-Net: Learning Where to Look for the Pancreas, arXiv 1804.03999. Official code:
https://github.com/ozan-oktay/Attention-Gated-Networks (MIT); written from the paper and from its facts, nothing copied.
The style "concat" is that of AGUNet, arXiv 2101.07715.
Suffixes: B batch, C channels, S the two or three spatial axes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.kernels.launching import surely_equal

__all__ = ["AttentionGate", "conv_layer", "dropout_layer", "init_conv_and_norm", "norm_layer", "resize"]

GateStyle = Literal["grid", "additive", "concat"]
Norm = Literal["batch", "instance", "group"]

_CONVS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORMS: dict[int, type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}
_DROPOUTS: dict[int, type[nn.Dropout2d] | type[nn.Dropout3d]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
_LINEAR_MODES = {4: "bilinear", 5: "trilinear"}  # by the rank of the tensor


def conv_layer(
    in_channels: int, out_channels: int, *, spatial_dims: int, kernel_size: int = 1, stride: int = 1, bias: bool = True
) -> nn.Module:
    """Return a convolution over ``spatial_dims`` axes; an odd kernel of stride 1 keeps the size, others do not pad.

    Raises:
        ValueError: ``spatial_dims`` is neither 2 nor 3.
    """
    if spatial_dims not in _CONVS:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
    padding = kernel_size // 2 if stride == 1 else 0
    return _CONVS[spatial_dims](
        in_channels, out_channels, kernel_size=kernel_size, stride=stride, padding=padding, bias=bias
    )


def norm_layer(norm: Norm, channels: int, *, spatial_dims: int) -> nn.Module:
    """Return a normalisation of ``channels``: "batch", "instance" (with weight and bias) or "group".

    Group normalisation takes eight groups where they hold four channels or more, else fewer.

    Raises:
        ValueError: another ``norm``, or ``spatial_dims`` is neither 2 nor 3.
    """
    if spatial_dims not in _CONVS:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
    if norm == "batch":
        return _BATCH_NORMS[spatial_dims](channels)
    if norm == "instance":
        return _INSTANCE_NORMS[spatial_dims](channels, affine=True)
    if norm == "group":
        # Four channels a group at least: one value alone cannot be normalised, and a coarse map may be one position.
        groups = next((groups for groups in (8, 4, 2) if channels % groups == 0 and channels // groups >= 4), 1)
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"norm must be 'batch', 'instance' or 'group', got {norm!r}")


def dropout_layer(rate: float, *, spatial_dims: int) -> nn.Module:
    """Return a dropout of whole channels.

    Raises:
        ValueError: ``rate`` is not in [0, 1), or ``spatial_dims`` is neither 2 nor 3.
    """
    if spatial_dims not in _DROPOUTS:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout must be from 0 up to, not including, 1, got {rate}")
    return _DROPOUTS[spatial_dims](rate)


def resize(x_BCS: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate linearly over all spatial axes to ``size`` (pixel centres, not corners, are aligned)."""
    if surely_equal(x_BCS.shape[2:], size):
        return x_BCS
    return F.interpolate(x_BCS, size=size, mode=_LINEAR_MODES[x_BCS.ndim], align_corners=False)


def init_conv_and_norm(module: nn.Module) -> None:
    """Initialise all of ``module``: convolutions Kaiming normal, normalisation weights N(1, 0.02), biases zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")  # its weight has the input channels first
        elif isinstance(layer, _NORMS):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class AttentionGate(nn.Module):
    """y = proj(a * x) with a map a in [0, 1], one channel at x's size, made from x and a gating signal of any size.

    - ``style="grid"``, the paper's: a = up(sigmoid(psi(relu(theta(x) + resize(phi(gating)))))). theta is a convolution
      of kernel and stride ``sub_sample`` without bias, phi and psi are 1x1 convolutions; the sum lives on theta's
      coarse grid and ``up`` interpolates the map linearly to x's size. proj is a 1x1 convolution and a normalisation.
    - ``style="additive"``: a = sigmoid(psi(relu(theta(x) + phi(resize(gating))))), all at x's size. theta, phi and psi
      are 1x1 convolutions, each with a normalisation; there is no proj.
    - ``style="concat"``: the same with [phi(resize(gating)), theta(x)] concatenated instead of added.

    The map is the output of the submodule ``map``, so that a forward hook on it collects what the gate did.

    Args:
        in_channels: channels of the skip connection x, and of the result.
        gating_channels: channels of the gating signal.
        spatial_dims: 2 or 3.
        inter_channels: channels of theta and phi; None takes half of ``in_channels``.
        style: "grid", "additive" or "concat".
        norm: "batch", "instance" or "group".
        sub_sample: stride of theta in the grid style; the others have none.

    Raises:
        ValueError: an argument outside these; at run time inputs of another rank or other channels, or of batch sizes
            that differ.
    """

    gate_kind = "attention gate"
    gate_meaning = "1 lets the skip connection's fine detail pass there, 0 blocks it"

    def __init__(
        self,
        in_channels: int,
        gating_channels: int,
        *,
        spatial_dims: int = 2,
        inter_channels: int | None = None,
        style: GateStyle = "grid",
        norm: Norm = "batch",
        sub_sample: int = 2,
    ) -> None:
        super().__init__()
        if style not in ("grid", "additive", "concat"):
            raise ValueError(f"style must be 'grid', 'additive' or 'concat', got {style!r}")
        if inter_channels is None:
            inter_channels = max(in_channels // 2, 1)
        for name, value in (
            ("in_channels", in_channels),
            ("gating_channels", gating_channels),
            ("inter_channels", inter_channels),
            ("sub_sample", sub_sample),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels = in_channels
        self.gating_channels = gating_channels
        self.spatial_dims = spatial_dims
        self.style = style
        self.sub_sample = sub_sample
        theta = conv_layer(
            in_channels,
            inter_channels,
            spatial_dims=spatial_dims,
            kernel_size=sub_sample if style == "grid" else 1,
            stride=sub_sample if style == "grid" else 1,
            bias=style != "grid",
        )
        phi = conv_layer(gating_channels, inter_channels, spatial_dims=spatial_dims)
        psi = conv_layer(inter_channels * (2 if style == "concat" else 1), 1, spatial_dims=spatial_dims)
        if style == "grid":
            self.theta, self.phi, self.psi = theta, phi, psi
            self.proj: nn.Module = nn.Sequential(
                conv_layer(in_channels, in_channels, spatial_dims=spatial_dims),
                norm_layer(norm, in_channels, spatial_dims=spatial_dims),
            )
        else:
            self.theta = nn.Sequential(theta, norm_layer(norm, inter_channels, spatial_dims=spatial_dims))
            self.phi = nn.Sequential(phi, norm_layer(norm, inter_channels, spatial_dims=spatial_dims))
            self.psi = nn.Sequential(psi, norm_layer(norm, 1, spatial_dims=spatial_dims))
            self.proj = nn.Identity()
        self.map = nn.Identity()  # its output is the gate map, for forward hooks
        init_conv_and_norm(self)

    def forward(self, x_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        """Gate the skip connection (B, in_channels, *size) by (B, gating_channels, *any size); x's shape is kept."""
        return self.proj(self.attention_map(x_BCS, gating_BCS) * x_BCS)

    def attention_map(self, x_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        """Return the gate map (B, 1, *size of x) in [0, 1] that forward multiplies x by."""
        self._check(x_BCS, gating_BCS)
        size = x_BCS.shape[2:]
        if self.style == "additive":
            joint_BCS = self.theta(x_BCS) + self.phi(resize(gating_BCS, size))
        elif self.style == "concat":
            joint_BCS = torch.cat([self.phi(resize(gating_BCS, size)), self.theta(x_BCS)], dim=1)
        else:
            # theta needs one whole window: axes that are shorter than it repeat their last position.
            missing = [max(self.sub_sample - n, 0) for n in size]
            short = any(missing)
            far_ends = [pad for m in reversed(missing) for pad in (0, m)]
            theta_BCS = self.theta(F.pad(x_BCS, far_ends, mode="replicate") if short else x_BCS)
            joint_BCS = theta_BCS + resize(self.phi(gating_BCS), theta_BCS.shape[2:])
        gate_B1S = self.psi(F.relu(joint_BCS, inplace=True)).sigmoid()
        return self.map(resize(gate_B1S, size))

    def gate_map(self, x_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        """:meth:`attention_map`, under the name that :mod:`vision_gates.gate_maps` looks for."""
        return self.attention_map(x_BCS, gating_BCS)

    def _check(self, x_BCS: Tensor, gating_BCS: Tensor) -> None:
        for name, tensor, channels in (
            ("x", x_BCS, self.in_channels),
            ("gating", gating_BCS, self.gating_channels),
        ):
            if tensor.ndim != self.spatial_dims + 2:
                raise ValueError(
                    f"{name} must have {self.spatial_dims + 2} axes (batch, channels, {self.spatial_dims} spatial), "
                    f"got shape {tuple(tensor.shape)}"
                )
            if tensor.shape[1] != channels:
                raise ValueError(f"{name} must have {channels} channels, got {tensor.shape[1]}")
        if x_BCS.shape[0] != gating_BCS.shape[0]:
            raise ValueError(
                f"x and gating must have the same batch size, got {x_BCS.shape[0]} and {gating_BCS.shape[0]}"
            )

    def extra_repr(self) -> str:
        return f"style={self.style}"
