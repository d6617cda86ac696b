"""A full disk: a small tmpfs that only the process and its children see."""

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from injection.processes import Process
from injection.runs import Runs, one_line, resumed, segment
from vision_gates import cli


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int | None], None]]:
    """In a process of its own: a tmpfs at ``place``; ``leave(bytes)`` fills it but for so much, None empties it."""
    place.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private = 0x00020000, 0x10000000, 0x44000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_namespace | (0 if user == 0 else new_user)):
        raise PermissionError("a mount namespace is refused here")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(b"none", b"/", None, private, None)
    if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, b"size=64m"):
        raise PermissionError("a tmpfs cannot be mounted here")
    ballast = place / "ballast"

    def leave(free: int | None) -> None:
        ballast.unlink(missing_ok=True)
        if free is not None:
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(place).free - free, 1))

    yield leave


def full_disk(runs: Runs, quick: bool) -> str:
    """Too little room for a run, its cache, a mask, an evaluation; then there is room, and it goes on."""
    place, result = runs.root / "disk", runs.root / "disk.json"
    needed = sum(path.stat().st_size for path in (runs.root / "undisturbed_images").rglob("*") if path.is_file())

    def work() -> int:
        said = []
        with small_disk(place) as leave:
            for share in (0.5,) if quick else (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
                name = runs.new()
                leave(int(share * needed))
                process = runs.train("images", name, place=place)
                process.wait()
                said.append(one_line(process, 2, str(place), "free"))
                rubbish = [path for path in (place / name).rglob("*") if "writing" in path.name]
                assert not rubbish, f"left behind: {rubbish}"
                leave(None)
                shutil.rmtree(resumed(runs, "images", name, place=place))
            name = runs.new()
            leave(100_000)
            process = runs.train("volumes", name, place=place)
            process.wait()
            said.append(one_line(process, 2, "data.cache", "free"))
            leave(None)
            run = resumed(runs, "volumes", name, place=place)
            for command, words in (
                (lambda: cli.evaluate([str(run), "split=val"]), (str(run), "free")),
                (lambda: segment(runs, run, place / "out" / "mask.nii.gz"), ("mask", "free")),
            ):
                leave(0)
                process = Process(command, runs.root / "command.log")
                process.wait()
                said.append(one_line(process, 2, *words))
                assert not (place / "out" / "mask.nii.gz").exists()
                leave(None)
                process = Process(command, runs.root / "command.log")
                process.wait()
                assert process.code == 0, process.said()
        result.write_text(json.dumps(said))
        return 0

    process = Process(work, runs.root / "disk.log")
    process.wait(seconds=600)
    if process.code:
        *_, said = process.said() or ["it said nothing"]
        raise PermissionError(said) if said.startswith("PermissionError") else AssertionError(said)
    lines = json.loads(result.read_text())
    return f"{len(lines)} times; {lines[0]}"
