"""Preprocessing: what is decided from the training cases, and that voxels keep their place in the patient."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.geometry import Geometry, reorient
from vision_gates.volumes.preprocessing import (
    CaseFingerprint,
    ChannelPlan,
    Preprocessing,
    fingerprint,
    plan_preprocessing,
    prepare,
    restore_labels,
)

AS_IT_IS = ChannelPlan(kind="ct", low=-1e6, high=1e6, mean=0, std=1)
ORIENTATIONS = ["RAS", "LPS", "PIR", "SLA", "ARI", "IPL"]


def volume(array, geometry, *, name="case.nii.gz", modality=None):
    return SimpleNamespace(array=array, geometry=geometry, source=Path(name), modality=modality)


def plain(shape, spacing=(1.0, 1.0, 1.0)):
    return Geometry(shape, np.diag([*spacing, 1.0]))


def random_geometry(seed, shape, codes="RAS", *, tilt=0.3):
    """A grid of random spacing, origin and tilt whose axes run to ``codes``."""
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(np.eye(3) + tilt * generator.uniform(-0.5, 0.5, (3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.sign(np.diag(rotation)) * generator.uniform(0.6, 3.0, 3)
    affine[:3, 3] = generator.uniform(-200, 200, 3)
    return reorient(np.broadcast_to(0, shape), Geometry(shape, affine), codes)[1]


def world(geometry):
    """(3, X, Y, Z) mm of every voxel's centre."""
    indices = np.indices(geometry.shape).reshape(3, -1)
    return (geometry.affine[:3, :3] @ indices + geometry.affine[:3, 3:]).reshape(3, *geometry.shape)


def ramp(geometry):
    return np.einsum("c,cijk->ijk", [0.3, -0.2, 0.5], world(geometry) / 10)


def ball(geometry, radius):
    """Label 2 in a ball around the middle, 1 in its upper half."""
    places = world(geometry)
    centre = places.reshape(3, -1).mean(axis=1)
    inside = ((places - centre[:, None, None, None]) ** 2).sum(axis=0) < radius**2
    return (inside * np.where(places[2] > centre[2], 1, 2)).astype(np.uint8)


def centre_of_mass(labels, geometry, label):
    return world(geometry)[:, labels == label].mean(axis=1)


def plan(spacing, **changes):
    return Preprocessing(**{"spacing": spacing, "channels": (AS_IT_IS,), **changes})


def case(**changes):
    facts = {"shape": (100, 100, 100), "spacing": (1.0, 1.0, 1.0), "modalities": (None,), "zeros": (0.0,), **changes}
    return CaseFingerprint(**{"box": facts["shape"], "intensities": [[0.0, 1.0, 2.0, 3.0]], **facts})


# What is decided


def test_isotropic_spacing_is_the_median():
    cases = [case(spacing=(1.0, 1.0, z)) for z in (1.0, 1.5, 2.9)]
    decided = plan_preprocessing(cases, channel_names=["t1"])
    assert decided.spacing == (1.0, 1.0, 1.5)
    assert decided.low_resolution_axis is None and not decided.crop


def test_anisotropic_axis_takes_the_tenth_percentile():
    cases = [case(spacing=(0.8, 0.8, float(z)), shape=(300, 300, 20)) for z in range(5, 16)]
    decided = plan_preprocessing(cases, channel_names=["t1"])
    assert decided.spacing == (0.8, 0.8, 6.0)
    assert decided.low_resolution_axis == 2


def test_the_tenth_percentile_is_not_finer_than_the_plane():
    cases = [case(spacing=(8.0, 2.0, 2.0), shape=(20, 300, 300))] * 3
    cases += [case(spacing=(0.5, 2.0, 2.0), shape=(20, 300, 300))] * 2
    decided = plan_preprocessing(cases, channel_names=["t1"])
    assert decided.spacing == (2.0, 2.0, 2.0)
    assert decided.low_resolution_axis == 0, "the cases still have thick slices"


