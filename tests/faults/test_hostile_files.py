"""Hostile files: every reader reads them or refuses them in one line; nothing crashes, hangs, swells or runs code.

A short run of tools/fuzz.py in this process (the tool has a worker that survives crashes), and what it found before.
"""

import ast
import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from vision_gates.config import load_config
from vision_gates.datasets.images import read_image, read_mask
from vision_gates.datasets.npz import open_npz
from vision_gates.datasets.tiff import TruncatedError, check_complete
from vision_gates.datasets.volumes.layouts import find_layout
from vision_gates.engine.building import load_run
from vision_gates.engine.checkpoint import is_complete, read_checkpoint, write_checkpoint
from vision_gates.errors import ConfigError, DataError, UserError
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.reading import read_volume

pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"config": 10, "run": 25, "results": 25}  # 50 of all others


@pytest.fixture(scope="module")
def fuzz():
    """tools/fuzz.py as a module."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("fuzz_tool", ROOT / "tools" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


KINDS = "config run results checkpoint weights nifti itk dicom image tiff npz overlays layout sidecar network".split()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_or_refused(fuzz, kind, tmp_path):
    from fuzzing.running import Case

    case = Case(kind, tmp_path)
    assert case.seeds and case.traps
    found = {"read": 0, "refused": 0}
    for index in range(len(case.seeds) + len(case.traps) + COUNTS.get(kind, 50)):
        outcome = case.run(index, seed=1)
        assert not outcome.wrong, f"number {index}: {outcome.result}: {outcome.message}"
        found[outcome.result] += 1
    assert found["read"] >= len(case.seeds) and found["refused"] >= len(case.traps)


@pytest.mark.parametrize(
    ("end", "died"),
    [("os.kill(os.getpid(), 11)", "crash"), ("sys.exit(3)", "crash"), ("time.sleep(60)", "hang"), ("", None)],
)
def test_the_watch_tells_crash_from_hang(fuzz, end, died):
    from fuzzing.running import watch

    code = f"import os, sys, time\nprint('{{\"start\": 7}}', flush=True)\n{end}"
    events = list(watch([sys.executable, "-c", code], most_seconds=0.5, start_seconds=60))
    assert events[0] == {"start": 7}
    assert [event["died"] for event in events[1:]] == ([] if died is None else [died])


def test_an_attempt_notices_what_is_wrong(fuzz, tmp_path):
    from fuzzing.running import attempt

    def several_lines(place):
        raise UserError("a\nb")

    def swell(place):
        return np.ones(2**26, np.uint8).sum()

    assert attempt(lambda place: 1 / 0, tmp_path).result == "error"
    assert attempt(several_lines, tmp_path).result == "error"
    swollen = attempt(swell, tmp_path)
    assert swollen.result == "read"
    assert swollen.peak > 2**25 or not Path("/proc/self/clear_refs").exists()


def sources() -> list[Path]:
    trees = ("vision_gates", "datasets", "kernels", "tools")
    return sorted(path for tree in trees for path in (ROOT / tree).rglob("*.py"))


def dangerous(tree: ast.AST) -> list[str]:
    """Calls that could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            or re.fullmatch(r"(c?[pP]ickle|dill|joblib|marshal|shelve)\.(loads?|Unpickler|open)", name)
            or options.get("allow_pickle") not in (None, "False")
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False")
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_nothing_runs_what_a_file_says():
    suspects = re.compile(r"\b(eval|exec|load|loads|unsafe_load|full_load|Unpickler|allow_pickle|open)\b")
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sources()}
    found = {name: dangerous(ast.parse(text)) for name, text in texts.items() if suspects.search(text)}
    assert {name: calls for name, calls in found.items() if calls} == {}
    for bad in (
        "torch.load(x)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "pickle.load(f)",
        "eval(x)",
        "yaml.load(x)",
    ):
        assert dangerous(ast.parse(bad)), bad


# What was found


