"""Images with masks: pairing, label values, and what ends in which message."""

import pickle
import re
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image
from pydantic import ValidationError

from vision_gates.datasets.base import LabelError


def test_one_folder(data, make_pairs):
    root = make_pairs(values=(0, 1, 2), count=10)
    splits, statistics = data.check("image_mask_folder", root=str(root), classes=["background", "organ", "lesion"])
    assert splits.task == "segmentation" and splits.class_names == ("background", "organ", "lesion")
    assert statistics.images == {"train": 6, "val": 2, "test": 2} and splits.in_chans == 3
    assert sum(statistics.counts["val"]) == 2 * 120 and min(statistics.counts["val"]) > 10
    sample = splits.val.read(1)
    stem = sample.name.removeprefix("images/")
    np.testing.assert_array_equal(sample.image, np.asarray(Image.open(root / "images" / stem)))
    np.testing.assert_array_equal(sample.target, np.asarray(Image.open(root / "masks" / stem)))
    copy = pickle.loads(pickle.dumps(splits.val)).read(1)
    np.testing.assert_array_equal(copy.target, sample.target)


def test_class_names_by_number(data, make_pairs):
    splits = data.load("image_mask_folder", root=str(make_pairs()), num_classes=3)
    assert splits.class_names == ("background", "class_1", "class_2")


@pytest.mark.parametrize("order", ["{split}/{kind}", "{kind}/{split}"])
def test_given_splits(data, make_pairs, tmp_path, order):
    for split in ("train", "val", "test"):
        made = make_pairs(f"made_{split}", count=4)
        for kind in ("images", "masks"):
            shutil.copytree(made / kind, tmp_path / "data" / order.format(split=split, kind=kind))
    splits, statistics = data.check("image_mask_folder", root=str(tmp_path / "data"), num_classes=2)
    assert statistics.images == {"train": 4, "val": 4, "test": 4} and statistics.warnings == []
    assert splits.test.names[0] == f"{order.format(split='test', kind='images')}/0.png"


def test_suffix_sub_folders_and_other_names(data, make_pairs):
    made = make_pairs(count=6)
    root = made.parent / "renamed"
    for path in sorted((made / "images").iterdir()):
        patient = root / "scans" / f"p{int(path.stem) // 2}"
        patient.mkdir(parents=True, exist_ok=True)
        path.rename(patient / path.name)
        mask = root / "labels" / patient.name
        mask.mkdir(parents=True, exist_ok=True)
        np.save(mask / f"{path.stem}_seg.npy", np.asarray(Image.open(made / "masks" / path.name)))
    options = {"root": str(root), "images": "scans", "masks": "labels", "num_classes": 2}
    splits, _ = data.check("image_mask_folder", mask_suffix="_seg", groups=r"/(p\d)/", **options)
    patients = [{re.search(r"p\d", name)[0] for name in split.names} for _, split in splits.items()]
    assert [len(owner) for owner in patients] == [1, 1, 1] and len(set.union(*patients)) == 3
    message = data.fault("image_mask_folder", **options)
    assert "no mask for 6 of 6 images: 0.png, 1.png, 2.png and 3 more" in message
    assert message.endswith("set data.mask_suffix=_seg")


def test_images_and_masks_in_one_folder(data, make_pairs):
    root = make_pairs(count=6)
    for path in (root / "masks").iterdir():
        path.rename(root / "images" / f"{path.stem}_mask.png")
    splits, _ = data.check("image_mask_folder", root=str(root), masks="images", mask_suffix="_mask", num_classes=2)
    assert sum(len(split) for _, split in splits.items()) == 6
    assert not any("mask" in name for name in splits.train.names)


