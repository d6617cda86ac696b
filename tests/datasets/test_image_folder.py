"""Class folders: layouts, splits, and what ends in which message."""

import multiprocessing
import re
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from vision_gates.errors import DataError


def test_flat_layout_is_split_by_class(data, make_classes):
    root = make_classes(classes=("dog", "cat", "Bird"), count=10)
    splits, statistics = data.check("image_folder", root=str(root), val_fraction=0.2, test_fraction=0.3)
    assert splits.class_names == ("Bird", "cat", "dog") and splits.in_chans == 3
    assert statistics.counts == {"train": [5] * 3, "val": [2] * 3, "test": [3] * 3}
    names = [name for _, split in splits.items() for name in split.names]
    assert len(set(names)) == 30 and names[0].startswith("Bird/")
    sample = splits.train.read(0)
    np.testing.assert_array_equal(sample.image, np.asarray(Image.open(root / sample.name)))
    assert splits.class_names[sample.target] == sample.name.split("/")[0]
    assert (
        data.load("image_folder", root=str(root)).train.names == data.load("image_folder", root=str(root)).train.names
    )
    other = data.load("image_folder", root=str(root), split_seed=1)
    assert other.train.names != data.load("image_folder", root=str(root)).train.names


def test_three_folders(data, make_classes):
    for seed, part in enumerate(("train", "val", "test")):
        root = make_classes(f"data/{part}", seed=seed, count=4).parent
    splits, statistics = data.check("image_folder", root=str(root))
    assert statistics.images == {"train": 8, "val": 8, "test": 8} and statistics.warnings == []
    assert splits.val.names[0] == "val/cat/0.png"
    shutil.rmtree(root / "test")
    assert data.load("image_folder", root=str(root)).test is None
    shutil.rmtree(root / "val")
    splits = data.load("image_folder", root=str(root), val_fraction=0.25)
    assert len(splits.train) == 6 and len(splits.val) == 2 and splits.test is None


def test_patients_stay_together(data, tmp_path, picture):
    for patient in range(12):
        for i in range(3):
            folder = tmp_path / ("sick" if patient % 2 else "well")
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture(10 * patient + i)).save(folder / f"p{patient}_{i}.png")
    splits, _ = data.check("image_folder", root=str(tmp_path), groups=r"/(p\d+)_")
    patients = [{re.search(r"p\d+", name)[0] for name in split.names} for _, split in splits.items()]
    assert sum(map(len, patients)) == 12 == len(set.union(*patients))


def test_patient_in_two_given_splits(data, make_classes):
    make_classes("data/train")
    root = make_classes("data/val", seed=1).parent
    message = data.fault("image_folder", root=str(root), groups=r"(\w+)\.png")
    assert "data.groups: 6 of 6 groups have images in more than one split: 0 (train and val), 1 (train" in message


def test_hidden_files_and_other_files_are_ignored(data, make_classes):
    root = make_classes()
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "cat" / "notes.txt").write_text("x")
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    splits, _ = data.check("image_folder", root=str(root))
    assert sum(len(split) for _, split in splits.items()) == 12


def test_missing_root(data, tmp_path):
    assert f"data.root: {tmp_path}/none does not exist" in data.fault("image_folder", root=str(tmp_path / "none"))


def test_layout_faults(data, make_classes, tmp_path, picture):
    (tmp_path / "empty").mkdir()
    assert "no class folders (it is empty" in data.fault("image_folder", root=str(tmp_path / "empty"))
    (tmp_path / "loose").mkdir()
    Image.fromarray(picture(0)).save(tmp_path / "loose" / "a.png")
    assert "no class folders (1 image directly in it)" in data.fault("image_folder", root=str(tmp_path / "loose"))
    root = make_classes()
    (root / "bird").mkdir()
    (root / "bird" / "a.gif").touch()
    message = data.fault("image_folder", root=str(root))
    assert "no images in the class folder bird (it holds files with .gif; read are .png" in message
    root = make_classes("single", classes=("cat",))
    assert "'cat' is the only class folder" in data.fault("image_folder", root=str(root))
    root = make_classes("one", classes=("cat",), count=1)
    assert "one: holds 1 image; training and validation need at least 3" in data.fault("image_folder", root=str(root))


