"""What features contribute to a run, and what they can read from it.

A feature gets a `RunFeatures` and adds functions to its `Hooks`, which lists the points of a run in order.
The protocols before them describe the parts of a run and its networks that features use.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Protocol, TypeVar

from training.features.phases import Additions, Given, Result, RunPhase, Subject, call_between
from training.features.step_targets import PassCounts, StepTarget
from training.reports.metric_charts import MetricChart, MetricTile

if TYPE_CHECKING:  # features are loaded one by one, and without torch
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from dataset.batches.items import TrainingItem
    from dataset.batches.order import BatchOrder
    from dataset.options import CachingInRunOptions
    from dataset.sources.decoding import DecodedMedia
    from dataset.subset_options import SubsetOptions
    from dataset.table import DatasetConfig, DatasetTable
    from networks.gated_loras import AddedLoras
    from networks.loading import WeightedLora
    from networks.lora_format import LoraFormat
    from networks.options import NetworkOptions
    from protocols.data import MediaEncoders
    from protocols.family import Caches, Described, Family
    from protocols.family_networks import CustomNetwork
    from protocols.rules import Expert
    from runtime.options import TrainingSpeedOptions
    from runtime.ways.contract import FurtherModel
    from training.data.feed import BatchSources, NoiseSampler
    from training.data.live import LiveTextEncoders
    from training.learning_options import ExpertTrainingOptions, FullDitOptions, PartsOptions
    from training.loss import NoisyBatch
    from training.noise_options import LossOptions, TimestepOptions
    from training.optimizers.lr_schedule import LrSchedule
    from training.other_models import OtherFamilies
    from training.reports.logs import Recorder
    from training.run_options import LogOptions, LoopOptions, SampleOptions
    from training.saving.files import Names, Publisher
    from training.saving.options import SavingOptions
    from training.saving.states import SavedState
    from training.steps import Progress, StepPlan
    from training.trainable import Trainable

T = TypeVar("T")


class RunOptionsProtocol(Protocol):
    """The options of a run that features read."""

    def of(self, kind: type[T]) -> T:
        """Return the options record of a feature, by its class."""

    @property
    def is_fused(self) -> bool:
        """Whether weights are stepped inside the backward pass (--fused_backward_pass)."""

    @property
    def loop(self) -> "LoopOptions":
        """Length of the run, batches and gradient checkpointing."""

    @property
    def speed(self) -> "TrainingSpeedOptions":
        """Memory and speed: attention, precision, block swap, compilation."""

    @property
    def timesteps(self) -> "TimestepOptions":
        """Options of the timestep distribution."""

    @property
    def weighted_by(self) -> str:
        """Rule for weighting the loss by noise level, one of the names in `training.noise_options`."""

    @property
    def is_for_images(self) -> bool:
        """Whether the script trains an image model, and so has the options of image trainers."""

    @property
    def network(self) -> "NetworkOptions | None":
        """Options of the trained LoRA; None if no LoRA is trained."""

    @property
    def caching(self) -> "CachingInRunOptions | None":
        """Options of caches made by the training command; None in scripts that cannot make them."""

    @property
    def lora_parts(self) -> "PartsOptions | None":
        """Options that select which networks get a LoRA; None if text encoders cannot have one."""

    @property
    def by_expert(self) -> "ExpertTrainingOptions":
        """Options of the two experts (high-noise and low-noise DiT); defaults for families with one DiT."""

    @property
    def subset(self) -> "SubsetOptions | None":
        """Options of image trainers for their subsets; None for video trainers."""

    @property
    def full_dit(self) -> "FullDitOptions | None":
        """Options of full fine-tuning; None if the DiT itself is not trained."""

    @property
    def saving(self) -> "SavingOptions":
        """Options of saving files and states."""

    @property
    def loss(self) -> "LossOptions":
        """Options of the loss function."""

    @property
    def samples(self) -> "SampleOptions":
        """Schedule and prompt file of the samples."""

    @property
    def logs(self) -> "LogOptions":
        """Options of logging, such as trackers and the log folder."""


class PlannedRun(Protocol):
    """Attributes that features use in a run whose networks are not loaded yet."""

    @property
    def training(self) -> "Sequence[TrainingItem]":
        """Items for training, without those for validation."""

    @property
    def validation(self) -> "Sequence[TrainingItem]":
        """Held-out items for the validation loss."""

    @property
    def order(self) -> "BatchOrder":
        """Order of the batches in each epoch."""

    @property
    def sources(self) -> "BatchSources":
        """Caches and live encoders from which batches are read."""

    @property
    def config(self) -> "DatasetConfig":
        """Content of the dataset file."""

    @property
    def steps(self) -> "StepPlan":
        """Number of steps and epochs, and the micro-batches of each step."""

    @property
    def family(self) -> "Family":
        """The model family."""

    @property
    def options(self) -> RunOptionsProtocol:
        """Options of the run, which never change."""

    @property
    def other_families(self) -> "OtherFamilies":
        """Functions that create the family with different model files, such as the DiT of a teacher."""

    @property
    def progress(self) -> "Progress":
        """Current step and epoch: the only part of a plan that changes during training."""

    @property
    def accelerator(self) -> "Accelerator":
        """Accelerate's `Accelerator`: processes, device and mixed precision of the run."""

    @property
    def names(self) -> "Names":
        """Names of the files that the run saves."""

    @property
    def lora_format(self) -> "LoraFormat | None":
        """Tensor names and layout of saved LoRA files; None for a network of another package."""


