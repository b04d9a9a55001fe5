"""Send the numbers and samples of a run to TensorBoard, wandb and others: --logging_dir, --log_with.

Each is reached through the tracker of accelerate; only the main process sends.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import OptionError, UserError
from modules.options import CONFIGURES, FREE, OF_RUN, SECRET, SENDS, Options, option
from training.features.contract import AT_LOGS, Feature

if TYPE_CHECKING:
    from accelerate import Accelerator

    from modules.media.reading import Frame
    from training.features.hooks import Hooks, OptionsOfRun, PlannedRun
    from training.steps import Progress

logger = logging.getLogger(__name__)

NEEDS_FOLDER = ("tensorboard", "aim")  # they write into --logging_dir
CHOICES = ("tensorboard", "wandb", "trackio", "aim", "mlflow", "swanlab", "comet_ml")  # accelerate's names
PROJECT = "network_train"  # of LoRA training; as in other tuners
FLUSH_SECONDS = 10  # how old the data in TensorBoard may be
# tracker -> its settings in a working folder
SETTINGS_OF_FOLDER = {
    "wandb": ("wandb/settings",),
    "comet_ml": (".comet.config", ".env"),
    "swanlab": (".swanlab",),
}
NO_GIT = {  # variables of trackers
    "WANDB_DISABLE_GIT": "true",
    "COMET_AUTO_LOG_GIT_METADATA": "false",
    "COMET_AUTO_LOG_GIT_PATCH": "false",
}

_IF_LOGGED = {"nothing is logged without --logging_dir or --log_with": lambda options: bool(options.trackers)}
_IF_WANDB = {"wandb is not used without --log_with wandb": lambda options: "wandb" in options.trackers}


class TrackerOptions(Options, title="logs"):
    """Which trackers get the numbers and samples of a run."""

    logging_dir: Path | None = option(
        "folder for TensorBoard's files; each run gets a folder in it", place="new folder"
    )
    log_with: str | None = option(
        "tensorboard when not given and --logging_dir is; all: tensorboard and wandb",
        choices=(*CHOICES, "all"),
        # those that need no folder write and send where they like
        facts={**SENDS, **OF_RUN, "stays": NEEDS_FOLDER, "permission": "gives its losses to {}"},
    )
    log_prefix: str | None = option(
        "start of the run folder's name, before its date",
        acts_if={"there is no --logging_dir": lambda options: options.logging_dir is not None},
    )
    log_tracker_name: str | None = option(
        "name of the tracker, the project of most; network_train, or MODEL_ft, when not given",
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
        facts={**CONFIGURES, **OF_RUN, "permission": "has its trackers read {}"},
    )
    wandb_api_key: str | None = option(
        "log in to wandb with this key; it is never written anywhere", acts_if=_IF_WANDB, facts=SECRET
    )
    log_config: bool = option("send the options, without keys and paths, to the trackers", acts_if=_IF_LOGGED)

    def __post_init__(self) -> None:
        writing = [name for name in self.trackers if name in NEEDS_FOLDER]
        if writing and self.logging_dir is None:
            raise OptionError(
                f"--log_with {self.log_with} needs --logging_dir: the folder for {writing[0]}'s files"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)


class RunTrackerOptions(Options):
    """Options of `run` that it hands to its training."""

    logging_dir: Path | None = option(
        "folder for TensorBoard's files, anywhere; default: that of run.toml, in the folder",
        place="new folder",
    )
    log_with: str | None = option(
        "a tracker for the losses; in run.toml only tensorboard and aim are taken unasked",
        choices=(*CHOICES, "all"),
    )
    log_tracker_config: Path | None = option(
        "TOML file with arguments for the trackers; in run.toml it is refused", place="there"
    )


@dataclass
class Trackers:
    """Send the numbers and samples of a run. Use it as a context manager, in every process.

    Entering starts the trackers. Raises UserError if --log_tracker_config cannot be read.
    """

    accelerator: "Accelerator"
    options: TrackerOptions
    project: str = PROJECT  # used if the options give none
    config: Mapping[str, Any] = field(default_factory=dict)  # stored with the run, from `public_config`
    now: Callable[[], float] = time.monotonic  # seconds
    started: datetime = field(default_factory=datetime.now)  # names the folder of TensorBoard's files
    _flushed: float = field(default=0.0, init=False)
    _is_lost: bool = field(default=False, init=False)  # a tracker takes no more numbers
    _hook: Any = field(default=None, init=False)  # of threads, as it was

    def __enter__(self) -> "Trackers":
        from accelerate.tracking import filter_trackers  # torch, as --help does without

        options = self.options
        arguments = tracker_arguments(options)
        folder = None
        if options.logging_dir is not None:
            folder = str(options.logging_dir / f"{options.log_prefix or ''}{self.started:%Y%m%d%H%M%S}")
            self.accelerator.project_configuration.set_directories(folder)
        self.accelerator.log_with = filter_trackers([*options.trackers], folder)
        if (
            self.accelerator.is_main_process
            and "wandb" in options.trackers
            and options.wandb_api_key is not None
        ):
            import wandb  # optional; `check_trackers` has found it

            wandb.login(key=options.wandb_api_key)
        self.accelerator.init_trackers(
            options.log_tracker_name or self.project,
            config=dict(self.config) or None,
            init_kwargs=arguments,
        )
        self._hook, threading.excepthook = threading.excepthook, self._note_thread
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with self._guarded(Exception):  # all that can be lost is lost
                for tracker in self.accelerator.trackers:
                    tracker.finish()
        finally:
            self.accelerator.trackers.clear()  # accelerate would finish them again
            threading.excepthook = self._hook

    def _note_thread(self, error: threading.ExceptHookArgs) -> None:
        """Print an error of a thread, but not of TensorBoard's writer, which raises it again later."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._hook(error)

    def note_values(self, values: Mapping[str, float], step: int) -> None:
        if not self._is_lost:
            with self._guarded():
                for tracker in self.accelerator.trackers:
                    self._log_values(tracker, values, step)

    @contextlib.contextmanager
    def _guarded(self, kind: type[Exception] = OSError) -> Iterator[None]:
        """Turn a tracker's first error of disk or network into a warning, and give it no more numbers."""
        try:
            yield
        except kind as error:
            if not self._is_lost:
                names = " ".join(self.options.trackers)
                logger.warning("--log_with %s gets no more numbers, the training continues: %s", names, error)
            self._is_lost = True

    def _log_values(self, tracker: Any, values: Mapping[str, float], step: int) -> None:
        if tracker.name == "tensorboard":  # accelerate's own `log` waits for the disk each time
            for name, value in values.items():
                tracker.writer.add_scalar(name, value, step)
            now = self.now()
            if now - self._flushed >= FLUSH_SECONDS:
                tracker.writer.flush()
                self._flushed = now
        else:  # some take no other signs in names than letters, numbers, blanks, _, - and /
            tracker.log({name.replace("*", "-"): value for name, value in values.items()}, step=step)

    def note_samples(
        self, step: int, files: Mapping[int, Path], strips: "Mapping[int, Frame]", prompts: Mapping[int, str]
    ) -> None:
        """Send the samples of a step to TensorBoard and wandb.

        strips: from `join_strip`. TensorBoard gets these: clips that play would need another package, and a
        megabyte each. wandb gets the files themselves, with their prompts.
        """
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for index, strip in strips.items():
                    tracker.writer.add_image(f"samples/{index:02d}", strip, step, dataformats="HWC")
                tracker.writer.flush()
            elif tracker.name == "wandb":
                media = {}
                for index, path in files.items():
                    media[f"samples/{index:02d}"] = _make_wandb_media(path, prompts[index])
                if media:
                    tracker.log(media, step=step)


