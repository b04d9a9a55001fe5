"""What a feature of a training is: one record, of which each phase of a run reads its part.

A feature is one light file, or one with a heavy half next to it, and its lines in
`training/features/__init__.py`. Without these every script does all the rest as before. No phase names a
feature: what a run asks all features for is in `composing.py`, where features act in it is in `hooks.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modules.options import Options, is_given, option_name
from training.learning_options import NO_FROZEN_MODEL

if TYPE_CHECKING:  # --help does without torch
    from contract.family import Family
    from contract.rules import Expert
    from dataset.batches.items import TrainingItem
    from dataset.table import DatasetTable
    from modules.pages.charts import Chart
    from running.ways.contract import FurtherModel
    from training.data.feed import BatchSources
    from training.data.live import LiveTexts
    from training.features.hooks import Hooks, LearningPass, MergedLoras, OptionsOfRun, RunEnd
    from training.loss import NoisyBatch
    from training.other_families import OtherFamilies
    from training.reports.history import Story
    from training.reports.page import Tile
    from training.saving.files import Publisher
    from training.steps import Progress

T = TypeVar("T")

# of `Feature.place`: in --help behind the options of the network, which whole models refuse; of timesteps; of
# the loss; of saving and samples; before those of the page; behind them; of metadata
AT_NETWORK, AT_NOISE, AT_LOSS = "network", "noise", "loss"
AT_WEIGHTS, AT_LOGS, AT_ENDING, AT_METADATA = "weights", "logs", "ending", "metadata"

# of `Feature.needs`: what batches have besides pictures and captions
EMPTY_PROMPT, WORSE_ONES = "the empty prompt", "the worse one of each pair"
DROPPED_CAPTIONS = "captions as they are before dropout"

# of `custom_attributes` of a table: its samples stay as the model without the network predicts them
KEPT = "diff_output_preservation"

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


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
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
    # given a run's options and its model: the one in its place. Raises OptionError if it cannot be
    model: "Callable[[OptionsOfRun, Family], Family] | None" = None
    # raises OptionError for options of others that do not go with it; asked only if it is on
    refuse: "Callable[[OptionsOfRun], None] | None" = None
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
    # of custom_attributes of a table: what it reads
    attributes: tuple[str, ...] = ()
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
    install: "Callable[[Hooks, OptionsOfRun, Progress], None] | None" = None
    average: str = ""  # the short name of an average of the weights that it has the run keep
    samples_average: Callable[[Any], bool] | None = None  # given its options: whether samples show it
    # given its options: what passes on each saved file and state; None: nothing is passed on
    publisher: "Callable[[Any], Publisher | None] | None" = None
    # given its options, what --resume says, and a folder to write into: the state if it fetches it, else None
    fetch_state: Callable[[Any, str, Path], Path | None] | None = None
    # acts when the run is over, however that is; in the main process only
    at_end: "Callable[[RunEnd], None] | None" = None
    # given its options and a batch: the passes with gradients of --plan, whose batch has no content
    rehearse: "Callable[[Any, NoisyBatch], LearningPass] | None" = None
