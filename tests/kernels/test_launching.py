"""What torch.compile learns about the kernels, with no GPU: that they write their results alone.

It reads this out of a kernel's code before the first run. A tensor that it takes for written is copied before each
launch, which would cost more than most kernels here take.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from torch._higher_order_ops import triton_kernel_wrap  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402


def tensors(*shapes):
    return [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]


def scan_tensors(n_tokens):
    """q, k, v, the decays of both directions; slices of a wider projection, as in ViG."""
    wide = torch.empty(2, n_tokens, 3 * 192, dtype=torch.bfloat16)
    return [x.unflatten(-1, (3, -1)) for x in wide.split((96, 96, 192, 96, 96), dim=-1)]


def gate_tensors():
    return [*tensors(*[(2, 49, 3, 64)] * 3, (64,), (64,), (3, 64)), 1e-6, True]


def position_tensors(side):
    """Content, values, the tables of both axes, the gate."""
    return [*tensors(*[(2, side**2, 4, 48)] * 2), *(torch.empty(x) for x in ((4, side, side), (4, side, side), 4))]


# Kernels by name: module, function that launches them, its arguments.
LAUNCHES = {
    "gla_short": ("bidirectional_gla", "_forward", lambda: [*scan_tensors(196), 0.1]),
    "gla_long": ("bidirectional_gla", "_forward", lambda: [*scan_tensors(1000), 0.1]),
    "gla_backward": ("bidirectional_gla", "_backward", lambda: [*tensors((2, 196, 3, 64)), *scan_tensors(196), 1]),
    "gla_long_backward": ("bidirectional_gla", "_backward", lambda: [*tensors((2, 999, 3, 64)), *scan_tensors(999), 1]),
    "convolution": ("depthwise_conv3x3", "_forward", lambda: [*tensors((2, 7, 7, 96), (96, 1, 3, 3)), True]),
    "convolution_backward": (
        "depthwise_conv3x3", "_backward", lambda: [*tensors((2, 7, 7, 96), (2, 7, 7, 96), (96, 1, 3, 3)), False]
    ),
    "convolution_silu_backward": (
        "depthwise_conv3x3", "_backward", lambda: [*tensors((2, 7, 7, 96), (2, 7, 7, 96), (96, 1, 3, 3)), True]
    ),
    "gate": ("locality_gate", "_forward", gate_tensors),
    "gate_backward": ("locality_gate", "_backward", lambda: [*tensors((2, 49, 3, 64)), *gate_tensors()]),
    "decay": ("low_rank_decay", "_forward", lambda: [*tensors((98, 16), (192, 16), (192,)), 16.0]),
    "decay_backward": ("low_rank_decay", "_backward", lambda: [*tensors((98, 192), (98, 16), (192, 16), (192,)), 16.0]),
    "positional": ("positional_attention", "_forward", lambda: position_tensors(14)),
    "positional_backward": (
        "positional_attention", "_backward", lambda: [*tensors((2, 196, 4, 48)), *position_tensors(14)]
    ),
    "positional_long_backward": (
        "positional_attention", "_backward", lambda: [*tensors((2, 1600, 4, 48)), *position_tensors(40)]
    ),
    "patch_rows": ("patch_rows", "_forward", lambda: [*tensors((2, 3, 64, 64)), 9, 8, 1]),
    "swiglu": ("swiglu_linear", "_forward", lambda: tensors((98, 64), (256, 64))),
    "swiglu_backward": ("swiglu_linear", "_backward", lambda: tensors((98, 128), (98, 64), (256, 64))),
    "upsample": ("upsample_concat", "_forward", lambda: tensors((2, 16, 4, 6, 2), (2, 32, 2, 3, 1))),
    "upsample_backward": ("upsample_concat", "_backward", lambda: [*tensors((2, 48, 4, 6)), 32]),
}  # fmt: skip


@pytest.fixture
def some_gpu(monkeypatch):
    """Code for a GPU can be made and its properties be asked for, also where there is none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        return
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


def written(kernel, arguments):
    """Names of the tensors that torch.compile takes for written."""
    if hasattr(triton_kernel_wrap, "identify_mutated_tensors"):  # torch 2.11
        return set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))
    accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
    return {dependency.name for dependency in accesses.read_writes.writes}


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_write_only_their_results(name, some_gpu, monkeypatch):
    folder, function, make = LAUNCHES[name]
    module = importlib.import_module(f"vision_gates.kernels.{folder}.kernel")
    arguments = make()
    given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
    seen = []

    def check(kernel, *positional, **named):
        bound = dict(zip(kernel.arg_names, positional, strict=False)) | named
        bound = {key: value for key, value in bound.items() if key in kernel.arg_names}
        names = written(kernel, bound)
        assert names, "a kernel writes something"
        assert not [key for key in names if bound[key].untyped_storage().data_ptr() in given], kernel.fn.__name__
        seen.append(kernel)

    class Launch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *positional, **named: check(self.kernel, *positional, **named)

    monkeypatch.setattr(module, "traceable", lambda kernel, _: Launch(kernel))
    getattr(module, function)(*arguments)
    assert seen