def _make_wandb_media(path: Path, prompt: str) -> Any:
    """Return a sample as an object that wandb shows."""
    import wandb  # optional; `check_trackers` has found it

    if path.suffix == ".png":
        return wandb.Image(str(path), caption=prompt)
    if path.suffix == ".wav":
        return wandb.Audio(str(path), caption=prompt)
    return wandb.Video(str(path), caption=prompt, format="mp4")


def check_trackers(options: TrackerOptions) -> None:
    """Raise OptionError, naming the package to install, if the package of a tracker is missing.

    Raises UserError if --log_tracker_config cannot be read, OutputError if nothing can be written in
    --logging_dir, and OptionError if a folder that may be somebody else's has settings of a tracker.
    """
    from modules.atomic_write import make_folder  # only with trackers, as what follows
    from modules.console import quiet
    from modules.installation import describe_missing, refuses_code

    if refuses_code() is not None:
        _refuse_settings_of_folder(options.trackers, Path.cwd())
    if options.logging_dir is not None:
        make_folder(options.logging_dir, "--logging_dir")
    for tracker in options.trackers:
        try:
            __import__(tracker)
        except ImportError as error:
            raise OptionError(f"--log_with {tracker}: {describe_missing(error)}") from None
    with quiet():  # it is read again when they start
        tracker_arguments(options)


def _refuse_settings_of_folder(trackers: Sequence[str], folder: Path) -> None:
    """Raise OptionError if a working folder has settings that say where a tracker sends data, and as whom.

    Also keeps trackers from asking git about that folder: its settings can name programs.
    """
    for tracker in trackers:
        for name in SETTINGS_OF_FOLDER.get(tracker, ()):
            if os.path.lexists(folder / name):
                raise OptionError(
                    f"--log_with {tracker}: {folder / name} has settings of {tracker}, which can name any "
                    "server. Remove it, or start the training itself in a terminal"
                )
    os.environ.update(NO_GIT)


def tracker_arguments(options: TrackerOptions) -> dict[str, Any]:
    """Return the arguments of each tracker by name, from --log_tracker_config or --wandb_run_name."""
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
                f"--log_tracker_config {path}: {name} = {table!r} stands outside a table; write it under "
                f"[{next(iter(options.trackers), 'wandb')}]"
            )
    return tables


def _make_trackers(plan: "PlannedRun", records: Sequence[Any]) -> Trackers:
    from training.reports.logs import public_config  # torch, as --help does without

    options = plan.options.of(TrackerOptions)
    return Trackers(
        plan.accelerator,
        options,
        project=PROJECT if plan.options.whole_dit is None else f"{plan.family.name}_ft",
        config=public_config(*records) if options.log_config else {},
    )


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    hooks.recorders.append(_make_trackers)


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
