"""The record that the training loop works with: `training.run` fills it, `training.loop` uses it."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.contract.family import Family
from modules.contract.rules import Expert
from modules.planning.device_memory import MemoryWatch
from networks.added import AddedLoras
from training.averages import NoAverage, WeightAverage
from training.data.feed import Feed
from training.data.live_text import LiveTexts, NoTexts
from training.dressing import AUTOCAST, dtype_of
from training.experts import ExpertNetworks
from training.loss import Autocast, LossRule
from training.optimizers.fused_backward import FusedBackward, StepAfterBackward
from training.optimizers.lr_schedule import LrSchedule
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.reports.logs import Logs
from training.reports.readings import Readings
from training.reports.reporter import NoReports, RunReporter
from training.samples import NoSampler, Sampler
from training.saving.files import MinuteClock, NoSaver, Saver
from training.steps import Progress, StepPlan
from training.trainable import Trainable
from training.triggers import TriggerFiles
from training.validation import Validation

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Hold whether the run was asked to end after its step, by Ctrl-C or SIGTERM. A second signal ends it."""

    asked: bool = False
    agreed: bool = False  # all processes know of it

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Treat SIGINT and SIGTERM as requests to end. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = True
        logger.warning(
            "Ending after this step; everything will be saved. Press Ctrl-C again to end at once and go back "
            "to the last saved state."
        )


class NoMemoryWatch:
    """Watch no memory: the device has no counters, or this is not the main process."""

    def see_batch(self, elements: int) -> None: ...

    def after_step(self) -> None: ...

    def after_pause(self) -> None: ...


@dataclass
class TrainingRun:
    """Hold everything that the loop works with. A missing part is an object that does nothing.

    The plan's progress, the network, the optimizer and the schedule change while training.
    """

    plan: TrainingPlan
    dits: ExpertNetworks  # of the experts that are trained
    sample_dits: ExpertNetworks  # those, or more that only samples are made with
    sample_loras: Sequence[AddedLoras]  # switched on for samples
    trainable: Trainable
    optimizer: Optimizer
    optimizer_name: str  # for metadata
    schedule: LrSchedule
    scaler: torch.amp.GradScaler  # of fp16 gradients; off for others
    stepping: StepAfterBackward | FusedBackward
    average: WeightAverage | NoAverage  # of the trained weights
    texts: LiveTexts | NoTexts  # encoded in each step
    feed: Feed
    rule: LossRule
    validation: Validation  # without items: none is made
    sampler: Sampler | NoSampler
    memory: MemoryWatch | NoMemoryWatch
    logs: Logs
    reporter: RunReporter | NoReports  # to the page
    triggers: TriggerFiles  # watched by the main process only
    clock: MinuteClock  # ticks in the main process only
    saver: Saver | NoSaver = NoSaver()
    stop: StopRequest = field(default_factory=StopRequest)
    readings: Readings = field(default_factory=Readings)

    @property
    def options(self) -> TrainingOptions:
        return self.plan.options

    @property
    def family(self) -> Family:
        return self.plan.family

    @property
    def steps(self) -> StepPlan:
        return self.plan.steps

    @property
    def progress(self) -> Progress:
        return self.plan.progress

    @property
    def device(self) -> torch.device:
        """Return where steps are computed; swapped weights may be elsewhere."""
        return self.plan.accelerator.device

    @property
    def autocast(self) -> Autocast:
        return self.plan.accelerator.autocast

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the DiT computes in."""
        return AUTOCAST.get(self.options.accelerator.mixed_precision, dtype_of(self.dits.networks[0]))

    @property
    def experts(self) -> Sequence[Expert]:
        """Return the experts of the model that is trained; most have one."""
        return self.family.experts

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return all modules that are in training mode or in evaluation mode together."""
        return (*self.dits.networks, *self.trainable.all_modules)

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Return the trained parameters, in the optimizer's order."""
        return self.trainable.parameters
