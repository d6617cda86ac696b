"""No telemetry, no download that nobody asked for: imports and whole runs with the network refused.

The refusal ends the process instead of raising, because a library that asks for its newest version catches what is
raised. Where Linux allows it, there is no network at all either, and the kernel counts packets that found no way.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_REFUSE = """
import os, socket, sys, traceback

def refuse(event, arguments):
    if event == "import" and arguments[0] == "onnxruntime" and os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
        sys.stderr.write("onnxruntime would report to Microsoft, some seconds after its import\\n")
        sys.stderr.flush()
        os._exit(97)
    asks = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.connect",
                     "socket.sendto", "socket.sendmsg")
    if asks and getattr(arguments[0], "family", None) != socket.AF_UNIX:  # data workers use those
        traceback.print_stack()
        sys.stderr.write(f"something asks the network: {event} {arguments}\\n")
        sys.stderr.flush()
        os._exit(97)

sys.addaudithook(refuse)
"""

_COUNT = """
names, counts = [line.split() for line in open("/proc/net/snmp") if line.startswith("Ip:")]
lost = int(dict(zip(names, counts))["OutNoRoutes"])
if lost:
    raise SystemExit(f"something that is not Python asks the network, {lost} times")
"""


@cache
def isolated() -> tuple[str, ...]:
    """A command that runs another without network devices; () where that is not allowed."""
    command = ("unshare", "--map-root-user", "--net")
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()
    except OSError:
        return ()


def run(code: str) -> subprocess.CompletedProcess:
    prefix = isolated()
    # What this process sets to be quick, or a build server to be quiet, must not hide what a user would see.
    silencers = "HF_HUB_OFFLINE", "NO_ALBUMENTATIONS_UPDATE", "ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS"
    environment = {name: value for name, value in os.environ.items() if name not in silencers}
    return subprocess.run(
        [*prefix, sys.executable, "-c", _REFUSE + code + (_COUNT if prefix else "")],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env=environment,
    )


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "try:\n    socket.create_connection(('pypi.org', 443))\nexcept BaseException:\n    pass",
    ],
)
def test_the_refusal_works(code):
    done = run(code)
    assert done.returncode == 97 and "something asks the network" in done.stderr


@pytest.mark.skipif(not isolated(), reason="needs a network namespace: unshare --map-root-user --net")
def test_the_refusal_sees_other_programs():
    asking = "import socket; socket.create_connection(('192.0.2.1', 80))"
    code = f"import subprocess\nsubprocess.run([sys.executable, '-c', {asking!r}])"
    assert "not Python" in run(code).stderr


def test_every_module():
    code = """
import importlib, pkgutil, timm, torch, vision_gates
for part in pkgutil.iter_modules(vision_gates.__path__, "vision_gates."):
    if part.name != "vision_gates.mmseg":  # below
        path = getattr(importlib.import_module(part.name), "__path__", ())
        for module in pkgutil.walk_packages(path, part.name + "."):
            importlib.import_module(module.name)
import highdicom, medmnist, monai, nilearn.datasets, onnxscript
model = timm.create_model("vg_vig_h_atto", num_classes=2)
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_mmseg():
    code = """
from vision_gates.segmenter import create_segmenter
decoder = {"type": "mmseg", "head": {"type": "FCNHead", "channels": 8, "num_convs": 1}}
create_segmenter("vg_vig_h_atto", num_classes=2, decoder=decoder)
import vision_gates.mmseg
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_runs(tmp_path):
    """Images, and volumes as tools/soak.py trains on them and labels them; the network as ONNX, too."""
    code = f"""
from pathlib import Path
sys.path.insert(0, "tools")
import soak
from vision_gates import cli
place = Path("{tmp_path}")
soak.training(place / "pictures", "schedule.epochs=1", "data.workers=1", images=24)
assert cli.evaluate([str(place / "pictures" / "run"), "split=val"]) == 0
place = place / "volumes"
soak.segmenting(place, volumes=1)
assert cli.evaluate([str(place / "run"), "split=val"]) == 0
assert cli.export([str(place / "run"), str(place / "net.onnx")]) == 0
assert cli.segment([str(place / "inputs"), str(place / "by_onnx"), "--checkpoint", str(place / "net.onnx")]) == 0
tiny = ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.image_size=32", "augment.train=[]"]
assert cli.train(["segmentation/mni152_vig_h_atto.yaml", *tiny, f"trainer.run_dir={{place / 'mni152'}}"]) == 0
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "volumes" / "mni152" / "report.html").is_file()
    assert [path.name for path in (tmp_path / "volumes" / "by_onnx").glob("*.nii.gz")] == ["case0006.nii.gz"]
