"""Runs on volumes from a folder in nnU-Net's layout to masks on the grids of its files, through the auto recipes."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console

from vision_gates import cli
from vision_gates.config import RunConfig, load_config
from vision_gates.engine.evaluation import evaluate_run
from vision_gates.engine.run_directory import read_metrics
from vision_gates.engine.segmenting import SegmentOptions, segment
from vision_gates.engine.trainer import Trainer, train
from vision_gates.errors import ConfigError
from vision_gates.volumes.reading import read_labels, stem
from vision_gates.volumes.scoring import score_case

NAMES = ("background", "kernel", "shell")
MODES = {"3d": ("auto_3d", ()), "2d": ("auto_2d", ()), "2.5d": ("auto_2d", ("data.neighbours=1",))}
TINY = (
    "model.options={widths: [4, 8, 8], norm: instance, deep_supervision: separate}",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "trainer.eval_every=1",
    "trainer.device=cpu",
    "data.folds=3",
    "data.samples=4",
    "data.batch_size=2",
)
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115


class Killed(BaseException):
    """Stands for the process's death: no ``except Exception`` may catch it."""


def write_case(root: Path, name: str, *, seed: int, spacing: tuple[float, float, float] = (1.0, 1.2, 2.5)) -> None:
    """A bright ball in a less bright one on noise, axes not in RAS order, a little oblique."""
    generator = np.random.default_rng(seed)
    centre = np.array((10, 9, 6)) + generator.integers(-2, 3, 3)
    grid = np.stack(np.meshgrid(*map(np.arange, (20, 18, 12)), indexing="ij"), axis=-1)
    distance = np.linalg.norm((grid - centre) * (1, 1, 1.5), axis=-1)
    labels = np.where(distance < 3, 1, np.where(distance < 6, 2, 0)).astype(np.uint8)
    image = generator.normal(100, 10, labels.shape) + np.array((0, 120, 60))[labels]
    angle = 0.1
    turn = np.array(((np.cos(angle), -np.sin(angle), 0), (np.sin(angle), np.cos(angle), 0), (0, 0, 1)))
    affine = np.eye(4)
    affine[:3, :3] = np.diag((-1, -1, 1)) @ turn @ np.diag(spacing)
    affine[:3, 3] = (12, 15, -20)
    for folder, file, array in (
        ("imagesTr", f"{name}_0000", image.astype(np.float32)),
        ("labelsTr", name, labels),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), root / folder / f"{file}.nii.gz")


def write_dataset(root: Path) -> Path:
    """Three patients with two frames each; the last frame of each has thicker slices."""
    for patient in range(3):
        for frame in (1, 2):
            thick = 2.5 if frame == 1 else 3.0
            write_case(root, f"p{patient}_frame{frame:02d}", seed=10 * patient + frame, spacing=(1.0, 1.2, thick))
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {name: value for value, name in enumerate(NAMES)},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's runs lie; ``data`` is the data set, ``cache`` its prepared cases."""
    place = tmp_path_factory.mktemp("volumes")
    write_dataset(place / "data")
    return place


@pytest.fixture(scope="module")
def configure(place: Path) -> Callable[..., RunConfig]:
    """``configure(mode, run, overrides ...)``: a tiny run of a recipe."""

    def build(mode: str, run: str, *overrides: str) -> RunConfig:
        recipe, extra = MODES[mode]
        where = (f"data.root={place / 'data'}", f"data.cache={place / 'cache'}", f"trainer.run_dir={place / run}")
        size = "data.patch_size=[16, 16, 8]" if mode == "3d" else "data.patch_size=[16, 16]"
        return load_config(f"segmentation/{recipe}.yaml", [*TINY, *where, size, *extra, *overrides])

    return build


@pytest.fixture(scope="module")
def trained(configure: Callable[..., RunConfig]) -> Callable[[str], Path]:
    """``trained(mode)``: its run, trained once."""
    done: dict[str, Path] = {}

    def get(mode: str) -> Path:
        if mode not in done:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            done[mode] = train(configure(mode, mode), console=QUIET)
            torch.set_num_threads(threads)
        return done[mode]

    return get


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same: weights bit for bit, every number of the epochs and of the evaluation."""
    times = ("seconds", "images_per_second")
    return {
        **{
            name: hashlib.sha256((run / "checkpoints" / name / "weights.safetensors").read_bytes()).hexdigest()
            for name in ("last", "best")
        },
        "rows": [{k: v for k, v in row.items() if k not in times} for row in read_metrics(run / "metrics.jsonl")],
        **scores(run),
    }


def scores(run: Path) -> dict[str, Any]:
    """The evaluation, all files of it."""
    folder = run / "evaluation"
    evaluation = json.loads((folder / "val.json").read_text())
    files = ("val.csv", "val_cases.csv", "val_summary.csv", "val_summary.json", "val_overlays.npz", "val_gates.npz")
    return {file: (folder / file).read_bytes() for file in files} | {
        "val.json": {key: value for key, value in evaluation.items() if key not in ("seconds", "run")}
    }


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("mode", MODES)
def test_run_is_complete(trained, mode):
    run = trained(mode)
    there = {path.name for path in run.iterdir()}
    assert there == {
        *("config.yaml", "run.json", "environment.json", "metrics.jsonl", "log.txt", "report.html"),
        *("checkpoints", "evaluation", "tensorboard"),
    }
    assert not list(run.rglob("*writing*"))
    info = json.loads((run / "run.json").read_text())
    volumes = info["volumes"]
    assert volumes["spatial_dims"] == (3 if mode == "3d" else 2)
    assert volumes["patch_size"] == ([16, 16, 8] if mode == "3d" else [16, 16])
    assert volumes["slice_axis"] == 2 and volumes["channel_names"] == ["MRI"]
    assert volumes["neighbours"] == (1 if mode == "2.5d" else 0)
    assert info["in_chans"] == (3 if mode == "2.5d" else 1)
    assert volumes["preprocessing"]["spacing"] == pytest.approx([1, 1.2, 2.75], abs=1e-4), "the median of the training"
    assert info["images"] == {"train": 4, "val": 2} and info["class_names"] == list(NAMES)
    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) == 2 and all(np.isfinite(row["val"]["dice"]) and np.isfinite(row["train"]["loss"]) for row in rows)


@pytest.mark.parametrize(
    "network, mode",
    [
        *((name, mode) for name in ("agunet", "attention_unet", "daunet", "hornet_unet") for mode in ("3d", "2.5d")),
        ("vg_vig_h_atto", "2.5d"),
    ],
)
def test_networks_on_volumes(configure, network, mode):
    options = {"hornet_unet": "{widths: [4, 8, 8], orders: [2, 2, 2]}", "vg_vig_h_atto": "{}"}
    options = options.get(network, "{widths: [4, 8, 8]}")
    name = f"{network}_{mode}"
    config = configure(mode, name, f"model.name={network}", f"model.options={options}", "schedule.epochs=1")
    run = train(config, console=QUIET)
    (row,) = read_metrics(run / "metrics.jsonl")
    assert np.isfinite(row["train"]["loss"]) and 0 <= row["val"]["dice"] <= 1
    assert (run / "evaluation" / "val_cases.csv").is_file()


def test_all_cases_can_be_trained_on(configure, place):
    run = train(configure("2d", "all", "data.fold=all", "schedule.epochs=1"), console=QUIET)
    info = json.loads((run / "run.json").read_text())
    assert info["images"] == {"train": 6, "val": 6}
    assert "those scores say nothing about other cases" in " ".join((run / "log.txt").read_text().split())
    with pytest.raises(ConfigError, match="fold: all goes with folds, and without val"):
        configure("2d", "all", "data.fold=all", "data.val=[p0_frame01]")


@pytest.mark.parametrize("mode", MODES)
def test_scores_of_cases(trained, mode):
    run = trained(mode)
    summary = json.loads((run / "evaluation" / "val_summary.json").read_text())
    assert [row["name"] for row in summary["per_label"]] == list(NAMES[1:])
    assert summary["cases"] == 2 and summary["patients"] == 1, "two frames of one patient"
    assert 0 <= summary["overall"]["dice"] <= 1 and summary["overall"]["dice_low"] is None
    with open(run / "evaluation" / "val_cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and len({row["case"] for row in rows}) == 2
    page = (run / "report.html").read_text()
    for text in (
        *NAMES,
        summary["convention"],
        "HD95, mm",
        "NSD, 2 mm",
        "volume error, ml",
        "lesion F1",
        "One patient",
    ):
        assert text in page, text
    assert "2 cases<" in page and "images" not in re.sub(
        r"<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.DOTALL
    )
    planes = ["axial", "coronal", "sagittal"] if mode == "3d" else ["axial"]
    assert re.findall(r'<p class="plane">(\w+), slice', page) == planes * 2, "of two cases"
    assert page.count("attention gate, gate 1 of 1") == 2 and "in a window of 16 x 16" in page
    log = (run / "log.txt").read_text()
    assert "val, on the grids of the files, 2 cases of 1 patient" in log and "HD95 mm" in log


@pytest.mark.parametrize("mode", MODES)
def test_evaluating_again_gives_the_same(trained, mode, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(mode), run)
    before = scores(run)
    shutil.rmtree(run / "evaluation")
    evaluation = evaluate_run(run, split="val")
    assert scores(run) == before
    assert evaluation.scores is not None
    assert evaluation.scores.summary.to_dict() == json.loads(before["val_summary.json"])


@pytest.mark.parametrize("mode", ["3d", "2.5d"])
def test_killed_and_resumed(trained, configure, monkeypatch, mode):
    """Two updates an epoch: killed in the first, at the end of the first and in the second epoch."""
    config = configure(mode, f"killed_{mode}", "trainer.resume=true", "trainer.checkpoint_steps=1")
    deaths = [1, 2, 3]
    original = Trainer.step_optimizer

    def step(self):
        original(self)
        if deaths and self.state.update == deaths[0]:
            deaths.pop(0)
            raise Killed

    monkeypatch.setattr(Trainer, "step_optimizer", step)
    for _ in range(3):
        with pytest.raises(Killed):
            train(config, console=QUIET)
    assert outcome(train(config, console=QUIET)) == outcome(trained(mode))


@pytest.mark.parametrize("mode", ["3d", "2.5d"])
def test_number_of_workers_does_not_matter(trained, configure, mode):
    run = train(configure(mode, f"workers_{mode}", "data.workers=2"), console=QUIET)
    assert outcome(run) == outcome(trained(mode))


def test_cache_is_shared_by_runs_and_told_apart_by_settings(trained, configure, place, monkeypatch):
    trained("3d")
    before = stamps(place / "cache")
    assert len(list((place / "cache").iterdir())) == 6, "a folder a case"
    with monkeypatch.context() as patch:
        patch.setattr("vision_gates.engine.volume_preparation.prepare", None)  # nothing may be prepared
        train(configure("3d", "cached", "schedule.epochs=1", "seed=1"), console=QUIET)
    assert stamps(place / "cache") == before
    train(configure("3d", "coarser", "schedule.epochs=1", "data.spacing=[1, 1, 5]"), console=QUIET)
    after = stamps(place / "cache")
    assert after.items() > before.items() and len(list((place / "cache").iterdir())) == 12


# ---------------------------------------------------------------- segment


@pytest.mark.parametrize("mode", MODES)
def test_segment_writes_the_mask_that_was_scored(trained, place, tmp_path, mode):
    run = trained(mode)
    with open(run / "evaluation" / "val_cases.csv", newline="") as file:
        scored = [row for row in csv.DictReader(file)]
    name = scored[0]["case"]
    image = place / "data" / "imagesTr" / f"{name}_0000.nii.gz"
    (mask,) = segment(image, tmp_path / "mask.nii.gz", run, SegmentOptions(device="cpu"), console=QUIET)
    source, written = nibabel.load(image), nibabel.load(mask)
    assert written.shape == source.shape
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    truth, prediction = read_labels(place / "data" / "labelsTr" / f"{name}.nii.gz"), read_labels(mask)
    rows = score_case(prediction.array, truth.array, spacing=truth.geometry.spacing, class_names=NAMES)
    expected = [row for row in scored if row["case"] == name]
    assert any(row["dice"] for row in rows), "something is predicted"
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == [
        {key: value for key, value in row.items() if key != "case"} for row in expected
    ]


def test_segmenting_a_folder_goes_on_where_it_was_stopped(trained, place, tmp_path):
    options, images = SegmentOptions(device="cpu"), place / "data" / "imagesTr"
    masks = segment(images, tmp_path / "masks", trained("2d"), options, console=QUIET)
    assert [mask.name for mask in masks] == [f"p{p}_frame{f:02d}.nii.gz" for p in range(3) for f in (1, 2)]
    before = {mask: (mask.stat().st_mtime_ns, mask.read_bytes()) for mask in masks}
    masks[3].unlink()
    assert segment(images, tmp_path / "masks", trained("2d"), options, console=QUIET) == masks
    for mask, (time, content) in before.items():
        assert (mask.stat().st_mtime_ns == time) == (mask != masks[3]), mask
        np.testing.assert_array_equal(
            read_labels(mask).array, nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).get_fdata()
        )
    # Killed after a mask was written and before that was noted: the mask is this run's, and is made anew.
    journal = tmp_path / "masks" / "segment.jsonl"
    *_, begun, row = journal.read_text().splitlines(keepends=True)
    assert json.loads(begun) == {"begun": "p1_frame02"} and json.loads(row)["case"] == "p1_frame02"
    table = (tmp_path / "masks" / "volumes.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()] == ["case", *map(stem, masks)]
    journal.write_text(journal.read_text().removesuffix(row) + row[: len(row) // 2])
    assert segment(images, tmp_path / "masks", trained("2d"), options, console=QUIET) == masks
    assert [json.loads(line) for line in journal.read_text().splitlines()[-2:]][0] == {"begun": "p1_frame02"}
    assert (tmp_path / "masks" / "volumes.csv").read_text() == table


def test_overwriting_goes_on_where_it_was_stopped(trained, place, tmp_path):
    images, out = place / "data" / "imagesTr", tmp_path / "masks"
    options = SegmentOptions(device="cpu", report=False)
    masks = segment(images, out, trained("2d"), options, console=QUIET)
    table, before = (out / "volumes.csv").read_text(), [mask.stat().st_mtime_ns for mask in masks]
    shown = io.StringIO()

    class Stop(io.StringIO):
        def write(self, text: str) -> int:
            if "3/6" in text:
                raise Killed
            return 0

    with pytest.raises(Killed):
        again = options.model_copy(update={"overwrite": True})
        segment(images, out, trained("2d"), again, console=Console(file=Stop(), width=1000))
    after = [mask.stat().st_mtime_ns for mask in masks]
    assert [a != b for a, b in zip(after, before, strict=True)] == [True, True, False, False, False, False]
    assert len((out / "volumes.csv").read_text().splitlines()) == 3
    assert segment(images, out, trained("2d"), options, console=Console(file=shown, width=1000)) == masks
    assert shown.getvalue().count("done before") == 2 and (out / "volumes.csv").read_text() == table
    # One of them alone: the others stay what they are.
    (one,) = segment(images / f"{stem(masks[0])}_0000.nii.gz", out, trained("2d"), again, console=QUIET)
    assert one == masks[0] and (out / "volumes.csv").read_text() == table


# ---------------------------------------------------------------- what cannot be used


@pytest.fixture
def fails(tmp_path, monkeypatch, capfd) -> Callable[..., None]:
    """``fails(argv, *words)``: the command ends with code 2 and one line that holds the words, and leaves nothing."""
    monkeypatch.chdir(tmp_path)

    def check(argv: list[str], *words: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        assert cli.main(argv) == 2
        out, err = capfd.readouterr()
        lines = err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in out + err, err
        for word in words:
            assert word in lines[0], f"{word!r} is not in: {lines[0]}"
        assert sorted(tmp_path.rglob("*")) == before

    return check


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray], *, spacing: float = 1.0) -> None:
    """Rewrite a volume; ``spacing`` stretches its first axis."""
    image = nibabel.load(path)
    affine = image.affine @ np.diag((spacing, 1, 1, 1))
    nibabel.save(nibabel.Nifti1Image(edit(np.asarray(image.dataobj)), affine), path)


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[3, 4, 5] = np.nan
    return array


BAD = {
    "four-dimensional image": (
        "imagesTr/p1_frame02_0000",
        lambda a: np.stack([a, a], axis=-1),
        1.0,
        ["p1_frame02_0000"],
    ),
    "label that is no class": ("labelsTr/p1_frame02", lambda a: np.where(a == 2, 7, a), 1.0, ["p1_frame02", "7"]),
    "another spacing": ("labelsTr/p1_frame02", lambda a: a, 1.5, ["p1_frame02", "spacing", "1.5"]),
    "NaN": ("imagesTr/p1_frame02_0000", with_nan, 1.0, ["p1_frame02_0000", "NaN"]),
    "single slice": ("imagesTr/p1_frame02_0000", lambda a: a[:, :, :1], 1.0, ["p1_frame02", "single slice"]),
}


@pytest.mark.parametrize("what", BAD)
def test_training_refuses(fails, tmp_path, what):
    path, edit, spacing, words = BAD[what]
    write_dataset(tmp_path / "data")
    change(tmp_path / "data" / f"{path}.nii.gz", edit, spacing=spacing)
    fails(["train", "segmentation/auto_3d.yaml", *TINY, "data.root=data", "data.cache=cache"], *words)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut_short, lambda path: change(path, with_nan)], ids=["truncated", "NaN"])
@pytest.mark.parametrize("patient", range(3))
def test_training_refuses_whatever_part_the_case_is_in(tmp_path, monkeypatch, capfd, patient, damage):
    """What was prepared before a damaged validation case is whole, and used by the next run."""
    monkeypatch.chdir(tmp_path)
    root = write_dataset(tmp_path / "data")
    path = root / "imagesTr" / f"p{patient}_frame01_0000.nii.gz"
    damage(path)
    command = ["train", "segmentation/auto_3d.yaml", *TINY, "data.root=data", "data.cache=cache", "schedule.epochs=1"]
    assert cli.main(command) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and path.name in err and "Traceback" not in err
    assert not Path("runs").exists() and not list(Path().rglob("*writing*"))
    write_case(root, f"p{patient}_frame01", seed=10 * patient + 1)
    assert cli.main(command) == 0


@pytest.mark.parametrize("what", ["four-dimensional image", "NaN"])
def test_segmenting_refuses(fails, trained, place, tmp_path, what):
    _, edit, _, _ = BAD[what]
    shutil.copy(place / "data" / "imagesTr" / "p0_frame01_0000.nii.gz", tmp_path / "scan.nii.gz")
    change(tmp_path / "scan.nii.gz", edit)
    fails(["segment", "scan.nii.gz", "mask.nii.gz", "--checkpoint", str(trained("3d"))], "scan.nii.gz")


def test_segmenting_refuses_a_truncated_file(fails, trained, place, tmp_path):
    shutil.copy(place / "data" / "imagesTr" / "p0_frame01_0000.nii.gz", tmp_path / "scan.nii.gz")
    cut_short(tmp_path / "scan.nii.gz")
    fails(["segment", "scan.nii.gz", "mask.nii.gz", "--checkpoint", str(trained("3d"))], "scan.nii.gz")


THIN = [(2, 18, 12), (20, 2, 12), (20, 18, 2)]


@pytest.mark.parametrize("thin", [*THIN, (1, 18, 12), (20, 18, 1)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_volume_of_one_or_two_slices_is_segmented(trained, place, tmp_path, mode, thin):
    """Thinner than a patch, than a kernel and than what the network divides by, it is padded."""
    shutil.copy(place / "data" / "imagesTr" / "p0_frame01_0000.nii.gz", tmp_path / "thin.nii.gz")
    change(tmp_path / "thin.nii.gz", lambda a: a[tuple(map(slice, thin))])
    (mask,) = segment(
        tmp_path / "thin.nii.gz", tmp_path / "mask.nii.gz", trained(mode), SegmentOptions(device="cpu"), console=QUIET
    )
    assert nibabel.load(mask).shape == thin
    page = (tmp_path / "mask_report.html").read_text()
    assert all(f"{plane}, slice" in page for plane in ("axial", "coronal", "sagittal"))


@pytest.mark.parametrize("recipe", ["auto_3d", "auto_2d"])
@pytest.mark.parametrize("axis", range(3))
def test_volumes_of_two_slices_are_trained_on(tmp_path, recipe, axis):
    """All of them, or one among others, with a warning that names them."""
    root = write_dataset(tmp_path / "data")
    thin = "p1_frame02" if axis == 0 else "*"
    for path in [*root.glob(f"imagesTr/{thin}_0000.nii.gz"), *root.glob(f"labelsTr/{thin}.nii.gz")]:
        change(path, lambda a: a.take(range(6, 8), axis=axis))
    where = (f"data.root={root}", f"data.cache={tmp_path / 'cache'}", f"trainer.run_dir={tmp_path / 'run'}")
    run = train(load_config(f"segmentation/{recipe}.yaml", [*TINY, *where, "schedule.epochs=1"]), console=QUIET)
    log, size = (run / "log.txt").read_text(), " x ".join(map(str, THIN[axis]))
    which = "1 case" if axis == 0 else "6 cases", "p1_frame02" if axis == 0 else "p0_frame01"
    assert f"warning: {which[0]} with fewer than 4 voxels along an axis: {which[1]} ({size})" in log
    assert np.isfinite(json.loads((run / "evaluation" / "val_summary.json").read_text())["overall"]["hd95_mm"])
    assert "Val cases" in (run / "report.html").read_text()


def test_gate_maps_of_a_volume(trained, place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    scan = place / "data" / "imagesTr" / "p0_frame01_0000.nii.gz"
    for mode in ("3d", "2.5d"):
        assert cli.main(["gate-maps", str(trained(mode)), "val:1", str(scan), f"out={mode}.png"]) == 0
        assert Path(f"{mode}.png").read_bytes().startswith(b"\x89PNG")
    before = sorted(tmp_path.iterdir())
    for argv, words in (
        (["val:2"], "there are train:0 to train:3, val:0 to val:1"),
        (["nowhere.nii.gz"], "nowhere.nii.gz"),
        (["val:0", "gates=encoder.*"], "no gate is called 'encoder.*'; there are"),
    ):
        capfd.readouterr()
        assert cli.main(["gate-maps", str(trained("3d")), *argv]) == 2
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and words in err, err
    assert sorted(tmp_path.iterdir()) == before


def write_series(folder: Path, *, leave_out: int | None = None) -> None:
    """Ten slices of CT, 2 mm apart."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    folder.mkdir()
    for number in range(10):
        if number == leave_out:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
        data.Modality, data.PatientID, data.InstanceNumber = "CT", "nobody", number + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [1.0, 1.0], 2.0
        data.Rows = data.Columns = 16
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = np.random.default_rng(number).integers(900, 1200, (16, 16)).astype(np.int16).tobytes()
        pydicom.dcmwrite(folder / f"{number:02d}.dcm", data, enforce_file_format=True)


def test_a_dicom_series_is_segmented_unless_a_slice_is_missing(fails, trained, tmp_path):
    write_series(tmp_path / "whole")
    write_series(tmp_path / "gap", leave_out=4)
    fails(["segment", "gap", "mask.nii.gz", "--checkpoint", str(trained("3d"))], "gap")
    assert cli.main(["segment", "whole", "mask.nii.gz", "--checkpoint", str(trained("3d")), "device=cpu"]) == 0
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == (16, 16, 10) and nibabel.aff2axcodes(mask.affine) == ("L", "P", "S")
