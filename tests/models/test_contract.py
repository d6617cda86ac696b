"""What every registered model promises. A new family joins by registering its models as ``vg_*``."""

import copy
import functools
import inspect
import math
import re
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vision_gates  # noqa: F401  registers the models

MODELS = timm.list_models("vg_*")
SIZE = (32, 64)
SIZES = ["atto", "tiny", "small", "base", "large"]


@functools.cache
def shrunk(name: str) -> dict[str, int | tuple[int, ...]]:
    """Arguments that leave ``name`` its widths but as few layers as it can have: sizes shrink, assertions do not."""
    with torch.device("meta"):
        full = timm.create_model(name)
    parameters = inspect.signature(type(full).__init__).parameters
    if "depths" in parameters:
        return {"depths": (1,) * len(full.feature_info)}
    return {"depth": 2} if "depth" in parameters else {}


@functools.cache
def _is_large(name: str) -> bool:
    """More than 10 million parameters, of which not many copies fit into memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, **shrunk(name)).parameters()) > 10e6


@functools.cache
def _built(name: str, options: tuple[tuple[str, object], ...]) -> nn.Module:
    return timm.create_model(name, **(shrunk(name) | dict(options)))


def small(name: str, **kwargs) -> nn.Module:
    """A fresh copy of the shrunk model; most of these tests' time would go into drawing random weights."""
    if kwargs.get("pretrained") or _is_large(name):
        return timm.create_model(name, **(shrunk(name) | kwargs))
    return copy.deepcopy(_built(name, tuple(sorted(kwargs.items()))))


def _smallest_of_each_class() -> set[str]:
    smallest: dict[type, tuple[int, str]] = {}
    for name in MODELS:
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        smallest[type(model)] = min(smallest.get(type(model), (size, name)), (size, name))
    return {name for _, name in smallest.values()}


SMALLEST_OF_EACH_CLASS = _smallest_of_each_class()


def _once_a_kind() -> list[Any]:
    """All models; those that a smaller one of the same kind stands for, whose graph they share, are slow tests."""
    kinds: set[str] = set()
    names = sorted(MODELS, key=lambda name: SIZES.index(re.findall("|".join(SIZES), name)[0]))
    parameters = []
    for name in names:
        kind = re.sub("_(?:" + "|".join(SIZES) + ")", "", name)
        parameters.append(pytest.param(name, marks=pytest.mark.slow) if kind in kinds else name)
        kinds.add(kind)
    return parameters


