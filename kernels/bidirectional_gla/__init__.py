"""Bidirectional gated linear attention, the token mixer of ViG (arXiv 2405.18425): the operator's public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.bidirectional_gla.cpu_op import bidirectional_gla_cpu
from vision_gates.kernels.bidirectional_gla.graph import bidirectional_gla_graph
from vision_gates.kernels.bidirectional_gla.reference import bidirectional_gla_reference
from vision_gates.kernels.launching import graph_node, is_exporting

__all__ = ["bidirectional_gla"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mix N tokens in both directions in linear time, each key channel forgetting at its own data-dependent rate.

    Per batch element and head, with a state of size K x V in each direction::

        S_t = Diag(exp(g_forward_t))  S_{t-1} + k_t v_t^T,   S before the first token = 0
        R_t = Diag(exp(g_backward_t)) R_{t+1} + k_t v_t^T,   R after the last token = 0
        o_t = scale * (S_t^T q_t + R_t^T q_t) / 2

    A token is its own source in both sums. Source: ViG, arXiv 2405.18425, section 3.2. Products are accumulated in
    float32, in float64 for float64 arguments. Any strides; N from 1; any H, K and V from 1.

    Args:
        q, k: queries and keys, (B, N, H, K).
        v: values, (B, N, H, V).
        g_forward, g_backward: logarithms of the decays, (B, N, H, K), in [-inf, 0] (not checked: a positive one makes
            the state grow). In q's dtype or float32.
        scale: factor of the result; K ** -0.5 by default.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA, not float64).
            By default CUDA tensors take the Triton kernel, float64 and all others the reference; torch.export and ONNX
            a form of the reference with few operators, `graph.py`.

    Returns:
        (B, N, H, V) in v's dtype, differentiable in all five tensors (once).

    Raises:
        TypeError: a tensor argument is no tensor, or a dtype is not supported or differs from q's.
        ValueError: shapes or devices do not fit together, or the backend is unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_arguments(q=q, k=k, v=v, g_forward=g_forward, g_backward=g_backward)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend is None:
        if is_exporting():  # an exported graph holds plain operators, for whatever runs it
            return graph_node(bidirectional_gla_graph, q, k, v, g_forward, g_backward, like=v, scale=scale)
        on_kernel = q.is_cuda and _HAS_TRITON and q.dtype != torch.float64
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        if q.device.type == "cpu" and torch.compiler.is_dynamo_compiling():
            return bidirectional_gla_cpu(q, k, v, g_forward, g_backward, scale)
        return bidirectional_gla_reference(q, k, v, g_forward, g_backward, scale=scale)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs the package triton: install it, or use 'reference'")
    if not (q.is_cuda or _INTERPRETED) or q.dtype == torch.float64:
        raise RuntimeError(
            f"the backend 'triton' takes CUDA tensors of float32 or half precision, got {q.dtype} on {q.device}: use "
            "'reference' (or start Python with TRITON_INTERPRET=1 to run the kernel on the CPU, slowly)"
        )
    from vision_gates.kernels.bidirectional_gla.kernel import bidirectional_gla_triton

    return bidirectional_gla_triton(q, k, v, g_forward, g_backward, scale=scale)


def _check_arguments(**tensors: Tensor) -> None:
    q, v = tensors["q"], tensors["v"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            size = "V" if name == "v" else "K"
            raise ValueError(f"{name} must have shape (B, N, H, {size}), got {tuple(tensor.shape)}")
    if 0 in q.shape[1:] or v.shape[-1] == 0:
        raise ValueError(
            f"tokens, heads and head sizes must be at least 1, got q {tuple(q.shape)} and v {tuple(v.shape)}"
        )
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}")
    for name, tensor in tensors.items():
        if name == "v":
            if tensor.shape[:-1] != q.shape[:-1]:
                expected = f"({', '.join(map(str, q.shape[:-1]))}, V)"
                raise ValueError(f"v must have shape {expected} to fit q, got {tuple(tensor.shape)}")
        elif tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype and not (name.startswith("g_") and tensor.dtype == torch.float32):
            expected = f"{q.dtype} like q" + (" or torch.float32" if name.startswith("g_") else "")
            raise TypeError(f"{name} must be {expected}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
