"""What a feature of a training is: one record, of which each phase of a run reads its part.

A feature is one light file, or one with a heavy half next to it, and its lines in
`training/features/__init__.py`. Without these every script does all the rest as before. No phase names a
feature: what a run asks all features for is in `composing.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from modules.options import Options, is_given, option_name
from training.learning_options import NO_FROZEN_MODEL

if TYPE_CHECKING:  # --help does without torch
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from contract.family import Family
    from contract.rules import Expert
    from dataset.batches.items import TrainingItem
    from dataset.table import DatasetTable
    from modules.pages.charts import Chart
    from networks.added import AddedLoras
    from networks.loading import LoraUse
    from running.options import TrainingSpeedOptions
    from running.ways.contract import FurtherModel
    from training.data.feed import BatchSources, Randomness
    from training.data.live import LiveTexts
    from training.learning_options import WholeDitOptions
    from training.loss import NoisyBatch
    from training.noise_options import LossOptions, TimestepOptions
    from training.other_families import OtherFamilies
    from training.reports.history import Story
    from training.reports.logs import Recorder
    from training.reports.page import Tile
    from training.run_options import LogOptions, LoopOptions
    from training.saving.files import Publisher
    from training.saving.options import SavingOptions
    from training.saving.states import SavedState
    from training.steps import Progress, StepPlan
    from training.targets.passes import Streams, TargetComparison, TrainingPasses
    from training.trainable import Trainable

T = TypeVar("T")

# of `Feature.place`: in --help behind the options of the network, which whole models refuse; of timesteps; of
# the loss; of saving and samples; before those of the page; behind them; of metadata
AT_NETWORK, AT_NOISE, AT_LOSS = "network", "noise", "loss"
AT_WEIGHTS, AT_LOGS, AT_ENDING, AT_METADATA = "weights", "logs", "ending", "metadata"

# of `Feature.needs`: what batches have besides pictures and captions
EMPTY_PROMPT, WORSE_ONES = "the empty prompt", "the worse one of each pair"
DROPPED_CAPTIONS = "captions as they are before dropout"

# time of a pass without gradients as a share of one with: a LoRA's backward pass takes as long as the forward
# pass; with checkpointed blocks, or if the model itself learns, twice as long
SHARES = 1 / 3, 1 / 2


@dataclass(frozen=True)
class StepPasses:
    """Count the passes of a micro-batch, at most."""

    with_gradients: int = 1
    without: int = 0
    size: int = 1  # of a pass, in micro-batches

    def plus(self, further: "StepPasses") -> "StepPasses":
        return StepPasses(
            with_gradients=self.with_gradients + further.with_gradients,
            without=self.without + further.without,
            size=self.size * further.size,
        )

    @property
    def words(self) -> str:
        """Return the numbers, and the time of a step as a multiple of that of a plain one."""
        low, high = (self.size * (self.with_gradients + share * self.without) for share in SHARES)
        size = " of batches twice as large" if self.size > 1 else ""
        counts = f"{self.with_gradients} with gradients, {self.without} without{size}"
        return f"{counts}: about {low:.1f} to {high:.1f} times a plain step"


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
    def whole_dit(self) -> "WholeDitOptions | None": ...

    @property
    def saving(self) -> "SavingOptions": ...

    @property
    def loss(self) -> "LossOptions": ...

    @property
    def typed_targets(self) -> list[str]: ...

    @property
    def logs(self) -> "LogOptions": ...


def given_values(options: Options) -> dict[str, Any]:
    """Return the options of a record that are given, by name, for the metadata of files."""
    return {
        option_name(declared): _without_folders(getattr(options, declared.name))
        for declared in fields(options)
        if is_given(options, declared)
    }


def _without_folders(value: Any) -> Any:
    """Return a value with the names of files in place of their paths, which are nobody's business."""
    if isinstance(value, tuple):
        return " ".join(str(_without_folders(item)) for item in value)
    return value.name if isinstance(value, Path) else value


class PlannedRun(Protocol):
    """A run before its networks are loaded, as far as features use it."""

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


