"""The journal of ``segment``: what a killed process leaves is understood, a damaged line is not guessed at."""

import csv
import json
import tracemalloc
from pathlib import Path

import pytest

from vision_gates.engine.run_directory import append_line
from vision_gates.engine.segment_journal import JOURNAL, Journal, read_class_names
from vision_gates.errors import DataError, UserError

NAMES = ("background", "a,b", "c")
ABOUT = {"run": "/runs/one", "options": {"mirror": None}}


def journal(folder: Path, **changes) -> Journal:
    return Journal(folder, "", **{"about": ABOUT, "class_names": NAMES, **changes})


def row(folder: Path, case: str, *, ml: float = 1.0, mask: bool = True) -> dict:
    path = folder / f"{case}.nii.gz"
    if mask:
        path.touch()
    return {"images": ["in.nii.gz"], "mask": str(path) if mask else None, "ml": [9.0, ml, 2 * ml]}


def finish(done: Journal, folder: Path, case: str, **values) -> None:
    done.begin(case)
    done.add(case, row(folder, case, **values))


def table(folder: Path) -> list[list[str]]:
    with open(folder / "volumes.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_what_is_done_is_read_back(tmp_path):
    done = journal(tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written before there is something to say"
    names = ["a", "m", "g", 'q"u,o', "bad \udcff name"]
    for i, case in enumerate(names):
        finish(done, tmp_path / "out", case, ml=i + 0.25, mask=case != "g")
    done.begin("z")
    expected = [["case", "a,b_ml", "c_ml"]]
    expected += [
        [case.replace("\udcff", "\\udcff"), f"{i + 0.25:.3f}", f"{2 * i + 0.5:.3f}"]
        for i, case in sorted(enumerate(names), key=lambda pair: pair[1])
    ]
    assert table(tmp_path / "out") == expected
    again = journal(tmp_path / "out")
    masks = {case: tmp_path / "out" / f"{case}.nii.gz" for case in (*names, "z")}
    assert all(again.done(case, masks[case]) for case in names), "g has no mask, and needs none"
    assert again.begun("z") and not again.done("z", masks["z"]) and not again.begun("other")
    masks["a"].unlink()
    assert not again.done("a", masks["a"])
    (tmp_path / "out" / "volumes.csv").unlink()
    assert again.finish() == tmp_path / "out" / "volumes.csv" and table(tmp_path / "out") == expected
    assert read_class_names(tmp_path / "out" / JOURNAL) == NAMES


def test_a_kill_at_any_byte_leaves_a_journal_that_goes_on(tmp_path):
    done = journal(tmp_path)
    for case in ("a", "b"):
        finish(done, tmp_path, case)
    whole, csv_whole = (tmp_path / JOURNAL).read_bytes(), (tmp_path / "volumes.csv").read_bytes()
    first = whole.index(b"\n") + 1  # written in one step
    for size in range(first, len(whole) + 1):
        (tmp_path / JOURNAL).write_bytes(whole[:size])
        again = journal(tmp_path)
        for case in ("a", "b"):
            complete = whole[:size].count(b"\n") >= {"a": 3, "b": 5}[case]
            assert again.done(case, tmp_path / f"{case}.nii.gz") == complete, size
            if not complete:
                finish(again, tmp_path, case)
        again.finish()
        lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
        assert all(json.loads(line) for line in lines) and lines[-1].endswith(b"\n"), size
        assert (tmp_path / "volumes.csv").read_bytes() == csv_whole
    assert not list(tmp_path.glob(".*"))


def test_a_case_done_anew_has_one_line(tmp_path):
    done = journal(tmp_path)
    for case, ml in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        finish(done, tmp_path, case, ml=ml)
    for found in (done, journal(tmp_path)):
        found.finish()
        assert table(tmp_path)[1:] == [["a", "3.000", "6.000"], ["b", "2.000", "4.000"]]


def test_a_kill_between_table_and_journal_makes_no_second_line(tmp_path):
    done = journal(tmp_path)
    finish(done, tmp_path, "a")
    append_line(tmp_path / "volumes.csv", "b,1.000,2.000")
    finish(journal(tmp_path), tmp_path, "b")
    assert [line[0] for line in table(tmp_path)] == ["case", "a", "b"]


def test_renewing(tmp_path):
    done = journal(tmp_path)
    for case in ("a", "b", "c"):
        finish(done, tmp_path, case)
    before = (tmp_path / JOURNAL).read_bytes()
    masks = {case: tmp_path / f"{case}.nii.gz" for case in "abc"}
    renewed = journal(tmp_path, renew=["b", "c", "d"])
    assert [renewed.done(case, masks[case]) for case in "abc"] == [True, False, False]
    assert (tmp_path / JOURNAL).read_bytes() == before, "until a mask is written nothing is lost"
    renewed.begin("b")  # and here it is killed: every old mask is still to be replaced, none is a stranger
    again = journal(tmp_path)
    assert [again.done(case, masks[case]) for case in "abc"] == [True, False, False]
    assert all(again.begun(case) for case in "abcd") and not again.begun("e")
    finish(again, tmp_path, "b", ml=5.0)
    assert table(tmp_path)[1:] == [["a", "1.000", "2.000"], ["b", "5.000", "10.000"]]


@pytest.mark.parametrize("text", [b"", b"\x00\xff\n", b'{"about": {"run": "/runs/two"}, "class_names": []}\n'])
def test_renewing_takes_nothing_from_a_journal_that_is_not_its_own(tmp_path, text):
    (tmp_path / JOURNAL).write_bytes(text)
    with pytest.raises(UserError, match=r"segment\.jsonl.*overwrite=true"):
        journal(tmp_path)
    finish(journal(tmp_path, renew=["a"]), tmp_path, "a")
    assert table(tmp_path)[1:] == [["a", "1.000", "2.000"]] and journal(tmp_path).begun("a")


@pytest.mark.parametrize(
    "line",
    [
        b"\x1f\x8b\xff\x00",
        b"[1, 2]",
        b'{"begun": ["a"]}',
        b'{"case": "a", "mask": null, "ml": [1, 2]}',
        b'{"case": "a", "mask": null, "ml": [1, 2, "3"]}',
        b'{"case": "a", "mask": null, "ml": [1, 2, 1' + 400 * b"0" + b"]}",
        b'{"case": "a", "ml": [1, 2, 3]}',
        b'{"case": 1, "mask": null, "ml": [1, 2, 3]}',
        b"{}",
        b"",
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    finish(journal(tmp_path), tmp_path, "a")
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(
        UserError, match=r"segment\.jsonl, line 4: damaged .*delete it, or use overwrite=true"
    ) as caught:
        journal(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    assert read_class_names(tmp_path / JOURNAL) == NAMES


@pytest.mark.parametrize("changes", [{"about": ABOUT | {"run": "/runs/two"}}, {"class_names": ("background", "c")}])
def test_results_of_another_run_are_refused(tmp_path, changes):
    finish(journal(tmp_path), tmp_path, "a")
    with pytest.raises(UserError, match=r"of another run or other options \(/runs/one\)"):
        journal(tmp_path, **changes)
    (tmp_path / JOURNAL).write_text('{"about": {"run": "a\\nb"}, "class_names": []}\n')
    with pytest.raises(UserError, match=r"of another run or other options \(a b\)"):
        journal(tmp_path)


@pytest.mark.parametrize("text", ["", "{}\n", '{"class_names": "ab"}\n', '{"class_names": [1]}\n', "[]\n"])
def test_names_of_a_damaged_journal(tmp_path, text):
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(DataError, match=r"segment\.jsonl, line 1: damaged .*; give names=background") as caught:
        read_class_names(tmp_path / JOURNAL)
    assert "overwrite" not in str(caught.value)


def test_memory_and_writing_grow_by_a_line_a_case(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    done, held, written = journal(tmp_path), [], []
    cases = [f"patient_{i:05d}_frame_01" for i in range(2000)]
    values = row(tmp_path, "mask") | {"images": 4 * ["/data/images/patient.nii.gz"], "shape": [1, 2, 3]}
    tracemalloc.start()
    try:
        for i, case in enumerate(cases):
            done.begin(case)
            done.add(case, values)
            if i in (499, 1999):
                held.append(tracemalloc.get_traced_memory()[0])
                written.append((tmp_path / JOURNAL).stat().st_size)
    finally:
        tracemalloc.stop()
    assert (held[1] - held[0]) / 1500 < 400, "bytes a case; 0.4 MB in 1,000"
    assert written[1] < 4.1 * written[0] and len(table(tmp_path)) == 2001
