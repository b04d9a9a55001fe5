"""Captions of drawn scenes, in several wordings.

The plain wording, which the model always understands, is `a {colour} {shape} moving {direction}`.
"""

import numpy as np

from pocket.drawing import Scene, Thing

PLAIN = 0.6  # share of captions in the plain wording
WORDINGS = (
    "a {colour} {shape} moves {direction}",
    "a {width}{colour} {shape} moving {direction}",
    "a {colour} {shape} moving {direction}{speed}",
    "a {colour} {shape} moving {direction} on a {ground} background",
    "a {width}{colour} {shape} moves{speed} to the {direction}",
    "on a {ground} background a {width}{colour} {shape} goes {direction}",
    "video of a {colour} {shape}, it is moving {direction}{speed}",
    "a {colour} {shape} going {direction} over {ground} ground",
)


def plain(thing: Thing) -> str:
    """Return the caption of a thing in the plain wording, which the model always understands."""
    return f"a {thing.colour} {thing.shape} moving {thing.direction}"


def caption(random: np.random.Generator, scene: Scene) -> str:
    """Describe the scene in a wording drawn at random. Things are named in their order."""
    if len(scene.things) > 1:
        return " and ".join(plain(thing) for thing in scene.things)
    thing = scene.things[0]
    if random.uniform() < PLAIN:
        return plain(thing)
    wording = WORDINGS[int(random.integers(len(WORDINGS)))]
    return wording.format(
        colour=thing.colour,
        shape=thing.shape,
        direction=thing.direction,
        width=thing.width and thing.width + " ",
        speed=thing.speed and " " + thing.speed,
        ground=scene.ground,
    )
