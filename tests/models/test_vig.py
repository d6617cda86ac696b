"""ViG against the official implementation: parameter counts, checkpoint conversion, outputs; and its own errors."""

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vision_gates.models import _build
from vision_gates.models.vig import checkpoint_filter_fn

PARAMETERS = {
    "vg_vig_atto": 859_336,
    "vg_vig_tiny": 5_834_536,
    "vg_vig_small": 22_615_144,
    "vg_vig_base": 89_022_184,
    "vg_vig_h_atto": 943_112,
    "vg_vig_h_tiny": 28_600_680,
    "vg_vig_h_small": 50_051_688,
    "vg_vig_h_base": 88_904_360,
}
FIXTURES = {
    "vig_tiny": "vg_vig_tiny",
    "vig_tiny_nonsquare": "vg_vig_tiny",
    "vig_small": "vg_vig_small",
    "vig_h_tiny": "vg_vig_h_tiny",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("fixture", FIXTURES)
def test_official_checkpoint_gives_official_output(fixture, golden_folder):
    facts = json.loads((golden_folder / f"{fixture}.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_weights", golden_folder / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    official = {key: torch.from_numpy(weights.tensor_for(key, tuple(shape))) for key, shape in facts["state"].items()}
    model = timm.create_model(FIXTURES[fixture]).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]
    model.load_state_dict(checkpoint_filter_fn({"model": official}, model), strict=True)
    expected = torch.from_numpy(np.load(golden_folder / f"{fixture}.npz")["output"])
    with torch.inference_mode():
        output = model(torch.from_numpy(weights.image_for(fixture, tuple(facts["input_shape"]))))
    assert (output - expected).abs().max() <= 2e-4 * expected.abs().max()


def official_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our state dict under the official names, written independently of the conversion under test."""
    block = {
        "mixer.local_conv": "in_proj.0",
        "mixer.decay_up": "gk_proj.1",
        "mixer.gate_bias": "g_proj.bias",
        "mixer.proj": "o_proj",
        "mixer.locality_gate.global_norm": "g_norm",
        "mixer.locality_gate.local_norm": "l_norm",
    }
    plain = hasattr(model, "pos_embed")
    result = {}
    for key, value in model.state_dict().items():
        if plain:
            key = key.replace("stem.", "patch_embed.proj.")
            key = key.replace("norm1", "attn_norm").replace("norm2", "mlp_norm")
            key = key.replace("mlp.in_proj", "mlp.gate_proj").replace("mlp.out_proj", "mlp.down_proj")
        else:
            for ours, theirs in {"stem.0": "0", "stem.1": "2", "stem.3": "5", "stem.4": "7"}.items():
                key = key.replace(f"{ours}.", f"patch_embed.{theirs}.")
            for stage in range(4):
                for ours, theirs in ((0, 1), (1, 3)):
                    key = key.replace(f"stages.{stage}.downsample.{ours}", f"layers.{stage - 1}.downsample.{theirs}")
            key = key.replace("stages.", "layers.").replace("norm1", "norm")
            key = key.replace("mlp.in_proj", "mlp.fc1").replace("mlp.out_proj", "mlp.fc2")
            if key.startswith(("norm.", "head.")):
                key = f"classifier.{key}"
        mixer = "attn" if plain else "op"
        if key.endswith("mixer.in_proj.weight"):
            dim = value.shape[1]
            parts = value.split([2 * dim, dim, len(value) - 3 * dim])
            for theirs, part in zip(("qkv_proj", "g_proj", "gk_proj.0"), parts, strict=True):
                result[key.replace("mixer.in_proj", f"{mixer}.{theirs}")] = part
            continue
        for ours, theirs in block.items():
            key = key.replace(ours, f"{mixer}.{theirs}")
        result[key] = value
    return result


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("name", [name for name in PARAMETERS if not name.endswith("base")])
def test_every_size_converts_strictly(name, wrapper):
    with torch.device("meta"):
        model = timm.create_model(name)
    official = {f"module.{key}": value for key, value in official_names(model).items()}
    converted = checkpoint_filter_fn({wrapper: official} if wrapper else official, model)
    model.load_state_dict(converted, strict=True)


@pytest.mark.parametrize("name", ["vg_vig_atto", "vg_vig_h_atto"])
def test_conversion_moves_every_value_to_its_place(name):
    source, target = timm.create_model(name), timm.create_model(name)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    target.load_state_dict(checkpoint_filter_fn(official_names(source), target), strict=True)
    for (key, value), loaded in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(loaded, value), key


def test_position_embedding_of_another_resolution():
    source = timm.create_model("vg_vig_atto", depth=1)
    target = timm.create_model("vg_vig_atto", depth=1, img_size=(96, 160))
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)
    with torch.no_grad():
        image = torch.randn(1, 3, 96, 160)
        # Resized once at loading or at every forward: the same function.
        torch.testing.assert_close(target.eval()(image), source.eval()(image))


def test_position_embedding_of_unknown_shape_is_refused():
    source = timm.create_model("vg_vig_atto", depth=1, img_size=(96, 160)).state_dict()
    with pytest.raises(ValueError, match="60 tokens is not of a square image"):
        checkpoint_filter_fn(source, timm.create_model("vg_vig_atto", depth=1))


def test_token_grid_is_the_stems():
    for patch_size in (4, 8, 16):
        model = timm.create_model("vg_vig_atto", depth=1, patch_size=patch_size, img_size=64)
        for height, width in ((64, 64), (37, 50), (23, 24), (39, 41)):
            assert model.stem(torch.zeros(1, 3, height, width)).shape[2:] == model._grid(height, width)


@pytest.mark.parametrize("patch_size", [0, 6, -4])
def test_patch_size_is_checked(patch_size):
    with pytest.raises(ValueError, match=f"multiple of 4, got {patch_size}"):
        timm.create_model("vg_vig_atto", patch_size=patch_size)


def test_layout_of_tokens_matters():
    """4x16, 16x4 and 8x8 tokens are three geometries, not one sequence of 64."""
    model = timm.create_model("vg_vig_atto", depth=1, num_classes=8).eval()
    outputs = []
    with torch.no_grad():
        noise = torch.randn(1, 3, 64 * 256)
        for size in ((64, 256), (256, 64), (128, 128)):
            outputs.append(model(noise.view(1, 3, *size)))
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_download_picks_the_one_file_of_the_variant(monkeypatch):
    import huggingface_hub

    files = ["README.md", "vig_t.pth", "vig_s.pth", "vig-h-t.pth", "vig-h_small.pth"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda hub_id: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, name: f"/cache/{name}")
    chosen = {
        name: _build._download(name, "hub/id").name
        for name in ("vg_vig_tiny", "vg_vig_small", "vg_vig_h_tiny", "vg_vig_h_small")
    }
    assert list(chosen.values()) == ["vig_t.pth", "vig_s.pth", "vig-h-t.pth", "vig-h_small.pth"]
    with pytest.raises(FileNotFoundError, match="0 of the files"):
        _build._download("vg_vig_base", "hub/id")
