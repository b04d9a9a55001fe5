"""Options of the trackers that receive the values and samples of a run, and their checks."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules.errors import OptionError, UserError
from modules.options import CONFIGURES, FREE, SECRET, SENDS, option, shared_with_run
from training.features.contract import AT_LOGS, FeatureOptions

logger = logging.getLogger(__name__)

NEEDS_FOLDER = ("tensorboard", "aim")  # they write into --logging_dir
CHOICES = ("tensorboard", "wandb", "trackio", "aim", "mlflow", "swanlab", "comet_ml")  # accelerate's names
# tracker -> files with its settings in a working folder
SETTINGS_FILES_BY_TRACKER = {
    "wandb": ("wandb/settings",),
    "comet_ml": (".comet.config", ".env"),
    "swanlab": (".swanlab",),
}
NO_GIT = {  # environment variables that keep trackers from running git
    "WANDB_DISABLE_GIT": "true",
    "COMET_AUTO_LOG_GIT_METADATA": "false",
    "COMET_AUTO_LOG_GIT_PATCH": "false",
}

_IF_LOGGED = {"nothing is logged without --logging_dir or --log_with": lambda options: bool(options.trackers)}
_IF_WANDB = {"wandb is not used without --log_with wandb": lambda options: "wandb" in options.trackers}


class TrackerOptions(FeatureOptions, title="logs", at=AT_LOGS, facts=FREE):
    """Options of trackers that receive metrics and samples, such as TensorBoard and wandb."""

    logging_dir: Path | None = option(
        "folder for TensorBoard logs; each run gets a subfolder",
        place="new folder",
        facts=shared_with_run(
            "folder for TensorBoard's files, anywhere; default: that of run.toml, in the folder"
        ),
    )
    log_with: str | None = option(
        "default: tensorboard if --logging_dir is given; all: tensorboard and wandb",
        choices=(*CHOICES, "all"),
        # trackers that do not write to --logging_dir may send data anywhere
        facts={
            **SENDS,
            **shared_with_run(
                "a tracker for the losses; in run.toml only tensorboard and aim are taken unasked"
            ),
            "stays": NEEDS_FOLDER,
            "permission": "gives its losses to {}",
        },
    )
    log_prefix: str | None = option(
        "prefix of the run folder's name, before the date",
        acts_if={"there is no --logging_dir": lambda options: options.logging_dir is not None},
    )
    log_tracker_name: str | None = option(
        "name of the tracker, which most services use as the project; default: network_train, or MODEL_ft",
        acts_if=_IF_LOGGED,
    )
    wandb_run_name: str | None = option(
        "name of the run in wandb",
        acts_if={
            **_IF_WANDB,
            "--log_tracker_config replaces it": lambda options: options.log_tracker_config is None,
        },
    )
    log_tracker_config: Path | None = option(
        "TOML file with arguments for the trackers, a table each; replaces --wandb_run_name",
        place="there",
        hint="a TOML file with a table [wandb] or of another tracker",
        acts_if=_IF_LOGGED,
        facts={
            **CONFIGURES,
            **shared_with_run("TOML file with arguments for the trackers; in run.toml it is rejected"),
            "permission": "has its trackers read {}",
        },
    )
    wandb_api_key: str | None = option(
        "log in to wandb with this key; it is never written anywhere", acts_if=_IF_WANDB, facts=SECRET
    )
    log_config: bool = option("send the options, without keys and paths, to the trackers", acts_if=_IF_LOGGED)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers to start; tensorboard if only --logging_dir is set."""
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)


def check_trackers(options: TrackerOptions) -> None:
    """Check that the trackers can start.

    Raises:
        OptionError: If the package of a tracker is missing (the message names it), or if a folder that may
            belong to someone else contains tracker settings.
        UserError: If --log_tracker_config cannot be read.
        OutputError: If --logging_dir is not writable.
    """
    from modules.atomic_write import make_folder  # this and the following imports: only with trackers
    from modules.console import quiet
    from modules.installation import describe_missing, rejects_code

    if rejects_code() is not None:  # `run` or the queue: the folder may be someone else's
        _reject_folder_settings(options.trackers, Path.cwd())
    if options.logging_dir is not None:
        make_folder(options.logging_dir, "--logging_dir")
    for tracker in options.trackers:
        try:
            __import__(tracker)
        except ImportError as error:
            raise OptionError(f"--log_with {tracker}: {describe_missing(error)}") from None
    with quiet():  # the trackers read it again when they start, with warnings
        tracker_arguments(options)


def _reject_folder_settings(trackers: Sequence[str], folder: Path) -> None:
    """Raise OptionError if the working folder has settings of a tracker, such as its server and account."""
    # Also set environment variables that keep trackers from running git there: git settings can run programs.
    for tracker in trackers:
        for name in SETTINGS_FILES_BY_TRACKER.get(tracker, ()):
            if os.path.lexists(folder / name):
                raise OptionError(
                    f"--log_with {tracker}: {folder / name} has settings of {tracker}, which can name any "
                    "server. Remove it, or start the training itself in a terminal"
                )
    os.environ.update(NO_GIT)


def tracker_arguments(options: TrackerOptions) -> dict[str, Any]:
    """Return the arguments of each accelerate tracker, from --log_tracker_config or --wandb_run_name."""
    from modules.text_files import parse_toml, read_text  # only with trackers

    if options.log_tracker_config is None:
        return {} if options.wandb_run_name is None else {"wandb": {"name": options.wandb_run_name}}
    path = options.log_tracker_config
    try:
        tables = parse_toml(read_text(path))
    except OSError as error:
        raise UserError(f"--log_tracker_config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--log_tracker_config {path} is not valid TOML: {error}") from None
    for name, table in tables.items():
        if name not in options.trackers:
            logger.warning(
                "--log_tracker_config %s: [%s] is ignored because this run has no such tracker", path, name
            )
        if not isinstance(table, dict):
            raise UserError(
                f"--log_tracker_config {path}: {name} = {table!r} is outside a table; write it under "
                f"[{next(iter(options.trackers), 'wandb')}]"
            )
    return tables
