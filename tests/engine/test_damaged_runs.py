"""A damaged file in a run directory: one line with its name and the remedy, from whatever reads it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vision_gates.engine.building import load_run
from vision_gates.engine.evaluation import evaluate_run, evaluation_table
from vision_gates.engine.report import write_report
from vision_gates.engine.run_directory import append_line, read_metrics, truncate_metrics
from vision_gates.engine.trainer import train
from vision_gates.errors import UserError

FILES = ["config.yaml", "run.json", "environment.json", "metrics.jsonl", "evaluation/test.json"]
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[: len(whole) // 2] + b"\n",
    "another kind": lambda whole: b"[1, 2]\n" + whole,
    "garbage": lambda whole: bytes(range(128, 256)) + b"\x00\n" + whole,
}


@pytest.fixture(scope="module")
def finished(build_config, quiet, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each task."""
    root = tmp_path_factory.mktemp("finished")
    return {
        task: train(build_config(root / task, "schedule.epochs=1", task=task), console=quiet)
        for task in ("classification", "segmentation")
    }


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished["classification"], tmp_path / "run")
    return tmp_path / "run"


def refusal(call: Callable[[], object], path: Path) -> str:
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 900, text
    return text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_the_report_names_a_damaged_file(run, file, how):
    path, before = run / file, (run / "report.html").read_bytes()
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    text = refusal(lambda: write_report(run), path)
    assert "damaged" in text and ";" in text, "what is wrong, and the remedy"
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize("file", ["config.yaml", "run.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", DAMAGE)
def test_evaluating_names_a_damaged_file(run, file, how):
    (run / file).write_bytes(DAMAGE[how]((run / file).read_bytes()))
    refusal(lambda: evaluate_run(run), run / file)


def test_evaluating_again_mends_an_evaluation(run):
    path = run / "evaluation" / "test.json"
    path.write_bytes(b"{")
    assert f"tools/evaluate.py {run} split=test" in refusal(lambda: evaluation_table(path), path)
    evaluate_run(run, split="test")
    assert evaluation_table(path).columns


def wrong(value):
    """Values of another kind."""
    return [[[None]], "text"] if isinstance(value, dict) else [{"a": None}, {}]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_no_part_of_an_evaluation_may_be_of_another_kind(finished, task):
    path = finished[task] / "evaluation" / "test.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    variants = [(key, content | {key: bad}) for key in content for bad in wrong(content[key])]
    for key in content["per_class"][0]:
        rows = [row | {key: [1]} for row in content["per_class"]]
        variants.append((f"per_class.{key}", content | {"per_class": rows}))
        variants.append((f"no {key}", content | {"per_class": [{k: row[k] for k in row if k != key} for row in rows]}))
    variants += [(f"no {key}", {k: v for k, v in content.items() if k != key}) for key in content]
    free = {"noun", "run", "checkpoint"}  # nothing else depends on them
    try:
        refused = set()
        for what, variant in variants:
            path.write_text(json.dumps(variant))
            try:
                evaluation_table(path)
                write_report(finished[task])
            except UserError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
                refused.add(what)
        assert {what for what, _ in variants} - refused <= free | {f"no {key}" for key in free}
    finally:
        path.write_bytes(whole)


def test_every_key_of_run_json_is_checked(run):
    path = run / "run.json"
    content = json.loads(path.read_text())
    for key in content:
        path.write_text(json.dumps(content | {key: "text"}))
        assert key in refusal(lambda: load_run(run), path)
    path.write_text(json.dumps(content | {"more": 1}))
    assert "more" in refusal(lambda: load_run(run), path)


def test_a_damaged_row_of_metrics_is_named_by_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = '{"epoch": 1, "lr": 0.1, "train": {"loss": 1}, "val": null, "seconds": 1.5}'
    for line in ("[]", row.replace("1.5", "1e999"), row.replace("1.5", "-1")):
        append_line(path, row)
        append_line(path, line)
        assert "line 2: damaged" in refusal(lambda: read_metrics(path), path)
        truncate_metrics(path, 0)
    append_line(path, row)
    with open(path, "ab") as file:
        file.write(b'{"epoch": 2, "lr')
    assert [one["epoch"] for one in read_metrics(path)] == [1], "half a last line is what a crash leaves"
    append_line(path, row.replace("1", "2", 1))
    assert [one["epoch"] for one in read_metrics(path)] == [1, 2]


def test_a_weights_file_that_cannot_be_read_does_not_stop_the_report(run):
    (run / "checkpoints" / "best" / "weights.safetensors").write_bytes(b"\xff" * 100)
    assert "M parameters" in write_report(run).read_text(), "those of the last checkpoint"
