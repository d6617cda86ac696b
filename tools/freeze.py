"""Exact versions of all dependencies, as a constraints file: python tools/freeze.py [out=FILE] [extras=all,dev]

Run it by the Python of an environment in which `make test` has passed. The file, by default .ci/constraints-pyX.Y.txt,
names what this environment has of the project's dependencies and of theirs; packages installed by hand, the project
itself and pip are not in it. `make constraints` does this; .ci/run installs with the file.
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "vision-gates"


def required(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Version of every package that a package needs in this environment, by normalised name.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        package = distribution(name)
        found[name] = Version(package.version).public  # without +cu130: the version that PyPI has
        for requirement in map(Requirement, package.requires or ()):
            contexts = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def main(arguments: list[str]) -> str | None:
    """Write the file; returns what went wrong."""
    python = ".".join(platform.python_version_tuple()[:2])
    options = {"out": f".ci/constraints-py{python}.txt", "extras": "all,dev"}
    given = dict(text.partition("=")[::2] for text in arguments)
    if given.keys() - options.keys():
        return (__doc__ or "").strip()
    options |= given
    try:
        versions = required(PROJECT, frozenset(options["extras"].split(",")))
    except PackageNotFoundError as error:
        return f"error: {error.name}: not installed; pip install -e '.[{options['extras']}]'"
    del versions[PROJECT]
    system = f"Python {python}, {platform.system()} {platform.machine()}"
    lines = [f"# Versions that passed `make test` together: {system}. Written by `make constraints`."]
    lines += [f"{name}=={version}" for name, version in sorted(versions.items())]
    Path(options["out"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"{options['out']}: {len(versions)} packages\n")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
