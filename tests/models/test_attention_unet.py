"""Attention U-Net against the official CT network: parameters, checkpoint conversion, outputs; and its own promises."""

import copy
import importlib.util
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vision_gates.models import AttentionUNet
from vision_gates.models.attention_unet import checkpoint_filter_fn

FIXTURE = "attention_unet_ct_single_att_dsv_3d"
TINY = dict(widths=(4, 8, 8), num_classes=3)
# Batch normalisation sees two images, instance and group normalisation one.
VARIANTS = [
    dict(spatial_dims=2, norm="batch", deep_supervision="fused"),
    dict(spatial_dims=3, norm="instance", deep_supervision="none"),
    dict(spatial_dims=2, norm="group", deep_supervision="separate", gates_per_level=2),
    dict(spatial_dims=3, norm="batch", gate_style="additive", gate_levels=(1, 2)),
    dict(spatial_dims=2, norm="instance", gate_style="additive", gates_per_level=2, in_channels=2),
    dict(spatial_dims=2, norm="group", gate_levels=(1,), widths=(4, 8)),
    dict(spatial_dims=3, norm="group", gate_levels=(1,)),
    dict(spatial_dims=2, norm="batch", gate_levels=()),
]


def make(**kwargs) -> AttentionUNet:
    return AttentionUNet(**(TINY | kwargs))


def image_for(model: AttentionUNet, size: tuple[int, ...], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.in_channels, *size[: model.spatial_dims])


def ids(arguments) -> str | None:
    if not isinstance(arguments, dict):
        return None
    return "-".join(str(value) for value in arguments.values()).replace(" ", "")


def official_name(key: str) -> str:
    """The official name of one of our parameters, written independently of the conversion under test."""
    part, *rest = key.split(".")
    if part == "encoder":
        return ".".join([f"conv{rest[0]}", f"conv{int(rest[1]) + 1}", *rest[2:]])
    if part == "center":
        return ".".join(["center", f"conv{int(rest[0]) + 1}", *rest[1:]])
    if part == "gating":
        return ".".join(["gating", "conv1", *rest])
    if part == "decoder":
        return ".".join([f"up_concat{rest[0]}", "conv", f"conv{int(rest[1]) + 1}", *rest[2:]])
    if part == "heads":
        return ".".join([f"dsv{rest[0]}", *([] if rest[0] == "1" else ["dsv", "0"]), *rest[1:]])
    if part == "fuse":
        return ".".join(["final", *rest])
    assert part == "gates", key
    if rest[1] == "combine":
        return ".".join([f"attentionblock{rest[0]}", "combine_gates", *rest[2:]])
    tail = ["W" if name == "proj" else name for name in rest[3:]]
    return ".".join([f"attentionblock{rest[0]}", f"gate_block_{int(rest[2]) + 1}", *tail])


def test_official_checkpoint_gives_official_output(golden_folder):
    facts = json.loads((golden_folder / f"{FIXTURE}.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_weights", golden_folder / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    official = {key: torch.from_numpy(weights.tensor_for(key, tuple(shape))) for key, shape in facts["state"].items()}
    model = AttentionUNet(num_classes=4).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]
    model.load_state_dict(checkpoint_filter_fn({"model": official}, model), strict=True)
    probed = {}
    for name, module in {"center": model.center, "gate4": model.gates["4"], "gate2": model.gates["2"]}.items():
        module.register_forward_hook(lambda module, args, output, name=name: probed.update({name: output}))
    golden = np.load(golden_folder / f"{FIXTURE}.npz")
    with torch.inference_mode():
        output = model(torch.from_numpy(weights.image_for(FIXTURE, tuple(facts["input_shape"]))))
    for name, value in probed.items():
        head = torch.from_numpy(golden[f"head:{name}"])
        assert tuple(value.shape) == tuple(golden[f"shape:{name}"])
        assert (value.flatten()[:256] - head).abs().max() <= 2e-4 * head.abs().max(), name
        assert value.mean().item() == pytest.approx(golden[f"mean:{name}"].item(), rel=2e-4), name
        assert value.std().item() == pytest.approx(golden[f"std:{name}"].item(), rel=2e-4), name
    expected = torch.from_numpy(golden["output"])
    assert (output - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_names_are_the_fixtures(golden_folder):
    facts = json.loads((golden_folder / f"{FIXTURE}.json").read_text())
    with torch.device("meta"):
        model = AttentionUNet(num_classes=4)
    ours = {official_name(key): list(value.shape) for key, value in model.state_dict().items()}
    assert ours == facts["state"]


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(widths=(16, 32, 64, 128, 256)),
        dict(gates_per_level=2),
        dict(widths=(4, 6, 8, 10, 12, 14), spatial_dims=2, in_channels=3),
        dict(gate_levels=()),
    ],
    ids=ids,
)
def test_conversion_moves_every_value_to_its_place(arguments, wrapper):
    source, target = make(**arguments), make(**arguments)
    for value in source.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value)
    official = {f"module.{official_name(key)}": value for key, value in source.state_dict().items()}
    assert len(official) == len(source.state_dict())
    converted = checkpoint_filter_fn({wrapper: official} if wrapper else official, target)
    target.load_state_dict(converted, strict=True)
    for (key, value), loaded in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(loaded, value), key


