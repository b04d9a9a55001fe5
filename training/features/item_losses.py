"""Record the loss of each picture and clip: --item_losses.

How it is recorded is in `item_losses_recording.py`; `training/reports/item_losses.py` compares and shows it.
"""

from typing import TYPE_CHECKING

from modules.options import FREE, Options, option
from training.features.contract import AT_LOGS, Feature

if TYPE_CHECKING:
    from training.features.hooks import Hooks, OptionsOfRun
    from training.steps import Progress


class ItemLossOptions(Options, title="loss of each picture"):
    """Whether the loss of each picture and clip is recorded."""

    item_losses: bool = option(
        "record the loss of each picture and clip in OUTPUT_NAME-items.jsonl, a line for each time that it "
        "is learned; the page shows which are hard"
    )


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    from training.features.item_losses_recording import ItemLossRecorder  # torch: only in a training

    folder, name = options.saving.place
    recorder = ItemLossRecorder(folder, name, progress)
    hooks.revise_comparisons.append(recorder.observe)
    hooks.recorders.append(recorder.join_run)


ITEM_LOSSES = Feature(
    name="item_losses",
    options=ItemLossOptions,
    place=AT_LOGS,
    is_on=lambda options: options.item_losses,
    facts=FREE,
    install=_install,
)
