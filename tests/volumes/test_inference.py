"""Sliding windows: the same labels as the whole volume at once, and no more memory than the plan says."""

import itertools
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from vision_gates.errors import ConfigError, UserError
from vision_gates.volumes import inference, windows
from vision_gates.volumes.blending import label_windows
from vision_gates.volumes.inference import neighbour_slices, plan_inference, predict_labels
from vision_gates.volumes.windows import plan_windows

GIB = 2**30


def image_of(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def pointwise(channels, classes, dims):
    """A network that sees nothing but the voxel: its windows must agree with each other and with the whole."""
    return (nn.Conv3d if dims == 3 else nn.Conv2d)(channels, classes, 1).eval()


def convolutional(channels, classes, dims):
    """A random network that sees its surroundings, and therefore also the borders of its window."""
    conv = nn.Conv3d if dims == 3 else nn.Conv2d
    layers = conv(channels, 8, 3, padding=1), nn.GELU(), conv(8, classes, 3, padding=2, dilation=2)
    return nn.Sequential(*layers).eval()


def probabilities(network, image):
    with torch.no_grad():
        return network(torch.as_tensor(image)[None]).softmax(1)[0].numpy()


@pytest.mark.parametrize("overlap", [0, 0.5, 0.75])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((13, 11, 9), (4, 4, 4)),
        ((5, 31, 7), (8, 6, 3)),  # the first axis is smaller than the window
        ((3, 2, 5), (8, 7, 6)),  # all are
        ((9, 6, 40), (9, 6, 7)),  # a long one, along which the slab goes round several times
        ((8, 8, 8), (8, 8, 8)),
    ],
)
def test_windows_of_a_volume(shape, patch, overlap):
    network, image = pointwise(2, 5, 3), image_of(2, *shape)
    labels = predict_labels(network, image, num_classes=5, patch_size=patch, spatial_dims=3, overlap=overlap)
    assert labels.dtype == np.uint8 and len(np.unique(labels)) >= 3
    np.testing.assert_array_equal(labels, probabilities(network, image).argmax(0))


@pytest.mark.parametrize("overlap", [0, 0.5, 0.75])
@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("patch", [(4, 6), (16, 5), (32, 32)])
def test_windows_of_slices(patch, slice_axis, overlap):
    network, image = pointwise(2, 4, 2), image_of(2, 13, 9, 11)
    labels = predict_labels(
        network,
        image,
        num_classes=4,
        patch_size=patch,
        spatial_dims=2,
        slice_axis=slice_axis,
        overlap=overlap,
        batch_size=3,
    )
    slices = np.moveaxis(image, 1 + slice_axis, 0)
    expected = [probabilities(network, np.ascontiguousarray(one)).argmax(0) for one in slices]
    np.testing.assert_array_equal(labels, np.stack(expected, axis=slice_axis))


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(19, 23, 30), (9, 31, 12), (7, 8, 9)])
def test_blend_is_that_of_monai(shape, overlap):
    inferers = pytest.importorskip("monai.inferers")
    network, image = convolutional(2, 6, 3), image_of(2, *shape)
    labels = predict_labels(
        network, image, num_classes=6, patch_size=(12, 10, 11), spatial_dims=3, overlap=overlap, batch_size=2
    )
    with torch.no_grad():
        blended = inferers.sliding_window_inference(
            torch.from_numpy(image)[None],
            (12, 10, 11),
            2,
            lambda x: network(x).softmax(1),
            overlap=overlap,
            mode="gaussian",
        )[0]
    first, second = blended.topk(2, dim=0).values
    clear = (first - second > 1e-5).numpy()
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(labels[clear], blended.argmax(0).numpy()[clear])
    assert (labels != probabilities(network, image).argmax(0)).any(), "the windows make no difference: nothing tested"


