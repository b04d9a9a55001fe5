"""Options of how often single items are drawn, and what a state keeps of it."""

from dataclasses import dataclass, field
from typing import Any

from modules.options import HABIT, option
from training.features.contract import AT_WEIGHTS, FeatureOptions


def is_measured(options: "ItemTurnsOptions") -> bool:
    """Return whether the losses of items decide about their turns."""
    return options.rest_learned is not None or options.set_aside_noisy


class ItemTurnsOptions(FeatureOptions, title="turns of items", at=AT_WEIGHTS, facts=HABIT):
    """Options that change how often single images and clips are drawn while the run trains."""

    rest_learned: float | None = option(
        "draw an item in a quarter of its turns once its loss at equal noise stays flat, this share below "
        "its loss at the start",
        above=0,
        below=1,
        metavar="SHARE",
        hint="0.3 is a beginning",
    )
    set_aside_noisy: bool = option(
        "set an item aside if its loss at equal noise has not fallen in three rounds while that of most "
        "others has"
    )
    items_every: int = option(
        "measure all items every N steps for --rest_learned and --set_aside_noisy",
        default=100,
        minimum=1,
        maximum=1_000_000,
        metavar="N",
        acts_if={"there is neither --rest_learned nor --set_aside_noisy": is_measured},
    )
    items_floor: float = option(
        "share of the items that keep all their turns in any case",
        default=0.5,
        above=0,
        maximum=1,
        metavar="SHARE",
        acts_if={"there is neither --rest_learned nor --set_aside_noisy": is_measured},
    )
    watch_items: bool = option(
        "act on a file OUTPUT_NAME.items in --output_dir, whose lines set items aside, take them back or "
        "recaption them: aside NAME, back NAME, caption NAME: TEXT"
    )


@dataclass
class ItemTurnsProgress:
    """Losses and turns of items, in saved states; field names are part of the state format."""

    item_start_losses: dict[str, float] = field(default_factory=dict)
    item_round_losses: dict[str, list[float]] = field(default_factory=dict)  # of the last rounds
    item_turns: dict[str, float] = field(default_factory=dict)  # share of their turns, of those below 1
    items_of_user: list[str] = field(default_factory=list)  # decided by a request, so not by their losses
    # new captions by item: index of the table, stem of the source, caption, name of the text cache or ""
    item_captions: dict[str, list[Any]] = field(default_factory=dict)
    item_changes: list[list[Any]] = field(default_factory=list)  # see `training/reports/item_turns.py`
