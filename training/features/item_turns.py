"""Draw learned items less often, set noisy ones aside, and listen to requests about items.

`item_turns_acting.py` measures the items, decides and keeps the list of who and when. The turn of an item
that rests or is set aside goes to another item of its size and table, so steps and epochs stay the same.
"""

from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from training.features.contract import NO_DATASET, Feature
from training.features.hooks import RunFeatures
from training.features.item_turns_options import ItemTurnsOptions, ItemTurnsProgress

if TYPE_CHECKING:
    from training.features.hooks import PlannedRun


def _check(run: RunFeatures, planned: "PlannedRun") -> None:
    """Raise OptionError if items cannot change their turns."""
    if NO_DATASET in run.needs:
        raise OptionError(
            "--rest_learned, --set_aside_noisy and --watch_items are about the items of a dataset, and this "
            "run has none. Omit them"
        )
    if planned.steps.in_lockstep or planned.steps.processes_per_batch > 1:
        raise OptionError(
            "--rest_learned, --set_aside_noisy and --watch_items: processes that share the transformer or "
            "the tokens of a clip cannot measure items one by one. Omit them"
        )


def _start(run: RunFeatures) -> None:
    from training.features.item_turns_acting import ItemTurns  # only in a training run

    turns = ItemTurns(run.options.of(ItemTurnsOptions))
    turns.join(run)


def _join(run: RunFeatures, options: ItemTurnsOptions) -> None:
    run.progress_records.append(ItemTurnsProgress)
    run.on.start.append(_start)
    run.on.plan.append(partial(_check, run))


ITEM_TURNS = Feature(
    name="item_turns",
    options=ItemTurnsOptions,
    is_on=lambda options: options.rest_learned is not None or options.set_aside_noisy or options.watch_items,
    join=_join,
)
