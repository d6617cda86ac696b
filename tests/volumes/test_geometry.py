"""Geometry: the same place in the patient as nibabel and SimpleITK say, for every orientation."""

import itertools

import nibabel
import numpy as np
import pytest

from vision_gates.volumes.geometry import Geometry, reorient, reorient_like

sitk = pytest.importorskip("SimpleITK")

SHAPE = (5, 6, 7)
CODES = [
    "".join(codes)
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for codes in itertools.product(*axes)  # all 48
]


def rotation(*degrees):
    """About x, then y, then z."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one = np.eye(3)
        a, b = [other for other in range(3) if other != axis]
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turned = one @ turned
    return turned


def oblique(codes="RAS", spacing=(0.7, 1.1, 2.5)):
    """A tilted grid whose axes run near to ``codes``."""
    start = nibabel.orientations.axcodes2ornt(tuple(codes))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(start.astype(int)):
        affine[world, axis] = sign * spacing[axis]
    affine[:3, :3] = rotation(12, -7, 20) @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 140.0)
    return Geometry(SHAPE, affine)


def itk_image(geometry):
    image = sitk.GetImageFromArray(np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE).T)
    place = geometry.to_itk()
    image.SetSpacing(place["spacing"])
    image.SetOrigin(place["origin"])
    image.SetDirection(place["direction"])
    return image


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_agrees_with_nibabel_and_itk(codes):
    geometry = oblique(codes)
    image = nibabel.Nifti1Image(np.zeros(SHAPE), geometry.affine)
    assert geometry.orientation == codes == "".join(nibabel.aff2axcodes(image.affine))
    np.testing.assert_allclose(geometry.spacing, nibabel.affines.voxel_sizes(image.affine), rtol=1e-12)
    np.testing.assert_allclose(geometry.direction.T @ geometry.direction, np.eye(3), atol=1e-12)

    itk = itk_image(geometry)
    back = Geometry.from_itk(itk.GetSize(), itk.GetSpacing(), itk.GetOrigin(), itk.GetDirection())
    assert back.shape == SHAPE
    np.testing.assert_allclose(back.affine, geometry.affine, atol=1e-12)
    for index in ((0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 6), (3, 2, 5)):
        left, back_, up = itk.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(geometry.affine @ (*index, 1), (-left, -back_, up, 1), atol=1e-9)
    assert sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(itk.GetDirection()) == codes


@pytest.mark.parametrize("codes", CODES)
def test_reorient_keeps_every_voxel_in_its_place(codes):
    geometry = oblique("PSL")
    array = np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)
    turned, grid = reorient(array, geometry, codes)
    assert grid.orientation == codes and turned.shape == grid.shape and np.shares_memory(turned, array)

    itk = sitk.DICOMOrient(itk_image(geometry), codes)
    np.testing.assert_array_equal(turned, sitk.GetArrayFromImage(itk).T)
    np.testing.assert_allclose(
        grid.affine,
        Geometry.from_itk(itk.GetSize(), itk.GetSpacing(), itk.GetOrigin(), itk.GetDirection()).affine,
        atol=1e-9,
    )
    np.testing.assert_array_equal(reorient_like(turned, grid, geometry), array)


def test_reorient_leaves_leading_axes_alone():
    array = np.random.default_rng(0).normal(size=(2, 3, *SHAPE))
    turned, grid = reorient(array, oblique("PSL"), "RAS")
    for first, second in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(turned[first, second], reorient(array[first, second], oblique("PSL"), "RAS")[0])
    np.testing.assert_array_equal(reorient_like(turned, grid, oblique("PSL")), array)


def test_reorient_like_refuses_another_grid():
    geometry = oblique()
    moved = geometry.affine.copy()
    moved[0, 3] += 5
    with pytest.raises(ValueError, match="not on the target's grid: origin"):
        reorient_like(np.zeros(SHAPE), Geometry(SHAPE, moved), geometry)


def test_values():
    affine = np.diag([-0.5, 2.0, 3.0, 1.0])
    affine[:3, 3] = (10, 20, 30)
    geometry = Geometry(SHAPE, affine)
    assert geometry.spacing == (0.5, 2.0, 3.0) and geometry.origin == (10, 20, 30)
    assert geometry.orientation == "LAS" and geometry.voxel_ml == pytest.approx(0.003)
    assert geometry.to_itk() == {
        "spacing": (0.5, 2.0, 3.0),
        "origin": (-10, -20, 30),
        "direction": (1, 0, 0, 0, -1, 0, 0, 0, 1),
    }
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 1
    affine[0, 0] = 7  # the caller's array stays the caller's
    assert geometry.spacing[0] == 0.5


def test_differences():
    base = np.diag([1.0, 1.0, 2.0, 1.0])
    geometry = Geometry(SHAPE, base)
    assert geometry.differences(Geometry(SHAPE, base + 0)) == []

    wider = Geometry((5, 6, 9), np.diag([1.0, 1.0, 2.5, 1.0]))
    assert geometry.differences(wider) == [
        "size 5 x 6 x 9, not 5 x 6 x 7",
        "spacing 1 x 1 x 2.5 mm, not 1 x 1 x 2 mm",
    ]
    assert geometry.differences(Geometry(SHAPE, np.diag([-1.0, 1.0, 2.0, 1.0]))) == ["orientation LAS, not RAS"]
    tilted = base.copy()
    tilted[:3, :3] = rotation(1, 0, 0) @ tilted[:3, :3]
    assert geometry.differences(Geometry(SHAPE, tilted)) == ["the axes are tilted"]
    moved = base.copy()
    moved[2, 3] = 0.5
    assert geometry.differences(Geometry(SHAPE, moved)) == ["origin (0.00, 0.00, 0.50), not (0.00, 0.00, 0.00)"]


def test_differences_allow_for_rounding_alone():
    geometry = oblique()
    rounded = Geometry(SHAPE, geometry.affine.astype(np.float32))
    assert geometry.differences(rounded) == []
    assert geometry.differences(rounded, tolerance=1e-9) != []
    moved = geometry.affine.copy()
    moved[0, 3] += 0.011 * min(geometry.spacing)  # just beyond a hundredth of a voxel
    assert len(geometry.differences(Geometry(SHAPE, moved))) == 1


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4, 4), np.eye(4), "three axes, not 2"),
        ((4, 4, 4, 1), np.eye(4), "three axes, not 4"),
        (SHAPE, np.eye(3), "finite 4 x 4"),
        (SHAPE, np.diag([1, np.nan, 1, 1]), "finite 4 x 4"),
        (SHAPE, np.diag([1, 0, 1, 1]), "do not span space"),
        (SHAPE, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "do not span space"),
    ],
)
def test_impossible_grids(shape, affine, message):
    with pytest.raises(ValueError, match=message):
        Geometry(shape, np.array(affine, dtype=float))


def test_tiny_and_huge_voxels_span_space():
    for size in (1e-4, 1e4):
        assert Geometry(SHAPE, np.diag([size, size, size, 1])).spacing == pytest.approx((size,) * 3)
