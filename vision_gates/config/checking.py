"""What can be wrong with a configuration, each in one line with the nearest valid key."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Annotated, Any, get_args

import timm
import timm.optim
from pydantic import BaseModel, ValidationError

from vision_gates.config.schema import MONITORS, TASKS, RunConfig
from vision_gates.datasets.base import available, data_config_type, one_line
from vision_gates.decoders import available_decoders
from vision_gates.errors import ConfigError
from vision_gates.networks import available_networks, network_options

__all__ = ["Source", "cross_checks", "dotted_keys", "explain", "nearest", "section_types"]


@dataclass
class Source:
    """Where a configuration comes from, for messages."""

    file: str
    overrides: dict[str, str] = field(default_factory=dict)  # dotted key -> the override as it was typed

    def error(self, key: str, problem: str) -> ConfigError:
        """ConfigError that names the override which set the key, else the file."""
        for dotted, text in reversed(self.overrides.items()):
            if key == dotted or key.startswith(f"{dotted}."):
                return ConfigError(one_line(f"override '{text}': {key}: {problem}"))
        return ConfigError(one_line(f"{self.file}: {key}: {problem}"))


def nearest(name: str, valid: Sequence[str]) -> str:
    """The most similar of some names; for dotted keys, the last part counts as well as the whole."""
    name = name[:200]  # comparing takes the product of the lengths

    def similarity(candidate: str) -> float:
        whole = SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        last = SequenceMatcher(None, name.lower().rpartition(".")[2], candidate.lower().rpartition(".")[2]).ratio()
        initials = "".join(word[0] for word in name.lower().rpartition(".")[2].split("_") if word)
        if initials == candidate.rpartition(".")[2]:  # learning_rate -> lr
            last = 1.0
        return max(whole, 0.9 * last) + 0.1 * whole

    return max(valid, key=similarity)


def section_types(raw: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Section name to its type, the ``type`` keys of task and data resolved."""
    fields = RunConfig.model_fields.items()
    types: dict[str, Any] = {
        n: Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation for n, info in fields
    }
    for name in ("task", "data"):
        if not isinstance(raw.get(name), Mapping) or not isinstance(raw[name].get("type"), str):
            found = raw.get(name)
            choices = ", ".join(TASKS if name == "task" else available())
            if isinstance(found, Mapping) and found.get("type") is not None:
                raise source.error(f"{name}.type", f"one of {choices} is needed, found {found['type']!r}")
            raise source.error(f"{name}.type", f"required key is missing; one of {choices}")
    kind = raw["task"]["type"]
    if kind not in TASKS:
        raise source.error("task.type", f"unknown task {kind!r}; nearest: {nearest(kind, list(TASKS))}")
    types["task"] = TASKS[kind]
    try:
        types["data"] = data_config_type(raw["data"]["type"])
    except ConfigError as error:
        raise source.error("data.type", str(error).removeprefix("data.type: ")) from error
    if "model" not in raw:
        raise source.error("model.name", "required key is missing; python tools/models.py lists the names")
    return types


def dotted_keys(annotation: Any, prefix: str) -> Iterator[str]:
    """Every valid dotted key at and below a type."""
    yield prefix
    for inner in (annotation, *get_args(annotation)):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            for name, info in inner.model_fields.items():
                yield from dotted_keys(info.annotation, f"{prefix}.{name}")


def explain(error: ValidationError, section: str, raw: Any, valid: Sequence[str], source: Source) -> ConfigError:
    """One line for the first fault of a section."""
    faults = error.errors(include_url=False)
    keys = [_dotted_location(section, raw, fault) for fault in faults]
    # Every member of a union complains; the one that got deepest into the value is the one that was meant.
    key = max((k for k in keys if k.startswith(keys[0])), key=len)
    first = faults[keys.index(key)]
    others = len({k for k in keys if not key.startswith(k)})
    more = f" (and {others} more in this section)" if others else ""
    if first["type"] == "extra_forbidden":
        near = nearest(key, [k for k in valid if "." in k])
        return source.error(key, f"unknown key, found with {first['input']!r}; nearest valid key: {near}{more}")
    if first["type"] == "missing":
        return source.error(key, f"required key is missing{more}")
    reasons = dict.fromkeys(f["msg"].removeprefix("Input ") for f, k in zip(faults, keys, strict=True) if k == key)
    # What a validator raised begins "Value error, "; what it says is already a sentence.
    reason = " or ".join(reasons).replace("Value error, ", "")
    reason = reason.replace("a valid array", "a list").replace("an object", "a mapping of keys to values")
    return source.error(key, f"{reason}, found {first['input']!r}{more}")


def _dotted_location(section: str, raw: Any, fault: Any) -> str:
    """Dotted key of a fault; pydantic's labels of union members, which are no keys, are left out."""
    key, node = section, raw
    for part in fault["loc"]:
        if isinstance(node, Mapping) and (part in node or fault["type"] in ("missing", "extra_forbidden")):
            key, node = f"{key}.{part}", node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            key, node = f"{key}.{part}", node[part]
    return key


