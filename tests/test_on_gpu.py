"""Whole models on a GPU, where they run on the Triton kernels: the float64 result of the reference, in every precision.

Small sizes: what is compared here is models, every one of them; the kernels' own tests have the shapes.
"""

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import vision_gates  # noqa: F401
from vision_gates.networks import create_network
from vision_gates.segmenter import create_segmenter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NETWORKS = {
    "agunet": dict(widths=(8, 16, 16)),
    "daunet": dict(widths=(8, 16, 16)),
    "attention_unet": dict(widths=(8, 16, 16)),
    "attention_resunet": dict(widths=(8, 16, 16)),
    "ear_unet": dict(encoder="test_resnet", channels=8, max_channels=16),
}
DECODERS = {
    "attention_unet grid": dict(type="attention_unet", style="grid"),
    "attention_unet additive": dict(type="attention_unet", style="additive"),
    "attention_unet concat": dict(type="attention_unet", style="concat"),
    "residual_attention": dict(type="residual_attention"),
    "fpn": dict(type="fpn"),
    "pyramid": dict(type="pyramid"),
}
# Errors allowed, in errors of the reference in bfloat16 on the CPU: float16 has three bits more.
FACTORS = {torch.bfloat16: 2.0, torch.float16: 0.5}
# In float32 a ReLU may still stand on the other side of zero: one such unit is 2e-3 of these small models' gradients.
FLOAT32_ERRORS = [1e-4, 5e-3]


def _classifier(name: str, **kwargs) -> tuple[nn.Module, Tensor]:
    return timm.create_model(name, num_classes=5, **kwargs), torch.rand(2, 3, 96, 64)


def _network(name: str, spatial_dims: int) -> tuple[nn.Module, Tensor]:
    flat_only = name in ("attention_resunet", "ear_unet")
    dims = {} if flat_only else {"spatial_dims": spatial_dims}
    model = create_network(name, in_channels=2, num_classes=3, **NETWORKS[name], **dims)
    return model, torch.rand(2, 2, *((40, 48) if spatial_dims == 2 else (24, 16, 20)))


def _segmenter(decoder: str) -> tuple[nn.Module, Tensor]:
    model = create_segmenter("vg_hornet_atto", in_chans=1, num_classes=3, decoder=DECODERS[decoder])
    return model, torch.rand(2, 1, 72, 64)


CASES = {name: (_classifier, (name,)) for name in timm.list_models("vg_*_atto")}
CASES |= {name: (_classifier, (name,)) for name in ("vg_hornet_tiny_gf", "vg_hornet_tiny_7x7", "vg_vig_h_tiny")}
CASES |= {
    f"{name} {dims}-D": (_network, (name, dims))
    for name in NETWORKS
    for dims in (2, 3)
    if dims == 2 or name in ("agunet", "daunet", "attention_unet")
}
CASES |= {f"decoder {name}": (_segmenter, (name,)) for name in DECODERS}


def _run(model: nn.Module, x: Tensor, weights: list[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Result and the gradient of all parameters, each as one vector in float64 on the CPU."""
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    pairs = zip(outputs, weights, strict=True)
    loss = sum((output.double() * weight.to(x.device).double()).sum() for output, weight in pairs)
    scale = 2.0**12 if dtype == torch.float16 else 1.0  # as GradScaler: gradients of float16 would vanish
    gradients = torch.autograd.grad(loss * scale, list(model.parameters()), allow_unused=True)
    return tuple(
        torch.cat([t.detach().double().cpu().flatten() for t in tensors if t is not None]) / s
        for tensors, s in ((outputs, 1.0), (gradients, scale))
    )


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_model_gives_the_float64_result(case: str, dtype: torch.dtype | None, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    make, arguments = CASES[case]
    model, x = make(*arguments)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma1", "gamma2")):  # at 1e-6 the blocks would hardly count
            nn.init.constant_(parameter, 0.3)
    # Statistics of two small images have a large error of their own: the layers normalise by those they were given.
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
    reference = copy.deepcopy(model).double()
    with torch.no_grad():
        shapes = reference(x.double())
    shapes = shapes if isinstance(shapes, list) else [shapes]
    weights = [torch.randn(y.shape) / math.sqrt(y.numel()) for y in shapes]
    expected = _run(reference, x.double(), weights, None)
    allowed = FLOAT32_ERRORS
    if dtype is not None:
        on_cpu = _run(model, x, weights, torch.bfloat16)
        allowed = [FACTORS[dtype] * _error(y, e) for y, e in zip(on_cpu, expected, strict=True)]
    got = _run(model.cuda(), x.cuda(), weights, dtype)
    for what, y, e, limit in zip(("result", "gradient"), got, expected, allowed, strict=True):
        error = _error(y, e)
        assert error <= limit, f"{what}: {error:.1e}, allowed {limit:.1e}"
