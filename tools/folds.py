"""Put the folds of a cross-validation together: python tools/folds.py runs/fold0 runs/fold1 out=folds.csv"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.cli import folds  # noqa: E402

if __name__ == "__main__":
    sys.exit(folds(sys.argv[1:]))
