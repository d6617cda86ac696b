"""Names without a prefix are mmseg's, as with ``default_scope = "mmseg"`` in a configuration."""

import pytest


@pytest.fixture(autouse=True)
def _scope():
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmseg"):
        yield
