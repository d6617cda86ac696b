"""What the U-Nets here share: convolution blocks, any input size, a classifier per level, and readable errors.

Suffixes: B batch, C channels, S the two or three spatial axes.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from vision_gates.gates.attention_gate import Norm, conv_layer, dropout_layer, norm_layer, resize
from vision_gates.gates.padding import pad_to_multiple
from vision_gates.kernels.launching import is_exporting

__all__ = ["DeepSupervision", "UNet", "conv_norm_act", "double_conv", "one_of"]

DeepSupervision = Literal["none", "fused", "separate"]


def _classify(head: Any, x_BCS: Tensor) -> Tensor:
    """A 1x1 convolution to a few classes; on a GPU as the product that it is, cuDNN's is many times slower."""
    rows_BSC = x_BCS.movedim(1, -1)
    if not x_BCS.is_cuda or not rows_BSC.is_contiguous() or is_exporting():
        return head(x_BCS)
    return F.linear(rows_BSC, head.weight.flatten(1), head.bias).movedim(-1, 1)


def conv_norm_act(
    in_channels: int, out_channels: int, *, spatial_dims: int, norm: Norm, kernel_size: int, dropout: float = 0.0
) -> nn.Sequential:
    """Convolution, normalisation, ReLU, and dropout of whole channels where its rate is not 0."""
    layers = [
        conv_layer(in_channels, out_channels, spatial_dims=spatial_dims, kernel_size=kernel_size),
        norm_layer(norm, out_channels, spatial_dims=spatial_dims),
        nn.ReLU(inplace=True),
    ]
    if dropout:
        layers.append(dropout_layer(dropout, spatial_dims=spatial_dims))
    return nn.Sequential(*layers)


def double_conv(
    in_channels: int, out_channels: int, *, spatial_dims: int, norm: Norm, dropout: float = 0.0
) -> nn.Sequential:
    """Two 3x3 convolutions, each as in `conv_norm_act`."""
    return nn.Sequential(
        *(
            conv_norm_act(channels, out_channels, spatial_dims=spatial_dims, norm=norm, kernel_size=3, dropout=dropout)
            for channels in (in_channels, out_channels)
        )
    )


class UNet(nn.Module):
    """Base of the U-Nets: logits at input size from the decoder levels of ``forward_features``, which a subclass adds.

    A subclass makes its layers and then calls ``make_heads``; its ``forward_features`` begins with ``padded``.
    """

    supervisions: ClassVar[tuple[str, ...]] = ("none", "fused", "separate")

    heads: nn.ModuleDict
    fuse: nn.Module | None

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        norm: Norm,
        deep_supervision: DeepSupervision,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be two or more positive channel counts, got {list(widths)}")
        if deep_supervision not in self.supervisions:
            raise ValueError(f"deep_supervision must be {one_of(self.supervisions)}, got {deep_supervision!r}")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.widths = tuple(widths)
        self.norm = norm
        self.deep_supervision = deep_supervision
        self.grad_checkpointing = False
        self.divisor = 2 ** (len(widths) - 1)
        self.register_load_state_dict_pre_hook(_refuse_other_rank)

    def make_heads(self) -> None:
        """Add the classifiers of the levels that ``deep_supervision`` asks for, and what fuses them."""
        levels = range(1, len(self.widths) if self.deep_supervision != "none" else 2)
        self.heads = nn.ModuleDict(
            {
                str(level): conv_layer(self.widths[level - 1], self.num_classes, spatial_dims=self.spatial_dims)
                for level in levels
            }
        )
        self.fuse = None
        if self.deep_supervision == "fused":
            self.fuse = conv_layer(len(levels) * self.num_classes, self.num_classes, spatial_dims=self.spatial_dims)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level's convolutions in the backward pass instead of keeping their activations.

        Batch normalisation then sees every batch twice: its running statistics move twice as fast.
        """
        self.grad_checkpointing = enable

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Apply a block, checkpointed where that was asked for."""
        return checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)

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
        logits = [resize(_classify(*pair), full) for pair in zip(heads, decoded[: len(heads)], strict=True)]
        if self.fuse is not None:
            logits = [self.fuse(torch.cat(logits, dim=1))]
        window = (slice(None), slice(None), *(slice(n) for n in size))
        logits = [level_BCS[window] for level_BCS in logits]
        return logits if self.deep_supervision == "separate" and self.training else logits[0]

    def forward_features(self, x_BCS: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, *size) to the decoder's outputs, finest first, at padded size / 1, 2, 4 ..."""
        raise NotImplementedError

    def padded(self, x_BCS: Tensor) -> Tensor:
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
        return pad_to_multiple(x_BCS, (self.divisor,) * self.spatial_dims)


def one_of(names: Iterable[str]) -> str:
    """Choices for a message: 'a', 'b' or 'c'."""
    *rest, last = (repr(name) for name in names)
    return f"{', '.join(rest)} or {last}"


def _refuse_other_rank(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Weights of a 3-D network in a 2-D one: one sentence instead of a size mismatch for every convolution."""
    for name, own in module.named_parameters():
        loaded = state_dict.get(f"{prefix}{name}")
        if loaded is not None and {loaded.ndim, own.ndim} == {4, 5}:
            raise ValueError(
                f"weights of a {loaded.ndim - 2}-D network do not fit this {own.ndim - 2}-D {type(module).__name__}: "
                f"build it with spatial_dims={loaded.ndim - 2}, or take weights of a {own.ndim - 2}-D network"
            )
