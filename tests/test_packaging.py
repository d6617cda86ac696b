"""What a wheel holds: the two trees under their package names, the configurations, and nothing at the top level."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, so that setuptools leaves no build/ or egg-info in the checkout.
    source = folder / "source"
    copied = ("vision_gates", "kernels", "datasets", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_source_and_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for tree in ("kernels", "datasets", "configs"):
        for path in (ROOT / tree).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert f"vision_gates/{path.relative_to(ROOT)}" in names, path
    for path in (ROOT / "vision_gates").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names, path


def test_wheel_owns_one_top_level_name(wheel):
    archive = zipfile.ZipFile(wheel)
    assert {name.split("/")[0] for name in archive.namelist() if ".dist-info" not in name} == {"vision_gates"}
    (top_level,) = (name for name in archive.namelist() if name.endswith("top_level.txt"))
    assert archive.read(top_level).decode().split() == ["vision_gates"]


def test_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    code = (
        "import vision_gates, timm, torch\n"
        "import vision_gates.kernels.bidirectional_gla, vision_gates.datasets.digits\n"
        "from vision_gates.config import find_config\n"
        "assert '.whl' in vision_gates.__file__ or 'unpacked' in vision_gates.__file__, vision_gates.__file__\n"
        "assert find_config('configs/classification/digits_vig_atto.yaml').is_file()\n"
        "assert timm.create_model('vg_vig_atto')(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)\n"
    )
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = {"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