class Average(Protocol):
    """Moving average of the trained weights, saved next to each file and in states."""

    steps: int  # number of averaged steps

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata entries of files with averaged weights."""

    def begin(self) -> None:
        """Restart the average from the current weights."""

    def after_step(self) -> None:
        """Count a step, and update the average if it is due."""

    def in_place(self) -> AbstractContextManager[None]:
        """Replace the parameters' values with their average during the block."""

    def tensors(self) -> "dict[str, Tensor]":
        """Return the averages by weight name, without copying them."""

    def restore(self, saved: "SavedState") -> None:
        """Load the average from a saved state."""


class AuxiliaryLearner(Protocol):
    """Parameters trained alongside the LoRA (such as an embedding), saved in its files and in states."""

    @property
    def module(self) -> "nn.Module":
        """Module with the trained parameters; states of the run contain its state dict."""

    def group(self, learning_rate: float) -> dict[str, Any]:
        """Return the parameter group of these parameters for the optimizer, with their learning rate."""

    def tensors(self) -> "dict[str, Tensor]":
        """Return the tensors to add to a LoRA file, by name."""

    def tensors_for_lora_file(self) -> "dict[str, Tensor]":
        """Return `tensors()` for a LoRA file, and log how to use that file."""

    def add_to(
        self, trainable: "Trainable", learning_rate: float, total_steps: int, device: "torch.device"
    ) -> "Trainable":
        """Return `trainable` with these parameters added, after moving them to the device."""


class FrozenNetwork(Protocol):
    """A network that is loaded and frozen, before its blocks are compiled and swapped."""

    @property
    def dit(self) -> "nn.Module":
        """The loaded transformer, without gradients."""

    @property
    def expert(self) -> "Expert":
        """The network's expert, with its noise levels."""


class NetworkLoading(Protocol):
    """Interface for loading the trained networks of a run, and additional ones such as a teacher."""

    def load(self, family: "Family", index: int) -> FrozenNetwork:
        """Load the network of the expert at `index` and freeze it."""

    def set_up_blocks(self, network: Any) -> None:
        """Compile, checkpoint and swap the blocks of a network from `load`, according to the options."""


class HookedModel(Protocol):
    """Loaded networks and trained parameters of a run; features get this before a state is restored."""

    average: Average | None

    @property
    def plan(self) -> PlannedRun:
        """The run's plan, made before the networks were loaded."""

    @property
    def loader(self) -> NetworkLoading:
        """Loader of additional networks, with the settings of the run."""

    @property
    def adapters(self) -> "Sequence[AddedLoras]":
        """LoRAs of --training_adapter in the trained networks."""

    @property
    def compute_dtype(self) -> "torch.dtype":
        """Dtype in which the network computes: autocast's, or without autocast the weights' dtype."""

    @property
    def options(self) -> RunOptionsProtocol:
        """Options of the run, which never change."""

    @property
    def networks(self) -> "Sequence[nn.Module]":
        """Transformers that are trained or contain the trained LoRA, in the order of the experts."""

    @property
    def trainable(self) -> "Trainable":
        """The trained parameters."""

    @property
    def optimizer(self) -> "Optimizer":
        """The optimizer of all trained parameters."""

    @property
    def schedule(self) -> "LrSchedule":
        """The schedule of the learning rates."""

    @property
    def takes_part_in_saving(self) -> bool:
        """Whether this process takes part in saving: the main one, and any that has part of the weights."""


@dataclass(frozen=True)
class MergedLoras:
    """LoRAs that are merged into a transformer while it is loaded."""

    uses: "Sequence[WeightedLora]" = ()
    rounding: str = "auto"  # a value of --lora_rounding


@dataclass
class RunEnd:
    """Progress of a run, passed to features at its end, even if loading failed."""

    run: "RunFeatures"
    is_due: bool = False  # whether features act in this process: only in the first, after all have joined
    progress: "Progress | None" = None  # None: there is no plan yet
    total_steps: int | None = None  # None: not known yet
    has_begun: bool = False  # if so, a wrong option is an error of the run
    is_finished: bool = False  # after the last step, or because a feature ended the run, not a user
    error: BaseException | None = None  # the error that ended the run