@dataclass(frozen=True)
class Feature:
    """A feature of a training. All but name, options, place and `is_on` may be left out."""

    name: str
    options: type[Options]  # declared in its file; parser, --config_file and --help are composed of the list
    place: str  # of its options in --help
    is_on: Callable[[Any], bool]  # given its options
    facts: Mapping[str, Any] = field(default_factory=dict)  # of all its options: HABIT, FREE and the like
    options_by_expert: type[Options] | None = None  # those for the second of two transformers
    why_not_whole: str = NO_FROZEN_MODEL  # why whole models refuse options of AT_NETWORK
    options_of_run: type[Options] | None = None  # those that `run` has too, and hands to its training
    # raises OptionError for options of others that do not go with it; asked only if it is on
    refuse: Callable[[OptionsOfRun], None] | None = None
    # shows something in place of a training, which then needs no data; its last argument reads the tables of
    # the dataset, none if there is no dataset
    show: "Callable[[OptionsOfRun, Family, Callable[[], Sequence[DatasetTable]]], None] | None" = None
    # given its options, before processes are joined: raises UserError for a package or file that is missing
    check_start: Callable[[Any], None] | None = None
    # given its options, the model and the numbers of its blocks, which may be unknown: raises OptionError
    check: Callable[[Any, "Family", Sequence[int]], None] | None = None
    # its options that act between the blocks of a transformer: models without such blocks refuse them
    of_blocks: tuple[str, ...] = ()
    # given its options: those that ask for a target besides the clip, as they are typed
    target: Callable[[Any], str] | None = None
    # given its options: the passes of its target, in addition to the usual ones
    passes: Callable[[Any], StepPasses] | None = None
    # given a run's options, model and other models: raises UserError for files of the feature. Loads nothing
    check_files: "Callable[[OptionsOfRun, Family, OtherFamilies], None] | None" = None
    # given the tables of a run: raises OptionError for those that do not go with its options
    check_tables: "Callable[[OptionsOfRun, Sequence[DatasetTable]], None] | None" = None
    # given the tables of a run: whether batches of it need the model without the network
    needs_base: "Callable[[Sequence[DatasetTable]], bool] | None" = None
    replaces_clip: bool = False  # it says what to learn in place of the clip, which only one feature may
    # given its options: whether what it learns towards keeps that a transformer was distilled for few steps
    keeps_steps: Callable[[Any], bool] | None = None
    needs: tuple[str, ...] = ()  # what its batches have: EMPTY_PROMPT, WORSE_ONES, DROPPED_CAPTIONS
    # given its options: further conditions that its passes see, as `Batch.view`
    view: Callable[[Any], str] | None = None
    # likewise, a further frozen transformer that it loads, of the size of the trained one
    further_model: "Callable[[Any], FurtherModel | None] | None" = None
    joins_streams: bool = False  # its passes have one loss of picture and sound
    # given its options and the text encoders that work while training: raises OptionError
    check_texts: "Callable[[Any, LiveTexts | None], None] | None" = None
    # given its options, the items to learn and where they are read from: raises UserError
    check_items: "Callable[[Any, Sequence[TrainingItem], BatchSources], None] | None" = None
    # given the items to learn, if it is off: logs which parts of them are for it alone
    note_unused: "Callable[[Sequence[TrainingItem]], None] | None" = None
    # given its options and a transformer: what is merged into this one, frozen or not, while it is loaded
    merged: "Callable[[Any, Expert], MergedLoras] | None" = None
    # given its options: whether that may undo that a transformer was distilled for few steps
    undoes_distillation: Callable[[Any], bool] | None = None
    # given its options: further settings that a resumed run may change, in words, by name
    habits: Callable[[Any], Mapping[str, Any]] | None = None
    # given its options: its line among the targets in the box at the start of a run
    describe: Callable[[Any], str] | None = None
    # likewise, its line behind all others
    start_row: Callable[[Any], tuple[str, str]] | None = None
    progress: type[Any] | None = None  # a dataclass: what it remembers in `Progress`, and in states
    # given the story of any run and the largest number of points of a curve: its diagrams on the page
    charts: "Callable[[Story, int], list[Chart]] | None" = None
    tile: "Callable[[Story], Tile | None] | None" = None  # likewise, its number at the top of the page
    # given its options and the run's progress: entries of each saved file, without the `ss_` of their names
    metadata: Callable[[Any, "Progress"], Mapping[str, Any]] | None = None
    images_record_it: bool = False  # image trainers have these entries if it is off too
    # given the run's progress: its line in the box at the end of a run
    result: Callable[["Progress"], tuple[str, str]] | None = None
    # given its options: a command that may follow a finished run, in words, with its heading
    command_at_end: Callable[[Any], tuple[str, Sequence[str]] | None] | None = None
    # a sentence for the error of a loss or norm that is NaN or infinite
    remedy_of_bad_step: str = ""
    # puts its functions into the hooks of a run
    install: Callable[[Hooks, OptionsOfRun, "Progress"], None] | None = None
    average: str = ""  # the short name of an average of the weights that it has the run keep
    samples_average: Callable[[Any], bool] | None = None  # given its options: whether samples show it
    # given its options: what passes on each saved file and state; None: nothing is passed on
    publisher: "Callable[[Any], Publisher | None] | None" = None
    # given its options, what --resume says, and a folder to write into: the state if it fetches it, else None
    fetch_state: Callable[[Any, str, Path], Path | None] | None = None
    # acts when the run is over, however that is; in the main process only
    at_end: Callable[[RunEnd], None] | None = None
    # given its options and a batch: the passes with gradients of --plan, whose batch has no content
    rehearse: Callable[[Any, "NoisyBatch"], LearningPass] | None = None
