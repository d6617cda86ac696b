"""Attention U-Net: a U-Net whose skip connections pass through attention gates, in 2-D and 3-D.

Paper: Attention U-Net: Learning Where to Look for the Pancreas, arXiv 1804.03999. Official code:
https://github.com/ozan-oktay/Attention-Gated-Networks (MIT); written from the paper and from its facts, nothing copied.
Official checkpoints of the CT networks load through ``checkpoint_filter_fn`` and give the official outputs.
Suffixes: B batch, C channels, S the two or three spatial axes.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_gates.gates import AttentionGate
from vision_gates.gates.attention_gate import GateStyle, Norm, init_conv_and_norm
from vision_gates.kernels.upsample_concat import upsample_concat
from vision_gates.models._build import build_model
from vision_gates.models._checkpoint import unwrap
from vision_gates.models._layered import LayeredModel
from vision_gates.models._unet import DeepSupervision, UNet, conv_norm_act, double_conv, one_of

__all__ = ["AttentionUNet", "AttentionUNetEncoder", "checkpoint_filter_fn"]

GATE_STYLES = ("grid", "additive")


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
            self.combine = conv_norm_act(
                num_gates * channels, channels, spatial_dims=spatial_dims, norm=norm, kernel_size=1
            )

    def forward(self, x_BCS: Tensor, gating_BCS: Tensor) -> Tensor:
        return self.combine(torch.cat([gate(x_BCS, gating_BCS) for gate in self.gates], dim=1))


class AttentionUNet(UNet):
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
        drop_path_rate: share of the training samples whose skip connection is dropped, for each level anew.

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
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            num_classes=num_classes,
            widths=widths,
            norm=norm,
            deep_supervision=deep_supervision,
        )
        gate_levels = tuple(range(2, len(widths))) if gate_levels is None else tuple(gate_levels)
        if gates_per_level < 1:
            raise ValueError(f"gates_per_level must be at least 1, got {gates_per_level}")
        if gate_style not in GATE_STYLES:
            raise ValueError(f"gate_style must be {one_of(GATE_STYLES)}, got {gate_style!r}")
        if len(set(gate_levels)) < len(gate_levels) or not set(gate_levels) <= set(range(1, len(widths))):
            raise ValueError(
                f"gate_levels must be different levels from 1 (finest) to {len(widths) - 1}, got {list(gate_levels)}"
            )
        self.pool = nn.MaxPool2d(2) if spatial_dims == 2 else nn.MaxPool3d(2)
        levels = range(1, len(widths))  # those with a skip connection; dictionaries below are keyed by them
        width = dict(enumerate(widths, start=1))

        self.encoder = nn.ModuleDict(
            {
                str(level): double_conv(
                    width.get(level - 1, in_channels), width[level], spatial_dims=spatial_dims, norm=norm
                )
                for level in levels
            }
        )
        self.center = double_conv(widths[-2], widths[-1], spatial_dims=spatial_dims, norm=norm)
        self.gating: nn.Module | None = None
        if levels[-1] in gate_levels:
            self.gating = conv_norm_act(widths[-1], widths[-1], spatial_dims=spatial_dims, norm=norm, kernel_size=1)
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
                str(level): double_conv(
                    width[level] + width[level + 1], width[level], spatial_dims=spatial_dims, norm=norm
                )
                for level in levels
            }
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.make_heads()
        init_conv_and_norm(self)

    def forward_features(self, x_BCS: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, *size) to the decoder's outputs, finest first, at padded size / 1, 2, 4 ..."""
        return self.forward_levels(x_BCS)[:-1]

    def forward_levels(self, x_BCS: Tensor) -> list[Tensor]:
        """As ``forward_features``, with the centre as the last."""
        x_BCS = self.padded(x_BCS)
        skips = {}
        for level, block in self.encoder.items():
            skips[level] = self.run(block, x_BCS)
            x_BCS = self.pool(skips[level])
        coarser_BCS = self.run(self.center, x_BCS)
        gating_BCS = coarser_BCS if self.gating is None else self.gating(coarser_BCS)
        levels = [coarser_BCS]
        for level, skip_BCS in reversed(skips.items()):
            if level in self.gates:
                skip_BCS = self.run(self.gates[level], skip_BCS, gating_BCS)
            joined_BCS = upsample_concat(self.drop_path(skip_BCS), coarser_BCS.to(skip_BCS.dtype))
            coarser_BCS = gating_BCS = self.run(self.decoder[level], joined_BCS)
            levels.insert(0, coarser_BCS)
        return levels


