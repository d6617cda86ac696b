"""The residual gated decoder; what every decoder promises is in tests/test_segmenter.py."""

import pytest
import torch

from vision_gates.decoders.residual_attention import ResidualAttentionDecoder, ResidualBlock
from vision_gates.segmenter import create_segmenter

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def segmenter(encoder="vg_vig_h_atto", **options):
    decoder = {"type": "residual_attention", "channels": 8, **options}
    return create_segmenter(encoder, num_classes=2, decoder=decoder).eval()


def decoder_of(reductions, *, width=4, **options):
    facts = dict(encoder_channels=[width] * len(reductions), encoder_reductions=reductions, in_chans=1, num_classes=3)
    return ResidualAttentionDecoder(**facts, **(dict(channels=8) | options)).eval()


@pytest.mark.parametrize("encoder", ["vg_hornet_atto", "resnet10t"])
@pytest.mark.parametrize("options", [{}, dict(gate_image=False, norm="group", gate_share=1, relu_after_sum=False)])
def test_encoders_at_odd_sizes(encoder, options):
    model = segmenter(encoder, **options)
    with torch.no_grad():
        for size in [(33, 47), (50, 96)]:
            assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)
    logits = model.train()(IMAGE)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("gate_image", [True, False])
@pytest.mark.parametrize("reductions", [(1, 2, 4), (2, 4, 8), (4, 8, 16), (16, 16, 16), (8, 12, 24)])
def test_any_strides(reductions, gate_image):
    features = [torch.randn(1, 4, 48 // r, 96 // r) for r in reductions]
    with torch.no_grad():
        logits = decoder_of(reductions, gate_image=gate_image)(features, torch.randn(1, 1, 48, 96))
    assert logits.shape == (1, 3, 48, 96)


def test_kernels_are_the_ratios_of_strides():
    ups = decoder_of((4, 8, 8, 16)).ups
    assert [up.kernel_size for up in ups] == [up.stride for up in ups] == [(2, 2), (1, 1), (2, 2), (4, 4)]


def test_state_comes_up_at_its_own_scale():
    """Whatever the kernel, so that a fresh network hears the state beside the skip."""
    for up in decoder_of((2, 4, 4, 64), width=64, channels=64).ups:
        assert 0.7 < up(torch.randn(1, up.in_channels, 8, 8)).std() < 1.4


@pytest.mark.parametrize("relu_after_sum", [True, False])
def test_block_is_its_formula(relu_after_sum):
    """Zero weights in the second normalisation leave the shortcut: itself where the width stays, with ReLU or not."""
    x = torch.randn(2, 6, 5, 7)
    block = ResidualBlock(6, 6, relu_after_sum=relu_after_sum)
    torch.nn.init.zeros_(block.convs[-1].weight)
    torch.testing.assert_close(block(x), x.relu() if relu_after_sum else x)
    assert ResidualBlock(6, 4, relu_after_sum=relu_after_sum)(x).shape == (2, 4, 5, 7)


def test_maps_show_what_each_gate_let_through():
    model, maps = segmenter(), {}
    for name, module in model.named_modules():
        if name.endswith(".map"):
            module.register_forward_hook(lambda _, __, output, name=name: maps.update({name: output}))
    with torch.no_grad():
        model(IMAGE)
    sizes = [(4, 6), (8, 12), (16, 24), (64, 96)]  # three skips of the encoder's four levels, then the image
    assert list(maps) == [f"decoder.gates.{i}.map" for i in range(4)]
    assert [tuple(gate_map.shape) for gate_map in maps.values()] == [(2, 1, *size) for size in sizes]
    assert all(((gate_map >= 0) & (gate_map <= 1)).all() for gate_map in maps.values())


def test_closed_gates_stop_every_skip():
    """With psi at minus infinity the logits know the coarsest level alone: not the finer ones, not the image."""
    decoder = decoder_of((2, 4, 8))
    features = [torch.randn(1, 4, 32 // r, 32 // r) for r in (2, 4, 8)]
    others = [torch.randn_like(feature) for feature in features[:2]] + features[2:]
    image, other = torch.randn(2, 1, 1, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(decoder(features, image), decoder(others, image))
        assert not torch.allclose(decoder(features, image), decoder(features, other))
        for gate in decoder.gates:
            gate.psi[-1].bias.fill_(-1e4)
        torch.testing.assert_close(decoder(features, image), decoder(others, other))
        assert not torch.allclose(decoder(features, image), decoder([*others[:2], -features[2]], image))


def test_widths_and_gates_follow_the_options():
    decoder = decoder_of((2, 4, 8, 16), width=10, channels=8, max_channels=16, gate_share=0.5)
    assert [up.out_channels for up in decoder.ups] == [16, 16, 16, 8]
    assert [gate.theta[0].out_channels for gate in decoder.gates] == [5, 5, 5, 1]
    decoder = decoder_of((2, 4, 8), width=10, widths=(5, 6, 7), gate_share=1)
    assert [up.out_channels for up in decoder.ups] == [7, 6, 5]
    assert [gate.theta[0].out_channels for gate in decoder.gates] == [10, 10, 1]


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="at least 2 encoder levels, got 1: .*out_indices"):
        decoder_of((4,), gate_image=False)
    with pytest.raises(ValueError, match="at least one encoder level, got none"):
        decoder_of(())
    with pytest.raises(ValueError, match=r"fine to coarse, got reductions \[8, 4\]"):
        decoder_of((8, 4))
    with pytest.raises(ValueError, match=r"3 widths of at least 1 .* got \[0, 0, 0\]"):
        decoder_of((2, 4, 8), channels=0)
    with pytest.raises(ValueError, match=r"3 widths of at least 1 .* got \[8, 16\]"):
        decoder_of((2, 4, 8), widths=(8, 16))
    with pytest.raises(ValueError, match="gate_share must be positive, got 0"):
        decoder_of((2, 4), gate_share=0)
    with pytest.raises(ValueError, match="norm must be 'batch', 'instance' or 'group', got 'layer'"):
        decoder_of((2, 4), norm="layer")
