"""Write a real head MRI and its labels as NIfTI, to try segment and score: python tools/mni152_volume.py FOLDER.

The MNI152 template (its terms and origin: datasets/mni152) at 2 mm, from nilearn: nothing is downloaded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.datasets.mni152 import write_volumes  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit((__doc__ or "").strip())
    for path in write_volumes(sys.argv[1]):
        sys.stdout.write(f"{path}\n")
