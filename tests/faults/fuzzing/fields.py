"""Mutants: extreme values in the fields of each format, with checksums mended so that damage gets past them."""

import gzip
import io
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable

from fuzzing.damage import INTEGERS, Rng, damage, poison, poke

_NIFTI = {  # size of the header -> places of dim, datatype, bitpix, pixdim, vox_offset, scl, codes, quaternion, srow
    348: [
        *((40 + 2 * i, "<i2") for i in range(8)),
        *((70, "<i2"), (72, "<i2"), (112, "<f4"), (116, "<f4"), (123, "<u1"), (252, "<i2"), (254, "<i2")),
        *((76 + 4 * i, "<f4") for i in range(9)),
        *((256 + 4 * i, "<f4") for i in range(18)),
        *((348, "<u1"), (352, "<i4")),
    ],
    540: [
        *((16 + 8 * i, "<i8") for i in range(8)),
        *((12, "<i2"), (14, "<i2"), (168, "<i8"), (176, "<f8"), (184, "<f8"), (344, "<i4"), (348, "<i4"), (500, "<i4")),
        *((104 + 8 * i, "<f8") for i in range(8)),
        *((352 + 8 * i, "<f8") for i in range(18)),
        *((540, "<u1"), (544, "<i4")),
    ],
}


def in_nifti(rng: Rng, data: bytes, other: bytes) -> bytes:
    packed = data[:2] == b"\x1f\x8b"
    data = gzip.decompress(data) if packed else data
    fields = _NIFTI.get(int.from_bytes(data[:4], "little"), _NIFTI[348])
    for _ in range(int(rng.integers(1, 4))):
        data = poke(rng, data, *fields[int(rng.integers(len(fields)))])
    if rng.random() < 0.2:
        data = damage(rng, data, other)
    return gzip.compress(data, 1, mtime=0) if packed else data


def in_header(rng: Rng, data: bytes, other: bytes) -> bytes:
    """NRRD and MetaImage: text, then voxels."""
    head, _, voxels = data.partition(b"\n\n" if data.startswith(b"NRRD") else b"LOCAL\n")
    lines = (head if data.startswith(b"NRRD") else head + b"LOCAL").split(b"\n")
    words = [
        *(b"", b"0", b"-1", b"1000000 1000000 1000000", b"1000000", b"nan nan nan", b"inf", b"1e300"),
        *(b"65535 65535 1", b"4", b"999999999999999999999999999999999999999999999999999999999999", b"double"),
        *(b"block", b"gzip", b"bzip2", b"raw", b"ascii", b"hex", b"True", b"MET_DOUBLE", b"MET_STRING", b"2 2 2 2"),
        *(b"/etc/passwd", b"../../etc/passwd", b"LIST", b"LOCAL", b"%03d.raw 1 9 1", b"/dev/zero", b"none"),
        *(b"none none none", b"(1,0,0) (0,1,0) (0,0,0)", b"(nan,0,0) none (0,1,0)"),
        *(b"right-anterior-superior-time", b"4294967296", b"-2147483648"),
    ]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        name, sign, value = re.match(rb"([^:=]*)([:=]*)(.*)", lines[at], re.DOTALL).groups()
        parts = value.split() or [b""]
        if rng.random() < 0.5:
            parts[int(rng.integers(len(parts)))] = words[int(rng.integers(len(words)))]
        else:
            parts = [words[int(rng.integers(len(words)))]]
        changed = name + sign + b" " + b" ".join(parts)
        lines[at : at + int(rng.integers(2))] = [changed] if rng.random() < 0.9 else [changed, lines[at]]
    return b"\n".join(lines) + (b"\n\n" if data.startswith(b"NRRD") else b"\n") + voxels