@pytest.mark.parametrize("mirror", [(0,), (2, 1), (0, 1, 2)])
def test_mirrored_views_are_averaged(mirror):
    network, image = convolutional(1, 4, 3), image_of(1, 9, 8, 7)
    settings = dict(num_classes=4, patch_size=(9, 8, 7), spatial_dims=3)
    views = []
    for count in range(len(mirror) + 1):
        for axes in itertools.combinations([1 + axis for axis in mirror], count):
            views.append(np.flip(probabilities(network, np.flip(image, axes).copy()), axes))
    assert len(views) == 2 ** len(mirror)
    labels = predict_labels(network, image, mirror=mirror, **settings)
    np.testing.assert_array_equal(labels, np.mean(views, axis=0).argmax(0))
    assert (labels != predict_labels(network, image, **settings)).any()


def test_mirrors_change_nothing_for_a_network_that_ignores_them():
    network, image = pointwise(1, 4, 3), image_of(1, 9, 8, 12)
    settings = dict(num_classes=4, patch_size=(5, 5, 5), spatial_dims=3)
    plain, mirrored = (predict_labels(network, image, mirror=mirror, **settings) for mirror in ((), (0, 1, 2)))
    np.testing.assert_array_equal(plain, mirrored)


def test_mirrored_slices_have_mirrored_neighbours():
    network, image = convolutional(2 * 3, 4, 2), image_of(2, 9, 8, 5)
    settings = dict(num_classes=4, patch_size=(9, 8), spatial_dims=2, neighbours=1)

    def volume(of):
        slices = [np.concatenate([of[..., i] for i in neighbour_slices(k, neighbours=1, size=5)]) for k in range(5)]
        return np.stack([probabilities(network, one) for one in slices], axis=-1)

    mean = (volume(image) + volume(image[..., ::-1])[..., ::-1]) / 2
    labels = predict_labels(network, image, mirror=(2,), **settings)
    np.testing.assert_array_equal(labels, mean.argmax(0))
    np.testing.assert_array_equal(predict_labels(network, image, **settings), volume(image).argmax(0))
    assert (labels != volume(image).argmax(0)).any()
    alone = plan_inference((1, 9, 8, 5), num_classes=4, patch_size=(9, 8), spatial_dims=2, mirror=(0, 2))
    assert alone.views == 2, "a slice without neighbours has no mirror image across"


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_order_of_neighbouring_slices(slice_axis):
    """Channel c of slice z holds 10 z + c: slices one after the other, the outermost repeated."""
    shape = [4, 4, 4]
    shape[slice_axis] = 6
    values = np.moveaxis(np.empty((2, *shape), dtype=np.float32), 1 + slice_axis, 1)
    values[...] = (10 * np.arange(6) + np.arange(2)[:, None])[:, :, None, None]
    seen = []

    def network(x_BCHW):
        assert (x_BCHW == x_BCHW[..., :1, :1]).all()
        seen.extend(x_BCHW[:, :, 0, 0].int().tolist())
        return torch.zeros(len(x_BCHW), 2, *x_BCHW.shape[2:])

    image = np.ascontiguousarray(np.moveaxis(values, 1, 1 + slice_axis))
    settings = dict(num_classes=2, patch_size=(4, 4), spatial_dims=2, neighbours=2, slice_axis=slice_axis)
    predict_labels(network, image, batch_size=4, **settings)
    assert len(seen) == 6
    assert seen[0] == [0, 1, 0, 1, 0, 1, 10, 11, 20, 21]
    assert seen[3] == [10, 11, 20, 21, 30, 31, 40, 41, 50, 51]
    assert seen[5] == [30, 31, 40, 41, 50, 51, 50, 51, 50, 51]


def test_small_volumes_lie_between_zeros():
    seen = []

    def network(x):
        seen.append(x.clone())
        return torch.zeros(len(x), 2, *x.shape[2:])

    predict_labels(network, np.ones((1, 3, 4, 2), np.float32), num_classes=2, patch_size=(6, 4, 5), spatial_dims=3)
    expected = torch.zeros(1, 1, 6, 4, 5)
    expected[:, :, 1:4, :, 1:3] = 1
    torch.testing.assert_close(seen, [expected])


