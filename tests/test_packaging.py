"""What a wheel holds: the two trees under their package names, the configurations, and nothing at the top level.

And what CI installs: exact versions of everything that is needed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.mark.parametrize("path", sorted((ROOT / ".ci").glob("constraints-py*.txt")), ids=lambda path: path.stem)
def test_constraints_are_exact_and_fit(path):
    """Every line one version; all that pyproject.toml asks for is there, in a version it allows."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    pins = [Requirement(line) for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all([one.operator for one in pin.specifier] == ["=="] and not pin.url for pin in pins)
    assert len({pin.name for pin in pins}) == len(pins)
    versions = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, asked):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_freeze_follows_requirements(tmp_path, monkeypatch):
    """Extras and markers count, packages nobody needs do not; a version is that of PyPI."""
    packages = {
        "Our.Project": ["first[more]>=1", "second; sys_platform == 'nowhere'", "dev-only; extra == 'dev'"],
        "first": ["third; extra == 'more'", "other; extra == 'less'", "our-project[dev]"],
        "third": ["first"],
        "dev_only": [],
        "by-hand": ["first"],
    }
    for name, needs in packages.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", "Version: 1.0+cu130", *(f"Requires-Dist: {text}" for text in needs)]
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("freeze", ROOT / "tools" / "freeze.py")
    freeze = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(freeze)
    assert freeze.required("our-project", frozenset()) == dict.fromkeys(
        ("our-project", "first", "third", "dev-only"), "1.0"
    )


@pytest.mark.parametrize("noted", [True, False])
def test_ci_installs_exact_versions_where_they_are_noted(tmp_path, noted):
    """With a ``make`` that only says what it was told."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci", ignore=shutil.ignore_patterns("*.txt"))
    (tmp_path / "make").write_text('#!/bin/sh\necho "make $@"\n')
    (tmp_path / "make").chmod(0o755)
    file = ".ci/constraints-py{}.{}.txt".format(*sys.version_info)
    if noted:
        (tmp_path / file).write_text("torch==2.15.0\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, env=environment)
    said = (
        [f"make test CONSTRAINTS={file}"]
        if noted
        else [f"there is no {file}: installing the newest versions", "make test"]
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr
