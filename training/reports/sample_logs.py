"""Send samples to TensorBoard and wandb."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.media.reading import Frame
from training.reports.logs import Logs


def log_samples(
    logs: Logs,
    step: int,
    files: Mapping[int, Path],
    strips: Mapping[int, Frame],
    prompts: Mapping[int, str],
) -> None:
    """Send the samples of a step to the trackers of the main process.

    strips: from `join_strip`. TensorBoard gets these: clips that play would need another package, and a
    megabyte each. wandb gets the files themselves, with their prompts.
    """
    if not logs.accelerator.is_main_process:
        return

    def name(index: int) -> str:
        return f"samples/{index:02d}"

    for tracker in logs.accelerator.trackers:
        if tracker.name == "tensorboard":
            for index, strip in strips.items():
                tracker.writer.add_image(name(index), strip, step, dataformats="HWC")
            tracker.writer.flush()
        elif tracker.name == "wandb":
            media = {name(index): _wandb_media(path, prompts[index]) for index, path in files.items()}
            if media:
                tracker.log(media, step=step)


def _wandb_media(path: Path, prompt: str) -> Any:
    import wandb  # optional; `check_trackers` has found it

    if path.suffix == ".png":
        return wandb.Image(str(path), caption=prompt)
    return wandb.Video(str(path), caption=prompt, format="mp4")
