"""EAR-U-Net: its size by hand, gates on four skips and on the image, any image size."""

import pytest
import torch

from vision_gates.gates import AttentionGate
from vision_gates.networks.ear_unet import build

SMALL = dict(encoder="test_efficientnet", channels=4, max_channels=16)
LEVELS = [(448, 512, 160), (512, 256, 56), (256, 128, 32), (128, 64, 24), (64, 32, 1)]  # channels in, width, skip


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return build().eval()


def test_parameters_by_hand(full_size):
    encoder = 19_341_616 - 1_793_000 - 806_400 - 864
    decoder = sum(4 * u * w + 19 * w**2 + 11 * s * w + s**2 + 7 * (s + w) + 3 for u, w, s in LEVELS)
    assert parameters(full_size.encoder) == encoder == 16_741_352
    assert decoder == 9_408_647
    assert parameters(full_size) == encoder + decoder + 2 * 33 == 26_150_065


def test_gates_on_every_skip_and_on_the_image(full_size):
    seen = []
    for module in full_size.modules():
        if isinstance(module, AttentionGate):
            module.register_forward_hook(lambda gate, args, _: seen.append((gate, *args)))
    assert full_size(torch.empty(1, 1, 64, 96, device="meta")).shape == (1, 2, 64, 96)
    for (gate, skip, gating), (_, width, channels), stride in zip(seen, LEVELS, (16, 8, 4, 2, 1), strict=True):
        assert skip.shape == (1, channels, 64 // stride, 96 // stride)
        assert gating.shape == (1, width, 64 // stride, 96 // stride)
        assert gate.theta[0].out_channels == gate.phi[0].out_channels == channels  # the whole width, not half
    assert not any(block.relu_after_sum for block in full_size.decoder.blocks)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_any_size_and_every_gradient(norm):
    model = build(**SMALL, in_channels=2, num_classes=3, norm=norm)
    logits = model(torch.randn(2, 2, 37, 50))
    assert logits.shape == (2, 3, 37, 50)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_other_encoders():
    """Any timm encoder: here one of stride 4, whose state reaches the image by a 4x4 transposed convolution."""
    model = build(encoder="vg_hornet_atto", channels=4).eval()
    assert model.decoder.ups[-1].kernel_size == (4, 4)
    with torch.no_grad():
        assert model(torch.randn(1, 1, 33, 47)).shape == (1, 2, 33, 47)


def test_exports():
    model, image = build(**SMALL).eval(), torch.randn(1, 1, 64, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (image,)).module()(image)
        torch.testing.assert_close(exported, model(image), rtol=1e-4, atol=1e-5)
