"""HorNet: hierarchical vision networks that mix positions by recursive gated convolutions.

Paper: HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, arXiv 2207.14284.
Official code: https://github.com/raoyongming/HorNet (MIT); written from the paper and from its facts, nothing copied.
Official checkpoints load through ``checkpoint_filter_fn`` and give the official outputs, at any input size.
Suffixes: B batch, C channels, H W height and width of the map.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from vision_gates.gates import GlobalLocalFilter, GnConv
from vision_gates.gates.global_local_filter import resize_spectrum
from vision_gates.models._build import build_model
from vision_gates.models._checkpoint import unwrap
from vision_gates.models._layered import LayeredModel, drop_path_rates
from vision_gates.models._mlp import LeanMlp
from vision_gates.models._stem import embed_patches

__all__ = ["HorNet"]

_EPS = 1e-6
_GNCONV_SCALE = 1 / 3
_PATCH_SIZE = 4


class HorNetBlock(nn.Module):
    """x = x + gamma1 * gnConv(norm(x)); x = x + gamma2 * MLP(norm(x)), on channels-last maps (B, [D,] H, W, C)."""

    def __init__(
        self,
        dim: int,
        *,
        order: int,
        kernel_size: int,
        spatial_dims: int = 2,
        spatial_filter: Callable[[int], nn.Module] | None = None,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.gnconv = GnConv(
            dim,
            order=order,
            kernel_size=kernel_size,
            spatial_dims=spatial_dims,
            scale=_GNCONV_SCALE,
            spatial_filter=spatial_filter,
        )
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = LeanMlp(dim, hidden_dim=4 * dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.gnconv(self.norm1(x_BHWC), self.gamma1))
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC), self.gamma2))


def _at_least_one_patch(x_BCHW: Tensor, size: int) -> Tensor:
    """Zero-pad a map that a convolution of this size and stride does not fit into, at the far edges."""
    H, W = x_BCHW.shape[-2:]
    if H >= size and W >= size:
        return x_BCHW
    return F.pad(x_BCHW, (0, max(size - W, 0), 0, max(size - H, 0)))


class HorNetStage(nn.Module):
    """Optional downsampling (LayerNorm, conv 2x2 stride 2), then blocks, on (B, H, W, C)."""

    def __init__(self, in_chans: int, dim: int, *, blocks: list[HorNetBlock], downsample: bool) -> None:
        super().__init__()
        self.downsample = nn.Sequential()
        if downsample:
            self.downsample.append(nn.LayerNorm(in_chans, eps=_EPS))
            self.downsample.append(nn.Conv2d(in_chans, dim, kernel_size=2, stride=2))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if len(self.downsample):
            norm, conv = self.downsample
            x_BCHW = norm(x_BHWC).permute(0, 3, 1, 2)
            x_BHWC = conv(_at_least_one_patch(x_BCHW, 2)).permute(0, 2, 3, 1)
        return self.blocks(x_BHWC)


class HorNet(LayeredModel):
    """HorNet: four resolutions (1/4 to 1/32), normalised after pooling. Any height and width work.

    The strided convolutions are unpadded, as the official ones: of a map of odd size the last row or column falls
    outside (of images up to 3). Only a map smaller than one patch is zero-padded to it.

    Args:
        in_chans: input channels.
        num_classes: 0 gives pooled features.
        global_pool: "avg" or "" (feature maps (B, C, H, W), not normalised).
        dims: channels of each stage, multiples of 2^(order-1).
        depths: blocks of each stage.
        orders: orders of the stages' gated convolutions.
        kernel_size: of the depthwise convolutions, odd.
        filter_sizes: of each stage either None, a depthwise convolution, or the size (rows, columns) of a
            global-local filter's learned spectrum. Other map sizes work; the spectrum is resized to them.
        layer_scale: first value of the factors on both branches of a block.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: dimensions and orders that do not fit together, or an even kernel.
    """

    layers_name = "stages"
    output_fmts = ("NCHW",)

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 3, 18, 2),
        orders: tuple[int, ...] = (2, 3, 4, 5),
        kernel_size: int = 7,
        filter_sizes: tuple[tuple[int, int] | None, ...] = (None, None, None, None),
        layer_scale: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        lengths = {len(dims), len(depths), len(orders), len(filter_sizes)}
        if len(lengths) != 1:
            raise ValueError(
                "dims, depths, orders and filter_sizes must have one entry a stage, got "
                f"{len(dims)}, {len(depths)}, {len(orders)} and {len(filter_sizes)}"
            )
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=_PATCH_SIZE, stride=_PATCH_SIZE),
            nn.LayerNorm(dims[0], eps=_EPS),
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, self.feature_info = [], []
        for i, (dim, filter_size) in enumerate(zip(dims, filter_sizes, strict=True)):
            spatial_filter = None if filter_size is None else partial(GlobalLocalFilter, size=filter_size, eps=_EPS)
            blocks = [
                HorNetBlock(
                    dim,
                    order=orders[i],
                    kernel_size=kernel_size,
                    spatial_filter=spatial_filter,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for rate in islice(rates, depths[i])
            ]
            stages.append(HorNetStage(dims[max(i - 1, 0)], dim, blocks=blocks, downsample=i > 0))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.Identity()
        self._init_head(dims[-1], num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)
        self.head_norm = nn.LayerNorm(dims[-1], eps=_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Nothing but the biases, normalisations and layer scales that optimisers leave out anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^head_norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)

    def _embed(self, x_BCHW: Tensor) -> Tensor:
        conv, norm = self.stem
        return norm(embed_patches(_at_least_one_patch(x_BCHW, _PATCH_SIZE), conv).permute(0, 2, 3, 1))


# Official parameter names -> ours; a stage's downsampling moves to its head.
_OFFICIAL_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.gnconv\.dwconv\.dw\.", ".gnconv.spatial_filter.local_conv."),
    (r"\.gnconv\.dwconv\.", ".gnconv.spatial_filter."),
    (r"\.gnconv\.pws\.", ".gnconv.widen."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"^norm\.", "head_norm."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official checkpoint into a state dict of ours; one of ours passes through.

    Unwraps ``model`` / ``state_dict`` entries and a ``module.`` prefix, renames parameters, makes matrices of 1x1
    convolutions, and resizes learned spectra to the model's (as fine-tuning at another resolution wants them).

    Args:
        state_dict: a loaded checkpoint.
        model: the :class:`HorNet` it is for.
    """
    state_dict = unwrap(state_dict)
    if any(key.startswith("downsample_layers.") for key in state_dict):
        state_dict = {_from_official_name(key): value for key, value in state_dict.items()}
    own = model.state_dict()
    for key, value in state_dict.items():
        if re.search(r"\.gnconv\.(proj_in|proj_out|widen\.\d+)\.weight$", key) and value.ndim == 4:
            state_dict[key] = value.flatten(1)
        elif key.endswith(".complex_weight") and key in own:
            state_dict[key] = resize_spectrum(value, tuple(own[key].shape[1:3]))
    return state_dict


