"""Training. ``train(config)`` does all of it; ``Trainer.train_epoch`` is the loop.

Exactness: a run that is killed at any moment and resumed ends with the same weights, bit for bit on the CPU, as one
that is not. Everything random is drawn from a seed that is a function of the place in the run (data.py), checkpoints
are taken between optimiser updates, and what the current epoch has summed up so far is part of their state.

Several processes: batch b of process r is batch ``b * processes + r`` of the run, with that number's seed, so that an
update of 2 processes is the update of 1 process that accumulates 2 batches, but for rounding and batch statistics.
"""

import copy
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vision_gates.config import RunConfig, dump_config
from vision_gates.engine.building import build_loss, build_metrics, labeller
from vision_gates.engine.checkpoint import read_checkpoint
from vision_gates.engine.cuda_graph import GraphedStep
from vision_gates.engine.data import derive_seed
from vision_gates.engine.device import build_accelerator, deterministic_algorithms, peak_memory_gib
from vision_gates.engine.evaluation import (
    NUM_OVERLAYS,
    Evaluation,
    evaluate_model,
    write_evaluation,
)
from vision_gates.engine.optim import build_ema, build_mixup, build_optimizer, build_schedule, is_better, mix
from vision_gates.engine.parallel import (
    average_buffers,
    average_gradients,
    gathered,
    load_weights,
    shard,
)
from vision_gates.engine.preparation import Parts, check_run_directory, is_finished, prepare
from vision_gates.engine.progress import Display, Pace, duration, show_result
from vision_gates.engine.report import write_report
from vision_gates.engine.resuming import restore, save_checkpoint
from vision_gates.engine.run_directory import (
    RunDirectory,
    append_line,
    atomic_write_text,
    describe_environment,
    to_json,
    truncate_metrics,
)
from vision_gates.engine.state import Interrupted, State, StopSignal, machine_errors
from vision_gates.engine.updates import Update, not_finite, refuse_nan, stop_for_nan
from vision_gates.engine.volume_scores import CaseScorer, build_scorer
from vision_gates.errors import UserError

__all__ = ["Interrupted", "Trainer", "train"]

_MOST_SKIPPED = 10  # updates in a row, with trainer.nan=skip: more are no accident of a batch
_LOWER = (
    "lower data.batch_size (a run goes on with trainer.resume=true and as many images in an update as before), in a "
    "new run also the size of images or patches, or use trainer.precision=bf16"
)


def train(config: RunConfig, *, command: Sequence[str] = (), console: Console | None = None) -> Path:
    """Train (or resume, or show a finished run), evaluate the best weights, write the report.

    Args:
        config: From ``load_config``.
        command: The command line, for environment.json.
        console: Where progress is shown; None: standard output.

    Returns:
        The run directory.

    Raises:
        UserError: A mistake in the configuration or data (then nothing has been written), a loss that is NaN, data
            that can no longer be read, a worker that died, too little memory or a full disk.
        Interrupted: Stopped by a signal, after a checkpoint.
    """
    accelerator = build_accelerator(config)
    display = Display(main=accelerator.is_main_process, console=console, log_every=config.trainer.log_every)
    run = RunDirectory(config.trainer.run_dir or "runs/run")
    with display, deterministic_algorithms(config.trainer.deterministic), machine_errors(run.path, lower=_LOWER):
        resuming = check_run_directory(run, config)
        split = is_finished(run) if resuming else None
        if split is not None:
            display.say(f"{run.path} is finished")
            show_result(display, run, split)
            return run.path
        parts = prepare(config, accelerator, display)
        with StopSignal() as stop:
            trainer = Trainer(config, parts, run, accelerator=accelerator, display=display, stop=stop)
            trainer.open(resuming=resuming, command=command)
            try:
                trainer.fit()
                trainer.finish()
            finally:
                trainer.close()
    return run.path


