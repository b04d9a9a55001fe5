"""Send the logged values and samples of a run through accelerate's trackers."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from modules.media.reading import Frame
from training.features.hooks import PlannedRun
from training.features.trackers_options import TrackerOptions, tracker_arguments
from training.reports.logs import public_config

logger = logging.getLogger(__name__)

PROJECT = "network_train"  # project name for LoRA training, as in other trainers
FLUSH_SECONDS = 10  # maximum age of the data in TensorBoard


@dataclass
class Trackers:
    """Send metrics and samples of a run to trackers such as wandb.

    A context manager that all processes enter. This starts the trackers, and raises UserError if
    --log_tracker_config cannot be read.
    """

    accelerator: Accelerator
    options: TrackerOptions
    project: str = PROJECT  # used if no option names the project
    config: Mapping[str, Any] = field(default_factory=dict)  # stored with the run, from `public_config`
    now: Callable[[], float] = time.monotonic  # seconds
    start_time: datetime = field(default_factory=datetime.now)  # names the folder of TensorBoard's files
    _last_flush: float = field(default=0.0, init=False)
    _failed_trackers: set[str] = field(default_factory=set, init=False)  # names; these receive nothing more
    _previous_excepthook: Any = field(default=None, init=False)  # the previous `threading.excepthook`

    def __enter__(self) -> "Trackers":
        """Start the trackers, and watch for errors in their threads."""
        options = self.options
        arguments = tracker_arguments(options)
        folder = None  # for the files of TensorBoard and aim
        if options.logging_dir is not None:
            folder = str(options.logging_dir / f"{options.log_prefix or ''}{self.start_time:%Y%m%d%H%M%S}")
            self.accelerator.project_configuration.set_directories(folder)
        self.accelerator.log_with = filter_trackers([*options.trackers], folder)
        has_wandb_key = "wandb" in options.trackers and options.wandb_api_key is not None
        if self.accelerator.is_main_process and has_wandb_key:
            import wandb  # optional; `check_trackers` has found it

            wandb.login(key=options.wandb_api_key)
        self.accelerator.init_trackers(
            options.log_tracker_name or self.project,
            config=dict(self.config) or None,
            init_kwargs=arguments,
        )
        self._previous_excepthook, threading.excepthook = threading.excepthook, self._log_thread_error
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for tracker in self.accelerator.trackers:
                with self._disabling_at_error(tracker, Exception):  # no error may end a finished training
                    tracker.finish()
        finally:
            self.accelerator.trackers.clear()  # accelerate would finish them again
            threading.excepthook = self._previous_excepthook

    def _log_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Print a thread's error, except for TensorBoard's writer, which raises its own error again later."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._previous_excepthook(error)

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Send the metrics of a step to every tracker that has not failed before."""
        for tracker in self.accelerator.trackers:
            if tracker.name not in self._failed_trackers:
                with self._disabling_at_error(tracker):
                    if tracker.name == "tensorboard":  # accelerate's own `log` waits for the disk each time
                        for name, value in values.items():
                            tracker.writer.add_scalar(name, value, step)
                        now = self.now()
                        if now - self._last_flush >= FLUSH_SECONDS:
                            tracker.writer.flush()
                            self._last_flush = now
                    else:  # names in some trackers may only have letters, digits, blanks, _, - and /
                        tracker.log(
                            {name.replace("*", "-"): value for name, value in values.items()}, step=step
                        )

    @contextlib.contextmanager
    def _disabling_at_error(self, tracker: Any, kind: type[Exception] = OSError) -> Iterator[None]:
        """Log a tracker's first error of the given kind as a warning, and stop sending metrics to it."""
        try:
            yield
        except kind as error:
            if tracker.name not in self._failed_trackers:
                logger.warning(
                    "--log_with %s receives no more values; the training continues: %s", tracker.name, error
                )
            self._failed_trackers.add(tracker.name)

    def log_samples(
        self, step: int, files: Mapping[int, Path], strips: Mapping[int, Frame], prompts: Mapping[int, str]
    ) -> None:
        """Send the samples of a step to TensorBoard and wandb.

        TensorBoard gets strips of frames, because playable clips would need another package and a megabyte
        each. wandb gets the files themselves, with their prompts.

        Args:
            step: Number of the optimizer step.
            files: Written files by index of the sample.
            strips: Strips of frames from `join_strip`, by index.
            prompts: Prompts by index.
        """
        for tracker in self.accelerator.trackers:
            if tracker.name in self._failed_trackers:
                continue
            with self._disabling_at_error(tracker):
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
    """Return a generated image, sound or video as a wandb media object, with its prompt as the caption."""
    import wandb  # optional; `check_trackers` has found it

    if path.suffix == ".png":
        return wandb.Image(str(path), caption=prompt)
    if path.suffix == ".wav":
        return wandb.Audio(str(path), caption=prompt)
    return wandb.Video(str(path), caption=prompt, format="mp4")


def make_trackers(plan: "PlannedRun", records: Sequence[Any]) -> Trackers:
    """Return the recorder that sends the metrics of a run to its trackers.

    Args:
        plan: The plan of the run.
        records: All options with their resolved values.
    """
    options = plan.options.of(TrackerOptions)
    return Trackers(
        plan.accelerator,
        options,
        project=PROJECT if plan.options.full_dit is None else f"{plan.family.name}_ft",
        config=public_config(*records) if options.log_config else {},
    )
