"""ViG: vision networks that mix tokens by bidirectional gated linear attention, plain and hierarchical.

Paper: ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention, arXiv 2405.18425.
Official code: https://github.com/hustvl/ViG (MIT); written from the paper and from its facts, nothing copied. Official
checkpoints load through ``checkpoint_filter_fn`` and give the official outputs, at any input size.
Suffixes: B batch, C channels, H W height and width of the token grid, N = H * W tokens.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_gates.gates import BidirectionalGatedLinearAttention, SwiGLU, add_norm
from vision_gates.models._build import build_model
from vision_gates.models._checkpoint import fit_pos_embed, resize_pos_embed, unwrap
from vision_gates.models._layered import LayeredModel, drop_path_rates
from vision_gates.models._stem import embed_patches

__all__ = ["HierarchicalViG", "ViG"]

_LAYER_NORM_EPS = 1e-5
_RMS_NORM_EPS = 1e-6


def _swiglu_hidden_dim(dim: int, *, multiple_of: int) -> int:
    """Two thirds of four times ``dim``, rounded up to ``multiple_of``."""
    return multiple_of * -(-(8 * dim // 3) // multiple_of)


class ViGBlock(nn.Module):
    """x = x + mixer(norm(x)); x = x + SwiGLU(norm(x)), on channels-last tokens (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        hidden_dim: int,
        activation: bool,
        norm_layer: Callable[[int], nn.Module],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.mixer = BidirectionalGatedLinearAttention(
            dim, num_heads=num_heads, activation=activation, eps=_RMS_NORM_EPS
        )
        self.norm2 = norm_layer(dim)
        self.mlp = SwiGLU(dim, hidden_dim=hidden_dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        normed_BHWC, x_BHWC = add_norm(x_BHWC, None, self.norm1)
        normed_BHWC, x_BHWC = add_norm(self.drop_path(self.mixer(normed_BHWC)), x_BHWC, self.norm2)
        return x_BHWC + self.drop_path(self.mlp(normed_BHWC))


def _init_weights(model: nn.Module) -> None:
    """Linear layers N(0, 0.02), biases zero; then every mixer its own initialisation."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, BidirectionalGatedLinearAttention):
            module.init_weights()


class ViG(LayeredModel):
    """Plain ViG: one resolution, an absolute position embedding, RMS normalisation.

    Any height and width of at least ``patch_size / 2 - 1`` pixels work. The stem is unpadded at the far edges, as the
    official one: up to 6 of the last rows and columns (patch 16) fall outside when a side is no multiple of the patch.

    Args:
        img_size: training resolution; it fixes the position embedding's grid, others are resized to bicubically.
        patch_size: a multiple of 4; the stride of the token grid.
        in_chans: input channels.
        num_classes: 0 gives pooled features.
        global_pool: "avg" or "" (token features (B, N, C)).
        embed_dim: channels.
        depth: blocks.
        num_heads: heads of the mixer.
        activation: SiLU inside the mixer, after its convolution and after its gate (ViG-T has it, S and B do not).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: a patch size that is no multiple of 4; at run time an input smaller than one token.
    """

    layers_name = "blocks"
    output_fmts = ("NLC", "NCHW")

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        activation: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size <= 0 or patch_size % 4:
            raise ValueError(f"patch_size must be a positive multiple of 4, got {patch_size}")
        self.patch_size = patch_size
        self.grad_checkpointing = False
        stride = patch_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=stride + 1, stride=stride, padding=1),
            LayerNorm2d(embed_dim // 2, eps=_LAYER_NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1),
            LayerNorm2d(embed_dim, eps=_LAYER_NORM_EPS),
        )
        self.grid_size = self._grid(*to_2tuple(img_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        norm_layer = partial(nn.RMSNorm, eps=_RMS_NORM_EPS)
        hidden_dim = _swiglu_hidden_dim(embed_dim, multiple_of=256)
        self.blocks = nn.ModuleList(
            ViGBlock(
                embed_dim,
                num_heads=num_heads,
                hidden_dim=hidden_dim,
                activation=activation,
                norm_layer=norm_layer,
                drop_path=rate,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.norm = norm_layer(embed_dim)
        self._init_head(embed_dim, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)
        _init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are no weights of a product."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay."""
        return dict(stem=r"^stem|^pos_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of the stem's two convolutions."""
        stride = self.patch_size // 2
        if min(height, width) < stride - 1:
            raise ValueError(
                f"input of {height}x{width} pixels is too small for patch_size {self.patch_size}: "
                f"each side needs at least {stride - 1}"
            )
        return ((height + 1 - stride) // stride + 2) // 2, ((width + 1 - stride) // stride + 2) // 2

    def _embed(self, x_BCHW: Tensor) -> Tensor:
        H, W = self._grid(*x_BCHW.shape[-2:])
        x_BHWC = self.stem[1:](embed_patches(x_BCHW, self.stem[0])).permute(0, 2, 3, 1)
        # Under autocast the sum is float32, and so is the residual stream from here on.
        return x_BHWC + resize_pos_embed(self.pos_embed, self.grid_size, (H, W)).view(1, H, W, -1)


def _downsample(in_chans: int, out_chans: int) -> nn.Sequential:
    """Halve the resolution: conv 3x3 stride 2, then LayerNorm over channels; (B, C, H, W) in and out."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, padding=1),
        LayerNorm2d(out_chans, eps=_LAYER_NORM_EPS),
    )


class ViGStage(nn.Module):
    """Optional downsampling, then blocks, on (B, H, W, C)."""

    def __init__(self, in_chans: int, dim: int, *, blocks: list[ViGBlock], downsample: bool) -> None:
        super().__init__()
        self.downsample = _downsample(in_chans, dim) if downsample else nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.blocks(self.downsample(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class HierarchicalViG(LayeredModel):
    """ViG-H: four resolutions (1/4 to 1/32), no position embedding, LayerNorm. Any height and width work.

    Args:
        in_chans: input channels.
        num_classes: 0 gives pooled features.
        global_pool: "avg" or "" (feature maps (B, C, H, W)).
        dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layers_name = "stages"
    output_fmts = ("NCHW",)

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 5, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.stem = nn.Sequential(*_downsample(in_chans, dims[0] // 2), nn.GELU(), *_downsample(dims[0] // 2, dims[0]))
        norm_layer = partial(nn.LayerNorm, eps=_LAYER_NORM_EPS)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, self.feature_info = [], []
        for i, dim in enumerate(dims):
            blocks = [
                ViGBlock(
                    dim,
                    num_heads=num_heads[i],
                    hidden_dim=_swiglu_hidden_dim(dim, multiple_of=32),
                    activation=False,
                    norm_layer=norm_layer,
                    drop_path=rate,
                )
                for rate in islice(rates, depths[i])
            ]
            stages.append(ViGStage(dims[max(i - 1, 0)], dim, blocks=blocks, downsample=i > 0))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.ModuleList(stages)
        self.norm = norm_layer(dims[-1])
        self._init_head(dims[-1], num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)
        _init_weights(self)

    def no_weight_decay(self) -> set[str]:
        """Nothing but the biases and normalisations that optimisers leave out anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)

    def _embed(self, x_BCHW: Tensor) -> Tensor:
        return self.stem(x_BCHW).permute(0, 2, 3, 1)


# Official parameter names -> ours, first match wins; a stage's downsampling moves to the head of the next one.
_OFFICIAL_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^patch_embed\.0\.", "stem.0."),
    (r"^patch_embed\.2\.", "stem.1."),
    (r"^patch_embed\.5\.", "stem.3."),
    (r"^patch_embed\.7\.", "stem.4."),
    (r"^layers\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.0."),
    (r"^layers\.(\d+)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.1."),
    (r"^layers\.", "stages."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head."),
)
_OFFICIAL_BLOCK_NAMES = (
    (r"\.(attn_norm|norm)\.", ".norm1."),
    (r"\.(mlp_norm|norm2)\.", ".norm2."),
    (r"\.(attn|op)\.", ".mixer."),
    (r"\.in_proj\.0\.", ".local_conv."),
    (r"\.qkv_proj\.", ".qkv."),
    (r"\.gk_proj\.0\.", ".decay_down."),
    (r"\.gk_proj\.1\.", ".decay_up."),
    (r"\.o_proj\.", ".proj."),
    (r"\.g_norm\.", ".locality_gate.global_norm."),
    (r"\.l_norm\.", ".locality_gate.local_norm."),
    (r"\.g_proj\.", ".gate."),
    (r"\.mlp\.(gate_proj|fc1)\.", ".mlp.in_proj."),
    (r"\.mlp\.(down_proj|fc2)\.", ".mlp.out_proj."),
)


def _from_official_name(key: str) -> str:
    if match := re.match(r"^(?:blocks\.\d+|layers\.\d+\.blocks\.\d+)", key):
        prefix, rest = re.sub(r"^layers", "stages", match[0]), key[match.end() :]
        for pattern, name in _OFFICIAL_BLOCK_NAMES:
            rest = re.sub(pattern, name, rest)
        return prefix + rest
    for pattern, name in _OFFICIAL_NAMES:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official checkpoint into a state dict of ours; one of ours passes through.

    Unwraps ``model`` / ``state_dict`` entries and a ``module.`` prefix, renames parameters, and resizes the position
    embedding to the model's grid.

    Args:
        state_dict: a loaded checkpoint.
        model: the :class:`ViG` or :class:`HierarchicalViG` it is for.

    Raises:
        ValueError: a position embedding of another grid that is not square, whose height and width are unknown.
    """
    state_dict = unwrap(state_dict)
    if any(key.startswith("patch_embed.") for key in state_dict):
        state_dict = {_from_official_name(key): value for key, value in state_dict.items()}
    if isinstance(model, ViG) and "pos_embed" in state_dict:
        state_dict["pos_embed"] = fit_pos_embed(state_dict["pos_embed"], model.grid_size)
    return state_dict


def _cfg(*, top1: float | None = None, first_conv: str = "stem.0", **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained_cfg. ``top1``: the paper's ImageNet-1k accuracy at 224 pixels; None: no paper, no weights."""
    cfg: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        first_conv=first_conv,
        classifier="head",
        license="mit",
        origin_url="https://github.com/hustvl/ViG",
        paper_name="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
        paper_ids="arXiv:2405.18425",
    )
    if top1 is None:
        cfg |= dict(license="apache-2.0", notes=("no paper result: a small model for tests, demos and CPUs",))
    else:
        cfg |= dict(hf_hub_id="hustvl/ViG", notes=(f"ImageNet-1k top-1 {top1} (paper)",))
    return cfg | kwargs


default_cfgs = generate_default_cfgs(
    {
        "vg_vig_atto": _cfg(),
        "vg_vig_tiny.in1k": _cfg(top1=77.2),
        "vg_vig_small.in1k": _cfg(top1=81.7),
        "vg_vig_base.in1k": _cfg(top1=82.6),
        "vg_vig_h_atto": _cfg(),
        "vg_vig_h_tiny.in1k": _cfg(top1=82.8),
        "vg_vig_h_small.in1k": _cfg(top1=83.8),
        "vg_vig_h_base.in1k": _cfg(top1=84.2),
    }
)


def _plain(variant: str, pretrained: bool, kwargs: dict[str, Any], **arch: Any) -> ViG:
    depth = (arch | kwargs)["depth"]
    quarters = sorted({max(depth * (i + 1) // 4 - 1, 0) for i in range(4)})
    out_indices = kwargs.pop("out_indices", quarters)
    return build_model(
        ViG,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **(arch | kwargs),
    )


def _hierarchical(variant: str, pretrained: bool, kwargs: dict[str, Any], **arch: Any) -> HierarchicalViG:
    return build_model(
        HierarchicalViG,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **(arch | kwargs),
    )


@register_model
def vg_vig_atto(pretrained: bool = False, **kwargs: Any) -> ViG:
    """0.86 M parameters; no paper result. For small images pass ``patch_size`` 4 or 8 and ``img_size``."""
    return _plain("vg_vig_atto", pretrained, kwargs, embed_dim=96, depth=6, num_heads=3)


@register_model
def vg_vig_tiny(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-T: 5.8 M parameters, 77.2 % ImageNet-1k top-1 in the paper."""
    return _plain("vg_vig_tiny", pretrained, kwargs, embed_dim=192, depth=12, num_heads=3)


@register_model
def vg_vig_small(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-S: 22.6 M parameters, 81.7 % ImageNet-1k top-1 in the paper."""
    return _plain("vg_vig_small", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6, activation=False)


@register_model
def vg_vig_base(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-B: 89.0 M parameters, 82.6 % ImageNet-1k top-1 in the paper."""
    return _plain("vg_vig_base", pretrained, kwargs, embed_dim=768, depth=12, num_heads=12, activation=False)


@register_model
def vg_vig_h_atto(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """0.9 M parameters; no paper result."""
    arch = dict(dims=(32, 64, 96, 128), depths=(1, 1, 3, 1), num_heads=(1, 2, 3, 4))
    return _hierarchical("vg_vig_h_atto", pretrained, kwargs, **arch)


@register_model
def vg_vig_h_tiny(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-T: 28.6 M parameters, 82.8 % ImageNet-1k top-1 in the paper."""
    arch = dict(dims=(96, 192, 384, 768), depths=(2, 2, 5, 2), num_heads=(3, 6, 12, 24))
    return _hierarchical("vg_vig_h_tiny", pretrained, kwargs, **arch)


@register_model
def vg_vig_h_small(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-S: 50 M parameters, 83.8 % ImageNet-1k top-1 in the paper."""
    arch = dict(dims=(96, 192, 384, 768), depths=(2, 2, 17, 2), num_heads=(3, 6, 12, 24))
    return _hierarchical("vg_vig_h_small", pretrained, kwargs, **arch)


@register_model
def vg_vig_h_base(pretrained: bool = False, **kwargs: Any) -> HierarchicalViG:
    """ViG-H-B: 89 M parameters, 84.2 % ImageNet-1k top-1 in the paper."""
    arch = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 17, 2), num_heads=(4, 8, 16, 32))
    return _hierarchical("vg_vig_h_base", pretrained, kwargs, **arch)
