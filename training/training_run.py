"""The record that the training loop works with, and requests to a running training: signals and files."""

import contextlib
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.devices import get_compute_dtype
from protocols.family import Family, get_audio_spec
from protocols.rules import AUDIO_STREAM, IMAGE_STREAM
from runtime.planning.device_memory import MemoryWatch
from training.data.feed import Feed
from training.experts import AUTOCAST, ExpertNetworks
from training.features.hooks import Average, NetworkLoading, RunFeatures
from training.features.phases import RunPhase
from training.loss import Autocast, LossRule, NoisyBatch
from training.optimizers.lr_schedule import LrSchedule
from training.optimizers.optimizer import evaluation
from training.optimizers.stepping import FusedBackward, StepAfterBackward
from training.options import TrainingOptions
from training.plan import TrainingPlan
from training.reports.logs import LOSS_COLUMN, DelayedReports, Logs, MetricColumns, StepReport
from training.reports.pauses import MEASURING
from training.reports.reporter import RunReporter
from training.saving.files import MinuteClock, Names, Saver
from training.saving.states import list_states
from training.steps import Progress, StepPlan
from training.trainable import Trainable

if TYPE_CHECKING:  # loaded where they are made
    from networks.gated_loras import AddedLoras
    from training.samples import Sampler
    from training.validation import Validation

logger = logging.getLogger(__name__)

SAMPLE, SAVE, STOP = "sample", "save", "stop"
CHECK_INTERVAL = 1.0  # time between two checks: one takes microseconds, in a network folder milliseconds
MAX_REQUEST_BYTES = (
    64  # bytes of a request file, enough for what a shell writes; larger files are the user's data
)
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":
    SIGNALS.append(signal.SIGBREAK)  # another process can send this instead of Ctrl-C


def trigger_paths(names: Names, also_plain: bool) -> dict[Path, str]:
    """Map the path of each possible request file of a run to its kind of request.

    `my_lora.sample` addresses the run `my_lora`. With `also_plain`, `sample` is for every run in the folder.
    """
    starts = (f"{names.name}.", "") if also_plain else (f"{names.name}.",)
    return {names.folder / f"{start}{kind}": kind for kind in (SAMPLE, SAVE, STOP) for start in starts}


@dataclass
class Requests:
    """Collect requests to a run: from signals, request files, and a clock.

    Signals (Ctrl-C, SIGTERM) end the run after its step; a second one ends it immediately. Files can also
    request samples and saves, and the clock requests saves. A file is removed only after its request has
    been carried out, so that the next run does so if this one is killed first.
    """

    paths: Mapping[Path, str] = field(default_factory=dict)  # request by file; empty: no file is watched
    can_sample: bool = True
    now: Callable[[], float] = time.monotonic  # seconds
    clock: MinuteClock | None = None  # of --save_every_n_minutes
    ending_requested: bool = field(default=False, init=False)  # the run was asked to end
    ending_agreed: bool = field(default=False, init=False)  # all processes know that the run was asked to end
    _last_check: float | None = field(default=None, init=False)  # time of the last check
    # request files -> time of change in nanoseconds
    _pending_files: dict[Path, int] = field(default_factory=dict, init=False)
    _ignored_files: dict[Path, int] = field(default_factory=dict, init=False)
    reasons: dict[str, str] = field(default_factory=dict, init=False)  # requests of features -> their reasons

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
        """Handle a signal: the first ends the run after this step, the second ends the process at once."""
        if self.ending_requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.ending_requested = True
        logger.warning(
            "Ending after this step; everything will be saved. Press Ctrl-C again to end at once and go back "
            "to the last saved state."
        )

    def is_requested(self, kind: str) -> bool:
        """Return whether a file or a feature requests it. Checks the files at most once a second."""
        if self.paths and (self._last_check is None or self.now() - self._last_check >= CHECK_INTERVAL):
            self._last_check = self.now()
            for path, request in self.paths.items():
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    # not a folder: the folder of samples has such a name
                    if stat.S_ISREG(status.st_mode) and path not in self._pending_files:
                        self._record_request(path, request, status)
        return kind in self.reasons or any(self.paths[path] == kind for path in self._pending_files)

    def _record_request(self, path: Path, kind: str, status: os.stat_result) -> None:
        """Record the request that a file in the folder makes, unless this version of it was ignored before.

        Args:
            path: Path of the file.
            kind: What it asks for: to save, to sample or to end.
            status: Size and time of the file.
        """
        modified_ns = status.st_mtime_ns
        if self._ignored_files.get(path) == modified_ns:
            return
        if status.st_size > MAX_REQUEST_BYTES:  # a request is an empty or small file
            self._ignored_files[path] = modified_ns
            logger.warning("%s asks for nothing: it contains %d bytes.", path, status.st_size)
            return
        self._pending_files[path] = modified_ns
        if kind == SAMPLE and not self.can_sample:
            logger.warning("%s is ignored: there is nothing to sample without --sample_prompts.", path)
            self.finish(kind)
        else:
            logger.info("%s asks to %s at the end of this step.", path, kind)

    def finish(self, kind: str) -> None:
        """Forget the requests of this kind, and remove their files, after it has been carried out.

        A file that has changed in the meantime is kept, as a new request.
        """
        self.reasons.pop(kind, None)
        served = [path for path in self._pending_files if self.paths[path] == kind]
        for path in served:
            modified_ns = self._pending_files.pop(path)
            try:
                if path.lstat().st_mtime_ns == modified_ns:
                    path.unlink()
            except FileNotFoundError:
                pass  # already removed by someone else
            except OSError as error:
                logger.warning("%s cannot be removed, and is ignored until it changes: %s", path, error)
                self._ignored_files[path] = modified_ns


