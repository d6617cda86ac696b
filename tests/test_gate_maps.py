"""Gate maps: values by hand for each gate, names and order, and a forward pass that is not changed by being watched."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vision_gates  # noqa: F401  registers the models
from vision_gates.decoders import available_decoders
from vision_gates.gate_maps import collect_gate_maps, gates_of, record_gate_maps
from vision_gates.gates import (
    AttentionGate,
    BidirectionalGatedLinearAttention,
    GatedPositionalSelfAttention,
    GnConv,
)
from vision_gates.models.attention_unet import AttentionUNet
from vision_gates.networks import available_networks, create_network
from vision_gates.segmenter import create_segmenter


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# ---------------------------------------------------------------- values


def test_attention_gate_by_hand():
    gate = AttentionGate(4, 6, style="additive", norm="group").double().eval()
    x, gating = torch.randn(2, 4, 5, 7).double(), torch.randn(2, 6, 5, 7).double()
    expected = gate.psi(F.relu(gate.theta(x) + gate.phi(gating))).sigmoid()
    (found,) = collect_gate_maps(gate, x, gating)
    torch.testing.assert_close(found.values, expected.float())
    assert (found.name, found.kind, found.labels) == ("", "attention gate", ("map",))
    torch.testing.assert_close(gate(x, gating), found.values.double() * x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [False, True])
def test_locality_gate_by_hand(activation):
    mixer = BidirectionalGatedLinearAttention(8, num_heads=2, activation=activation)
    mixer.init_weights()
    nn.init.normal_(mixer.gate_bias)
    x = torch.randn(2, 3, 5, 8)
    local = mixer.local_conv(x.permute(0, 3, 1, 2))
    local = (F.silu(local) if activation else local).permute(0, 2, 3, 1)
    q, k, v = 4, 4, 8
    logits = local @ mixer.in_proj.weight[q + k + v : q + k + v + 8].T + mixer.gate_bias
    expected = logits.sigmoid().unflatten(-1, (2, 4)).mean(-1).permute(0, 3, 1, 2)
    (found,) = collect_gate_maps(mixer, x)
    torch.testing.assert_close(found.values, expected)
    assert (found.kind, found.labels, found.unit) == ("locality gate", ("head 1", "head 2"), "head")


def test_locality_gate_is_the_gate_that_forward_uses():
    mixer = BidirectionalGatedLinearAttention(8, num_heads=2, activation=True)
    seen = []
    mixer.locality_gate.register_forward_pre_hook(lambda _, args: seen.append(args))
    (found,) = collect_gate_maps(mixer, torch.randn(1, 3, 4, 8))
    ((_, _, gate_BNHV, bias_HV),) = seen
    expected = (gate_BNHV + bias_HV).sigmoid().mean(-1).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(found.values, expected)


def test_gated_positional_attention_by_hand():
    mixer = GatedPositionalSelfAttention(8, num_heads=4)
    nn.init.normal_(mixer.gate_logit)
    nn.init.normal_(mixer.pos_weight, std=0.3)
    (found,) = collect_gate_maps(mixer, torch.randn(2, 5, 6, 8))
    torch.testing.assert_close(found.values, torch.sigmoid(mixer.gate_logit.detach()))
    assert not found.spatial and found.labels == ("head 1", "head 2", "head 3", "head 4")
    dy, dx = torch.meshgrid(torch.arange(5.0) - 2, torch.arange(6.0) - 3, indexing="ij")
    logits = torch.einsum("hk,kyx->hyx", mixer.pos_weight.detach(), torch.stack((dx, dy, dx**2 + dy**2)))
    attention = logits.flatten(1).softmax(-1).view(4, 5, 6)
    torch.testing.assert_close(mixer.positional_map(5, 6).detach(), attention)
    torch.testing.assert_close(found.neighbourhoods, attention / attention.amax((1, 2), keepdim=True))
    corner = mixer.positional_map(5, 6, query=(0, 0)).detach()
    torch.testing.assert_close(corner.sum((1, 2)), torch.ones(4))
    assert not torch.allclose(corner, attention)


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (4, 5)), (3, (3, 4, 2))])
def test_gated_convolution_by_hand(spatial_dims, size):
    conv = GnConv(8, order=3, spatial_dims=spatial_dims, kernel_size=3)
    x = torch.randn(2, *size, 8)
    parts = (conv.spatial_filter(conv.proj_in(x)[..., 2:]) * conv.scale).split((2, 4, 8), dim=-1)
    (found,) = collect_gate_maps(conv, x)
    assert found.values.shape == (2, 3, *size) and found.relative
    assert found.labels == ("order 1", "order 2", "order 3")
    for i, part in enumerate(parts):
        strength = part.detach().abs().mean(-1)
        largest = strength.flatten(1).amax(1).view(-1, *[1] * spatial_dims)
        torch.testing.assert_close(found.values[:, i], strength / largest)


def test_a_gated_convolution_of_zeros_is_closed():
    conv = GnConv(4, order=2)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    assert collect_gate_maps(conv, torch.zeros(1, 3, 3, 4))[0].values.abs().max() == 0


# ---------------------------------------------------------------- families, names, order


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vg_vig_atto", {"blocks.0.mixer": (2, 3, 4, 4)}),
        ("vg_vig_h_atto", {"stages.0.blocks.0.mixer": (2, 1, 16, 16), "stages.3.blocks.0.mixer": (2, 4, 2, 2)}),
        ("vg_convit_atto", {"blocks.0.mixer": (4,)}),
        ("vg_hornet_atto", {}),
    ],
)
def test_families(name, shapes):
    model = timm.create_model(name, num_classes=3).eval()
    maps = collect_gate_maps(model, torch.randn(2, 3, 64, 64))
    assert [m.name for m in maps] == list(gates_of(model)) and maps
    found = {m.name: tuple(m.values.shape) for m in maps}
    assert {key: found[key] for key in shapes} == shapes
    for m in maps:
        assert m.values.dtype == torch.float32 and m.values.device.type == "cpu" and not m.values.requires_grad
        assert 0 <= m.values.min() and m.values.max() <= 1
        assert len(m.labels) == m.values.shape[1 if m.spatial else 0]


def test_segmenter_in_running_order():
    model = create_segmenter("vg_vig_h_atto", num_classes=2, in_chans=1, decoder={"type": "attention_unet"}).eval()
    maps = collect_gate_maps(model, torch.randn(1, 1, 60, 64))  # padded to 64 x 64
    gates = [(m.name, tuple(m.values.shape)) for m in maps if m.kind == "attention gate"]
    assert gates == [(f"decoder.gates.{i}", (1, 1, 2 ** (i + 2), 2 ** (i + 2))) for i in range(5)]
    assert maps[0].name.startswith("encoder.") and maps[-1].name == "decoder.gates.4"


@pytest.mark.parametrize(("dims", "size"), [(2, (16, 24)), (3, (16, 8, 24))])
def test_attention_unet(dims, size):
    model = AttentionUNet(spatial_dims=dims, widths=(4, 8, 8, 16), gates_per_level=2).eval()
    maps = collect_gate_maps(model, torch.randn(1, 1, *size))
    assert [m.name for m in maps] == [f"gates.{level}.gates.{i}" for level in (3, 2) for i in (0, 1)]
    assert tuple(maps[0].values.shape[2:]) == tuple(n // 4 for n in size)


NO_GATES = ("pyramid", "mmseg", "daunet")  # of all decoders and networks


def in_range(maps, batch: int) -> bool:
    return all(m.values.shape[0] == batch and 0 <= m.values.min() and m.values.max() <= 1 for m in maps)


@pytest.mark.parametrize("kind", available_decoders())
def test_every_decoder(kind):
    if kind == "mmseg":
        pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")
    segmenter = create_segmenter("test_resnet", num_classes=2, decoder={"type": kind}).eval()
    maps = collect_gate_maps(segmenter, torch.randn(2, 3, 64, 96))
    assert bool(maps) == (kind not in NO_GATES) and in_range(maps, 2)


@pytest.mark.parametrize("name", available_networks())
def test_every_network(name):
    small = {"encoder": "test_resnet", "channels": 8} if name == "ear_unet" else {"widths": (8, 16, 32)}
    network = create_network(name, in_channels=3, num_classes=2, **small).eval()
    maps = collect_gate_maps(network, torch.randn(2, 3, 64, 96))
    assert bool(maps) == (name not in NO_GATES) and in_range(maps, 2)


def test_a_network_without_gates():
    assert collect_gate_maps(timm.create_model("test_convnext"), torch.randn(1, 3, 32, 32)) == []


class Door(nn.Module):
    def gate_map(self, x, *, wide):
        return torch.full((len(x), 2, 3, 3), float(wide))

    def forward(self, x, *, wide):
        return x + 1


class MyOwnDoor(Door):
    gate_kind, gate_unit, gate_meaning, gate_relative = "door", "wing", "1 is ajar", True


def test_a_gate_of_ones_own_joins_by_one_method():
    class House(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.back = Door(), MyOwnDoor()

        def forward(self, x):
            return self.front(self.back(self.front(x, wide=1), wide=0), wide=1)

    maps = collect_gate_maps(House(), torch.zeros(2, 1))
    assert [m.name for m in maps] == ["front", "back", "front"], "a gate that runs twice has two maps"
    assert [m.kind for m in maps[:2]] == ["door", "door"] and maps[0].labels == ("map 1", "map 2")
    assert maps[1].labels == ("wing 1", "wing 2") and maps[1].meaning == "1 is ajar" and maps[1].relative
    assert maps[0].values.min() == 1 and maps[1].values.max() == 0


# ---------------------------------------------------------------- the watched pass is unchanged


@pytest.mark.parametrize("training", [False, True])
def test_result_statistics_and_random_state_stay(training):
    def build():
        torch.manual_seed(0)
        return AttentionUNet(spatial_dims=2, widths=(4, 8, 16), gate_style="additive", norm="batch").train(training)

    x = torch.randn(2, 1, 16, 16)
    plain, watched = build(), build()
    torch.manual_seed(1)
    expected, random_after = plain(x), torch.rand(1)
    torch.manual_seed(1)
    with record_gate_maps(watched) as maps:
        result = watched(x)
    assert torch.equal(result, expected) and torch.equal(torch.rand(1), random_after)
    assert watched.training == training and len(maps) == 1
    for (key, before), after in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(before, after), key
    if training:
        expected.sum().backward()
        result.sum().backward()
        for (key, p), q in zip(plain.named_parameters(), watched.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), key


def test_dropout_in_a_gate_map_takes_no_random_numbers():
    class Random(nn.Module):
        def gate_map(self, x):
            return F.dropout(torch.ones(1, 1, 4, 4), training=self.training).clamp(max=1)

        def forward(self, x):
            return F.dropout(x, training=self.training)

    gate, x = Random().train(), torch.ones(64)
    torch.manual_seed(0)
    expected = gate(x)
    torch.manual_seed(0)
    with record_gate_maps(gate):
        assert torch.equal(gate(x), expected)


def test_hooks_are_removed_after_an_exception_too():
    model = timm.create_model("vg_vig_atto", num_classes=3)
    collect_gate_maps(model, torch.randn(1, 3, 32, 32))
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError):
        collect_gate_maps(model, torch.randn(1, 2, 32, 32))
    assert hooks_of(model) == 0
    with pytest.raises(KeyError), record_gate_maps(model):
        raise KeyError
    assert hooks_of(model) == 0


def test_gradients_flow_through_a_watched_pass():
    mixer = GnConv(4, order=2)
    with record_gate_maps(mixer) as maps:
        mixer(torch.randn(1, 3, 3, 4)).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters()) and not maps[0].values.requires_grad


def test_compiled_parts_run_eagerly_while_watched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = torch.compile(GnConv(4, order=2), backend="eager")

        def forward(self, x):
            return self.mixer(x)

    model, x = Net(), torch.randn(1, 3, 3, 4)
    before = model(x)
    with record_gate_maps(model) as maps:
        watched = model(x)
    assert [m.name for m in maps] == ["mixer"]
    torch.testing.assert_close(watched, before)
    torch.testing.assert_close(model(x), before)