def test_pairing_faults(data, make_pairs):
    root = make_pairs(count=6)
    options = {"root": str(root), "num_classes": 2}
    (root / "images" / "2.png").unlink()
    assert "masks: 1 mask without an image: 2.png" in data.fault("image_mask_folder", **options)
    (root / "masks" / "2.png").unlink()
    (root / "masks" / "4.png").unlink()
    message = data.fault("image_mask_folder", **options)
    assert "no mask for 1 of 5 images: 4.png; expected 4.png" in message
    (root / "images" / "4.png").unlink()
    shutil.copy(root / "images" / "1.png", root / "images" / "1.bmp")
    assert "1.bmp and 1.png belong to the same name" in data.fault("image_mask_folder", **options)


def test_missing_folders(data, make_pairs):
    root = make_pairs()
    (root / "masks").rename(root / "labels")
    message = data.fault("image_mask_folder", root=str(root), num_classes=2)
    assert f"{root}/masks: no such folder (folders in {root}: images, labels); set data.masks" in message
    message = data.fault("image_mask_folder", root=str(root / "none"), num_classes=2)
    assert f"data.root: {root}/none does not exist" in message


def test_one_image(data, make_pairs):
    message = data.fault("image_mask_folder", root=str(make_pairs(count=1)), num_classes=2)
    assert "holds 1 image with a mask; training and validation need at least 3" in message


def test_0_255_masks_are_named_with_histogram_and_the_line_that_maps_them(data, make_pairs):
    root = make_pairs(values=(0, 255))
    options = {"root": str(root), "classes": ["background", "vessel"]}
    message = data.fault("image_mask_folder", **options)
    masks = [np.asarray(Image.open(path)) for path in sorted((root / "masks").iterdir())]
    zeros = sum(int((mask == 0).sum()) for mask in masks)
    assert re.search(r"labels outside 0\.\.1 in 8 masks: images/\d\.png, .*png and 5 more; values", message)
    assert f"values found: 0: {zeros} pixels, 255: {960 - zeros} pixels" in message
    assert message.endswith("these are 0/255 masks: set data.label_map='{0: 0, 255: 1}'")
    splits, statistics = data.check("image_mask_folder", label_map={0: 0, 255: 1}, **options)
    assert sum(counts[1] for counts in statistics.counts.values()) == 960 - zeros
    assert set(np.unique(splits.train.read(0).target)) == {0, 1}


@pytest.mark.parametrize(
    ("values", "num_classes", "remedy"),
    [
        ((0, 128, 255), 3, "data.label_map='{0: 0, 128: 1, 255: 2}'"),
        ((1, 2), 2, "data.label_map='{1: 0, 2: 1}'"),
        ((0, 1, 255), 2, "set data.ignore_index=255"),
        ((0, 1, 2, 255), 3, "set data.ignore_index=255"),
        ((0, 1, 2, 3), 3, "there are 4 classes: set data.num_classes=4"),
        (tuple(range(0, 250, 7)), 2, "set data.mask_threshold=127"),
        ((0, 4, 9, 17), 3, "map the values to 0..2 with data.label_map"),
    ],
)
def test_remedy_fits_the_values(data, make_pairs, values, num_classes, remedy):
    message = data.fault("image_mask_folder", root=str(make_pairs(values=values)), num_classes=num_classes)
    assert f"labels outside 0..{num_classes - 1}" in message and remedy in message


def test_label_map_must_list_every_value(data, make_pairs):
    root = make_pairs(values=(0, 100, 255))
    options = {"root": str(root), "num_classes": 2, "label_map": {0: 0, 255: 1}}
    message = data.fault("image_mask_folder", **options)
    assert "100: " in message and "add the missing values to data.label_map" in message
    splits = data.load("image_mask_folder", **options)
    with pytest.raises(LabelError, match=r"masks/\d\.png: mask values 100 are not in data.label_map"):
        splits.train.read(0)


def test_ignore_index(data, make_pairs):
    root = make_pairs(values=(0, 1, 255))
    _, statistics = data.check("image_mask_folder", root=str(root), num_classes=2, ignore_index=255)
    assert 0 < sum(map(sum, statistics.counts.values())) < 8 * 120
    options = {"label_map": {0: 0, 1: 1, 255: 9}, "ignore_index": 9}
    splits, _ = data.check("image_mask_folder", root=str(root), num_classes=2, **options)
    assert set(np.unique(splits.train.read(0).target)) == {0, 1, 9}


