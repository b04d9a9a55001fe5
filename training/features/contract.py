"""What a training feature is, and how to write one.

A feature is one file without torch, or two (the second one with torch), and two lines in
`training/features/__init__.py`. Without these lines, everything else works as before. Phases of a run never
call a feature by name: an active feature adds values and functions to the run, and phases use these.

    from modules.options import HABIT, option
    from training.features.contract import AT_NOISE, Feature, FeatureOptions, given_values

    class BlurOptions(FeatureOptions, title="blur", at=AT_NOISE, facts=HABIT):
        blur: float | None = option("blur the noise by this much", above=0, hint="0.1 is usual")

    # the shape of the latents, the seed of the run, the number of the micro-batch -> noise to add, a tensor
    def draw_blur(options: BlurOptions, shape: "torch.Size", seed: int, number: int) -> "torch.Tensor": ...

    def _join(run: "RunFeatures", options: BlurOptions) -> None:
        if run.options.is_fused:
            raise OptionError("--blur with --fused_backward_pass: ... Omit one of the two")
        run.info.in_files |= given_values(options)
        run.on.noise.append(partial(draw_blur, options))

    BLUR = Feature("blur", BlurOptions, is_on=lambda options: options.blur is not None, join=_join)

`_join` is called as soon as the options are read, so that impossible combinations are rejected early: it
raises OptionError, and does not import torch; a function in `run.on.start` may. `RunFeatures` (`hooks.py`)
has what a feature can add: needs of batches, targets, information about the run (`info`), functions for the
points of a run (`on`), and functions before, around and after its phases (`phases.py`):

    conflicts with options or models      raise OptionError; `on.check`, `on.check_files`
    another part of batches               `needs`; `on.plan` of the run with its items
    another target of the loss            `targets`, with `around(TARGETS, ...)` or `around(LOSS, ...)`
    around a pass with gradients          `around(PREDICT, ...)`
    before and after a step               `after(GRADIENTS, ...)`, `before(STEP, ...)`, `after(STEP, ...)`
    other samples of each round           `sample_entries`
    samples, a save, the end of the run   `TrainingRun.request(SAMPLE, reason)`, `SAVE`, `END`
    losses of all items at equal noise    `TrainingRun.measure_items`
    other items from the next step on     `BatchOrder.set_turns`, then `TrainingRun.rereads = True`
    a text in console, page and history   `TrainingRun.note(text)`
    more trained parameters               `on.auxiliary_learners`
    logged values of each step            `tallies`, which say how the page shows them
    values in saved states                `progress_records`
    metadata of files, lines, boxes       `info`
    after files were saved                `after(SAVE, ...)`
    back to a saved state                 `TrainingRun.find_earlier_state`, `go_back`, around LOG
    after the run went back               `on.rewind`
    when the run is over                  `on.end`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from modules.options import Options, is_set, option_name
from training.features.hooks import RunFeatures
from training.learning_options import NO_FROZEN_MODEL

# values of `FeatureOptions.place`, the position in --help: after the options of the network (rejected by full
# fine-tuning), of timesteps, of the loss, of saving and samples; before and after those of the page; metadata
AT_NETWORK, AT_NOISE, AT_LOSS = "network", "noise", "loss"
AT_WEIGHTS, AT_LOGS, AT_ENDING, AT_METADATA = "weights", "logs", "ending", "metadata"

# values of `RunFeatures.needs`: additional parts of batches
EMPTY_PROMPT, REJECTED_ONES = "the empty prompt", "the worse one of each pair"
DROPPED_CAPTIONS = "captions as they are before dropout"
# further values of `RunFeatures.needs`: predictions of the model without the network
BASE_MODEL = "the model without the network"
# text encoders run during training, because they learn a new word
LIVE_TEXTS = "text encoders that learn a word"
# the run has no dataset; or images are encoded at each step, because they differ each time
NO_DATASET = "no dataset, as what is learned comes from prompts"
LIVE_MEDIA = "images that are encoded at each step"

# key of `RunInfo.in_files`: number of steps that were not taken, of a feature that can skip steps
SKIPPED_STEPS = "skipped_steps"

# key in an option's facts: a sentence on how it helps against a NaN or infinite loss or norm
AGAINST_BAD_STEPS = "against bad steps"


class FeatureOptions(Options):
    """Base class of a feature's options; the parser, --config_file and --help include all features' options.

    Attributes:
        at: Position of the options in --help, one of the constants AT_... above.
        facts: Facts about all options of the record, such as whether resuming may change them (HABIT, FREE).
        why_not_full: Reason why full fine-tuning rejects options at AT_NETWORK.
        attribute: Key of a table's `custom_attributes` that turns the feature on.
    """

    place: ClassVar[str]
    facts: ClassVar[Mapping[str, Any]]
    why_not_full: ClassVar[str]
    attribute: ClassVar[str]

    def __init_subclass__(
        cls,
        at: str,
        title: str = "",
        facts: Mapping[str, Any] | None = None,
        why_not_full: str = NO_FROZEN_MODEL,
        attribute: str = "",
    ) -> None:
        super().__init_subclass__(title=title)
        cls.place, cls.facts = at, facts or {}
        cls.why_not_full, cls.attribute = why_not_full, attribute


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class Feature:
    """An optional training feature: its options, and the function that adds its hooks to a run."""

    name: str
    options: type[FeatureOptions]
    is_on: Callable[[Any], bool]  # given its options
    join: Callable[[RunFeatures, Any], None]  # given a run and its options, if it is on


def given_values(options: Options) -> dict[str, Any]:
    """Return the options of this record that the user set, by name, for file metadata."""
    return {
        option_name(declared): _without_folders(getattr(options, declared.name))
        for declared in fields(options)
        if is_set(options, declared)
    }


def _without_folders(value: Any) -> Any:
    """Return a value with paths reduced to file names, so that folders stay private."""
    if isinstance(value, tuple):
        return " ".join(str(_without_folders(item)) for item in value)
    return value.name if isinstance(value, Path) else value
