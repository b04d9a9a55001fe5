"""Options of what is reported to TensorBoard and wandb."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from modules.errors import OptionError
from modules.options import SECRET


@dataclass(frozen=True)
class LogOptions:
    """Options of where loss curves go."""

    logging_dir: Path | None
    log_with: str | None  # tensorboard, wandb, all; None: tensorboard if there is a logging_dir
    log_prefix: str | None
    log_tracker_name: str | None
    wandb_run_name: str | None
    log_tracker_config: Path | None  # TOML, one table per tracker
    wandb_api_key: str | None = field(metadata=SECRET)
    log_config: bool
    no_page: bool  # write neither OUTPUT_NAME.html, nor its history, nor sheets of samples

    def __post_init__(self) -> None:
        if self.logging_dir is not None and self.logging_dir.is_file():
            raise OptionError(
                f"--logging_dir {self.logging_dir}: is a file; give a folder, it will be created"
            )
        if self.log_tracker_config is not None and not self.log_tracker_config.exists():
            raise OptionError(
                f"--log_tracker_config {self.log_tracker_config}: no such file; give a TOML file with a "
                "table [wandb] or [tensorboard]"
            )
        if self.log_with in {"tensorboard", "all"} and self.logging_dir is None:
            raise OptionError(
                f"--log_with {self.log_with} needs --logging_dir: the folder for TensorBoard's files"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Return the trackers to use."""
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `LogOptions`."""
    group = parser.add_argument_group("logs")
    group.add_argument("--logging_dir", help="folder for TensorBoard's files; each run gets a folder in it")
    group.add_argument(
        "--log_with",
        choices=("tensorboard", "wandb", "all"),
        help="tensorboard when not given and --logging_dir is",
    )
    group.add_argument("--log_prefix", help="start of the run folder's name, before its date")
    group.add_argument(
        "--log_tracker_name",
        help="name of the tracker, for wandb the project; network_train, or MODEL_ft, when not given",
    )
    group.add_argument("--wandb_run_name", help="name of the run in wandb")
    group.add_argument(
        "--log_tracker_config",
        help="TOML file with arguments for the trackers, a table each; replaces --wandb_run_name",
    )
    group.add_argument("--wandb_api_key", help="log in to wandb with this key; it is never written anywhere")
    group.add_argument(
        "--log_config", action="store_true", help="send the options, without keys and paths, to the trackers"
    )
    group.add_argument(
        "--no_page",
        action="store_true",
        help="do not write the page OUTPUT_NAME.html, its history OUTPUT_NAME-history.jsonl and a sheet for "
        "each time that samples are made",
    )