def test_jpeg_masks_need_a_threshold(data, make_pairs):
    root = make_pairs(count=6, size=(40, 40))
    for path in sorted((root / "masks").iterdir()):
        blob = np.zeros((40, 40), dtype=np.uint8)
        blob[5:21, 7 + int(path.stem) : 29] = 255
        Image.fromarray(blob).save(path.with_suffix(".jpg"), quality=60)
        path.unlink()
    options = {"root": str(root), "num_classes": 2}
    assert "set data.mask_threshold=127" in data.fault("image_mask_folder", **options)
    splits, _ = data.check("image_mask_folder", mask_threshold=127, **options)
    index = splits.train.names.index("images/0.png") if "images/0.png" in splits.train.names else 0
    first = 7 + int(splits.train.names[index].split("/")[1][0])
    assert splits.train.read(index).target.sum() == 16 * (29 - first)


def test_shape_mismatch(data, make_pairs, picture):
    root = make_pairs()
    Image.fromarray(picture(0, size=(10, 12))).save(root / "images" / "3.png")
    message = data.fault("image_mask_folder", root=str(root), num_classes=2)
    assert "masks/3.png: the mask is 12 x 10 pixels (height x width) but the image images/3.png is 10 x 12" in message


def test_16_bit_and_multi_channel_images(data, make_pairs):
    root, rng = make_pairs(), np.random.default_rng(0)
    for path in list((root / "images").iterdir()):
        path.unlink()
        pixels = rng.integers(0, 65536, (4, 12, 10), dtype=np.uint16)
        tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="minisblack")
    splits, statistics = data.check("image_mask_folder", root=str(root), num_classes=2)
    assert splits.in_chans == 4 == len(statistics.mean) and splits.train.read(0).image.dtype == np.uint16
    assert all(0.4 < value < 0.6 for value in statistics.mean)
    path = next((root / "images").iterdir())
    tifffile.imwrite(path, rng.integers(0, 65536, (12, 10), dtype=np.uint16))
    message = data.fault("image_mask_folder", root=str(root), num_classes=2)
    assert f"7 have 4, but images/{path.name} with 1; make all images alike" in message


def test_wrong_options(data):
    for options, message in (
        ({}, "name the classes"),
        ({"classes": ["a"]}, "at least two different names"),
        ({"classes": ["a", "a"]}, "at least two different names"),
        ({"classes": ["a", "b"], "num_classes": 3}, "num_classes is 3 but classes has 2 names"),
        ({"num_classes": 3, "mask_threshold": 127}, "mask_threshold makes two classes"),
        ({"num_classes": 2, "mask_threshold": 1, "label_map": {0: 0}}, "remove label_map or mask_threshold"),
        ({"num_classes": 2, "label_map": {0: 0, 255: 2}}, r"label_map maps to \{255: 2\}"),
    ):
        with pytest.raises(ValidationError, match=message):
            data.config("image_mask_folder", root="x", **options)


def test_drive(data, data_folder):
    options = {"root": str(data_folder / "drive"), "masks": "labels", "classes": ["background", "vessel"]}
    assert "data.label_map='{0: 0, 255: 1}'" in data.fault("image_mask_folder", **options)
    _, statistics = data.check("image_mask_folder", label_map={0: 0, 255: 1}, **options)
    assert statistics.images == {"train": 6, "val": 1, "test": 1} and len(statistics.mean) == 3
    vessel, everything = statistics.counts["train"][1], sum(statistics.counts["train"])
    assert everything == 6 * 565 * 584 and 0.05 < vessel / everything < 0.2


def test_kvasir(data, data_folder):
    options = {"root": str(data_folder / "kvasir"), "classes": ["background", "polyp"]}
    assert "set data.mask_threshold=127" in data.fault("image_mask_folder", **options)
    _, statistics = data.check("image_mask_folder", mask_threshold=127, **options)
    assert statistics.images == {"train": 42, "val": 9, "test": 9}
