"""Tables of the models in timm's registry (size, features, source, paper result, weights) and of the whole networks.

``vision-gates models`` shows them, the README holds their Markdown. Nothing is downloaded and no weight is allocated:
they are built on the meta device.
"""

import csv
import io
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from timm.models import get_pretrained_cfg

import vision_gates  # noqa: F401  (registers the vg_* models)
from vision_gates.errors import UserError
from vision_gates.networks import available_networks, create_network, describe_network

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "main",
    "model_rows",
    "model_table",
    "network_rows",
    "network_table",
    "networks_to_markdown",
    "to_csv",
    "to_markdown",
]

FORMATS = ("table", "markdown", "csv")


def model_rows(pattern: str = "vg_*") -> list[dict[str, Any]]:
    """One dict a model, in the order of the registry.

    Args:
        pattern: Names as in ``timm.list_models``, with ``*`` and ``?``.

    Returns:
        Dicts with ``name``, ``family`` (the model's file), ``parameters`` (in millions, with the classes of its
        configuration), ``input`` ("224 x 224"), ``reductions`` and ``channels`` of the feature pyramid (tuples, empty
        where it has none), ``paper`` ("arXiv:2405.18425" or ""), ``code`` (URL), ``licence``, ``top1`` (ImageNet-1k, in
        percent, of the paper; None without a paper result) and ``weights`` ("hub: ...", "url: ..." or "none").

    Raises:
        UserError: No model matches; names the nearest.
    """
    names = timm.list_models(pattern)
    if not names:
        near = get_close_matches(pattern.replace("*", ""), timm.list_models(), n=1, cutoff=0.0)[0]
        raise UserError(f"no model matches {pattern!r}; nearest name: {near}")
    return [_row(name) for name in names]


def network_rows(pattern: str = "*") -> list[dict[str, Any]]:
    """One dict a whole segmentation network: ``name``, ``parameters`` (in millions, with defaults) and ``about``.

    Args:
        pattern: Names, with ``*`` and ``?``.
    """
    rows = []
    for name in available_networks():
        if fnmatchcase(name, pattern):
            with torch.device("meta"):
                network = create_network(name, in_channels=1, num_classes=2)
            count = sum(p.numel() for p in network.parameters())
            rows.append({"name": name, "parameters": round(count / 1e6, 2), "about": describe_network(name)})
    return rows


