"""Attention-ResUNet: its size by hand, where its gates stand, any image size."""

import pytest
import torch

from vision_gates.gates import AttentionGate
from vision_gates.networks.attention_resunet import ResidualUNetEncoder, build

SMALL = dict(widths=(4, 8, 12, 16, 20), num_classes=3)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_by_hand():
    widths = (64, 128, 256, 512, 1024)
    encoder = sum(10 * i * o + 9 * o**2 + 6 * o for i, o in zip((1, *widths), widths, strict=False))
    decoder = sum(38 * w**2 + 21 * w // 2 + 3 for w in widths[:-1])
    with torch.device("meta"):
        model = build()
    assert parameters(model.encoder) == encoder == 19_546_368
    assert parameters(model.encoder.blocks[-1]) == 14_686_208
    assert parameters(model) == encoder + decoder + 2 * 65 == 32_786_670


def test_every_skip_is_gated_by_the_state_at_its_size():
    model, seen = build(**SMALL).eval(), []
    for module in model.modules():
        if isinstance(module, AttentionGate):
            module.register_forward_hook(lambda gate, args, _: seen.append((gate, *args)))
    with torch.no_grad():
        model(torch.randn(1, 1, 32, 48))
    for (gate, skip, gating), width, divisor in zip(seen, (16, 12, 8, 4), (8, 4, 2, 1), strict=True):
        assert skip.shape == gating.shape == (1, width, 32 // divisor, 48 // divisor)
        assert gate.style == "additive" and gate.theta[0].out_channels == gate.phi[0].out_channels == width // 2


def test_encoder_describes_itself():
    encoder = ResidualUNetEncoder(in_channels=2, widths=(4, 6, 8))
    features = encoder(torch.randn(2, 2, 16, 24))
    assert [f.shape[1] for f in features] == encoder.feature_info.channels() == [4, 6, 8]
    assert [16 // f.shape[2] for f in features] == encoder.feature_info.reduction() == [1, 2, 4]


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_any_size_and_every_gradient(norm):
    model = build(**SMALL, in_channels=2, norm=norm)
    logits = model(torch.randn(2, 2, 37, 50))
    assert logits.shape == (2, 3, 37, 50)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_checkpointing_changes_no_gradient():
    model, image = build(**SMALL, norm="group"), torch.randn(1, 1, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(image).square().mean(), list(model.parameters())))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_exports():
    model, image = build(**SMALL).eval(), torch.randn(1, 1, 32, 48)
    with torch.no_grad():
        exported = torch.export.export(model, (image,)).module()(image)
        torch.testing.assert_close(exported, model(image), rtol=1e-4, atol=1e-5)


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match=r"two or more positive channel counts, got \[64\]"):
        build(widths=[64])
    with pytest.raises(ValueError, match=r"two or more positive channel counts, got \[8, 0\]"):
        build(widths=[8, 0])
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 2"):
        build(in_channels=0)
    with pytest.raises(ValueError, match="norm must be 'batch', 'instance' or 'group', got 'layer'"):
        build(norm="layer")