class Trainer:
    """One process's part of a run; ``prepare`` makes its parts."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        run: RunDirectory,
        *,
        accelerator: Accelerator,
        display: Display,
        stop: StopSignal,
    ) -> None:
        self.config, self.parts, self.run = config, parts, run
        self.accelerator, self.display, self.stop = accelerator, display, stop
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.world = accelerator.num_processes
        self.state = State()

        self.network = parts.model.to(self.device)  # the bare network, for state_dict and evaluation
        if config.trainer.channels_last:
            for parameter in self.network.parameters():
                parameter.data = _channels_last(parameter.data)
        self.sharded = config.trainer.parallel == "fsdp" and self.world > 1
        # DDP reduces in hooks that a replayed graph does not run: its gradients are averaged after it.
        self.averaged = config.trainer.cuda_graph and self.world > 1
        # Processes evaluate different numbers of images, and a sharded network needs all of them in every pass.
        self.whole = copy.deepcopy(self.network).cpu() if self.sharded else None
        self.ema = build_ema(config, self.network)  # a deep copy: before compile, DDP and FSDP change anything
        if self.sharded:
            shard(self.network)
            if self.ema is not None:
                shard(self.ema.module)
        self.batches = len(parts.train.batches)  # a process and epoch
        optimizer = build_optimizer(config, self.network)
        self.loss = build_loss(config, parts.info).to(self.device)
        if config.trainer.compile:
            self.network.compile()  # in place, so that names in the state dict stay
            self.loss.compile()
        self.model: nn.Module = self.network
        self.bare = self.sharded or self.averaged  # else Accelerate's model has autocast, and DDP, in it
        if self.bare:
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.set_accumulation(config.optim.accumulate)
        self.graphed = GraphedStep(self._loss_and_gradient, self.model) if config.trainer.cuda_graph else None
        self.mixup = build_mixup(config, len(parts.info.class_names))
        self.writer: Any = None
        self.last_save = self.began = time.perf_counter()
        self.first_update, self.elapsed_before = 0, 0.0
        self.pace = Pace()
        self.over = False  # the time that schedule.minutes gives
        self.unread: Update | None = None  # the last update, its loss still on the way from the GPU
        self.buffers_before: list[Tensor] = []  # of the network, where its update is not yet done
        for loader in (parts.train, parts.val):
            loader.rescue = self._rescue
        # What processes tell each other in every update goes past the GPU, which would have to be waited for.
        self.group: Any = torch.distributed.new_group(backend="gloo") if self.world > 1 else None

    # ------------------------------------------------------------ start and end

    def open(self, *, resuming: bool, command: Sequence[str]) -> None:
        """Create the run directory, or go back to where its last checkpoint was."""
        checkpoint = read_checkpoint(self.run.checkpoints, "last") if resuming else None
        if checkpoint is not None:
            restore(self, checkpoint)
        if self.main:
            self.run.path.mkdir(parents=True, exist_ok=True)
            if checkpoint is None:
                atomic_write_text(self.run.config, dump_config(self.config))
                atomic_write_text(self.run.info, to_json(self.parts.info.to_dict(), indent=1) + "\n")
            truncate_metrics(self.run.metrics, self.state.epoch)
            environment = describe_environment(device=self.device, processes=self.world, command=command)
            atomic_write_text(self.run.environment, to_json(environment, indent=1) + "\n")
            self.display.open_log(self.run.log)
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run.tensorboard), purge_step=self.state.update + 1)
        if checkpoint is not None:
            where = f"epoch {self.state.epoch + 1}, update {self.state.update}"
            self.display.say(
                f"resuming {self.run.path} at {where}" + (f" ({checkpoint.note})" if checkpoint.note else "")
            )
            threads = checkpoint.state["threads"]
            if self.device.type == "cpu" and threads != torch.get_num_threads():
                self.display.say(
                    f"note: {threads} threads before, {torch.get_num_threads()} now: sums are rounded differently; set "
                    f"OMP_NUM_THREADS={threads} for exactly the same result"
                )
        self.accelerator.wait_for_everyone()

    def images_per_step(self) -> int:
        """Of the batches that all processes compute at the same time."""
        return self.parts.train.batches.batch_size * self.world

    def set_accumulation(self, batches: int) -> None:
        """How many batches a process adds up for an update; the schedule follows from it."""
        self.accumulate = batches
        self.updates_per_epoch = math.ceil(self.batches / batches)
        self.total_updates = self.updates_per_epoch * self.config.schedule.epochs
        self.schedule = build_schedule(self.config, self.optimizer, updates_per_epoch=self.updates_per_epoch)

    def close(self) -> None:
        """Release files and processes."""
        self.parts.train.close()
        if self.writer is not None:
            with suppress(OSError):  # a full disk, of which the run has said more
                self.writer.close()

    # ------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train until the last epoch or until early stopping.

        Raises:
            Interrupted: A signal came; the state is saved.
            UserError: The loss is NaN or infinite.
        """
        self.display.start(total=self.total_updates, done=self.state.update)
        self.began, self.first_update = time.perf_counter(), self.state.update
        try:
            while not self.state.finished:
                self.train_epoch()
                epoch = self.state.epoch + 1
                last = self.over or epoch == self.config.schedule.epochs
                due = last or epoch % self.config.trainer.eval_every == 0
                self.end_epoch(self.evaluate("val") if due else None)
        except Interrupted:
            self.save("last")
            raise
        finally:
            self.display.stop()

    def train_epoch(self) -> None:
        """The current epoch, from the batch where it stands to its last."""
        state, skip = self.state, self.config.trainer.nan == "skip"
        self.model.train()
        self.parts.train.start(epoch=state.epoch, first=state.batch)
        batches = iter(self.parts.train)
        ended = time.perf_counter()
        while state.batch < self.batches:
            count = min(self.accumulate, self.batches - state.batch)  # batches of this update
            losses: list[Tensor] = []
            names: list[str] = []
            sizes, waited = [], 0.0
            if skip or count > 1:
                self.buffers_before = [buffer.clone() for buffer in self.network.buffers()]
            for i in range(count):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                losses.append(self.forward_backward(batch, number=state.batch + i, count=count, last=i == count - 1))
                sizes.append(len(batch["name"]))
                names.extend(batch["name"])
            lr, number = self.learning_rate(), state.update + 1
            update = Update(torch.stack(losses), sizes, names, number=number, lr=lr, waited=waited)
            state.batch += count
            skipped = skip and not self._is_finite(update)
            if skipped:
                self.skip_update(update)
            else:
                self.step_optimizer()
                state.skipped_in_row = 0
            self.buffers_before = []
            self.read_loss()  # of the update before: the GPU is never without work
            began, ended = ended, time.perf_counter()
            update.seconds = ended - began
            state.seconds += update.seconds
            self.unread = None if skipped else update
            stop, save, self.over = self.any_process(self.stop.requested, self._checkpoint_due(), self._time_is_up())
            if stop:
                self.read_loss()
                raise Interrupted(self._stopped())
            if self.over:
                break
            if save and state.batch < self.batches:
                self.read_loss()
                self.save("last")
        self.read_loss()

    def read_loss(self) -> None:
        """Wait for the loss of the last update; it enters the epoch's sum and the display.

        It is called before anything is saved, so that no checkpoint holds what followed a NaN.

        Raises:
            UserError: The loss is NaN or infinite.
        """
        update, self.unread = self.unread, None
        if update is None:
            return
        if self.config.trainer.nan == "stop" and not self._is_finite(update):
            stop_for_nan(self, update)
        values = update.read()
        self.state.loss_sum += math.fsum(v * n for v, n in zip(values, update.sizes, strict=True))
        self.state.images += sum(update.sizes)
        self._show_update(values, update)

    def forward_backward(self, batch: dict[str, Any], *, number: int, count: int, last: bool) -> Tensor:
        """Add one batch's share of the gradient; returns its loss, detached."""
        place = self.config.seed, self.state.epoch, number * self.world + self.accelerator.process_index
        torch.manual_seed(derive_seed(place[0], "step", *place[1:]))  # dropout, stochastic depth
        image = batch["image"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        if self.parts.augment is not None:
            image, target = self.parts.augment(image, target, seed=derive_seed(place[0], "batch", *place[1:]))
        if self.config.trainer.channels_last:
            image = _channels_last(image)
        if self.mixup is not None:
            image, target = mix(self.mixup, image, target, seed=derive_seed(place[0], "mixup", *place[1:]))
        if self.graphed is not None:
            loss = self.graphed(image, target)
            if self.averaged:
                average_gradients(self.network)
            return loss
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            return self._loss_and_gradient(image, target, count)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            return self._loss_and_gradient(image, target, count)

    def _loss_and_gradient(self, image: Tensor, target: Tensor, count: int = 1) -> Tensor:
        with self.accelerator.autocast() if self.bare else nullcontext():
            logits = self.model(image)
        loss = self.loss(_float(logits) if self.bare else logits, target)
        self.accelerator.backward(loss / count)
        return loss.detach()

    def step_optimizer(self) -> None:
        """One update of weights, learning rate and moving average."""
        if self.config.optim.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        if self.graphed is None:
            self.optimizer.zero_grad(set_to_none=True)
        if self.world > 1:
            average_buffers(self.network)
        self.state.update += 1
        self.schedule.step_update(self.schedule_place())
        if self.ema is not None:
            self.ema.update(self.network, step=self.state.update)

    def skip_update(self, update: Update) -> None:
        """Leave out an update whose loss is not finite: weights, moments and averages stay, the schedule goes on.

        Raises:
            UserError: It is one too many in a row.
        """
        self._undo_forward()
        if self.graphed is None:
            self.optimizer.zero_grad(set_to_none=True)
        state = self.state
        state.update += 1
        state.skipped += 1
        state.skipped_in_row += 1
        self.schedule.step_update(self.schedule_place())
        if state.skipped_in_row > _MOST_SKIPPED:
            stop_for_nan(self, update)
        batches = not_finite(self, update)
        losses = ", ".join(dict.fromkeys(batch["loss"] for batch in batches))
        names = ", ".join(name for batch in batches for name in batch["files"])
        self.display.note(f"epoch {state.epoch + 1}, update {update.number}: loss {losses}, skipped; batch: {names}")

    def learning_rate(self) -> float:
        """Learning rate of the next update, without the factors of layer decay."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / float(group.get("lr_scale", 1.0))

    def evaluate(self, split: str, *, overlays: int = 0, scorer: CaseScorer | None = None) -> Evaluation:
        """Metrics of the weights that would be deployed, over "val" or "test"."""
        loader = self.parts.test if split == "test" else self.parts.val
        assert loader is not None
        if self.world == 1:
            loader.check = self._check_stop
        info = self.parts.info
        network = self.deployed()
        if self.whole is not None:
            self.whole.load_state_dict(gathered(network.state_dict()))
            network = self.whole.to(self.device)
        return evaluate_model(
            labeller(self.config, info, network, device=self.device),
            loader,
            build_metrics(self.config, info),
            device=self.device,
            autocast=self.accelerator.autocast,
            loss=self.loss if info.volumes is None else None,  # of a whole volume there are labels, no logits
            collect=overlays,
            mean=info.mean,
            std=info.std,
            scorer=scorer,
        )

    def end_epoch(self, evaluation: Evaluation | None) -> None:
        """Choose the best checkpoint, write the epoch's row, save."""
        state, trainer = self.state, self.config.trainer
        loss_sum, images = self.sum_over_processes(state.loss_sum, float(state.images))
        improved = False
        validation = None
        if evaluation is not None:
            assert trainer.monitor is not None, "load_config fills it in"
            validation = {"loss": evaluation.loss, **evaluation.result.metrics}
            score = validation[trainer.monitor]
            value = math.nan if score is None else float(score)
            improved = is_better(value, state.best, monitor=trainer.monitor)
            state.stale = 0 if improved else state.stale + 1
            if improved:
                state.best, state.best_epoch = value, state.epoch + 1
        row = {
            "epoch": state.epoch + 1,
            "step": state.update,
            "lr": self.learning_rate(),
            "train": {"loss": loss_sum / images if images else math.nan}
            | ({"skipped": state.skipped} if trainer.nan == "skip" else {}),
            "val": validation,
            "seconds": round(state.seconds + (evaluation.seconds if evaluation is not None else 0.0), 3),
            "images_per_second": round(images / max(state.seconds, 1e-9), 1),
        }
        self._show_epoch(row, improved)
        state.epoch += 1
        state.batch, state.loss_sum, state.images, state.seconds, state.skipped = 0, 0.0, 0, 0.0, 0
        early = trainer.patience is not None and state.stale >= trainer.patience
        state.finished = early or self.over or state.epoch >= self.config.schedule.epochs
        if early:
            self.display.say(f"early stop: no better {trainer.monitor} in {state.stale} evaluations")
        # The order lets a kill between any two of these be repeated from the last checkpoint.
        if improved:
            self.save("best")
        if self.main:
            append_line(self.run.metrics, to_json(row))
        self.save("last")
        if self.main:
            write_report(self.run.path)

    def finish(self) -> None:
        """Evaluate the best weights on the test images (without those: validation), write and show the result."""
        best = read_checkpoint(self.run.checkpoints, "best")
        if best is None:
            raise UserError(f"{self.run.checkpoints}: the best checkpoint is missing; it cannot be evaluated")
        load_weights(self.deployed(), best.weights)
        split = "val" if self.parts.test is None else "test"
        loader = self.parts.val if self.parts.test is None else self.parts.test
        scorer = build_scorer(self.config, self.parts.info, loader)
        evaluation = self.evaluate(split, overlays=NUM_OVERLAYS, scorer=scorer)
        if self.main:
            write_evaluation(self.run.path, split, evaluation, checkpoint="best")
            write_report(self.run.path)
            self.display.say(f"best epoch {self.state.best_epoch}, evaluated on {split}")
            show_result(self.display, self.run, split)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------ checkpoints

    def save(self, name: str) -> None:
        """Write a checkpoint; every process has to call this.

        Raises:
            UserError: The weights hold NaN; the checkpoint before stays. The disk is full; likewise.
        """
        refuse_nan(self)
        self.last_save = time.perf_counter()
        save_checkpoint(self, name)

    def deployed(self) -> nn.Module:
        """The network whose weights are evaluated: the moving average, if there is one."""
        return self.network if self.ema is None else self.ema.module

    def _checkpoint_due(self) -> bool:
        trainer = self.config.trainer
        by_steps = trainer.checkpoint_steps is not None and self.state.update % trainer.checkpoint_steps == 0
        minutes = (time.perf_counter() - self.last_save) / 60
        return by_steps or (trainer.checkpoint_minutes is not None and minutes >= trainer.checkpoint_minutes)

    # ------------------------------------------------------------ helpers

    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.began

    def _time_is_up(self) -> bool:
        minutes = self.config.schedule.minutes
        return minutes is not None and self.elapsed() >= 60 * minutes

    def schedule_place(self) -> int:
        """Where the learning rate's schedule is, of ``total_updates``: by updates, or by the clock."""
        minutes = self.config.schedule.minutes
        if minutes is None:
            return self.state.epoch * self.updates_per_epoch + math.ceil(self.state.batch / self.accumulate)
        elapsed = torch.tensor(self.elapsed(), dtype=torch.float64)
        if self.world > 1:  # all go by the first one's clock, or their weights would part
            torch.distributed.broadcast(elapsed, src=0, group=self.group)
        return min(int(float(elapsed) / (60 * minutes) * self.total_updates), self.total_updates)

    def any_process(self, *flags: bool) -> list[bool]:
        """Whether any process raised each flag."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(raised, group=self.group)
        return (raised > 0).tolist()

    def sum_over_processes(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.device), "sum").tolist()

    def _check_stop(self) -> None:
        if self.stop.requested:
            raise Interrupted(self._stopped())

    def _stopped(self) -> str:
        return (
            f"stopped in epoch {self.state.epoch + 1} after update {self.state.update}; checkpoint saved in "
            f"{self.run.path}; go on with trainer.resume=true"
        )

    def _undo_forward(self) -> None:
        """Put batch statistics back to what they were before the update that is not done."""
        if self.buffers_before:
            with torch.no_grad():
                for buffer, value in zip(self.network.buffers(), self.buffers_before, strict=True):
                    buffer.copy_(value)

    def _rescue(self) -> None:
        """Save what is done before data that cannot be read, or a dead worker, end the run."""
        if self.world > 1:  # the other processes know of nothing, so that what is done cannot be saved
            if self.stop.requested:  # the signal ended the worker, too, and will end the other processes
                raise KeyboardInterrupt
            return
        self._undo_forward()
        self.read_loss()
        if self.stop.requested:  # the signal went to the workers, too, as of a batch system
            raise Interrupted(self._stopped())
        self.save("last")

    def _is_finite(self, update: Update) -> bool:
        """Whether the losses of an update are numbers, on every process."""
        return not self.any_process(not all(map(math.isfinite, update.read())))[0]

    def _show_update(self, values: list[float], update: "Update") -> None:
        state, loss = self.state, sum(values) / len(values)
        self.pace.add(images=sum(update.sizes) * self.world, seconds=update.seconds, waited=update.waited)
        rate, due = self.pace.rate(), update.number % self.config.trainer.log_every == 0
        best = "" if state.best is None else f" | best {self.config.trainer.monitor} {state.best:.4f}"
        each = (time.perf_counter() - self.began) / max(update.number - self.first_update, 1)
        remaining = each * (self.total_updates - update.number)
        if self.config.schedule.minutes is not None:
            remaining = min(remaining, max(60 * self.config.schedule.minutes - self.elapsed(), 0))
        left = duration(remaining)
        self.display.step(
            update=update.number,
            epoch=f"epoch {state.epoch + 1}/{self.config.schedule.epochs}",
            text=f"loss {loss:.4f} | lr {update.lr:.2e}{best} | {rate:.0f} images/s | "
            f"data wait {self.pace.waiting():.0%} | "
            f"{peak_memory_gib(self.device):.1f} GiB | {left} left",
        )
        if self.writer is not None and due:
            for tag, value in (("loss", loss), ("lr", update.lr), ("images_per_second", rate)):
                self.writer.add_scalar(f"train/{tag}", value, update.number)
        if due:
            self.pace = Pace()

    def _show_epoch(self, row: dict[str, Any], improved: bool) -> None:
        scores = {k: v for k, v in (row["val"] or {}).items() if v is not None}
        text = f"epoch {row['epoch']}/{self.config.schedule.epochs} | train loss {row['train']['loss']:.4f}"
        if scores:
            text += " | val " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        self.display.say(f"{text} | {row['seconds']:.1f} s{' | best so far' if improved else ''}")
        if self.writer is not None:
            self.writer.add_scalar("train/epoch_loss", row["train"]["loss"], row["step"])
            for key, value in scores.items():
                self.writer.add_scalar(f"val/{key}", value, row["step"])
            self.writer.flush()


def _float(logits: Any) -> Any:
    """In float32, as the loss wants them; a network with deep supervision gives several."""
    return logits.float() if isinstance(logits, Tensor) else [each.float() for each in logits]


def _channels_last(tensor: Tensor) -> Tensor:
    """Images, volumes and the weights of their convolutions with channels next to each other in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor
