"""Report a run: show a progress bar, and pass the values of its steps to recorders.

Only the main process reports. Values of a step on the device are read one step later, so that the host never
waits for them. They form one 1-D tensor, whose order `MetricColumns` defines.

A step is timed from the end of the previous step or pause to its own end on the device. The host reads its
values later: after the next step, or at once if a pause follows.
"""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from modules.bars import LINE_INTERVAL
from modules.console import format_duration
from modules.devices import empty_pinned
from modules.media.reading import Frame
from modules.options import find_record_type, option_name, resolve_type_hints
from networks.adapter import NormReport
from training.reports.pauses import StepClock

logger = logging.getLogger(__name__)

SHOW_EVERY = 0.2  # seconds between two updates of the values next to the bar
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
NARROWEST = 10  # minimum width of the bar in columns; if it is narrower, values are dropped in this order:
DROPPED = ("lr", "avr_loss", "keys_scaled", "average_key_norm", "mem", "sample", "s/it")
PRIVATE = "resume"  # text option that may be a path; options with a path type are private too
# indices into the 1-D tensor of a step's values
LOSS_COLUMN = 0
# counts of processes that were asked to stop, and for saves, samples, and the end of the run
REQUEST_COLUMNS = slice(1, 5)
WEIGHT_NORM_COLUMNS = slice(-4, -1)  # values of a `NormReport`, only with --scale_weight_norms
GRADIENT_NORM_COLUMN = -1


class MetricColumns:
    """Maps elements of a step's 1-D metrics tensor to named losses and metrics.

    The tensor contains the loss, the requests, a sum for each name, a count for each name, and the norms.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Define the columns; `names` lists all losses and metrics other than the total loss."""
        self.names = names
        first_count = REQUEST_COLUMNS.stop + len(names)
        self.size = first_count + len(names)  # number of values before the norms
        self.sum_columns = slice(REQUEST_COLUMNS.stop, first_count)  # sum over micro-batches, for each name
        self.count_columns = slice(first_count, self.size)  # number of micro-batches, for each name

    def means(self, values: Sequence[float]) -> dict[str, float]:
        """Return the mean of each loss and metric by name, without those that no micro-batch recorded."""
        totals = zip(self.names, values[self.sum_columns], values[self.count_columns], strict=True)
        return {name: total / count for name, total, count in totals if count}


