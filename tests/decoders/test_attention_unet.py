"""The gated decoder; what every decoder promises is in tests/test_segmenter.py."""

import pytest
import torch

from vision_gates.gates import AttentionGate
from vision_gates.segmenter import create_segmenter

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def gated(encoder="vg_vig_h_atto", **options):
    return create_segmenter(encoder, num_classes=2, decoder={"type": "attention_unet", "channels": 8, **options}).eval()


@pytest.mark.parametrize("style", ["grid", "additive"])
def test_maps_show_what_each_gate_let_through(style):
    model, maps = gated(style=style), {}
    for name, module in model.named_modules():
        if name.endswith(".map"):
            module.register_forward_hook(lambda _, __, output, name=name: maps.update({name: output}))
    with torch.no_grad():
        model(IMAGE)
    sizes = [(4, 6), (8, 12), (16, 24), (32, 48), (64, 96)]  # three skips of the encoder's four levels, then the image
    assert list(maps) == [f"decoder.gates.{i}.map" for i in range(5)]
    assert [tuple(gate_map.shape[2:]) for gate_map in maps.values()] == sizes
    assert all(((gate_map >= 0) & (gate_map <= 1)).all() for gate_map in maps.values())


def test_closed_gates_stop_every_skip():
    """With psi at minus infinity the logits know the image through the coarsest level alone."""
    model = gated(detail_channels=0)
    gates = [module for module in model.modules() if isinstance(module, AttentionGate)]
    features = [torch.randn(1, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate((32, 64, 96, 128))]
    others = [torch.randn_like(feature) for feature in features[:3]] + features[3:]
    image = IMAGE[:1]
    with torch.no_grad():
        assert not torch.allclose(model.decoder(features, image), model.decoder(others, image))
        for gate in gates:
            gate.psi.bias.fill_(-1e4)
        torch.testing.assert_close(model.decoder(features, image), model.decoder(others, image))


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="at least 2 encoder levels, got 1: .*out_indices"):
        create_segmenter("vg_vig_h_atto", num_classes=2, decoder={"type": "attention_unet"}, out_indices=(3,))
    with pytest.raises(ValueError, match="style must be 'grid', 'additive' or 'concat', got 'soft'"):
        gated(style="soft")
    with pytest.raises(ValueError, match="at least 4, got 2, 256 and 16"):
        gated(channels=2)