_TAGS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("NumberOfFrames", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope"),
    *("RescaleIntercept", "SliceThickness", "SpacingBetweenSlices", "PhotometricInterpretation"),
    *("PlanarConfiguration", "PixelData", "SpecificCharacterSet", "Modality", "SeriesInstanceUID"),
    *("TransferSyntaxUID", "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"),
)
_TEXTS = (
    *(b"", b"0", b"-1", b"1e300", b"nan", b"inf", b"1e-40", b"65535", b"2147483647", b"x", b"1\\2"),
    *(b"1\\0\\0\\0\\1\\0", b"0\\0", b"1\\\\1", b"-1\\-1", b"MONOCHROME1", b"RGB", b"YBR_FULL", b"PALETTE COLOR"),
    *(b"ISO_IR 192", b"ISO 2022 IR 87", b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.5"),
    *(b"1.2.840.10008.1.2.4.90"),
)


def in_dicom(rng: Rng, data: bytes, other: bytes) -> bytes:
    from pydicom.datadict import tag_for_keyword

    for _ in range(int(rng.integers(1, 4))):
        tag = int(tag_for_keyword(_TAGS[int(rng.integers(len(_TAGS)))]))
        at = data.find(struct.pack("<HH", tag >> 16, tag & 0xFFFF), 128)
        if at < 0 or at + 8 > len(data):
            continue
        explicit = data[at + 4 : at + 6].isalpha()
        short = explicit and data[at + 4 : at + 6] not in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        length_at, length_code = (at + 6, "<u2") if short else (at + 8, "<u4") if explicit else (at + 4, "<u4")
        start = length_at + int(length_code[-1])
        length = int.from_bytes(data[length_at:start], "little")
        if rng.random() < 0.2:
            data = poke(rng, data, length_at, length_code)
        elif explicit and data[at + 4 : at + 6] in (b"DS", b"IS", b"CS", b"UI", b"LO") and length < 200:
            text = _TEXTS[int(rng.integers(len(_TEXTS)))]
            text += b" " * (len(text) % 2)
            data = data[:length_at] + len(text).to_bytes(start - length_at, "little") + text + data[start + length :]
        elif length == 2:
            data = poke(rng, data, start, "<u2")
        else:
            data = data[:start] + damage(rng, data[start : start + length], other) + data[start + length :]
    return data


def in_picture(rng: Rng, data: bytes, other: bytes) -> bytes:
    """PNG with right checksums; sizes of JPEG, BMP and WebP."""
    if data.startswith(b"\x89PNG"):
        chunks, at = [], 8
        while at + 12 <= len(data):
            (length,) = struct.unpack_from(">I", data, at)
            chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
            at += 12 + length
        for _ in range(int(rng.integers(1, 3))):
            i = int(rng.integers(len(chunks))) if rng.random() < 0.5 else 0
            kind, body = chunks[i]
            way = rng.random()
            if i == 0 and way < 0.7:
                place, code = ((0, ">u4"), (4, ">u4"), (8, "u1"), (9, "u1"), (12, "u1"))[int(rng.integers(5))]
                body = poke(rng, body, place, code if ">" in code else ">u1")
                if place == 8:
                    body = body[:8] + bytes([int(rng.choice([1, 2, 4, 8, 16]))]) + body[9:]
            elif kind == b"IDAT" and way < 0.7:
                body = zlib.compress(damage(rng, zlib.decompressobj().decompress(body), other))
            else:
                body = damage(rng, body, other)
            chunks[i : i + 1] = [(kind, body)] * int(rng.choice([1, 1, 1, 2]))
        parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
        return data[:8] + b"".join(parts)
    if data.startswith(b"\xff\xd8"):
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        places = [(frame + 4, ">u1"), (frame + 5, ">u2"), (frame + 7, ">u2"), (frame + 9, ">u1"), (frame + 11, ">u1")]
    elif data.startswith(b"BM"):
        places = [
            (10, "<u4"),
            (14, "<u4"),
            (18, "<i4"),
            (22, "<i4"),
            (26, "<u2"),
            (28, "<u2"),
            (30, "<u4"),
            (34, "<u4"),
            (46, "<u4"),
        ]
    else:
        places = [(4, "<u4"), (16, "<u4"), *((20 + i, "<u2") for i in range(12))]
    for _ in range(int(rng.integers(1, 3))):
        data = poke(rng, data, *places[int(rng.integers(len(places)))])
    return data


def in_tiff(rng: Rng, data: bytes, other: bytes) -> bytes:
    """Entries of the first directory: tag, type, count, value, and values that lie elsewhere."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    offset = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, offset)[0]
    step, first, wide = (20, offset + 8, "u8") if big else (12, offset + 2, "u4")
    for _ in range(int(rng.integers(1, 4))):
        entry = first + step * int(rng.integers(count))
        kind, number = struct.unpack_from(order + "H" + ("Q" if big else "I"), data, entry + 2)
        value = entry + (12 if big else 8)
        if rng.random() < 0.3 and kind in (2, 3, 4) and number > 4 // max(kind - 1, 1):
            value = struct.unpack_from(order + ("Q" if big else "I"), data, value)[0]
        place, code = (
            (entry, "u2"),
            (entry + 2, "u2"),
            (entry + 4, wide),
            (value, "u2"),
            (value, "u2"),
            (value, wide),
        )[int(rng.integers(6))]
        data = poke(rng, data, place, order + code)
    return data


def in_zip(rng: Rng, data: bytes, other: bytes, change: Callable[[Rng, str, bytes], bytes] | None = None) -> bytes:
    """One member of an archive, with a right checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    i = int(rng.integers(len(members)))
    name, body, method = members[i]
    members[i] = (name, change(rng, name, body) if change else damage(rng, body, other), method)
    if rng.random() < 0.1:
        members.append(members[int(rng.integers(len(members)))])
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w") as archive:
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, body, method in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, body)
    return made.getvalue()