def cross_checks(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) for what no single key shows."""
    task, model, optim = config.task.type, config.model, config.optim
    if {"in_chans", "in_channels", "num_classes", "pretrained", "drop_path_rate"} & set(model.options):
        yield "model.options", "in_chans and num_classes come from the data, pretrained and drop_path_rate are own keys"
    if model.name in available_networks():
        yield from _network_problems(config)
    else:
        if not re.match(r"(hf-hub|hf_hub|local-dir):", model.name) and not timm.is_model(model.name):
            models = timm.list_models() + (available_networks() if task == "segmentation" else [])
            yield "model.name", f"no model {model.name!r}; nearest: {nearest(model.name, models)}"
        if task == "classification" and model.decoder is not None:
            yield "model.decoder", "a decoder belongs to task.type segmentation; remove it"
        if task == "segmentation":
            yield from _decoder_problems(model.decoder or {})
    for key in ("mixup", "cutmix"):
        if getattr(config.augment, key) > 0:
            if task == "segmentation":
                yield f"augment.{key}", f"{key} is for classification; set it to 0"
            if config.data.batch_size % 2:
                yield "data.batch_size", f"{key} needs an even batch size, found {config.data.batch_size}"
    if config.trainer.cuda_graph and optim.accumulate > 1:
        yield "trainer.cuda_graph", f"cannot go with optim.accumulate={optim.accumulate}; use a larger data.batch_size"
    if config.augment.batch and config.data.augmented_by != "monai":
        yield "augment.batch", "is for data.type volumes; use augment.train"
    known = [str(name) for name in timm.optim.list_optimizers()]
    if optim.name.lower().removeprefix("lookahead_") not in known:
        yield "optim.name", f"no optimiser {optim.name!r}; nearest: {nearest(optim.name, known)}"
    elif optim.betas is not None:
        info = timm.optim.get_optimizer_info(optim.name.lower().removeprefix("lookahead_"))
        if not info.has_betas:
            yield "optim.betas", f"{optim.name} has no betas; remove the key"
    if config.schedule.warmup_epochs > config.schedule.epochs:
        yield "schedule.warmup_epochs", f"longer than schedule.epochs = {config.schedule.epochs}"
    if config.schedule.min_lr > optim.lr:
        yield "schedule.min_lr", f"above optim.lr = {optim.lr}"
    monitor, names = config.trainer.monitor, MONITORS[task]
    if monitor not in names:
        yield "trainer.monitor", f"no metric {monitor!r} in {task}; one of {', '.join(names)}"
    if isinstance(config.task.class_weights, tuple):
        weights = config.task.class_weights
        if any(w < 0 for w in weights) or not any(weights):
            yield "task.class_weights", f"numbers >= 0, not all 0, are needed, found {list(weights)}"
    if config.task.type == "segmentation" and config.task.deep_supervision_weights is not None:
        shares = config.task.deep_supervision_weights
        if any(share < 0 for share in shares) or not any(shares):
            yield "task.deep_supervision_weights", f"numbers >= 0, not all 0, are needed, found {list(shares)}"


def _network_problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What does not go with a network that is whole by itself; its options are the arguments of its ``build``."""
    model = config.model
    if config.task.type != "segmentation":
        yield "model.name", f"{model.name} is a network for segmentation, not for task.type {config.task.type}"
    if model.decoder is not None:
        yield "model.decoder", f"a decoder belongs to an encoder of timm, {model.name} is a whole network; remove it"
    valid = network_options(model.name)
    if model.pretrained and "pretrained" not in valid:
        yield "model.pretrained", f"{model.name} has no pretrained weights; set it to false"
    if model.drop_path_rate and "drop_path_rate" not in valid:
        yield "model.drop_path_rate", f"{model.name} has no stochastic depth; set it to 0"
    for name in model.options:
        if name not in valid:
            yield f"model.options.{name}", f"unknown key; nearest valid key: {nearest(name, valid)}"


def _decoder_problems(decoder: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Unknown types and options of the decoder; its options are the arguments of its class that have a default."""
    known = available_decoders()
    kind = decoder.get("type")
    if kind not in known:
        yield (
            "model.decoder.type",
            f"no decoder {kind!r}; nearest: {nearest(str(kind), known)}; known: {', '.join(known)}",
        )
        return
    parameters = inspect.signature(importlib.import_module(f"vision_gates.decoders.{kind}").Decoder).parameters
    valid = ["type", *(name for name, p in parameters.items() if p.default is not p.empty)]
    for name in decoder:
        if name not in valid:
            yield f"model.decoder.{name}", f"unknown key; nearest valid key: {nearest(name, valid)}"