@dataclass
class Tally:
    """Named metrics of a micro-batch, recorded by its forward passes for the logs."""

    names: tuple[str, ...]
    # how the page shows them
    charts: Sequence[MetricChart] = ()
    tiles: Sequence[MetricTile] = ()
    metrics: "Tensor | None" = None  # means over the last passes, one for each name

    def take(self) -> "Tensor | None":
        """Return and clear the metrics that the micro-batch's passes recorded; None if there are none."""
        taken = self.metrics
        self.metrics = None
        return taken


@dataclass
class RunInfo:
    """Descriptions that features add to the console boxes, the file metadata and the page of a run."""

    in_files: dict[str, Any] = field(default_factory=dict)  # metadata of saved files, whose names get `ss_`
    for_loading: dict[str, Any] = field(default_factory=dict)  # entries without the prefix, always written
    targets: list[str] = field(default_factory=list)  # lines after those of `RunFeatures.targets`
    at_start: dict[str, str] = field(default_factory=dict)  # last lines of the box at the start
    commands: dict[str, Sequence[str]] = field(default_factory=dict)  # next commands, in words, by heading


@dataclass(frozen=True)
class AverageInfo:
    """Properties of a moving average of the weights that other parts of a run need."""

    name: str  # short name, such as "EMA"
    is_sampled: bool  # whether samples are generated with the average


class Storage(Protocol):
    """Interface of remote storage, to which files are uploaded and from which states are downloaded."""

    def make_publisher(self) -> "Publisher | None":
        """Return the publisher of saved files; None if they stay on this machine."""

    # `name` is the value of --resume
    def fetch_state(self, name: str, folder: Path) -> Path | None:
        """Download the state `name` into `folder` and return its path; None if states are not remote."""


OnNoise = Callable[["torch.Size", int, int], "Tensor"]
OnBatch = Callable[["NoiseSampler", "NoisyBatch"], "NoisyBatch"]
# arguments after the encoders: the seed of the run, and whether the vectors get initial values
MakeAuxiliaryLearner = Callable[["Mapping[str, nn.Module]", int, bool], AuxiliaryLearner]
# changes the tensors of an image that is encoded at each step
OnMedia = Callable[
    ["Caches", "MediaEncoders", "DecodedMedia", str, "Mapping[str, Tensor]"], "dict[str, Tensor]"
]


@dataclass(frozen=True)
class Hooks:
    """Callbacks that features register, one list per point of a run; each list is called in order."""

    # may load torch, and adds further functions to these lists; also called when memory is measured
    start: "list[Callable[[RunFeatures], None]]" = field(default_factory=list)
    # given the model of the run, return the model to use instead. Raises OptionError if that is impossible
    family: "list[Callable[[Family], Family]]" = field(default_factory=list)
    # given the model and its numbers of blocks, which may be unknown: raises OptionError
    check: "list[Callable[[Family, Sequence[int]], None]]" = field(default_factory=list)
    # given the model and other models: raises UserError for files and packages. Loads no network
    check_files: "list[Callable[[Family, OtherFamilies], None]]" = field(default_factory=list)
    # given the text encoders that run during training: raises OptionError
    on_text_encoders: "list[Callable[[LiveTextEncoders | None], None]]" = field(default_factory=list)
    # given the run with its items, before a network is loaded: raises UserError; texts are encoded here
    plan: list[Callable[[PlannedRun], None]] = field(default_factory=list)
    # given the run, and its options records after defaults are resolved: entered before the first step
    recorders: list[Callable[[PlannedRun, Sequence[Any]], "Recorder"]] = field(default_factory=list)
    # given the loaded text encoders that learn a new word, by the prefixes of their names in LoRA files
    auxiliary_learners: list[MakeAuxiliaryLearner] = field(default_factory=list)
    # given each network to train, after its trained part was added
    before_setup: list[Callable[[FrozenNetwork], None]] = field(default_factory=list)
    after_load: list[Callable[[HookedModel], None]] = field(default_factory=list)
    # given the model, its encoders, a decoded image, a key that seeds random numbers and the image's tensors,
    # return the tensors to use instead. Only for images that are encoded at each step
    media: list[OnMedia] = field(default_factory=list)
    # given the shape of latents, the seed of the run and the number of the micro-batch, return additional
    # noise for the input, which is not predicted
    noise: list[OnNoise] = field(default_factory=list)
    # given a `NoiseSampler` and a drawn micro-batch, return the micro-batch to use instead. These functions
    # are also sent to data loader workers
    batch: list[OnBatch] = field(default_factory=list)
    # called after the run went back to a saved state, with its step; in all processes
    rewind: list[Callable[[int], None]] = field(default_factory=list)
    # called when the run is over, even if it failed; in the main process only
    end: list[Callable[[RunEnd], None]] = field(default_factory=list)


