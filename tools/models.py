"""List the models: python tools/models.py 'vg_vig_*'"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.cli import models  # noqa: E402

if __name__ == "__main__":
    sys.exit(models(sys.argv[1:]))