def image(batch: int = 2, channels: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(size[0] * size[1] + channels))


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("name", MODELS)
class TestModelContract:
    def test_forward_and_every_gradient(self, name):
        model = timm.create_model(name, num_classes=7).train()
        logits = model(image())
        assert logits.shape == (2, 7) and logits.isfinite().all()
        (logits * torch.randn(2, 7)).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{key} has no gradient"
            assert parameter.grad.isfinite().all(), f"{key} has a gradient that is not finite"
            assert parameter.grad.abs().max() > 0, f"{key} has a zero gradient"

    def test_train_and_eval_agree(self, name):
        model = small(name)
        with torch.no_grad():
            assert torch.equal(model.train()(image()), model.eval()(image()))

    def test_drop_path_acts_in_training_only(self, name):
        model = small(name, drop_path_rate=0.5)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(image()), model.eval()(image()))
            batch = image(8)
            assert not torch.equal(model.train()(batch), model.eval()(batch))

    def test_head(self, name):
        model = small(name, num_classes=5).eval()
        with torch.no_grad():
            features = model.forward_features(image())
            pooled = model.forward_head(features, pre_logits=True)
            assert pooled.shape == (2, model.head_hidden_size)
            torch.testing.assert_close(model.forward_head(features), model(image()))
            torch.testing.assert_close(model.get_classifier()(pooled), model(image()))
            model.reset_classifier(3)
            assert model(image()).shape == (2, 3) and model.num_classes == 3
            model.reset_classifier(0)
            assert isinstance(model.get_classifier(), nn.Identity)
            assert model(image()).shape == (2, model.num_features)
            model.reset_classifier(0, "")
            assert torch.equal(model(image()), features)
        assert small(name, num_classes=0)(image()).shape == (2, model.num_features)
        with pytest.raises(ValueError, match="global_pool"):
            model.reset_classifier(3, "median")

    @pytest.mark.parametrize("channels", [1, 5])
    def test_input_channels(self, name, channels):
        assert small(name, in_chans=channels)(image(channels=channels)).shape == (2, 1000)

    @pytest.mark.parametrize("size", [(33, 47), (1, 1), (192, 320), (7, 200), (64, 256), (256, 64), (128, 128)])
    def test_any_input_size_or_a_clear_error(self, name, size):
        model = small(name, num_classes=4).eval()
        features = small(name, features_only=True).eval()
        x = image(1, size=size)
        with torch.no_grad():
            try:
                logits = model(x)
            except ValueError as error:
                assert f"{size[0]}x{size[1]}" in str(error) and "at least" in str(error)
                assert min(size) < 7, "a size that people use must work"
                return
            assert logits.shape == (1, 4) and logits.isfinite().all()
            for level, channels, reduction in zip(
                features(x), features.feature_info.channels(), features.feature_info.reduction(), strict=True
            ):
                assert level.shape[:2] == (1, channels)
                for got, side in zip(level.shape[2:], size, strict=True):
                    assert max(side // reduction, 1) <= got <= math.ceil(side / reduction)

    def test_features_only(self, name):
        model = small(name, features_only=True).eval()
        levels = model(image())
        assert len(levels) == len(model.feature_info.channels())
        for level, channels, reduction in zip(
            levels, model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert level.shape == (2, channels, SIZE[0] // reduction, SIZE[1] // reduction)
        last = small(name, features_only=True, out_indices=(-1,)).eval()
        assert [x.shape for x in last(image())] == [levels[-1].shape]

    def test_forward_intermediates(self, name):
        model = small(name).eval()
        with torch.no_grad():
            final, intermediates = model.forward_intermediates(image())
            torch.testing.assert_close(final, model.forward_features(image()))
            assert len(intermediates) == len(model.feature_info)
            for level, info in zip(intermediates, model.feature_info, strict=True):
                assert level.shape[1] == info["num_chs"] and level.ndim == 4
            (first,) = model.forward_intermediates(image(), indices=[0], stop_early=True, intermediates_only=True)
            torch.testing.assert_close(first, intermediates[0])
            (normed,) = model.forward_intermediates(image(), indices=1, norm=True, intermediates_only=True)
            patches = final if final.ndim == 4 else final[:, getattr(model, "num_prefix_tokens", 0) :]
            as_map = patches if final.ndim == 4 else patches.transpose(1, 2).unflatten(2, normed.shape[2:])
            torch.testing.assert_close(normed, as_map)
        with pytest.raises(ValueError, match="output_fmt"):
            model.forward_intermediates(image(), output_fmt="NHCW")

    def test_grad_checkpointing_changes_nothing(self, name):
        model = small(name, num_classes=3).train()
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            model(image()).square().sum().backward()
            gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][key], gradient, msg=f"gradient of {key}")

    def test_parameter_groups(self, name):
        model = small(name)
        names = dict(model.named_parameters())
        assert set(model.no_weight_decay()) <= set(names)
        rates = {}
        optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[next(key for key, value in names.items() if value is parameter)] = group["lr_scale"]
        assert set(rates) == set(names)
        head = rates[next(key for key in names if model.get_classifier().weight is names[key])]
        first = rates[f"{model.pretrained_cfg['first_conv']}.weight"]
        assert head == 1.0 and first == min(rates.values()) < 1.0
        assert model.group_matcher(coarse=True)["stem"]

    def test_dtypes_and_copies(self, name):
        model = small(name, num_classes=6).eval()
        x = image(1)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            expected = model(x)
            torch.testing.assert_close(copy.deepcopy(model)(x), expected)
            assert relative_error(model(x.to(memory_format=torch.channels_last)), expected) < 1e-4
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mixed = model(x)
            half = model.bfloat16()(x.bfloat16())  # after a forward: nothing may have been cached in another dtype
            assert half.dtype == torch.bfloat16
            assert relative_error(expected.double(), exact) < 1e-4
            assert relative_error(half.double(), exact) < 0.1
            assert relative_error(mixed.double(), exact) < 0.1

    def test_pretrained_cfg(self, name):
        with torch.device("meta"):
            model = timm.create_model(name)
        cfg = model.pretrained_cfg
        assert cfg["license"] and cfg["origin_url"].startswith("https://") and cfg["paper_ids"] and cfg["notes"]
        assert cfg["num_classes"] == 1000 and len(cfg["input_size"]) == 3
        assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
        if name.endswith("_atto"):
            assert sum(p.numel() for p in model.parameters()) < 1e6 and "no paper result" in cfg["notes"][0]
        else:
            assert "top-1" in cfg["notes"][0]

    def test_pretrained_offline_says_what_to_put_where(self, name, tmp_path, monkeypatch):
        monkeypatch.setenv("VISION_GATES_WEIGHTS", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        cfg = timm.get_pretrained_cfg(name)
        if not (cfg.hf_hub_id or cfg.url):
            with pytest.raises(RuntimeError, match=f"no pretrained weights exist for {name}"):
                timm.create_model(name, pretrained=True)
            return
        with pytest.raises(RuntimeError) as error:
            timm.create_model(name, pretrained=True)
        source = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
        assert str(tmp_path / f"{name}.pth") in str(error.value) and source in str(error.value)

    def test_pretrained_from_a_file(self, name, tmp_path, monkeypatch):
        monkeypatch.setenv("VISION_GATES_WEIGHTS", str(tmp_path))
        source = small(name).eval()
        torch.save({"model": source.state_dict()}, tmp_path / f"{name}.pth")
        with torch.no_grad():
            loaded = small(name, pretrained=True).eval()
            torch.testing.assert_close(loaded(image()), source(image()))
            grey = small(name, pretrained=True, in_chans=1, num_classes=2).eval()
            assert grey(image(channels=1)).shape == (2, 2)


@pytest.mark.parametrize("name", _once_a_kind())
class TestModelCompilation:
    def test_compiles_whole_and_equals_eager(self, name):
        # In float64: in float32 rounding alone makes 2 in 1,000 of some gate's gradient, which is near zero at first.
        model = small(name, num_classes=3).double().train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(image().double())
            logits.square().sum().backward()
            results.append((logits.detach(), {key: p.grad.clone() for key, p in model.named_parameters()}))
        (logits, gradients), (compiled_logits, compiled_gradients) = results
        assert relative_error(compiled_logits, logits) < 1e-7
        for key, gradient in gradients.items():
            assert relative_error(compiled_gradients[key], gradient) < 1e-6, key

    def test_exports(self, name):
        model = small(name, num_classes=3).eval()
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
        with torch.no_grad():
            assert relative_error(program.module()(image(3)), model(image(3))) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST_OF_EACH_CLASS))
def test_onnx_without_our_exporter(name, tmp_path):
    """PyTorch's alone, as others call it; ``tests/export`` has ours."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the [export] extra is not installed")
    model, path = small(name, num_classes=3).eval(), tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
    # ONNX Runtime optimises on its own when it loads.
    torch.onnx.export(program, (image(),), path, external_data=False, optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: image(3).numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(result), model(image(3))) < 1e-4
