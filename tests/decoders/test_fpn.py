"""HorFPN; what every decoder promises is in tests/test_segmenter.py."""

import pytest
import torch

from vision_gates.decoders.fpn import FPNDecoder
from vision_gates.gates import GnConv
from vision_gates.segmenter import create_segmenter

PLACES = ["levels", "fusion", "both", "none"]


def decoder_of(levels=3, **options):
    facts = dict(encoder_channels=[6] * levels, encoder_reductions=[4 * 2**i for i in range(levels)])
    return FPNDecoder(**facts, in_chans=3, num_classes=5, **(dict(channels=8) | options)).eval()


@pytest.mark.parametrize("encoder", ["vg_hornet_atto", "resnet10t"])
@pytest.mark.parametrize("gnconv", PLACES)
def test_encoders_at_odd_sizes(encoder, gnconv):
    decoder = {"type": "fpn", "channels": 16, "gnconv": gnconv, "order": 3, "kernel_size": 5}
    model = create_segmenter(encoder, num_classes=2, decoder=decoder).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 47)).shape == (1, 2, 33, 47)
    logits = model.train()(torch.randn(2, 3, 50, 64))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("gnconv", "expected"),
    [
        ("levels", ["outputs.0.0.layer", "outputs.1.0.layer", "outputs.2.0.layer"]),
        ("fusion", ["fusion.1.layer"]),
        ("both", ["outputs.0.0.layer", "outputs.1.0.layer", "outputs.2.0.layer", "fusion.1.layer"]),
        ("none", []),
    ],
)
def test_where_gnconv_stands(gnconv, expected):
    gates = {name: gate for name, gate in decoder_of(gnconv=gnconv).named_modules() if isinstance(gate, GnConv)}
    assert list(gates) == expected
    for gate in gates.values():
        assert gate.widths == [4, 8] and gate.scale == 1.0 and gate.spatial_filter.kernel_size == (7, 7)


def test_levels_are_added_top_down():
    """The finest output sees the coarsest level, the coarsest output its own level alone; both reach the fusion."""
    decoder, seen = decoder_of(), {}
    for i, output in enumerate(decoder.outputs):
        output.register_forward_hook(lambda _, args, __, i=i: seen.setdefault(i, []).append(args[0]))
    fine, middle, coarse = (torch.randn(1, 6, n, n) for n in (16, 8, 4))
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for features in ([fine, middle, coarse], [fine, middle, -coarse], [-fine, middle, coarse]):
            decoder(features, image)
    (fine_0, fine_1, _), _, (coarse_0, coarse_1, coarse_2) = (seen[i] for i in range(3))
    assert not torch.allclose(fine_0, fine_1) and not torch.allclose(coarse_0, coarse_1)
    assert torch.equal(coarse_0, coarse_2)
    # The sum: laterals are linear, and interpolation keeps a constant.
    ones = [torch.ones_like(level) for level in (fine, middle, coarse)]
    with torch.no_grad():
        decoder(ones, image)
        expected = sum(lateral(level)[..., :1, :1] for lateral, level in zip(decoder.laterals, ones, strict=True))
    torch.testing.assert_close(seen[0][-1], expected.expand_as(seen[0][-1]))


@pytest.mark.parametrize("gnconv", PLACES)
def test_one_level_is_enough(gnconv):
    with torch.no_grad():
        assert decoder_of(1, gnconv=gnconv)([torch.randn(1, 6, 4, 4)], torch.zeros(1, 3, 16, 16)).shape == (
            1,
            5,
            16,
            16,
        )


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="at least one encoder level, got none"):
        decoder_of(0)
    with pytest.raises(ValueError, match="channels must be at least 4, got 2"):
        decoder_of(channels=2)
    with pytest.raises(ValueError, match=r"channels must be a multiple of 2\^\(order-1\) = 8 for order 4, got 12"):
        decoder_of(channels=12, order=4)
    with pytest.raises(ValueError, match="gnconv must be 'levels', 'fusion', 'both' or 'none', got 'all'"):
        decoder_of(gnconv="all")
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        decoder_of(order=0)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        decoder_of(kernel_size=4)
    assert decoder_of(channels=9, gnconv="none").classifier.in_channels == 9  # without gnConv any width will do
