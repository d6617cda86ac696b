"""Compare masks with the truth: python tools/score.py PREDICTION TRUTH; --help says more."""

import os
import sys
from pathlib import Path

# Threads that wait for each other should soon sleep: libgomp lets them spin, which on a busy machine is up to 60 times
# slower. It reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.cli import score  # noqa: E402

if __name__ == "__main__":
    sys.exit(score(sys.argv[1:]))