class AttentionUNetEncoder(LayeredModel):
    """The 2-D attention U-Net as a feature extractor and classifier with timm's interface.

    Feature level i, at stride 2 ** (i - 1), is the decoder's output there: fine detail that the gates let through, with
    the context of all coarser levels. The coarsest level joins the centre and the means of all other levels over its
    cells, so that the classifier hears every gate, as the paper's classifiers do that pool each gated map.

    Args:
        in_chans: input channels.
        num_classes: 0 gives pooled features.
        global_pool: "avg" or "" (feature maps (B, C, H, W)).
        widths: channels of each level, finest first; two or more.
        gate_style: "grid" or "additive", see :class:`AttentionUNet`.
        norm: "group" by default: train and eval mode agree, and batches may be small.
        drop_rate: dropout before the classifier.
        drop_path_rate: share of the training samples whose skip connection is dropped, for each level anew.

    Raises:
        ValueError: an argument outside these.
    """

    layers_name = "levels"
    output_fmts = ("NCHW",)

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        gate_style: GateStyle = "grid",
        norm: Norm = "group",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.unet = AttentionUNet(
            spatial_dims=2,
            in_channels=in_chans,
            num_classes=1,
            widths=widths,
            gate_style=gate_style,
            norm=norm,
            deep_supervision="none",
            drop_path_rate=drop_path_rate,
        )
        self.unet.heads = nn.ModuleDict()  # features are wanted, not logits
        channels = [*widths[:-1], sum(widths)]
        self.feature_info = [
            dict(num_chs=width, reduction=2**i, module=f"unet.decoder.{i + 1}") for i, width in enumerate(channels)
        ]
        self.feature_info[-1]["module"] = "unet.center"
        self.norm = nn.Identity()
        self._init_head(channels[-1], num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level in the backward pass instead of keeping its activations."""
        self.unet.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Nothing but the biases and normalisations that optimisers leave out anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay: down to the centre, then up."""
        depth = len(self.unet.widths)
        down = [(rf"^unet\.encoder\.{level}\.", (level,)) for level in range(2, depth)]
        up = [(rf"^unet\.(?:gates|decoder)\.{level}\.", (2 * depth - level,)) for level in range(depth - 1, 0, -1)]
        return dict(stem=r"^unet\.encoder\.1\.", blocks=[*down, (r"^unet\.(?:center|gating)\.", (depth,)), *up])

    @property
    def _layers(self) -> Any:
        return self.feature_info

    def _run_layers(
        self, x_BCHW: Tensor, count: int | None = None, *, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As in LayeredModel, but for the order: every level needs all coarser ones, so all of them run."""
        *decoded, centre_BCHW = self.unet.forward_levels(x_BCHW)
        depth = len(decoded)
        means = (F.avg_pool2d(level, 2 ** (depth - i)) for i, level in enumerate(decoded))
        joined_BCHW = torch.cat((centre_BCHW, *means), dim=1)
        height, width = x_BCHW.shape[2:]
        levels = [
            level[..., : (height + 2**i - 1) // 2**i, : (width + 2**i - 1) // 2**i]
            for i, level in enumerate((*decoded, joined_BCHW))
        ]
        return levels[-1].permute(0, 2, 3, 1), {i: levels[i].permute(0, 2, 3, 1) for i in keep}

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the classifier, whatever the intermediates; all levels are needed for each. Return their indices."""
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


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


def _cfg(note: str) -> dict[str, Any]:
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        first_conv="unet.encoder.1.0.0",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/ozan-oktay/Attention-Gated-Networks",
        paper_name="Attention U-Net: Learning Where to Look for the Pancreas",
        paper_ids="arXiv:1804.03999",
        notes=(note,),
    )


_NO_TOP1 = "no ImageNet-1k top-1: the paper's networks segment"
default_cfgs = generate_default_cfgs(
    {
        "vg_attention_unet_atto": _cfg("no paper result: a small model for tests, demos and CPUs"),
        "vg_attention_unet_tiny": _cfg(_NO_TOP1),
        "vg_attention_unet_small": _cfg(_NO_TOP1),
        "vg_attention_unet_base": _cfg(_NO_TOP1),
    }
)


def _attention_unet(variant: str, pretrained: bool, kwargs: dict[str, Any], *, width: int) -> AttentionUNetEncoder:
    return build_model(
        AttentionUNetEncoder,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3, 4)), feature_cls="getter"),
        **(dict(widths=tuple(width * 2**i for i in range(5))) | kwargs),
    )


@register_model
def vg_attention_unet_atto(pretrained: bool = False, **kwargs: Any) -> AttentionUNetEncoder:
    """0.80 M parameters; no paper result."""
    return _attention_unet("vg_attention_unet_atto", pretrained, kwargs, width=8)


@register_model
def vg_attention_unet_tiny(pretrained: bool = False, **kwargs: Any) -> AttentionUNetEncoder:
    """2.7 M parameters: the widths of the paper's CT network, in 2-D."""
    return _attention_unet("vg_attention_unet_tiny", pretrained, kwargs, width=16)


@register_model
def vg_attention_unet_small(pretrained: bool = False, **kwargs: Any) -> AttentionUNetEncoder:
    """9.8 M parameters: twice the widths of the paper's CT network."""
    return _attention_unet("vg_attention_unet_small", pretrained, kwargs, width=32)


@register_model
def vg_attention_unet_base(pretrained: bool = False, **kwargs: Any) -> AttentionUNetEncoder:
    """37.2 M parameters: the widths of U-Net, 64 to 1024."""
    return _attention_unet("vg_attention_unet_base", pretrained, kwargs, width=64)
