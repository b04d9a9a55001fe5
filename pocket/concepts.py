"""Write the datasets of the quickstart: two things the pocket model has never seen, each with a made-up word.

python -m pocket.concepts FOLDER        writes clips, captions and dataset.toml to FOLDER/WORD
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from modules.atomic_write import write_text
from pocket import drawing
from pocket.captions import plain
from pocket.clips import write_clips
from pocket.footage import read_folder

CLIPS, KNOWN_CLIPS, VALIDATION_CLIPS = 12, 24, 4
DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 16

[[datasets]]
video_directory = '{folder}/clips'
cache_directory = '{folder}/cache'
target_frames = [17]
num_repeats = 4

# clips of what the model knows already, so that it does not forget it
[[datasets]]
video_directory = '{folder}/known_clips'
cache_directory = '{folder}/known_cache'
target_frames = [17]

[[datasets]]
video_directory = '{folder}/validation_clips'
cache_directory = '{folder}/validation_cache'
target_frames = [17]
validation = true
"""


@dataclass(frozen=True)
class Concept:
    """A made-up word and the form or the color that it stands for."""

    word: str
    form: str | None = None
    rgb: drawing.Colour | None = None
    colour: str = ""  # the detectors' name for `rgb`

    def caption(self, thing: drawing.Thing) -> str:
        """Return the plain wording, with the word in place of the shape or of the color."""
        color = thing.colour if self.rgb is None else self.word
        shape = thing.shape if self.form is None else self.word
        return f"a {color} {shape} moving {thing.direction}"

    def make(self, random: np.random.Generator) -> tuple[drawing.Scene, str]:
        """Draw a scene that shows the concept; return it with its caption."""
        scene = drawing.scene(random)
        # large forms: latents have an eighth of the size, and small forms come back from them as circles
        thing = drawing.draw_thing(
            random, shape=self.form, rgb=self.rgb, width="large" if self.form else None
        )
        return replace(scene, things=(thing,)), self.caption(thing)


def draw_known(random: np.random.Generator) -> tuple[drawing.Scene, str]:
    """Draw a scene of something the model knows; return it with its plain caption."""
    scene = drawing.scene(random)
    return scene, plain(scene.things[0])


CONCEPTS: Mapping[str, Concept] = {
    concept.word: concept
    for concept in (Concept("blorp", form="diamond"), Concept("zindle", rgb=(210, 60, 200), colour="magenta"))
}


def lay_out(folder: Path, concept: Concept) -> Path:
    """Write clips to learn from, clips to validate on and dataset.toml into `folder`; return its path."""
    write_clips(folder / "clips", CLIPS, seed=1, make=concept.make)
    write_clips(folder / "known_clips", KNOWN_CLIPS, seed=3, make=draw_known)
    write_clips(folder / "validation_clips", VALIDATION_CLIPS, seed=2, make=concept.make)
    config = folder / "dataset.toml"
    write_text(config, DATASET.format(folder=folder.as_posix()))
    return config


if __name__ == "__main__":
    chosen = read_folder(__doc__)
    for each in CONCEPTS.values():
        lay_out(chosen / each.word, each)
