"""The registry of whole networks: every file in networks/ is one, and mistakes name the nearest."""

import pytest
import torch

from vision_gates.models import AGUNet, AttentionUNet, DAUNet, HorNetUNet
from vision_gates.networks import available_networks, create_network, describe_network, network_options

# Small enough for a test; what these do not shrink is.
SMALL = {
    "agunet": dict(widths=(4, 8, 8)),
    "daunet": dict(widths=(4, 8, 8)),
    "attention_unet": dict(widths=(4, 8, 8)),
    "attention_resunet": dict(widths=(4, 8, 8)),
    "ear_unet": dict(encoder="test_resnet", channels=4, max_channels=8),
    "hornet_unet": dict(widths=(4, 8, 8)),
}


def test_names_are_files():
    assert set(SMALL) <= set(available_networks())


@pytest.mark.parametrize("name", available_networks())
def test_every_network_keeps_the_contract(name):
    model = create_network(name, in_channels=2, num_classes=3, **SMALL.get(name, {}))
    image = torch.randn(2, 2, 33, 40)
    outputs = model.train()(image)
    assert {tuple(output.shape) for output in (outputs if isinstance(outputs, list) else [outputs])} == {(2, 3, 33, 40)}
    with torch.no_grad():
        logits = model.eval()(image)
    assert logits.shape == (2, 3, 33, 40) and logits.isfinite().all()
    options = network_options(name)
    assert options and not {"in_channels", "num_classes", "self"} & set(options)
    about = describe_network(name)
    assert about.endswith(".") and 20 < len(about) < 120


@pytest.mark.parametrize(
    "name, kind",
    [("agunet", AGUNet), ("daunet", DAUNet), ("attention_unet", AttentionUNet), ("hornet_unet", HorNetUNet)],
)
def test_those_for_volumes_are_flat_unless_told(name, kind):
    flat = create_network(name, in_channels=1, num_classes=2, **SMALL[name])
    deep = create_network(name, in_channels=1, num_classes=2, spatial_dims=3, **SMALL[name])
    assert (type(flat), flat.spatial_dims) == (kind, 2)
    assert (type(deep), deep.spatial_dims) == (kind, 3)
    assert {"spatial_dims", "widths", "norm", "deep_supervision"} <= set(network_options(name))


def test_mistakes():
    size = dict(in_channels=1, num_classes=2)
    with pytest.raises(ValueError, match=r"network 'agnet' is unknown \(did you mean 'agunet'\?\); known: agunet, "):
        create_network("agnet", **size)
    with pytest.raises(
        ValueError, match=r"network 'agunet' has no option 'width' \(did you mean 'widths'\?\); known: "
    ):
        create_network("agunet", **size, width=(4, 8))
    with pytest.raises(ValueError, match="network '__init__' is unknown"):
        network_options("__init__")
    with pytest.raises(ValueError, match="widths must be two or more"):
        create_network("agunet", **size, widths=(4,))
