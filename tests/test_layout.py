"""The structure that CONTRIBUTING.md promises: import directions, the bridges, names that must stay free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each layer may import itself and what stands after it. cli sits on top; errors may be imported by everyone.
LAYERS = [
    ("mmseg",),  # a plug-in that configurations of mmsegmentation name; nothing here imports it
    ("tools",),
    ("cli",),
    ("command_end",),
    ("engine",),
    ("export",),
    ("model_table", "benchmark", "config"),
    ("networks",),
    ("segmenter", "datasets", "gate_maps", "losses", "region_losses", "modality_dropout", "metrics", "augmentation"),
    ("decoders", "models"),
    ("volumes",),
    ("gates",),
    ("kernels",),
    ("errors",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "vision_gates" else parts[0]


def sources() -> list[Path]:
    return sorted(
        path for tree in ("vision_gates", "kernels", "datasets", "tools") for path in (ROOT / tree).rglob("*.py")
    )


def imported_parts(path: Path) -> set[str]:
    """Parts of vision_gates that a file imports, inside functions too."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import; write the full name"
            names = [node.module]
            if node.module == "vision_gates":
                names = [f"vision_gates.{alias.name}" for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "vision_gates" and len(pieces) > 1:
                parts.add(pieces[1])
            assert pieces[0] not in ("kernels", "datasets"), f"{path}: import vision_gates.{name} instead"
    return parts


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = part_of(path)
    if here == "__init__":
        return
    assert here in RANK, f"{here} has no layer: add it to LAYERS"
    for part in imported_parts(path) - {here, "__version__"}:
        assert RANK[part] > RANK[here] or (RANK[part] == RANK[here] and part != here), (
            f"{path.relative_to(ROOT)} ({here}) must not import vision_gates.{part}"
        )


def test_trees_hold_folders_only():
    for tree in ("kernels", "datasets"):
        assert not (ROOT / tree / "__init__.py").exists(), f"{tree}/__init__.py would shadow a package of that name"
        for folder in (ROOT / tree).iterdir():
            if folder.name != "__pycache__":
                assert (folder / "__init__.py").is_file(), f"{folder} needs an __init__.py"
    assert not list((ROOT / "kernels").rglob("triton.py")), "a module named triton.py would shadow Triton"


def test_tools_are_short():
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, (
            f"{path.name}: tools parse and call; the rest is in the package"
        )


def test_model_files_stay_readable():
    for path in (ROOT / "vision_gates" / "models").glob("*.py"):
        assert len(path.read_text().splitlines()) < 600, path.name


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_is_light():
    """One interpreter for all of it: starting torch is what takes the time."""
    out = run_python(
        "import sys, time, torch, timm\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter(); import vision_gates; seconds = time.perf_counter() - start\n"
        "heavy = ['accelerate', 'albumentations', 'pydantic', 'monai', 'matplotlib', 'rich', 'cv2', 'triton']\n"
        "heavy += ['mmengine', 'mmseg', 'onnx', 'onnxruntime']\n"
        "heavy = [name for name in heavy if name in sys.modules and name not in before]\n"
        "print(seconds < 1.0, heavy, len(timm.list_models('vg_*')))"
    )
    seconds, heavy, count = out.split(maxsplit=2)
    assert (seconds, heavy) == ("True", "[]") and int(count) >= 8


def test_import_datasets_keeps_its_meaning(tmp_path):
    """From the checkout's folder, a package named like Hugging Face's wins although it comes last on the path."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("owner = 'Hugging Face'\n")
    code = "import sys; sys.path.append(sys.argv[1]); import datasets; print(datasets.owner)"
    assert run_python(code, str(tmp_path)) == "Hugging Face"
