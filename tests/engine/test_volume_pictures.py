"""Pictures of volumes in the report of a training run: the right way round, in proportion, with their gates' maps."""

import json
import pickle
import re

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from vision_gates.engine.gate_views import observe_gates, pack_gate_views, read_gate_views
from vision_gates.engine.overlays import UNSCORED, OverlayCollector, pack_overlays, read_overlays
from vision_gates.engine.report_pictures import gates_section, samples
from vision_gates.engine.slices import AXIAL, CORONAL, SAGITTAL, sample_planes
from vision_gates.engine.volume_data import VolumeInfo, VolumePredictor
from vision_gates.volumes.preprocessing import ChannelPlan, Preprocessing

SHAPE = (24, 20, 16)
ZSCORE = ChannelPlan(kind="zscore")


class _Gated(nn.Module):
    """Its one gate is open where the image is bright; the map has half the positions."""

    class Gate(nn.Module):
        gate_kind = "bright gate"

        def gate_map(self, x):
            pool = nn.functional.max_pool2d if x.ndim == 4 else nn.functional.max_pool3d
            return pool((x[:, x.shape[1] // 2, None] > 0.5).float(), 2)

        def forward(self, x):
            return x

    def __init__(self):
        super().__init__()
        self.gate = self.Gate()

    def forward(self, x):
        return self.gate(x)


def box() -> np.ndarray:
    """Bright at the patient's right, front and head: a quarter, a half and a third of the axes."""
    array = np.zeros(SHAPE, np.float32)
    array[18:, 10:, 11:] = 1.0
    return array


def displayed(image, target, prediction, *, network=None, spacing=(1.0, 1.0, 1.0), batch=None, **view):
    """What `VolumePredictor.displayed` makes of a case."""
    info = VolumeInfo(
        **{
            "preprocessing": Preprocessing(spacing=spacing, channels=(ZSCORE,)),
            "spatial_dims": 3,
            "patch_size": (16, 16, 16),
            "channel_names": ("MRI",),
            **view,
        }
    )
    predictor = VolumePredictor(
        network or nn.Identity(), info, num_classes=2, batch_size=1, device=torch.device("cpu")
    ).eval()
    case = {
        "image": torch.from_numpy(image)[None, None],
        "target": torch.from_numpy(target.astype(np.int64))[None],
        "name": ["case"],
        "index": torch.tensor([0]),
        **(batch or {}),
    }
    return predictor.displayed(case, torch.from_numpy(prediction.astype(np.int64))[None])


def collected(*arguments, bad=0.25, ignore_index=None, classes=2, **options) -> dict:
    """The one overlay of a split of one case."""
    collector = OverlayCollector(
        2, 1, task="segmentation", mean=None, std=None, ignore_index=ignore_index, classes=classes, inputs=True
    )
    collector.add(*displayed(*arguments, **options), [bad])
    (overlay,) = collector.finish()
    return overlay


def expected(letters: str, shape: tuple[int, int]) -> np.ndarray:
    """Where the box is seen, by the letters of a picture alone."""
    assert letters in ("RLAP", "RLHF", "APHF")
    seen, (height, width) = np.zeros(shape, bool), shape
    rows = {"A": height // 2, "H": round(height * 5 / 16)}[letters[2]]
    columns = {"R": width // 4, "A": width // 2}[letters[0]]
    seen[:rows, :columns] = True
    return seen


def test_the_patient_s_right_is_on_the_left_in_all_planes() -> None:
    overlay = collected(box(), box() > 0, box() > 0)
    planes = [overlay, *overlay["further"]]
    assert [plane["letters"] for plane in planes] == ["RLAP", "RLHF", "APHF"]
    assert [plane["caption"] for plane in planes] == [
        "axial, slice 12 of 16",
        "coronal, slice 11 of 20",
        "sagittal, slice 19 of 24",
    ]
    assert [plane["image"].shape for plane in planes] == [(20, 24), (16, 24), (16, 20)]
    for plane in planes:
        for seen in (plane["image"] > 0.5, plane["target"] == 1, plane["prediction"] == 1):
            np.testing.assert_array_equal(seen, expected(plane["letters"], seen.shape))


@pytest.mark.parametrize(("axis", "letters"), [(0, "APHF"), (1, "RLHF"), (2, "RLAP")])
def test_slices_are_shown_in_their_own_plane(axis: int, letters: str) -> None:
    overlay = collected(box(), box() > 0, box() > 0, spatial_dims=2, patch_size=(16, 16), slice_axis=axis)
    assert overlay["letters"] == letters and overlay["further"] == []
    np.testing.assert_array_equal(overlay["target"] == 1, expected(letters, overlay["target"].shape))


def test_pixels_are_square_whatever_the_spacing() -> None:
    batch = {"spacing": torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.float64)}
    kept = collected(box(), box() > 0, box() > 0, spacing=None, batch=batch)
    resampled = collected(box(), box() > 0, box() > 0, spacing=(1.0, 1.0, 3.0))
    for overlay in (kept, resampled):
        assert [p["image"].shape for p in (overlay, *overlay["further"])] == [(20, 24), (48, 24), (48, 20)]
        assert all(p["target"].shape == p["image"].shape for p in (overlay, *overlay["further"]))
        coronal = overlay["further"][0]
        np.testing.assert_array_equal(coronal["target"] == 1, expected("RLHF", (48, 24)))
    large = collected(*[np.zeros((600, 500, 4), np.float32)] * 3, spacing=(0.5, 0.5, 5.0))
    assert large["image"].shape == (213, 256)


def test_the_slice_is_chosen_by_truth_else_prediction_else_the_middle() -> None:
    nothing, truth, prediction = (np.zeros(SHAPE, np.uint8) for _ in range(3))
    truth[2:4, 3:5, 6], prediction[5:9, 7:9, 13] = 1, 1

    def captions(target, found):
        shown = sample_planes((AXIAL, CORONAL, SAGITTAL), box(), target, found, spacing=(1.0, 1.0, 1.0), channel=ZSCORE)
        return [int(re.search(r"slice (\d+)", plane.caption)[1]) for plane in shown]

    assert captions(truth, prediction) == [7, 4, 3]
    assert captions(nothing, prediction) == [14, 8, 6]
    assert captions(nothing, nothing) == [9, 11, 13]


def test_ct_is_shown_in_the_window_of_its_plan() -> None:
    plan = ChannelPlan(kind="ct", low=-100.0, high=300.0, mean=50.0, std=70.0)
    image = np.linspace(-200.0, 400.0, SHAPE[0], dtype=np.float32)[:, None, None] * np.ones(SHAPE, np.float32)
    (axial,) = sample_planes((AXIAL,), (image - 50) / 70, image > 0, image > 0, spacing=(1.0, 1.0, 1.0), channel=plan)
    np.testing.assert_allclose(axial.image_HW[0], np.clip((image[::-1, 0, 0] + 100) / 400, 0, 1), atol=1e-5)


def test_unscored_voxels_stay_so_and_the_file_keeps_everything(tmp_path) -> None:
    target = (box() > 0).astype(np.int64)
    target[:, :, :3] = 255
    overlay = collected(box(), target, box() > 0, ignore_index=255, bad=None)
    assert (overlay["further"][0]["target"][-3:] == UNSCORED).all() and overlay["score"] is None
    plain = {"name": "x", "index": 1, "score": 0.5, "worst": True, "image": np.zeros((4, 4))}
    plain |= {"target": np.zeros((4, 4)), "prediction": np.zeros((4, 4))}
    path = tmp_path / "overlays.npz"
    path.write_bytes(pack_overlays([plain, overlay]))
    first, second = read_overlays(path)
    assert set(first) == set(plain)
    assert set(second) == set(overlay) - {"badness"}
    for read, kept in zip((second, *second["further"]), (overlay, *overlay["further"]), strict=True):
        assert (read["caption"], read["letters"]) == (kept["caption"], kept["letters"])
        np.testing.assert_array_equal(read["target"], kept["target"])
        np.testing.assert_allclose(read["image"] / 255, kept["image"], atol=0.6 / 255)


@pytest.mark.parametrize(
    "view",
    [
        {"patch_size": (24, 20, 16)},
        {"patch_size": (40, 30, 20)},  # larger than the volume
        {"spatial_dims": 2, "patch_size": (24, 20)},
        {"spatial_dims": 2, "patch_size": (20, 16), "slice_axis": 0, "neighbours": 1},
    ],
)
def test_gate_maps_lie_on_the_picture_below_them(tmp_path, view) -> None:
    network = _Gated()
    overlay = collected(box(), box() > 0, box() > 0, network=network, **view)
    overlay["input"] = pickle.loads(pickle.dumps(overlay["input"]))  # processes send it to each other
    gates = observe_gates(network, [overlay], task="segmentation", device="cpu")
    path = tmp_path / "gates.npz"
    path.write_bytes(pack_gate_views(gates))
    read = read_gate_views(path)
    (shown,), picture = read.samples[0], read.pictures[0]
    bright = picture["image"] > 128
    np.testing.assert_array_equal(bright, expected(picture["letters"], bright.shape))
    np.testing.assert_array_equal(picture["prediction"] == 1, bright)
    map_HW = cv2.resize(np.ascontiguousarray(shown.values), bright.shape[::-1])
    assert np.mean((map_HW > 0.5) == bright) > 0.85
    assert shown.values.max() == 1 and shown.values.min() == 0
    page = gates_section(read, task="segmentation", class_names=("background", "organ"))
    assert "bright gate, gate 1 of 1" in page and "case, " in page and 'class="side w">' in page


def test_a_thin_volume_does_not_make_a_tall_page() -> None:
    thin = np.zeros((2, 20, 16), np.float32)
    overlay = collected(thin, thin, thin) | {"worst": False}
    page = samples([overlay], {"class_names": ("background", "organ")})
    for text in (
        "axial, slice 9 of 16, R on the left",
        "coronal, slice 11 of 20, R on the left",
        "sagittal, slice 2 of 2<",
    ):
        assert text in page
    shapes = re.findall(r"--shape:(\d+)/(\d+);--most:(\d+)px", page)
    assert len(shapes) == 3 and all(int(most) * int(high) / int(wide) < 400 for wide, high, most in shapes)


def test_a_network_without_gates_keeps_no_input() -> None:
    assert "input" not in collected(box(), box() > 0, box() > 0)


def test_a_file_of_before_has_no_pictures(tmp_path) -> None:
    np.savez(tmp_path / "gates.npz", about=json.dumps({"samples": [], "tables": [], "neighbourhoods": []}))
    assert read_gate_views(tmp_path / "gates.npz").pictures == {}
