"""Learning rates fall from the heads to the stem, as the models' group_matcher orders their layers."""

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS

import vision_gates.mmseg  # noqa: F401
from vision_gates.errors import ConfigError


def segmentor(model_name="vg_hornet_atto", **options):
    return MODELS.build(
        dict(
            type="EncoderDecoder",
            backbone=dict(type="VisionGatesBackbone", model_name=model_name, out_norm=True, **options),
            decode_head=dict(type="FCNHead", in_channels=128, in_index=3, channels=8, num_classes=5),
        )
    )


def scales(model, **paramwise):
    """Name of each parameter -> (factor of its learning rate, weight decay)."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="AdamW", lr=2.0, weight_decay=0.05),
            constructor="GroupMatcherLayerDecay",
            paramwise_cfg=dict(paramwise),
        ),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"] / 2, group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }


def test_stages():
    model = segmentor()
    found = scales(model, decay_rate=0.5, decay_type="stage_wise")
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (scale, decay) in found.items():
        parts = name.split(".")
        if name.startswith("backbone.model.model.stem"):
            assert scale == 0.5**5
        elif "stages" in parts:
            stage = int(parts[parts.index("stages") + 1])
            assert scale == 0.5 ** (4 - stage), name
        else:
            assert scale == 1.0 and name.startswith(("decode_head", "backbone.out_norms")), name
        assert decay == (0.0 if model.get_parameter(name).ndim < 2 else 0.05), name


def test_blocks_and_a_gap_before_the_heads():
    model = segmentor("vg_hornet_atto", frozen_stages=0)
    found = scales(model, decay_rate=0.5, num_layers=20)
    assert not any(".stem." in name for name in found)  # frozen
    third = [found[f"backbone.model.model.stages.2.blocks.{i}.mlp.fc1.weight"][0] for i in range(3)]
    assert third[0] * 4 == third[1] * 2 == third[2] < 0.5**5
    assert found["decode_head.conv_seg.weight"] == (1.0, 0.05)


def test_positions_have_no_weight_decay():
    model = MODELS.build(
        dict(
            type="EncoderDecoder",
            backbone=dict(type="VisionGatesBackbone", model_name="vg_vig_atto"),
            decode_head=dict(type="FCNHead", in_channels=96, in_index=3, channels=8, num_classes=5),
        )
    )
    found = scales(model, decay_rate=0.9)
    assert found["backbone.model.model.pos_embed"][1] == 0.0 and model.backbone.model.model.pos_embed.ndim > 1


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        (dict(), "decay_rate=None: a number above 0"),
        (dict(decay_rate=1.5), "decay_rate=1.5"),
        (dict(decay_rate=0.9, decay_type="layerwise"), "'layer_wise' or 'stage_wise' is needed"),
        (dict(decay_rate=0.9, num_layers=3), r"num_layers=3: there are \d+, the heads' included"),
        (dict(decay_rate=0.9, custom_keys={}), "paramwise_cfg.custom_keys: unknown"),
    ],
)
def test_mistakes_end_in_one_line(paramwise, message):
    with pytest.raises(ConfigError, match=message):
        scales(segmentor(), **paramwise)


def test_backbones_without_layers_are_refused():
    with pytest.raises(ConfigError, match='test_convnext does not keep its layers.*feature_cls="getter"'):
        scales(segmentor("test_convnext"), decay_rate=0.9)
    backbone = dict(type="ResNet", depth=18, base_channels=8, stem_channels=8)
    head = dict(type="FCNHead", in_channels=64, in_index=3, channels=8, num_classes=5)
    with pytest.raises(ConfigError, match="is for VisionGatesBackbone, not for ResNet"):
        scales(MODELS.build(dict(type="EncoderDecoder", backbone=backbone, decode_head=head)), decay_rate=0.9)
