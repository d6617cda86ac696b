"""Images a second and memory of models, ours and peers interleaved.

Shared machines drift, so each round times every model once; ratios are medians over rounds, and so are absolute times.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from vision_gates.benchmark.contenders import IN_CHANS, check_name, create
from vision_gates.errors import ConfigError
from vision_gates.kernels.timing import machine_facts

__all__ = ["DTYPES", "OUT_OF_MEMORY", "Group", "ModelSettings", "auto_batch", "bench_models", "model_groups"]

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT_OF_MEMORY = "out of memory"
_MODES = ("training", "inference")
_RUNTIMES = ("eager", "compiled", "graph")
_ROUND_SECONDS = 0.05  # a model runs about as long each round, so that what surrounds a pass does not count


@dataclass(frozen=True)
class ModelSettings:
    """What ``bench_models`` measures; raises ConfigError where that makes no sense.

    Attributes:
        size: heights and widths of the images, pixels.
        batch: images a pass; "auto" scales it with the area (see ``auto_batch``).
        mode: "training" (forward and backward, no optimiser; autocast for half types) or "inference" (weights in
            ``dtype``).
        dtype: "float32", "bfloat16" or "float16".
        device: "cuda" or "cpu"; None takes the GPU if there is one.
        runtime: "eager", "compiled" (torch.compile, mode "default") and "graph" (mode "reduce-overhead": CUDA graphs;
            on a GPU only).
        rounds: timed rounds.
        profile: list the kernels of one pass, too.
        dims: axes of the input: 2, images of three channels, or 3, volumes of one.
        channels_last: weights and input in channels-last memory, of all that are compared.
        cudnn_benchmark: cuDNN tries its convolutions and takes the fastest, as in training with
            ``trainer.deterministic=false``; else its heuristic chooses.
        peer_runtime: the peer's, where it cannot run like the others; None: the same.
    """

    size: Sequence[int] = (224,)
    batch: int | str = 8
    mode: str = "training"
    dtype: str = "float32"
    device: str | None = None
    runtime: Sequence[str] = ("eager",)
    rounds: int = 10
    profile: bool = False
    dims: int = 2
    channels_last: bool = False
    cudnn_benchmark: bool = False
    peer_runtime: str | None = None

    def __post_init__(self) -> None:
        for key, words, known in (
            ("mode", (self.mode,), _MODES),
            ("dtype", (self.dtype,), tuple(DTYPES)),
            ("runtime", self.runtime, _RUNTIMES),
            ("peer_runtime", (self.peer_runtime or "eager",), _RUNTIMES),
        ):
            if unknown := [word for word in words or ("",) if word not in known]:
                raise ConfigError(f"{key} must be one of {', '.join(known)}, got {unknown[0]!r}")
        if self.batch != "auto" and not (isinstance(self.batch, int) and self.batch >= 1):
            raise ConfigError(f"batch must be auto or at least 1, got {self.batch!r}")
        if self.dims not in IN_CHANS:
            raise ConfigError(f"dims must be 2 (images) or 3 (volumes), got {self.dims!r}")
        for key, numbers in (("size", self.size), ("rounds", (self.rounds,))):
            if min(numbers, default=0) < 1:
                raise ConfigError(f"{key} must be at least 1, got {min(numbers, default=None)}")
        if "graph" in (*self.runtime, self.peer_runtime) and self.target.type != "cuda":
            raise ConfigError("runtime=graph replays CUDA graphs and needs a GPU; compiled runs here")

    @property
    def target(self) -> torch.device:
        """Where the models run."""
        return target_device(self.device)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and input; preserve_format leaves them as they are made."""
        if not self.channels_last:
            return torch.preserve_format
        return torch.channels_last if self.dims == 2 else torch.channels_last_3d

    def batch_at(self, size: int) -> int:
        """Images a pass at a size in pixels."""
        return self.batch if isinstance(self.batch, int) else auto_batch(size)


@dataclass(frozen=True)
class Group:
    """What was measured interleaved, at one size with one runtime: a row a model, and its kernels if asked for."""

    rows: list[Row]
    kernels: dict[str, list[Row]]


