"""Learn from pairs of a better and a worse picture or clip: --preference.

The worse ones stand in caches, by worse_directory of a table. The passes are in `preference_pairs.py`.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from modules.console import count_of
from modules.errors import OptionError
from modules.options import HABIT, Options, option
from training.features.contract import AT_NETWORK, KEPT, WORSE_ONES, Feature, StepPasses, given_values

if TYPE_CHECKING:
    from contract.family import Family
    from dataset.batches.items import TrainingItem
    from dataset.table import DatasetTable
    from modules.pages.charts import Chart
    from training.data.feed import BatchSources
    from training.features.hooks import Hooks, OptionsOfRun
    from training.reports.history import Story
    from training.reports.page import Tile
    from training.steps import Progress

logger = logging.getLogger(__name__)

# numbers of each step, by their names in logs
BETTER, WORSE, RIGHT = "preference/better", "preference/worse", "preference/right"


class PreferenceOptions(Options, title="preferences"):
    """How strongly the better one of each pair is preferred."""

    preference: float | None = option(
        "learn from pairs of a better and a worse picture or clip (worse_directory in the dataset): predict "
        "the better one more exactly than the model without the network, the worse one less exactly. BETA "
        "says how soon a pair counts as learned. Two passes in each step, one of them without gradients, of "
        "batches twice as large",
        above=0,
        most=1_000_000,
        metavar="BETA",
        hint="2000 to 5000 are usual",
        known_as=("dpo", "flow_dpo", "dpo_beta", "beta_dpo"),
        facts=HABIT,
    )
    preference_data_weight: float = option(
        "also add this weight times the usual loss of the better one",
        default=0.0,
        least=0,
        most=1000,
        needs="preference",
        metavar="W",
        facts=HABIT,
    )

    @property
    def beta(self) -> float:
        assert self.preference is not None  # the feature is on
        return self.preference


def _refuse(options: "OptionsOfRun") -> None:
    targets = options.typed_targets
    if len(targets) > 1:
        raise OptionError(
            f"--preference {options.of(PreferenceOptions).beta:g} and {targets[0]}: the loss of a pair has "
            "no place for another target. Leave out one of the two"
        )


def _check(options: PreferenceOptions, family: "Family", counts: Sequence[int]) -> None:
    from contract.family import hears_sound, sound_of  # torch, as --help does without

    sound = sound_of(family)
    if sound is not None and (sound.is_alone or (hears_sound(family) and family.sound_learning.given)):
        raise OptionError(
            f"--preference {options.beta:g}: pairs are of pictures, and here one stream alone is learned. "
            "Leave it out"
        )


def _check_tables(options: "OptionsOfRun", tables: "Sequence[DatasetTable]") -> None:
    """Raise OptionError for tables that ask for another target."""
    preserving = next((table.name for table in tables if KEPT in table.attributes), None)
    if preserving is not None:
        raise OptionError(
            f"{preserving}: {KEPT} cannot be had with --preference, whose loss has no "
            "place for another target. Leave out one of the two"
        )


def _require_pairs(
    options: PreferenceOptions, items: "Sequence[TrainingItem]", sources: "BatchSources"
) -> None:
    from training.features.preference_pairs import require_pairs  # torch: only with --preference

    require_pairs(items, sources.stores, sources.encoders.commands)


def _note_unused(items: "Sequence[TrainingItem]") -> None:
    """Log the tables whose worse ones a run without --preference does not use."""
    tables = {item.table.index: item.table for item in items}.values()
    names = [table.name for table in tables if table.worse_directory is not None]
    if names:
        logger.warning(
            "%s: worse_directory has no effect in this run: it is for --preference. The better ones are "
            "learned as ever",
            ", ".join(names),
        )


def _draw_pairs(story: "Story", most: int) -> "list[Chart]":
    """Return the diagrams of the page: the errors at both of a pair, and how many are right."""
    from modules.pages.charts import Chart  # only for pages
    from training.reports.page import SMOOTHING, make_curves

    errors = {"better one": story.numbers.get(BETTER, {}), "worse one": story.numbers.get(WORSE, {})}
    right = {"right": story.numbers.get(RIGHT, {})}
    return [
        Chart(make_curves(errors, most, SMOOTHING), "step", "error", "Error at both of a pair"),
        Chart(make_curves(right, most, SMOOTHING), "step", "share", "Share of pairs that are right"),
    ]


def _show_right(story: "Story") -> "Tile | None":
    """Return how many of the latest pairs are right."""
    from training.reports.history import SHOWN  # only for pages

    shares = [share for share in story.numbers.get(RIGHT, {}).values() if share is not None]
    if not shares:
        return None
    last = shares[-SHOWN:]
    note = f"the better one is learned more; mean of the last {count_of(len(last), 'step')}"
    return "Pairs that are right", f"{sum(last) / len(last):.0%}", note


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    from training.features.hooks import Tally
    from training.features.preference_pairs import Preference, pair_passes  # torch: only with --preference

    values = options.of(PreferenceOptions)
    tally = Tally((BETTER, WORSE, RIGHT))
    hooks.tallies.append(tally)
    preference = Preference(values.beta, values.preference_data_weight)
    hooks.other_passes.append(partial(pair_passes, preference, tally))


PREFERENCE = Feature(
    name="preference",
    options=PreferenceOptions,
    place=AT_NETWORK,
    is_on=lambda options: options.preference is not None,
    facts=HABIT,
    refuse=_refuse,
    check=_check,
    target=lambda options: f"--preference {options.beta:g}",
    passes=lambda options: StepPasses(with_gradients=0, without=1, size=2),
    check_tables=_check_tables,
    needs=(WORSE_ONES,),
    joins_streams=True,
    check_items=_require_pairs,
    describe=lambda options: f"the better one of each pair, beta {options.beta:g}",
    note_unused=_note_unused,
    charts=_draw_pairs,
    tile=_show_right,
    metadata=lambda options, progress: given_values(options),
    install=_install,
)
