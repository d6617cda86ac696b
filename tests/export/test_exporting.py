"""``vision-gates export``: what it prints, writes and refuses."""

import json

import pytest

from vision_gates import cli
from vision_gates.export import Session
from vision_gates.export import onnx as exporter

pytest.importorskip("onnxscript", reason="the [export] extra is not installed")
pytest.importorskip("onnxruntime", reason="the [export] extra is not installed")


def test_a_run_with_its_data(run_with_data, tmp_path, capsys):
    out = tmp_path / "network.onnx"
    assert cli.main(["export", str(run_with_data), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "background0.png 1 x 1 x 24 x 32: max |difference|" in printed, "real inputs, too"
    assert "checkpoints/best/weights.safetensors" in printed and "any batch, height, width" in printed
    about = json.loads((tmp_path / "network.json").read_text())
    assert about["images"] == {"size": [24, 32], "mean": [0.4], "std": [0.3], "unknown_transforms": []}
    assert about["class_names"] == ["background", "kernel", "shell"] and about["run"] == "run"
    assert about["model"]["name"] == "vg_hornet_atto" and about["licence"] == "apache-2.0" and about["source"]
    assert max(Session(out).classify(tmp_path / "data/val/shell/shell0.png").values()) < 1


def test_a_run_on_volumes_without_its_data(exported, tmp_path, capsys):
    run, _ = exported("patches")
    out = tmp_path / "network.onnx"
    assert cli.main(["export", str(run), str(out), "--fixed", "--opset", "20", "--size", "8", "16", "8"]) == 0
    assert "the run's own data cannot be read" in capsys.readouterr().out
    about = json.loads((tmp_path / "network.json").read_text())
    assert (about["input_size"], about["dynamic_axes"], about["opset"]) == ([8, 16, 8], ["batch"], 20)
    volumes = about["volumes"]
    assert (volumes["patch_size"], volumes["overlap"], volumes["channel_names"]) == ([16, 24, 16], 0.5, ["MRI"])
    assert volumes["preprocessing"]["spacing"] == [1.5, 1.5, 2.0] and volumes["preprocessing"]["orientation"] == "RAS"


def test_results_that_differ_end_with_1(run_with_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(exporter.LIMITS, "float32", 0.0)
    monkeypatch.setattr(exporter, "_another_size", lambda model, about: about.input_size)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", str(run_with_data), str(tmp_path / "network.onnx"), "--fixed"]) == 1
    error = capsys.readouterr().err
    assert "differs from PyTorch by more than 0" in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "RUN and OUT.onnx are needed, found neither"),
        (["run"], "RUN and OUT.onnx are needed, found run"),
        (["vg_vig_attto", "a.onnx"], "vg_vig_attto: neither a run directory nor a model; did you mean vg_vig_atto?"),
        (["vg_vig_atto", "a.pt"], "a.pt: the file's name must end in .onnx"),
        (["vg_vig_atto", "a.onnx", "--opset", "17"], "opset=17: is not supported; choose one from 18 to 23"),
        (["vg_vig_atto", "a.onnx", "--opset=many"], "--opset many: whole numbers are needed"),
        (["vg_vig_atto", "a.onnx", "--size", "--fixed"], "--size --fixed: whole numbers are needed"),
        (["vg_vig_atto", "a.onnx", "--size", "64"], "size=(64,): 2 numbers are needed, as in (224, 224)"),
        (["vg_vig_atto", "a.onnx", "--half"], "--half: no such option; known: --fixed, --fp16"),
        (["vg_vig_atto", "a.onnx", "--pretrained"], "vg_vig_atto: no pretrained weights exist"),
        ([".", "a.onnx"], ".: is no run directory"),
    ],
)
def test_one_line_for_a_mistake(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help(capsys):
    assert cli.main(["export", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--fp16" in printed and "export runs/auto_3d" in printed
