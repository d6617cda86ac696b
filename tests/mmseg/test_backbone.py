"""A timm pyramid as mmseg's backbone: levels, freezing, weights from files, and one line for what cannot be."""

import importlib
import sys

import pytest
import timm
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

from mmseg.registry import MODELS

import vision_gates.mmseg
from vision_gates.errors import ConfigError


def build(model_name, **options):
    return MODELS.build(dict(type="VisionGatesBackbone", model_name=model_name, **options))


@pytest.mark.parametrize("name", ["vg_vig_h_atto", "vg_convit_atto", "vg_hornet_atto", "test_resnet", "test_vit"])
def test_levels_are_those_of_timm(name):
    torch.manual_seed(1)
    backbone = build(name, in_channels=2).eval()
    torch.manual_seed(1)
    size = backbone.model.model.patch_embed.img_size[0] if name == "test_vit" else 64
    plain = timm.create_model(name, features_only=True, in_chans=2).eval()
    image = torch.randn(1, 2, size, size)
    with torch.no_grad():
        levels, expected = backbone(image), plain(image)
    assert isinstance(levels, tuple) and backbone.out_channels == [level.shape[1] for level in levels]
    assert backbone.strides == [size // level.shape[-1] for level in levels]
    for level, other in zip(levels, expected, strict=True):
        assert torch.equal(level, other)


def test_chosen_levels_norm_and_image():
    backbone = build("vg_vig_atto", out_indices=[1, 4], out_norm=True, out_image=True).eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        first, *levels = backbone(image)
    assert first is image and backbone.out_channels == [3, 96, 96] and backbone.strides == [1, 16, 16]
    for level in levels:
        assert level.shape == (2, 96, 2, 3)
        torch.testing.assert_close(level.mean(dim=1), torch.zeros(2, 2, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.var(dim=1, correction=0), torch.ones(2, 2, 3), rtol=0, atol=1e-2)


def test_frozen_stages_stay_as_they_are():
    backbone = build("vg_vig_h_atto", frozen_stages=1, drop_path_rate=0.9).train()
    network = backbone.model.model
    assert not network.stem.training and not network.stages[0].training and network.stages[1].training
    sum(level.sum() for level in backbone(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in backbone.named_parameters():
        frozen = name.startswith(("model.model.stem", "model.model.stages.0"))
        assert parameter.requires_grad != frozen and (parameter.grad is None) == frozen, name


def test_norm_eval_and_checkpointing():
    backbone = build("test_resnet", norm_eval=True, with_cp=True).train()
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms) and backbone.training
    assert build("vg_hornet_atto", with_cp=True).model.model.grad_checkpointing


def test_checkpointing_changes_no_gradient():
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = build("vg_vig_h_atto", with_cp=with_cp).train()
        backbone(torch.ones(1, 3, 32, 32))[-1].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("way", ["pretrained", "init_cfg"])
def test_weights_of_a_file(tmp_path, way):
    """Of a whole classifier with three input channels, into fewer levels and one channel."""
    source = timm.create_model("vg_hornet_atto", num_classes=7)
    path = tmp_path / "weights.pth"
    torch.save(dict(model=source.state_dict()), path)
    given = str(path) if way == "pretrained" else dict(type="Pretrained", checkpoint=str(path))
    backbone = build("vg_hornet_atto", in_channels=1, out_indices=(0, 2), **{way: given})
    backbone.init_weights()  # as mmengine calls it: must leave the weights alone
    own = backbone.model.model.state_dict()
    for name, value in source.state_dict().items():
        if name in own and name != "stem.0.weight":
            assert torch.equal(own[name], value), name
    torch.testing.assert_close(own["stem.0.weight"], source.stem[0].weight.detach().sum(dim=1, keepdim=True))


MISTAKES = [
    (dict(model_name="vg_vig_h_ato"), r"no model 'vg_vig_h_ato'; did you mean 'vg_vig_h_atto'\?"),
    (dict(out_indices=(0, 7)), r"out_indices=\[0, 7\]: vg_vig_h_atto has 4 levels, 0 to 3"),
    (dict(model_name="test_resnet", out_indices=(9,)), r"test_resnet has 5 levels, 0 to 4"),
    (dict(out_indices=(2, 1)), "rising numbers of levels"),
    (dict(frozen_stages=5), "frozen_stages=5: vg_vig_h_atto has 4 stages"),
    (dict(model_name="test_resnet", frozen_stages=0), 'add feature_cls="getter"'),
    (dict(pretrained=True), "no pretrained weights exist for vg_vig_h_atto"),
    (dict(pretrained="missing.pth"), "missing.pth: no such file"),
    (dict(init_cfg=dict(type="Normal", std=1)), r"init_cfg: dict\(type=.Pretrained"),
    (dict(depth=3), "cannot be built as a feature pyramid: .*'depth'"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_end_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(**(dict(model_name="vg_vig_h_atto") | options))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("vg_vig_atto").state_dict(), path)
    with pytest.raises(
        ConfigError, match="tensors of vg_hornet_atto are missing or of another shape, first .*must be of this model"
    ):
        build("vg_hornet_atto", pretrained=str(path))
    path.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="weights.pth: cannot be loaded into vg_hornet_atto"):
        build("vg_hornet_atto", pretrained=str(path))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg.datasets", None)
    with pytest.raises(ConfigError, match=r"needs mmsegmentation \(.*\): pip install 'vision-gates\[mmseg\]'$"):
        importlib.reload(vision_gates.mmseg)
