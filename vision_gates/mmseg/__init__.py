"""Plug-in for mmsegmentation: name it in a configuration, and what is listed here can be named, too::

    custom_imports = dict(imports=["vision_gates.mmseg"])

| registry | types |
|---|---|
| MODELS, backbones | `VisionGatesBackbone` |
| MODELS, necks | `GnConvFPN` |
| MODELS, heads | `AttentionGateHead`, `ResidualAttentionHead` |
| MODELS, losses | `OverlapCrossEntropyLoss` |
| MODELS, data preprocessors | `MultiChannelPreProcessor` |
| DATASETS | `VisionGatesDataset` |
| TRANSFORMS | `LoadSampleImage`, `LoadSampleLabels`, `LoadMedicalImage`, `LoadMedicalLabels` |
| OPTIM_WRAPPER_CONSTRUCTORS | `GroupMatcherLayerDecay` |

Nothing else in vision_gates imports this package. For mmsegmentation's heads in vision_gates' own training see
``vision_gates.decoders.mmseg``.
"""

import os

import numpy as np
import torch

import vision_gates  # noqa: F401  (registers the vg_* models)
from vision_gates.errors import ConfigError

# mmsegmentation imports albumentations, which otherwise asks PyPI for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
try:
    import mmseg.datasets  # noqa: F401  (of mmsegmentation, whose release 1.2 stops here without compiled operators)
except ImportError as error:
    raise ConfigError(
        f"vision_gates.mmseg needs mmsegmentation ({error}): pip install 'vision-gates[mmseg]'"
    ) from error

from vision_gates.mmseg.backbone import VisionGatesBackbone
from vision_gates.mmseg.datasets import VisionGatesDataset
from vision_gates.mmseg.heads import AttentionGateHead, ResidualAttentionHead
from vision_gates.mmseg.layer_decay import GroupMatcherLayerDecay
from vision_gates.mmseg.losses import OverlapCrossEntropyLoss
from vision_gates.mmseg.necks import GnConvFPN
from vision_gates.mmseg.preprocessor import MultiChannelPreProcessor
from vision_gates.mmseg.transforms import LoadMedicalImage, LoadMedicalLabels, LoadSampleImage, LoadSampleLabels

__all__ = [
    "AttentionGateHead",
    "GnConvFPN",
    "GroupMatcherLayerDecay",
    "LoadMedicalImage",
    "LoadMedicalLabels",
    "LoadSampleImage",
    "LoadSampleLabels",
    "MultiChannelPreProcessor",
    "OverlapCrossEntropyLoss",
    "ResidualAttentionHead",
    "VisionGatesBackbone",
    "VisionGatesDataset",
]

# mmengine's checkpoints hold NumPy numbers. Where torch.load(weights_only=True) does not know one of their types,
# mmengine loads again without it, and whatever code a file holds is run.
torch.serialization.add_safe_globals([type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OSUVMm"])
