"""Training. ``train(config)`` does all of it; ``Trainer.train_epoch`` is the loop.

Exactness: a run that is killed at any moment and resumed ends with the same weights, bit for bit on the CPU, as one
that is not. Everything random is drawn from a seed that is a function of the place in the run (data.py), checkpoints
are taken between optimiser updates, and what the current epoch has summed up so far is part of their state.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from vision_gates.config import RunConfig, save_config
from vision_gates.engine.building import build_loss, build_metrics, labeller
from vision_gates.engine.checkpoint import read_checkpoint, write_checkpoint
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
from vision_gates.engine.preparation import Parts, check_run_directory, is_finished, prepare
from vision_gates.engine.progress import Display, duration, show_result
from vision_gates.engine.report import write_report
from vision_gates.engine.run_directory import (
    RunDirectory,
    append_line,
    atomic_write_text,
    describe_environment,
    to_json,
    truncate_metrics,
)
from vision_gates.engine.state import Interrupted, State, StopSignal
from vision_gates.engine.volume_scores import CaseScorer, build_scorer
from vision_gates.errors import ConfigError, UserError

__all__ = ["Interrupted", "Trainer", "train"]


def train(config: RunConfig, *, command: Sequence[str] = (), console: Console | None = None) -> Path:
    """Train (or resume, or show a finished run), evaluate the best weights, write the report.

    Args:
        config: From ``load_config``.
        command: The command line, for environment.json.
        console: Where progress is shown; None: standard output.

    Returns:
        The run directory.

    Raises:
        UserError: A mistake in the configuration or data (then nothing has been written), or a loss that is NaN.
        Interrupted: Stopped by a signal, after a checkpoint.
    """
    accelerator = build_accelerator(config)
    display = Display(main=accelerator.is_main_process, console=console, log_every=config.trainer.log_every)
    with display, deterministic_algorithms(config.trainer.deterministic):
        run = RunDirectory(config.trainer.run_dir or "runs/run")
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


class _Update:
    """What is shown of an update once its loss is there.

    Args:
        losses: of its batches, on the device.
        sizes: images of each.
        names: of all images.
        number: of the update.
        lr: learning rate.
        waited: seconds for the data.
    """

    def __init__(
        self, losses: Tensor, sizes: list[int], names: list[str], *, number: int, lr: float, waited: float
    ) -> None:
        self.sizes, self.names, self.number, self.lr, self.waited = sizes, names, number, lr, waited
        self.seconds = 0.0  # from the end of the update before
        # The copy starts now; the event tells when it is done, whatever the GPU has been given to do since.
        self._losses = losses.to("cpu", non_blocking=True)
        self._copied: Any = None
        if losses.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The loss of each batch."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._losses.tolist()


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
        self.ema = build_ema(config, self.network)  # a deep copy: before compile and DDP wrap anything
        self.batches = len(parts.train.batches)  # a process and epoch
        self.updates_per_epoch = math.ceil(self.batches / config.optim.accumulate)
        self.total_updates = self.updates_per_epoch * config.schedule.epochs
        optimizer = build_optimizer(config, self.network)
        self.schedule = build_schedule(config, optimizer, updates_per_epoch=self.updates_per_epoch)
        self.loss = build_loss(config, parts.info).to(self.device)
        if config.trainer.compile:
            self.network.compile()  # in place, so that names in the state dict stay
            self.loss.compile()
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.graphed = GraphedStep(self._loss_and_gradient, self.model) if config.trainer.cuda_graph else None
        self.mixup = build_mixup(config, len(parts.info.class_names))
        self.writer: Any = None
        self.last_save = self.began = time.perf_counter()
        self.first_update, self.elapsed_before = 0, 0.0
        self.over = False  # the time that schedule.minutes gives
        self.unread: _Update | None = None  # the last update, its loss still on the way from the GPU

    # ------------------------------------------------------------ start and end

    def open(self, *, resuming: bool, command: Sequence[str]) -> None:
        """Create the run directory, or go back to where its last checkpoint was."""
        checkpoint = read_checkpoint(self.run.checkpoints, "last") if resuming else None
        if checkpoint is not None:
            self._restore(checkpoint.weights, checkpoint.state)
        if self.main:
            self.run.path.mkdir(parents=True, exist_ok=True)
            if checkpoint is None:
                save_config(self.config, self.run.config)
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

    def _restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if state["processes"] != self.world:
            raise ConfigError(
                f"trainer.resume=true: {self.run.path} was trained by {state['processes']} processes, now there are "
                f"{self.world}; start as many"
            )
        self.network.load_state_dict(weights if state["model"] is None else state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.state = State(**state["place"])
        self.elapsed_before = self.state.elapsed
        if not self.main:  # the sums are those of all processes
            self.state.loss_sum, self.state.images = 0.0, 0
        self.schedule.step_update(self._schedule_place())

    def close(self) -> None:
        """Release files and processes."""
        self.parts.train.close()
        if self.writer is not None:
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
        state, accumulate = self.state, self.config.optim.accumulate
        self.model.train()
        self.parts.train.start(epoch=state.epoch, first=state.batch)
        batches = iter(self.parts.train)
        ended = time.perf_counter()
        while state.batch < self.batches:
            count = min(accumulate, self.batches - state.batch)  # batches of this update
            losses: list[Tensor] = []
            names: list[str] = []
            sizes, waited = [], 0.0
            for i in range(count):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                losses.append(self.forward_backward(batch, number=state.batch + i, count=count, last=i == count - 1))
                sizes.append(len(batch["name"]))
                names.extend(batch["name"])
            lr = self.learning_rate()
            self.step_optimizer()
            state.batch += count
            update = _Update(torch.stack(losses), sizes, names, number=state.update, lr=lr, waited=waited)
            self.read_loss()  # of the update before: the GPU is never without work
            began, ended = ended, time.perf_counter()
            update.seconds = ended - began
            state.seconds += update.seconds
            self.unread = update
            stop, save, self.over = self._agree(self.stop.requested, self._checkpoint_due(), self._time_is_up())
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
        values = update.read()
        if not all(map(math.isfinite, values)):
            self._stop_for_nan(values, update)
        self.state.loss_sum += math.fsum(v * n for v, n in zip(values, update.sizes, strict=True))
        self.state.images += sum(update.sizes)
        self._show_update(values, update)

    def forward_backward(self, batch: dict[str, Any], *, number: int, count: int, last: bool) -> Tensor:
        """Add one batch's share of the gradient; returns its loss, detached."""
        place = self.config.seed, self.state.epoch, number, self.accelerator.process_index
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
            return self.graphed(image, target)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            return self._loss_and_gradient(image, target, count)

    def _loss_and_gradient(self, image: Tensor, target: Tensor, count: int = 1) -> Tensor:
        loss = self.loss(self.model(image), target)
        self.accelerator.backward(loss / count)
        return loss.detach()

    def step_optimizer(self) -> None:
        """One update of weights, learning rate and moving average."""
        if self.config.optim.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        if self.graphed is None:
            self.optimizer.zero_grad(set_to_none=True)
        self.state.update += 1
        self.schedule.step_update(self._schedule_place())
        if self.ema is not None:
            self.ema.update(self.network, step=self.state.update)

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
        network = self.network if self.ema is None else self.ema.module
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
        loss_sum, images = self._sum(state.loss_sum, float(state.images))
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
            "train": {"loss": loss_sum / images},
            "val": validation,
            "seconds": round(state.seconds + (evaluation.seconds if evaluation is not None else 0.0), 3),
            "images_per_second": round(images / max(state.seconds, 1e-9), 1),
        }
        self._show_epoch(row, improved)
        state.epoch += 1
        state.batch, state.loss_sum, state.images, state.seconds = 0, 0.0, 0, 0.0
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
        (self.network if self.ema is None else self.ema.module).load_state_dict(best.weights)
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
        """Write a checkpoint; every process has to call this."""
        loss_sum, images = self._sum(self.state.loss_sum, float(self.state.images))
        self.last_save = time.perf_counter()
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {
            "place": {**asdict(self.state), "loss_sum": loss_sum, "images": int(images), "elapsed": self._elapsed()},
            "model": None if self.ema is None else self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": self.world,
            "threads": torch.get_num_threads(),
        }
        weights = (self.network if self.ema is None else self.ema.module).state_dict()
        about: dict[str, Any] = {"epoch": self.state.epoch, "step": self.state.update, "finished": self.state.finished}
        if name == "best":
            about[str(self.config.trainer.monitor)] = self.state.best
        write_checkpoint(self.run.checkpoints, name, weights=weights, state=state, about=about)

    def _checkpoint_due(self) -> bool:
        trainer = self.config.trainer
        by_steps = trainer.checkpoint_steps is not None and self.state.update % trainer.checkpoint_steps == 0
        minutes = (time.perf_counter() - self.last_save) / 60
        return by_steps or (trainer.checkpoint_minutes is not None and minutes >= trainer.checkpoint_minutes)

    # ------------------------------------------------------------ helpers

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.began

    def _time_is_up(self) -> bool:
        minutes = self.config.schedule.minutes
        return minutes is not None and self._elapsed() >= 60 * minutes

    def _schedule_place(self) -> int:
        """Where the learning rate's schedule is, of ``total_updates``: by updates, or by the clock."""
        minutes = self.config.schedule.minutes
        if minutes is None:
            return self.state.update
        return min(int(self._elapsed() / (60 * minutes) * self.total_updates), self.total_updates)

    def _agree(self, *flags: bool) -> list[bool]:
        """Whether any process raised each flag."""
        if self.world == 1:
            return list(flags)
        return [total > 0 for total in self._sum(*map(float, flags))]

    def _sum(self, *values: float) -> list[float]:
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

    def _stop_for_nan(self, values: list[float], update: "_Update") -> None:
        names, where = update.names, f"epoch {self.state.epoch + 1}, update {update.number}"
        self.display.note(f"loss {values} in {where}; batch: {', '.join(names)}")
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more (log.txt)" if len(names) > 8 else "")
        raise UserError(
            f"{self.run.path}: the loss is {values[-1] if len(values) == 1 else values} in {where}; the last "
            f"checkpoint is intact; lower optim.lr or set optim.clip_grad=1.0, or look at the batch: {shown}"
        )

    def _show_update(self, values: list[float], update: "_Update") -> None:
        state, loss = self.state, sum(values) / len(values)
        rate = sum(update.sizes) * self.world / max(update.seconds, 1e-9)
        best = "" if state.best is None else f" | best {self.config.trainer.monitor} {state.best:.4f}"
        pace = (time.perf_counter() - self.began) / max(update.number - self.first_update, 1)
        remaining = pace * (self.total_updates - update.number)
        if self.config.schedule.minutes is not None:
            remaining = min(remaining, max(60 * self.config.schedule.minutes - self._elapsed(), 0))
        left = duration(remaining)
        self.display.step(
            update=update.number,
            epoch=f"epoch {state.epoch + 1}/{self.config.schedule.epochs}",
            text=f"loss {loss:.4f} | lr {update.lr:.2e}{best} | {rate:.0f} images/s | "
            f"data wait {update.waited / max(update.seconds, 1e-9):.0%} | "
            f"{peak_memory_gib(self.device):.1f} GiB | {left} left",
        )
        if self.writer is not None and update.number % self.config.trainer.log_every == 0:
            for tag, value in (("loss", loss), ("lr", update.lr), ("images_per_second", rate)):
                self.writer.add_scalar(f"train/{tag}", value, update.number)

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


def _channels_last(tensor: Tensor) -> Tensor:
    """Images, volumes and the weights of their convolutions with channels next to each other in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.ndim]) if tensor.ndim in formats else tensor
