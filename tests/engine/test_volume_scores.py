"""Scores on the grids of the files against hand-made predictions, their files and section, and folds put together."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml

from vision_gates import cli
from vision_gates.config import load_config
from vision_gates.datasets.volumes.layouts import Case
from vision_gates.engine.building import RunInfo
from vision_gates.engine.evaluation import Evaluation, write_evaluation
from vision_gates.engine.report import write_report
from vision_gates.engine.volume_data import VolumeCases, VolumeInfo
from vision_gates.engine.volume_scores import (
    CaseScorer,
    Scores,
    build_scorer,
    read_summary,
    score_table,
    summarise_runs,
)
from vision_gates.errors import DataError, UserError
from vision_gates.metrics import create_metrics
from vision_gates.volumes.cache import CaseCache
from vision_gates.volumes.preprocessing import ChannelPlan, Preprocessing, prepare
from vision_gates.volumes.reading import read_labels, read_volume
from vision_gates.volumes.scoring import Summary, score_case, summarise, write_scores

NAMES = ("background", "<b>organ</b>", "tumour")
GARBAGE = bytes(range(128, 256)) + b"\x00\n"
SHAPE, SPACING = (14, 12, 10), (0.8, 1.0, 2.0)


def truth_of(number: int) -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[4:9, 3 : 8 + number % 2, 3:7] = 1
    labels[5:7, 4:6, 4 : 5 + number % 3] = 2
    return labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """nnU-Net's layout: three patients with two cases each; i runs to the left and k to the feet."""
    affine = np.diag((-SPACING[0], SPACING[1], -SPACING[2], 1))
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for number in range(6):
        name, labels = f"p{number // 2}_t{number % 2}", truth_of(number)
        image = np.where(labels > 0, 100, 10).astype(np.float32)
        image[:2] = 0  # cropped
        nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "data" / "imagesTr" / f"{name}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "data" / "labelsTr" / f"{name}.nii.gz")
    about = {"channel_names": {"0": "MRI"}, "labels": {n: v for v, n in enumerate(NAMES)}, "file_ending": ".nii.gz"}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(about | {"numTraining": 6}))
    return tmp_path


def prepared(folder: Path, *, spacing=None, ignore_index=None, tolerance_mm=2.0) -> tuple[CaseScorer, VolumeCases]:
    """All six cases, and what scores them."""
    plan = Preprocessing(spacing=spacing, channels=(ChannelPlan(kind="zscore"),), crop=True)
    cache = CaseCache(folder / "cache", plan.model_dump_json())
    files = []
    for labels in sorted((folder / "data" / "labelsTr").iterdir()):
        name = labels.name.removesuffix(".nii.gz")
        image = folder / "data" / "imagesTr" / f"{name}_0000.nii.gz"
        files.append(Case(name, name[:2], (image,), labels))
    cases = [
        cache.find(
            f.name, [*f.images, f.labels], lambda f=f: prepare(plan, [read_volume(f.images[0])], read_labels(f.labels))
        )
        for f in files
    ]
    scorer = CaseScorer(cases, files, class_names=NAMES, ignore_index=ignore_index, tolerance_mm=tolerance_mm)
    return scorer, VolumeCases(cases, [file.name for file in files])


def add(scorer: CaseScorer, cases: VolumeCases, index: int, edit=lambda labels: labels) -> None:
    labels = edit(np.array(cases.cases[index].labels)).astype(np.int64)
    scorer.add({"index": torch.tensor([index])}, torch.from_numpy(labels)[None])


def test_a_shift_on_the_network_s_grid_is_one_on_the_file_s(folder):
    """To the right on the prepared grid is towards smaller i in the file, whose axis runs to the left."""
    scorer, cases = prepared(folder)
    add(scorer, cases, 0)
    add(scorer, cases, 3, lambda labels: np.roll(labels, 1, axis=0))
    rows = scorer.finish().cases
    assert [(row["dice"], row["hd95_mm"], row["nsd"]) for row in rows["p0_t0"]] == [(1, 0, 1)] * 2
    stored = cases.cases[3].source.spacing  # float32 in a NIfTI header
    expected = score_case(np.roll(truth_of(3), -1, axis=0), truth_of(3), spacing=stored, class_names=NAMES)
    assert rows["p1_t1"] == expected
    assert 0 < expected[0]["dice"] < 1 and expected[0]["hd95_mm"] == pytest.approx(0.8)


