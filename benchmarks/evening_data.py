"""Draw the data of benchmarks/evening.py: images or clips of moving shapes with captions, in a model's size.

For a model that edits, each image has a source without the shape, in the folder `control`.
"""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from downloads.catalogue import ModelSet
from modules.atomic_write import write_text
from modules.media.colors import Frame
from modules.media.writing import write_png, write_video
from modules.seeds import derive_seed
from pocket import drawing
from pocket.concepts import CONCEPTS
from project.model_choice import read_model_info

CONCEPT = CONCEPTS["blorp"]  # a form with a made-up word
CONTROL = "control"
SEED = 104
FINE = drawing.SIZE * drawing.FINE  # pixels of what is drawn, before it is enlarged
STEP = 32  # widths and heights of items are multiples of it


def draw_items(folder: Path, model: ModelSet, count: int, side: int | None, frames: int | None) -> None:
    """Write the items of a model into a folder. Existing items are kept: an item follows from its index.

    Args:
        folder: Folder of the items.
        model: The model, whose data are images or clips of its size.
        count: Number of items.
        side: Width and height in pixels; None for those of the model.
        frames: Frames of a clip; None for those of the model.
    """
    width, height = (side, side) if side else model.properties["resolution"]
    width, height = width // STEP * STEP, height // STEP * STEP
    frames = frames if frames and model.properties["frames"] > 1 else model.properties["frames"]
    edits = read_model_info(model).needs_reference
    folder.mkdir(parents=True, exist_ok=True)
    if edits:
        (folder / CONTROL).mkdir(exist_ok=True)
    for index in range(count):
        random = np.random.default_rng(derive_seed(SEED, "item", index))
        scene, caption = CONCEPT.make(random)
        # it crosses the image once, however many frames the clip has
        pace = (drawing.FRAMES - 1) / max(frames - 1, 1)
        (thing,) = scene.things
        velocity = (thing.velocity[0] * pace, thing.velocity[1] * pace)
        scene = replace(scene, things=(replace(thing, velocity=velocity),))
        path = folder / f"{index:03d}{'.mp4' if frames > 1 else '.png'}"
        if path.exists():
            continue
        if edits:
            write_png(folder / CONTROL / path.name, _draw_frame(replace(scene, things=()), 0, width, height))
            caption = f"add {caption}"
        write_text(path.with_suffix(".txt"), caption)
        if frames > 1:
            clip = (_draw_frame(scene, frame, width, height) for frame in range(frames))
            write_video(path, clip, model.properties["fps"])
        else:
            write_png(path, _draw_frame(scene, 0, width, height))


def _draw_frame(scene: drawing.Scene, frame: int, width: int, height: int) -> Frame:
    """Return a frame of a scene, H W 3 uint8: its square is stretched to this width and height."""
    fine: Frame = np.empty((FINE, FINE, 3), np.uint8)
    fine[:] = scene.ground_rgb
    for thing in scene.things:
        drawing.paint(fine, thing.shape, thing.center(frame), thing.pixels, thing.rgb)
    interpolation = cv2.INTER_AREA if width < FINE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(fine, (width, height), interpolation=interpolation), np.uint8)
