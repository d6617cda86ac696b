"""What every family shares: timm's interface over a list of layers that run on channels-last maps.

Suffixes: B batch, C channels, H W height and width of the map, N = H * W tokens.
"""

from collections.abc import Callable, Collection
from typing import Any

from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["LayeredModel", "drop_path_rates"]


class LayeredModel(nn.Module):
    """timm's interface over the layers of a model: its blocks or stages, which run on (B, H, W, C).

    A model sets the attributes below, calls ``_init_head`` and defines ``_embed``. Whose output formats know "NLC" has
    layers of one width, all of which the final normalisation fits.
    """

    layers_name: str  # attribute that holds the layers
    output_fmts: tuple[str, ...]
    global_pools: tuple[str, ...] = ("avg", "")
    feature_info: list[dict[str, Any]]
    norm: nn.Module
    head_norm: nn.Module  # after pooling; Identity unless a model sets it
    head: nn.Module
    _embed: Callable[[Tensor], Tensor]  # images (B, in_chans, height, width) to (B, H, W, C)

    @property
    def _layers(self) -> nn.ModuleList:
        return getattr(self, self.layers_name)

    def _init_head(self, num_features: int, *, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = self.head_hidden_size = num_features
        self.head_norm = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """Return the last layer: Linear, or Identity when ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer; 0 classes leaves the pooled features.

        Args:
            num_classes: outputs of the new layer.
            global_pool: one of ``global_pools``, "" for no pooling; None keeps the present one.

        Raises:
            ValueError: another ``global_pool``.
        """
        if global_pool is not None:
            if global_pool not in self.global_pools:
                known = " or ".join(map(repr, self.global_pools))
                raise ValueError(f"global_pool must be {known}, got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        like = next(self.parameters())
        self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block or stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _run(self, layer: nn.Module, x_BHWC: Tensor) -> Tensor:
        return checkpoint(layer, x_BHWC) if self.grad_checkpointing else layer(x_BHWC)

    def _run_layers(
        self, x_BCHW: Tensor, count: int | None = None, *, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Embed images and run the first ``count`` layers, by default all.

        Returns:
            The result (B, H, W, C), or tokens (B, N, C) of a model whose tokens are no grid; and the output of each
            layer in ``keep``, (B, H, W, C).
        """
        x_BHWC = self._embed(x_BCHW)
        kept = {}
        for i, layer in enumerate(self._layers[:count]):
            x_BHWC = self._run(layer, x_BHWC)
            if i in keep:
                kept[i] = x_BHWC
        return x_BHWC, kept

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, in_chans, height, width) to normalised features in the first of ``output_fmts``."""
        x, _ = self._run_layers(x_BCHW)
        return _to_format(self.norm(x), self.output_fmts[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool what forward_features gave and classify it; ``pre_logits`` stops before the classifier."""
        if self.global_pool == "avg":
            x = self.head_norm(x.mean(dim=1 if x.ndim == 3 else (2, 3)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, in_chans, height, width) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x_BCHW))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the network and keep the output of some layers (blocks of a plain network, stages of a hierarchical one).

        Args:
            x: images (B, in_chans, height, width).
            indices: which layers; an int means the last so many, None all.
            norm: apply the final normalisation to the outputs that have its channels (of stages: the last).
            stop_early: do not run layers after the last one asked for.
            output_fmt: "NCHW" gives (B, C, H, W) maps; a plain network also knows "NLC", (B, N, C) tokens.
            intermediates_only: return the list alone.

        Returns:
            The outputs, or (result of forward_features, outputs).

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt not in self.output_fmts:
            raise ValueError(f"output_fmt must be one of {self.output_fmts}, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self._layers), indices)
        depth = len(self._layers)
        count = max_index + 1 if stop_early else depth
        x, kept = self._run_layers(x, count, keep=take_indices)
        intermediates = []
        for i, y_BHWC in kept.items():
            normed = norm and (i == depth - 1 or "NLC" in self.output_fmts)
            intermediates.append(_to_format(self.norm(y_BHWC) if normed else y_BHWC, output_fmt).contiguous())
        if intermediates_only:
            return intermediates
        return _to_format(self.norm(x) if count == depth else x, self.output_fmts[0]), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that these intermediates do not need; return their indices."""
        take_indices, max_index = feature_take_indices(len(self._layers), indices)
        pruned = max_index < len(self._layers) - 1
        setattr(self, self.layers_name, self._layers[: max_index + 1])
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or pruned:
            self.head_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices


def _to_format(x: Tensor, output_fmt: str) -> Tensor:
    """(B, H, W, C), or tokens (B, N, C) that only "NLC" fits."""
    return x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x.flatten(1, -2)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """From 0 at the first block linearly to ``last`` at the last one."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
