"""Finding cases: the three layouts, dataset.json and its mistakes, files without a counterpart, patients."""

import json
from pathlib import Path

import pytest

from vision_gates.datasets.volumes.layouts import find_layout, patients_of
from vision_gates.errors import ConfigError, DataError, UserError

NNUNET = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "oedema": 1, "tumour": 2},
    "file_ending": ".nii.gz",
}
MSD = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "front", "2": "back"}}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def describe(root: Path, content: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def nnunet(root: Path, *, cases: tuple[str, ...] = ("a", "b", "c"), **changes: object) -> Path:
    for case in cases:
        touch(root, f"imagesTr/{case}_0000.nii.gz", f"imagesTr/{case}_0001.nii.gz", f"labelsTr/{case}.nii.gz")
    return describe(root, NNUNET | changes)


def msd(root: Path, *, cases: tuple[str, ...] = ("b", "a"), **changes: object) -> Path:
    touch(root, *(f"{folder}/{case}.nii.gz" for case in cases for folder in ("imagesTr", "labelsTr")))
    training = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
    return describe(root, MSD | {"training": training} | changes)


def fault(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        find_layout(root, **options)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message
    return message


def test_nnunet(tmp_path):
    root = nnunet(tmp_path)
    touch(root, "imagesTs/t_0000.nii.gz", "imagesTs/t_0001.nii.gz", "imagesTs/u_0000.nii.gz", "imagesTs/u_0001.nii.gz")
    touch(root, "labelsTs/u.nii.gz", "imagesTr/._a_0000.nii.gz", "imagesTr/notes.txt", "labelsTr/._a.nii.gz")
    layout = find_layout(root)
    assert (layout.kind, layout.root, layout.ignore_index) == ("nnunet", root.resolve(), None)
    assert layout.class_names == ("background", "oedema", "tumour") and layout.channel_names == ("T1", "T2")
    assert [case.name for case in layout.cases] == ["a", "b", "c"] == [case.patient for case in layout.cases]
    assert layout.cases[1].images == (root / "imagesTr/b_0000.nii.gz", root / "imagesTr/b_0001.nii.gz")
    assert layout.cases[1].labels == root / "labelsTr/b.nii.gz"
    assert [(case.name, case.labels) for case in layout.test_cases] == [("t", None), ("u", root / "labelsTs/u.nii.gz")]


def test_nnunet_that_lists_its_files(tmp_path):
    touch(tmp_path, "scans/x1.nii.gz", "scans/x2.nii.gz", "marks/x.nii.gz")
    entry = {"images": ["scans/x1.nii.gz", "scans/x2.nii.gz"], "label": "marks/x.nii.gz"}
    (case,) = find_layout(describe(tmp_path, NNUNET | {"dataset": {"x": entry}})).cases
    assert case.name == "x" and [path.name for path in case.images] == ["x1.nii.gz", "x2.nii.gz"]
    assert case.labels == tmp_path / "marks/x.nii.gz"


def test_ignored_label(tmp_path):
    for value in (2, 255):
        labels = {"ignore": value, "background": 0, "lesion": 1}
        layout = find_layout(nnunet(tmp_path, labels=labels))
        assert layout.ignore_index == value and layout.class_names == ("background", "lesion")


def test_all_faults_of_the_files_in_one_message(tmp_path):
    root = nnunet(tmp_path, cases=("a", "b", "c", "d", "e"))
    (root / "imagesTr/b_0001.nii.gz").unlink()
    (root / "labelsTr/c.nii.gz").unlink()
    touch(root, "labelsTr/x.nii.gz", "labelsTr/y.nii.gz", "labelsTr/z.nii.gz", "labelsTr/zz.nii.gz")
    touch(root, "imagesTr/d_0002.nii.gz", "imagesTr/scan.nii.gz", "imagesTr/f_0000.mha")
    message = fault(root)
    for part in (
        "1 channel file missing: b_0001.nii.gz;",
        "1 image without labels in labelsTr: c;",
        "4 label files without an image in imagesTr: x, y, z and 1 more;",
        "1 file numbered beyond the 2 channels: d_0002.nii.gz;",
        "1 file in imagesTr without a channel number (CASE_0000.nii.gz): scan.nii.gz;",
        "1 file in imagesTr with another ending than .nii.gz: f_0000.mha;",
    ):
        assert part in message


def test_folders_that_are_missing_or_hold_something_else(tmp_path):
    root = describe(tmp_path / "bare", NNUNET)
    assert f"{root}/imagesTr: no such folder (folders in {root}: none)" in fault(root)
    touch(root, "imagesTr/a_0000.mha", "imagesTr/b_0000.png", "labelsTr/a.nii.gz")
    assert "imagesTr: no file with .nii.gz (it holds files with .mha, .png)" in fault(root)
    message = fault(nnunet(tmp_path / "photos", file_ending=".png"))
    assert "dataset.json: file_ending is '.png'; read are .nii.gz, .nii" in message and "image_mask_folder" in message


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"background": 0, "whole": [1, 2], "core": [2]}, "labels: whole, core are regions of several values"),
        ({"background": 0, "tumour": 2}, "labels: the values are 0, 2; they must be 0, 1, 2 ... without gaps"),
        ({"tumour": 1, "vessel": 2}, "labels: the values are 1, 2;"),
        ({"background": 0, "a": 1, "b": 1}, "labels: 'a' and 'b' are both 1"),
        ({"background": 0, "a": 1.5}, "labels: 'a' has the value 1.5; it must be 0, 1, 2"),
        ({"background": 0, "a": True}, "labels: 'a' has the value True"),
        ({"background": 0, "a": -1}, "labels: 'a' has the value -1"),
        ({"background": 0, "a": None}, "labels: 'a' has the value None"),
        ({"background": 0}, "labels needs two or more different names"),
        ({"0": "same", "1": "same"}, "labels needs two or more different names"),
        ({}, "labels is {}; it must look like"),
        (["background"], "labels is ['background']; it must look like"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, labels, message):
    assert f"{tmp_path}/dataset.json: {message}" in fault(nnunet(tmp_path, labels=labels))


