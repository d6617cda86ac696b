"""Attention U-Net: a U-Net whose skip connections pass through attention gates, in 2-D and 3-D.

Paper: Attention U-Net: Learning Where to Look for the Pancreas, arXiv 1804.03999. Official code:
https://github.com/ozan-oktay/Attention-Gated-Networks (MIT); written from the paper and from its facts, nothing copied.
Official checkpoints of the CT networks load through ``checkpoint_filter_fn`` and give the official outputs.
Suffixes: B batch, C channels, S the two or three spatial axes.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates import AttentionGate
from vision_gates.gates.attention_gate import GateStyle, Norm, conv_layer, init_conv_and_norm, norm_layer, resize
from vision_gates.models._checkpoint import unwrap

__all__ = ["AttentionUNet", "checkpoint_filter_fn"]

DeepSupervision = Literal["none", "fused", "separate"]


def _conv_norm_act(
    in_channels: int, out_channels: int, *, spatial_dims: int, norm: Norm, kernel_size: int
) -> nn.Module:
    return nn.Sequential(
        conv_layer(in_channels, out_channels, spatial_dims=spatial_dims, kernel_size=kernel_size),
        norm_layer(norm, out_channels, spatial_dims=spatial_dims),
        nn.ReLU(inplace=True),
    )


def _double_conv(in_channels: int, out_channels: int, *, spatial_dims: int, norm: Norm) -> nn.Module:
    return nn.Sequential(
        _conv_norm_act(in_channels, out_channels, spatial_dims=spatial_dims, norm=norm, kernel_size=3),
        _conv_norm_act(out_channels, out_channels, spatial_dims=spatial_dims, norm=norm, kernel_size=3),
    )


class GatedSkip(nn.Module):
    """One or more attention gates on one skip connection, and what combines them.

    The gated maps are concatenated and go through a 1x1 convolution, normalisation and ReLU. One additive gate alone is
    used as it is.
    """

    def __init__(
        self,
        channels: int,
        gating_channels: int,
        *,
        spatial_dims: int,
        num_gates: int,
        style: GateStyle,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            AttentionGate(
                channels,
                gating_channels,
                spatial_dims=spatial_dims,
                inter_channels=channels if style == "grid" else None,
                style=style,
                norm=norm,
            )
            for _ in range(num_gates)
        )
        self.combine: nn.Module = nn.Identity()
        if style == "grid" or num_gates > 1:
            self.combine = _conv_norm_act(
                num_gates * channels, channels, spatial_dims=spatial_dims, norm=norm, kernel_size=1
            )

    def forward(self, x_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        return self.combine(torch.cat([gate(x_BCS, gating_BCS) for gate in self.gates], dim=1))


class AttentionUNet(nn.Module):
    """Logits at input size from a U-Net with attention gates on its skip connections.

    Levels count from 1, the finest, to ``len(widths)``, the centre; each halves the size of the one before. A gate is
    driven by the decoder's output one level coarser, the coarsest by a 1x1 convolution, normalisation and ReLU of the
    centre. The defaults are the official CT network ``unet_CT_single_att_dsv_3D``; ``gates_per_level=2`` is
    ``unet_CT_multi_att_dsv_3D``.

    Any input size works: inputs are padded at the far ends (edge values repeated) to a multiple of ``divisor``,
    2 ** (levels - 1), and the logits are cropped back. Only a centre of a single position is refused where the
    normalisation has no second value there: with "instance", and with "batch" when training on a batch of one.

    The map of each gate is the output of the submodule ``gates.<level>.gates.<index>.map``, (B, 1, *size of the padded
    skip connection), for forward hooks.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: channels of the logits.
        widths: channels of each level, finest first; two or more.
        gate_style: "grid" (the paper's, with as many inner channels as the skip connection) or "additive" (half as
            many); see :class:`vision_gates.gates.AttentionGate`.
        norm: "batch", "instance" or "group".
        deep_supervision: "none" classifies the finest level. "fused" classifies every decoder level, brings the logits
            to input size and mixes them with a 1x1 convolution. "separate" does so without mixing: in training mode
            forward returns the list of all levels' logits, finest first, each for a loss of its own; in eval mode the
            finest level's tensor alone.
        gate_levels: levels with gates; None means all but the finest, () a plain U-Net.
        gates_per_level: gates that share a level.

    Raises:
        ValueError: an argument outside these; at run time an input of another rank, of other channels, or whose centre
            cannot be normalised.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        num_classes: int = 2,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        gate_style: GateStyle = "grid",
        norm: Norm = "batch",
        deep_supervision: DeepSupervision = "fused",
        gate_levels: Sequence[int] | None = None,
        gates_per_level: int = 1,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        gate_levels = tuple(range(2, len(widths))) if gate_levels is None else tuple(gate_levels)
        _check_arguments(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            num_classes=num_classes,
            widths=widths,
            deep_supervision=deep_supervision,
            gate_levels=gate_levels,
            gates_per_level=gates_per_level,
            gate_style=gate_style,
        )
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.widths = widths
        self.norm = norm
        self.deep_supervision = deep_supervision
        self.divisor = 2 ** (len(widths) - 1)
        self.pool = nn.MaxPool2d(2) if spatial_dims == 2 else nn.MaxPool3d(2)
        levels = range(1, len(widths))  # those with a skip connection; dictionaries below are keyed by them
        width = dict(enumerate(widths, start=1))

        self.encoder = nn.ModuleDict(
            {
                str(level): _double_conv(
                    width.get(level - 1, in_channels), width[level], spatial_dims=spatial_dims, norm=norm
                )
                for level in levels
            }
        )
        self.center = _double_conv(widths[-2], widths[-1], spatial_dims=spatial_dims, norm=norm)
        self.gating: nn.Module | None = None
        if levels[-1] in gate_levels:
            self.gating = _conv_norm_act(widths[-1], widths[-1], spatial_dims=spatial_dims, norm=norm, kernel_size=1)
        self.gates = nn.ModuleDict(
            {
                str(level): GatedSkip(
                    width[level],
                    width[level + 1],
                    spatial_dims=spatial_dims,
                    num_gates=gates_per_level,
                    style=gate_style,
                    norm=norm,
                )
                for level in sorted(gate_levels)
            }
        )
        self.decoder = nn.ModuleDict(
            {
                str(level): _double_conv(
                    width[level] + width[level + 1], width[level], spatial_dims=spatial_dims, norm=norm
                )
                for level in levels
            }
        )
        self.heads = nn.ModuleDict(
            {
                str(level): conv_layer(width[level], num_classes, spatial_dims=spatial_dims)
                for level in (levels if deep_supervision != "none" else levels[:1])
            }
        )
        self.fuse: nn.Module | None = None
        if deep_supervision == "fused":
            self.fuse = conv_layer(len(levels) * num_classes, num_classes, spatial_dims=spatial_dims)
        init_conv_and_norm(self)

    def forward(self, x_BCS: Tensor) -> Tensor | list[Tensor]:
        """Map images (B, in_channels, *size) to logits (B, num_classes, *size).

        With ``deep_supervision="separate"`` in training mode: a list of such logits, one a level, finest first.
        """
        size = x_BCS.shape[2:]
        decoded = self.forward_features(x_BCS)
        heads = list(self.heads.values())
        if self.deep_supervision == "separate" and not self.training:
            heads = heads[:1]
        full = decoded[0].shape[2:]
        logits = [resize(head(level_BCS), full) for head, level_BCS in zip(heads, decoded[: len(heads)], strict=True)]
        if self.fuse is not None:
            logits = [self.fuse(torch.cat(logits, dim=1))]
        window = (slice(None), slice(None), *(slice(n) for n in size))
        logits = [level_BCS[window] for level_BCS in logits]
        return logits if self.deep_supervision == "separate" and self.training else logits[0]

    def forward_features(self, x_BCS: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, *size) to the decoder's outputs, finest first, at padded size / 1, 2, 4 ..."""
        x_BCS = self._padded(x_BCS)
        skips = {}
        for level, block in self.encoder.items():
            skips[level] = block(x_BCS)
            x_BCS = self.pool(skips[level])
        coarser_BCS = self.center(x_BCS)
        gating_BCS = coarser_BCS if self.gating is None else self.gating(coarser_BCS)
        decoded: list[Tensor] = []
        for level, skip_BCS in reversed(skips.items()):
            if level in self.gates:
                skip_BCS = self.gates[level](skip_BCS, gating_BCS)
            up_BCS = resize(coarser_BCS, skip_BCS.shape[2:])
            coarser_BCS = gating_BCS = self.decoder[level](torch.cat([skip_BCS, up_BCS], dim=1))
            decoded.insert(0, coarser_BCS)
        return decoded

    def _padded(self, x_BCS: Tensor) -> Tensor:
        """Check the input and pad it to a multiple of ``divisor``."""
        if x_BCS.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"input must have {self.spatial_dims + 2} axes (batch, channels, {self.spatial_dims} spatial), "
                f"got shape {tuple(x_BCS.shape)}"
            )
        if x_BCS.shape[1] != self.in_channels:
            raise ValueError(f"input must have {self.in_channels} channels, got {x_BCS.shape[1]}")
        size = x_BCS.shape[2:]
        if 0 in size:
            raise ValueError(f"input must have one position or more along every axis, got size {tuple(size)}")
        alone = self.norm == "instance" or (self.norm == "batch" and self.training and x_BCS.shape[0] == 1)
        if alone and max(size) <= self.divisor:
            raise ValueError(
                f"norm {self.norm!r} cannot normalise the single position that an input of size {tuple(size)} leaves "
                f"at the coarsest level: give one axis more than {self.divisor} positions, or use norm 'group'"
            )
        missing = [-n % self.divisor for n in size]
        if any(missing):
            x_BCS = F.pad(x_BCS, [pad for m in reversed(missing) for pad in (0, m)], mode="replicate")
        return x_BCS


