"""Gradual modality dropout: channels of an image (MRI sequences) are left out in training, ever more often.

A network that has learnt with missing sequences copes with patients who lack one. The probability grows with the
epochs, so that complete images come first (UpAttLLSTM, arXiv 2604.00817, of which this is the schedule only).
"""

import torch
from torch import Tensor

__all__ = ["modality_dropout", "ramped"]


def modality_dropout(image: Tensor, *, probability: float, seed: int) -> Tensor:
    """Set each channel to 0, its mean after normalisation, with a probability; one channel at least stays.

    Where all would go, one that is drawn evenly stays: of C channels each is dropped with probability p - p^C / C.

    Args:
        image: (C, *spatial), one channel a sequence. One channel alone always stays.
        probability: From 0 to 1.
        seed: The result is a function of it.

    Returns:
        A new tensor like ``image``.

    Raises:
        ValueError: A probability out of range, or an image without channels.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: a number from 0 to 1 is needed, got {probability}")
    channels = image.shape[0] if image.ndim else 0
    if not channels:
        raise ValueError(f"image (C, *spatial) of one channel or more is needed, got {tuple(image.shape)}")
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand(channels, generator=generator) < probability
    survivor = int(torch.randint(channels, (), generator=generator))
    if dropped.all():
        dropped[survivor] = False
    return image.masked_fill(dropped.to(image.device).view(-1, *(1,) * (image.ndim - 1)), 0)


def ramped(probability: float, epoch: int, ramp_epochs: int) -> float:
    """The probability of an epoch: linear from 0 in epoch 0 to ``probability`` in epoch ``ramp_epochs`` and after.

    Args:
        probability: Its final value.
        epoch: Counts from 0.
        ramp_epochs: 0: the final value from the beginning.
    """
    return probability if epoch >= ramp_epochs else probability * epoch / ramp_epochs