def test_a_damaged_description(tmp_path):
    path = tmp_path / "dataset.json"
    for text, message in (
        ('{"labels": ', "not valid JSON (Expecting value: line 1 column 12"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "holds a list, not an object"),
        ("{}", "has neither the key 'file_ending' (nnU-Net v2) nor 'training'"),
    ):
        assert f"{path}: {message}" in fault(describe(tmp_path, text))
    path.write_bytes(b"\xff\xfe\x00{")
    assert "not valid JSON" in fault(tmp_path)
    path.unlink()
    assert f"{path}: cannot be read (No such file or directory)" in fault(tmp_path, kind="msd")


@pytest.mark.parametrize("key", ["labels", "channel_names", "file_ending"])
def test_a_missing_key(tmp_path, key):
    root = nnunet(tmp_path)
    describe(root, {name: value for name, value in NNUNET.items() if name != key})
    assert f"dataset.json: the key '{key}' is missing; add it, such as" in fault(root, kind="nnunet")


def test_channels_are_numbered_from_0(tmp_path):
    message = fault(nnunet(tmp_path, channel_names={"1": "T1", "2": "T2"}))
    assert "dataset.json: channel_names numbers the channels 1, 2; count from 0" in message


def test_msd(tmp_path):
    listed = [{"image": f"{folder}x.nii.gz", "label": f"{folder}x.nii.gz"} for folder in ("imagesTr/._", "imagesTr/")]
    touch(tmp_path, "imagesTs/t.nii.gz", "imagesTr/x.nii.gz")
    root = msd(tmp_path, test=["./imagesTs/t.nii.gz"])
    layout = find_layout(root)
    assert (layout.kind, layout.channel_names) == ("msd", ("MRI",))
    assert layout.class_names == ("background", "front", "back")
    assert [case.name for case in layout.cases] == ["a", "b"]
    assert layout.cases[0].images == (root / "imagesTr/a.nii.gz",)
    assert layout.cases[0].labels == root / "labelsTr/a.nii.gz"
    assert [(case.name, case.labels) for case in layout.test_cases] == [("t", None)]
    assert [case.name for case in find_layout(msd(tmp_path, training=listed)).cases] == ["x"]


