"""ConViT against timm's: parameter counts, checkpoint conversion, logits; its features, its heads and its errors."""

import functools
import re

import pytest
import timm
import torch
from torch import nn

from vision_gates.gates import GatedPositionalSelfAttention
from vision_gates.models.convit import ConViT, SelfAttention, checkpoint_filter_fn

PARAMETERS = {
    "vg_convit_atto": 859_320,
    "vg_convit_tiny": 5_710_472,
    "vg_convit_small": 27_777_232,
    "vg_convit_base": 86_539_880,
}
SIZES = ("tiny", "small", "base")


@functools.cache
def perturbed_timm(size: str = "tiny", **kwargs) -> nn.Module:
    """timm's network with every parameter moved, among them those that start at zero or one."""
    torch.manual_seed(7)
    model = timm.create_model(f"convit_{size}", **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "gating_param" in name or "pos_proj.bias" in name else 0.3 if "pos_proj" in name else 0.05
            parameter += scale * torch.randn_like(parameter)
    return model


def image(size=(224, 224), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == PARAMETERS[name]
        if not name.endswith("atto"):
            other = timm.create_model(name.removeprefix("vg_"))
            # timm's positional logits have a bias, which a softmax does not see.
            invisible = sum(p.numel() for key, p in other.named_parameters() if key.endswith("pos_proj.bias"))
            assert sum(parameter.numel() for parameter in other.parameters()) == count + invisible


@pytest.mark.parametrize("size", SIZES)
def test_every_size_takes_timm_checkpoints_and_has_its_blocks(size):
    with torch.device("meta"):
        model, other = timm.create_model(f"vg_convit_{size}"), timm.create_model(f"convit_{size}")
    model.load_state_dict(checkpoint_filter_fn(other.state_dict(), model), strict=True, assign=True)
    kinds = [type(block.mixer) for block in model.blocks]
    assert kinds == [GatedPositionalSelfAttention] * 10 + [SelfAttention] * 2
    assert [block.mixer.num_heads for block in model.blocks] == [other.blocks[0].attn.num_heads] * 12


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_timm_checkpoint_gives_timm_logits(global_pool):
    other = perturbed_timm(global_pool=global_pool)
    model = timm.create_model("vg_convit_tiny", global_pool=global_pool).eval()
    model.load_state_dict(checkpoint_filter_fn(other.state_dict(), model), strict=True)
    with torch.inference_mode():
        expected, logits = other(image()), model(image())
        torch.testing.assert_close(model.forward_features(image()), other.forward_features(image()), rtol=0, atol=1e-4)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("size", ["small", "base"])
def test_wider_sizes_give_timm_logits(size):
    options = dict(depth=2, num_classes=10)
    other = perturbed_timm(size, local_up_to_layer=1, **options)
    model = timm.create_model(f"vg_convit_{size}", **options).eval()
    model.load_state_dict(checkpoint_filter_fn(other.state_dict(), model), strict=True)
    with torch.inference_mode():
        expected = other(image(batch=1))
        assert (model(image(batch=1)) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_qkv_bias_of_a_checkpoint():
    options = dict(depth=2, num_classes=10, qkv_bias=True)
    other = perturbed_timm(local_up_to_layer=1, **options)
    model = timm.create_model("vg_convit_tiny", **options).eval()
    model.load_state_dict(checkpoint_filter_fn(other.state_dict(), model), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(image()), other(image()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrapped", [lambda s: {"model": s}, lambda s: {f"module.{key}": v for key, v in s.items()}])
def test_wrapped_checkpoints(wrapped):
    other = perturbed_timm()
    model = timm.create_model("vg_convit_tiny")
    model.load_state_dict(checkpoint_filter_fn(wrapped(other.state_dict()), model), strict=True)
    assert torch.equal(model.blocks[3].mixer.gate_logit, other.blocks[3].attn.gating_param)
    ours = model.state_dict()
    assert checkpoint_filter_fn(ours, model).keys() == ours.keys()


def test_initialisation_is_timm_s():
    torch.manual_seed(0)
    ours = timm.create_model("vg_convit_tiny").state_dict()
    theirs = checkpoint_filter_fn(timm.create_model("convit_tiny").state_dict(), None)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.endswith("pos_weight"):
            torch.testing.assert_close(ours[key], value)
        elif key.endswith("mixer.qkv.weight") and int(key.split(".")[1]) < 10:
            assert torch.equal(ours[key][384:], value[384:])
        elif "patch_embed" not in key:  # the convolution has PyTorch's own initialisation in both
            torch.testing.assert_close(ours[key].std(correction=0), value.std(correction=0), rtol=0.2, atol=1e-6)
            torch.testing.assert_close(ours[key].mean(), value.mean(), rtol=0, atol=5e-3)


def test_a_rectangle_has_its_own_geometry():
    """A wide image is not a square of as many patches, and its positions are those of the wide grid."""
    model = timm.create_model("vg_convit_atto", num_classes=4).eval()
    with torch.inference_mode():
        assert model(image((224, 320))).shape == (2, 4)
        assert model.forward_features(image((224, 320))).shape == (2, 1 + 14 * 20, 96)
        wide = model.forward_features(image((64, 256)))
        flipped = timm.create_model("vg_convit_atto", num_classes=4).eval()
        state = model.state_dict()
        # Transposing the image, the patches' weights, the position embedding and the positional weights is a symmetry.
        for key, value in state.items():
            if key == "patch_embed.weight":
                state[key] = value.transpose(2, 3)
            elif key == "pos_embed":
                state[key] = value.unflatten(1, (14, 14)).transpose(1, 2).flatten(1, 2)
            elif key.endswith("pos_weight"):
                state[key] = value[:, [1, 0, 2]]
        flipped.load_state_dict(state)
        tall = flipped.forward_features(image((64, 256)).transpose(2, 3))
    torch.testing.assert_close(tall[:, 0], wide[:, 0], rtol=0, atol=1e-4)
    back = tall[:, 1:].unflatten(1, (16, 4)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(back, wide[:, 1:], rtol=0, atol=1e-4)


def test_sides_that_are_no_multiple_of_the_patch_get_zeros():
    model = timm.create_model("vg_convit_atto", num_classes=4).eval()
    x = image((40, 50))
    padded = torch.zeros(2, 3, 48, 64)
    padded[:, :, :40, :50] = x
    with torch.inference_mode():
        assert torch.equal(model(x), model(padded))


def test_bfloat16_after_a_forward_in_float32():
    model = timm.create_model("vg_convit_atto", num_classes=4).eval()
    with torch.inference_mode():
        expected = model(image((96, 128)))
        half = model.bfloat16()(image((96, 128)).bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_features_are_the_patches_before_and_after_the_class_token_joins():
    model = timm.create_model("vg_convit_atto").eval()
    x = image((96, 160))
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        assert final.shape == (2, 1 + 6 * 10, 96) and model.num_prefix_tokens == 1
        assert [m.shape for m in maps] == [(2, 96, 6, 10)] * 6
        _, (last,) = model.forward_intermediates(x, indices=1, norm=True)
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), final[:, 1:])
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        for token, level in zip(tokens, maps, strict=True):
            torch.testing.assert_close(token, level.flatten(2).transpose(1, 2))
        early, (fourth,) = model.forward_intermediates(x, indices=[3], stop_early=True)
        torch.testing.assert_close(fourth, maps[3])
        torch.testing.assert_close(early, tokens[3])
        features = timm.create_model("vg_convit_atto", features_only=True, out_indices=(1, 4, 5)).eval()
        missing, _ = features.model.load_state_dict(model.state_dict(), strict=False)  # it has no head
        assert not missing
        for level, expected in zip(features(x), (maps[1], maps[4], maps[5]), strict=True):
            torch.testing.assert_close(level, expected)


def test_features_equal_timm_s():
    other = perturbed_timm()
    model = timm.create_model("vg_convit_tiny").eval()
    model.load_state_dict(checkpoint_filter_fn(other.state_dict(), model), strict=True)
    with torch.inference_mode():
        ours = model.forward_intermediates(image(batch=1), intermediates_only=True)
        theirs = other.forward_intermediates(image(batch=1), intermediates_only=True)
    for level, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_pruning_drops_an_unused_class_token():
    features = timm.create_model("vg_convit_atto", features_only=True, out_indices=(0, 2)).train()
    features(image((32, 48)))[-1].sum().backward()
    assert not [name for name, parameter in features.named_parameters() if parameter.grad is None]
    model = timm.create_model("vg_convit_atto")
    assert model.prune_intermediate_layers([1]) == [1]
    assert model.cls_token is None and model.num_prefix_tokens == 0
    with pytest.raises(ValueError, match=re.escape("must be 'avg' or '', got 'token'")):
        model.reset_classifier(3, "token")
    model.reset_classifier(3, "avg")
    assert model(image((32, 48))).shape == (2, 3)
    kept = timm.create_model("vg_convit_atto")
    kept.prune_intermediate_layers([5], prune_head=False)
    assert kept.cls_token is not None and kept(image((32, 48))).shape == (2, 1000)


def test_pooling():
    model = timm.create_model("vg_convit_atto", num_classes=0).eval()
    x = image((32, 48))
    with torch.inference_mode():
        tokens = model.forward_features(x)
        torch.testing.assert_close(model(x), tokens[:, 0])
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(x), tokens[:, 1:].mean(1))
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), tokens)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patch_size=0), "patch_size must be positive, got 0"),
        (dict(depth=4, local_depth=4), "local_depth must be between 0 and depth - 1 = 3, got 4"),
        (dict(depth=4, local_depth=-1), "got -1"),
        (dict(embed_dim=97), "multiple of num_heads = 4, got 97"),
        (dict(embed_dim=97, depth=1), "multiple of num_heads = 4, got 97"),
        (dict(global_pool="max"), "global_pool must be 'token' or 'avg' or '', got 'max'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("vg_convit_atto", **options)


def test_position_embedding_of_another_image_size():
    source = perturbed_timm().state_dict()
    model = timm.create_model("vg_convit_tiny", img_size=(96, 160)).eval()
    state = checkpoint_filter_fn(source, model)
    assert state["pos_embed"].shape == (1, 60, 192)
    model.load_state_dict(state, strict=True)
    at_run_time = timm.create_model("vg_convit_tiny").eval()
    at_run_time.load_state_dict(checkpoint_filter_fn(source, at_run_time), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(image((96, 160))), at_run_time(image((96, 160))))
    rectangle = {"pos_embed": torch.zeros(1, 60, 192)}
    with pytest.raises(ValueError, match="pos_embed of 60 tokens is not of a square image"):
        checkpoint_filter_fn(rectangle, ConViT(depth=1))
