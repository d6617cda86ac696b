"""The page of ``segment``: every picture the right way round, in the right proportions, beside the right numbers."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from vision_gates.engine.figures import class_colour
from vision_gates.engine.segment_report import case_section, page
from vision_gates.engine.volume_data import VolumeInfo, VolumePredictor
from vision_gates.networks import create_network
from vision_gates.volumes.geometry import Geometry, reorient
from vision_gates.volumes.preprocessing import ChannelPlan, Preprocessing, prepare
from vision_gates.volumes.reading import Volume

EVIL = '<script>alert("1")</script>'
ORIENTATIONS = ["RAS", "LPS", "PIR", "SLA", "ARI", "IPL"]
ZSCORE = ChannelPlan(kind="zscore")
SHAPE = (24, 20, 16)  # along x, y, z


class _Page(HTMLParser):
    """Checks that tags close in order; collects tags, text, ids and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], [], []
        self.addresses = re.findall(r"url\(([^)]*)\)", text)
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def _decoded(uri):
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def _figures(section):
    """Each slice of a section: its caption, letters (left, right, above, below), picture, mask and shape."""
    figures = []
    for text in re.findall(r'<figure style="--image:[^"]*"><div class="view" role.*?</figure>', section, re.DOTALL):
        mask = re.search(r'src="([^"]+)"', text)
        width, height = map(int, re.search(r"--shape:(\d+)/(\d+)", text).groups())
        figures.append(
            SimpleNamespace(
                caption=re.search(r"<figcaption>(.*?)</figcaption>", text)[1],
                letters="".join("".join(re.findall(rf'"side {side}">(.)<', text)) for side in "wens"),
                image=_decoded(re.search(r"url\(([^)]+)\)", text)[1]),
                mask=_decoded(mask[1]) if mask else None,
                shape=(height, width),
            )
        )
    return figures


def _plain(shape, spacing=(1.0, 1.0, 1.0)):
    return Geometry(shape, np.diag([*spacing, 1.0]))


