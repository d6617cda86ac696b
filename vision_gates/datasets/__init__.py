"""Data sets, one folder each: import them as ``vision_gates.datasets.<name>``.

In a checkout the folders live in the top-level ``datasets/`` (which has no ``__init__.py``, so that ``import datasets``
keeps meaning Hugging Face's package); an installed wheel holds them right here. Shared parts: base.py, images.py,
preflight.py.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file():  # source tree or editable install
    __path__.append(str(_checkout / "datasets"))
