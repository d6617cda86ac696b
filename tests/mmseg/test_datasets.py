"""Our data sets in mmseg's pipelines: what is on the disk arrives, in its precision and with all its channels."""

import cv2
import numpy as np
import pytest
import tifffile
import torch

pytest.importorskip("mmseg", reason="mmsegmentation is not installed: pip install 'vision-gates[mmseg]'")

from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS, MODELS

import vision_gates.mmseg  # noqa: F401
from vision_gates.errors import ConfigError, DataError

LOAD = [dict(type="LoadSampleImage"), dict(type="LoadSampleLabels")]
PACK = dict(type="PackSegInputs")


def dataset(data, *, pipeline=(*LOAD, PACK), **options):
    return DATASETS.build(dict(type="VisionGatesDataset", data=data, pipeline=list(pipeline), **options))


@pytest.fixture
def scans(tmp_path):
    """Four 16-bit images of five channels with labels 0, 1, 2 and 9, which is not scored."""
    rng = np.random.default_rng(0)
    for i in range(4):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        image = rng.integers(0, 65536, (20, 16, 5), dtype=np.uint16)
        tifffile.imwrite(tmp_path / "images" / f"{i}.tif", image, photometric="minisblack", planarconfig="contig")
        mask = rng.choice(np.array([0, 1, 2, 9], dtype=np.uint8), (20, 16))
        cv2.imwrite(str(tmp_path / "masks" / f"{i}.png"), mask)
    return dict(type="image_mask_folder", root=str(tmp_path), num_classes=3, ignore_index=9)


def test_sixteen_bits_and_five_channels(scans, tmp_path):
    train = dataset(scans)
    assert train.metainfo["classes"] == ("background", "class_1", "class_2") and len(train) == 2
    item = train[0]
    name = item["data_samples"].img_path
    image = tifffile.imread(tmp_path / name)
    mask = cv2.imread(str(tmp_path / name.replace("images", "masks").replace("tif", "png")), cv2.IMREAD_UNCHANGED)
    expected = torch.from_numpy(image.astype(np.float32) / np.float32(65535)).permute(2, 0, 1)
    assert torch.equal(item["inputs"], expected)
    assert torch.equal(item["data_samples"].gt_sem_seg.data[0], torch.from_numpy(np.where(mask == 9, 255, mask)).long())
    raw = dataset(scans, pipeline=[dict(type="LoadSampleImage", unit_range=False), PACK])[0]["inputs"]
    assert raw.dtype == torch.uint16 and torch.equal(
        raw.float(), torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    )


def test_transforms_of_mmseg_keep_channels_and_labels(scans):
    moves = [
        dict(type="RandomResize", scale=(24, 24), ratio_range=(1.5, 1.5), keep_ratio=True),
        dict(type="RandomFlip", prob=1.0),
        dict(type="RandomCrop", crop_size=(16, 16)),
    ]
    item = dataset(scans, pipeline=[*LOAD, *moves, PACK])[0]
    assert item["inputs"].shape == (5, 16, 16) and item["inputs"].dtype == torch.float32
    assert set(item["data_samples"].gt_sem_seg.data.unique().tolist()) == {0, 1, 2, 255}
    test = dataset(scans, split="test", pipeline=[LOAD[0], dict(type="Resize", scale=(32, 32)), LOAD[1], PACK])[0]
    assert test["inputs"].shape == (5, 32, 32)
    assert test["data_samples"].gt_sem_seg.data.shape == (1, 20, 16) and test["data_samples"].ori_shape == (20, 16)


