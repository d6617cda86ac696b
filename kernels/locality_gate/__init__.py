"""The locality gate of ViG (arXiv 2405.18425), a mix of a global and a local view: the operator's public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.launching import is_exporting
from vision_gates.kernels.locality_gate.reference import locality_gate_reference

__all__ = ["locality_gate"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once
_MAX_CHANNELS = 1024  # of the kernel, which holds whole rows


def locality_gate(
    o: Tensor,
    l: Tensor,  # noqa: E741 (the paper's name)
    g_logits: Tensor,
    w_o: Tensor,
    w_l: Tensor,
    *,
    gate_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mix a global and a local view of every token, each normalised over the channels of its head.

    Per channel::

        y = RMS(o; w_o) * s + RMS(l; w_l) * (1 - s),   s = sigmoid(g_logits + gate_bias)
        RMS(x; w) = x * rsqrt(mean of x^2 over the V channels + eps) * w

    and then, with ``activation``, y * sigmoid(y). Source: ViG, arXiv 2405.18425, section 3.3. Any strides: the Triton
    kernel reads slices of a wider projection as they lie, and copies only what is not dense along the channels.

    Args:
        o: the global view, (B, N, H, V); any number of leading axes will do.
        l, g_logits: the local view and the gate's logits, in o's shape and dtype.
        w_o, w_l: weights of the two normalisations, (V,), shared by the heads; float32 beside a half-precision o is
            what autocast makes. Their gradients are summed in float32 by the kernel.
        gate_bias: added to the logits, (H, V), o's last two axes; float32 as the weights may be. Handed over here it
            costs almost nothing, while a matrix product with a bias takes longer than one without.
        eps: added to the mean square before the root.
        activation: apply SiLU to the result (ViG-T).
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA, up to 1,024
            channels, not float64). By default CUDA tensors take the Triton kernel where it can, all others the
            reference.

    Returns:
        (B, N, H, V) in o's dtype, contiguous, differentiable in all tensors (by the kernel: once).

    Raises:
        TypeError: a tensor argument is no tensor, or a dtype is not supported or differs from o's.
        ValueError: shapes or devices do not fit together, or the backend is unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    tensors = {"o": o, "l": l, "g_logits": g_logits, "w_o": w_o, "w_l": w_l}
    _check_arguments(tensors if gate_bias is None else tensors | {"gate_bias": gate_bias})
    kernel_fits = o.dtype != torch.float64 and o.shape[-1] <= _MAX_CHANNELS
    if backend is None:
        # An exported graph holds plain operators, for whatever runs it.
        backend = "triton" if o.is_cuda and _HAS_TRITON and kernel_fits and not is_exporting() else "reference"
    if backend == "reference":
        return locality_gate_reference(o, l, g_logits, w_o, w_l, gate_bias, eps=eps, activation=activation)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    if not kernel_fits:
        raise ValueError(
            f"the Triton kernel takes half and float32 tensors of up to {_MAX_CHANNELS} channels, "
            f"got {o.dtype} and {o.shape[-1]}: use the backend 'reference'"
        )
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs Triton, which is not installed: use 'reference'")
    if not (o.is_cuda or _INTERPRETED):
        raise RuntimeError(
            f"the backend 'triton' needs CUDA tensors, got {o.device}; "
            "for other devices start Python with TRITON_INTERPRET=1"
        )
    from vision_gates.kernels.locality_gate.kernel import locality_gate_triton

    return locality_gate_triton(o, l, g_logits, w_o, w_l, gate_bias, eps=eps, activation=activation)


def _check_arguments(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    o = tensors["o"]
    shape, dtype, device = o.shape, o.dtype, o.device
    if o.ndim == 0 or shape[-1] == 0:
        raise ValueError(f"o must have shape (B, N, H, V) with at least one channel, got {tuple(shape)}")
    for name, tensor in tensors.items():
        is_weight, is_bias = name.startswith("w_"), name == "gate_bias"
        if is_weight and tensor.shape != shape[-1:]:
            raise ValueError(f"{name} must have shape ({shape[-1]},), o's channels, got {tuple(tensor.shape)}")
        if is_bias and (o.ndim < 2 or tensor.shape != shape[-2:] or tensor.numel() == 0):
            raise ValueError(
                f"{name} must have shape (H, V), o's last two axes with at least one head, "
                f"got {tuple(tensor.shape)} for o of {tuple(shape)}"
            )
        if not (is_weight or is_bias) and tensor.shape != shape:
            raise ValueError(f"{name} must have o's shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if not (is_weight or is_bias) and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like o, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on o's device {device}, got {tensor.device}")