def test_thick_slices_that_are_many_keep_the_median():
    cases = [case(spacing=(1.0, float(y), 1.0), shape=(100, 40, 100)) for y in (4, 5, 6)]
    decided = plan_preprocessing(cases, channel_names=["t1"])
    assert decided.spacing == (1.0, 5.0, 1.0)
    assert decided.low_resolution_axis == 1


def test_spacing_may_be_given_or_kept():
    cases = [case(spacing=(1.0, 1.0, 2.0))]
    assert plan_preprocessing(cases, channel_names=["t1"], spacing=(2, 2, 2)).spacing == (2.0, 2.0, 2.0)
    assert plan_preprocessing(cases, channel_names=["t1"], spacing=(1, 1, 8)).low_resolution_axis == 2
    assert plan_preprocessing(cases, channel_names=["t1"], spacing=None).spacing is None
    with pytest.raises(ValidationError, match="positive"):
        plan_preprocessing(cases, channel_names=["t1"], spacing=(1, 0, 1))


@pytest.mark.parametrize(
    ("name", "modality", "kind"),
    [
        ("CT", None, "ct"),
        ("ct_arterial", None, "ct"),
        ("image", "CT", "ct"),
        ("ADC", "MR", "zscore"),
        ("fractional", None, "zscore"),
        ("image", None, "zscore"),
    ],
)
def test_ct_is_known_by_name_or_modality(name, modality, kind):
    decided = plan_preprocessing([case(modalities=(modality,))], channel_names=[name])
    assert decided.channels[0].kind == kind


def test_each_channel_has_its_own_normalisation():
    both = case(modalities=("PT", "CT"), zeros=(0.0, 0.0), intensities=[[5.0, 6.0], [0.0, 100.0]])
    pet, ct = plan_preprocessing([both], channel_names=["PET", "low dose"]).channels
    assert (pet.kind, ct.kind) == ("zscore", "ct")
    assert (ct.mean, ct.std) == (50.0, 50.0)
    assert plan_preprocessing([both], channel_names=["PET", "b"], normalize="zscore").channels[1].kind == "zscore"
    with pytest.raises(ConfigError, match="2 channels"):
        plan_preprocessing([both], channel_names=["PET"])


def test_ct_statistics_are_those_of_the_training_foreground():
    low, high = np.linspace(-200, 0, 1000), np.linspace(0, 400, 1000)
    cases = [case(intensities=[part]) for part in (low, high)]
    channel = plan_preprocessing(cases, channel_names=["CT"]).channels[0]
    pooled = np.concatenate([low, high]).astype(np.float32)
    np.testing.assert_allclose([channel.low, channel.high], np.percentile(pooled, [0.5, 99.5]), rtol=1e-6)
    np.testing.assert_allclose([channel.mean, channel.std], [pooled.mean(), pooled.std()], rtol=1e-5)
    with pytest.raises(DataError, match="no training case has a labelled voxel"):
        plan_preprocessing([case(intensities=[[]])], channel_names=["CT"])
    with pytest.raises(DataError, match="no training case"):
        plan_preprocessing([], channel_names=["CT"])


def test_empty_surroundings_are_cropped_and_left_out():
    tight, loose = case(box=(50, 100, 100), zeros=(0.6,)), case(zeros=(0.1,))
    assert plan_preprocessing([tight] * 3, channel_names=["t1"]).crop
    assert plan_preprocessing([tight] * 3, channel_names=["t1"]).channels[0].nonzero
    assert not plan_preprocessing([tight] * 3, channel_names=["t1"], crop=False).crop
    assert not plan_preprocessing([tight, loose, loose], channel_names=["t1"]).crop  # removes a sixth on average
    assert not plan_preprocessing([tight, loose, loose], channel_names=["t1"]).channels[0].nonzero


def test_json_keeps_everything():
    facts = case(modalities=("CT",), spacing=(0.7, 0.7, 5.1), shape=(200, 200, 10))
    decided = plan_preprocessing([facts], channel_names=["x"])
    assert Preprocessing.model_validate_json(decided.model_dump_json()) == decided
    again = CaseFingerprint.model_validate_json(facts.model_dump_json())
    assert again.intensities.dtype == np.float32
    assert plan_preprocessing([again], channel_names=["x"]) == decided


