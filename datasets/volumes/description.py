"""dataset.json of nnU-Net v2 and of the Medical Segmentation Decathlon: its keys, checked one by one."""

import json
import re
from pathlib import Path
from typing import Any

from vision_gates.datasets.base import few
from vision_gates.errors import DataError

__all__ = ["Description", "short"]


class Description:
    """dataset.json; what is wrong with it is told with the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); nnU-Net and MSD data sets have it") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); restore the file") from error
        if not isinstance(self.content, dict):
            raise DataError(f"{path}: holds a {type(self.content).__name__}, not an object {{...}}")

    def get(self, key: str, kind: type, example: str) -> Any:
        """The value of a key, which must be there and of that type."""
        if key not in self.content:
            raise DataError(f"{self.path}: the key {key!r} is missing; add it, such as {example}")
        value = self.content[key]
        if not isinstance(value, kind) or not value:
            raise DataError(f"{self.path}: {key} is {short(value)}; it must look like {example}")
        return value

    def classes(self) -> tuple[tuple[str, ...], int | None]:
        """(names by label value, ignore_index) from {name: value} (nnU-Net) or {value: name} (MSD)."""
        labels = self.get("labels", dict, '{"background": 0, "tumour": 1}')
        regions = [name for name, value in labels.items() if isinstance(value, list)]
        if regions:
            raise DataError(
                f"{self.path}: labels: {few(regions, limit=6)} {'are regions' if len(regions) > 1 else 'is a region'} "
                f"of several values; region-based training is not supported yet: give each label one value"
            )
        by_value: dict[int, str] = {}
        for key, value in labels.items():
            name, number = (value, key) if isinstance(value, str) else (key, value)
            if isinstance(number, bool) or not re.fullmatch(r"\d{1,9}", str(number)):
                raise DataError(f"{self.path}: labels: {name!r} has the value {short(number)}; it must be 0, 1, 2 ...")
            if int(number) in by_value:
                raise DataError(f"{self.path}: labels: {by_value[int(number)]!r} and {name!r} are both {int(number)}")
            by_value[int(number)] = name
        ignored = [value for value, name in by_value.items() if name == "ignore"]
        ignore_index = ignored[0] if ignored else None
        values = sorted(value for value in by_value if value not in ignored)
        if values != list(range(len(values))) or len(ignored) > 1:
            raise DataError(
                f"{self.path}: labels: the values are {few(sorted(by_value), limit=8)}; they must be 0, 1, 2 ... "
                f"without gaps, 0 the background; renumber the label files, or add the missing classes"
            )
        names = tuple(by_value[value] for value in values)
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(f"{self.path}: labels needs two or more different names, 0 the background, not {names}")
        return names, ignore_index

    def channels(self, *keys: str) -> tuple[str, ...]:
        """Names of the channels 0, 1 ..., from the first of ``keys`` that is there."""
        key = next((key for key in keys if key in self.content), keys[0])
        names = self.get(key, dict, '{"0": "MRI"}')
        if set(names) != {str(i) for i in range(len(names))}:
            raise DataError(f"{self.path}: {key} numbers the channels {few(list(names), limit=8)}; count from 0")
        return tuple(str(names[str(i)]) for i in range(len(names)))


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
