"""Shared by all tests: a fixed seed, and the place of optional development data."""

import gc
import os
import sys
from pathlib import Path

# The first update check or hub call of a library would make the tests depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Test processes share the cores (pytest -n): threads that spin while they wait would take them from each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

_CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """What torch.compile keeps, and what the garbage collector would look through again in every later test."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Let extension modules find their objects gone when the process ends; else some list them as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Runs of the official implementations; ``$VISION_GATES_TEST_DATA/../golden`` or beside the checkout."""
    return _optional_folder("golden")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real images for tests that need more than what a package ships."""
    return _optional_folder("data")


def _optional_folder(name: str) -> Path:
    configured = os.environ.get("VISION_GATES_TEST_DATA")
    data = Path(configured) if configured else _CHECKOUT.parent / "shared" / "data"
    folder = data.parent / name if name != "data" else data
    if not folder.is_dir():
        pytest.skip(f"no folder {name!r} of development data: set VISION_GATES_TEST_DATA to the data folder beside it")
    return folder
