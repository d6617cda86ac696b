"""One network in several processes: weights and optimiser in shards (PyTorch's FSDP2), and their checkpoints.

Every parameter is cut along its first axis, each process keeps one part of it, of its gradient and of what the
optimiser knows of it; a block's weights are put together when it computes. Accelerate shards on GPUs alone, so PyTorch
is called itself, and the same code is tested on the CPU.

Checkpoints are written by ``torch.distributed.checkpoint``, every process its own part, as safetensors: its default
format is a pickle, which can run code when it is read. They are read by any number of processes, one included.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = [
    "average_buffers",
    "average_gradients",
    "gathered",
    "is_lost_process",
    "load_weights",
    "optimizer_state",
    "read_shards",
    "set_optimizer_state",
    "shard",
    "write_shards",
]

UNIT = 250_000
"""Parameters that a block must have to be put together by itself; smaller ones join what they are part of."""


def shard(network: nn.Module) -> None:
    """Shard a network in place over all processes; each of them has to call this, with the same weights.

    The units are the repeated blocks: what is in a ``Sequential`` or ``ModuleList``, the innermost first.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(
        next(network.parameters()).device.type, (torch.distributed.get_world_size(),)
    )
    blocks = [
        block
        for container in network.modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for block in container
        if not isinstance(block, (nn.ModuleList, nn.ModuleDict))  # these have no forward pass
    ]
    for block in reversed(blocks):  # inner ones come after what they are in
        if sum(parameter.numel() for parameter in block.parameters() if not isinstance(parameter, DTensor)) >= UNIT:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """Make batch statistics those of all processes; every process has to call this.

    PyTorch's DDP would take the first process's, and only when the next batch begins.
    """
    _average([buffer for buffer in network.buffers() if buffer.is_floating_point()])


@torch.no_grad()
def average_gradients(network: nn.Module) -> None:
    """Make gradients, in place, their mean over all processes; every process has to call this.

    For a network that is not wrapped in DDP; of one that is, DDP does it while the backward pass runs.
    """
    _average([parameter.grad for parameter in network.parameters() if parameter.grad is not None])


def _average(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])


def is_lost_process(error: BaseException) -> bool:
    """Whether PyTorch could not reach another process, most likely because it has ended."""
    if not torch.distributed.is_available() or not isinstance(error, RuntimeError):
        return False
    said = r"Connection (closed|reset) by peer|Broken pipe|connectFullMesh failed|remote process exited"
    return isinstance(error, torch.distributed.DistNetworkError) or re.search(said, str(error)) is not None


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU; every process has to call this, and all get them."""
    return {name: _whole(tensor).cpu() for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole tensors, which every process has, into a network that may be sharded."""
    own = network.state_dict()
    network.load_state_dict({name: _like(own[name], weights[name]) for name in own})


def _like(target: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as the target is: in parts, on its device."""
    if not isinstance(target, DTensor):
        return whole
    # src_data_rank=None: each process cuts its part out of what it has, and nothing is sent.
    whole = whole.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def optimizer_state(network: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state under the parameters' names, whatever their layout.

    Returns:
        ``PARAMETER/KEY`` to tensor, such as ``head.weight/exp_avg``; and what is no tensor: its groups' settings, and
        values a parameter.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{name}/{key}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "values": values}


def set_optimizer_state(
    network: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """The inverse of ``optimizer_state``; tensors of a sharded network may be whole or in parts."""
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update(saved)
    on_device = {
        parameter: bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(network.named_parameters())
    for place, value in (dict(plain["values"]) | dict(tensors)).items():
        name, _, key = place.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            if value.shape == parameter.shape:
                value = _like(parameter, value.to(parameter.device))
            elif key != "step" or on_device[parameter]:  # elsewhere steps are counted on the CPU
                value = value.to(parameter.device)
        optimizer.state[parameter][key] = value


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's parts into a folder; every process has to call this."""
    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``write_shards`` wrote, by however many processes.

    Args:
        folder: of the files.
        like: name to a tensor of the layout that is wanted, where it is known; a name ``PARAMETER/KEY`` is laid out as
            ``PARAMETER`` is, if it has its shape. Others are read whole.
    """
    reader = dcp.HuggingFaceStorageReader(path=str(folder))
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, stored in known.items():
        assert isinstance(stored, TensorStorageMetadata)
        layout = like.get(name, like.get(name.rpartition("/")[0]))
        if layout is not None and layout.shape == stored.size:
            tensors[name] = torch.empty_like(layout.detach(), dtype=stored.properties.dtype)
        else:
            tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none
        dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return tensors