@pytest.mark.parametrize(
    "arguments, parameters",
    [
        (dict(num_classes=4), 6_214_151),
        (dict(num_classes=4, gates_per_level=2), 6_473_322),
        (dict(num_classes=2, widths=(64, 128, 256, 512, 1024)), 99_322_717),
    ],
    ids=ids,
)
def test_parameter_count(arguments, parameters):
    with torch.device("meta"):
        model = AttentionUNet(**arguments)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters


@pytest.mark.parametrize("size", [(16, 8, 8), (17, 9, 5), (5, 6, 7), (1, 30, 2)], ids=str)
@pytest.mark.parametrize("arguments", VARIANTS, ids=ids)
def test_any_size(arguments, size):
    model = make(**arguments).eval()
    with torch.no_grad():
        output = model(image_for(model, size))
    assert output.shape == (2, 3, *size[: model.spatial_dims])
    assert output.isfinite().all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_padding_repeats_the_far_edges(spatial_dims):
    model = make(spatial_dims=spatial_dims).eval()
    image = image_for(model, (6, 11, 9))
    padded = image
    for axis, multiple in zip(range(2, 2 + spatial_dims), (8, 12, 12), strict=False):
        edge = padded.narrow(axis, padded.shape[axis] - 1, 1)
        padded = torch.cat([padded, *[edge] * (multiple - padded.shape[axis])], dim=axis)
    with torch.no_grad():
        window = (..., *(slice(n) for n in image.shape[2:]))
        torch.testing.assert_close(model(image), model(padded)[window])


@pytest.mark.parametrize("arguments", VARIANTS, ids=ids)
def test_gradients_reach_every_parameter(arguments):
    model = make(**arguments).train()
    output = model(image_for(model, (17, 12, 16)))
    outputs = output if isinstance(output, list) else [output]
    sum(logits.square().mean() for logits in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias that a normalisation takes away again has no gradient but rounding.
        assert name.endswith("bias") or parameter.grad.abs().max() > 0, name


def test_separate_supervision():
    model = make(deep_supervision="separate", spatial_dims=2, norm="group", widths=(4, 8, 8, 8))
    image = image_for(model, (21, 13))
    levels = model.train()(image)
    assert [tuple(logits.shape) for logits in levels] == [(2, 3, 21, 13)] * 3
    torch.testing.assert_close(model.eval()(image), levels[0])
    plain = make(deep_supervision="none", spatial_dims=2, norm="group", widths=(4, 8, 8, 8)).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    torch.testing.assert_close(plain(image), levels[0])


@pytest.mark.parametrize("arguments", VARIANTS[:4], ids=ids)
def test_hooks_collect_the_gate_maps(arguments):
    model = make(**arguments).eval()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(".map"):
            module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model(image_for(model, (16, 8, 12)))
    levels = arguments.get("gate_levels", (2,))
    gates = range(arguments.get("gates_per_level", 1))
    assert set(seen) == {f"gates.{level}.gates.{gate}.map" for level in levels for gate in gates}
    for name, gate_map in seen.items():
        stride = 2 ** (int(name.split(".")[1]) - 1)
        assert gate_map.shape == (2, 1, *(n // stride for n in (16, 8, 12)[: model.spatial_dims]))
        assert gate_map.min() >= 0 and gate_map.max() <= 1


def test_gates_of_a_level_are_concatenated_in_order():
    """Checkpoints of the official multi-attention network hold the combining weights in this order."""
    skip = make(spatial_dims=2, gates_per_level=2).eval().gates["2"]
    x, gating = torch.randn(1, 8, 6, 4), torch.randn(1, 8, 3, 2)
    weight, bias = skip.combine[0].weight, skip.combine[0].bias
    first, second = (gate(x, gating) for gate in skip.gates)
    mixed = nn.functional.conv2d(first, weight[:, :8], bias) + nn.functional.conv2d(second, weight[:, 8:])
    torch.testing.assert_close(skip(x, gating), skip.combine[1](mixed).relu())


def test_every_gate_matters():
    model = make(spatial_dims=2, norm="group", widths=(4, 8, 8, 8), gate_levels=(1, 2, 3), gates_per_level=2).eval()
    image = image_for(model, (16, 16))
    with torch.no_grad():
        expected = model(image)
        for level in "123":
            for gate in model.gates[level].gates:
                handle = gate.map.register_forward_hook(lambda module, args, output: 1 - output)
                assert (model(image) - expected).abs().max() > 1e-4
                handle.remove()


@pytest.mark.parametrize("arguments", VARIANTS[:4], ids=ids)
def test_state_dict_round_trip(arguments):
    model = make(**arguments).eval()
    other = make(**arguments).eval()
    image = image_for(model, (9, 8, 7))
    with torch.no_grad():
        expected = model(image)
        other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other), strict=True)
        assert torch.equal(other(image), expected)
        assert torch.equal(copy.deepcopy(model)(image), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), expected)


