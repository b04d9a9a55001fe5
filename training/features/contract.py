"""What a feature of a training is, and how one is written.

A feature is one light file, or one with a heavy half next to it, and its two lines in
`training/features/__init__.py`. Without these every script does all the rest as before. No phase of a run
asks a feature anything: a feature that is on joins the run and writes into it, and phases read what is there.

    class BlurOptions(FeatureOptions, title="blur", at=AT_NOISE, facts=HABIT):
        blur: float | None = option("blur the noise by this much", above=0, hint="0.1 is usual")

    def _join(run: "JoinedRun", options: BlurOptions) -> None:
        if run.options.is_fused:
            raise OptionError("--blur with --fused_backward_pass: ... Leave out one of the two")
        run.info.in_files |= given_values(options)
        run.on.noise.append(partial(draw_blur, options))

    BLUR = Feature("blur", BlurOptions, is_on=lambda options: options.blur is not None, join=_join)

`_join` is called as soon as the options are read, so that what cannot be is refused at once: it raises
OptionError, and loads no torch. What needs torch joins in a function of `run.on.start`. What a run takes is
in `JoinedRun` (`hooks.py`): what its batches need, its targets, what is told of it (`info`), and the
functions of `on`, at the points that a run comes to:

    what it does not go with              raise OptionError; `on.check` of the model, `on.check_files`
    another part of batches               `needs`; `on.plan` of the run with its items
    another thing to learn towards        `targets`, with `on.target` or `on.passes`
    around a pass with gradients          `on.learning_pass`
    before and after a step               `on.before_step`, `on.after_step`
    something that learns beside          `on.beside`
    numbers of each step                  `tallies`, which say how the page shows them
    what states remember                  `remembers`
    entries of saved files, lines, boxes  `info`
    next to each saved file               `on.save`
    when the run is over                  `on.end`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from modules.options import Options, is_given, option_name
from training.features.hooks import JoinedRun
from training.learning_options import NO_FROZEN_MODEL

# of `FeatureOptions.place`: in --help behind the options of the network, which whole models refuse; of
# timesteps; of the loss; of saving and samples; before those of the page; behind them; of metadata
AT_NETWORK, AT_NOISE, AT_LOSS = "network", "noise", "loss"
AT_WEIGHTS, AT_LOGS, AT_ENDING, AT_METADATA = "weights", "logs", "ending", "metadata"

# of `JoinedRun.needs`: what batches have besides images and captions
EMPTY_PROMPT, REJECTED_ONES = "the empty prompt", "the worse one of each pair"
DROPPED_CAPTIONS = "captions as they are before dropout"
# of `JoinedRun.needs` too: batches may need the model without the network
BASE_MODEL = "the model without the network"
# of `JoinedRun.needs` too: text encoders work while training, as they learn a new word
LIVE_TEXTS = "text encoders that learn a word"
# of `JoinedRun.needs` too: images are encoded at each step, as their tensors differ each time
NO_DATASET = "no dataset, as what is learned comes from prompts"
LIVE_MEDIA = "images that are encoded at each step"

# of `custom_attributes` of a table: its samples stay as the model without the network predicts them
KEPT = "diff_output_preservation"

# of an option's facts: what it does against a loss or norm that is NaN or infinite, as a sentence
AGAINST_BAD_STEPS = "against bad steps"


class FeatureOptions(Options):
    """Base class of a feature's options; the parser, --config_file and --help are composed of all of them.

    Attributes:
        at: Where the options stand in --help, one of the constants AT_... above.
        facts: Facts that hold for all options of the record, such as whether resuming may change them (HABIT,
            FREE).
        why_not_full: Reason why full fine-tuning rejects options at AT_NETWORK.
        attribute: Key of a table's `custom_attributes` that turns the feature on.
        of_run: Record of those options that `run` has too and passes to its training.
    """

    place: ClassVar[str]
    facts: ClassVar[Mapping[str, Any]]
    why_not_full: ClassVar[str]
    attribute: ClassVar[str]
    of_run: ClassVar[type[Options] | None]

    def __init_subclass__(
        cls,
        at: str,
        title: str = "",
        facts: Mapping[str, Any] | None = None,
        why_not_full: str = NO_FROZEN_MODEL,
        attribute: str = "",
        of_run: type[Options] | None = None,
    ) -> None:
        super().__init_subclass__(title=title)
        cls.place, cls.facts = at, facts or {}
        cls.why_not_full, cls.attribute = why_not_full, attribute
        cls.of_run = of_run


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class Feature:
    """A feature of a training."""

    name: str
    options: type[FeatureOptions]
    is_on: Callable[[Any], bool]  # given its options
    join: Callable[[JoinedRun, Any], None]  # given a run and its options, if it is on


def given_values(options: Options) -> dict[str, Any]:
    """Return the options of a record that were given, by name, for the metadata of files."""
    return {
        option_name(declared): _without_folders(getattr(options, declared.name))
        for declared in fields(options)
        if is_given(options, declared)
    }


def _without_folders(value: Any) -> Any:
    """Return a value with paths reduced to file names, so that folders stay private."""
    if isinstance(value, tuple):
        return " ".join(str(_without_folders(item)) for item in value)
    return value.name if isinstance(value, Path) else value