def refusal(read, path, kind=UserError):
    with pytest.raises(kind) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BASE = "task: {type: classification}\ndata: {type: digits, image_size: 8}\nmodel: {name: test_convnext}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a: &a [x]\n"
            + "".join(f"a{i}: &a{i} [{'*a, ' * 9 if i == 0 else f'*a{i - 1}, ' * 9}]\n" for i in range(9)),
            "values",
        ),
        ("task: &a {type: *a}", "deep"),
        ("seed: 2001-99-99", "month"),
        ('seed: "\\UFFFFFFFF"', "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
        (BASE + "1e3: 2\n", "unknown key"),
        (BASE + '"a\\nb\\e[31m": 2\n', "a\\nb\\x1b"),
        ("x: " + "[" * 5000, "nested"),
        (BASE + "#" * 300_000, "characters"),
    ],
)
def test_a_hostile_configuration_is_refused(tmp_path, text, says):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert says in refusal(load_config, path, ConfigError)


def test_dates_and_aliases_of_honest_configurations_stay(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "task: {type: classification}\ndata: &d {type: digits, image_size: 8}\nmodel: {name: test_convnext}\n"
    )
    assert load_config(path, ["trainer.run_dir=2026-01-02"]).trainer.run_dir == "2026-01-02"


@pytest.mark.parametrize("text", ["[1]", "3", "[" * 100_000, '{"volumes": {"spatial_dims": 7}}'])
def test_a_damaged_run_json_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(BASE)
    (tmp_path / "run.json").write_text(text)
    assert "run.json" in refusal(load_run, tmp_path, ConfigError)


def test_a_manifest_names_no_file_outside(tmp_path):
    folder = write_checkpoint(tmp_path, "last", weights={}, state={"a": 1}, about={})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert is_complete(folder)
    (tmp_path / "other").write_bytes(b"")
    sums = {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    manifest["files"]["../other"] = sums
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not is_complete(folder)
    assert "damaged" in refusal(lambda root: read_checkpoint(root, "last"), tmp_path)


def test_bytes_behind_the_voxels_have_an_end(tmp_path):
    import nibabel

    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)).to_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(image + bytes(1000)))
    assert read_volume(path).array.shape == (3, 3, 3)  # padding is fine
    path.write_bytes(gzip.compress(image + bytes(2**26 + 2**21), 1))
    assert "follow the voxels" in refusal(read_volume, path, DataError)


@pytest.mark.parametrize("spacing", [1e-9, 1e7])
def test_a_voxel_has_a_plausible_size(spacing):
    with pytest.raises(ValueError, match="plausible"):
        Geometry((3, 3, 3), np.diag([spacing, 1, 1, 1]))


def test_an_npy_mask_that_is_an_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros((3, 3)))
    path = (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "NumPy array" in refusal(read_mask, path, DataError)


def test_what_is_missing_in_an_npz_is_damage(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(3))
    with open_npz(path) as arrays:
        assert arrays["a"].shape == (3,)

    def read(path):
        with open_npz(path) as arrays:
            return arrays["b"]

    assert "a.npz: is damaged" in refusal(read, path, DataError)


def test_pillow_reads_no_other_formats(tmp_path):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path, format="GIF")
    assert "not an image" in refusal(read_image, path, DataError)


def test_overlapping_directories_end_soon(fuzz):
    from fuzzing.images import overlapping_directories

    with pytest.raises(TruncatedError, match="longer than the file"):
        check_complete(overlapping_directories())


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "a\nb", "x" * 300])
def test_a_case_cannot_name_another_folder(tmp_path, name):
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.nii.gz").write_bytes(b"")
    case = {"images": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz"}
    about = {"labels": {"background": 0, "a": 1}, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(about | {"dataset": {name: case}}))
    assert "cannot name a file" in refusal(find_layout, tmp_path, DataError)


def test_a_channel_that_is_a_link_is_followed(tmp_path):
    root = tmp_path / "root"
    (root / "imagesTr").mkdir(parents=True)
    (tmp_path / "outside.nii.gz").write_bytes(b"")
    (root / "imagesTr" / "a_0000.nii.gz").symlink_to(tmp_path / "outside.nii.gz")
    training = [{"image": "imagesTr/a.nii.gz", "label": "imagesTr/a_0000.nii.gz"}]
    about = {"labels": {"0": "background", "1": "a"}, "modality": {"0": "MRI"}, "training": training}
    (root / "dataset.json").write_text(json.dumps(about))
    assert "is not a file below" in refusal(find_layout, root, DataError)