@dataclass
class RunFeatures:
    """Hooks, training targets and descriptions that active features add to a run."""

    options: RunOptionsProtocol
    # tables of the dataset, and the model; empty and None before `on.start`, when they are not known
    tables: "Sequence[DatasetTable]" = ()
    family: "Described | None" = None
    # additional parts of batches, and predictions, that passes need: EMPTY_PROMPT, REJECTED_ONES, ...
    needs: set[str] = field(default_factory=set)
    targets: list[StepTarget] = field(default_factory=list)
    # whether a target or a merged LoRA keeps the ability of a transformer that was distilled for few steps
    keeps_few_step_ability: bool = False
    condition_set: str = ""  # additional conditions of passes, as `Batch.condition_set`
    mask_input_option: str = ""  # option that uses the masks of tables as inputs instead of loss weights
    # given all captions, return a note on those from which nothing is learned, or ""; raises DatasetError
    caption_checks: list[Callable[[Sequence[str]], str]] = field(default_factory=list)
    embedding_words: list[str] = field(default_factory=list)  # trained words that have their own files
    further_models: "list[FurtherModel]" = field(default_factory=list)  # frozen, as large as the trained one
    average: AverageInfo | None = None
    # given a transformer's expert, return the LoRAs to merge while it is loaded, whether it is trained or not
    merge: "Callable[[Expert], MergedLoras] | None" = None
    # shows something instead of training, so the run needs no data; its last argument is a function that
    # reads the tables of the dataset; none if there is no dataset
    show: "Callable[[RunOptionsProtocol, Family, Callable[[], Sequence[DatasetTable]]], None] | None" = None
    # given the model, return the network that is trained instead of a LoRA, as part of the text encoders
    lora_replacement: "Callable[[Described], CustomNetwork] | None" = None
    # given the entries of the prompt file, return those to sample
    sample_entries: "list[Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]]" = field(
        default_factory=list
    )
    storage: Storage | None = None
    # creates the dataset instead of reading the user's
    make_data: "Callable[[], DatasetConfig] | None" = None
    # dataclasses kept in `Progress` and saved in states
    progress_records: list[type] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    info: RunInfo = field(default_factory=RunInfo)
    on: Hooks = field(default_factory=Hooks)
    added: "dict[RunPhase[Any, Any, Any], Additions]" = field(
        default_factory=dict
    )  # what features add to phases

    def before(
        self, phase: "RunPhase[Subject, Given, Result]", act: "Callable[Concatenate[Subject, Given], object]"
    ) -> None:
        """Call `act` before a phase, with the arguments of the phase."""
        self.added.setdefault(phase, Additions()).before.append(act)

    def around(
        self,
        phase: "RunPhase[Subject, Given, Result]",
        act: "Callable[Concatenate[Callable[Concatenate[Subject, Given], Result], Subject, Given], Result]",
    ) -> None:
        """Call `act` in place of a phase, with the phase as its first argument.

        `act` may call the phase, with what `before` and `after` have added, and returns the phase's result.
        A later function stands around the earlier ones.
        """
        self.added.setdefault(phase, Additions()).around.append(act)

    def after(
        self, phase: "RunPhase[Subject, Given, Result]", act: "Callable[[Subject, Result], object]"
    ) -> None:
        """Call `act` after a phase, with the phase's first argument and its result."""
        self.added.setdefault(phase, Additions()).after.append(act)

    def wrap(
        self,
        phase: "RunPhase[Subject, Given, Result]",
        function: "Callable[Concatenate[Subject, Given], Result]",
    ) -> "Callable[Concatenate[Subject, Given], Result]":
        """Return the function of a phase with what features add to it; itself if they add nothing."""
        added = self.added.get(phase)
        if added is None:
            return function
        wrapped: Any = function  # partials, not closures: data loader workers get some of them
        if added.before or added.after:
            wrapped = partial(call_between, added.before, function, added.after)
        for act in added.around:
            wrapped = partial(act, wrapped)
        return wrapped

    @property
    def has_joint_audio_loss(self) -> bool:
        """Return whether passes have a single loss for images and audio."""
        return any(target.has_joint_audio_loss for target in self.targets)

    def count_passes(self) -> PassCounts:
        """Return the number of forward passes that a micro-batch needs with all targets of the run."""
        passes = PassCounts()
        for target in self.targets:
            passes = passes.plus(target.passes)
        return passes

    def describe_targets(self) -> list[str]:
        """Describe the targets: a line for each, a line about their passes, and the lines in `info`."""
        lines = [target.description for target in self.targets]
        if self.targets:
            passes = self.count_passes()
            if passes != PassCounts():
                lines.append(f"passes in a step: {passes.description}")
        return [*lines, *self.info.targets]