@dataclass(frozen=True)
class StepReport:
    """Metrics of an optimizer step; `values`, and fields computed from it, are filled in a step later."""

    step: int  # from 1
    rates: Mapping[str, float]  # learning rates as `name_rates` gives them
    keys: tuple[str, ...] = ()  # the items this process trained on
    sizes: Hashable = None  # sizes of the items: steps with equal sizes take equally long
    values: tuple[float, ...] = ()  # as `MetricColumns` orders them, on the host
    seconds: float | None = None  # duration of the step, without pauses; None: the clock was not started
    loss: float = 0.0
    average: float = 0.0  # mean loss of the last steps, at most one epoch
    gradient_norm: float | None = None  # before clipping
    norms: NormReport | None = None  # of --scale_weight_norms
    skipped: str = ""  # why the step was skipped, for the history; "" if it was taken
    # losses of the parts that had micro-batches in the step, by name: experts, or image and sound
    component_losses: Mapping[str, float] = field(default_factory=dict)
    # means of additional values of features, by name
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class DelayedReports:
    """Keep the report of the last step while its values are copied to the host.

    `now` returns seconds. A time stamp is a time in seconds or, on a GPU, a CUDA event.
    """

    now: Callable[[], float] = time.monotonic
    _pending: tuple[StepReport, Tensor, Any] | None = field(default=None, init=False)
    last_time_stamp: Any = field(default=None, init=False)  # at the end of the last step or pause
    # time stamps around each pause within the current step, and within the one that is pending
    _pauses: list[tuple[Any, Any]] = field(default_factory=list, init=False)
    _pending_pauses: list[tuple[Any, Any]] = field(default_factory=list, init=False)

    def push(self, step: StepReport, values: Tensor) -> StepReport | None:
        """Store a step with its 1-D `values` on any device; return the previous step, with host values."""
        device_type = values.device.type
        if values.is_cuda:
            values = empty_pinned(values.shape, values.dtype).copy_(values, non_blocking=True)
        # other devices: the time is taken when the values have arrived
        ended = self.time_stamp(device_type) if device_type in {"cuda", "cpu"} else None
        previous = self.flush()
        self._pending = (step, values, ended)
        self._pending_pauses, self._pauses = self._pauses, []
        return previous

    def leave_out_since(self, started: Any, device: str) -> None:
        """Leave the time from the time stamp `started` until now out of the duration of the current step."""
        self._pauses.append((started, self.time_stamp(device)))

    def flush(self) -> StepReport | None:
        """Return the report of the last step if it is pending. Blocks until the device has computed it."""
        if self._pending is None:
            return None
        step, values, ended = self._pending
        self._pending = None
        is_cuda_event = ended is not None and not isinstance(ended, float)  # otherwise seconds on the host
        if is_cuda_event:
            ended.synchronize()
        report = replace(step, values=tuple(values.tolist()))
        started = self.last_time_stamp
        self.last_time_stamp = self.now() if ended is None else ended
        if started is None:
            return report
        seconds = _seconds_between(started, self.last_time_stamp)
        for pause_started, pause_ended in self._pending_pauses:
            seconds -= _seconds_between(pause_started, pause_ended)
        return replace(report, seconds=seconds)

    def drop(self) -> None:
        """Forget the report of the last step."""
        self._pending = None
        self._pauses.clear()

    def time_stamp(self, device: str) -> Any:
        """Return a time stamp for measuring step durations.

        Args:
            device: Type of the device, such as cuda.
        """
        if device != "cuda":
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(started: Any, ended: Any) -> float:
    """Return the seconds between two time stamps of `DelayedReports`."""
    if isinstance(started, float):
        return ended - started
    return started.elapsed_time(ended) / 1000


class Recorder(Protocol):
    """Interface of an object that records metrics and samples; all processes enter it as a context."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: Any) -> bool | None: ...

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step; called only in the main process."""

    # called in the main process only; a strip has a sample's frames side by side, H W 3
    def log_samples(
        self, step: int, files: Mapping[int, Path], strips: Mapping[int, Frame], prompts: Mapping[int, str]
    ) -> None:
        """Record the samples of a step: files, strips of frames, and prompts, each by prompt index."""