@dataclass(frozen=True)
class StepRequests:
    """What a process was asked for until a step: by a timer, a request file or a feature."""

    saves: bool = False
    samples: bool = False
    ends: bool = False  # a feature ends the run


@dataclass
class GradientStep:
    """An optimizer step whose gradients are complete: summed over processes, and not clipped yet."""

    batches: range  # its micro-batches, those of all processes
    parameters: Sequence[Parameter]  # those that it changes
    values: Tensor  # 1-D on the device, as `MetricColumns` orders them
    keys: tuple[str, ...]  # of the items of this process
    requested: StepRequests  # from this process
    # norm of all gradients before clipping; None until the step: with --fused_backward_pass
    norm: Tensor | None = None
    weight_norms: Tensor | None = None  # values of a `NormReport`, only with --scale_weight_norms
    skipped: str = ""  # why the weights are not stepped, for the history; set by features before the step

    @property
    def loss(self) -> Tensor:
        """Mean loss of the step, a scalar on the device."""
        return self.values[LOSS_COLUMN]


@dataclass(frozen=True)
class LoopPhases:
    """The phases of the training loop, each with what features put around it; see `features/phases.py`."""

    gradients: Callable[["TrainingRun", range, Iterator[NoisyBatch]], GradientStep]
    step: Callable[["TrainingRun", GradientStep], GradientStep]
    log: Callable[["TrainingRun", StepReport], StepReport]
    validate: Callable[["TrainingRun", "Validation", str], Mapping[str, float]]
    sample: Callable[["TrainingRun"], None]


class Rewind(Exception):
    """Raised between steps, in all processes, to continue from a saved state; `rewinding.py` does that."""

    def __init__(self, state: Path, reason: str, rate_factor: float, kept: Collection[type]) -> None:
        """Describe where to go.

        Args:
            state: Folder of a state that this run has saved.
            reason: Why, for a note on the page.
            rate_factor: Multiplier of the learning rates from then on.
            kept: Dataclasses of features whose values are not those of the state.
        """
        super().__init__(state)
        self.state, self.reason, self.rate_factor, self.kept = state, reason, rate_factor, kept


class Reread(Exception):
    """Raised between steps to read the next batches again, because their items have changed."""