def test_mistakes_in_json_are_errors():
    with pytest.raises(ValidationError, match="sapcing"):
        Preprocessing.model_validate({**plan(None).model_dump(), "sapcing": 1})
    with pytest.raises(ValidationError, match="needs low, high, mean and std"):
        ChannelPlan(kind="ct", low=0)


# The facts of a case


def test_fingerprint_counts_in_ras_order():
    array = np.zeros((6, 8, 10), dtype=np.float32)
    array[1:4, 2:7, 3:5] = 7
    labels = np.zeros(array.shape, dtype=np.uint8)
    labels[2, 2:4, 3] = 1
    geometry = reorient(array, plain((10, 6, 8), (3, 1, 2)), "RAS")[1]
    turned, own = reorient(array.transpose(2, 0, 1), geometry, "PIR")
    facts = fingerprint(
        [volume(turned, own, modality="MR")],
        volume(reorient(labels.transpose(2, 0, 1), geometry, "PIR")[0], own),
        seed=0,
    )
    assert (facts.shape, facts.spacing, facts.box) == ((10, 6, 8), (3, 1, 2), (2, 3, 5))
    assert facts.modalities == ("MR",)
    assert facts.zeros[0] == pytest.approx(1 - 30 / 480)
    assert facts.intensities.tolist() == [[7, 7]]


def test_the_sample_is_fair_bounded_and_repeatable():
    array = np.arange(1, 40 * 40 * 40 + 1, dtype=np.float32).reshape(40, 40, 40)
    array[:20] = 0
    images = [volume(array, plain(array.shape)), volume(-array, plain(array.shape))]
    first, second, other = (fingerprint(images, None, seed=seed).intensities for seed in (3, 3, 4))
    assert first.shape == (2, 10_000)
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(first[0], -first[1]), "the channels share their voxels"
    assert len(np.unique(first[0])) == 10_000 and first[0].min() > 32_000
    assert first[0].mean() == pytest.approx(48_000, rel=0.01)


def test_fingerprint_of_an_empty_case():
    empty = volume(np.zeros((4, 5, 6), dtype=np.float32), plain((4, 5, 6)))
    facts = fingerprint([empty], None, seed=0)
    assert (facts.box, facts.zeros, facts.intensities.shape) == ((4, 5, 6), (1.0,), (1, 0))


# Geometry


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_ramp_in_the_patient_stays_that_ramp(codes, order):
    for seed in range(2):
        geometry = random_geometry(seed, (23, 31, 18), codes)
        image = volume(ramp(geometry).astype(np.float32), geometry)
        finer = tuple(np.random.default_rng(seed).uniform(0.4, 1.0, 3) * reorient(image.array, geometry)[1].spacing)
        prepared = prepare(plan(finer, order=order), [image])
        assert prepared.geometry.orientation == "RAS"
        np.testing.assert_allclose(prepared.geometry.spacing, finer, rtol=1e-9)
        expected = ramp(prepared.geometry)
        inner = (slice(2, -2),) * 3  # beyond the outermost centres the border is repeated
        np.testing.assert_allclose(prepared.image[0][inner], expected[inner], atol=1e-3)


def test_a_ramp_survives_larger_voxels():
    geometry = random_geometry(5, (60, 60, 60), "LPS")
    coarser = tuple(2.3 * np.array(reorient(np.empty((60, 60, 60)), geometry)[1].spacing))
    prepared = prepare(plan(coarser), [volume(ramp(geometry).astype(np.float32), geometry)])
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(prepared.image[0][inner], ramp(prepared.geometry)[inner], atol=1e-3)


