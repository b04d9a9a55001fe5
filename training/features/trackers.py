"""Send the numbers and samples of a run to TensorBoard, wandb and others: --logging_dir, --log_with.

Each is reached through the tracker of accelerate, in `trackers_sending.py`; only the main process sends.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modules.options import FREE
from training.features.contract import AT_LOGS, Feature
from training.features.trackers_options import RunTrackerOptions, TrackerOptions, check_trackers

if TYPE_CHECKING:
    from training.features.hooks import Hooks, OptionsOfRun
    from training.steps import Progress


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    from training.features.trackers_sending import make_trackers  # torch: only in a training

    hooks.recorders.append(make_trackers)


def _show_curves(options: TrackerOptions) -> tuple[str, Sequence[str]] | None:
    if options.logging_dir is None:
        return None
    return "Look at the curves", ["tensorboard", "--logdir", str(options.logging_dir)]


TRACKERS = Feature(
    name="trackers",
    options=TrackerOptions,
    options_of_run=RunTrackerOptions,
    place=AT_LOGS,
    is_on=lambda options: bool(options.trackers),
    facts=FREE,
    check_start=check_trackers,
    command_at_end=_show_curves,
    install=_install,
)