def test_volumes_are_those_of_the_file_whatever_the_network_s_spacing(folder):
    scorer, cases = prepared(folder, spacing=(0.4, 0.5, 1.0))
    add(scorer, cases, 1)
    assert cases.cases[1].labels.size > 6 * truth_of(1).size, "prepared at half the spacing, less the cropped part"
    (rows,) = scorer.finish().cases.values()
    for label, row in enumerate(rows, start=1):
        assert row["truth_ml"] == pytest.approx((truth_of(1) == label).sum() * 1.6 / 1000)
        assert row["dice"] == 1, "twice as fine and back is exact"


def test_intervals_draw_patients(folder):
    scorer, cases = prepared(folder)
    for index in range(6):
        add(scorer, cases, index, lambda labels, index=index: np.roll(labels, index // 2, axis=1))
    done = scorer.finish()
    assert done.summary.cases == 6 and done.summary.patients == 3
    assert done.summary == summarise(done.cases, class_names=NAMES, patients={name: name[:2] for name in done.cases})
    assert done.summary.overall["dice_low"] < done.summary.overall["dice"] < done.summary.overall["dice_high"]


def test_tolerance_decides_which_surfaces_are_near(folder):
    found = {}
    for tolerance in (0.0, 30.0):
        scorer, cases = prepared(folder, tolerance_mm=tolerance)
        add(scorer, cases, 0, lambda labels: np.roll(labels, 1, axis=1))
        summary = scorer.finish().summary
        assert summary.tolerance_mm == tolerance
        found[tolerance] = summary.overall["nsd"]
    assert found[0.0] < 1 == found[30.0]


def test_ignored_label_is_not_scored(folder):
    path = folder / "data" / "labelsTr" / "p0_t0.nii.gz"
    labels = truth_of(0)
    labels[4:6] = 3
    nibabel.save(nibabel.Nifti1Image(labels, nibabel.load(path).affine), path)
    scorer, cases = prepared(folder, ignore_index=3)
    add(scorer, cases, 0, lambda labels: np.where(labels == 3, 1, labels))
    assert [row["dice"] for row in scorer.finish().cases["p0_t0"]] == [1, 1]


def test_several_processes_give_the_scores_of_one(folder, monkeypatch):
    whole, cases = prepared(folder)
    shares = [prepared(folder)[0] for _ in range(2)]
    for index in range(6):
        for scorer in (whole, shares[index % 2]):
            add(scorer, cases, index, lambda labels: np.roll(labels, 1, axis=2))
    expected = whole.finish()
    rows = [share._rows for share in shares]

    def all_gather_object(out, mine):
        assert mine in rows
        out[:] = rows

    for name, value in (
        ("is_initialized", lambda: True),
        ("get_world_size", lambda: 2),
        ("all_gather_object", all_gather_object),
    ):
        monkeypatch.setattr(torch.distributed, name, value)
    for share in shares:
        assert share.finish() == replace(expected, cases=share.finish().cases)
        assert share.finish().cases == expected.cases


def test_label_file_that_changed_meanwhile(folder):
    scorer, cases = prepared(folder)
    path = folder / "data" / "labelsTr" / "p0_t0.nii.gz"
    nibabel.save(nibabel.Nifti1Image(truth_of(0)[:-1], nibabel.load(path).affine), path)
    with pytest.raises(DataError, match="p0_t0.nii.gz: has changed since training began: size 13 x 12 x 10"):
        add(scorer, cases, 0)


def test_build_scorer_finds_the_files_of_a_loader_s_cases(folder):
    config = load_config("segmentation/auto_3d.yaml", [f"data.root={folder / 'data'}", "data.folds=3"])
    scorer, cases = prepared(folder)
    plan = Preprocessing(spacing=None, channels=(ChannelPlan(kind="zscore"),))
    view = VolumeInfo(preprocessing=plan, spatial_dims=3, patch_size=(8, 8, 8), channel_names=("MRI",))
    info = RunInfo(NAMES, 1, None, None, None, {}, {}, volumes=view)
    loader = type("Loader", (), {"dataset": VolumeCases(cases.cases[2:4], cases.names[2:4])})()
    assert build_scorer(config, replace(info, volumes=None), loader) is None
    built = build_scorer(config, info, loader)
    built.add({"index": torch.tensor([1])}, torch.from_numpy(np.array(cases.cases[3].labels, dtype=np.int64))[None])
    add(scorer, cases, 3)
    assert built.finish().cases == scorer.finish().cases and set(built.finish().cases) == {"p1_t1"}
    loader.dataset.names = ["p1_t0", "p9_t0"]
    with pytest.raises(DataError, match="1 case gone since training began: p9_t0"):
        build_scorer(config, info, loader)


# ---------------------------------------------------------------- on disk


def some_scores(names: list[str], *, shift: int = 1) -> Scores:
    """Of predictions ``shift`` voxels off; label 2 is missed in the first case."""
    cases = {}
    for number, name in enumerate(names):
        truth = truth_of(number)
        prediction = np.roll(truth, shift, axis=1)
        if number == 0:
            prediction[prediction == 2] = 1
        cases[name] = score_case(prediction, truth, spacing=SPACING, class_names=NAMES)
    return Scores(cases, summarise(cases, class_names=NAMES, patients={name: name[:2] for name in names}))


def make_run(path: Path, scores: Scores | None, **data) -> Path:
    """A run directory as far as folds and the report look at it."""
    path.mkdir(parents=True)
    config = {
        "task": {"type": "segmentation"},
        "data": {"type": "volumes", "root": "data", "folds": 3, "fold": 0, "val": [], "test": [], "split_seed": 0}
        | data,
        "model": {"name": "attention_unet"},
        "schedule": {"epochs": 1},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    if scores is not None:
        write_scores(path / "evaluation", scores.cases, scores.summary, prefix="val_")
    return path


def test_summary_is_read_as_it_was_written(tmp_path):
    summary = some_scores(["p0_t0", "p0_t1", "p1_t0"]).summary
    path = make_run(tmp_path / "run", some_scores(["p0_t0", "p0_t1", "p1_t0"])) / "evaluation" / "val_summary.json"
    assert read_summary(path) == summary
    assert "val, on the grids of the files, 3 cases of 2 patients" in str(score_table(summary, "val").title)
    for text in ("{", "[]", '{"cases": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match="val_summary.json: damaged .*evaluate the run again"):
            read_summary(path)


def test_evaluation_writes_scores_and_the_report_shows_them(tmp_path):
    run = make_run(tmp_path / "run", None)
    metrics = create_metrics("segmentation", NAMES)
    labels = torch.from_numpy(truth_of(0).astype(np.int64))[None]
    metrics.update(labels, labels, ["p0_t0"], indices=[0])
    done = Evaluation(metrics.compute(), metrics.rows(), None, [], 1.0, "segmentation", NAMES)
    write_evaluation(run, "val", done)
    before = write_report(run).read_text()
    assert "grids of their files" not in before and "Val cases, on the grid of the network" in before
    assert "1 case</span>" in before and "images" not in re.sub(r"<style>.*?</style>", "", before)

    scores = some_scores(["p0_t0", "p0_t1", "p1_t0"])
    write_evaluation(run, "val", replace(done, scores=scores))
    with open(run / "evaluation" / "val_cases.csv", newline="") as file:
        assert [(row["case"], row["label"]) for row in csv.DictReader(file)] == [
            (name, label) for name in ("p0_t0", "p0_t1", "p1_t0") for label in "12"
        ]
    page = write_report(run).read_text()
    assert page.count("<section>") == before.count("<section>") + 1
    section = page[page.index("Val cases, on the grids of their files") :]
    section = section[: section.index("</section>")]
    assert "<b>organ</b>" not in page and "&lt;b&gt;organ&lt;/b&gt;" in section
    tumour = scores.summary.per_label[1]
    assert (tumour["n"], tumour["missed"]) == (3, 1)
    for text in (
        "<td>3</td><td>1 + 0</td>",
        f"{tumour['dice']:.3f}",
        f"{tumour['hd95_mm_low']:.1f} to {tumour['hd95_mm_high']:.1f}",
        f"{tumour['volume_error_ml']:.2f}",
        f"{tumour['lesion_f1']:.3f}",
        scores.summary.convention,
        scores.summary.notes[0],
        "evaluation/val_cases.csv",
    ):
        assert text in section, text


# ---------------------------------------------------------------- folds


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[str]:
    """Three folds, the first two voxels off and the others one."""
    monkeypatch.chdir(tmp_path)
    for fold in range(3):
        make_run(Path(f"fold{fold}"), some_scores([f"p{fold}_t0", f"p{fold}_t1"], shift=2 - (fold > 0)), fold=fold)
    return ["fold0", "fold1", "fold2"]


def test_folds(runs, capfd):
    assert cli.main(["folds", *reversed(runs), "out=tables/cv.csv"]) == 0
    out = capfd.readouterr().out
    assert "3 folds" in out and "tables/cv.csv" in out and "note:" not in out
    means = [read_summary(Path(run) / "evaluation" / "val_summary.json").overall["dice"] for run in runs]
    assert means[0] < means[1] == means[2]
    content = json.loads(Path("tables/cv.json").read_text())
    assert content["overall"]["dice"] == pytest.approx(np.mean(means))
    assert content["overall"]["dice_std"] == pytest.approx(np.std(means, ddof=1))
    assert [(one["fold"], one["run"], one["cases"]) for one in content["runs"]] == [
        (i, f"fold{i}", 2) for i in range(3)
    ]
    with open("tables/cv.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*NAMES[1:], "all labels"]
    assert [row["n"] for row in rows] == ["6", "6", "6"] and rows[1]["missed"] == "3"
    # Over all cases, as if they had been scored at once; two cases a patient.
    every = {name: rows for run in runs for name, rows in scores_of(run).items()}
    whole = summarise(every, class_names=NAMES, patients={name: name[:2] for name in every})
    assert (whole.cases, whole.patients) == (6, 3)
    for row, own in zip(rows, [*whole.per_label, whole.overall], strict=True):
        assert float(row["dice_cases"]) == pytest.approx(own["dice"])
        assert float(row["hd95_mm_cases_low"]) == pytest.approx(own["hd95_mm_low"])
        assert float(row["nsd_cases_high"]) == pytest.approx(own["nsd_high"])
    assert Summary(**content["all_cases"]) == whole and whole.notes[0] in rows[2]["convention"]
    assert "6 cases of 3 patients: mean, 95 % interval" in out and out.count(whole.convention[:40]) == 1
    assert float(rows[2]["dice"]) == content["overall"]["dice"]
    assert rows[2]["convention"].startswith("Mean over cases") and not rows[0]["convention"]


def scores_of(run: str) -> dict[str, list[dict]]:
    """As `some_scores` made them."""
    fold = int(run[-1])
    return some_scores([f"p{fold}_t0", f"p{fold}_t1"], shift=2 - (fold > 0)).cases


def test_missing_folds_are_said(runs, capfd):
    assert cli.folds([runs[2], runs[0]]) == 0
    assert "note: 2 of 3 folds; missing: 1" in capfd.readouterr().out
    assert json.loads(Path("folds.json").read_text())["notes"] == ["2 of 3 folds; missing: 1"]


@pytest.mark.parametrize("file", ["config.yaml", "evaluation/val_summary.json", "evaluation/val_cases.csv"])
@pytest.mark.parametrize("how", ["truncated", "another kind", "garbage"])
def test_a_damaged_file_of_a_fold_is_named(runs, file, how):
    path = Path("fold1", file)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "another kind": b"[1, 2]\n", "garbage": GARBAGE}[how])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        summarise_runs(["fold0", "fold1"], "folds.csv")
    assert len(str(caught.value).splitlines()) == 1 and not Path("folds.csv").exists()


def test_no_part_of_a_summary_may_be_of_another_kind(runs):
    path = Path("fold1/evaluation/val_summary.json")
    whole = json.loads(path.read_text())
    for key in whole:
        path.write_text(json.dumps(whole | {key: {"a": None}}))
        with pytest.raises(UserError, match="val_summary.json: damaged .*evaluate the run again"):
            read_summary(path)
    for key in whole["overall"]:
        path.write_text(json.dumps(whole | {"overall": whole["overall"] | {key: [1]}}))
        with pytest.raises(UserError, match=f"damaged .*{key}"):
            read_summary(path)


def test_what_are_no_folds(runs, capfd):
    scores = some_scores(["p8_t0", "p9_t1"])
    make_run(Path("same"), scores, fold=0)
    make_run(Path("elsewhere"), scores, fold=1, root="other")
    make_run(Path("ten"), scores, folds=10, fold=9)
    make_run(Path("seed"), scores, fold=1, split_seed=1)
    make_run(Path("images"), scores, type="image_folder")
    make_run(Path("named"), scores, val=["p1_t0"])
    make_run(Path("everything"), scores, fold="all")
    make_run(Path("unscored"), None, fold=1)
    make_run(Path("again"), some_scores(["p0_t1", "p7_t0"]), fold=1)
    make_run(Path("finer"), Scores(scores.cases, replace(scores.summary, tolerance_mm=1.0)), fold=1)
    shutil.copytree("fold1", "damaged")
    Path("damaged/evaluation/val_summary.json").write_text("{")
    for name, text in (("headless", "a,b\n1,2\n"), ("cut", "case,label,name,status\np1_t0,one,a,scored\n")):
        shutil.copytree("fold1", name)
        Path(name, "evaluation/val_cases.csv").write_text(text)
    shutil.copytree("fold1", "caseless")
    Path("caseless/evaluation/val_cases.csv").unlink()
    before = sorted(Path().rglob("*"))
    for argv, words in (
        ([], ["a RUN is needed"]),
        (["fold0", "nowhere"], ["nowhere", "not a run directory"]),
        (["fold0", "same"], ["same and fold0 are both data.fold=0"]),
        (["fold0", "fold0"], ["both data.fold=0"]),
        (["fold0", "elsewhere"], ["elsewhere", "data.root is 'other', not 'data'"]),
        (["fold0", "ten"], ["data.folds is 10, not 3"]),
        (["fold0", "seed"], ["data.split_seed is 1, not 0"]),
        (["fold0", "images"], ["images", "data.type=volumes"]),
        (["named"], ["named", "data.fold"]),
        (["everything"], ["everything", "no fold of a cross-validation"]),
        (["fold0", "unscored"], ["unscored/evaluation/val_summary.json", "tools/evaluate.py unscored split=val"]),
        (["fold0", "again"], ["case p0_t1 was validated on in fold 1 and in fold 0"]),
        (["fold0", "finer"], ["different labels or tolerances"]),
        (["fold0", "damaged"], ["damaged/evaluation/val_summary.json", "evaluate the run again"]),
        *((["fold0", name], [f"{name}/evaluation/val_cases.csv: cannot be read"]) for name in ("headless", "cut")),
        (["fold0", "caseless"], ["caseless/evaluation/val_cases.csv", "evaluate the run again"]),
        (["fold0", "out=folds.txt"], ["out=folds.txt", ".csv"]),
        (["fold0", "out=fold1/config.yaml/folds.csv"], ["cannot be written"]),
        (["fold0", "fold=3"], ["fold: no such option"]),
        (["fold0", "--out"], ["--out"]),
    ):
        assert cli.main(["folds", *argv]) == 2, argv
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and err.startswith("error: "), err
        for word in words:
            assert word in err, err
    assert sorted(Path().rglob("*")) == before
