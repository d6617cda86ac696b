"""The command line: exit codes, one line for a mistake and nothing on disk, and the five commands on real input."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from vision_gates import cli
from vision_gates.engine.state import Interrupted

BASE = {
    "task": {"type": "classification"},
    "data": {"type": "image_folder", "root": "data", "image_size": 32, "batch_size": 4},
    "model": {"name": "test_convnext"},
    "schedule": {"epochs": 1},
    "trainer": {"device": "cpu", "run_dir": "run"},
}


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with config.yaml and a good image folder of 2 classes."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(BASE))
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = Path("data") / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = generator.integers(0, 100, (16, 16, 3)) + 120 * label
                cv2.imwrite(str(folder / f"{i}.png"), image.astype(np.uint8))
    return tmp_path


def scans(values: tuple[int, int]) -> list[str]:
    """Write images with masks of two values; returns the overrides that train on them."""
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (Path("scans") / kind).mkdir(parents=True)
    for i in range(8):
        cv2.imwrite(f"scans/images/{i}.png", generator.integers(0, 255, (16, 16)).astype(np.uint8))
        cv2.imwrite(f"scans/masks/{i}.png", generator.choice(values, (16, 16)).astype(np.uint8))
    return ["task.type=segmentation", "data={type: image_mask_folder, root: scans, num_classes: 2, image_size: 32}"]


def fails(capfd, argv: list[str], *words: str) -> None:
    """The command ends with code 2, one line on standard error that holds the words, and no run directory."""
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert "Traceback" not in out + err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert not Path("run").exists() and not Path("runs").exists()


def test_truncated_image(workplace, capfd):
    image = workplace / "data" / "train" / "dog" / "2.png"
    image.write_bytes(image.read_bytes()[:-300])
    fails(capfd, ["train", "config.yaml"], "dog/2.png")


def test_image_that_is_no_image(workplace, capfd):
    (workplace / "data" / "val" / "cat" / "1.png").write_text("not an image")
    fails(capfd, ["train", "config.yaml"], "cat/1.png")


def test_masks_of_0_and_255(workplace, capfd):
    fails(capfd, ["train", "config.yaml", *scans((0, 255))], "0/255", "data.label_map", "255: ")


def test_not_a_number_in_a_tiff(workplace, capfd):
    tifffile = pytest.importorskip("tifffile")
    image = np.random.default_rng(0).random((16, 16, 3), dtype=np.float32)
    for path in list((workplace / "data").rglob("*.png")):
        bad = image.copy()
        if path.parts[-3:] == ("train", "cat", "1.png"):
            bad[3, 4] = np.nan
        tifffile.imwrite(path.with_suffix(".tif"), bad + np.random.default_rng(len(str(path))).random())
        path.unlink()
    fails(capfd, ["train", "config.yaml"], "train/cat/1.tif", "NaN")


def test_data_set_of_one_image(workplace, capfd):
    for path in list((workplace / "data").rglob("*.png"))[1:]:
        path.unlink()
    fails(capfd, ["train", "config.yaml"], "data")


def test_missing_folder(workplace, capfd):
    fails(capfd, ["train", "config.yaml", "data.root=nowhere"], "nowhere", "data.root")


def test_typo_in_a_key(workplace, capfd):
    raw = copy.deepcopy(BASE) | {"optim": {"wieght_decay": 0.1}}
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    fails(capfd, ["train", "config.yaml"], "config.yaml", "optim.wieght_decay", "optim.weight_decay")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["one CONFIG is needed"]),
        (["train", "a.yaml", "b.yaml"], ["one CONFIG is needed, found 2"]),
        (["train", "a.yaml"], ["a.yaml", "no such configuration file"]),
        (["train", "config.yaml", "--lr=3"], ["--lr=3", "there are no flags"]),
        (["train", "config.yaml", "optim.lr=x"], ["optim.lr=x"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["evaluate", "data"], ["data"]),
        (["evaluate"], ["one RUN is needed"]),
        (["models", "vgg_nothing_*"], ["vgg_nothing_*"]),
        (["bench", "everything"], ["models or ops is needed"]),
        (["bench", "models", "size=big"], ["size=big: a whole number"]),
        (["bench", "models", "speed=3"], ["speed=3: no such setting"]),
        (["trian"], ["'trian'; nearest: train"]),
        ([], ["a command is needed"]),
    ],
)
def test_wrong_arguments(workplace, capfd, argv, words):
    fails(capfd, argv, *words)


def test_train_and_evaluate(workplace, capfd):
    assert cli.train(["config.yaml", "optim.lr=0.002"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and "\x1b" not in out, "plain lines where there is no terminal"
    for text in ("data ", "test_convnext", "0.21 M parameters", "epoch 1/1 | train loss", "accuracy", "report: run"):
        assert text in out, text
    environment = json.loads(Path("run/environment.json").read_text())
    assert environment["command"] == ["vision-gates", "train", "config.yaml", "optim.lr=0.002"]
    trained = json.loads(Path("run/evaluation/test.json").read_text())

    Path("run/evaluation/test.json").unlink()
    assert cli.evaluate(["run"]) == 0
    assert "accuracy" in capfd.readouterr().out
    evaluated = json.loads(Path("run/evaluation/test.json").read_text())
    assert evaluated["metrics"] == trained["metrics"], "evaluation and training see the same network and pixels"
    assert cli.evaluate(["run", "split=val"]) == 0
    assert Path("run/evaluation/val.json").exists()
    assert cli.evaluate(["run", "split=tset"]) == 2
    assert "split=tset" in capfd.readouterr().err
    assert cli.train(["config.yaml"]) == 2
    assert "trainer.resume=true" in capfd.readouterr().err


def test_gate_maps(workplace, capfd):
    decoder = "model.decoder={type: attention_unet, channels: 8, detail_channels: 4}"
    assert cli.train(["config.yaml", *scans((0, 1)), "model.name=vg_vig_h_atto", decoder]) == 0
    capfd.readouterr()
    assert cli.main(["gate-maps", "run", "scans/images/0.png", "test:0", "out=pictures/maps.png"]) == 0
    assert capfd.readouterr().out == "gate maps: pictures/maps.png\n"
    picture = cv2.imread("pictures/maps.png")
    assert cli.gate_maps(["run", "scans/images/0.png", "gates=decoder.*", "out=one.png"]) == 0
    one = cv2.imread("one.png")
    assert picture.shape[0] > 2 * one.shape[0] and one.std() > 10, "a row an image and kind of gate"
    assert not list(Path(".").rglob("*.partial"))
    for argv, words in (
        (["run"], "a RUN and an IMAGE are needed"),
        (["run", "nowhere.png"], "nowhere.png"),
        (["run", "test:99"], "test:99"),
        (["run", "test:0", "gates=nothing*"], "decoder.gates.0"),
        (["run", "test:0", "out=maps.pdf"], "out=maps.pdf"),
        (["run", "test:0", "--all"], "--all"),
        (["nowhere", "a.png"], "nowhere"),
    ):
        assert cli.gate_maps(argv) == 2
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and words in err


def test_gate_maps_of_a_classifier_and_of_a_network_without_gates(workplace, capfd):
    assert cli.train(["config.yaml", "model.name=vg_convit_atto", "model.options={patch_size: 8, img_size: 32}"]) == 0
    assert cli.gate_maps(["run", "data/val/cat/0.png"]) == 0
    assert cv2.imread("gate_maps.png").std() > 10
    assert cli.train(["config.yaml", "trainer.run_dir=plain"]) == 0
    capfd.readouterr()
    assert cli.gate_maps(["plain", "data/val/cat/0.png"]) == 2
    assert "test_convnext has no gates" in capfd.readouterr().err


def test_interrupted_ends_with_130(workplace, capfd, monkeypatch):
    def stop(*_, **__):
        raise Interrupted("stopped in epoch 1")

    monkeypatch.setattr("vision_gates.engine.trainer.train", stop)
    assert cli.train(["config.yaml"]) == 130
    assert capfd.readouterr().err == "stopped in epoch 1\n"

    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vision_gates.engine.trainer.train", press)
    assert cli.train(["config.yaml"]) == 130


def test_a_fault_of_the_program_keeps_its_traceback(workplace, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("vision_gates.engine.trainer.train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.train(["config.yaml"])


def test_help_of_every_command(capfd):
    for command in ("train", "evaluate", "gate-maps", "models", "bench"):
        assert cli.main([command, "--help"]) == 0
        out = capfd.readouterr().out
        assert out.startswith(f"usage: {command}") and len(out.splitlines()) > 3
    assert cli.main(["--help"]) == 0


def test_models_lists_ours(capfd):
    assert cli.models(["vg_vig_atto", "format=csv"]) == 0
    assert "vg_vig_atto" in capfd.readouterr().out


def test_console_script_starts_anew_with_sleeping_threads(monkeypatch):
    started = []
    monkeypatch.setattr(cli.sys, "platform", "linux")
    monkeypatch.setattr(cli.sys, "argv", ["vision-gates", "models", "vg_vig_t*"])
    monkeypatch.setattr(cli.os, "execv", lambda path, arguments: started.append(arguments))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert cli.main() == 0
    assert started == [[cli.sys.executable, "vision-gates", "models", "vg_vig_t*"]]
    assert cli.main() == 0 and len(started) == 1, "once: the variable is set now"
