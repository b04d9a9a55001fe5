"""Write drawn clips as video files with captions, and the dataset file for caching and training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from modules.atomic_write import write_text
from modules.media.writing import write_video
from modules.seeds import derive_seed
from pocket import drawing
from pocket.captions import caption
from wan.configs import NEGATIVE_PROMPT

TWO = 0.12  # share of clips with two things
WITHOUT_CAPTION = 0.05  # share of clips with an empty caption, so that guidance has something to compare with
WITH_NEGATIVE_PROMPT = 0.05  # the same with generation's default negative prompt

Make = Callable[[np.random.Generator], tuple[drawing.Scene, str]]  # a scene and its caption

DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = {batch_size}

[[datasets]]
video_directory = '{clips}'
cache_directory = '{cache}'
target_frames = [17]
frame_extraction = "head"
"""


def pocket_scene(random: np.random.Generator) -> tuple[drawing.Scene, str]:
    """Draw a scene and its caption for the pocket model. One caption in ten does not describe the scene."""
    scene = drawing.scene(random, two=TWO)
    text = caption(random, scene)
    fate = random.uniform()
    if fate < WITHOUT_CAPTION:
        return scene, ""
    return scene, NEGATIVE_PROMPT if fate < WITHOUT_CAPTION + WITH_NEGATIVE_PROMPT else text


def write_clips(folder: Path, count: int, seed: int, make: Make = pocket_scene) -> None:
    """Write `count` clips and captions into `folder`.

    Existing files are kept: the seed of a clip is its number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05d}.mp4"
        if path.exists():
            continue
        scene, text = make(np.random.default_rng(derive_seed(seed, "clip", number)))
        write_text(path.with_suffix(".txt"), text)
        write_video(path, iter(drawing.draw(scene)), drawing.FPS)


def write_dataset(folder: Path, batch_size: int) -> Path:
    """Write `folder`/dataset.toml for the clips in `folder`/clips; return its path."""
    path = folder / "dataset.toml"
    text = DATASET.format(
        batch_size=batch_size, clips=(folder / "clips").as_posix(), cache=(folder / "cache").as_posix()
    )
    write_text(path, text)
    return path