def _from_official_name(key: str) -> str:
    for pattern, name in _OFFICIAL_NAMES:
        key = re.sub(pattern, name, key)
    return key


def _cfg(*, weights: bool = True, note: str, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained_cfg. ``weights``: the official page links to some. ``note``: the paper's result."""
    repository = "https://github.com/raoyongming/HorNet"
    cfg: dict[str, Any] = dict(
        url=f"{repository}#model-zoo" if weights else "",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        first_conv="stem.0",
        classifier="head",
        license="mit",
        origin_url=repository,
        paper_name="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        paper_ids="arXiv:2207.14284",
        notes=(note,),
    )
    return cfg | kwargs


def _in1k(top1: float) -> dict[str, Any]:
    return _cfg(note=f"ImageNet-1k top-1 {top1} (paper)")


def _in22k(**kwargs: Any) -> dict[str, Any]:
    return _cfg(note="released with 21,841 classes of ImageNet-22k, so without an ImageNet-1k top-1", **kwargs)


_AT_384: dict[str, Any] = dict(input_size=(3, 384, 384), crop_pct=1.0)
default_cfgs = generate_default_cfgs(
    {
        "vg_hornet_atto": _cfg(
            weights=False, note="no paper result: a small model for tests, demos and CPUs", license="apache-2.0"
        ),
        "vg_hornet_tiny_7x7.in1k": _in1k(82.8),
        "vg_hornet_tiny_gf.in1k": _in1k(83.0),
        "vg_hornet_small_7x7.in1k": _in1k(83.8),
        "vg_hornet_small_gf.in1k": _in1k(84.0),
        "vg_hornet_base_7x7.in1k": _in1k(84.2),
        "vg_hornet_base_gf.in1k": _in1k(84.3),
        "vg_hornet_base_gf_img384": _cfg(weights=False, note="no paper top-1 and no weights at 384 pixels", **_AT_384),
        "vg_hornet_large_7x7.in22k": _in22k(),
        "vg_hornet_large_gf.in22k": _in22k(),
        "vg_hornet_large_gf_img384.in22k": _in22k(**_AT_384),
    }
)

# The official learned spectra: (H, W // 2 + 1) of the maps of stages 3 and 4.
_GF_224 = (None, None, (14, 8), (7, 4))
_GF_384 = (None, None, (24, 13), (12, 7))


def _hornet(variant: str, pretrained: bool, kwargs: dict[str, Any], *, width: int = 64, **arch: Any) -> HorNet:
    arch = dict(dims=tuple(width * 2**i for i in range(4)), depths=(2, 3, 18, 2)) | arch
    return build_model(
        HorNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **(arch | kwargs),
    )


@register_model
def vg_hornet_atto(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """0.84 M parameters; no paper result."""
    return _hornet("vg_hornet_atto", pretrained, kwargs, dims=(32, 64, 96, 128), depths=(1, 1, 3, 1))


@register_model
def vg_hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T, 7x7: 22.4 M parameters, 82.8 % ImageNet-1k top-1 in the paper."""
    return _hornet("vg_hornet_tiny_7x7", pretrained, kwargs, width=64)


@register_model
def vg_hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T, global filters: 23.0 M parameters, 83.0 % ImageNet-1k top-1 in the paper."""
    return _hornet("vg_hornet_tiny_gf", pretrained, kwargs, width=64, filter_sizes=_GF_224)


@register_model
def vg_hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S, 7x7: 49.5 M parameters, 83.8 % ImageNet-1k top-1 in the paper."""
    return _hornet("vg_hornet_small_7x7", pretrained, kwargs, width=96)


@register_model
def vg_hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S, global filters: 50.4 M parameters, 84.0 % ImageNet-1k top-1 in the paper."""
    return _hornet("vg_hornet_small_gf", pretrained, kwargs, width=96, filter_sizes=_GF_224)


@register_model
def vg_hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B, 7x7: 87.3 M parameters, 84.2 % ImageNet-1k top-1 in the paper."""
    return _hornet("vg_hornet_base_7x7", pretrained, kwargs, width=128)


@register_model
def vg_hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B, global filters: 88.4 M parameters, 84.3 % ImageNet-1k top-1 in the paper."""
    return _hornet("vg_hornet_base_gf", pretrained, kwargs, width=128, filter_sizes=_GF_224)


@register_model
def vg_hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with spectra for 384 pixels, for fine-tuning; neither a paper result nor weights."""
    return _hornet("vg_hornet_base_gf_img384", pretrained, kwargs, width=128, filter_sizes=_GF_384)


@register_model
def vg_hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, 7x7: 194.5 M parameters, 86.8 % ImageNet-1k top-1 in the paper after ImageNet-22k."""
    return _hornet("vg_hornet_large_7x7", pretrained, kwargs, width=192)


@register_model
def vg_hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, global filters: 196.3 M parameters, 87.0 % ImageNet-1k top-1 in the paper after ImageNet-22k."""
    return _hornet("vg_hornet_large_gf", pretrained, kwargs, width=192, filter_sizes=_GF_224)


@register_model
def vg_hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, spectra for 384 pixels: 201.8 M parameters, 87.7 % ImageNet-1k top-1 in the paper at 384 pixels."""
    return _hornet("vg_hornet_large_gf_img384", pretrained, kwargs, width=192, filter_sizes=_GF_384)
