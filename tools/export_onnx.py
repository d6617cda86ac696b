"""Write a trained network as ONNX: python tools/export_onnx.py runs/NAME OUT.onnx; --help says more."""

import os
import sys
from pathlib import Path

# Threads that wait for each other should soon sleep: libgomp lets them spin, which on a busy machine is up to 60 times
# slower. It reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.cli import export  # noqa: E402

if __name__ == "__main__":
    sys.exit(export(sys.argv[1:]))
