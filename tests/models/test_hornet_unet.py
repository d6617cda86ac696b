"""HorNet U-Net: sizes by hand, what stands where, thin volumes, any size, a slice in 2-D and 3-D, mistakes."""

import copy

import pytest
import torch
from torch import nn

from vision_gates.gate_maps import collect_gate_maps
from vision_gates.gates import GnConv
from vision_gates.models import HorNetUNet

DIMS = pytest.mark.parametrize("spatial_dims", [2, 3])


def make(**kwargs) -> HorNetUNet:
    return HorNetUNet(**(dict(widths=(4, 8, 16), num_classes=3, kernel_size=3) | kwargs))


def image_for(model, size=(8, 12, 16), batch=2):
    return torch.randn(batch, model.in_channels, *size[: model.spatial_dims])


# ---------------------------------------------------------------- parameters, counted by hand


def conv(i: int, o: int, taps: int) -> int:
    return i * o * taps + o


def block(dim: int, order: int, taps: int) -> int:
    widths = [dim // 2**i for i in reversed(range(order))]
    filtered = sum(widths)
    gnconv = conv(dim, widths[0] + filtered, 1) + filtered * (taps + 1) + conv(dim, dim, 1)
    gnconv += sum(conv(narrow, wide, 1) for narrow, wide in zip(widths, widths[1:], strict=False))
    mlp = conv(dim, 4 * dim, 1) + conv(4 * dim, dim, 1)
    return 2 * 2 * dim + gnconv + mlp + 2 * dim


def network(dims: int, kernel: int, widths=(32, 64, 128, 256, 320), depths=(1, 2, 2, 2, 2), orders=(2, 3, 4, 5, 5)):
    total = conv(1, widths[0], 3**dims)
    for width, depth, order in zip(widths, depths, orders, strict=True):
        total += depth * block(width, order, kernel**dims) + 2 * width
    for width, coarser in zip(widths, widths[1:], strict=False):
        decoder = conv(width + coarser, width, 3**dims) + conv(width, width, 3**dims) + 2 * 2 * width
        total += conv(width, coarser, 2**dims) + decoder + conv(width, 2, 1)
    return total


@pytest.mark.parametrize(
    ("arguments", "by_hand", "documented"),
    [
        ({}, network(3, 5), 13_887_112),
        (dict(spatial_dims=2), network(2, 7), 7_777_896),
        (dict(kernel_size=3, depths=1), network(3, 3, depths=(1,) * 5), None),
        (dict(widths=(16, 32), orders=(1, 4), depths=(3, 1)), network(3, 5, (16, 32), (3, 1), (1, 4)), None),
    ],
    ids=["3d", "2d", "kernel-depths", "widths-orders"],
)
def test_parameters_by_hand(arguments, by_hand, documented):
    with torch.device("meta"):
        model = HorNetUNet(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand
    if documented:
        assert by_hand == documented and f"{documented:,}" in HorNetUNet.__doc__


# ---------------------------------------------------------------- structure


@DIMS
def test_levels_orders_and_kernels(spatial_dims):
    model = HorNetUNet(spatial_dims=spatial_dims, widths=(4, 8, 16, 32, 16), depths=(1, 2, 1, 1, 1))
    gates = {name: gate for name, gate in model.named_modules() if isinstance(gate, GnConv)}
    assert [len(gate.widths) for gate in gates.values()] == [2, 3, 3, 4, 5, 5]
    side = 7 if spatial_dims == 2 else 5
    for gate in gates.values():
        assert gate.spatial_dims == spatial_dims and gate.scale == 1 / 3
        assert gate.spatial_filter.kernel_size == (side,) * spatial_dims
    assert list(gates)[1:3] == ["encoder.2.0.gnconv", "encoder.2.1.gnconv"]


@DIMS
def test_the_decoder_joins_the_normalised_skip_and_what_comes_from_below(spatial_dims):
    model, seen = make(spatial_dims=spatial_dims).eval(), {}
    for name in ("encoder.1", "encoder.3", "decoder.1", "decoder.2", "down.1"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.no_grad():
        model(image_for(model))
    skip, below = seen["encoder.1"][1].movedim(-1, 1), seen["decoder.2"][1]
    mode = "bilinear" if spatial_dims == 2 else "trilinear"
    joined = torch.cat([skip, nn.functional.interpolate(below, scale_factor=2, mode=mode)], dim=1)
    torch.testing.assert_close(seen["decoder.1"][0], joined)
    assert torch.equal(seen["down.1"][0], skip)
    torch.testing.assert_close(skip.mean(1), torch.zeros_like(skip[:, 0]), atol=1e-5, rtol=0)
    centre = seen["encoder.3"][1].movedim(-1, 1)
    torch.testing.assert_close(
        seen["decoder.2"][0][:, 8:], nn.functional.interpolate(centre, scale_factor=2, mode=mode)
    )


def test_thin_volumes_keep_their_slices():
    model, shapes = make(strides=[(1, 2, 2), [1, 2, 4]]).eval(), []
    assert model.divisors == (1, 4, 8)
    for level in model.encoder.values():
        level.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:-1])))
    image = image_for(model, (3, 10, 21))
    with torch.no_grad():
        assert model(image).shape == (2, 3, 3, 10, 21)
    assert shapes == [(3, 12, 24), (3, 6, 12), (3, 3, 3)]
    maps = collect_gate_maps(model, image)
    assert [tuple(m.values.shape[1:]) for m in maps] == [
        (2, 3, 12, 24), (3, 3, 6, 12), (3, 3, 6, 12), (4, 3, 3, 3), (4, 3, 3, 3)
    ]  # fmt: skip


