"""Adaptive average pooling as products: PyTorch's values, whatever the sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_gates.export.pooling import PoolingAsProducts, adaptive_avg_pool

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@pytest.mark.parametrize(
    ("size", "bins"),
    [((12,), (5,)), ((17, 40), (6, 6)), ((2, 7), (6, 3)), ((1, 5), (2, 5)), ((9, 4, 11), (2, 4, 3))],
)
def test_values(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(adaptive_avg_pool(x, bins), POOLS[len(size)](x, bins), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d((None, 2)), nn.AdaptiveAvgPool3d(2), nn.AdaptiveAvgPool1d(4)]
)
def test_modules_and_functions_are_replaced_within_the_context_alone(pool):
    x = torch.randn(2, 3, *(13, 10, 6)[: int(type(pool).__name__[-2])], dtype=torch.float64)
    names = []
    for context in (torch.no_grad(), PoolingAsProducts()):
        with context, torch.profiler.profile() as profiled:
            result = pool(x)
        names.append({event.key for event in profiled.key_averages()})
        torch.testing.assert_close(result, pool(x), rtol=0, atol=1e-14)
    assert "aten::matmul" not in names[0] and "aten::matmul" in names[1]
    assert not any("adaptive_avg_pool" in name for name in names[1])


def test_pooling_to_one_value_stays_what_it_is():
    x = torch.randn(2, 3, 13, 10)
    with PoolingAsProducts(), torch.profiler.profile() as profiled:
        F.adaptive_avg_pool2d(x, output_size=(1, 1))
    assert "aten::matmul" not in {event.key for event in profiled.key_averages()}
