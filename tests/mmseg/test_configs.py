"""The configurations of configs/mmseg: the papers' build, the small one trains, is saved, and is read back."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmseg.registry import MODELS

import vision_gates.mmseg  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
ADE20K = sorted((ROOT / "configs" / "mmseg").glob("*ade20k.py"))
SMALL = ROOT / "configs" / "mmseg" / "mni152_vig_h_atto.py"


def test_every_configuration_is_tested():
    assert {*ADE20K, SMALL} == set((ROOT / "configs" / "mmseg").glob("*.py")) and len(ADE20K) == 3


@pytest.mark.parametrize("path", ADE20K, ids=lambda path: path.stem)
def test_recipes_of_the_papers_build(path):
    """Whole, at 512 x 512, with the shapes alone: on the meta device nothing is computed."""
    config = Config.fromfile(path)
    assert config.model.backbone.pretrained and config.train_dataloader.batch_size * 8 == 16
    config.model.backbone.pretrained = False
    with torch.device("meta"):
        model = MODELS.build(config.model).eval()
        levels = model.extract_feat(torch.empty(1, 3, 512, 512))
        assert [512 // level.shape[-1] for level in levels] == [4, 8, 16, 32]
        assert model.decode_head(levels).shape == (1, 150, 128, 128)
        assert model.auxiliary_head(levels).shape[:2] == (1, 150)
        groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, config.optim_wrapper.optimizer.weight_decay}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def small_config(work_dir: Path, **changes) -> Config:
    config = Config.fromfile(SMALL)
    config.merge_from_dict(
        {
            "train_cfg.max_iters": 14,
            "train_cfg.val_interval": 14,
            "param_scheduler.0.end": 2,
            "param_scheduler.1.begin": 2,
            "param_scheduler.1.end": 14,
            "model.decode_head.channels": 16,
            "default_hooks.logger.interval": 1,
            "log_processor.window_size": 1,
            "optim_wrapper.optimizer.lr": 0.01,
            "default_hooks.checkpoint.interval": 14,
        }
        | changes
    )
    config.work_dir, config.log_level, config.experiment_name = str(work_dir), "WARNING", work_dir.name
    return config


def test_small_one_trains_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # without, mmengine loads what fails once more, unsafely
    runner = Runner.from_cfg(small_config(tmp_path / "first"))
    runner.train()
    (rows,) = (tmp_path / "first").glob("*/vis_data/scalars.json")
    losses = [row["loss"] for row in map(json.loads, rows.read_text().splitlines()) if "loss" in row]
    assert len(losses) == 14 and sum(losses[-3:]) < 0.75 * sum(losses[:3])

    checkpoint = tmp_path / "first" / "iter_14.pth"
    again = Runner.from_cfg(small_config(tmp_path / "second", load_from=str(checkpoint), randomness=dict(seed=1)))
    again.load_or_resume()
    for data in list(again.test_dataloader)[:2]:
        outputs = []
        for model in (runner.model.eval(), again.model.eval()):
            with torch.no_grad():
                outputs.append(model.test_step(data)[0])
        assert torch.equal(outputs[0].seg_logits.data, outputs[1].seg_logits.data)
        assert outputs[0].pred_sem_seg.data.shape == (1, 96, 96)
    metrics = again.test()
    assert 10 < metrics["mDice"] <= 100


class _Code:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_tool_ends_in_one_line(tmp_path, monkeypatch):
    config = tmp_path / "bad.py"
    config.write_text(SMALL.read_text().replace("vg_vig_h_atto", "vg_vig_h_ato"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmseg_train.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools" / "mmseg_train.py"), run_name="__main__")
        return caught.value.code

    message = run(config, "--work-dir", tmp_path / "run")
    assert message.startswith("error: ") and "did you mean 'vg_vig_h_atto'?" in message and "\n" not in message
    assert run(tmp_path / "none.py") == f"error: {tmp_path / 'none.py'}: no such file"
    assert run(SMALL, "--test", "none.pth") == "error: none.pth: no such file"

    torch.save({"state_dict": {}, "meta": _Code(tmp_path / "ran")}, tmp_path / "code.pth")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # the tool sets it, for good
    message = run(SMALL, "--test", tmp_path / "code.pth", "--work-dir", tmp_path / "run")
    assert message.startswith(f"error: {tmp_path / 'code.pth'}: not read, as it holds more than weights")
    assert not (tmp_path / "ran").exists()
