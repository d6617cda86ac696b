"""Configuration, discovery, and the deterministic split."""

import pickle
import re

import numpy as np
import pytest
from pydantic import ValidationError

from vision_gates.datasets.base import (
    ChannelError,
    LabelError,
    available,
    check_labels,
    data_config_type,
    few,
    group_names,
    how_many,
    resolve_root,
    split_by_hash,
)
from vision_gates.errors import ConfigError, DataError


def test_every_data_set_has_config_and_documentation():
    assert {"digits", "image_folder", "image_mask_folder", "medmnist", "mni152"} <= set(available())
    for name in available():
        config_type = data_config_type(name)
        assert config_type.model_fields["type"].default == name
        assert config_type.__doc__


def test_image_size_is_one_number_or_two():
    config_type = data_config_type("digits")
    assert config_type(image_size=32).image_size == (32, 32)
    assert config_type(image_size=[64, 96]).image_size == (64, 96)
    for wrong in (0, [32, -1], [32], "big"):
        with pytest.raises(ValidationError):
            config_type(image_size=wrong)


def test_config_rejects_unknown_keys_and_assignment():
    config_type = data_config_type("digits")
    with pytest.raises(ValidationError, match="batchsize"):
        config_type(image_size=32, batchsize=4)
    config = config_type(image_size=32)
    with pytest.raises(ValidationError):
        config.batch_size = 4


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no data set 'digit'; did you mean 'digits'\? \(available: .*mni152"):
        data_config_type("digit")


def test_missing_root_names_key_and_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"data.root: {tmp_path.resolve()}/nowhere does not exist")) as caught:
        resolve_root("nowhere")
    assert "relative to the current folder" in str(caught.value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_root("~/mine") == (tmp_path / "mine").resolve()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        resolve_root("file")


def test_split_is_deterministic_stratified_and_complete():
    names = [f"case_{i}" for i in range(200)]
    labels = [i % 4 == 0 for i in range(200)]  # 50 and 150
    split = split_by_hash(names, labels, val_fraction=0.2, test_fraction=0.1, seed=0)
    assert split == split_by_hash(names, labels, val_fraction=0.2, test_fraction=0.1, seed=0)
    assert split != split_by_hash(names, labels, val_fraction=0.2, test_fraction=0.1, seed=1)
    assert sorted(sum(split, [])) == list(range(200))
    assert [sum(labels[i] for i in part) for part in split] == [35, 10, 5]
    assert [len(part) for part in split] == [140, 40, 20]


def test_split_does_not_depend_on_order():
    names = [f"case_{i}" for i in range(50)]
    forward = split_by_hash(names, val_fraction=0.2, test_fraction=0.2, seed=3)
    backward = split_by_hash(names[::-1], val_fraction=0.2, test_fraction=0.2, seed=3)
    assert [{names[i] for i in part} for part in forward] == [{names[::-1][i] for i in part} for part in backward]


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 1, 1))])
def test_small_classes_reach_validation_first(count, sizes):
    split = split_by_hash([str(i) for i in range(count)], val_fraction=0.15, test_fraction=0.15, seed=0)
    assert tuple(len(part) for part in split) == sizes


def test_split_keeps_groups_together():
    names = [f"patient{i // 5}_{i % 5}" for i in range(60)]
    groups = group_names(names, r"(patient\d+)_")
    split = split_by_hash(groups, val_fraction=0.25, test_fraction=0.25, seed=0)
    owners = [{groups[i] for i in part} for part in split]
    assert [len(owner) for owner in owners] == [6, 3, 3]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])


def test_group_pattern_must_match_every_name():
    with pytest.raises(DataError, match="does not match b_2"):
        group_names(["p1_a", "b_2"], r"(p\d+)")


def test_check_labels():
    good = np.array([[0, 1], [2, 255]])
    check_labels(good, num_classes=3, ignore_index=255)
    with pytest.raises(LabelError, match=r"a.png: label values 255 are outside 0..2") as caught:
        check_labels(good, num_classes=3, name="a.png")
    assert caught.value.histogram == {0: 1, 1: 1, 2: 1, 255: 1}
    with pytest.raises(LabelError, match="-1"):
        check_labels(np.array([-1, 0]), num_classes=2)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(LabelError("a", {255: 3})))
    assert (str(error), error.histogram) == ("a", {255: 3})
    assert pickle.loads(pickle.dumps(ChannelError("b", 3))).channels == 3
    assert str(LabelError("what a data loader raises again, with the message alone"))


def test_few_and_how_many():
    assert (how_many(1, "image"), how_many(1200, "image")) == ("1 image", "1,200 images")
    assert few(["a", "b"]) == "a, b"
    assert few(list("abcdef")) == "a, b, c and 3 more"
