"""Any decode head of mmsegmentation on any encoder: ``decoder: {type: mmseg, head: {type: UPerHead, channels: 128}}``.

Needs mmsegmentation (``pip install 'vision-gates[mmseg]'``), no compiled operators. The head's parameters and outputs
are mmseg's; its loss is not used, the configuration's ``task`` has one.
Suffixes: B batch, C channels, H W height and width.
"""

import contextlib
import difflib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from vision_gates.decoders._layers import check_levels
from vision_gates.errors import ConfigError

__all__ = ["MMSegDecoder"]

_DEFAULT_HEAD: Mapping[str, Any] = {"type": "SegformerHead", "channels": 64}
_FILLED_IN = {
    "num_classes": "the data say it",
    "loss_decode": "the loss is that of task",
    "in_channels": "the encoder says it",
}


class MMSegDecoder(nn.Module):
    """A decode head of mmseg, whose logits are interpolated to the size of the image.

    Filled in where the configuration does not say: ``in_channels`` and ``in_index`` (all levels of the encoder, or the
    coarsest one of a head that takes one), ``feature_strides``, ``channels`` (256), ``norm_cfg`` (batch normalisation,
    synchronised over processes on GPUs). "SyncBN" means the same where there is one process.

    Args:
        encoder_channels: channels of each encoder level, finest first.
        encoder_reductions: stride of each level; levels may repeat a stride (plain ViG).
        in_chans: channels of the image, which no head uses.
        num_classes: channels of the logits.
        head: ``type`` and options of the head, as in mmseg's configurations.

    Raises:
        ConfigError: mmsegmentation is missing, it has no such head, or the head cannot be built from these levels or
            gives something other than logits.
        ValueError: no encoder level, or levels that are not ordered from fine to coarse.
    """

    def __init__(
        self,
        *,
        encoder_channels: Sequence[int],
        encoder_reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        head: Mapping[str, Any] = _DEFAULT_HEAD,
    ) -> None:
        super().__init__()
        check_levels(encoder_reductions, fewest=1)
        if not isinstance(head, Mapping):
            raise ConfigError(f"decoder.head: a mapping such as {{type: UPerHead}} is needed, found {head!r}")
        head_cls = _head_class(head.get("type"))
        options = {key: _batch_norm(value) for key, value in head.items() if key != "type"}
        for key in options.keys() & _FILLED_IN.keys():
            raise ConfigError(f"decoder.head.{key}: {_FILLED_IN[key]}; remove the key")
        self.head = _build(head_cls, options, list(encoder_channels), list(encoder_reductions), num_classes)
        self._try(encoder_channels, encoder_reductions, num_classes)

    def forward(self, features: list[Tensor], image: Tensor) -> Tensor:
        """Map features, finest first, and the image (B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        logits_BCHW = self.head(features)
        align_corners: bool = self.head.align_corners
        return F.interpolate(logits_BCHW, size=image.shape[-2:], mode="bilinear", align_corners=align_corners)

    @torch.no_grad()
    def _try(self, channels: Sequence[int], reductions: Sequence[int], num_classes: int) -> None:
        """Refuse now what would fail in the first step: a head needs more than features, or gives no logits."""
        name = type(self.head).__name__
        sides = [max(2 * max(reductions) // reduction, 1) for reduction in reductions]
        features = [torch.zeros(1, c, side, side) for c, side in zip(channels, sides, strict=True)]
        self.head.eval()
        try:
            logits = self.head(features)
        except Exception as error:  # whatever a head of another project raises
            raise ConfigError(f"decoder.head: {name} does not run on these levels: {_reason(error)}") from error
        self.head.train()
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[1] != num_classes:
            raise ConfigError(f"decoder.head: {name} gives no logits of {num_classes} classes; choose another head")


def _head_class(name: Any) -> Any:
    """The decode head that mmseg knows by this name."""
    try:
        # mmseg says on import what it lacks (compiled operators, OneDL), none of which is needed here.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
            from mmseg.models.decode_heads.decode_head import BaseDecodeHead
            from mmseg.registry import MODELS
    except ImportError as error:
        raise ConfigError(
            f"decoder.type mmseg needs mmsegmentation ({_reason(error)}): pip install 'vision-gates[mmseg]'"
        ) from error
    heads = {
        key: head
        for key, head in MODELS.module_dict.items()
        if inspect.isclass(head) and issubclass(head, BaseDecodeHead) and not issubclass(head, BaseCascadeDecodeHead)
    }
    if name not in heads:
        near = difflib.get_close_matches(str(name), heads, n=3) or sorted(heads)
        raise ConfigError(f"decoder.head.type: mmseg has no decode head {name!r}; nearest: {', '.join(near)}")
    return heads[name]


def _batch_norm(value: Any) -> Any:
    """Options with SyncBN written as BN, which has the same parameters, unless processes on GPUs can synchronise."""
    if isinstance(value, Mapping):
        return {key: _batch_norm(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_batch_norm(inner) for inner in value)
    return _norm_type() if value == "SyncBN" else value


def _norm_type() -> str:
    spread = distributed.is_available() and distributed.is_initialized() and "nccl" in distributed.get_backend()
    return "SyncBN" if spread else "BN"


def _build(head_cls: Any, options: dict[str, Any], channels: list[int], strides: list[int], num_classes: int) -> Any:
    known = _parameters(head_cls)
    unknown = [key for key in options if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1) or sorted(known)
        raise ConfigError(f"decoder.head.{unknown[0]}: {head_cls.__name__} has no such option; nearest: {near[0]}")
    options = dict(channels=256, norm_cfg=dict(type=_norm_type(), requires_grad=True)) | options
    if "feature_strides" in known:
        options.setdefault("feature_strides", strides)
    # A head does not declare whether it takes one level or a list: mmseg's base class asserts it first of all.
    indices: list[Any] = [list(range(len(channels))), len(channels) - 1]
    if "in_index" in options:
        indices = [options.pop("in_index")]
    for number in indices[0] if isinstance(indices[0], list | tuple) else indices:
        if not isinstance(number, int) or not -len(channels) <= number < len(channels):
            raise ConfigError(f"decoder.head.in_index: {number!r}; the encoder has levels 0 to {len(channels) - 1}")
    failure: Exception | None = None
    for index in indices:
        try:
            chosen = channels[index] if isinstance(index, int) else [channels[i] for i in index]
            with _quiet():
                head = head_cls(in_channels=chosen, in_index=index, num_classes=num_classes, **options)
                head.init_weights()
            return head
        except Exception as error:  # whatever a head of another project raises
            failure = error
            if str(error) or not isinstance(error, AssertionError):
                break
    assert failure is not None
    raise ConfigError(f"decoder.head: {head_cls.__name__} cannot be built: {_reason(failure)}") from failure


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without mmseg's advice on a loss that is not used, and without mmengine's line on every initialised parameter."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _parameters(head_cls: Any) -> set[str]:
    """Names of all arguments, those that ``**kwargs`` hands on to a base class included."""
    names: set[str] = set()
    for cls in head_cls.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


Decoder = MMSegDecoder