def test_linear_interpolation_equals_that_of_itk():
    sitk = pytest.importorskip("SimpleITK")
    geometry = random_geometry(1, (20, 24, 16), "PIR")
    array = np.random.default_rng(0).normal(size=geometry.shape).astype(np.float32)
    prepared = prepare(plan((0.7, 0.8, 0.9), order=1), [volume(array, geometry)])

    moving = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    reference = sitk.Image(prepared.geometry.shape, sitk.sitkFloat32)
    for image, grid in ((moving, geometry), (reference, prepared.geometry)):
        itk = grid.to_itk()
        image.SetSpacing(itk["spacing"]), image.SetOrigin(itk["origin"]), image.SetDirection(itk["direction"])
    outside = 1e3
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, reference, sitk.Transform(), sitk.sitkLinear, outside))
    expected = expected.transpose(2, 1, 0)
    known = expected != outside
    assert known.mean() > 0.8
    np.testing.assert_allclose(prepared.image[0][known], expected[known], atol=1e-3)


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_a_labelled_ball_keeps_place_and_volume(codes, factor):
    geometry = random_geometry(7, (36, 30, 33), codes)
    labels = ball(geometry, 12.0)
    target = tuple(factor * np.array(reorient(labels, geometry)[1].spacing))
    prepared = prepare(plan(target), [volume(labels.astype(np.float32), geometry)], volume(labels, geometry))
    restored = restore_labels(prepared.labels, prepared.geometry, prepared.source)
    assert restored.shape == geometry.shape and restored.dtype == np.uint8 and restored.flags.c_contiguous
    for label in (1, 2):
        before = centre_of_mass(labels, geometry, label)
        for after, grid in ((prepared.labels, prepared.geometry), (restored, geometry)):
            np.testing.assert_allclose(centre_of_mass(after, grid, label), before, atol=0.3 * max(target))
            ml = (labels == label).sum() * geometry.voxel_ml
            assert (after == label).sum() * grid.voxel_ml == pytest.approx(ml, rel=0.05 if factor <= 1 else 0.12)
    if factor <= 1:
        assert np.array_equal(restored, labels), "finer voxels lose nothing"
    else:
        assert (restored != labels).mean() < 0.02


def test_image_and_labels_lie_on_top_of_each_other():
    geometry = random_geometry(2, (40, 40, 40), "SLA")
    labels = (ball(geometry, 15.0) > 0).astype(np.uint8)
    prepared = prepare(plan((0.9, 1.1, 1.3)), [volume(labels.astype(np.float32), geometry)], volume(labels, geometry))
    assert ((prepared.image[0] > 0.5) != prepared.labels).mean() < 0.01


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("crop", [False, True])
def test_without_resampling_the_inverse_is_exact(codes, crop):
    geometry = random_geometry(4, (9, 14, 11), codes)
    generator = np.random.default_rng(0)
    array = np.zeros(geometry.shape, dtype=np.float32)
    array[2:7, 2:8, 1:8] = generator.normal(size=(5, 6, 7)) + 10
    labels = generator.integers(0, 4, geometry.shape).astype(np.uint8) * (array > 0)
    near = tuple(np.array(reorient(array, geometry)[1].spacing) * 1.0009)
    for spacing in (None, near):
        prepared = prepare(plan(spacing, crop=crop), [volume(array, geometry)], volume(labels, geometry))
        assert prepared.image.size == (5 * 6 * 7 if crop else array.size)
        assert prepared.image.flags.c_contiguous and prepared.labels.flags.c_contiguous
        turned = reorient(array, geometry)[0]
        assert np.array_equal(np.sort(prepared.image[prepared.image != 0]), np.sort(turned[turned != 0]))
        assert np.array_equal(restore_labels(prepared.labels, prepared.geometry, geometry), labels)
        assert not prepared.labels[prepared.image[0] == 0].any()


def test_outside_the_prepared_region_is_background():
    geometry = plain((12, 12, 12))
    array = np.zeros(geometry.shape, dtype=np.float32)
    array[4:8, 4:8, 4:8] = 1
    prepared = prepare(plan((0.5, 0.5, 0.5), crop=True), [volume(array, geometry)])
    everywhere = np.full(prepared.geometry.shape, 3, dtype=np.int16)
    restored = restore_labels(everywhere, prepared.geometry, geometry)
    assert restored.dtype == np.int16
    assert np.array_equal(restored, 3 * array)
    elsewhere = Geometry((5, 5, 5), geometry.affine + np.array([[0, 0, 0, 500.0]] * 3 + [[0] * 4]))
    assert not restore_labels(everywhere, prepared.geometry, elsewhere).any()


