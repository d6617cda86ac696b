"""The same seed gives the same weights, bit for bit, after steps of training: every family and network."""

import pytest
import timm
import torch
from torch import Tensor, nn

import vision_gates  # noqa: F401
from vision_gates.losses import ClassificationLoss, DeepSupervisionLoss, SegmentationLoss
from vision_gates.networks import available_networks, create_network

CLASSIFIERS = [*timm.list_models("vg_*_atto"), "vg_hornet_tiny_gf"]
OPTIONS = {
    "ear_unet": dict(encoder="test_resnet", channels=8, max_channels=16),
    "hornet_unet": dict(widths=(8, 16, 16), orders=(2, 2, 2)),
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    ),
]


@pytest.fixture
def deterministic(monkeypatch):
    """As ``trainer.deterministic=true`` sets it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def build(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Model, loss, images and targets."""
    if name in CLASSIFIERS:
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.2)
        return model, ClassificationLoss(), torch.rand(2, 3, 64, 64), torch.tensor([0, 2])
    options = OPTIONS.get(name, dict(widths=(8, 16, 16)))
    model = create_network(name, in_channels=1, num_classes=3, **options)
    loss = DeepSupervisionLoss(SegmentationLoss(num_classes=3))
    return model, loss, torch.rand(2, 1, 32, 48), torch.randint(0, 3, (2, 32, 48))


def trained(name: str, device: str, *, seed: int) -> Tensor:
    """All weights and statistics after two steps."""
    torch.manual_seed(seed)
    model, loss, image, target = build(name)
    model, image, target = model.to(device).train(), image.to(device), target.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(image), target).backward()
        optimizer.step()
    return torch.cat([value.detach().double().cpu().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*CLASSIFIERS, *available_networks()])
def test_steps_are_repeatable(name, device, deterministic):
    first, again = trained(name, device, seed=0), trained(name, device, seed=0)
    assert torch.equal(first, again)
    assert not torch.equal(first, trained(name, device, seed=1))