@pytest.mark.parametrize("dims", [2, 3])
def test_batch_size_and_progress(dims):
    network, image = convolutional(1, 3, dims), image_of(1, 14, 9, 10)
    results = []
    for batch_size in (1, 4, 100):
        done = []
        results.append(
            predict_labels(
                network,
                image,
                num_classes=3,
                patch_size=(6,) * dims,
                spatial_dims=dims,
                batch_size=batch_size,
                progress=lambda *counts, done=done: done.append(counts),
            )
        )
        total = done[-1][1]
        assert done == [(min(n, total), total) for n in range(batch_size, total + batch_size, batch_size)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def peak_bytes(function, folder):
    """The most memory of PyTorch's CPU allocator that existed at a time beyond what did at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    assert sum(sizes) == result.nbytes, "the trace is complete: only the labels are left"
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 24, 24, 192), dict()),
        ((1, 24, 96, 24), dict(mirror=(0, 2), batch_size=3)),
        ((1, 96, 24, 24), dict(blend_dtype=torch.float16, overlap=0.75)),
        ((2, 48, 48, 30), dict(patch_size=(48, 48), spatial_dims=2, neighbours=1, batch_size=2)),
    ],
)
def test_memory_is_what_the_plan_says(shape, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "_CHUNK_VOXELS", 4096)
    settings = dict(num_classes=9, patch_size=(16, 16, 16), spatial_dims=3) | changes
    plan = plan_inference(shape, **settings)
    network, image = pointwise(plan.in_channels, 9, settings["spatial_dims"]), image_of(*shape)
    peak = peak_bytes(lambda: predict_labels(network, image, **settings), tmp_path)
    assert 0.8 * plan.host_bytes < peak < 1.02 * plan.host_bytes
    assert peak < 4 * 9 * np.prod(shape[1:]), "less than the volume's probabilities"


def test_large_volumes_fit():
    shape, body = (1, 512, 512, 600), dict(num_classes=20, patch_size=(128, 128, 128), spatial_dims=3)
    plan = plan_inference(shape, **body)
    assert plan.slab_shape == (20, 512, 512, 128) and plan.num_windows == 7 * 7 * 9
    assert plan.accumulator_bytes == 20 * 512 * 512 * 128 * 4
    assert plan.result_bytes == 512 * 512 * 600 and plan.input_bytes == 4 * plan.result_bytes
    assert plan.host_bytes < 3.3 * GIB and plan.device_bytes == 0
    assert plan.describe() == (
        "441 windows of 128 x 128 x 128; memory beyond the input: 3.0 GiB on the host, and what the network takes"
    )
    assert plan_inference(shape, mirror=(0, 1, 2), batch_size=4, **body).host_bytes < 6 * GIB
    assert plan_inference(shape, blend_dtype=torch.float16, **body).host_bytes < 2 * GIB
    assert plan_inference((1, 600, 512, 512), **body).slab_shape == (20, 128, 512, 512)
    slices = dict(num_classes=20, patch_size=(512, 512), spatial_dims=2)
    assert plan_inference(shape, **slices).host_bytes < 0.25 * GIB
    assert (
        plan_inference(shape, mirror=(0,), **slices)
        .describe()
        .startswith("600 windows of 512 x 512, each in 2 mirrored views; memory beyond the input: ")
    )


def test_sums_stand_where_there_is_room(monkeypatch):
    shape, body = (1, 512, 512, 600), dict(num_classes=20, patch_size=(128, 128, 128), spatial_dims=3, device="cuda:0")
    kinds = {}
    for free in (4 * GIB, 8 * GIB):
        monkeypatch.setattr(inference, "_free_bytes", lambda device, free=free: free)
        plan = plan_inference(shape, **body)
        kinds[free] = plan.blend_device.type
        assert f"{plan.device_bytes / GIB:.1f}" in plan.describe() or plan.device_bytes < GIB
        assert (plan.host_bytes > plan.accumulator_bytes) == (plan.blend_device.type == "cpu")
    assert kinds == {4 * GIB: "cpu", 8 * GIB: "cuda"}
    assert plan_inference(shape, accumulate_on="host", **body).blend_device.type == "cpu"
    monkeypatch.setattr(inference, "_free_bytes", lambda device: 0)
    assert plan_inference(shape, accumulate_on="device", **body).blend_device.type == "cuda"


def test_sums_in_half_precision():
    network, image = convolutional(1, 5, 3), image_of(1, 20, 18, 30)
    settings = dict(num_classes=5, patch_size=(12, 12, 12), spatial_dims=3, overlap=0.75)
    single, half = (
        predict_labels(network, image, blend_dtype=dtype, **settings) for dtype in (torch.float32, torch.float16)
    )
    assert (single == half).mean() > 0.99


@pytest.mark.parametrize(("classes", "dtype"), [(255, np.uint8), (300, np.int16)])
def test_many_classes(classes, dtype):
    image = np.arange(4 * 5 * 6, dtype=np.float32).reshape(1, 4, 5, 6) + classes - 120

    def network(x):  # the logit of class k is largest where the image is k
        return -10 * (x - torch.arange(classes).reshape(1, -1, 1, 1, 1)).abs()

    labels = predict_labels(network, image, num_classes=classes, patch_size=(4, 4, 4), spatial_dims=3)
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels, image[0].astype(int))


def test_any_array_will_do(tmp_path):
    network, image = pointwise(2, 3, 3), image_of(2, 7, 8, 9)
    settings = dict(num_classes=3, patch_size=(5, 5, 5), spatial_dims=3)
    expected = predict_labels(network, image, **settings)
    np.save(tmp_path / "image.npy", image)
    on_disk = np.load(tmp_path / "image.npy", mmap_mode="r")
    for same in (image.astype(np.float64), torch.from_numpy(image), np.asfortranarray(image), on_disk):
        np.testing.assert_array_equal(predict_labels(network, same, **settings), expected)
    backwards = predict_labels(network, image[:, ::-1, :, ::-1], **settings)
    np.testing.assert_array_equal(backwards, expected[::-1, :, ::-1])


def test_autocast_surrounds_the_network():
    depth = []

    @contextmanager
    def autocast():
        depth.append(1)
        yield
        depth.pop()

    def network(x):
        assert depth and not torch.is_grad_enabled()
        return torch.zeros(len(x), 2, *x.shape[2:], dtype=torch.bfloat16)

    labels = predict_labels(
        network, image_of(1, 4, 4, 4), num_classes=2, patch_size=(4, 4, 4), spatial_dims=3, autocast=autocast
    )
    assert not depth and (labels == 0).all()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_smaller_batches_where_memory_is_short(error):
    inner, image, sizes = pointwise(1, 3, 3), image_of(1, 12, 12, 12), []
    settings = dict(num_classes=3, patch_size=(6, 6, 6), spatial_dims=3, batch_size=8)
    limit = 1

    def network(x):
        sizes.append(len(x))
        if len(x) > limit:
            raise error
        return inner(x)

    labels = predict_labels(network, image, **settings)
    assert sizes == [8, 4, 2] + [1] * 27
    np.testing.assert_array_equal(labels, probabilities(inner, image).argmax(0))
    limit = 0
    with pytest.raises(UserError, match=r"^cpu has too little memory for one window of 6 x 6 x 6: lower patch_size$"):
        predict_labels(network, image, **settings)


@pytest.mark.parametrize(
    ("dims", "changes"),
    [
        (3, dict(overlap=0.75, batch_size=3)),
        (3, dict(mirror=(0, 2))),
        (2, dict(neighbours=1, mirror=(0, 2), batch_size=2)),
        (2, dict(slice_axis=0, overlap=0.25)),
    ],
)
def test_numpy_finds_the_same_labels(dims, changes):
    settings = dict(num_classes=4, patch_size=(8, 10, 12)[:dims], spatial_dims=dims) | changes
    image, steps = image_of(2, 13, 17, 15), []
    plan = plan_windows(image.shape, **settings)
    network = convolutional(plan.in_channels, 4, dims)

    def on_arrays(x):
        assert x.flags.c_contiguous and x.dtype == np.float32
        with torch.no_grad():
            return network(torch.from_numpy(x)).numpy()

    labels = label_windows(on_arrays, image, plan, progress=lambda *step: steps.append(step))
    expected = predict_labels(network, image, **settings)
    assert labels.dtype == expected.dtype and (labels == expected).mean() > 0.9999 and len(np.unique(labels)) == 4
    assert steps[-1] == (plan.num_windows, plan.num_windows) and len(steps) == -(-plan.num_windows // plan.batch_size)
    for wrong, message in (
        (lambda x: x[:, :1], "returns .*, not logits"),
        (lambda x: on_arrays(x) * np.nan, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            label_windows(wrong, image, plan)


def test_other_errors_of_the_network_pass():
    def network(x):
        raise RuntimeError("mat1 and mat2 do not fit")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predict_labels(network, image_of(1, 4, 4, 4), num_classes=2, patch_size=(4, 4, 4), spatial_dims=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(patch_size=(4, 4)), r"patch_size is \(4, 4\): it must be 3 sizes"),
        (dict(patch_size=(4, 0, 4)), "patch_size"),
        (dict(spatial_dims=2), r"patch_size is \(4, 4, 4\): it must be 2 sizes"),
        (dict(spatial_dims=4), "spatial_dims is 4"),
        (dict(overlap=1), "overlap is 1: it must be at least 0 and less than 1"),
        (dict(overlap=-0.1), "overlap is -0.1"),
        (dict(mirror=(0, 3)), r"mirror is \(0, 3\): it must be axes of 0, 1 and 2"),
        (dict(mirror=(1, 1)), "mirror"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(num_classes=1), "num_classes is 1"),
        (dict(neighbours=1), "neighbours is 1"),
        (dict(spatial_dims=2, patch_size=(4, 4), neighbours=-1), "neighbours is -1"),
        (dict(spatial_dims=2, patch_size=(4, 4), slice_axis=3), "slice_axis is 3"),
        (dict(accumulate_on="gpu"), "accumulate_on is gpu"),
        (dict(blend_dtype=torch.int8), "blend_dtype is torch.int8"),
    ],
)
def test_unusable_settings(change, message):
    settings = dict(num_classes=3, patch_size=(4, 4, 4), spatial_dims=3) | change
    with pytest.raises(ConfigError, match=message) as caught:
        predict_labels(pointwise(1, 3, 3), image_of(1, 6, 6, 6), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(6, 6, 6), (1, 0, 6, 6), (1, 1, 6, 6, 6)])
def test_unusable_shapes(shape):
    with pytest.raises(ValueError, match=r"an image is \(channels, x, y, z\)"):
        predict_labels(pointwise(1, 3, 3), np.zeros(shape), num_classes=3, patch_size=(4, 4, 4), spatial_dims=3)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (pointwise(1, 4, 3), r"returns \(1, 4, 4, 4, 4\), not logits \(1, 3, 4, 4, 4\): .* made for 3 classes\?"),
        (nn.Conv3d(1, 3, 3), r"returns \(1, 3, 2, 2, 2\)"),
        (lambda x: [x, x], "returns a list"),
        (lambda x: torch.full((1, 3, 4, 4, 4), torch.nan), r"not finite in the windows at \(0, 0, 0\)"),
    ],
)
def test_unusable_networks(network, message):
    with pytest.raises(UserError, match=message) as caught:
        predict_labels(network, image_of(1, 6, 6, 6), num_classes=3, patch_size=(4, 4, 4), spatial_dims=3)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulate_on", ["auto", "device", "host"])
def test_on_gpu(accumulate_on):
    network, image = pointwise(1, 5, 3), image_of(1, 20, 21, 40)
    settings = dict(num_classes=5, patch_size=(16, 16, 16), spatial_dims=3, mirror=(0,), batch_size=2)
    expected = predict_labels(network, image, **settings)
    labels = predict_labels(network.cuda(), image, device="cuda", accumulate_on=accumulate_on, **settings)
    assert (labels == expected).mean() > 0.999  # TF32 may turn a near tie