def target_device(name: str | None) -> torch.device:
    """The device of that name, by default the GPU if there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device must be cuda or cpu, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: PyTorch finds no GPU on this machine; cpu runs here")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def auto_batch(size: int) -> int:
    """About as many pixels as 128 images of 224 x 224, in steps of 8 images where it is 4 or more, at least 1."""
    batch = 128 * (224 / size) ** 2
    return max(8, 8 * round(batch / 8)) if batch >= 4 else max(1, round(batch))


def bench_models(names: Sequence[str], **settings: Any) -> list[Row]:
    """All rows of ``model_groups``; ``settings`` are fields of ModelSettings, one size or runtime may stand alone."""
    for key in ("size", "runtime"):
        if isinstance(settings.get(key), (int, str)):
            settings[key] = (settings[key],)
    return [row for group in model_groups(names, ModelSettings(**settings)) for row in group.rows]


def model_groups(
    names: Sequence[str], settings: ModelSettings, *, on_progress: Callable[[str], None] = lambda text: None
) -> Iterator[Group]:
    """Time models on random images, one size and runtime after the other; models are freed in between.

    Args:
        names: as ``contenders.create`` takes them; the last is the peer that the others are compared with.
        settings: what to measure.
        on_progress: called with what is being done, a few words.

    Yields:
        A Group for each size and runtime. Its rows have images/s, ms, the ratio of images/s to the peer's (median over
        rounds with the smallest and largest; above 1 is faster), seconds of the first pass of a compiled model (with
        what torch.compile's disk cache already holds), on a GPU the peak memory of a pass over weights and input, and
        the facts of the machine. A model that fails has the reason under ``problem`` and no numbers.

    Raises:
        ConfigError: a name that is not known.
    """
    for name in names:
        check_name(name, settings.dims)
    facts = machine_facts(settings.target)
    for size in settings.size:
        for runtime in dict.fromkeys(settings.runtime):
            with _cudnn_benchmark(settings.cudnn_benchmark):
                group = _group(names, settings, size, runtime, facts, on_progress)
            yield group


@contextmanager
def _cudnn_benchmark(enabled: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled  # not cudnn.flags(), whose other settings have defaults of their own
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _group(
    names: Sequence[str],
    settings: ModelSettings,
    size: int,
    runtime: str,
    facts: Row,
    on_progress: Callable[[str], None],
) -> Group:
    about, target, batch = f"{size} px, {runtime}", settings.target, settings.batch_at(size)
    shape = (batch, IN_CHANS[settings.dims], *(size,) * settings.dims)
    images = torch.randn(shape, device=target, generator=torch.Generator(target).manual_seed(0))
    runtimes = [runtime] * (len(names) - 1) + [settings.peer_runtime or runtime]
    candidates = [_Candidate(name, settings, each, images) for name, each in zip(names, runtimes, strict=True)]
    _prepare(candidates, about, on_progress)
    for done in range(settings.rounds):
        on_progress(f"{about}: round {done + 1} of {settings.rounds}")
        for candidate in candidates:
            candidate.attempt(candidate.time_round)
    kernels = {}
    if settings.profile:
        on_progress(f"{about}: profiling")
        for candidate in candidates:
            candidate.attempt(candidate.list_kernels)
            kernels[candidate.name] = candidate.kernels
    group = Group([_row(c, candidates[-1], settings, facts) for c in candidates], kernels)
    for candidate in candidates:
        candidate.release()
    torch.compiler.reset()  # what was compiled holds the models, and sizes seen before would make shapes dynamic
    _free(target)
    return group


def _prepare(candidates: Sequence["_Candidate"], about: str, on_progress: Callable[[str], None]) -> None:
    """Warm all up; once more without those that failed, which may have left CUDA graphs of the others unusable."""
    for _ in range(2):
        failed = len([candidate for candidate in candidates if candidate.problem is not None])
        for candidate in candidates:
            on_progress(f"{about}: warming up {candidate.name}")
            candidate.attempt(candidate.prepare)
        if len([candidate for candidate in candidates if candidate.problem is not None]) == failed:
            return
        for candidate in candidates:
            candidate.release()
        torch.compiler.reset()


@dataclass
class _Candidate:
    """One model at one size with one runtime; with a problem it is out, and the others go on."""

    name: str
    settings: ModelSettings
    runtime: str
    images: torch.Tensor
    run: Callable[[], None] | None = None
    parameters: int | None = None
    compile_seconds: float | None = None
    peak_extra_mib: float | None = None
    passes_a_round: int = 1
    seconds: list[float] = field(default_factory=list)  # of a pass, one a round
    kernels: list[Row] = field(default_factory=list)
    problem: str | None = None

    def attempt(self, step: Callable[[], None]) -> None:
        if self.problem is not None:
            return
        try:
            step()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error):  # compilers wrap it
                self.problem = OUT_OF_MEMORY
            else:
                self.problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if self.problem is not None:  # outside of the handler, whose traceback holds the model's tensors
            self.release()

    def release(self) -> None:
        self.run = None
        _free(self.images.device)

    def prepare(self) -> None:
        """Build the model, compile it, measure the memory of a pass, see how many passes make a round."""
        device = self.images.device
        layout = self.settings.memory_format
        model = create(self.name, self.images.shape[-1], self.settings.dims).to(device).to(memory_format=layout)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        images = self.images.to(memory_format=layout)
        if self.settings.mode == "inference":
            model, images = model.eval().to(DTYPES[self.settings.dtype]), images.to(DTYPES[self.settings.dtype])
            self.run = _inference_pass(_with_runtime(model, self.runtime), images)
        else:
            self.run = _training_pass(model.train(), self.runtime, images, DTYPES[self.settings.dtype])
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        first = _seconds_a_pass(self.run, device)
        self.compile_seconds = None if self.runtime == "eager" else first
        if device.type == "cuda":  # two passes: of a CUDA graph the second run allocates, a replay does not
            torch.cuda.reset_peak_memory_stats(device)
            self.run()
            self.run()
            torch.cuda.synchronize(device)
            self.peak_extra_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        self.passes_a_round = min(max(round(_ROUND_SECONDS / _seconds_a_pass(self.run, device)), 1), 100)

    def time_round(self) -> None:
        assert self.run is not None
        self.seconds.append(_seconds_a_pass(self.run, self.images.device, self.passes_a_round))

    def list_kernels(self) -> None:
        """What one pass spends its time on: GPU kernels, or operators on a CPU; the longest first."""
        assert self.run is not None
        on_cuda = self.images.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.run()
            if on_cuda:
                torch.cuda.synchronize(self.images.device)
        events = list(profile.key_averages())
        if on_cuda:  # a GPU's annotations span the kernels that are listed by themselves
            events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        times = [(e.self_device_time_total if on_cuda else e.self_cpu_time_total, e.count, e.key) for e in events]
        total = sum(microseconds for microseconds, _, _ in times)
        self.kernels = [
            {"name": name, "calls": calls, "total_us": microseconds, "percent": 100 * microseconds / total}
            for microseconds, calls, name in sorted(times, reverse=True)
            if microseconds > 0
        ]


def _row(candidate: _Candidate, peer: _Candidate, settings: ModelSettings, facts: Row) -> Row:
    own, others = (c.seconds if len(c.seconds) == settings.rounds else [] for c in (candidate, peer))
    ratios = [peer_seconds / own_seconds for own_seconds, peer_seconds in zip(own, others, strict=False)]
    median = statistics.median(own) if own else None
    batch, size = candidate.images.shape[0], candidate.images.shape[-1]
    return {
        "model": candidate.name,
        "parameters": candidate.parameters,
        "mode": settings.mode,
        "runtime": candidate.runtime,
        "size": size,
        "batch": batch,
        "dtype": settings.dtype,
        "images_per_second": batch / median if median else None,
        "milliseconds": 1000 * median if median else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratio_low": min(ratios, default=None),
        "ratio_high": max(ratios, default=None),
        "peer": peer.name,
        "peak_extra_mib": candidate.peak_extra_mib if own else None,
        "compile_seconds": candidate.compile_seconds if own else None,
        "problem": candidate.problem,
        **facts,
    }


def _with_runtime(model: nn.Module, runtime: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if runtime == "eager":
        return model
    compiled = torch.compile(model, dynamic=False, mode="reduce-overhead" if runtime == "graph" else "default")
    if runtime == "compiled":
        return compiled

    def replay(images: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # nobody needs the last output any more
        return compiled(images)

    return replay


def _inference_pass(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> Callable[[], None]:
    def infer() -> None:
        with torch.inference_mode():
            network(images)

    return infer


def _training_pass(model: nn.Module, runtime: str, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    network, autocast = _with_runtime(model, runtime), dtype != torch.float32

    def train() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=autocast):
            loss = network(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)  # gradients count in the memory of a pass, not in what it starts from

    return train


def _seconds_a_pass(run: Callable[[], None], device: torch.device, passes: int = 1) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(passes):
            run()
        return (time.perf_counter() - start) / passes
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start_event.record()
    for _ in range(passes):
        run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000 / passes


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
