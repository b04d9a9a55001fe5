"""Where features act in a run, and what they see of it there.

`Hooks` has the points of a run, in the order in which it comes to them; the records before it say what a run
and its networks are to a feature. Read by what acts in a run, not for --help.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # features are loaded one by one, and without torch
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from contract.family import Family
    from contract.rules import Expert
    from dataset.options import CachingInRunOptions
    from dataset.table import DatasetConfig
    from networks.added import AddedLoras
    from networks.loading import LoraUse
    from networks.options import NetworkOptions
    from running.options import TrainingSpeedOptions
    from training.data.feed import Randomness
    from training.learning_options import WholeDitOptions
    from training.loss import NoisyBatch
    from training.noise_options import LossOptions, TimestepOptions
    from training.other_families import OtherFamilies
    from training.reports.logs import Recorder
    from training.run_options import LogOptions, LoopOptions
    from training.saving.options import SavingOptions
    from training.saving.states import SavedState
    from training.steps import Progress, StepPlan
    from training.targets.passes import Streams, TargetComparison, TrainingPasses
    from training.trainable import Trainable

T = TypeVar("T")


class OptionsOfRun(Protocol):
    """The options of a run, as far as features read them."""

    def of(self, kind: type[T]) -> T: ...

    @property
    def is_fused(self) -> bool: ...

    @property
    def loop(self) -> "LoopOptions": ...

    @property
    def speed(self) -> "TrainingSpeedOptions": ...

    @property
    def timesteps(self) -> "TimestepOptions": ...

    @property
    def weighted_by(self) -> str: ...

    @property
    def is_for_images(self) -> bool: ...

    @property
    def network(self) -> "NetworkOptions | None": ...

    @property
    def caching(self) -> "CachingInRunOptions | None": ...

    @property
    def whole_dit(self) -> "WholeDitOptions | None": ...

    @property
    def saving(self) -> "SavingOptions": ...

    @property
    def loss(self) -> "LossOptions": ...

    @property
    def typed_targets(self) -> list[str]: ...

    @property
    def logs(self) -> "LogOptions": ...


class PlannedRun(Protocol):
    """A run before its networks are loaded, as far as features use it."""

    @property
    def config(self) -> "DatasetConfig": ...

    @property
    def steps(self) -> "StepPlan": ...

    @property
    def family(self) -> "Family": ...

    @property
    def options(self) -> OptionsOfRun: ...

    @property
    def others(self) -> "OtherFamilies": ...

    @property
    def progress(self) -> "Progress": ...

    @property
    def accelerator(self) -> "Accelerator": ...


class HookedRun(Protocol):
    """A run, as far as features use it."""

    @property
    def options(self) -> OptionsOfRun: ...

    @property
    def progress(self) -> "Progress": ...

    @property
    def steps(self) -> "StepPlan": ...

    @property
    def device(self) -> "torch.device": ...

    @property
    def is_main(self) -> bool: ...

    @property
    def has_scaler(self) -> bool: ...


class Average(Protocol):
    """An average of the trained weights that a run keeps: saved next to each file, and in states."""

    steps: int  # that it covers

    @property
    def metadata(self) -> dict[str, str]: ...  # of its files

    def begin(self) -> None: ...  # with the weights of now

    def in_place(self) -> AbstractContextManager[None]: ...  # the parameters hold it during the block

    def tensors(self) -> "dict[str, Tensor]": ...  # by weight name, not copied

    def restore(self, saved: "SavedState") -> None: ...


class FrozenNetwork(Protocol):
    """A network that is loaded and frozen, before its blocks are compiled and swapped."""

    @property
    def dit(self) -> "nn.Module": ...

    @property
    def expert(self) -> "Expert": ...


class NetworkLoading(Protocol):
    """Load the networks of a run, and further ones."""

    def load(self, family: "Family", index: int) -> FrozenNetwork: ...  # of an expert

    def dress_blocks(self, network: Any) -> None: ...  # one that `load` returned


class HookedModel(Protocol):
    """The loaded networks of a run with what is trained, before a state is restored."""

    average: Average | None

    @property
    def plan(self) -> PlannedRun: ...

    @property
    def loading(self) -> NetworkLoading: ...

    @property
    def adapters(self) -> "Sequence[AddedLoras]": ...  # of --training_adapter, in the trained networks

    @property
    def compute_dtype(self) -> "torch.dtype": ...

    @property
    def options(self) -> OptionsOfRun: ...

    @property
    def hooks(self) -> "Hooks": ...

    @property
    def networks(self) -> "Sequence[nn.Module]": ...  # that are trained

    @property
    def trainable(self) -> "Trainable": ...

    @property
    def optimizer(self) -> "Optimizer": ...

    @property
    def takes_part_in_saving(self) -> bool: ...


@dataclass(frozen=True)
class MergedLoras:
    """LoRAs that are merged into a transformer while it is loaded."""

    uses: "Sequence[LoraUse]" = ()
    rounding: str = "auto"  # a value of --lora_rounding


@dataclass(frozen=True)
class GradientStep:
    """A step whose gradients are summed, before the weights are stepped."""

    loss: "Tensor"  # its mean: a number on the device
    keys: tuple[str, ...]  # of the items of this process
    kind: str  # its transformers, and whether it has sound: norms of different kinds are not compared


@dataclass
class RunEnd:
    """Hold how far a run has come, for features that act when it is over, even if it failed while loading."""

    options: OptionsOfRun
    is_due: bool = False  # features act in this process: the first one, once all have joined
    progress: "Progress | None" = None  # None: there is no plan yet
    total_steps: int | None = None  # None: not known yet
    has_begun: bool = False  # a wrong option is an error of the run from here on
    error: BaseException | None = None  # that has ended it


@dataclass
class Tally:
    """Further numbers of a micro-batch for the logs, from its passes to its row."""

    names: tuple[str, ...]
    numbers: "Tensor | None" = None  # of the last passes, one for each name: means

    def take(self) -> "Tensor | None":
        taken = self.numbers
        self.numbers = None
        return taken


OnNoise = Callable[["torch.Size", int, int], "Tensor"]
BeforeStep = Callable[[HookedRun, GradientStep, "Tensor"], str]
OnBatch = Callable[["Randomness", "NoisyBatch"], "NoisyBatch"]
LearningPass = Callable[["nn.Module", "NoisyBatch"], AbstractContextManager[None]]
MakeTarget = Callable[["TrainingPasses", "NoisyBatch", "Tensor"], "Tensor"]
Compare = Callable[["TrainingPasses", "NoisyBatch"], "Sequence[TargetComparison]"]
Revise = Callable[["TrainingPasses", "NoisyBatch", "list[TargetComparison]"], "list[TargetComparison]"]
MorePasses = Callable[["TrainingPasses", "NoisyBatch"], "Iterator[Streams]"]


@dataclass(frozen=True)
class Hooks:
    """The points of a run at which features act. At each, they act in the order of their list."""

    # given the shape of latents, the seed of the run and the number of the micro-batch: further noise of the
    # input, which is not to be predicted
    on_noise: list[OnNoise] = field(default_factory=list)
    # given what draws a micro-batch, and the drawn one: the one in its place. Workers get these functions
    on_batch: list[OnBatch] = field(default_factory=list)
    before_load: list[Callable[[PlannedRun], None]] = field(default_factory=list)  # texts are encoded here
    # given the records of all options, as they are resolved: entered before the first step
    recorders: list[Callable[[PlannedRun, Sequence[Any]], "Recorder"]] = field(default_factory=list)
    # given each network to train, once its trained part is in it
    before_dress: list[Callable[[FrozenNetwork], None]] = field(default_factory=list)
    after_load: list[Callable[[HookedModel], None]] = field(default_factory=list)
    kept_attributes: set[str] = field(default_factory=set)  # see `kept_samples` in targets/passes.py
    # given the passes of a step, its batch and the velocity: what samples are compared with in place of it,
    # in validation too
    own_targets: list[MakeTarget] = field(default_factory=list)
    # likewise, in training only, once those have acted
    make_target: list[MakeTarget] = field(default_factory=list)
    # given the passes of a step and its batch: what the prediction is compared with besides the clip
    compare: list[Compare] = field(default_factory=list)
    # given all these comparisons too, that with the clip first: those in their place
    revise_comparisons: list[Revise] = field(default_factory=list)
    # likewise: errors of each sample in passes with gradients that come before the usual one
    further_passes: list[MorePasses] = field(default_factory=list)
    other_passes: list[MorePasses] = field(default_factory=list)  # likewise, in place of the usual one
    # given the DiT and its batch: what a pass with gradients runs in
    learning_pass: list[LearningPass] = field(default_factory=list)
    # given the norm of the gradients before clipping: why the step is not taken, as the history has it; ""
    # takes it. All processes answer alike. With such a hook each step waits for the device
    before_step: list[BeforeStep] = field(default_factory=list)
    after_step: list[Callable[[], None]] = field(default_factory=list)  # only of those that are taken
    tallies: list[Tally] = field(default_factory=list)