@pytest.mark.parametrize(
    "arguments, size",
    [
        (dict(spatial_dims=2, norm="batch"), (16, 8)),
        (dict(spatial_dims=2, norm="group", deep_supervision="separate", gates_per_level=2), (9, 7)),
        (dict(spatial_dims=3, norm="instance", gate_style="additive", gate_levels=(1,), widths=(4, 8)), (5, 4, 3)),
    ],
    ids=ids,
)
def test_compile_and_export(arguments, size):
    torch.compiler.reset()  # compiled graphs count per function, over all models of a process
    model = make(**arguments).eval()
    image = image_for(model, size)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected)
        torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)


def test_export_with_a_dynamic_batch():
    model = make(spatial_dims=2).eval()
    image = image_for(model, (9, 8), batch=3)
    program = torch.export.export(model, (image[:2],), dynamic_shapes={"x_BCS": {0: torch.export.Dim("batch")}})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image))


def test_compiled_training_step_is_the_eager_one():
    torch.compiler.reset()
    model = make(spatial_dims=2, norm="group", deep_supervision="separate", widths=(4, 8)).train()
    image = image_for(model, (9, 8))
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        sum(logits.square().mean() for logits in forward(image)).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(spatial_dims=4), "spatial_dims must be 2 or 3, got 4"),
        (dict(in_channels=0), "in_channels must be at least 1, got 0"),
        (dict(num_classes=0), "num_classes must be at least 1, got 0"),
        (dict(gates_per_level=0), "gates_per_level must be at least 1, got 0"),
        (dict(widths=(4,)), r"widths must be two or more positive channel counts, got \[4\]"),
        (dict(widths=(4, 0)), r"widths must be two or more positive channel counts, got \[4, 0\]"),
        (dict(gate_style="soft"), "gate_style must be 'grid' or 'additive', got 'soft'"),
        (dict(norm="layer"), "norm must be 'batch', 'instance' or 'group', got 'layer'"),
        (dict(deep_supervision=True), "deep_supervision must be 'none', 'fused' or 'separate', got True"),
        (dict(gate_levels=(2, 3)), r"gate_levels must be different levels from 1 \(finest\) to 2, got \[2, 3\]"),
        (dict(gate_levels=(0,)), r"gate_levels must be different levels from 1 \(finest\) to 2, got \[0\]"),
        (dict(gate_levels=(2, 2)), r"gate_levels must be different levels from 1 \(finest\) to 2, got \[2, 2\]"),
    ],
    ids=ids,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 8, 8), r"input must have 5 axes .*got shape \(1, 1, 8, 8\)"),
        ((1, 2, 8, 8, 8), "input must have 1 channels, got 2"),
        ((1, 1, 8, 0, 8), r"one position or more along every axis, got size \(8, 0, 8\)"),
    ],
)
def test_bad_inputs(shape, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(shape))


@pytest.mark.parametrize("norm, training, batch", [("batch", True, 1), ("instance", True, 2), ("instance", False, 2)])
def test_a_centre_of_one_position_is_refused_where_it_cannot_be_normalised(norm, training, batch):
    model = make(norm=norm, spatial_dims=2).train(training)
    with pytest.raises(ValueError, match=r"input of size \(3, 4\) leaves .* more than 4 positions"):
        model(torch.zeros(batch, 1, 3, 4))
    assert model(torch.zeros(batch, 1, 3, 5)).shape == (batch, 3, 3, 5)


@pytest.mark.parametrize("norm, training, batch", [("batch", True, 2), ("batch", False, 1), ("group", True, 1)])
def test_a_centre_of_one_position_works_elsewhere(norm, training, batch):
    model = make(norm=norm, spatial_dims=2).train(training)
    assert model(torch.zeros(batch, 1, 1, 2)).shape == (batch, 3, 1, 2)


# ------------------------------------------------------------------------------------------ encoders registered in timm


def test_encoder_levels_are_the_unets_and_the_last_joins_all():
    model = timm.create_model("vg_attention_unet_atto", in_chans=2, num_classes=3).eval()
    x = torch.randn(1, 2, 40, 50)
    with torch.no_grad():
        _, levels = model.forward_intermediates(x)
        *decoded, centre = model.unet.forward_levels(x)
        assert [tuple(level.shape[1:]) for level in levels[:-1]] == [
            (8, 40, 50),
            (16, 20, 25),
            (32, 10, 13),
            (64, 5, 7),
        ]
        for level, whole in zip(levels[:-1], decoded, strict=True):
            assert torch.equal(level, whole[..., : level.shape[2], : level.shape[3]])
        assert torch.equal(levels[-1][:, :128], centre)
        torch.testing.assert_close(levels[-1][:, 128:136, 1, 2], decoded[0][:, :, 16:32, 32:48].mean((2, 3)))
        assert levels[-1].shape == (1, 128 + 64 + 32 + 16 + 8, 3, 4)


def test_encoder_hears_every_gate():
    model = timm.create_model("vg_attention_unet_atto", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for level in ("2", "3", "4"):
            changed = copy.deepcopy(model)
            changed.unet.gates[level].gates[0].psi.bias.add_(3.0)
            assert (changed(x) - before).abs().max() > 1e-4