def test_preprocessor_normalises_every_channel(scans):
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]
    preprocessor = MODELS.build(dict(type="MultiChannelPreProcessor", mean=mean, std=std, size=(24, 24)))
    item = dataset(scans)[0]
    batch = preprocessor(pseudo_collate([item, item]), training=True)
    assert batch["inputs"].shape == (2, 5, 24, 24)
    shape = (5, 1, 1)
    expected = (item["inputs"] - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(batch["inputs"][0, :, :20, :16], expected)
    plain = MODELS.build(dict(type="MultiChannelPreProcessor"))(pseudo_collate([item]))
    assert torch.equal(plain["inputs"][0], item["inputs"])
    with pytest.raises(ConfigError, match="one mean and one std above 0 a channel"):
        MODELS.build(dict(type="MultiChannelPreProcessor", mean=mean, std=std[:2]))


def test_own_loading_in_data_sets_of_mmseg(scans, tmp_path):
    options = dict(data_prefix=dict(img_path="images", seg_map_path="masks"), img_suffix=".tif", seg_map_suffix=".png")
    pipeline = [dict(type="LoadMedicalImage"), dict(type="LoadMedicalLabels"), PACK]
    base = dict(type="BaseSegDataset", data_root=str(tmp_path), pipeline=pipeline, **options)
    item = DATASETS.build(base)[0]
    mask = cv2.imread(str(tmp_path / "masks" / "0.png"), cv2.IMREAD_UNCHANGED).astype(np.int64)
    assert item["inputs"].shape == (5, 20, 16) and item["inputs"].max() <= 1
    assert torch.equal(item["data_samples"].gt_sem_seg.data[0], torch.from_numpy(mask))
    reduced = DATASETS.build(base | dict(reduce_zero_label=True))[0]["data_samples"].gt_sem_seg.data[0]
    assert torch.equal(reduced, torch.from_numpy(np.where(mask == 0, 255, mask - 1)))
    (tmp_path / "masks" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="0.png: the file is empty"):
        DATASETS.build(base)[0]


@pytest.fixture
def volumes(tmp_path, monkeypatch):
    """Four NIfTI volumes of 12 x 10 x 6 voxels, thick slices along z, with one labelled slice each."""
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.setenv("VISION_GATES_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for i in range(4):
        labels = np.zeros((12, 10, 6), dtype=np.uint8)
        labels[3:7, 2:6, i] = 1
        image = (rng.normal(100, 10, labels.shape) + 80 * labels).astype(np.float32)
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "data" / "images" / f"case{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "data" / "labels" / f"case{i}.nii.gz")
    return dict(type="volumes", root=str(tmp_path / "data"), class_names=["background", "lesion"], folds=2)


def test_slices_of_volumes(volumes):
    train, val = (dataset(volumes | dict(neighbours=1), split=split) for split in ("train", "val"))
    assert len(train) == len(val) == 12 and train.metainfo["classes"] == ("background", "lesion")
    names = {train[i]["data_samples"].img_path[:5] for i in range(12)}
    assert len(names) == 2 and not names & {val[i]["data_samples"].img_path[:5] for i in range(12)}
    for i in range(1, 5):  # a slice's neighbours are its outer channels
        before, here = train[i - 1]["inputs"], train[i]["inputs"]
        assert here.shape == (3, 12, 10) and here.dtype == torch.float32
        assert torch.equal(here[0], before[1]) and torch.equal(here[1], before[2])
    labelled = dataset(volumes, labelled_only=True)
    assert len(labelled) == 2
    for i in range(2):
        image, labels = labelled[i]["inputs"][0], labelled[i]["data_samples"].gt_sem_seg.data[0]
        assert labels.sum() == 16 and image[labels == 1].mean() > image[labels == 0].mean() + 2
    with pytest.raises(DataError, match=r"case\d_00\d: label values 1 are outside 0..0"):
        labelled.source._labels["num_classes"] = 1
        labelled[0]
    assert abs(float(torch.cat([train[i]["inputs"] for i in range(12)]).mean())) < 0.2  # normalised case by case


MISTAKES = [
    (dict(type="mni15"), "no data set 'mni15'; did you mean 'mni152'"),
    (dict(type="mni152", image_size=64), "data.image_size: mmseg has a Resize in the pipeline"),
    (dict(type="mni152", plain="axial"), "data.plain: .*known: .*plane"),
    (dict(type="mni152", plane="oblique"), "data.plane: Input should be 'axial'"),
    (dict(type="digits"), "data.type=digits: holds classification data"),
    (dict(type="volumes", root="/nowhere"), "data.root: /nowhere does not exist"),
    (dict(type="volumes", root="/nowhere", mode="3d"), "data.mode: mmseg segments slices"),
]


@pytest.mark.parametrize(("data", "message"), MISTAKES)
def test_mistakes_end_in_one_line(data, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        dataset(data)
    assert "\n" not in str(caught.value)


def test_mistakes_around_the_data(scans):
    with pytest.raises(ConfigError, match="split='valid': one of train, val, test"):
        dataset(scans, split="valid")
    with pytest.raises(ConfigError, match=r"VisionGatesDataset.data_root: data=dict\(type=..., root=...\) says it"):
        dataset(scans, data_root="data")
