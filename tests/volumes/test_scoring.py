"""Scores of label volumes against hand computations, a brute-force distance transform and MONAI; misses; bootstrap."""

import csv
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import ndimage

from vision_gates.errors import DataError
from vision_gates.volumes.scoring import CONVENTION, METRICS, score_case, summarise, summarise_folds, write_scores

NAMES = ("background", "organ", "tumour")
SPACING = (0.8, 1.1, 3.0)


def _cube(start=(4, 4, 4), size=(4, 4, 4), label=1, shape=(16, 16, 16)) -> np.ndarray:
    volume = np.zeros(shape, dtype=np.uint8)
    volume[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = label
    return volume


def _score(prediction, truth, *, spacing=(1.0, 1.0, 1.0), **options) -> dict:
    return score_case(prediction, truth, spacing=spacing, class_names=NAMES, **options)[0]


def _blobs(seed: int, *, shape=(40, 36, 24), classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random labels, every one in both volumes, some on the border; and a deformed copy with stray voxels."""
    generator = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(generator.standard_normal(shape), 3) for _ in range(classes)])
    moved = fields + 0.35 * np.stack([ndimage.gaussian_filter(generator.standard_normal(shape), 2) for _ in fields])
    prediction = moved.argmax(0)
    stray = generator.random(shape) < 1e-3
    prediction[stray] = generator.integers(0, classes, int(stray.sum()))
    return prediction, fields.argmax(0)


# ---- one case


def test_perfect_prediction():
    truth = _cube() + _cube((10, 10, 10), (2, 2, 2), label=2)
    for row, voxels in zip(score_case(truth, truth.copy(), spacing=(1, 2, 5), class_names=NAMES), (64, 8), strict=True):
        assert row["status"] == "scored"
        assert (row["dice"], row["hd95_mm"], row["nsd"], row["lesion_f1"]) == (1, 0, 1, 1)
        assert row["volume_ml"] == row["truth_ml"] == pytest.approx(voxels * 10 / 1000)
        assert row["volume_error_ml"] == row["volume_error_percent"] == 0


@pytest.mark.parametrize(("axis", "step"), list(enumerate(SPACING)))
def test_cube_shifted_by_one_voxel(axis, step):
    """A 4 x 4 x 4 cube has 56 surface voxels: two faces of 16 across the axis and two rings of 12 between them.

    The leading face is one step from the other cube. Both rings lie on the other's surface, and so do the outer 12 of
    the last face; its inner 4 are a step from it, along the axis or across, whichever is nearer.
    """
    truth = _cube()
    row = _score(np.roll(truth, 1, axis), truth, spacing=SPACING, tolerance_mm=min(SPACING) - 0.01)
    assert row["dice"] == pytest.approx(2 * 48 / 128)
    assert row["hd95_mm"] == pytest.approx(step)
    assert row["nsd"] == pytest.approx(1 - (16 + 4) / 56)
    assert row["volume_error_ml"] == 0


def test_hd95_passes_over_one_in_twenty():
    truth = _cube((1, 1, 1), (10, 1, 1), shape=(40, 3, 3))
    prediction = truth.copy()
    prediction[30, 1, 1] = 1  # 20 mm from the last of 11 voxels: percentile 95 lies halfway between the last two
    assert _score(prediction, truth)["hd95_mm"] == pytest.approx(10)
    assert _score(truth, prediction)["hd95_mm"] == pytest.approx(10), "the worse direction counts, whichever it is"


def test_tolerance_is_inclusive_and_rounding_does_not_decide():
    truth, prediction = np.zeros((2, 24, 3, 3), dtype=np.uint8)
    prediction[[0, 5], 1, 1] = truth[[0, 5, 7], 1, 1] = 1
    assert 7 * 1.2 - 5 * 1.2 > 2.4
    for step, tolerance, within in ((1.2, 2.4, 5), (1.21, 2.4, 4), (1.21, 2.43, 5)):
        assert _score(prediction, truth, spacing=(step, 1, 1), tolerance_mm=tolerance)["nsd"] == within / 5


def test_miss_false_positive_and_absent():
    shape, empty = (10, 20, 30), np.zeros((10, 20, 30), dtype=np.int16)
    some = _cube((2, 2, 2), (2, 2, 2), shape=shape)
    diagonal = math.sqrt(8**2 + 22**2 + 90**2)
    missed, absent = score_case(empty, some, spacing=SPACING, class_names=NAMES)
    assert (missed["status"], missed["dice"], missed["nsd"], missed["lesion_f1"]) == ("missed", 0, 0, 0)
    assert missed["hd95_mm"] == pytest.approx(diagonal)
    assert missed["volume_error_ml"] == pytest.approx(-8 * 2.64 / 1000) and missed["volume_error_percent"] == -100
    assert (missed["lesions_found"], missed["lesions_true"], missed["lesions_predicted"]) == (0, 1, 0)
    false, _ = score_case(some, empty, spacing=SPACING, class_names=NAMES)
    assert (false["status"], false["dice"], false["nsd"], false["lesion_f1"]) == ("false positive", 0, 0, 0)
    assert false["hd95_mm"] == pytest.approx(diagonal)
    assert false["volume_error_ml"] == pytest.approx(8 * 2.64 / 1000) and false["volume_error_percent"] is None
    assert absent["status"] == "absent" and absent["name"] == "tumour"
    assert all(absent[metric] is None for metric in METRICS)
    assert absent["volume_ml"] == absent["truth_ml"] == absent["lesions_true"] == 0


def test_lesions():
    truth, prediction = np.zeros((2, 20, 20, 20), dtype=np.int32)
    truth[2, 2, 2] = truth[3, 3, 3] = 1  # a corner in common: one lesion
    truth[8, 8, 8:12] = truth[15, 15, 15] = truth[0, 19, 0] = 1
    prediction[3, 3, 3] = prediction[2, 2, 2] = 1
    prediction[8, 8, 8] = prediction[8, 8, 11] = 1  # one true lesion, found in two pieces: none of them is false
    prediction[15, 15, 16] = 1  # beside a lesion, not on it
    prediction[18, 2, 18] = 1
    row = _score(prediction, truth)
    assert (row["lesions_found"], row["lesions_true"], row["lesions_predicted"], row["lesions_false"]) == (2, 4, 5, 2)
    assert row["lesion_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))


def test_ignored_voxels_are_not_scored():
    truth = _cube()
    prediction = truth.copy()
    truth[12:] = 255
    prediction[12:] = 2  # only where nothing is known
    prediction[0, 0, 0] = 1
    organ, tumour = score_case(prediction, truth, spacing=(1, 1, 1), class_names=NAMES, ignore_index=255)
    assert organ["dice"] == pytest.approx(2 * 64 / 129) and organ["lesions_false"] == 1
    assert tumour["status"] == "absent"
    rows = score_case(prediction, _cube() + _cube((10, 10, 10), label=2), spacing=(1, 1, 1), class_names=NAMES)
    assert [row["name"] for row in rows] == ["organ", "tumour"]
    rows = score_case(prediction, _cube(), spacing=(1, 1, 1), class_names=NAMES, ignore_index=2)
    assert [row["name"] for row in rows] == ["organ"], "a label that is not scored has no line"
    sparse = score_case(prediction, _cube(), spacing=(1, 1, 1), class_names=NAMES, ignore_index=0)
    assert sparse[0]["dice"] == 1 and sparse[1]["status"] == "absent", "unlabelled voxels may be the background's"


@pytest.mark.parametrize("seed", range(3))
def test_against_monai_and_brute_force(seed):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    prediction, truth = _blobs(seed)
    tolerance = 1.7
    names = [f"c{c}" for c in range(4)]
    rows = score_case(prediction, truth, spacing=SPACING, class_names=names, tolerance_mm=tolerance)
    one_hot = [torch.nn.functional.one_hot(torch.as_tensor(x), 4).movedim(-1, 0)[None] for x in (prediction, truth)]
    hd95 = metrics.compute_hausdorff_distance(*one_hot, percentile=95, directed=False, spacing=SPACING)[0]
    nsd = metrics.compute_surface_dice(*one_hot, class_thresholds=[tolerance] * 3, spacing=SPACING)[0]
    dice = metrics.compute_dice(*one_hot, include_background=False)[0]
    for c, row in enumerate(rows):
        assert row["status"] == "scored"
        assert row["hd95_mm"] == pytest.approx(float(hd95[c]), rel=1e-4)
        assert row["nsd"] == pytest.approx(float(nsd[c]), abs=1e-4)
        assert row["dice"] == pytest.approx(float(dice[c]), abs=1e-4)
        masks = [labels == c + 1 for labels in (prediction, truth)]
        edges = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
        first, second = (
            ndimage.distance_transform_edt(~edges[other], sampling=SPACING)[edges[1 - other]] for other in (0, 1)
        )
        assert 0 < row["nsd"] < 1 and 0 < row["hd95_mm"] < 50
        assert row["hd95_mm"] == pytest.approx(max(np.percentile(first, 95), np.percentile(second, 95)), rel=1e-9)
        near = (first <= tolerance + 1e-6).sum() + (second <= tolerance + 1e-6).sum()
        assert row["nsd"] == pytest.approx(near / (len(first) + len(second)), abs=1e-12)


def test_axes_can_be_swapped_with_their_spacing():
    prediction, truth = _blobs(5)
    rows = score_case(prediction, truth, spacing=SPACING, class_names="abcd")
    turned = score_case(prediction.T[::-1], truth.T[::-1], spacing=SPACING[::-1], class_names="abcd")
    for row, other in zip(rows, turned, strict=True):
        assert [other[metric] for metric in METRICS] == pytest.approx([row[metric] for metric in METRICS])


def test_more_than_255_classes():
    truth = np.zeros((4, 4, 4), dtype=np.int64)
    truth[1, 1, 1], truth[2, 2, 2] = 300, 44  # equal in eight bits
    rows = score_case(truth, truth, spacing=(1, 1, 1), class_names=[str(c) for c in range(301)])
    assert [row["label"] for row in rows if row["status"] == "scored"] == [44, 300]


def test_arguments_are_checked():
    labels = _cube()
    with pytest.raises(ValueError, match="of one shape"):
        _score(labels[1:], labels)
    with pytest.raises(ValueError, match="of one shape"):
        _score(labels[0], labels[0])
    for wrong in (labels.astype(np.float32), labels > 0):
        with pytest.raises(ValueError, match=f"integer labels are needed, got {wrong.dtype}"):
            _score(wrong, labels)
    for spacing in ((1, 1), (1, 0, 1), (1, math.nan, 1)):
        with pytest.raises(ValueError, match="spacing"):
            _score(labels, labels, spacing=spacing)
    with pytest.raises(ValueError, match="tolerance_mm"):
        _score(labels, labels, tolerance_mm=-1)


def test_wrong_labels_come_with_their_histogram():
    wrong = 255 * _cube()
    with pytest.raises(DataError, match=r"^case 7: truth: label 255 is not in 0\.\.2; .*: 0: 4,032, 255: 64$"):
        _score(_cube(), wrong, name="case 7")
    with pytest.raises(DataError, match=r"^prediction: label -1, 5 is not in"):
        _score(5 * _cube() - _cube((0, 0, 0), (1, 1, 1)).astype(int), _cube())


# ---- many cases


def _rows(dice: float | None, *, label: int = 1, status: str = "scored", **other) -> list[dict]:
    """One row as score_case makes it, every metric the same."""
    row = {"label": label, "name": NAMES[label], "status": status, **dict.fromkeys(METRICS, dice)}
    row |= {"volume_ml": 1.0, "truth_ml": 1.0, "tolerance_mm": 2.0}
    return [row | dict.fromkeys(("lesions_found", "lesions_true", "lesions_predicted", "lesions_false"), 1) | other]


def test_summary_counts_misses():
    organ, tumour = _cube(), _cube((10, 10, 10), (2, 2, 2), label=2)
    empty = np.zeros_like(organ)
    pairs = {"hit": (organ, organ), "missed": (empty, organ), "false": (organ, empty), "tumour": (tumour, tumour)}
    cases = {name: score_case(p, t, spacing=(1, 1, 1), class_names=NAMES) for name, (p, t) in pairs.items()}
    summary = summarise(cases, class_names=NAMES)
    first, second = summary.per_label
    assert (first["n"], first["missed"], first["false_positives"]) == (3, 1, 1)
    assert first["dice"] == first["nsd"] == first["lesion_f1"] == pytest.approx(1 / 3)
    assert first["hd95_mm"] == pytest.approx(2 / 3 * 16 * math.sqrt(3))
    assert first["volume_error_ml"] == pytest.approx(0, abs=1e-12)
    assert first["volume_error_percent"] == pytest.approx(-50), "over the two cases that have the label"
    assert (first["lesions_found"], first["lesions_true"], first["lesions_false"]) == (1, 2, 1)
    assert (second["n"], second["dice"], second["hd95_mm"]) == (1, 1, 0)
    assert second["dice_low"] is second["dice_high"] is None, "one patient has no spread"
    assert first["dice_low"] == 0 and first["dice_high"] == 1
    assert summary.overall["dice"] == pytest.approx((1 / 3 + 1) / 2)
    assert (summary.overall["n"], summary.overall["missed"], summary.overall["false_positives"]) == (4, 1, 1)
    assert summary.convention == CONVENTION and summary.cases == summary.patients == 4
    assert summary.notes == ["4 patients are few: bootstrap intervals of so few are too narrow."]


def test_label_in_no_case_has_no_score():
    rows = score_case(_cube(), _cube(), spacing=(1, 1, 1), class_names=NAMES)
    summary = summarise({"only": rows}, class_names=NAMES)
    assert summary.per_label[1]["n"] == 0 and summary.per_label[1]["dice"] is None
    assert summary.overall["dice"] == 1
    assert summary.notes[0].startswith("tumour: in no truth and no prediction") and "One patient" in summary.notes[1]
    nothing = np.zeros((3, 3, 3), dtype=int)
    empty = summarise({"empty": score_case(nothing, nothing, spacing=(1, 1, 1), class_names=NAMES)}, class_names=NAMES)
    assert empty.overall["n"] == 0 and empty.overall["dice"] is None


def test_bootstrap_is_a_function_of_the_seed():
    generator = np.random.default_rng(3)
    cases = {f"case {i:02}": _rows(float(generator.random())) for i in range(20)}
    summary = summarise(cases, class_names=NAMES[:2], seed=4)
    assert summary == summarise(dict(reversed(cases.items())), class_names=NAMES[:2], seed=4)
    assert summary.overall["dice_low"] != summarise(cases, class_names=NAMES[:2], seed=5).overall["dice_low"]
    row = summary.per_label[0]
    assert row["dice_low"] < row["dice"] < row["dice_high"]
    assert row["dice"] == pytest.approx(np.mean([rows[0]["dice"] for rows in cases.values()]))


def test_bootstrap_intervals_cover_the_mean():
    """Of 200 experiments with 40 patients about 190 intervals hold the mean; their width is 2 x 1.96 sd / sqrt n."""
    generator = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(200):
        cases = {str(i): _rows(float(value)) for i, value in enumerate(generator.normal(0.7, 0.1, 40))}
        row = summarise(cases, class_names=NAMES[:2], resamples=300).per_label[0]
        covered += row["dice_low"] <= 0.7 <= row["dice_high"]
        widths.append(row["dice_high"] - row["dice_low"])
    assert 176 <= covered <= 198
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(40), rel=0.06)


def test_bootstrap_draws_patients():
    """Sixteen copies of a patient's only result are no new evidence: the interval is that of sixteen patients."""
    values = np.random.default_rng(1).random(16)
    single = {f"{i:02}": _rows(float(value)) for i, value in enumerate(values)}
    copies = {f"{i:02} {k}": _rows(float(value)) for i, value in enumerate(values) for k in range(16)}
    one = summarise(single, class_names=NAMES[:2])
    patients = {name: name.split()[0] for name in copies}
    many = summarise(copies, class_names=NAMES[:2], patients=patients)
    assert (many.cases, many.patients) == (256, 16)
    for key in ("dice", "dice_low", "dice_high"):
        assert many.overall[key] == pytest.approx(one.overall[key])
    naive = summarise(copies, class_names=NAMES[:2]).overall
    assert naive["dice_high"] - naive["dice_low"] < 0.4 * (one.overall["dice_high"] - one.overall["dice_low"])


def test_summaries_are_checked():
    cases = {"a": _rows(0.5), "b": _rows(0.6)}
    with pytest.raises(ValueError, match="no case"):
        summarise({}, class_names=NAMES)
    with pytest.raises(ValueError, match="no patient is given for case b"):
        summarise(cases, class_names=NAMES, patients={"a": "p"})
    with pytest.raises(ValueError, match=r"case c: label 2 is not in 1\.\.1"):
        summarise({"c": _rows(0.5, label=2)}, class_names=NAMES[:2])
    with pytest.raises(ValueError, match="different tolerances"):
        summarise({**cases, "c": _rows(0.5, tolerance_mm=1.0)}, class_names=NAMES)
    with pytest.raises(ValueError, match="no fold"):
        summarise_folds([])
    with pytest.raises(ValueError, match="different labels"):
        summarise_folds([summarise(cases, class_names=NAMES), summarise(cases, class_names=NAMES[:2])])


def test_folds():
    folds = [
        summarise({"a": _rows(0.6) + _rows(0.9, label=2), "b": _rows(0.8)}, class_names=NAMES),
        summarise({"c": _rows(0.9)}, class_names=NAMES),
        summarise({"d": _rows(0.0, status="missed"), "e": _rows(1.0)}, class_names=NAMES),
    ]
    result = summarise_folds(folds)
    first, second = result.per_label
    assert first["dice"] == pytest.approx((0.7 + 0.9 + 0.5) / 3)
    assert first["dice_std"] == pytest.approx(0.2)
    assert (first["folds"], first["n"], first["missed"]) == (3, 5, 1)
    assert (second["folds"], second["dice"], second["dice_std"]) == (1, pytest.approx(0.9), None)
    assert result.overall["dice"] == pytest.approx(np.mean([fold.overall["dice"] for fold in folds]))
    assert result.folds == 3 and result.to_dict()["convention"] == CONVENTION
    assert "0.700 ±0.200" in _text(result.table(), 120)


# ---- tables and files


def _text(table, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def _summary() -> tuple[dict, object]:
    organ = _cube()
    cases = {
        "two": score_case(np.roll(organ, 1, 0), organ, spacing=(1, 1, 1), class_names=NAMES),
        "one, a": score_case(np.zeros_like(organ), organ, spacing=(1, 1, 1), class_names=NAMES),
    }
    return cases, summarise(cases, class_names=NAMES)


@pytest.mark.parametrize("width", [80, 140])
def test_table_states_n_misses_and_convention(width):
    cases, summary = _summary()
    text = _text(summary.table(), width)
    assert " ".join(CONVENTION.split()) in " ".join(text.split())
    assert "NSD 2 mm" in text and "0.375" in text and "0.000–0.750" in text
    assert max(map(len, text.splitlines())) <= width
    line = next(line for line in text.splitlines() if line.strip().startswith("organ"))
    assert line.split()[1:5] == ["2", "1", "+", "0"], "N, missed and false positives"
    assert "…" not in text


def test_class_names_are_no_markup():
    rows = _rows(0.5) + _rows(0.5, label=2)
    names = ("background", "[red]organ", "[/nothing]")
    text = _text(summarise({"a": rows}, class_names=names).table(), 140)
    assert "[red]organ" in text and "[/nothing]" in text


def test_files(tmp_path):
    cases, summary = _summary()
    path = write_scores(tmp_path / "new", cases, summary, prefix="test_")
    assert path == tmp_path / "new" / "test_summary.json"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "test_cases.csv",
        "test_summary.csv",
        "test_summary.json",
    ]
    assert json.loads(path.read_text()) == summary.to_dict()
    with open(path.with_name("test_cases.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["name"], line["status"]) for line in lines] == [
        ("one, a", "organ", "missed"),
        ("one, a", "tumour", "absent"),
        ("two", "organ", "scored"),
        ("two", "tumour", "absent"),
    ]
    assert lines[1]["dice"] == "" and float(lines[2]["dice"]) == cases["two"][0]["dice"]
    with open(path.with_name("test_summary.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], line["n"], line["missed"]) for line in lines] == [
        ("organ", "2", "1"),
        ("tumour", "0", "0"),
        ("all labels", "2", "1"),
    ]
    assert float(lines[0]["hd95_mm_high"]) == summary.per_label[0]["hd95_mm_high"]
    assert lines[2]["convention"].startswith(CONVENTION) and "tumour: in no truth" in lines[2]["convention"]


def test_files_of_before_survive_a_crash(tmp_path, monkeypatch):
    cases, summary = _summary()
    write_scores(tmp_path, cases, summary)
    before = (tmp_path / "cases.csv").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scores(tmp_path, {"other": cases["two"]}, summary)
    assert (tmp_path / "cases.csv").read_bytes() == before
