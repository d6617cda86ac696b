"""AGUNet and DAUNet: sizes by hand, where gates, images and guides enter, any size, deep supervision, mistakes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vision_gates.models import AGUNet, AttentionUNet, DAUNet

BOTH = pytest.mark.parametrize("network", [AGUNet, DAUNet])
DIMS = pytest.mark.parametrize("spatial_dims", [2, 3])
WIDTHS = (16, 32, 64, 128, 256)


def make(network=AGUNet, **kwargs):
    return network(**(dict(widths=(4, 8, 12, 16), num_classes=3) | kwargs))


def image_for(model, size=(16, 24, 8), batch=2):
    return torch.randn(batch, model.in_channels, *size[: model.spatial_dims])


def outputs_of(modules: dict[str, nn.Module], model, image) -> dict[str, torch.Tensor]:
    """What submodules give while the model maps an image."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return seen


# ---------------------------------------------------------------- parameters, counted by hand


def conv(i: int, o: int, kernel: int) -> int:
    return i * o * kernel + o


def double_conv(i: int, o: int, kernel: int) -> int:
    return conv(i, o, kernel) + conv(o, o, kernel) + 2 * 2 * o


def encoder(kernel: int, images: bool = True) -> int:
    """1 channel -> 16 -> (image 32 +) 32 -> (image 64 +) 64 -> (image 128 +) 128 -> 256."""
    extra = (32, 64, 128) if images else (0, 0, 0)
    blocks = [(1, 16), (16 + extra[0], 32), (32 + extra[1], 64), (64 + extra[2], 128), (128, 256)]
    return sum(double_conv(*block, kernel) for block in blocks) + sum(conv(1, w, kernel) for w in extra if w)


