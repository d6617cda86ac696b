"""Segmenter and decoders: logits at input size from any encoder, gradients everywhere, readable errors."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from vision_gates.decoders import available_decoders, create_decoder
from vision_gates.segmenter import Segmenter, create_segmenter

ENCODERS = ["vg_vig_h_atto", "vg_vig_atto", "test_convnext", "test_resnet"]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", available_decoders())
class TestSegmenter:
    @pytest.fixture(autouse=True)
    def _installed(self, decoder):
        if decoder == "mmseg":
            pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

    @pytest.mark.parametrize("size", [(64, 64), (33, 47), (50, 96)])
    def test_logits_at_input_size(self, encoder, decoder, size):
        model = create_segmenter(encoder, decoder={"type": decoder}, num_classes=4, in_chans=2).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 2, *size)).shape == (1, 4, *size)

    def test_every_gradient(self, encoder, decoder):
        model = create_segmenter(encoder, decoder={"type": decoder}, num_classes=3)
        logits = model(torch.randn(2, 3, 64, 64))
        (logits * torch.randn_like(logits)).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("encoder", "options"), [("vg_vig_atto", dict(depth=4)), ("test_convnext", {})])
@pytest.mark.parametrize("decoder", available_decoders())
def test_compiles_and_exports(encoder, options, decoder):
    """On levels of one stride and of several; encoders by themselves are the contract test's."""
    if decoder == "mmseg":
        pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")
    model = create_segmenter(encoder, decoder={"type": decoder}, num_classes=3, **options).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
        torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4)
        exported = torch.export.export(model, (image,)).module()(image)
        torch.testing.assert_close(exported, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encoder", ["vg_vig_h_atto", "vg_vig_atto"])
def test_layer_decay_orders_encoder_before_decoder(encoder):
    model = create_segmenter(encoder, num_classes=3)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert set(scale) == {id(p) for p in model.parameters()}
    assert all(scale[id(p)] == 1.0 for p in model.decoder.parameters())
    stem = scale[id(model.encoder.model.stem[0].weight)]
    assert stem == min(scale.values()) and stem < 0.25
    assert {name for name in model.no_weight_decay()} <= {name for name, _ in model.named_parameters()}


def test_layer_decay_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"optim\.layer_decay"):
        create_segmenter("test_resnet", num_classes=2).group_matcher()


def test_grad_checkpointing_reaches_the_encoder():
    model = create_segmenter("vg_vig_h_atto", num_classes=2)
    model.set_grad_checkpointing()
    assert model.encoder.model.grad_checkpointing


def test_padding_reaches_every_pixel():
    """A change in the last row and column changes the logits, although 33 is no multiple of 16."""
    model = create_segmenter("vg_vig_atto", num_classes=2, decoder={"type": "pyramid", "detail_channels": 0}).eval()
    image = torch.randn(1, 3, 33, 33)
    other = image.clone()
    other[..., -1, -1] += 1
    with torch.no_grad():
        assert not torch.equal(model(image), model(other))


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="decoder type 'pyramd' is unknown .*'pyramid'"):
        create_segmenter("vg_vig_atto", num_classes=2, decoder={"type": "pyramd"})
    with pytest.raises(ValueError, match="no option 'chanels' .*'channels'"):
        create_segmenter("vg_vig_atto", num_classes=2, decoder={"type": "pyramid", "chanels": 3})
    facts = dict(in_chans=3, num_classes=2)
    with pytest.raises(ValueError, match="at least one encoder level"):
        create_decoder({"type": "pyramid"}, encoder_channels=[], encoder_reductions=[], **facts)
    with pytest.raises(ValueError, match=r"fine to coarse, got reductions \[8, 4\]"):
        create_decoder({"type": "pyramid"}, encoder_channels=[8, 8], encoder_reductions=[8, 4], **facts)
    with pytest.raises(ValueError, match="at least 4, got 64 and 2"):
        create_decoder({"type": "pyramid", "detail_channels": 2}, encoder_channels=[8], encoder_reductions=[4], **facts)


def test_one_image_whose_coarsest_map_is_one_pixel_trains():
    model = create_segmenter("vg_vig_h_atto", num_classes=2, decoder={"type": "pyramid", "channels": 8}).train()
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_encoder_without_features_is_refused(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("features_only not implemented for this model")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="gives no feature pyramid"):
        create_segmenter("convit_tiny", num_classes=2)


def test_divisor_is_the_coarsest_stride():
    assert create_segmenter("vg_vig_h_atto", num_classes=2).divisor == 32
    assert isinstance(create_segmenter("vg_vig_atto", num_classes=2), Segmenter)
