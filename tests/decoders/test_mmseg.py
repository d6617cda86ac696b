"""mmsegmentation's heads as decoders; what every decoder promises is in tests/test_segmenter.py."""

import io
import json
import logging
import sys
import warnings

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

from mmseg.registry import MODELS
from rich.console import Console
from safetensors.torch import load_file

from vision_gates.config import parse_config
from vision_gates.decoders.mmseg import _batch_norm
from vision_gates.engine.building import build_model, load_run
from vision_gates.engine.checkpoint import find_weights
from vision_gates.engine.trainer import train
from vision_gates.errors import ConfigError
from vision_gates.segmenter import create_segmenter

HEADS = ["UPerHead", "FCNHead", "SegformerHead", "ASPPHead", "FPNHead"]


def segmenter(encoder="vg_vig_h_atto", **head):
    return create_segmenter(encoder, num_classes=3, in_chans=2, decoder={"type": "mmseg", "head": head})


@pytest.mark.parametrize("encoder", ["vg_vig_h_atto", "vg_convit_atto", "vg_hornet_atto", "test_resnet"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_on_encoders(kind, encoder):
    model = segmenter(encoder, type=kind, channels=16).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 2, 33, 47)).shape == (1, 3, 33, 47)
    logits = model.train()(torch.randn(2, 2, 64, 64))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_what_is_filled_in():
    head = segmenter(type="UPerHead").decoder.head
    assert head.in_channels == [32, 64, 96, 128] and head.in_index == [0, 1, 2, 3]
    assert head.channels == 256 and head.num_classes == head.out_channels == 3 and head.norm_cfg["type"] == "BN"
    one = segmenter(
        type="ASPPHead", channels=8, dilations=[1, 6], norm_cfg={"type": "GN", "num_groups": 2}
    ).decoder.head
    assert one.in_channels == 128 and one.in_index == 3 and len(one.aspp_modules) == 2
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in one.modules())
    chosen = segmenter(type="SegformerHead", channels=8, in_index=[1, 2]).decoder.head
    assert chosen.in_channels == [64, 96]
    assert segmenter(type="FCNHead", channels=8, in_index=1).decoder.head.in_channels == 64
    assert segmenter("vg_vig_atto", type="FPNHead", channels=8).decoder.head.feature_strides == [16, 16, 16, 16]


def test_logits_are_those_of_mmseg():
    model = segmenter(type="UPerHead", channels=16).eval()
    head = MODELS.get("UPerHead")(
        in_channels=[32, 64, 96, 128], in_index=[0, 1, 2, 3], channels=16, num_classes=3, norm_cfg={"type": "BN"}
    ).eval()
    head.load_state_dict(model.decoder.head.state_dict())
    image = torch.randn(1, 2, 64, 64)
    with torch.no_grad():
        expected = torch.nn.functional.interpolate(head(model.encoder(image)), size=(64, 64), mode="bilinear")
        assert torch.equal(model(image), expected)


def test_sync_bn_is_plain_in_one_process():
    model = segmenter(type="FCNHead", channels=8, norm_cfg={"type": "SyncBN", "requires_grad": True})
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.decoder.modules())
    assert _batch_norm({"a": [{"type": "SyncBN"}, 3], "b": "SyncBNs"}) == {"a": [{"type": "BN"}, 3], "b": "SyncBNs"}


def test_building_is_silent(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter(type="SegformerHead", channels=8)
    assert capfd.readouterr() == ("", "") and logging.root.manager.disable == logging.NOTSET


MISTAKES = [
    (dict(type="UperHead"), "decoder.head.type: mmseg has no decode head 'UperHead'; nearest: UPerHead"),
    (dict(), "decoder.head.type: mmseg has no decode head None"),
    (dict(type="OCRHead"), "no decode head 'OCRHead'"),  # a cascade, which needs another head's logits
    (dict(type="CrossEntropyLoss"), "no decode head 'CrossEntropyLoss'"),
    (dict(type="UPerHead", chanels=8), "decoder.head.chanels: UPerHead has no such option; nearest: channels"),
    (dict(type="UPerHead", num_classes=8), "decoder.head.num_classes: the data say it; remove the key"),
    (dict(type="UPerHead", loss_decode={}), "decoder.head.loss_decode: the loss is that of task; remove"),
    (dict(type="UPerHead", in_index=[0, 4]), "decoder.head.in_index: 4; the encoder has levels 0 to 3"),
    (dict(type="DAHead", channels=8), "DAHead cannot be built: .*pam_channels"),
    (dict(type="EncHead", channels=8), "EncHead gives no logits of 3 classes"),
    (dict(type="PIDHead", channels=8), "PIDHead does not run on these levels"),
]


@pytest.mark.parametrize(("head", "message"), MISTAKES)
def test_mistakes_end_in_one_line(head, message):
    with pytest.raises(ConfigError, match=message) as caught:
        segmenter(**head)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_no_mapping():
    with pytest.raises(ConfigError, match=r"decoder.head: a mapping such as \{type: UPerHead\} is needed, found 'UPer"):
        create_segmenter("vg_vig_h_atto", num_classes=2, decoder={"type": "mmseg", "head": "UPerHead"})


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg.registry", None)
    with pytest.raises(ConfigError, match=r"needs mmsegmentation \(.*\): pip install 'vision-gates\[mmseg\]'"):
        segmenter(type="UPerHead")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """image_mask_folder with a bright square on noise: 8 training and 4 validation images of 32 x 32."""
    root, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(1)
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = rng.integers(0, 100, (32, 32)), np.zeros((32, 32))
            top, left = rng.integers(0, 16, 2)
            image[top : top + 16, left : left + 16] += 120
            mask[top : top + 16, left : left + 16] = 1
            cv2.imwrite(str(root / split / "images" / f"{i}.png"), image.astype(np.uint8))
            cv2.imwrite(str(root / split / "masks" / f"{i}.png"), mask.astype(np.uint8))
    return root


@pytest.mark.parametrize("kind", HEADS[:4])
def test_trains_in_our_engine_and_is_read_back(scans, tmp_path, kind):
    raw = {
        "task": {"type": "segmentation"},
        "data": {"type": "image_mask_folder", "root": str(scans), "num_classes": 2, "image_size": 32, "batch_size": 4},
        "model": {"name": "vg_vig_h_atto", "decoder": {"type": "mmseg", "head": {"type": kind, "channels": 16}}},
        "optim": {"lr": 1e-2},
        "schedule": {"epochs": 8, "warmup_epochs": 1},
        "trainer": {"device": "cpu", "checkpoint_minutes": None, "run_dir": str(tmp_path / "run")},
    }
    run = train(parse_config(raw, [], source="test.yaml"), console=Console(file=io.StringIO()))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train"]["loss"] for row in rows if "train" in row]
    assert losses[-1] < 0.9 * losses[0]
    config, info = load_run(run)
    assert config.model.decoder == raw["model"]["decoder"]
    weights = load_file(find_weights(run / "checkpoints"))
    build_model(config, info).load_state_dict(weights)
