"""The recipes for volumes need nothing but the path of the data, and build their network for slices or patches."""

import pytest
import torch

from vision_gates.config import load_config
from vision_gates.engine.building import RunInfo, build_model
from vision_gates.engine.volume_data import VolumeInfo
from vision_gates.engine.volume_preparation import batch_augmentation
from vision_gates.errors import ConfigError
from vision_gates.volumes.preprocessing import ChannelPlan, Preprocessing


@pytest.mark.parametrize(("recipe", "patch", "neighbours"), [("auto_2d", (48, 32), 2), ("auto_3d", (16, 32, 16), 0)])
def test_auto_recipe(recipe, patch, neighbours):
    overrides = ["data.root=anywhere", f"data.neighbours={neighbours}"]
    config = load_config(f"configs/segmentation/{recipe}.yaml", overrides)
    assert config.trainer.run_dir == f"runs/{recipe}" and config.data.root == "anywhere"
    assert config.data.mode == recipe.removeprefix("auto_")
    volumes = VolumeInfo(
        preprocessing=Preprocessing(spacing=None, channels=(ChannelPlan(kind="zscore"),) * 2),
        spatial_dims=len(patch),
        patch_size=patch,
        neighbours=neighbours,
        channel_names=("T1", "T2"),
    )
    assert all(wide > side for wide, side in zip(batch_augmentation(config, volumes).sample_size, patch, strict=True))
    names = ("background", "a", "b")
    model = build_model(config, RunInfo(names, volumes.in_chans, None, None, None, {}, {}, volumes=volumes)).eval()
    assert volumes.in_chans == 2 * (2 * neighbours + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000
    with torch.no_grad():
        assert model(torch.zeros(1, volumes.in_chans, *patch)).shape == (1, 3, *patch)


@pytest.mark.parametrize("recipe", ["auto_2d", "auto_3d"])
def test_auto_recipe_without_data_says_what_is_missing(recipe):
    with pytest.raises(ConfigError, match=f"{recipe}.yaml: data.root: required key is missing"):
        load_config(f"configs/segmentation/{recipe}.yaml")
