"""``tools/bench.py``: its arguments, what it prints and what it writes. Its help text is ``vision_gates.cli.bench``."""

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement

from vision_gates.benchmark.contenders import FAMILIES
from vision_gates.benchmark.figures import save_figure, speed_figure
from vision_gates.benchmark.models import OUT_OF_MEMORY, ModelSettings, model_groups
from vision_gates.benchmark.ops import operator_rows
from vision_gates.benchmark.tables import kernel_table, results_folder, rows_table, write_rows
from vision_gates.errors import ConfigError

__all__ = ["run"]

Row = dict[str, Any]
DEFAULT_MODELS = ("vg_vig_tiny", "deit_tiny_patch16_224")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number is needed")
    return int(text)


def _wholes(text: str) -> tuple[int, ...]:
    try:
        return tuple(_whole(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError("a whole number is needed, or several such as 224,1024") from error


def _batch(text: str) -> int | str:
    try:
        return text if text == "auto" else _whole(text)
    except ValueError as error:
        raise ValueError("a whole number is needed, or auto") from error


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise ValueError("seconds are needed, such as 0.2")
    return number


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false is needed")
    return text == "true"


def _family(text: str) -> tuple[tuple[str, ...], ...]:
    if text not in FAMILIES:
        raise ValueError(f"one of {', '.join(FAMILIES)} is needed")
    return FAMILIES[text]


_SETTINGS: dict[str, dict[str, Callable[[str], Any]]] = {
    "models": {
        "size": _wholes,
        "batch": _batch,
        "mode": str,
        "dtype": str,
        "runtime": _words,
        "rounds": _whole,
        "profile": _switch,
        "dims": _whole,
        "channels_last": _switch,
        "cudnn_benchmark": _switch,
        "peer_runtime": str,
        "family": _family,
        "device": str,
        "out": str,
    },
    "ops": {
        "dtype": str,
        "seconds": _positive,
        "peers": _switch,
        "cold": _switch,
        "device": str,
        "out": str,
    },
}


def run(argv: Sequence[str]) -> int:
    """Measure and print; write to ``out`` after every step, so that an interrupted run leaves what it has.

    Returns:
        0, or 1 if something has a problem other than too little memory; standard error then says which.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    what, names, settings = _arguments(argv)
    out = settings.pop("out", None)
    folder = None if out is None else results_folder(out)
    console = Console(highlight=False)
    rows: list[Row] = []
    with _progress() as on_progress:
        if what == "ops":
            for more in operator_rows(names, **settings, on_progress=on_progress):
                rows += more
                _write(rows, out, folder)
        else:
            groups = settings.pop("family", (tuple(names) or DEFAULT_MODELS,))
            model_settings = ModelSettings(**settings)
            for group in chain(*(model_groups(group, model_settings, on_progress=on_progress) for group in groups)):
                rows += group.rows
                _write(rows, out, folder)
                for row in group.rows:
                    if row["model"] in group.kernels:
                        _show_kernels(console, row, group.kernels[row["model"]], out, folder)
    if folder is not None and what == "models":
        save_figure(speed_figure(rows), folder / "speed.png")
    _print(console, rows_table(rows))
    failures = [row for row in rows if row.get("problem") not in (None, OUT_OF_MEMORY)]
    for row in failures:
        about = [row[key] for key in ("op", "backend", "model", "size", "runtime") if row.get(key) is not None]
        sys.stderr.write(f"error: {' '.join(map(str, about))}: {row['problem']}\n")
    return 1 if failures else 0


def _arguments(argv: Sequence[str]) -> tuple[str, list[str], dict[str, Any]]:
    """models or ops, the names, the settings."""
    flags = [text for text in argv if text.startswith("-")]
    if flags:
        raise ConfigError(f"{flags[0]}: there are no flags; settings are key=value, for example size=224,1024")
    what, *names = [text for text in argv if "=" not in text] or [""]
    if what not in _SETTINGS:
        raise ConfigError(f"bench: models or ops is needed, found {what or 'nothing'}")
    known = _SETTINGS[what]
    settings = {}
    for key, _, value in (text.partition("=") for text in argv if "=" in text):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}={value}: no such setting; nearest: {near}; known: {', '.join(known)}")
        try:
            settings[key] = known[key](value)
        except ValueError as error:
            raise ConfigError(f"{key}={value}: {error}") from error
    if names and "family" in settings:
        raise ConfigError(f"{names[0]}: family= says what is compared; give names or a family")
    return what, names, settings


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, where standard error is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield status.update


def _print(console: Console, table: Any) -> None:
    # A pipe has no width of its own, and on a narrow terminal a folded line is better than a cut number.
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    console.print(table)


def _show_kernels(console: Console, row: Row, kernels: list[Row], out: str | None, folder: Path | None) -> None:
    if not kernels:
        return
    model, size, runtime = row["model"], row["size"], row["runtime"]
    _print(console, kernel_table(f"{model}, {size} px, {runtime}: one pass", kernels))
    if out is not None:
        name = f"profile_{re.sub(r'[^-.a-zA-Z0-9_]', '_', model)}_{size}_{runtime}.csv"  # hf-hub: names have slashes
        path = Path(out).with_name(f"{Path(out).stem}_{name}") if folder is None else folder / name
        write_rows(kernels, path)


def _write(rows: Sequence[Row], out: str | None, folder: Path | None) -> None:
    if folder is not None:
        write_rows(rows, folder / "rows.csv")
        write_rows(rows, folder / "rows.json")
    elif out is not None:
        write_rows(rows, Path(out))