def _row(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = timm.create_model(name)
    reductions, channels = _pyramid(name)
    cfg = get_pretrained_cfg(name)
    notes = " ".join((cfg.notes if cfg else None) or ())
    result = re.search(r"top-1 ([\d.]+)", notes)
    _, height, width = (cfg.input_size if cfg else None) or (0, 0, 0)
    return {
        "name": name,
        "family": timm.model_entrypoint(name).__module__.rpartition(".")[2],
        "parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "input": f"{height} x {width}" if height else "any",
        "reductions": reductions,
        "channels": channels,
        "paper": (cfg and cfg.paper_ids) or "",
        "code": (cfg and cfg.origin_url) or "",
        "licence": (cfg and cfg.license) or "",
        "top1": float(result.group(1)) if result else None,
        "weights": _weights(cfg),
    }


def _pyramid(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reductions and channels with ``features_only=True``; empty if the model does not offer it."""
    try:
        with torch.device("meta"):
            info: Any = timm.create_model(name, features_only=True).feature_info
    except RuntimeError as error:
        if "features_only" not in str(error):
            raise
        return (), ()
    return tuple(info.reduction()), tuple(info.channels())


def _weights(cfg: Any) -> str:
    if cfg is None:
        return "none"
    if cfg.hf_hub_id:
        return f"hub: {cfg.hf_hub_id}"
    return f"url: {cfg.url}" if cfg.url else "none"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The row as text, in the order of `_HEADINGS`."""
    return [
        row["name"],
        row["family"],
        f"{row['parameters']:.2f}",
        row["input"],
        "/".join(map(str, dict.fromkeys(row["reductions"]))) or "-",
        row["paper"] or "-",
        row["code"] or "-",
        row["licence"] or "-",
        "-" if row["top1"] is None else f"{row['top1']:.1f}",
        row["weights"],
    ]


_HEADINGS = ("name", "family", "params (M)", "input", "reductions", "paper", "code", "licence", "top-1", "weights")
_RIGHT = ("params (M)", "top-1")
_CAPTION = (
    "params: millions, with the classifier of 1,000 classes. size: pixels. stride: of the feature pyramid. paper: "
    "arXiv. top-1: ImageNet-1k accuracy in percent as the paper gives it, not measured here. weights: where they are, "
    "on Hugging Face's hub or on a page of the authors."
)


def model_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Table for a terminal, shortened to fit 80 columns; the code's address is a link on the paper's number."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=_CAPTION, caption_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for heading in ("name", "params", "size", "stride", "paper", "licence", "top-1", "weights"):
        justify: Literal["left", "right"] = "right" if heading in ("params", "top-1") else "left"
        table.add_column(heading, justify=justify, overflow="fold", min_width=len(heading), no_wrap=heading == "name")
    for row in rows:
        strides = row["reductions"]
        paper = str(row["paper"]).removeprefix("arXiv:") or "-"
        table.add_row(
            row["name"],
            f"{row['parameters']:.2f}",
            _square(row["input"]),
            f"{min(strides)}-{max(strides)}" if len(set(strides)) > 1 else str(*set(strides)) or "-",
            Text(paper, style=f"link {row['code']}" if row["code"] else ""),
            row["licence"] or "-",
            "-" if row["top1"] is None else f"{row['top1']:.1f}",
            row["weights"].partition(":")[0],
        )
    return table


_NETWORKS_CAPTION = "Whole segmentation networks. params: millions, for 1 channel and 2 classes in 2-D."


def network_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(caption=_NETWORKS_CAPTION, caption_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    table.add_column("name", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for row in rows:
        table.add_row(row["name"], f"{row['parameters']:.2f}", row["about"])
    return table


def networks_to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table for a README."""
    lines = ["| network | params (M) | what it is |", "| --- | ---: | --- |"]
    lines += [f"| `{row['name']}` | {row['parameters']:.2f} | {row['about']} |" for row in rows]
    return "\n".join(lines) + "\n"


def _square(size: str) -> str:
    height, _, width = size.partition(" x ")
    return height if height == width else size


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with the keys of `model_rows` as header; tuples as numbers with spaces between."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in row.items()})
    return text.getvalue()


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table for a README, paper and code as links."""
    headings = [heading for heading in _HEADINGS if heading != "code"]
    lines = [
        f"| {' | '.join(headings)} |",
        f"|{'|'.join(' ---: ' if heading in _RIGHT else ' --- ' for heading in headings)}|",
    ]
    for row in rows:
        cells = dict(zip(_HEADINGS, _cells(row), strict=True))
        cells["name"] = f"`{row['name']}`"
        links = []
        if row["paper"]:
            number = row["paper"].removeprefix("arXiv:")
            known = row["paper"].startswith("arXiv:")
            links.append(f"[{row['paper']}](https://arxiv.org/abs/{number})" if known else row["paper"])
        if row["code"]:
            links.append(f"[code]({row['code']})")
        cells["paper"] = ", ".join(links) or "-"
        lines.append(f"| {' | '.join(cells[h].replace('|', '&#124;') for h in headings)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Show the tables: ``[PATTERN] [format=table|markdown|csv]``; CSV has the networks only where no model matches.

    Raises:
        UserError: More than one pattern, another key or format, or no such model.
    """
    patterns = [text for text in argv if "=" not in text]
    settings = dict(text.split("=", 1) for text in argv if "=" in text)
    form = settings.pop("format", "table")
    if settings or form not in FORMATS:
        wrong = next(iter(settings.items()), ("format", form))
        raise UserError(f"{wrong[0]}={wrong[1]}: the only setting is format={'|'.join(FORMATS)}")
    if len(patterns) > 1 or any(text.startswith("-") for text in patterns):
        raise UserError(f"{' '.join(patterns)}: one pattern of names is needed, quoted, such as 'vg_vig_*'")
    networks = network_rows(*patterns)
    models = [] if patterns and networks and not timm.list_models(patterns[0]) else model_rows(*patterns)
    if form == "table":
        from rich.console import Console

        # A pipe has no width of its own; rich would assume 80 columns and fold what need not be.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        tables = [make(rows) for make, rows in ((model_table, models), (network_table, networks)) if rows]
        console.print(*tables, sep="\n\n")
    elif form == "markdown":
        texts = [make(rows) for make, rows in ((to_markdown, models), (networks_to_markdown, networks)) if rows]
        sys.stdout.write("\n".join(texts))
    else:
        sys.stdout.write(to_csv(models or networks))
    return 0