def test_channels_beside_an_msd_description(tmp_path):
    root = msd(tmp_path, cases=("a",), modality={"0": "T1", "1": "T2"})
    (root / "imagesTr/a.nii.gz").unlink()
    touch(root, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz")
    (case,) = find_layout(root).cases
    assert case.name == "a" and [path.name for path in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    (root / "imagesTr/a_0001.nii.gz").unlink()
    assert "1 file missing that dataset.json lists under training: imagesTr/a_0001.nii.gz" in fault(root)


def test_msd_files_that_are_missing_or_doubled(tmp_path):
    root = msd(tmp_path, cases=("a", "b", "c"))
    (root / "imagesTr/a.nii.gz").unlink()
    (root / "labelsTr/c.nii.gz").unlink()
    message = fault(root)
    assert "2 files missing that dataset.json lists under training: imagesTr/a.nii.gz, labelsTr/c.nii.gz" in message
    entry = {"image": "imagesTr/b.nii.gz", "label": "labelsTr/b.nii.gz"}
    assert "1 name more than once in dataset.json under training: b" in fault(msd(root, training=[entry, entry]))


@pytest.mark.parametrize(
    "entry", ["a.nii.gz", {"image": "imagesTr/a.nii.gz"}, {"image": 1, "label": 2}, {"images": []}]
)
def test_msd_entries_that_cannot_be_used(tmp_path, entry):
    assert "dataset.json: training: entry 0 is " in fault(msd(tmp_path, training=[entry]))


def test_paths_out_of_the_root_are_refused(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "secret.nii.gz"
    touch(tmp_path, "secret.nii.gz", "data/labelsTr/a.nii.gz")
    (root / "link.nii.gz").symlink_to(outside)
    (root / "loop.nii.gz").symlink_to(root / "loop.nii.gz")
    for name in ("../secret.nii.gz", str(outside), "link.nii.gz", "loop.nii.gz", "a\0.nii.gz", "imagesTr/../../x.nii"):
        message = fault(msd(root, cases=(), training=[{"image": name, "label": "labelsTr/a.nii.gz"}]))
        if name != "loop.nii.gz":  # newer Pythons resolve a loop to a path that does not exist
            assert "dataset.json: training: " in message and "is not a file below" in message
    entry = {"image": "labelsTr/a.nii.gz", "label": "../secret.nii.gz"}
    assert "is not a file below" in fault(msd(root, cases=(), training=[entry]))
    assert "is not a file below" in fault(msd(root, test=["../secret.nii.gz"]))
    (tmp_path / "alias").symlink_to(msd(root))
    assert len(find_layout(tmp_path / "alias").cases) == 2  # the root itself may be a link


def test_pairs(tmp_path):
    touch(tmp_path, "images/b.nii.gz", "images/a.mha", "images/c/slice1", "images/c/slice2", "images/readme.txt")
    touch(tmp_path, "labels/a.nii.gz", "labels/b.nrrd", "labels/c.nii", "images/._b.nii.gz", "images/.cache/x")
    layout = find_layout(tmp_path)
    assert (layout.kind, layout.class_names, layout.channel_names) == ("pairs", (), ("channel_0",))
    assert [(case.name, case.images[0].name, case.labels.name) for case in layout.cases] == [
        ("a", "a.mha", "a.nii.gz"),
        ("b", "b.nii.gz", "b.nrrd"),
        ("c", "c", "c.nii"),
    ]


def test_pairs_with_channels_and_other_folders(tmp_path):
    names = [f"scans/{case}_000{channel}.nii.gz" for case in ("p_2019", "q") for channel in (1, 0)]
    touch(tmp_path, *names, "marks/p_2019.nii.gz", "marks/q.nii.gz")
    layout = find_layout(tmp_path, images="scans", labels="marks")
    assert layout.channel_names == ("channel_0", "channel_1") and [case.name for case in layout.cases] == [
        "p_2019",
        "q",
    ]
    assert [path.name for path in layout.cases[0].images] == ["p_2019_0000.nii.gz", "p_2019_0001.nii.gz"]
    (tmp_path / "scans/q_0001.nii.gz").unlink()
    assert "1 channel file missing: q_0001" in fault(tmp_path, images="scans", labels="marks")
    assert "must be two folders" in fault(tmp_path, images="scans", labels="scans", kind="pairs")


def test_pairs_without_counterpart(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/a.nii", "images/b.nii.gz", "images/d.nii.gz", "images/d_0000.nii.gz")
    touch(tmp_path, "labels/a.nii.gz", "labels/c.nii.gz", "labels/d.nii.gz")
    message = fault(tmp_path)
    assert "1 file in images named as another, but for the ending: a.nii.gz;" in message
    assert "1 image without labels in labels: b.nii.gz;" in message
    assert "1 label file without an image in images: c.nii.gz;" in message
    assert "1 image of a channel that has one: d_0000.nii.gz;" in message


def test_what_is_no_layout_at_all(tmp_path):
    message = fault(tmp_path)
    assert "looked for dataset.json (nnU-Net, Medical Segmentation Decathlon) and for the folders images and" in message
    touch(tmp_path, "imagesTr/a.nii", "labelsTr/a.nii")
    assert "data.images=imagesTr data.labels=labelsTr" in fault(tmp_path)
    assert [case.name for case in find_layout(tmp_path, images="imagesTr", labels="labelsTr").cases] == ["a"]
    touch(tmp_path, "images/a.png", "images/b", "labels/a.png")
    assert "(it holds files with .png, no ending); images of two dimensions are read by" in fault(tmp_path)
    assert f"{tmp_path}/none: no such folder" in fault(tmp_path, kind="pairs", images="none")
    with pytest.raises(UserError, match="does not exist"):
        find_layout(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "names, patients",
    [
        (["p1_frame01", "p1_frame12", "p2_frame01"], ["p1", "p1", "p2"]),
        (["p1_t1", "p1_t2"], ["p1", "p1"]),
        (["p1_tp2", "p1-TP3"], ["p1", "p1"]),
        (["p1_visit3_run-1", "p1_ses-02", "p2"], ["p1", "p1", "p2"]),
        (["p1_ED", "p1_ES", "p1_baseline", "p1_followup2"], ["p1"] * 4),
        (["sub-01_ses-01_T1w", "sub-01_ses-02_T1w", "sub-02_ses-01_T1w"], ["sub-01", "sub-01", "sub-02"]),
        (["case_1", "case_2"], ["case_1", "case_2"]),
        (["a_t1", "b_t1"], ["a_t1", "b_t1"]),  # nothing in common: names stay as they are
        (["frame01", "frame02"], ["frame01", "frame02"]),
        (["_t1", "_t2"], ["_t1", "_t2"]),
        (["start1", "start2"], ["start1", "start2"]),
    ],
)
def test_patients_by_name(names, patients):
    assert patients_of(names) == patients
    assert patients_of(names, None) == names


def test_patients_by_expression(tmp_path):
    root = nnunet(tmp_path, cases=("x1a", "x1b", "x2a"))
    assert [case.patient for case in find_layout(root, groups=r"(x\d)").cases] == ["x1", "x1", "x2"]
    with pytest.raises(DataError, match="data.groups: .* does not match x2a"):
        find_layout(root, groups="(x1)")
    for pattern, message in (("x", "needs a group"), ("(", "is not a regular expression")):
        with pytest.raises(ConfigError, match=message):
            find_layout(root, groups=pattern)


def test_a_patient_of_training_and_test_cases_has_one_name(tmp_path):
    root = msd(tmp_path, cases=("p1_t1",), test=["p1_t2.nii.gz"])
    touch(root, "p1_t2.nii.gz")
    layout = find_layout(root)
    assert layout.cases[0].patient == layout.test_cases[0].patient == "p1"


def test_real_data(data_folder):
    acdc, hippocampus = find_layout(data_folder / "acdc"), find_layout(data_folder / "hippocampus")
    assert (len(acdc.cases), len({case.patient for case in acdc.cases})) == (30, 15)
    assert (acdc.kind, acdc.class_names[1:], acdc.channel_names) == ("nnunet", ("RV", "MYO", "LV"), ("cineMRI",))
    assert (hippocampus.kind, len(hippocampus.cases)) == ("msd", 50)
    assert len({case.patient for case in hippocampus.cases}) == 50
