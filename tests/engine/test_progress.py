"""What a run shows on a terminal and what it leaves in log.txt."""

import io

from rich.console import Console

from vision_gates.engine.progress import Display, Pace, duration
from vision_gates.engine.trainer import train


def test_terminal_gets_a_bar_and_the_log_plain_lines(make_config):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    run = train(make_config("trainer.log_every=3"), console=console)
    shown = console.file.getvalue()
    for text in ("epoch 1/2", "images/s", "data wait", "GiB", "left", "best accuracy", "report.html"):
        assert text in shown, text
    lines = (run / "log.txt").read_text().splitlines()
    assert "\x1b" not in "".join(lines)
    updates = [line for line in lines if "| update " in line]
    assert [line.split("| update ")[1].split(" ")[0] for line in updates] == ["3", "6", "9", "12"]
    assert lines[0].split(" ", 2)[2].startswith("data "), "what was said before the directory existed is in the log too"


def test_other_processes_stay_silent(tmp_path):
    console = Console(file=io.StringIO())
    with Display(main=False, console=console) as display:
        display.open_log(tmp_path / "log.txt")
        display.say("a")
        display.show("b")
        with display.counting("c") as progress:
            progress(1, 2)
    assert console.file.getvalue() == "" and not list(tmp_path.iterdir())


def test_markup_in_names_is_text():
    console = Console(file=io.StringIO())
    with Display(console=console) as display:
        display.say("class [red]")
    assert "class [red]" in console.file.getvalue()


def test_the_pace_is_that_of_all_updates_since_the_last_line():
    pace = Pace()
    pace.add(images=10, seconds=1.0, waited=0.5)
    pace.add(images=10, seconds=3.0, waited=0.5)
    assert pace.rate() == 5 and pace.waiting() == 0.25


def test_duration():
    assert duration(3725.4) == "1:02:05"
