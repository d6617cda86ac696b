"""A batch's computation as one CUDA graph, for where launching kernels takes longer than running them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["GraphedStep"]

_WARM_UP = 3  # runs before the capture: lazy set-up, cuDNN's choice of algorithms, compilation


class GraphedStep:
    """Forward pass, loss and backward pass, recorded at the first call and replayed from then on.

    A replay overwrites the gradients, which stay the same tensors: they are not to be set to None, and cannot
    accumulate over several batches.

    Args:
        step: (image, target) to a loss, after its backward pass; it may neither wait for the GPU nor depend on values.
        model: whose gradients and buffers it changes.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], model: nn.Module) -> None:
        self.step, self.model = step, model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.image: Tensor
        self.target: Tensor
        self.loss: Tensor

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, its gradients in the model.

        Raises:
            ValueError: tensors of another shape than at the first call.
        """
        if self.graph is None:
            self._capture(image, target)
        if image.shape != self.image.shape or target.shape != self.target.shape:
            raise ValueError(
                f"the graph is of images {tuple(self.image.shape)} and targets {tuple(self.target.shape)}, got "
                f"{tuple(image.shape)} and {tuple(target.shape)}"
            )
        assert self.graph is not None
        self.image.copy_(image)
        self.target.copy_(target)
        self.graph.replay()
        return self.loss.clone()

    def _capture(self, image: Tensor, target: Tensor) -> None:
        self.image, self.target = image.clone(), target.clone()
        before = [buffer.clone() for buffer in self.model.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.model.zero_grad(set_to_none=True)
                self.step(self.image, self.target)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)  # of batch statistics these runs count for nothing
        self.model.zero_grad(set_to_none=True)  # gradients come from the graph's own memory
        graph = torch.cuda.CUDAGraph()
        # Not "global": the thread that pins the loader's next batches calls CUDA at any moment.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.loss = self.step(self.image, self.target)
        self.graph = graph
