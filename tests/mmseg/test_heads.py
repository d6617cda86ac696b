"""Our decoders as mmseg's heads, HorFPN as a neck, our losses as mmseg's: the same numbers as without mmseg."""

import pytest
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import vision_gates.mmseg  # noqa: F401
from vision_gates.decoders.attention_unet import AttentionUNetDecoder
from vision_gates.decoders.fpn import FPNDecoder
from vision_gates.decoders.residual_attention import ResidualAttentionDecoder
from vision_gates.errors import ConfigError
from vision_gates.gates import AttentionGate, GnConv
from vision_gates.losses import SegmentationLoss
from vision_gates.region_losses import Tversky

CHANNELS, STRIDES = [8, 16, 24], [4, 8, 16]
LOSS = dict(type="OverlapCrossEntropyLoss", num_classes=5)


def levels(image):
    sides = [image.shape[-1] // stride for stride in STRIDES]
    return [torch.randn(len(image), c, side, side) for c, side in zip(CHANNELS, sides, strict=True)]


def build(kind, *, in_channels=CHANNELS, **options):
    return MODELS.build(dict(type=kind, in_channels=in_channels, num_classes=5, loss_decode=LOSS, **options))


CASES = [
    ("AttentionGateHead", AttentionUNetDecoder, dict(detail_channels=0)),
    ("AttentionGateHead", AttentionUNetDecoder, dict(detail_channels=8, style="additive")),
    ("ResidualAttentionHead", ResidualAttentionDecoder, dict(gate_image=False)),
    ("ResidualAttentionHead", ResidualAttentionDecoder, dict(gate_image=True, norm="group")),
]


@pytest.mark.parametrize(("kind", "decoder_cls", "options"), CASES)
def test_head_is_the_decoder(kind, decoder_cls, options):
    with_image = any(options.get(key) for key in ("detail_channels", "gate_image"))
    image = torch.randn(2, 3, 32, 32)
    features = levels(image)
    head = build(kind, in_channels=[3, *CHANNELS] if with_image else CHANNELS, channels=8, **options).eval()
    decoder = decoder_cls(
        encoder_channels=CHANNELS, encoder_reductions=STRIDES, in_chans=3, num_classes=5, channels=8, **options
    ).eval()
    weights = {name.removeprefix("decoder."): value for name, value in head.state_dict().items()}
    decoder.load_state_dict({name.replace("conv_seg", "classifier"): value for name, value in weights.items()})
    with torch.no_grad():
        logits = head([image, *features] if with_image else features)
        expected = decoder(features, image if with_image else features[0])
    assert logits.shape == (2, 5, 32, 32) if with_image else (2, 5, 8, 8)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", ["AttentionGateHead", "ResidualAttentionHead"])
def test_segmentor_trains_every_parameter(kind):
    with_image = dict(detail_channels=8) if kind == "AttentionGateHead" else dict(gate_image=True)
    model = MODELS.build(
        dict(
            type="EncoderDecoder",
            backbone=dict(type="VisionGatesBackbone", model_name="vg_vig_h_atto", out_image=True),
            decode_head=dict(type=kind, in_channels=[3, 32, 64, 96, 128], num_classes=5, channels=8, **with_image),
            auxiliary_head=dict(type="FCNHead", in_channels=96, in_index=3, channels=8, num_classes=5),
        )
    ).train()
    assert any(isinstance(module, AttentionGate) for module in model.decode_head.modules())
    samples = []
    for _ in range(2):
        labels = torch.randint(0, 5, (1, 64, 64))
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=(64, 64))))
    losses = model.loss(torch.randn(2, 3, 64, 64), samples)
    sum(value for name, value in losses.items() if "loss" in name).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_neck_is_the_pyramid_of_hor_fpn():
    neck = MODELS.build(dict(type="GnConvFPN", in_channels=CHANNELS, out_channels=16)).eval()
    decoder = FPNDecoder(
        encoder_channels=CHANNELS, encoder_reductions=STRIDES, in_chans=3, num_classes=2, channels=16
    ).eval()
    decoder.load_state_dict(neck.state_dict(), strict=False)
    assert sum(isinstance(module, GnConv) for module in neck.modules()) == 3
    seen = []
    for output in decoder.outputs:
        output.register_forward_hook(lambda _, __, result: seen.append(result))
    image = torch.randn(1, 3, 32, 32)
    features = levels(image)
    with torch.no_grad():
        decoder(features, image)
        outputs = neck(features)
    assert len(outputs) == 3
    for output, expected in zip(outputs, seen, strict=True):
        assert torch.equal(output, expected)


def test_loss_is_ours():
    logits, labels = torch.randn(2, 5, 6, 6), torch.randint(0, 5, (2, 6, 6))
    labels[0] = 200
    loss = MODELS.build(LOSS | dict(overlap="tversky", overlap_options=dict(alpha=0.2, beta=0.8), loss_weight=3.0))
    ours = SegmentationLoss(num_classes=5, ignore_index=200, overlap=Tversky(alpha=0.2, beta=0.8))
    assert torch.equal(loss(logits, labels, ignore_index=200), 3 * ours(logits, labels))
    assert loss.loss_name == "loss_overlap_ce"
    assert MODELS.build(LOSS | dict(class_weight=[1, 2, 3, 4, 5]))(logits, labels, ignore_index=200).isfinite()


MISTAKES = [
    (dict(kind="AttentionGateHead", strides=[4, 8]), r"AttentionGateHead.strides=\[4, 8\]: 3 are needed"),
    (dict(kind="AttentionGateHead", channels=2), "AttentionGateHead: channels and max_channels must be at least 4"),
    (dict(kind="AttentionGateHead", style="soft"), "AttentionGateHead: .*soft"),
    (dict(kind="ResidualAttentionHead", strides=[8, 4, 2]), "levels must go from fine to coarse"),
    (dict(kind="ResidualAttentionHead", input_transform="resize_concat"), "takes all levels"),
    (dict(kind="ResidualAttentionHead", in_channels=8), "at least 2 encoder levels"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_end_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_mistakes_in_neck_and_loss():
    with pytest.raises(ConfigError, match=r"GnConvFPN: channels must be a multiple of 2\^\(order-1\) = 4"):
        MODELS.build(dict(type="GnConvFPN", in_channels=CHANNELS, out_channels=10, order=3))
    with pytest.raises(ConfigError, match="overlap='jaccard': one of dice, tversky, region_tversky"):
        MODELS.build(LOSS | dict(overlap="jaccard"))
    with pytest.raises(ConfigError, match="focal_gamma"):
        MODELS.build(LOSS | dict(focal_gamma=-1))
    with pytest.raises(ConfigError, match="remove sampler"):
        MODELS.build(LOSS)(torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2), weight=torch.ones(1, 2, 2))