def test_folders_with_other_names(data, make_classes):
    make_classes("data/train")
    root = make_classes("data/valid", seed=1).parent
    assert f"{root}/valid: rename it to 'val'" in data.fault("image_folder", root=str(root))
    (root / "valid").rename(root / "val")
    (root / "train").rename(root / "other")
    assert "has val but no train" in data.fault("image_folder", root=str(root))


def test_class_that_training_does_not_know(data, make_classes):
    make_classes("data/train")
    root = make_classes("data/val", classes=("cat", "dog", "horse"), seed=1).parent
    assert f"{root}/val: class horse is not in the training split (cat, dog)" in data.fault(
        "image_folder", root=str(root)
    )


def test_class_missing_from_validation(data, make_classes):
    make_classes("data/train", classes=("ant", "cat", "dog"))
    root = make_classes("data/val", classes=("cat", "dog"), seed=1).parent
    message = data.fault("image_folder", root=str(root))
    assert "no val sample of class ant; move some" in message and "data.allow_missing_classes=true" in message
    _, statistics = data.check("image_folder", root=str(root), allow_missing_classes=True)
    assert statistics.warnings == ["no val sample of class ant"] and statistics.counts["val"] == [0, 6, 6]


def test_too_few_images_in_given_splits(data, make_classes):
    make_classes("data/train", count=1)
    root = make_classes("data/val", seed=1).parent
    (root / "train" / "dog" / "0.png").unlink()
    assert "no images in the class folder dog" in data.fault("image_folder", root=str(root))
    shutil.rmtree(root / "train" / "dog")
    assert "train: holds 1 image; training and validation need at least 2" in data.fault("image_folder", root=str(root))


def test_empty_validation_folder(data, make_classes):
    root = make_classes("data/train").parent
    (root / "val").mkdir()
    assert "the validation split is empty" in data.fault("image_folder", root=str(root))


def test_mixed_channels_name_the_odd_ones_and_the_option(data, make_classes, picture):
    root = make_classes()
    Image.fromarray(picture(0, channels=1)).save(root / "cat" / "0.png")  # the file that is probed first
    Image.fromarray(picture(1, channels=1)).save(root / "dog" / "3.png")
    message = data.fault("image_folder", root=str(root))
    assert "images differ in channels: 10 have 3, but " in message and " with 1; set data.channels=3 or" in message
    assert "cat/0.png" in message and "dog/3.png" in message
    splits, statistics = data.check("image_folder", root=str(root), channels=3)
    assert splits.in_chans == 3 and len(statistics.mean) == 3
    splits, statistics = data.check("image_folder", root=str(root), channels=1)
    assert splits.in_chans == 1 and splits.train.read(0).image.shape[2] == 1 and len(statistics.mean) == 1


def test_wrong_options(data):
    for options, message in (
        ({"groups": "(a"}, "is not a regular expression"),
        ({"groups": "abc"}, "needs a group"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "must stay below 1"),
        ({"channels": 2}, "channels"),
        ({"roots": "x"}, "roots"),
    ):
        with pytest.raises(ValidationError, match=message):
            data.config("image_folder", **({"root": "x"} | options))


def test_a_spawned_process_can_read(data, make_classes):
    split = data.load("image_folder", root=str(make_classes())).train
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        sample = pool.submit(split.read, 3).result(timeout=120)
    np.testing.assert_array_equal(sample.image, split.read(3).image)


def test_deleted_file(data, make_classes):
    root = make_classes()
    split = data.load("image_folder", root=str(root)).train
    (root / split.names[0]).unlink()
    with pytest.raises(DataError, match=f"{re.escape(split.names[0])}: the file is missing or empty"):
        split.check_exists(0)
    with pytest.raises(DataError, match=f"{re.escape(split.names[0])}: cannot be read"):
        split.read(0)