def agunet(kernel: int, images: bool = True, heads: int = 4) -> int:
    total = encoder(kernel, images)
    for width in (16, 32, 64, 128):
        up = conv(2 * width, width, kernel) + 2 * width
        gate = 2 * (conv(width, width // 2, 1) + 2 * width // 2) + conv(width, 1, 1) + 2
        total += up + gate + double_conv(2 * width, width, kernel)
    return total + sum(conv(width, 2, 1) for width in (16, 32, 64, 128)[:heads])


def daunet(kernel: int, parts: int = 3) -> int:
    position_and_channel = 2 * 256 * 32 + 256 * 256 + 2
    refine = 2 * conv(256, 256, kernel) + 2 * 256
    total = encoder(kernel) + position_and_channel + 2 * refine + conv(256, 256, 1) + 2 * 256
    for width in (16, 32, 64, 128):
        guide = conv(256, width, 1) if parts == 3 else 0
        join = 2 * parts * width
        total += guide + conv(2 * width, width, kernel) + join + double_conv(parts * width, width, kernel)
    return total + sum(conv(width, 2, 1) for width in (16, 32, 64, 128))


@pytest.mark.parametrize(
    "network, arguments, by_hand, documented",
    [
        (AGUNet, {}, agunet(27), 7_085_300),
        (AGUNet, dict(spatial_dims=2), agunet(9), 2_380_820),
        (AGUNet, dict(spatial_dims=2, multi_scale_input=False), agunet(9, images=False), None),
        (AGUNet, dict(spatial_dims=2, deep_supervision="none"), agunet(9, heads=1), None),
        (DAUNet, {}, daunet(27), 14_940_890),
        (DAUNet, dict(spatial_dims=2), daunet(9), 5_126_138),
        (DAUNet, dict(attention_guiding=False), daunet(27, parts=2), 14_291_210),
    ],
)
def test_parameters_by_hand(network, arguments, by_hand, documented):
    with torch.device("meta"):
        model = network(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand
    assert documented is None or by_hand == documented
    if arguments in ({}, dict(spatial_dims=2)):
        assert f"{documented:,}" in network.__doc__


# ---------------------------------------------------------------- structure


@DIMS
def test_gates_stand_at_every_level_and_hooks_collect_their_maps(spatial_dims):
    model = make(spatial_dims=spatial_dims).eval()
    maps = {name: module for name, module in model.named_modules() if name.endswith(".map")}
    assert sorted(maps) == ["gates.1.map", "gates.2.map", "gates.3.map"]
    seen = outputs_of(maps, model, image_for(model, (13, 24, 9)))
    for name, gate_map in seen.items():
        stride = 2 ** (int(name.split(".")[1]) - 1)
        assert gate_map.shape == (2, 1, *(n // stride for n in (16, 24, 16)[:spatial_dims]))
        assert 0 <= gate_map.min() < gate_map.max() <= 1


@DIMS
def test_a_gate_is_driven_by_the_doubled_features_and_joins_them_second(spatial_dims):
    model, inputs = make(spatial_dims=spatial_dims).eval(), {}
    for name in ("gates.2", "decoder.2"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args}))
    names = ("encoder.blocks.2", "up.2", "gates.2", "decoder.3")
    seen = outputs_of({name: model.get_submodule(name) for name in names}, model, image_for(model))
    skip, gating = inputs["gates.2"]
    assert skip is seen["encoder.blocks.2"] and gating is seen["up.2"] and gating.min() >= 0
    assert torch.equal(inputs["decoder.2"][0], torch.cat([gating, seen["gates.2"]], dim=1))
    assert [2 * n for n in seen["decoder.3"].shape[2:]] == list(gating.shape[2:])


def test_every_gate_matters():
    model = make(spatial_dims=2, norm="group").eval()
    image = image_for(model)
    with torch.no_grad():
        expected = model(image)
        for gate in model.gates.values():
            handle = gate.map.register_forward_hook(lambda module, args, output: 1 - output)
            assert (model(image) - expected).abs().max() > 1e-4
            handle.remove()


@BOTH
@DIMS
def test_levels_between_finest_and_centre_see_the_shrunken_image_first(network, spatial_dims):
    model, inputs = make(network, spatial_dims=spatial_dims, in_channels=2).eval(), {}
    assert list(model.encoder.images) == ["2", "3"] and list(model.encoder.blocks) == ["1", "2", "3", "4"]
    for level, block in model.encoder.blocks.items():
        block.register_forward_pre_hook(lambda module, args, level=level: inputs.update({level: args[0]}))
    image = image_for(model)
    with torch.no_grad():
        model(image)
        pool = nn.functional.avg_pool2d if spatial_dims == 2 else nn.functional.avg_pool3d
        for level, width, stride in (("2", 8, 2), ("3", 12, 4)):
            seen = model.encoder.images[level](pool(image, stride))
            torch.testing.assert_close(inputs[level][:, :width], seen)
            assert inputs[level].shape[1] == width + {"2": 4, "3": 8}[level]
    assert inputs["1"].shape[1] == 2 and inputs["4"].shape[1] == 12
    plain = make(network, spatial_dims=spatial_dims, multi_scale_input=False)
    assert not plain.encoder.images and plain.encoder.blocks["2"][0][0].in_channels == 4


@DIMS
@pytest.mark.parametrize("guiding", [True, False])
def test_the_decoder_of_daunet_joins_guide_skip_and_doubled_features(spatial_dims, guiding):
    model, inputs = make(DAUNet, spatial_dims=spatial_dims, attention_guiding=guiding).eval(), {}
    model.join["1"].register_forward_pre_hook(lambda module, args: inputs.update(joined=args[0]))
    model.up["3"].register_forward_pre_hook(lambda module, args: inputs.update(centre=args[0]))
    modules = dict(attention=model.attention, skip=model.encoder.blocks["1"], up=model.up["1"])
    if guiding:
        modules["guide"] = model.guides["1"]
    seen = outputs_of(modules, model, image_for(model))
    assert inputs["centre"] is seen["attention"] and seen["attention"].shape[1] == 16
    parts = [seen["skip"], seen["up"]]
    if guiding:
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        parts.insert(0, nn.functional.interpolate(seen["guide"], scale_factor=8, mode=mode))
    torch.testing.assert_close(inputs["joined"], torch.cat(parts, dim=1))
    assert bool(model.guides) == guiding and not any(name.endswith(".map") for name, _ in model.named_modules())


# ---------------------------------------------------------------- behaviour


@BOTH
@pytest.mark.parametrize("size", [(16, 8, 8), (17, 9, 5), (1, 30, 2)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(spatial_dims=2, norm="batch", deep_supervision="none"),
        dict(spatial_dims=3, norm="instance"),
        dict(spatial_dims=2, norm="group", multi_scale_input=False, in_channels=2),
        dict(spatial_dims=3, norm="group", widths=(4, 8), dropout=0.2),
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_any_size(network, arguments, size):
    model = make(network, **arguments)
    image = image_for(model, size)
    with torch.no_grad():
        logits = model.eval()(image)
    assert logits.shape == (2, 3, *size[: model.spatial_dims]) and logits.isfinite().all()
    output = model.train()(image)
    levels = output if isinstance(output, list) else [output]
    assert len(levels) == (1 if model.deep_supervision == "none" else len(model.widths) - 1)
    assert all(level.shape == logits.shape for level in levels)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@BOTH
@DIMS
def test_gradients_reach_every_parameter(network, spatial_dims):
    model = make(network, spatial_dims=spatial_dims, widths=(4, 8, 16)).train()
    if network is DAUNet:  # they start at 0, which lets nothing through to what they multiply
        nn.init.ones_(model.attention.position.gamma)
        nn.init.ones_(model.attention.channel.gamma)
    levels = model(image_for(model, (17, 24, 16)))
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for name, parameter in model.named_parameters():
        # A bias that a normalisation takes away again has no gradient but rounding.
        assert name.endswith("bias") or parameter.grad.abs().max() > 0, name


@BOTH
def test_separate_supervision(network):
    no_dropout = dict(attention_dropout=0.0) if network is DAUNet else {}
    model = make(network, spatial_dims=2, norm="group", **no_dropout)
    image = image_for(model, (21, 13))
    levels = model.train()(image)
    assert [tuple(logits.shape) for logits in levels] == [(2, 3, 21, 13)] * 3
    torch.testing.assert_close(model.eval()(image), levels[0])
    plain = make(network, spatial_dims=2, norm="group", deep_supervision="none").eval()
    assert isinstance(plain.train()(image), torch.Tensor)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    torch.testing.assert_close(plain.eval()(image), levels[0])


@BOTH
def test_dropout_only_in_training(network):
    model = make(network, spatial_dims=2, norm="group", dropout=0.5, deep_supervision="none")
    image = image_for(model)
    assert not torch.equal(model.train()(image), model(image))
    assert torch.equal(model.eval()(image), model(image))
    assert sum(isinstance(layer, nn.Dropout2d) for layer in model.encoder.modules()) == 8


@BOTH
def test_copies_and_compiled_and_exported_networks_are_equal(network):
    torch.compiler.reset()
    model = make(network, spatial_dims=2, widths=(4, 8, 8)).eval()
    image = image_for(model, (9, 12))
    with torch.no_grad():
        expected = model(image)
        assert torch.equal(copy.deepcopy(model)(image), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), expected)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected)
        torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)


# ---------------------------------------------------------------- mistakes


@BOTH
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(spatial_dims=4), "spatial_dims must be 2 or 3, got 4"),
        (dict(in_channels=0), "in_channels must be at least 1, got 0"),
        (dict(widths=(4,)), r"widths must be two or more positive channel counts, got \[4\]"),
        (dict(norm="layer"), "norm must be 'batch', 'instance' or 'group', got 'layer'"),
        (dict(deep_supervision="fused"), "deep_supervision must be 'none' or 'separate', got 'fused'"),
        (dict(dropout=1.5), "dropout must be from 0 up to, not including, 1, got 1.5"),
    ],
)
def test_bad_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(network, **arguments)


@BOTH
def test_bad_inputs(network):
    model = make(network, spatial_dims=2)
    with pytest.raises(ValueError, match=r"input must have 4 axes .*got shape \(1, 1, 8, 8, 8\)"):
        model(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="input must have 1 channels, got 2"):
        model(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"input of size \(3, 4\) leaves .* more than 8 positions"):
        model.train()(torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("network", [AGUNet, DAUNet, AttentionUNet])
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_rank_are_one_error(network, strict):
    flat, deep = (make(network, spatial_dims=dims) for dims in (2, 3))
    with pytest.raises(
        ValueError, match=rf"^weights of a 3-D network do not fit this 2-D {network.__name__}: "
    ) as error:
        flat.load_state_dict(deep.state_dict(), strict=strict)
    assert "\n" not in str(error.value) and "build it with spatial_dims=3" in str(error.value)
    with pytest.raises(ValueError, match=rf"^weights of a 2-D network do not fit this 3-D {network.__name__}: "):
        nn.Sequential(deep).load_state_dict({f"0.{key}": value for key, value in flat.state_dict().items()})
    assert not flat.load_state_dict(make(network, spatial_dims=2).state_dict()).missing_keys
