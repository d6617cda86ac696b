"""No telemetry, no download that nobody asked for: imports and a whole training run with the network refused."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_REFUSE = """
import socket

def refuse(*arguments, **named):
    raise AssertionError(f"something asks the network for {arguments}")

socket.getaddrinfo = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = refuse
"""


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", _REFUSE + code], capture_output=True, text=True, timeout=300, **options
    )


def test_the_refusal_works():
    assert "asks the network" in run("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')").stderr


def test_imports_and_models():
    code = """
import timm, torch, vision_gates, vision_gates.cli, vision_gates.engine.trainer, vision_gates.segmenter
model = timm.create_model("vg_vig_h_atto", num_classes=2)
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_training(tmp_path):
    code = f"""
from vision_gates import cli
tiny = ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.image_size=32", "trainer.run_dir={tmp_path / "run"}"]
raise SystemExit(cli.train(["segmentation/mni152_vig_h_atto.yaml", *tiny]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
