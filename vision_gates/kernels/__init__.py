"""Operators, one folder each: import them as ``vision_gates.kernels.<op>``.

In a checkout the folders live in the top-level ``kernels/``; an installed wheel holds them right here.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file():  # source tree or editable install
    __path__.append(str(_checkout / "kernels"))
