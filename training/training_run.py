"""What the training loop works with: one record, which `training.run` fills and `training.loop` is given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.contract.experts import Expert
from modules.planning.device_memory import MemoryWatch
from networks.added import AddedLoras
from training.averages import WeightAverage
from training.data.feed import Feed
from training.data.live_text import LiveTexts
from training.experts import ExpertNetworks
from training.loss import PLAIN_LOSS, Autocast, LossRule, Trains
from training.optimizers.fused_backward import FusedBackward
from training.optimizers.lr_schedule import LrSchedule
from training.optimizers.parameter_steps import ParameterSteps
from training.options import TrainingOptions
from training.progress import Progress
from training.reports.logs import Logs
from training.reports.readings import Readings
from training.reports.reporter import NoReports, RunReporter
from training.samples import Sampler
from training.saving.files import MinuteClock, Saver
from training.steps import StepPlan
from training.stopping import StopRequest
from training.trainable import Trainable
from training.triggers import TriggerFiles
from training.validation import Validation


@dataclass(frozen=True)
class TrainingRun:
    """Hold everything that the loop works with.

    `progress`, the network, the optimizer and the schedule change while training.
    """

    options: TrainingOptions
    family: Trains
    dits: ExpertNetworks  # of the experts that are trained
    trainable: Trainable
    optimizer: Optimizer
    schedule: LrSchedule
    plan: StepPlan
    feed: Feed
    progress: Progress
    device: torch.device
    autocast: Autocast
    logs: Logs
    compute_dtype: torch.dtype = torch.float32  # of the DiT
    rule: LossRule = PLAIN_LOSS
    texts: LiveTexts | None = None  # encoded in each step; None: all are in the batches
    scaler: Any = None  # of fp16 gradients: torch.amp.GradScaler
    steps: ParameterSteps | None = None  # if weights are stepped one by one
    fused: FusedBackward | None = None  # if that happens inside the backward pass
    saver: Saver | None = None  # in the main process only
    sampler: Sampler | None = None
    validation: Validation | None = None
    reporter: RunReporter | NoReports = NoReports()  # to the page
    memory: MemoryWatch | None = None  # on a CUDA device, in the main process
    stop: StopRequest = field(default_factory=StopRequest)
    clock: MinuteClock = field(default_factory=lambda: MinuteClock(None))  # ticks in the main process only
    readings: Readings = field(default_factory=Readings)
    average: WeightAverage | None = None  # of the trained weights
    sample_loras: Sequence[AddedLoras] = ()  # switched on for samples
    sample_dits: ExpertNetworks | None = None  # if samples are made with more than what is trained
    triggers: TriggerFiles = field(default_factory=TriggerFiles)  # watched by the main process only

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