@pytest.mark.parametrize("spacing", [3.3, 8.0, 25.0])
def test_large_voxels_still_cover_the_whole_source(spacing):
    geometry = plain((11, 9, 26))
    prepared = prepare(plan((spacing,) * 3), [volume(np.ones(geometry.shape, dtype=np.float32), geometry)])
    assert np.allclose(prepared.image, 1, atol=1e-5)
    ones = np.ones(prepared.geometry.shape, dtype=np.uint8)
    assert restore_labels(ones, prepared.geometry, geometry).all()


@pytest.mark.parametrize("shape", [(1, 20, 20), (20, 2, 20), (20, 20, 1), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_one_or_two_voxels_along_an_axis(shape, order):
    geometry = random_geometry(9, shape)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = volume((array > 0).astype(np.uint8), geometry)
    for factor in (0.5, 3.0):
        prepared = prepare(
            plan(tuple(factor * np.array(geometry.spacing)), order=order), [volume(array, geometry)], labels
        )
        assert np.isfinite(prepared.image).all() and min(prepared.geometry.shape) >= 1
        restored = restore_labels(prepared.labels, prepared.geometry, geometry)
        assert restored.shape == shape
        if factor < 1:
            assert np.array_equal(restored, labels.array)


def test_tilted_grids_are_restored_too():
    """Never so after prepare; a geometry that was stored and rounded, or another series of the same patient, may be."""
    prepared, source = random_geometry(1, (60, 60, 60)), random_geometry(2, (30, 30, 30), "PSR")
    affine = source.affine.copy()
    affine[:3, 3] += world(prepared).reshape(3, -1).mean(axis=1) - world(source).reshape(3, -1).mean(axis=1)
    source = Geometry(source.shape, affine)
    labels = np.random.default_rng(0).integers(1, 9, prepared.shape).astype(np.uint8)
    restored = restore_labels(labels, prepared, source)

    between = np.linalg.inv(prepared.affine) @ source.affine
    nearest = between[:3, :3] @ np.indices(source.shape).reshape(3, -1) + between[:3, 3:]
    nearest = np.floor(nearest + 0.5).astype(int)
    inside = ((nearest >= 0) & (nearest < 60)).all(axis=0)
    expected = np.where(inside, labels[tuple(nearest.clip(0, 59))], 0).reshape(source.shape)
    assert 0.2 < inside.mean() < 1
    assert np.array_equal(restored, expected)


def test_low_resolution_axis_keeps_its_slices_apart():
    array = np.random.default_rng(0).normal(size=(16, 16, 5)).astype(np.float32)
    image = volume(array, plain(array.shape, (1, 1, 9)))
    prepared = prepare(plan((0.5, 0.5, 3.0), low_resolution_axis=2), [image])
    assert prepared.image.shape == (1, 32, 32, 15)
    assert np.array_equal(prepared.image[..., 0::3], prepared.image[..., 2::3])
    smooth = prepare(plan((0.5, 0.5, 3.0), low_resolution_axis=2, low_resolution_order=1), [image])
    assert not np.array_equal(smooth.image[..., 0::3], smooth.image[..., 2::3])
    assert np.allclose(smooth.image[..., 1::3], prepared.image[..., 1::3], atol=1e-5)


def test_large_voxels_do_not_alias():
    """The finest pattern there is must fade, not turn into a coarse one."""
    array = np.broadcast_to(np.where(np.arange(60) % 2, 1.0, -1.0), (4, 4, 60)).astype(np.float32)
    prepared = prepare(plan((1, 1, 2.9)), [volume(array, plain(array.shape))])
    assert np.abs(prepared.image[..., 3:-3]).max() < 0.1


def test_restoring_needs_little_memory():
    source = plain((256, 256, 60), (0.5, 0.5, 1.0))
    prepared = plain((128, 128, 60))
    labels = np.ones(prepared.shape, dtype=np.uint8)
    tracemalloc.start()
    try:
        restore_labels(labels, prepared, source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * np.prod(source.shape), "bytes; a grid of float64 coordinates would take 24 a voxel"


# Intensities


def test_ct_is_clipped_and_scaled_with_the_training_numbers():
    array = np.array([-2000, -100, 50, 900], dtype=np.float32).reshape(1, 2, 2)
    channel = ChannelPlan(kind="ct", low=-100, high=300, mean=50, std=50)
    prepared = prepare(plan(None, channels=(channel,)), [volume(array, plain(array.shape))])
    assert prepared.image.dtype == np.float32
    assert prepared.image.ravel().tolist() == [-3, -3, 0, 5]
    assert array.min() == -2000, "the volume that was read is left alone"


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_zscore_of_each_case(scale):
    array = (np.random.default_rng(0).normal(3, 2, (8, 9, 10)) * scale).astype(np.float32)
    array[:3] = 0
    image = [volume(array, plain(array.shape))]
    everything = prepare(plan(None, channels=(ChannelPlan(kind="zscore"),)), image).image
    assert everything.mean() == pytest.approx(0, abs=1e-5) and everything.std() == pytest.approx(1, abs=1e-5)
    tissue = prepare(plan(None, channels=(ChannelPlan(kind="zscore", nonzero=True),)), image).image[0]
    assert not tissue[:3].any()
    assert tissue[3:].mean() == pytest.approx(0, abs=1e-5) and tissue[3:].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678, -3e7])
@pytest.mark.parametrize("nonzero", [False, True])
def test_a_constant_image_becomes_zero(value, nonzero):
    array = np.full((7, 8, 9), value, dtype=np.float32)
    prepared = prepare(
        plan((0.7, 1.3, 1.0), channels=(ChannelPlan(kind="zscore", nonzero=nonzero),), crop=True),
        [volume(array, plain(array.shape))],
    )
    np.testing.assert_allclose(prepared.image, 0, atol=1e-3 * max(1, abs(value) * 1e-6))


def test_channels_are_prepared_on_their_own():
    geometry = random_geometry(3, (12, 13, 14), "LPS")
    first, second = np.random.default_rng(0).normal(size=(2, 12, 13, 14)).astype(np.float32)
    target = (0.9, 0.9, 0.9)
    both = prepare(
        plan(target, channels=(AS_IT_IS, ChannelPlan(kind="zscore"))),
        [volume(first, geometry), volume(second, geometry)],
    )
    assert both.image.shape[0] == 2
    assert np.array_equal(both.image[0], prepare(plan(target), [volume(first, geometry)]).image[0])
    alone = prepare(plan(target, channels=(ChannelPlan(kind="zscore"),)), [volume(second, geometry)])
    assert np.array_equal(both.image[1], alone.image[0])


# Labels


@pytest.mark.parametrize(("values", "dtype"), [((0, 255), np.uint8), ((0, 256), np.int16), ((-1, 3), np.int16)])
def test_labels_take_the_smallest_type(values, dtype):
    geometry = plain((4, 4, 4))
    array = np.zeros(geometry.shape, dtype=np.int64)
    array[0, 0, :2] = values
    prepared = prepare(plan((0.5, 0.5, 0.5)), [volume(array.astype(np.float32), geometry)], volume(array, geometry))
    assert prepared.labels.dtype == dtype
    assert set(np.unique(prepared.labels)) == {0, *values}


def test_labels_beyond_int16_are_an_error():
    geometry = plain((4, 4, 4))
    labels = volume(np.full(geometry.shape, 40000), geometry, name="many.nii.gz")
    with pytest.raises(DataError, match=r"many\.nii\.gz: labels run from 40000 to 40000; renumber"):
        prepare(plan(None), [volume(np.ones(geometry.shape, dtype=np.float32), geometry)], labels)


def test_thin_structures_survive_smaller_voxels():
    geometry = plain((20, 20, 20))
    labels = np.zeros(geometry.shape, dtype=np.uint8)
    labels[10, 10, :] = 1  # a vessel of one voxel
    image = volume(labels.astype(np.float32), geometry)
    prepared = prepare(plan((0.7, 0.7, 0.7)), [image], volume(labels, geometry))
    assert (prepared.labels == 1).any(axis=(0, 1)).all()


def test_labels_and_channels_may_run_along_other_axes():
    """A DICOM series is LPS, its mask often stored as LAS or RAS: the same voxels."""
    geometry = random_geometry(6, (10, 12, 14), "LPS")
    array = np.random.default_rng(0).normal(size=geometry.shape).astype(np.float32)
    labels = (array > 0.5).astype(np.uint8)
    image, other = volume(array, geometry), volume(*reorient(array, geometry, "SRA"))
    two = plan((1.0, 1.0, 1.0), channels=(AS_IT_IS, AS_IT_IS))
    prepared = prepare(two, [image, other], volume(*reorient(labels, geometry, "LAS")))
    assert np.array_equal(prepared.image[0], prepared.image[1])
    assert np.array_equal(prepared.labels, prepare(two, [image, image], volume(labels, geometry)).labels)
    assert prepared.source is geometry


# Mistakes


def test_grids_that_differ_are_named():
    array = np.ones((8, 8, 8), dtype=np.float32)
    first = volume(array, plain(array.shape), name="t1.nii.gz")
    thick = volume(array, plain(array.shape, (1, 1, 2)), name="t2.nii.gz")
    small = volume(array[:4].astype(np.uint8), plain((4, 8, 8)), name="labels.nii.gz")
    spacing = r"t2\.nii\.gz: not on the grid of t1\.nii\.gz: spacing 1 x 1 x 2 mm, not 1 x 1 x 1 mm"
    size = r"labels\.nii\.gz: not on the grid of t1\.nii\.gz: size 4 x 8 x 8, not 8 x 8 x 8"
    with pytest.raises(DataError, match=spacing):
        prepare(plan(None, channels=(AS_IT_IS, AS_IT_IS)), [first, thick])
    with pytest.raises(DataError, match=spacing):
        fingerprint([first, thick], None, seed=0)
    with pytest.raises(DataError, match=size):
        prepare(plan(None), [first], small)


def test_the_number_of_channels_is_checked():
    image = volume(np.ones((4, 4, 4), dtype=np.float32), plain((4, 4, 4)), name="t1.nii.gz")
    with pytest.raises(DataError, match=r"t1\.nii\.gz: 1 channel for a model of 2"):
        prepare(plan(None, channels=(AS_IT_IS, AS_IT_IS)), [image])
    with pytest.raises(ValueError, match="their grid is"):
        restore_labels(np.zeros((3, 3, 3), dtype=np.uint8), plain((4, 4, 4)), plain((4, 4, 4)))


# Real volumes


def read(path, dtype=np.float32):
    import nibabel

    image = nibabel.load(path)
    return volume(np.asarray(image.dataobj).astype(dtype), Geometry(image.shape, image.affine), name=path)


def test_a_real_ct_comes_back(data_folder):
    image = read(data_folder / "ct" / "ct_3mm.nii.gz")
    labels = read(data_folder / "ct" / "ct_3mm_seg.nii.gz", np.uint8)
    decided = plan_preprocessing([fingerprint([image], labels, seed=0)], channel_names=["CT"], spacing=(1.5, 1.5, 1.5))
    prepared = prepare(decided, [image], labels)
    assert prepared.image.shape == (1, 244, 202, 224)
    assert np.array_equal(restore_labels(prepared.labels, prepared.geometry, prepared.source), labels.array)


def test_real_cardiac_mri_is_anisotropic(data_folder):
    images = sorted((data_folder / "acdc" / "imagesTr").glob("*.nii.gz"))[:6]
    pairs = [
        (read(path), read(data_folder / "acdc" / "labelsTr" / path.name.replace("_0000", ""), np.uint8))
        for path in images
    ]
    decided = plan_preprocessing(
        [fingerprint([image], labels, seed=0) for image, labels in pairs], channel_names=["cine MRI"]
    )
    assert decided.low_resolution_axis == 2 and decided.channels[0].kind == "zscore"
    finer = decided.model_copy(update={"spacing": (1.25, 1.25, 5.0)})
    for image, labels in pairs:
        prepared = prepare(finer, [image], labels)
        assert np.array_equal(restore_labels(prepared.labels, prepared.geometry, prepared.source), labels.array)
