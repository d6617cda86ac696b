"""What ``segment`` has done: ``segment.jsonl``, to which each step adds a line, and ``volumes.csv``, the table of it.

The first line of the journal says which run and options its results are of. Then a case is named before its mask is
written, and its row follows when it is done: of a mask that is there, a reader knows whose it is, and whether it is
finished. A killed process leaves at most half a line at the end, which does not count and is cut off.

Kept in memory is a line of the table a case, so that a folder may hold any number of them.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vision_gates.engine.run_directory import append_line, atomic_write_bytes, to_json
from vision_gates.errors import DataError, UserError

__all__ = ["JOURNAL", "Journal", "read_class_names"]

JOURNAL = "segment.jsonl"
"""Its name, after the prefix of a single mask."""


class Journal:
    """Results that go beside masks. Nothing is written before the first `begin`.

    Args:
        folder: of the masks.
        prefix: of the names of the files beside them.
        about: which run and options the results are of.
        class_names: in label order.
        renew: the cases to do anew (``overwrite=true``); None: those that are done stay so.

    Raises:
        UserError: the journal there is damaged, or of another run, and ``renew`` is None.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        *,
        about: Mapping[str, Any],
        class_names: Sequence[str],
        renew: Sequence[str] | None = None,
    ) -> None:
        self._folder, self._prefix, self._class_names = folder, prefix, tuple(class_names)
        self._about = {"about": dict(about), "class_names": list(class_names)}
        self._lines: dict[str, str | None] = {}  # of a begun case its line of the table, None until it is done
        self._without_mask: set[str] = set()  # done, and there was nothing to write
        self._last: str | None = None  # case of the last line of the table on disk; None: it may not be there or old
        self._beginning: list[str] = []  # lines that replace the journal when the next one is added
        journal = self.path(JOURNAL)
        if renew is not None:
            self._begin_anew(journal, renew)
        elif journal.is_file():
            for _, entry in self._read(journal):
                self._note(entry)
        else:
            self._beginning = [to_json(self._about)]

    def _begin_anew(self, journal: Path, renew: Sequence[str]) -> None:
        """A new journal: other cases of the same run stay in it, those to renew have begun.

        It takes the old one's place in one step with the first mask, not before, so that nothing is lost if no case can
        be read. All masks to renew become this command's with it: if it is killed, the same command without overwrite
        finishes them and never takes an old mask for a new one.
        """
        kept: dict[str, tuple[str, dict[str, Any]]] = {}
        try:
            for text, entry in self._read(journal) if journal.is_file() else ():
                kept[entry["case"] if "case" in entry else entry["begun"]] = text, entry
        except UserError:  # damaged, or of another run: that is what overwrite is for
            kept = {}
        for case in renew:
            kept[case] = to_json({"begun": case}), {"begun": case}
        for _, entry in kept.values():
            self._note(entry)
        self._beginning = [to_json(self._about), *(text for text, _ in kept.values())]

    def path(self, name: str) -> Path:
        """A file beside the masks."""
        return self._folder / f"{self._prefix}{name}"

    def begun(self, case: str) -> bool:
        """Whether a mask is this journal's, though a process may have been killed before it said that it is done."""
        return case in self._lines

    def done(self, case: str, mask: Path) -> bool:
        """Whether a case is done, and its mask still there if there was one."""
        return self._lines.get(case) is not None and (case in self._without_mask or mask.exists())

    def begin(self, case: str) -> None:
        """Note a case whose mask is about to be written."""
        self._lines[case] = None
        self._append(to_json({"begun": case}))

    def add(self, case: str, row: Mapping[str, Any]) -> None:
        """Note a finished case, in the table and then in the journal.

        Args:
            case: its name.
            row: plain values; ``mask`` (text, None if none was written) and ``ml`` (of each label) have a meaning here.
        """
        entry = {"case": case, **row}
        self._note(entry)
        self._write_table(case)
        self._append(to_json(entry))

    def finish(self) -> Path:
        """The table, whole even if another process was killed between its line and that of the journal."""
        if self._last is None:
            self._write_table()
        return self.path("volumes.csv")

    # ------------------------------------------------------------ journal

    def _append(self, line: str) -> None:
        journal = self.path(JOURNAL)
        if self._beginning:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{one}\n" for one in (*self._beginning, line))
            atomic_write_bytes(journal, text.encode(errors="backslashreplace"))
            self._beginning = []
        else:
            append_line(journal, line)

    def _read(self, journal: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Complete lines after the first, as text and content."""
        lines = _read_lines(journal)
        first = next(lines, None)
        if first is None or not isinstance(first[1].get("about"), dict):
            raise UserError(f"{journal}, line 1: damaged (no description of the results); {_REMEDY}")
        if first[1] != self._about:
            run = " ".join(str(first[1]["about"].get("run")).split())
            raise UserError(
                f"{journal}: the results there are of another run or other options ({run}); "
                "choose another OUT, or use overwrite=true"
            )
        for number, (text, entry) in enumerate(lines, start=2):
            if not _is_step(entry, len(self._class_names)):
                raise UserError(f"{journal}, line {number}: damaged (no step of a case); {_REMEDY}")
            yield text, entry

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Take a step into memory."""
        if "begun" in entry:  # anew, maybe: a row of before is of another mask
            self._lines[entry["begun"]] = None
            return
        case = entry["case"]
        self._without_mask.discard(case)
        if entry["mask"] is None:
            self._without_mask.add(case)
        self._lines[case] = _csv_line([case, *(f"{ml:.3f}" for ml in entry["ml"][1 : len(self._class_names)])])

    # ------------------------------------------------------------ table

    def _write_table(self, case: str | None = None) -> None:
        """Renew the table; add a line to it where only that of ``case`` is new, and comes last."""
        path, lines = self.path("volumes.csv"), self._lines
        if case is not None and self._last is not None and case > self._last:
            append_line(path, lines[case] or "")
            self._last = case
            return
        done = sorted(case for case, line in lines.items() if line is not None)
        head = _csv_line(["case", *(f"{name}_ml" for name in self._class_names[1:])])
        self._folder.mkdir(parents=True, exist_ok=True)
        text = (f"{line}\n".encode(errors="backslashreplace") for line in (head, *(lines[case] for case in done)))
        atomic_write_bytes(path, text)
        self._last = done[-1] if done else None


_REMEDY = "delete it, or use overwrite=true"


def read_class_names(journal: Path) -> tuple[str, ...]:
    """Of the labels in the masks beside a journal.

    Raises:
        DataError: it is damaged.
    """
    try:
        _, first = next(_read_lines(journal), ("", {}))
        names = first.get("class_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{journal}, line 1: damaged (no class_names)")
    except UserError as error:
        raise DataError(f"{str(error).removesuffix(f'; {_REMEDY}')}; give names=background,...") from error
    return tuple(names)


def _read_lines(journal: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Complete lines, as text and content; what a crash has left of another at the end is none."""
    with open(journal, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                text = line[:-1].decode()
                content = json.loads(text)
                if not isinstance(content, dict):
                    raise ValueError(f"a {type(content).__name__}, not a mapping")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{journal}, line {number}: damaged ({error}); {_REMEDY}") from error
            yield text, content


def _is_step(entry: Mapping[str, Any], classes: int) -> bool:
    """Whether a case begins or is done, with the millilitres of each label."""
    if "begun" in entry:
        return isinstance(entry["begun"], str)
    ml = entry.get("ml")
    return (
        isinstance(entry.get("case"), str)
        and isinstance(entry.get("mask", 0), str | None)
        and isinstance(ml, list)
        and len(ml) >= classes
        and all(isinstance(value, int | float) and 0 <= value < 1e15 for value in ml)
    )


def _csv_line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