def _npy(rng: Rng, name: str, body: bytes) -> bytes:
    shapes = (
        "(1000000, 1000000)",
        "(0,)",
        "(-1, 9)",
        "()",
        "(9223372036854775807,)",
        "(2, 2, 2, 2, 2)",
        "(1e9,)",
        "(4611686018427387904, 2)",
    )
    types = (
        "'|O'",
        "'|V0'",
        "'<U0'",
        "'<f8'",
        "'|b1'",
        "'<c16'",
        "'<M8[s]'",
        "('<f8', (1000000, 1000))",
        "[('a', '<i4')]",
        "'<U99999999'",
        "'x'",
    )
    length = struct.unpack_from("<H", body, 8)[0]
    head = body[10 : 10 + length].decode("latin-1")
    if rng.random() < 0.6:
        head = re.sub(r"'shape': \([^)]*\)", f"'shape': {shapes[int(rng.integers(len(shapes)))]}", head)
    if rng.random() < 0.4:
        head = re.sub(r"'descr': [^,]*", f"'descr': {types[int(rng.integers(len(types)))]}", head)
    changed = head.rstrip() + "\n"
    return body[:8] + struct.pack("<H", len(changed)) + changed.encode("latin-1") + body[10 + length :]


def in_npz(rng: Rng, data: bytes, other: bytes) -> bytes:
    if data[:6] == b"\x93NUMPY":
        return _npy(rng, "", data)
    return in_zip(rng, data, other, _npy if rng.random() < 0.7 else None)


def in_weights(rng: Rng, data: bytes, other: bytes) -> bytes:
    """safetensors: its JSON; a file of torch.save: one member."""
    if data[:2] == b"PK":
        return in_zip(rng, data, other)
    (length,) = struct.unpack_from("<Q", data)
    head = json.dumps(poison(rng, json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


_OPERATORS = (
    "Conv Relu Add MatMul Softmax Concat Slice Resize Gather Tile Expand Pad ConstantOfShape Range Reshape ReduceMean "
    "Einsum LayerNormalization Loop If Scan"
).split()


def in_network(rng: Rng, data: bytes, other: bytes) -> bytes:
    """An ONNX graph: its operators, edges, attributes, and the claims of its weights."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(int(rng.integers(1, 4))):
        node = graph.node[int(rng.integers(len(graph.node)))] if graph.node else graph.node.add()
        names = [name for one in graph.node for name in (*one.input, *one.output)] or ["image"]
        name = names[int(rng.integers(len(names)))]
        weights = graph.initializer[int(rng.integers(len(graph.initializer)))] if graph.initializer else None
        number = INTEGERS[int(rng.integers(len(INTEGERS)))]
        way = int(rng.integers(9))
        if way == 0:
            node.op_type = _OPERATORS[int(rng.integers(len(_OPERATORS)))]
        elif way == 1 and node.input:
            node.input[int(rng.integers(len(node.input)))] = name
        elif way == 2 and node.output:
            node.output[int(rng.integers(len(node.output)))] = name
        elif way == 3 and node.attribute:
            attribute = node.attribute[int(rng.integers(len(node.attribute)))]
            if attribute.ints:
                attribute.ints[int(rng.integers(len(attribute.ints)))] = number
            else:
                attribute.i = number
        elif way == 4:
            graph.node.add().CopyFrom(node)
        elif way == 5 and weights is not None and weights.dims:
            weights.dims[int(rng.integers(len(weights.dims)))] = number
        elif way == 6 and weights is not None:
            weights.data_type = int(rng.integers(24))
        elif way == 7 and weights is not None and weights.raw_data:
            weights.raw_data = damage(rng, weights.raw_data, other)
        elif graph.input and way == 8:
            shape = graph.input[0].type.tensor_type.shape
            if shape.dim:
                shape.dim[int(rng.integers(len(shape.dim)))].dim_value = number
    return bytes(model.SerializeToString())