@dataclass
class TrainedModel:
    """The loaded networks of a run, with the optimizer, its schedule, and additions of features."""

    plan: TrainingPlan
    dits: ExpertNetworks  # networks of the trained experts
    sample_dits: ExpertNetworks  # networks that generate samples, some of which may not be trained
    loader: NetworkLoading  # loads additional networks
    trainable: Trainable
    optimizer: Optimizer
    optimizer_name: str  # for metadata
    schedule: LrSchedule
    scaler: torch.amp.GradScaler  # enabled for fp16 only
    stepping: StepAfterBackward | FusedBackward
    average: Average | None = None  # of the trained weights; None: no feature keeps one

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the network computes: autocast's, or without autocast the weights' dtype."""
        precision = self.plan.options.accelerator.mixed_precision
        return AUTOCAST.get(precision, get_compute_dtype(self.dits.networks[0]))

    @property
    def options(self) -> TrainingOptions:
        """Options of the run."""
        return self.plan.options

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Return the transformers (experts) that are trained."""
        return self.dits.networks

    @property
    def adapters(self) -> "Sequence[AddedLoras]":
        """Return the --training_adapter LoRAs in the trained transformers."""
        return self.dits.loras

    @property
    def takes_part_in_saving(self) -> bool:
        """Whether this process takes part in saving: the main one, and all with a part of the weights."""
        return self.plan.accelerator.is_main_process or self.plan.shards_model

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that compute in a training pass: transformers, then trained networks."""
        return (*self.dits.networks, *self.trainable.all_modules)


@dataclass
class TrainingRun:
    """The state of a training run that the loop uses.

    The plan's progress, the network, the optimizer and the schedule change during training.
    """

    model: TrainedModel
    feed: Feed
    rule: LossRule
    validation: "Validation | None"  # None: there are no validation items
    make_measuring: Callable[[], "Validation"]  # for features that measure training items at fixed noise
    sampler: "Sampler | None"  # None: no samples are generated
    memory: MemoryWatch | None  # None: the device has no counters, or this is not the main process
    logs: Logs
    reporter: RunReporter
    requests: Requests  # only the main process watches its files and its clock
    saver: Saver | None  # None: another process saves
    phases: LoopPhases
    delayed_reports: DelayedReports = field(default_factory=DelayedReports)
    measuring: "Validation | None" = None  # None: no feature has measured items yet
    rereads: bool = False  # batches that were read in advance are read again before the next step
    # values of the model's plan
    plan: TrainingPlan = field(init=False)
    options: TrainingOptions = field(init=False)
    features: RunFeatures = field(init=False)
    family: Family = field(init=False)
    steps: StepPlan = field(init=False)
    progress: Progress = field(init=False)  # the object is changed while training, never replaced
    device: torch.device = field(init=False)  # where steps are computed; swapped weights may be elsewhere
    autocast: Autocast = field(init=False)  # opens the autocast context of a pass
    parameters: list[Parameter] = field(init=False)  # trained parameters in the optimizer's order
    audio_parameters: frozenset[Tensor] = field(init=False)  # parameters that only clips with audio train
    updates_all_parameters: bool = field(init=False)  # False: which ones depends on the step
    # names of the losses that are also logged separately: experts, or images and audio; empty for one loss
    loss_components: tuple[str, ...] = field(init=False)
    metric_columns: MetricColumns = field(init=False)  # of the tensor with the values of a step

    def __post_init__(self) -> None:
        """Set the attributes that follow from the model: shortcuts to its plan, names of logged losses."""
        plan = self.model.plan
        self.plan, self.options, self.features = plan, plan.options, plan.features
        self.family, self.steps, self.progress = plan.family, plan.steps, plan.progress
        self.device = plan.accelerator.device
        self.autocast = plan.accelerator.autocast
        self.parameters = self.model.trainable.parameters
        experts, audio = plan.family.experts, get_audio_spec(plan.family)
        self.audio_parameters = frozenset()  # parameters of modules that only audio goes through
        trainable = self.model.trainable
        if audio is not None and not audio.is_in_latent_cache:
            self.audio_parameters = frozenset(
                parameter
                for parameter, name in trainable.names.items()
                if any(part in name for part in audio.modules)
            )
        self.updates_all_parameters = not (
            trainable.by_expert or trainable.freeze_at_step or self.audio_parameters
        )
        self.loss_components = ()  # names of the parts whose losses are logged separately
        if len(experts) > 1:
            self.loss_components = tuple(expert.name for expert in experts)
        elif audio is not None and not plan.features.has_joint_audio_loss:
            self.loss_components = (IMAGE_STREAM, AUDIO_STREAM)

        self.metric_columns = MetricColumns(
            [*self.loss_components, *(name for tally in self.features.tallies for name in tally.names)]
        )

    def request(self, phase: RunPhase[Any, Any, Any], reason: str) -> None:
        """Ask for samples, a save or the end of the run, for a feature: SAMPLE, SAVE or END of the phases.

        It is enough if one process asks: all of them do it, after this step or one of the next two. The end
        is that of a finished run, whose files are saved, not that of an interrupted one.
        """
        kind = phase.name
        if kind == SAMPLE and not self.requests.can_sample:
            logger.warning("%s, but there is nothing to sample without --sample_prompts.", reason)
        elif kind not in self.requests.reasons:
            logger.info("Step %d asks to %s: %s.", self.progress.step, kind, reason)
            self.requests.reasons[kind] = reason

    def find_earlier_state(self, last_step: int) -> Path | None:
        """Return the newest state of this run up to a step; None if there is none. All processes call this.

        States from before this process has started are left out, except the one that it has resumed from.
        """
        found: Path | None = None
        if self.is_main:
            names = self.plan.names
            steps = range(max(self.steps.first_step, 1), last_step + 1)
            own = [
                (state.step, state.folder)
                for state in list_states(names.folder, names.name)
                if state.session_id == self.progress.session_id and state.step in steps
            ]
            found = max(own)[1] if own else None
        if self.steps.num_processes > 1:
            (found,) = broadcast_object_list([found])
        return found

    def go_back(self, state: Path, reason: str, rate_factor: float, kept: Collection[type]) -> NoReturn:
        """Let the run continue from a saved state. All processes call this, before or after LOG.

        Raises:
            Rewind: Always.
        """
        raise Rewind(state, reason, rate_factor, kept)

    def note(self, text: str, step: int | None = None) -> None:
        """Say something about a step, by default the last one, in the console, on the page and at the end.

        The main process says it; calls of other processes do nothing.
        """
        if self.is_main:
            self.reporter.log_note(text, self.progress.step if step is None else step)

    def measure_items(self) -> dict[str, float]:
        """Return the loss of each training item by key, at noise that is always the same, for a feature.

        All processes must call this. The random state of the training is neither used nor changed.
        """
        model = self.model
        if self.measuring is None:
            self.measuring = self.make_measuring()
        unique = {item.key: item for item in self.plan.training}
        self.reporter.log_pause("measuring items")
        started = self.delayed_reports.time_stamp(self.device.type)
        with (
            self.logs.clock.pause(MEASURING),
            evaluation(model.modules, model.optimizer, self.parameters),
        ):
            losses = self.measuring.measure_items([*unique.values()], model.dits.on_device, self.autocast)
        self.delayed_reports.leave_out_since(started, self.device.type)
        if self.steps.num_processes > 1:
            losses = dict(gather_object([*losses.items()]))
        return {key: losses[key] for key in unique}

    def list_experts(self, step_batches: range) -> list[int]:
        """Return the indices of the experts that a step's micro-batches train."""
        return sorted({self.feed.find_expert((self.progress.epoch, index)) for index in step_batches})

    def has_audio(self, step_batches: range) -> bool:
        """Return whether a clip in a step's micro-batches has audio."""
        return any(self.feed.has_audio((self.progress.epoch, index)) for index in step_batches)

    def name_kind(self, step_batches: range) -> str:
        """Return the kind of a step: its transformers, and whether it has audio.

        Gradient norms can be compared only between steps of the same kind.
        """
        experts = self.family.experts
        kind = []
        if len(experts) > 1:
            kind += sorted(experts[index].name for index in self.list_experts(step_batches))
        if self.audio_parameters and self.has_audio(step_batches):
            kind.append(AUDIO_STREAM)
        return " ".join(kind)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.plan.accelerator.is_main_process

    @property
    def has_scaler(self) -> bool:
        """Return whether fp16 gradients are scaled; if so, an infinite norm lowers the scale."""
        return self.model.scaler.is_enabled()
