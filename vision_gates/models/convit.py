"""ConViT: vision transformers whose first blocks start as convolutions, by gated positional self-attention.

Paper: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, arXiv 2103.10697.
Official code: https://github.com/facebookresearch/convit; written from the paper, nothing copied. Official and timm's
checkpoints load through ``checkpoint_filter_fn`` and give the official outputs; other input sizes work too.
Suffixes: B batch, C channels, H W height and width of the token grid, N = H * W tokens, h heads, D channels of a head.
"""

import re
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_gates.gates import GatedPositionalSelfAttention
from vision_gates.kernels.launching import surely_equal
from vision_gates.models._build import build_model
from vision_gates.models._checkpoint import fit_pos_embed, resize_pos_embed, unwrap
from vision_gates.models._layered import LayeredModel, drop_path_rates
from vision_gates.models._mlp import LeanMlp
from vision_gates.models._stem import embed_patches

__all__ = ["ConViT"]

_LAYER_NORM_EPS = 1e-6


class SelfAttention(nn.Module):
    """Multi-head attention by content alone, on tokens (B, N, C).

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, *, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim must be a positive multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        qkv_BN3hD = self.qkv(x_BNC).unflatten(-1, (3, self.num_heads, -1))
        mixed_BhND = F.scaled_dot_product_attention(*qkv_BN3hD.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(mixed_BhND.transpose(1, 2).flatten(2))


class ConViTBlock(nn.Module):
    """x = x + mixer(norm(x)); x = x + MLP(norm(x)): on what its mixer takes, (B, H, W, C) or (B, N, C)."""

    def __init__(self, dim: int, *, mixer: nn.Module, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.mlp = LeanMlp(dim, hidden_dim=int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConViT(LayeredModel):
    """Blocks of gated positional self-attention, then, when the class token has joined, blocks of plain attention.

    Any height and width work. Images whose sides are no multiple of the patch get zeros below and on the right; the
    position embedding is resized bicubically.

    Args:
        img_size: training resolution; it fixes the position embedding's grid.
        patch_size: the stride of the token grid.
        in_chans: input channels.
        num_classes: 0 gives pooled features.
        global_pool: "token" (class token), "avg" (mean of the patch tokens) or "" (class token and patch tokens,
            (B, 1 + N, C)).
        embed_dim: channels.
        depth: blocks.
        local_depth: how many of them, the first ones, are gated positional; None: all but a sixth, at least one.
        num_heads: heads of each block.
        mlp_ratio: hidden channels of a block's MLP, by ``embed_dim``.
        qkv_bias: biases of queries, keys and values.
        locality_strength: how sharply the gated positional blocks look at their neighbours at the start.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: a patch size that is not positive, ``local_depth`` outside 0 .. ``depth`` - 1 (the class token needs
            a block to read the image in), or ``num_heads`` that does not divide ``embed_dim``.
    """

    layers_name = "blocks"
    output_fmts = ("NLC", "NCHW")
    global_pools: tuple[str, ...] = ("token", "avg", "")
    cls_token: nn.Parameter | None

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        local_depth: int | None = None,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        locality_strength: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be positive, got {patch_size}")
        if local_depth is None:
            local_depth = depth - max(depth // 6, 1)
        if not 0 <= local_depth < depth:
            raise ValueError(f"local_depth must be between 0 and depth - 1 = {depth - 1}, got {local_depth}")
        self.patch_size = patch_size
        self.local_depth = local_depth
        self.num_prefix_tokens = 1  # before the patches in what forward_features gives
        self.grad_checkpointing = False
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.grid_size = self._grid(*to_2tuple(img_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        blocks = []
        for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            mixer: nn.Module
            if i < local_depth:
                mixer = GatedPositionalSelfAttention(
                    embed_dim, num_heads=num_heads, qkv_bias=qkv_bias, locality_strength=locality_strength
                )
            else:
                mixer = SelfAttention(embed_dim, num_heads=num_heads, qkv_bias=qkv_bias)
            blocks.append(ConViTBlock(embed_dim, mixer=mixer, mlp_ratio=mlp_ratio, drop_path=rate))
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.norm = nn.LayerNorm(embed_dim, eps=_LAYER_NORM_EPS)
        self._init_head(embed_dim, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)
        _init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are no weights of a product."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay."""
        stem = r"^patch_embed|^pos_embed|^cls_token"
        return dict(stem=stem, blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        # Rounded up, but no -(-n // size): in ONNX integers divide towards zero.
        return (height + self.patch_size - 1) // self.patch_size, (width + self.patch_size - 1) // self.patch_size

    def _embed(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        H, W = self._grid(height, width)
        if not surely_equal((H * self.patch_size, W * self.patch_size), (height, width)):
            x_BCHW = F.pad(x_BCHW, (0, W * self.patch_size - width, 0, H * self.patch_size - height))
        x_BHWC = embed_patches(x_BCHW, self.patch_embed).permute(0, 2, 3, 1)
        # Under autocast the sum is float32, and so is the residual stream from here on.
        return x_BHWC + resize_pos_embed(self.pos_embed, self.grid_size, (H, W)).view(1, H, W, -1)

    def _run_layers(
        self, x_BCHW: Tensor, count: int | None = None, *, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As in LayeredModel; from ``local_depth`` on the result is tokens (B, 1 + N, C), the class token first."""
        x = self._embed(x_BCHW)
        grid = x.shape[1:3]
        kept = {}
        for i, block in enumerate(self.blocks[:count]):
            if i == self.local_depth and self.cls_token is not None:
                cls_token_B1C = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
                x = torch.cat((cls_token_B1C, x.flatten(1, 2)), dim=1)
            x = self._run(block, x)
            if i in keep:
                kept[i] = x if i < self.local_depth else x[:, 1:].unflatten(1, grid)
        return x, kept

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool what forward_features gave, (B, 1 + N, C), and classify; ``pre_logits`` stops before the classifier."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that these intermediates do not need, and an unused class token; return their indices."""
        taken = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if len(self.blocks) <= self.local_depth:
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.global_pools = ("avg", "")
        return taken


def _init_weights(model: nn.Module) -> None:
    """Linear layers truncated N(0, 0.02), biases zero; then every gated mixer its own initialisation."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, GatedPositionalSelfAttention):
            module.init_weights()


# Official parameter names -> ours.
_OFFICIAL_NAMES: tuple[tuple[str, str], ...] = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^(blocks\.\d+)\.attn\.pos_proj\.weight$", r"\1.mixer.pos_weight"),
    (r"^(blocks\.\d+)\.attn\.gating_param$", r"\1.mixer.gate_logit"),
    (r"^(blocks\.\d+)\.attn\.", r"\1.mixer."),
)


def _from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for key, value in state_dict.items():
        if key.endswith(".attn.pos_proj.bias"):
            continue  # the same for all positions of a head: a softmax over them does not see it
        for pattern, name in _OFFICIAL_NAMES:
            key = re.sub(pattern, name, key)
        result[key] = value
    # The gated blocks hold queries and keys apart from values; here they are one product.
    for key in [key for key in result if re.search(r"\.mixer\.qk\.(weight|bias)$", key)]:
        prefix, kind = key.rsplit(".qk.", 1)
        result[f"{prefix}.qkv.{kind}"] = torch.cat((result.pop(key), result.pop(f"{prefix}.v.{kind}")))
    return result


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official checkpoint or one of timm's ``convit_*`` into a state dict of ours; ours pass through.

    Unwraps ``model`` / ``state_dict`` entries and a ``module.`` prefix, renames parameters, joins the projections of
    the gated blocks, drops the bias of their positional logits, which has no effect, and resizes the position embedding
    to the model's grid.

    Args:
        state_dict: a loaded checkpoint.
        model: the :class:`ConViT` it is for.

    Raises:
        ValueError: a position embedding of another grid that is not square, whose height and width are unknown.
    """
    state_dict = unwrap(state_dict)
    if "patch_embed.proj.weight" in state_dict:
        state_dict = _from_official(state_dict)
    if isinstance(model, ConViT) and "pos_embed" in state_dict:
        state_dict["pos_embed"] = fit_pos_embed(state_dict["pos_embed"], model.grid_size)
    return state_dict


def _cfg(*, top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained_cfg. ``top1``: the paper's ImageNet-1k accuracy at 224 pixels; None: no paper, no weights."""
    cfg: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        first_conv="patch_embed",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/facebookresearch/convit",
        paper_name="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        paper_ids="arXiv:2103.10697",
    )
    if top1 is None:
        cfg["notes"] = ("no paper result: a small model for tests, demos and CPUs",)
    else:
        cfg["notes"] = (f"ImageNet-1k top-1 {top1} (paper)",)
    return cfg | kwargs


default_cfgs = generate_default_cfgs(
    {
        "vg_convit_atto": _cfg(),
        "vg_convit_tiny.fb_in1k": _cfg(top1=73.1, hf_hub_id="timm/convit_tiny.fb_in1k"),
        "vg_convit_small.fb_in1k": _cfg(top1=81.3, hf_hub_id="timm/convit_small.fb_in1k"),
        "vg_convit_base.fb_in1k": _cfg(top1=82.4, hf_hub_id="timm/convit_base.fb_in1k"),
    }
)


def _convit(variant: str, pretrained: bool, kwargs: dict[str, Any], **arch: Any) -> ConViT:
    depth = (arch | kwargs)["depth"]
    quarters = sorted({max(depth * (i + 1) // 4 - 1, 0) for i in range(4)})
    out_indices = kwargs.pop("out_indices", quarters)
    return build_model(
        ConViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **(arch | kwargs),
    )


@register_model
def vg_convit_atto(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """0.86 M parameters; no paper result. For small images pass ``patch_size`` 4 or 8 and ``img_size``."""
    return _convit("vg_convit_atto", pretrained, kwargs, embed_dim=96, depth=6, num_heads=4)


@register_model
def vg_convit_tiny(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """ConViT-Ti: 5.7 M parameters, 73.1 % ImageNet-1k top-1 in the paper."""
    return _convit("vg_convit_tiny", pretrained, kwargs, embed_dim=192, depth=12, num_heads=4)


@register_model
def vg_convit_small(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """ConViT-S: 27.8 M parameters, 81.3 % ImageNet-1k top-1 in the paper."""
    return _convit("vg_convit_small", pretrained, kwargs, embed_dim=432, depth=12, num_heads=9)


@register_model
def vg_convit_base(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """ConViT-B: 86.5 M parameters, 82.4 % ImageNet-1k top-1 in the paper."""
    return _convit("vg_convit_base", pretrained, kwargs, embed_dim=768, depth=12, num_heads=16)
