"""Mutants: damage to bytes, and to the values of JSON and YAML."""

import copy
import json
import math
from typing import Any

import numpy as np
import yaml

Files = dict[str, Any]  # relative name -> bytes, or the target of a symbolic link as str
Rng = np.random.Generator
INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**15 - 1,
    -(2**15),
    2**16 - 1,
    10**6,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**62,
    2**63 - 1,
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-40, 1e-7, 1e6, 3e38, 1e300, math.nan, math.inf, -math.inf)
VALUES: tuple[Any, ...] = (  # for JSON and YAML
    *(
        None,
        True,
        False,
        *INTEGERS,
        2**70,
        *FLOATS,
        "",
        " ",
        "0",
        "-1",
        "\x00",
        "\n",
        "a\nb",
        "\ud800",
        "é",
        "x" * 3000,
    ),
    *("9" * 5000, "../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "C:\\x", "(", "(a+)+b", "a{99999999999}"),
    *(
        [],
        {},
        [[]],
        [None],
        [1, "a", None],
        {"a": 1},
        {"": {}},
        {"type": "x"},
        [{}],
        [0] * 2000,
        {str(i): i for i in range(99)},
    ),
)
SCALARS = (  # of YAML text
    *(
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system",
        "!!timestamp x",
        "!!int x",
        "!!bool x",
        "!!set {a}",
    ),
    *(
        "!!binary x",
        "!!float x",
        "!!omap [a: 1]",
        "!!pairs [a]",
        "2001-99-99",
        "2001-01-01",
        "0b_",
        "0x_",
        "1:99",
        "1e999",
    ),
    *(
        ".nan",
        ".inf",
        '"\\UFFFFFFFF"',
        '"\\uD800"',
        "&a [*a]",
        "&b {c: *b}",
        "*nope",
        "{<<: {a: 1}}",
        "{? [a] : 1}",
        "{",
        "[",
    ),
    *(
        "[" * 3000,
        "{a: " * 500,
        "9" * 5000,
        "|",
        ">-9",
        "@",
        "`x",
        "%",
        "\t",
        "--- a",
        "...",
        "- -",
        ": :",
        "? ?",
        "\x07",
        "~",
    ),
)


def poke(rng: Rng, data: bytes, at: int, code: str) -> bytes:
    """An extreme number of the struct ``code``, such as "<h", at a place."""
    kind = np.dtype(code)
    if at < 0 or at + kind.itemsize > len(data):
        return data
    with np.errstate(all="ignore"):
        if kind.kind == "f":
            raw = np.array(FLOATS[rng.integers(len(FLOATS))]).astype(kind).tobytes()
        else:
            number = INTEGERS[rng.integers(len(INTEGERS))] if rng.random() < 0.7 else int(rng.integers(2**16))
            order = "big" if code[0] == ">" else "little"
            raw = (number & (2 ** (8 * kind.itemsize) - 1)).to_bytes(kind.itemsize, order)
    return data[:at] + raw + data[at + kind.itemsize :]


def damage(rng: Rng, data: bytes, other: bytes) -> bytes:
    """One to four of: flipped bits, a run, a cut, a part lost, doubled or from ``other``, an extreme number."""
    for _ in range(int(rng.integers(1, 5))):
        a, b = sorted(int(x) for x in rng.integers(0, len(data) + 1, 2))
        short = a + min(b - a, int(rng.integers(1, 65)))
        way = int(rng.integers(8))
        if way == 0:
            changed = bytearray(data)
            for place in rng.integers(0, max(len(data), 1), int(rng.integers(1, 9))) if data else ():
                changed[place] ^= 1 << int(rng.integers(8))
            data = bytes(changed)
        elif way == 1:
            data = (
                data[:a]
                + bytes([int(rng.choice([0, 255, 0x7F, 0x20, int(rng.integers(256))]))]) * (short - a)
                + data[short:]
            )
        elif way == 2:
            data = data[:b]
        elif way == 3:
            data = data[:a] + data[short:]
        elif way == 4:
            data = data[:short] + data[a:]
        elif way == 5:
            data = data[:a] + other[int(rng.integers(len(other) + 1)) :]
        else:  # most headers lie at the start
            at = int(rng.integers(0, min(512, len(data)) + 1)) if rng.random() < 0.7 else a
            data = poke(
                rng, data, at, "<>"[int(rng.integers(2))] + ("u1", "i2", "i4", "i8", "f4", "f8")[int(rng.integers(6))]
            )
    return data


def poison(rng: Rng, tree: Any) -> Any:
    """JSON values with one to three of them replaced, removed, renamed or moved."""
    root = {"": copy.deepcopy(tree)}
    for _ in range(int(rng.integers(1, 4))):
        node: Any = root
        key: Any = ""
        while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = keys[int(rng.integers(len(keys)))]
        value = VALUES[int(rng.integers(len(VALUES)))]
        way = int(rng.integers(6))
        if way < 3:
            node[key] = copy.deepcopy(value)
        elif way == 3 and node is not root:
            del node[key]
        elif way == 4 and isinstance(node, dict) and node is not root:
            node[str(value)[:4000]] = node[key]
        else:
            node[key] = [copy.deepcopy(node[key]), node[key]]
    return root[""]


def in_json(rng: Rng, data: bytes, other: bytes) -> bytes:
    return json.dumps(poison(rng, json.loads(data))).encode()


def in_yaml(rng: Rng, data: bytes, other: bytes) -> bytes:
    if rng.random() < 0.5:
        return yaml.safe_dump(poison(rng, yaml.safe_load(data)), sort_keys=False).encode("utf-8", "surrogatepass")
    lines = data.decode().splitlines()
    for _ in range(int(rng.integers(1, 3))):
        at, scalar = int(rng.integers(len(lines))), SCALARS[int(rng.integers(len(SCALARS)))]
        head, colon, _ = lines[at].partition(":")
        lines[at] = (f"{head}{colon} {scalar}", f"{scalar}", f"  {lines[at]}", f"{scalar}: {head}")[
            int(rng.integers(4))
        ]
    return "\n".join(lines).encode("utf-8", "surrogatepass")
