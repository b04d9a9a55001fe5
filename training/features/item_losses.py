"""Record the loss of each image and clip: --item_losses.

`item_losses_recording.py` records the losses; `training/reports/item_losses.py` compares and shows them.
"""

from modules.options import FREE, option
from training.features.contract import AT_LOGS, Feature, FeatureOptions
from training.features.hooks import RunFeatures
from training.features.phases import TARGETS


class ItemLossOptions(FeatureOptions, title="loss of each image", at=AT_LOGS, facts=FREE):
    """Option to record the loss of each image and clip."""

    item_losses: bool = option(
        "record the loss of each image and clip in OUTPUT_NAME-items.jsonl, one line each time it is "
        "trained on; the page shows the difficult ones"
    )


def _start(run: RunFeatures) -> None:
    from training.features.item_losses_recording import ItemLossRecorder  # torch: only in a training run

    folder, name = run.options.saving.folder_and_name
    recorder = ItemLossRecorder(folder, name)
    run.around(TARGETS, recorder.observe)
    run.on.recorders.append(recorder.join_run)
    run.on.rewind.append(recorder.rewind)


def _join(run: RunFeatures, options: ItemLossOptions) -> None:
    run.on.start.append(_start)


ITEM_LOSSES = Feature(
    name="item_losses",
    options=ItemLossOptions,
    is_on=lambda options: options.item_losses,
    join=_join,
)
