"""Layer-wise decay of the learning rate for every timm model that says how its layers follow."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from vision_gates.errors import ConfigError

__all__ = ["GroupMatcherLayerDecay"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupMatcherLayerDecay(DefaultOptimWrapperConstructor):
    """Learning rate ``lr * decay_rate^(num_layers - 1 - layer)``, from the model's own ``group_matcher``.

    Biases, norms and what the model names have no weight decay. Layer 0 is the stem; neck, heads and the backbone's
    ``out_norm`` are the last layer, with the full rate. Use::

        optim_wrapper = dict(
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            constructor="GroupMatcherLayerDecay",
            paramwise_cfg=dict(decay_rate=0.9, decay_type="stage_wise"),
        )

    Keys of ``paramwise_cfg``:
        decay_rate: above 0, at most 1.
        decay_type: "layer_wise" (default), a layer is a block, or "stage_wise".
        num_layers: None: as many as there are, the heads' included. A larger number leaves a gap before the heads, as
            HorNet's and ConvNeXt's published settings have it.

    Raises:
        ConfigError: other keys or values; a backbone that is no ``VisionGatesBackbone`` or does not know its layers.
    """

    paramwise_cfg: dict[str, Any]

    def _validate_cfg(self) -> None:
        """Complete ``paramwise_cfg``; mmengine would take an empty one for a wish without groups."""
        cfg: dict[str, Any] = dict(decay_rate=None, decay_type="layer_wise", num_layers=None) | dict(self.paramwise_cfg)
        unknown = sorted(cfg.keys() - {"decay_rate", "decay_type", "num_layers"})
        if unknown:
            raise ConfigError(f"paramwise_cfg.{unknown[0]}: unknown key; known: decay_rate, decay_type, num_layers")
        rate, kind = cfg["decay_rate"], cfg["decay_type"]
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ConfigError(f"paramwise_cfg.decay_rate={rate}: a number above 0 and at most 1 is needed")
        if kind not in ("layer_wise", "stage_wise"):
            raise ConfigError(f"paramwise_cfg.decay_type={kind!r}: 'layer_wise' or 'stage_wise' is needed")
        self.paramwise_cfg = cfg

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of a segmentor, one a layer and kind of parameter."""
        rate, kind, num_layers = (self.paramwise_cfg[key] for key in ("decay_rate", "decay_type", "num_layers"))
        backbone: Any = getattr(module, "backbone", None)
        if not hasattr(backbone, "parameter_layers"):
            raise ConfigError(f"GroupMatcherLayerDecay: is for VisionGatesBackbone, not for {type(backbone).__name__}")
        layers = {f"backbone.{k}": v for k, v in backbone.parameter_layers(coarse=kind == "stage_wise").items()}
        found = max(layers.values()) + 2
        num_layers = found if num_layers is None else num_layers
        if num_layers < found:
            raise ConfigError(f"paramwise_cfg.num_layers={num_layers}: there are {found}, the heads' included")
        undecayed = {f"backbone.{name}" for name in backbone.no_weight_decay()}

        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layers.get(name, num_layers - 1)
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in undecayed
            scale = rate ** (num_layers - 1 - layer)
            group = groups.setdefault(
                (layer, decays),
                dict(params=[], lr=self.base_lr * scale, lr_scale=scale, weight_decay=self.base_wd if decays else 0.0),
            )
            group["params"].append(parameter)
        params.extend(groups[key] for key in sorted(groups))