def _check_arguments(
    *,
    spatial_dims: int,
    in_channels: int,
    num_classes: int,
    widths: tuple[int, ...],
    deep_supervision: str,
    gate_levels: tuple[int, ...],
    gates_per_level: int,
    gate_style: str,
) -> None:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
    for name, value in (
        ("in_channels", in_channels),
        ("num_classes", num_classes),
        ("gates_per_level", gates_per_level),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be two or more positive channel counts, got {list(widths)}")
    if gate_style not in ("grid", "additive"):
        raise ValueError(f"gate_style must be 'grid' or 'additive', got {gate_style!r}")
    if deep_supervision not in ("none", "fused", "separate"):
        raise ValueError(f"deep_supervision must be 'none', 'fused' or 'separate', got {deep_supervision!r}")
    if len(set(gate_levels)) < len(gate_levels) or not set(gate_levels) <= set(range(1, len(widths))):
        raise ValueError(
            f"gate_levels must be different levels from 1 (finest) to {len(widths) - 1}, got {list(gate_levels)}"
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official checkpoint of a CT network into a state dict of ours; one of ours passes through.

    Unwraps ``model`` / ``state_dict`` entries and a ``module.`` prefix, and renames parameters.

    Args:
        state_dict: a loaded checkpoint.
        model: the :class:`AttentionUNet` it is for.
    """
    state_dict = unwrap(state_dict)
    if any(key.startswith("up_concat") for key in state_dict):
        state_dict = {_from_official_name(key): value for key, value in state_dict.items()}
    return state_dict


def _from_official_name(key: str) -> str:
    """Levels keep their numbers; layers and gates of a level count from 0 here, from 1 there."""

    def from_zero(number: str) -> str:
        return str(int(number) - 1)

    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"^conv(\d+)\.conv(\d+)\.", lambda m: f"encoder.{m[1]}.{from_zero(m[2])}."),
        (r"^center\.conv(\d+)\.", lambda m: f"center.{from_zero(m[1])}."),
        (r"^gating\.conv1\.", lambda m: "gating."),
        (r"^attentionblock(\d+)\.gate_block_(\d+)\.", lambda m: f"gates.{m[1]}.gates.{from_zero(m[2])}."),
        (r"^attentionblock(\d+)\.combine_gates\.", lambda m: f"gates.{m[1]}.combine."),
        (r"^up_concat(\d+)\.conv\.conv(\d+)\.", lambda m: f"decoder.{m[1]}.{from_zero(m[2])}."),
        (r"^dsv(\d+)\.(?:dsv\.0\.)?", lambda m: f"heads.{m[1]}."),
        (r"^final\.", lambda m: "fuse."),
    ]
    for pattern, replacement in rules:
        key, found = re.subn(pattern, replacement, key)
        if found:
            break
    return key.replace(".W.", ".proj.")
