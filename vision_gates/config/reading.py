"""From YAML and overrides to a checked RunConfig, and back."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

import vision_gates
from vision_gates.augmentation import build_pipeline
from vision_gates.config.checking import Source, cross_checks, dotted_keys, explain, nearest, section_types
from vision_gates.config.schema import RunConfig
from vision_gates.datasets.base import one_line
from vision_gates.errors import ConfigError
from vision_gates.metrics import DEFAULT_MONITOR
from vision_gates.networks import available_networks
from vision_gates.volumes.augmentation import build_volume_pipeline
from vision_gates.volumes.batch_augmentation import build_batch_augmentation

__all__ = ["dump_config", "find_config", "load_config", "parse_config", "save_config"]

# Far more than any configuration has. Files are not trusted: what is longer would only keep the parser busy.
_MOST_BYTES, _MOST_VALUES, _MOST_CHARACTERS, _MOST_DEPTH = 2**18, 50_000, 10_000, 50


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-3 is a number, only true and false are booleans), and no key may be given twice."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return bool(super().add_indent(column))

    def _check_depth(self, depth: int) -> None:
        if depth >= _MOST_DEPTH:  # found here, before the parser gets into the thousands, where it takes many seconds
            raise yaml.scanner.ScannerError(None, None, f"nested over {_MOST_DEPTH} deep", self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float)) else id(key))
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def find_config(path: str | Path) -> Path:
    """Path of a configuration file: as given, or below the ``configs`` of the installed package or checkout.

    Raises:
        ConfigError: No such file; the message names the nearest recipe.
    """
    path = Path(path)
    if path.is_file():
        return path
    package = Path(vision_gates.__file__).resolve().parent
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    roots = [package / "configs", package.parent / "configs"]
    if not path.is_absolute():
        for root in roots:
            if (root / inner).is_file():
                return root / inner
    recipes = [f"configs/{p.relative_to(root).as_posix()}" for root in roots for p in sorted(root.glob("*/*.yaml"))]
    hint = f"; nearest recipe: {nearest(path.as_posix(), recipes)}" if recipes else ""
    what = "is a directory, not a configuration file" if path.is_dir() else "no such configuration file"
    raise ConfigError(f"{path}: {what}{hint}")


def _parse_yaml(text: str, name: str) -> Any:
    """Plain values as JSON has them; dates and the like become text."""
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{name}: {len(text):,} characters, a configuration has at most {_MOST_BYTES:,}")
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
        _check_plain(value)
        return json.loads(json.dumps(value, default=str))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(one_line(f"{name}:{where} not valid YAML: {problem}")) from error
    except RecursionError as error:
        raise ConfigError(f"{name}: not valid YAML: values are nested too deeply") from error
    except Exception as error:  # of constructors: a date without such a day, a number that is none
        raise ConfigError(one_line(f"{name}: not valid YAML: {error or type(error).__name__}")) from error


def _check_plain(value: Any) -> None:
    """Raises ValueError for what JSON lacks, and for anchors that multiply: JSON writes a value wherever it is used."""
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _MOST_DEPTH:
            much = f"more than {_MOST_VALUES:,} values" if count > _MOST_VALUES else f"nested over {_MOST_DEPTH} deep"
            raise ValueError(f"{much}, anchors counted wherever they are used")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str | int | float | bool | None):
                    raise ValueError(f"the key {key!r} is no text")
            waiting += [(key, depth + 1) for key in item if isinstance(key, str)]
            waiting += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            item.encode()  # half of a surrogate pair is no text, and could never be written
            if len(item) > _MOST_CHARACTERS:
                raise ValueError(f"a text of {len(item):,} characters, at most {_MOST_CHARACTERS:,} are read")


def _apply_override(raw: dict[str, Any], text: str, source: Source) -> None:
    """Set the key of ``key.sub=value`` in ``raw``; the value is YAML."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"override '{text}': key.sub=value is needed, for example optim.lr=0.001")
    parsed = _parse_yaml(value, f"override '{text}'")
    *parents, last = key.split(".")
    node = raw
    for depth, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            dotted = ".".join(parents[: depth + 1])
            raise ConfigError(f"override '{text}': {dotted} is a {type(node).__name__} and has no keys; set it whole")
    node[last] = parsed
    source.overrides.pop(key, None)
    source.overrides[key] = text


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, apply overrides, check everything that can be checked without the data.

    Args:
        path: YAML file, looked up as ``find_config`` does.
        overrides: ``key.sub=value`` strings, the value in YAML.

    Returns:
        The configuration, with ``trainer.run_dir``, ``trainer.monitor`` and ``model.decoder`` filled in.

    Raises:
        ConfigError: Any mistake, in one line.
    """
    file = find_config(path)
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(_MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_config(_parse_yaml(text, str(path)), overrides, source=str(path))


def parse_config(raw: Any, overrides: Sequence[str] = (), *, source: str = "config") -> RunConfig:
    """The same from a mapping instead of a file; ``source`` names it in messages.

    Raises:
        ConfigError: Any mistake, in one line.
    """
    origin = Source(source)
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: sections as `key: value` are needed, found a {type(raw).__name__}")
    raw = json.loads(json.dumps(raw, default=str))  # a deep copy of plain values
    for text in overrides:
        _apply_override(raw, text, origin)
    types = section_types(raw, origin)
    valid = [key for name, annotation in types.items() for key in dotted_keys(annotation, name)]
    for name in raw:
        if name not in types:
            raise origin.error(name, f"unknown key; nearest valid key: {nearest(name, valid)}")
    sections = {}
    for name, annotation in types.items():
        if name in raw and not (raw[name] is None and name in ("optim", "schedule", "augment", "trainer")):
            try:
                # JSON mode and strict: 3 is a float and [1, 2] a tuple, but "3" is no int and true no number. Data sets
                # may have validators that strict mode does not suit, so there it is checked afterwards.
                strict = None if name == "data" else True
                sections[name] = TypeAdapter(annotation).validate_json(json.dumps(raw[name]), strict=strict)
            except ValidationError as error:
                raise explain(error, name, raw[name], valid, origin) from error
    for key, value in raw["data"].items():
        accepted = getattr(sections["data"], key)
        if type(accepted) in (int, float) and isinstance(value, (bool, str)):
            raise origin.error(f"data.{key}", f"a number is needed, found {value!r}")
    config = _resolve(RunConfig(**sections), source)
    for key, problem in cross_checks(config):
        raise origin.error(key, problem)
    build = build_volume_pipeline if config.data.augmented_by == "monai" else build_pipeline
    try:
        for part in ("train", "eval"):
            build(getattr(config.augment, part), key=f"augment.{part}")
        build_batch_augmentation(config.augment.batch, size=(1, 1, 1))
    except ConfigError as error:
        key, _, problem = str(error).partition(": ")
        raise origin.error(key, problem) from error
    except Exception as error:  # libraries check their arguments each in its own way
        raise origin.error("augment", f"cannot be built ({type(error).__name__}: {error})") from error
    return config


def _resolve(config: RunConfig, source: str) -> RunConfig:
    """Fill in the defaults that depend on other keys."""
    trainer, model = config.trainer, config.model
    if trainer.monitor is None:
        trainer = trainer.model_copy(update={"monitor": DEFAULT_MONITOR[config.task.type]})
    if trainer.run_dir is None:
        trainer = trainer.model_copy(update={"run_dir": (Path("runs") / Path(source).stem).as_posix()})
    if model.decoder is None and config.task.type == "segmentation" and model.name not in available_networks():
        model = model.model_copy(update={"decoder": {"type": "pyramid", "channels": 64}})
    return config.model_copy(update={"trainer": trainer, "model": model})


def dump_config(config: RunConfig) -> str:
    """YAML text of a configuration; ``load_config`` of it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write a configuration to a YAML file, at once or not at all."""
    writing = Path(f"{path}.writing")
    try:
        writing.write_text(dump_config(config), encoding="utf-8")
        writing.replace(path)
    finally:
        writing.unlink(missing_ok=True)