@dataclass
class Logs:
    """Context manager that logs one run: it starts the recorders and the progress bar."""

    accelerator: Accelerator
    total_steps: int
    first_step: int = 0
    recorders: Sequence[Recorder] = ()  # recorders of features, which get all values
    now: Callable[[], float] = time.monotonic  # seconds
    # returns additional values for the bar at a step, by name: memory, the next sample
    extras: Callable[[int], Mapping[str, str]] = lambda _: {}
    clock: StepClock = field(default_factory=StepClock)
    bar: "tqdm[Any]" = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _last_shown: float = field(default=-math.inf, init=False)

    def __enter__(self) -> "Logs":
        for recorder in self.recorders:
            self._stack.enter_context(recorder)
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.first_step,
            desc="steps",
            bar_format=BAR,
            dynamic_ncols=True,
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        )
        self._stack.enter_context(logging_redirect_tqdm())  # log lines go above the bar, not through it
        self._stack.callback(self.bar.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        try:
            self.accelerator.end_training()
        except Exception as error_at_end:  # everything was saved already
            logger.warning("The processes could not be ended: %s", error_at_end)

    def log_step(self, report: StepReport) -> None:
        """Report an optimizer step and advance the progress bar."""
        if report.seconds is not None:
            warning = self.clock.record_step(report.step, report.seconds, report.sizes)
            if warning is not None:
                logger.warning(warning)
        now = self.now()
        if not self.bar.disable:
            if now - self._last_shown >= SHOW_EVERY:
                self._last_shown = now
                self.bar.set_postfix(self._fit_to_bar(self._format_metrics(report)), refresh=False)
            self.bar.update(report.step - self.bar.n)
        elif self.accelerator.is_main_process and now - self._last_shown >= LINE_INTERVAL:
            # without a terminal, a line from time to time; not for the first step, whose time is unusual
            if self._last_shown > -math.inf:
                metrics = ", ".join(f"{name} {text}" for name, text in self._format_metrics(report).items())
                logger.info("Step %d of %d: %s", report.step, self.total_steps, metrics)
            self._last_shown = now
        if self.recorders:
            self.log_values(_list_tracked_values(report), report.step)

    def _fit_to_bar(self, metrics: Mapping[str, str]) -> dict[str, str]:
        """Drop values in the order of DROPPED until the remaining ones fit next to the progress bar."""
        fitting = dict(metrics)
        bar = self.bar.format_dict
        elapsed = tqdm.format_interval(bar["elapsed"])
        around = f"steps: 100%|| {self.total_steps}/{self.total_steps} [{elapsed}]"
        room = (bar["ncols"] or math.inf) - len(around) - NARROWEST
        for name in DROPPED:
            if sum(len(f", {shown}={text}") for shown, text in fitting.items()) > room:
                fitting.pop(name, None)
        return fitting

    def _format_metrics(self, report: StepReport) -> dict[str, str]:
        """Return the values shown after the progress bar, as text by name."""
        metrics = {}
        seconds = self.clock.seconds_per_step
        seconds_left = self.clock.estimate_remaining(report.step, self.total_steps)
        if seconds is not None and seconds_left is not None:
            metrics = {"s/it": f"{seconds:.3g}", "left": format_duration(seconds_left)}
        metrics["avr_loss"] = f"{report.average:.4g}"
        rate = next(iter(report.rates.values()), None)
        if rate is not None:
            metrics["lr"] = f"{rate:.3g}"
        if report.norms is not None:
            metrics["keys_scaled"] = f"{report.norms.keys_scaled:g}"
            metrics["average_key_norm"] = f"{report.norms.mean_norm:.4g}"
        return {**metrics, **self.extras(report.step)}

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Send values such as `loss/epoch` and validation losses to the recorders."""
        if self.accelerator.is_main_process:
            for recorder in self.recorders:
                recorder.log_values(values, step)


def _list_tracked_values(report: StepReport) -> dict[str, float]:
    """Return the metrics of a step, by their names in trackers such as TensorBoard."""
    values = {"loss/current": report.loss, "loss/average": report.average, **report.rates}
    values |= {f"loss/{name}": loss for name, loss in report.component_losses.items()}
    values |= report.metrics
    if report.gradient_norm is not None:
        values["grad_norm"] = report.gradient_norm
    if report.seconds:
        values["steps_per_second"] = 1 / report.seconds
    if report.norms is not None:
        values["max_norm/keys_scaled"] = report.norms.keys_scaled
        values["max_norm/average_key_norm"] = report.norms.mean_norm
        values["max_norm/max_key_norm"] = report.norms.max_norm
    return values


def public_config(*records: Any) -> dict[str, int | float | str | bool]:
    """Return all options of these records by name, without secrets and paths."""
    config: dict[str, int | float | str | bool] = {}
    for record in records:
        hints = resolve_type_hints(type(record))
        for item in dataclasses.fields(record):
            value = getattr(record, item.name)
            name = option_name(item)
            if find_record_type(hints[item.name]) is not None:
                config |= {} if value is None else public_config(value)
            elif name != PRIVATE and not (item.metadata.get("secret") or "Path" in str(item.type)):
                config[name] = value if isinstance(value, (int, float, str)) else str(value)
    return config


def name_rates(
    rates: Sequence[float | Tensor], group_names: Sequence[str], optimizer: Optimizer
) -> dict[str, float]:
    """Return learning rates by tracker name, `lr/unet`.

    Also `lr/d*lr/unet` if the optimizer estimates a factor d itself (Prodigy).
    """
    named = {f"lr/{name}": float(rate) for name, rate in zip(group_names, rates, strict=False)}
    for name, group in zip(group_names, optimizer.param_groups, strict=False):
        if "d" in group:
            named[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
    return named
