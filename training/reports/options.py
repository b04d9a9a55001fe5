"""Options of reports to TensorBoard and wandb."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import SECRET, Options, option


class LogOptions(Options, title="logs"):
    """Options of where loss curves go."""

    logging_dir: Path | None = option("folder for TensorBoard's files; each run gets a folder in it")
    log_with: str | None = option(
        "tensorboard when not given and --logging_dir is", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = option("start of the run folder's name, before its date")
    log_tracker_name: str | None = option(
        "name of the tracker, for wandb the project; network_train, or MODEL_ft, when not given"
    )
    wandb_run_name: str | None = option("name of the run in wandb")
    log_tracker_config: Path | None = option(
        "TOML file with arguments for the trackers, a table each; replaces --wandb_run_name"
    )
    wandb_api_key: str | None = option(
        "log in to wandb with this key; it is never written anywhere", facts=SECRET
    )
    log_config: bool = option("send the options, without keys and paths, to the trackers")
    no_page: bool = option(
        "do not write the page OUTPUT_NAME.html, its history OUTPUT_NAME-history.jsonl and a sheet for "
        "each time that samples are made"
    )

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