class _Gated(nn.Module):
    """A network whose one gate is open where the image is bright; its coarse map has half the positions."""

    class Gate(nn.Module):
        gate_kind = "bright gate"

        def gate_map(self, x):
            pool = nn.functional.max_pool2d if x.ndim == 4 else nn.functional.max_pool3d
            return pool((x[:, x.shape[1] // 2, None] > 1).float(), 2)

        def forward(self, x):
            return x

    def __init__(self, divisor=1, error=None):
        super().__init__()
        self.gate, self.divisor, self.error, self.seen = self.Gate(), divisor, error, None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        self.seen = tuple(x.shape)
        missing = [-n % self.divisor for n in x.shape[2:]]
        return self.gate(nn.functional.pad(x, [p for n in reversed(missing) for p in (0, n)]))


def _section(
    array,
    labels,
    geometry,
    *,
    codes="RAS",
    name="case",
    names=("background", "organ"),
    channel=ZSCORE,
    network=None,
    modality=None,
    spacing=None,
    **view,
):
    """The section of a case whose arrays are on ``geometry``, stored with its axes along ``codes``."""
    array, turned = reorient(array, geometry, codes)
    labels, _ = reorient(labels, geometry, codes)
    volume = Volume(array.astype(np.float32), turned, Path("case.nii.gz"), modality)
    info = VolumeInfo(
        **{
            "preprocessing": Preprocessing(spacing=spacing, channels=(channel,)),
            "spatial_dims": 3,
            "patch_size": (16, 16, 16),
            "channel_names": ("image",),
            **view,
        }
    )
    network = (network or nn.Identity()).eval()
    predictor = VolumePredictor(network, info, num_classes=len(names), batch_size=1, device=torch.device("cpu"))
    prepared = prepare(info.preprocessing, [volume])
    return case_section(name, volume, labels.astype(np.uint8), prepared, predictor, SimpleNamespace(class_names=names))


def _corner(corner, shape=SHAPE):
    """A bright box in a corner, x "R" or "L", y "A" or "P", z "S" or "I": a quarter, a half and a third of the axes."""
    parts = []
    for letter, size, share in zip(corner, shape, (4, 2, 3), strict=True):
        length = size // share
        parts.append(slice(size - length, size) if letter in "RAS" else slice(0, length))
    array = np.zeros(shape, np.float32)
    array[tuple(parts)] = 100
    return array


def _expected(figure, corner, shape=SHAPE):
    """Where the box of `_corner` has to be seen by the letters of the picture alone."""
    bright = np.ones(figure.shape, bool)
    ends = {"H": "S", "F": "I"}
    west, east, north, south = (ends.get(letter, letter) for letter in figure.letters)
    share = {"R": 4, "L": 4, "A": 2, "P": 2, "S": 3, "I": 3}
    height, width = figure.shape
    if west in corner:
        bright[:, width // share[west] :] = False
    else:
        assert east in corner
        bright[:, : width - width // share[east]] = False
    if north in corner:
        bright[height // share[north] :] = False
    else:
        assert south in corner
        bright[: height - height // share[south]] = False
    return bright


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("corner", ["RAS", "LPI", "RPI", "LAS", "LPS"])
def test_every_corner_of_the_patient_is_where_the_letters_say(codes, corner):
    array = _corner(corner)
    figures = _figures(_section(array, array > 0, _plain(SHAPE), codes=codes))
    kinds = [figure.caption.split(",")[0] for figure in figures]
    assert kinds == ["axial"] * 5 + ["coronal", "sagittal"]  # the box is five slices high
    for kind, figure in zip(kinds, figures, strict=True):
        # Radiological: the patient's right is on the left, his front above or on the left, his head above.
        assert figure.letters == {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}[kind]
        expected = _expected(figure, corner)
        np.testing.assert_array_equal(figure.image > 128, expected)
        shown = cv2.resize(figure.mask[..., 3], figure.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
        np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("spacing", [(1, 1, 6), (4, 1, 1), (1, 3, 1.5), (0.3, 0.3, 0.3)])
def test_a_ball_is_round_whatever_spacing_and_size(spacing):
    sides = (168, 90, 90) if max(spacing) < 1 else (120, 132, 108)  # mm
    shape = tuple(round(side / mm) for side, mm in zip(sides, spacing, strict=True))
    extent = np.array(shape) * spacing
    places = [(np.arange(n) + 0.5) * mm - side / 2 for n, mm, side in zip(shape, spacing, extent, strict=True)]
    x, y, z = np.meshgrid(*places, indexing="ij", sparse=True)
    ball = x**2 + y**2 + z**2 < 40**2
    figures = _figures(_section(100.0 * ball, ball, _plain(shape, spacing)))
    assert len(figures) == 8
    for figure in figures:
        assert max(figure.shape) <= 360
        assert figure.shape == figure.image.shape
        assert figure.shape[1] / figure.shape[0] == pytest.approx(figure.mask.shape[1] / figure.mask.shape[0], rel=0.02)
        width, height = {"axial": extent[:2], "coronal": extent[::2], "sagittal": extent[1:]}[
            figure.caption.split(",")[0]
        ]
        assert figure.shape[1] / figure.shape[0] == pytest.approx(width / height, rel=0.01)
    for figure in figures[-2:]:  # through the middle
        for seen in (figure.image > 128, figure.mask[..., 3] > 0):
            rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
            millimetres = extent[2] / seen.shape[0]
            assert (np.ptp(rows) + 1) * millimetres == pytest.approx(80, abs=2.5 * max(spacing))
            assert (np.ptp(columns) + 1) * millimetres == pytest.approx(80, abs=2.5 * max(spacing))


def test_pictures_too_flat_for_letters_say_it_in_words():
    labels = np.zeros((60, 50, 6), np.uint8)
    labels[30, 20, 3] = 1
    axial, coronal, sagittal = _figures(_section(labels * 1.0, labels, _plain(labels.shape)))
    assert (axial.letters, coronal.letters, sagittal.letters) == ("RLAP", "RL", "AP")
    assert coronal.caption == "coronal, slice 21 of 50, H above" and axial.caption == "axial, slice 4 of 6"
    labels = labels.transpose(2, 0, 1)  # now flat from right to left
    axial, coronal, sagittal = _figures(_section(labels * 1.0, labels, _plain(labels.shape)))
    assert (axial.letters, coronal.letters, sagittal.letters) == ("AP", "HF", "APHF")
    assert coronal.caption == "coronal, slice 31 of 60, R on the left"


def test_slices_are_the_fullest_and_numbered_as_in_the_file():
    labels = np.zeros((10, 12, 40), np.uint8)
    labels[2:5, 3:6, 8:32] = 1
    labels[6:9, 7, 20] = 1  # now y = 7 has the less, z = 20 the most
    labels[4, 3:11, 8:32] = 1
    captions = {
        codes: [f.caption for f in _figures(_section(labels * 1.0, labels, _plain(labels.shape), codes=codes))]
        for codes in ("RAS", "LPI")
    }
    assert captions["RAS"] == [
        *(f"axial, slice {n} of 40" for n in (11, 15, 19, 23, 27, 31)),
        "coronal, slice 4 of 12",
        "sagittal, slice 5 of 10",
    ]
    assert captions["LPI"] == [
        *(f"axial, slice {n} of 40" for n in (30, 26, 22, 18, 14, 10)),
        "coronal, slice 9 of 12",
        "sagittal, slice 6 of 10",
    ]


def test_ct_is_shown_in_the_window_of_its_plan_and_mr_in_its_percentiles():
    array = np.linspace(-1000, 3000, 32**3).reshape(32, 32, 32)
    labels, plan = np.zeros(array.shape), ChannelPlan(kind="ct", low=-100, high=300, mean=50, std=70)
    ct = _section(array, labels, _plain(array.shape), channel=plan)
    assert "Grey values from -100 to 300" in ct
    sagittal = _figures(ct)[-1].image  # x = 16: from about 1000 up
    assert sagittal.min() == 255
    mr = _section(array, labels, _plain(array.shape))
    assert "Grey values from -980 to 2980" in mr
    assert 115 < _figures(mr)[-1].image.mean() < 140
    flat = _figures(_section(np.full((8, 8, 8), 7.0), np.zeros((8, 8, 8)), _plain((8, 8, 8))))
    assert all(figure.image.max() == 0 for figure in flat)


# ---------------------------------------------------------------- words and numbers


def test_table_has_millilitres_voxels_and_what_was_not_found():
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:5], labels[5:7, :5] = 1, 3
    section = _section(
        labels * 1.0, labels, _plain(labels.shape, (1, 2, 2.5)), names=("background", "liver", "spleen", "cyst")
    )
    rows = re.findall(r"<tr><td>.*?background:(#\w+).*?</span>(\w+)</td><td>.*?</i>([\d.]+)</td><td>(\d+)<", section)
    assert rows == [(class_colour(1), "liver", "2.500", "500"), (class_colour(3), "cyst", "0.500", "100")]
    assert "Not found: spleen." in section
    assert "10 x 10 x 10 voxels · 1 x 2 x 2.5 mm · axes RAS" in section


def test_nothing_found_is_said_and_slices_span_the_volume():
    section = _section(_corner("RAS"), np.zeros(SHAPE), _plain(SHAPE), network=_Gated(), modality="MR")
    assert "Nothing found: no voxel is labelled (organ)." in section and "· MR<" in section
    figures = _figures(section)
    assert [f.caption for f in figures][:6] == [f"axial, slice {n} of 16" for n in (2, 5, 7, 10, 13, 15)]
    assert [f.caption for f in figures][6:] == ["coronal, slice 11 of 20", "sagittal, slice 13 of 24"]
    assert all(figure.mask is None for figure in figures)
    assert "middle slice" in section
    _Page(section)


def test_names_are_escaped_and_every_case_has_its_link(tmp_path):
    labels = _corner("RAS") > 0
    sections = [tmp_path / f"{i}.html" for i in range(3)]
    for section, name in zip(sections, (EVIL, "bad \udcff name", "a&b"), strict=True):
        found = _section(labels, labels, _plain(SHAPE), name=name, names=("background", EVIL), network=_Gated())
        section.write_text(found, encoding="utf-8")
    text = "".join(page(sections, title=EVIL))
    text.encode("utf-8")
    parsed = _Page(text)
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert "3 cases" in parsed.text
    assert any("not a diagnosis" in words for words in parsed.text)
    assert len(set(parsed.ids)) == 3
    links = [address for address in parsed.addresses if address.startswith("#")]
    assert links == [f"#{name}" for name in parsed.ids]
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in parsed.addresses)
    assert parsed.text.count(EVIL) >= 2 + 3  # title, headline, link, case, label
    assert "bad \\udcff name" in parsed.text

    one = _Page("".join(page(sections[:1], title="one")))
    assert "1 case" in one.text and "nav" not in one.tags


def test_the_page_of_the_noisiest_case_stays_small():
    generator = np.random.default_rng(0)
    shape = (150, 384, 384)
    array = generator.random(shape, dtype=np.float32)
    labels = np.zeros(shape, np.uint8)
    labels[40:110, 100:300, 100:300] = generator.integers(1, 5, (70, 2, 2)).repeat(100, 1).repeat(100, 2)
    names = ("background", "a", "b", "c", "d")
    network = create_network("attention_unet", in_channels=1, num_classes=5, spatial_dims=3, widths=(2, 4, 8))
    section = _section(array, labels, _plain(shape), names=names, network=network, patch_size=(64, 64, 64))
    assert "attention gate" in section
    assert 100_000 < len(section) < 400_000


# ---------------------------------------------------------------- gates


def _gate_pictures(section):
    """Image, prediction and heat maps of the gates, and the text below the maps."""
    text = section[section.index('<div class="gates">') :]
    image = _decoded(re.search(r"--image:url\(([^)]+)\)", text)[1])
    prediction, *maps = (_decoded(uri) for uri in re.findall(r'src="([^"]+)"', text))
    return image, prediction, maps, re.findall(r'<p title="[^"]*">(.*?)</p>', text)


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (2, {"patch_size": (24, 20)}),
        (2, {"patch_size": (36, 28), "neighbours": 2}),  # larger than the slice
        (2, {"patch_size": (20, 16), "slice_axis": 0}),
        (2, {"patch_size": (16, 24), "slice_axis": 1, "view": "SPL"}),
        (3, {"patch_size": (24, 20, 16)}),
        (3, {"patch_size": (30, 40, 20)}),
    ],
)
@pytest.mark.parametrize("divisor", [1, 8])
@pytest.mark.parametrize("corner", ["RAS", "LPI"])
def test_gate_maps_lie_on_their_slice(dims, options, divisor, corner):
    array, network = _corner(corner), _Gated(divisor)
    section = _section(array, array > 0, _plain(SHAPE), codes="LPS", network=network, spatial_dims=dims, **options)
    channels = 2 * options.get("neighbours", 0) + 1
    assert network.seen == (1, channels, *options["patch_size"])
    image, prediction, (heat,), (words,) = _gate_pictures(section)
    assert "bright gate, gate 1 of 1" in words and "0.00 to 1.00" in words
    bright = image > 128
    assert 0.05 < bright.mean() < 0.5
    plane = re.search(r"case, (\w+) slice with most label", section)[1]
    letters = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}[plane]
    np.testing.assert_array_equal(bright, _expected(SimpleNamespace(letters=letters, shape=image.shape), corner))
    size = image.shape[::-1]
    assert np.mean((cv2.resize(prediction[..., 3], size, interpolation=cv2.INTER_NEAREST) > 0) == bright) == 1
    # The map is coarse, its border a position wide.
    hot = cv2.resize(heat[..., :3].sum(axis=-1).astype(np.float32), size) > 380
    assert np.mean(hot == bright) > 0.88
    assert hot[bright].mean() > 0.8


@pytest.mark.parametrize("dims", [2, 3])
def test_gates_of_a_real_network(dims):
    torch.manual_seed(0)
    network = create_network("attention_unet", in_channels=1, num_classes=2, spatial_dims=dims, widths=(4, 8, 16, 32))
    array = _corner("RAS")
    section = _section(
        array, array > 0, _plain(SHAPE, (1, 1, 2)), network=network, spatial_dims=dims, patch_size=(24,) * dims
    )
    _, _, maps, words = _gate_pictures(section)
    assert len(maps) == 2
    assert all(("plane" in text) == (dims == 3) for text in words)
    # The map is 12 x 12 over 24 x 24; the grid of a map is given as rows by columns.
    assert "12 x 12 positions" in words[-1]
    _Page(section)


def test_a_window_inside_a_large_volume_is_around_the_label():
    shape = (60, 60, 60)
    array = np.zeros(shape)
    array[40:46, 10:16, 30:36] = 100
    section = _section(array, array > 0, _plain(shape, (1, 1, 1)), network=_Gated(), spacing=(0.5, 1.0, 1.0))
    image, prediction, (heat,), _ = _gate_pictures(section)
    assert image.shape[1] * 2 == pytest.approx(image.shape[0], abs=2)  # 16 voxels of 0.5 mm by 16 of 1 mm
    assert (prediction[..., 3] > 0).mean() > 0.15
    assert (image > 128).mean() > 0.15


def test_networks_without_gates_and_devices_without_memory():
    array = _corner("RAS")
    assert "gate" not in _section(array, array > 0, _plain(SHAPE))
    section = _section(array, array > 0, _plain(SHAPE), network=_Gated(error=torch.OutOfMemoryError("no memory")))
    assert "No gate maps: the device has too little memory" in section
    with pytest.raises(ZeroDivisionError):  # a mistake in a program is not hidden
        _section(array, array > 0, _plain(SHAPE), network=_Gated(error=ZeroDivisionError()))
