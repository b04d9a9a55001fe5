"""Send the logged values and samples of a run to TensorBoard, wandb etc.: --logging_dir, --log_with.

`trackers_sending.py` uses accelerate's trackers; only the main process sends.
"""

from typing import TYPE_CHECKING

from modules.errors import OptionError
from training.features.contract import Feature
from training.features.hooks import RunFeatures
from training.features.trackers_options import NEEDS_FOLDER, TrackerOptions, check_trackers

if TYPE_CHECKING:
    from protocols.family import Family
    from training.other_models import OtherFamilies


def _start(run: RunFeatures) -> None:
    from training.features.trackers_sending import make_trackers  # torch: only in a training run

    run.on.recorders.append(make_trackers)


def _join(run: RunFeatures, options: TrackerOptions) -> None:
    def check(family: "Family", others: "OtherFamilies") -> None:
        check_trackers(options)

    writing = [name for name in options.trackers if name in NEEDS_FOLDER]
    if writing and options.logging_dir is None:
        raise OptionError(
            f"--log_with {options.log_with} needs --logging_dir: the folder for {writing[0]}'s files"
        )
    if options.logging_dir is not None:
        run.info.commands["Look at the curves"] = ["tensorboard", "--logdir", str(options.logging_dir)]
    run.on.start.append(_start)
    run.on.check_files.append(check)


TRACKERS = Feature(
    name="trackers",
    options=TrackerOptions,
    is_on=lambda options: options.log_with is not None or options.logging_dir is not None,
    join=_join,
)