def test_every_gate_matters():
    model = make(spatial_dims=2, norm="group").eval()
    image = image_for(model)
    with torch.no_grad():
        expected = model(image)
        for gate in [module for module in model.modules() if isinstance(module, GnConv)]:
            handle = gate.spatial_filter.register_forward_hook(lambda module, args, output: -output)
            assert (model(image) - expected).abs().max() > 1e-5
            handle.remove()


# ---------------------------------------------------------------- behaviour


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_a_single_slice_is_the_same_in_2d_and_3d(norm):
    """In a volume of one slice, kernels reach it with their middle plane only."""
    deep = make(strides=[(1, 2, 2), (1, 2, 2)], norm=norm).double().eval()
    flat = make(spatial_dims=2, norm=norm).double().eval()
    own = flat.state_dict()
    for key, value in deep.state_dict().items():
        own[key] = value if value.ndim == own[key].ndim else value[:, :, value.shape[2] // 2]
    flat.load_state_dict(own)
    image = torch.randn(2, 1, 9, 14, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(deep(image.unsqueeze(2)).squeeze(2), flat(image))


@pytest.mark.parametrize("size", [(8, 8, 4), (9, 5, 3), (1, 10, 2), (1, 2, 1)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(spatial_dims=2, norm="batch", deep_supervision="none"),
        dict(spatial_dims=3, norm="instance"),
        dict(spatial_dims=2, norm="group", deep_supervision="fused", in_channels=2),
        dict(spatial_dims=3, norm="batch", strides=[(2, 1, 2), 3], drop_path_rate=0.2),
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_any_size_and_gradients_reach_every_parameter(arguments, size):
    model = make(**arguments)
    image = image_for(model, size, batch=1)
    with torch.no_grad():
        logits = model.eval()(image)
    assert logits.shape == (1, 3, *size[: model.spatial_dims]) and logits.isfinite().all()
    output = model.train()(image)
    levels = output if isinstance(output, list) else [output]
    assert len(levels) == (2 if model.deep_supervision == "separate" else 1)
    assert all(level.shape == logits.shape for level in levels)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias that a normalisation takes away again has no gradient but rounding; a dropped block has none at all.
        if size == (8, 8, 4) and not name.endswith("bias") and "drop_path_rate" not in arguments:
            assert parameter.grad.abs().max() > 0, name


@DIMS
def test_the_same_seed_gives_the_same_network(spatial_dims):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = make(spatial_dims=spatial_dims).eval()
        results.append(model(torch.ones(1, 1, 8, 8, 8)[(slice(None),) * 2 + (0,) * (3 - spatial_dims)]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_separate_supervision_and_checkpointing():
    model = make(spatial_dims=2, norm="group", drop_path_rate=0.0)
    image = image_for(model, (13, 9))
    levels = model.train()(image)
    torch.testing.assert_close(model.eval()(image), levels[0])
    again = copy.deepcopy(model).train()
    again.set_grad_checkpointing()
    for network in (model.train(), again):
        sum(level.square().sum() for level in network(image)).backward()
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_compiled_and_exported_networks_are_equal():
    torch.compiler.reset()
    model = make(spatial_dims=2, widths=(4, 8)).eval()
    image = image_for(model, (9, 12))
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected)
        torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)


def test_it_learns():
    """A bright square on noise, in 25 updates."""
    model = make(spatial_dims=2, widths=(8, 16), num_classes=2, deep_supervision="none").train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        image, target = torch.randn(4, 1, 16, 16), torch.zeros(4, 16, 16, dtype=torch.long)
        top, left = (int(n) for n in torch.randint(0, 8, (2,)))
        target[:, top : top + 7, left : left + 7] = 1
        loss = nn.functional.cross_entropy(model(image + 2 * target.unsqueeze(1)), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(spatial_dims=4), "spatial_dims must be 2 or 3, got 4"),
        (dict(widths=(4,)), r"widths must be two or more positive channel counts, got \[4\]"),
        (dict(widths=(4, 8, 10)), r"dim must be a multiple of 2\^\(order-1\) = 8 for order 4, got 10"),
        (dict(depths=(1, 1)), r"depths must be one positive number for each of 3 levels, got \[1, 1\]"),
        (dict(depths=0), r"depths must be one positive number for each of 3 levels, got \[0, 0, 0\]"),
        (dict(orders=(2, 0, 2)), r"orders must be one positive number for each of 3 levels, got \[2, 0, 2\]"),
        (dict(kernel_size=4), "kernel_size must be odd and positive"),
        (dict(norm="layer"), "norm must be 'batch', 'instance' or 'group', got 'layer'"),
        (dict(deep_supervision="some"), "deep_supervision must be 'none', 'fused' or 'separate', got 'some'"),
        (dict(strides=[2]), r"strides must be 2, one from each of 3 levels to the next: .* got \[2\]"),
        (dict(strides=[2, 1]), r"strides must be 2, .* not all 1; got \[2, 1\]"),
        (dict(strides=[2, (1, 2)]), r"or 3 numbers of at least 1 that are not all 1; got \[2, \(1, 2\)\]"),
        (dict(strides=[2, (0, 2, 2)]), "strides must be 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_bad_inputs():
    model = make(spatial_dims=2)
    with pytest.raises(ValueError, match=r"input must have 4 axes .*got shape \(1, 1, 8, 8, 8\)"):
        model(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="input must have 1 channels, got 2"):
        model(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="norm 'instance' cannot normalise the single position"):
        model(torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="weights of a 3-D network do not fit this 2-D HorNetUNet"):
        model.load_state_dict(make().state_dict())
