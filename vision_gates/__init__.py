"""Gated-attention vision networks. Importing this package registers its models with timm as ``vg_*``.

Where torch is not installed there are no models; what runs exported ones (``vision_gates.export.Session``) needs none.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:
    from vision_gates import models as models

__version__ = "0.1.0"
