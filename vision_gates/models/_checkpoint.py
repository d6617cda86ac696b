"""What loading a foreign checkpoint takes in every family: unwrapping it, and fitting its position embedding."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels.launching import surely_equal

__all__ = ["fit_pos_embed", "resize_pos_embed", "unwrap"]


def unwrap(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Take the parameters out of a training checkpoint, averaged ones first, and a ``module.`` off their names."""
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def resize_pos_embed(pos_embed_1NC: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a learned position embedding bicubically, in float32; the official rule (no anti-aliasing)."""
    if surely_equal(grid, new_grid):
        return pos_embed_1NC
    maps_1CHW = pos_embed_1NC.float().unflatten(1, grid).permute(0, 3, 1, 2)
    maps_1CHW = F.interpolate(maps_1CHW, size=new_grid, mode="bicubic", align_corners=False)
    return maps_1CHW.flatten(2).transpose(1, 2).to(pos_embed_1NC.dtype)


def fit_pos_embed(pos_embed_1NC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a checkpoint's position embedding to ``grid`` where it has another number of tokens.

    Raises:
        ValueError: such an embedding is not of a square image, so that its height and width are unknown.
    """
    if pos_embed_1NC.shape[1] == grid[0] * grid[1]:
        return pos_embed_1NC
    side = round(pos_embed_1NC.shape[1] ** 0.5)  # official embeddings are square
    if side * side != pos_embed_1NC.shape[1]:
        raise ValueError(
            f"pos_embed of {pos_embed_1NC.shape[1]} tokens is not of a square image: build the model with the img_size "
            f"of the checkpoint (its grid is not {grid[0]}x{grid[1]})"
        )
    return resize_pos_embed(pos_embed_1NC, (side, side), grid)
