"""Captions of many kinds of images and clips, for a model's own results: `new --train adapter`.

They are put together from a small grammar; all words of a kind are used about equally often.
"""

import random
from collections.abc import Iterator, Sequence

COUNT = 500  # published adapters were made from hundreds of captions or more
SUBJECTS = (
    "an old fisherman who mends a net", "a girl who ties her shoe", "two cooks who taste a soup",
    "a dancer in the middle of a turn", "a mechanic under a lifted car", "a nurse with a clipboard",
    "a child who draws with chalk", "a violinist with closed eyes", "a couple who share an umbrella",
    "a climber on a rope", "a market woman who counts coins", "three friends who laugh",
    "a red fox that leaps over a ditch", "a heron that stands on one leg", "a tabby cat that stretches",
    "a sheepdog that runs in a circle", "a school of silver fish", "an elephant that sprays water",
    "an owl that turns its head", "a horse that shakes its mane", "a bee on a thistle",
    "a steam locomotive", "a blue bicycle against a wall", "a sailing boat that leans in the wind",
    "a stack of worn books", "a teapot with a cracked lid", "a bowl of cut oranges", "a lighthouse",
    "a windmill with torn sails", "a glass bottle that catches the light", "a robot with a dented arm",
    "a paper lantern that sways", "a knight in plain armor", "a wooden chair",
    "a loaf of bread that steams", "a wall clock without hands",
)  # fmt: skip
PLACES = (
    "on a harbor pier", "in a crowded kitchen", "in a birch forest", "on a wet street at a crossing",
    "in an empty gymnasium", "beside a frozen lake", "on a rooftop between antennas",
    "in a desert of red sand", "in a library with high shelves", "at a bus stop",
    "in a greenhouse full of ferns", "on a stage", "under a stone bridge", "in a small workshop",
    "on a mountain path", "in a tiled bathroom", "in a field of sunflowers", "in a train compartment",
    "in front of a plain gray wall", "on a beach at low tide", "in a narrow alley with laundry",
    "in a hospital corridor", "in a village square", "in deep space",
)  # fmt: skip
LIGHTS = (
    "in the soft light of morning", "at noon, with hard shadows", "at dusk, under a violet sky",
    "in thick fog", "in heavy rain", "by candlelight", "lit by neon signs", "under an overcast sky",
    "against the low sun", "in moonlight", "in the light of a single lamp", "while snow falls",
)  # fmt: skip
STYLES = (
    "a photograph with a shallow depth of field", "a wide-angle photograph", "a close-up photograph",
    "a grainy black and white photograph", "a watercolor", "an oil painting with thick strokes",
    "a pencil sketch", "a flat vector illustration", "a 3D render", "a woodcut",
    "a comic panel with bold ink", "pixel art", "a children's book illustration", "a film still",
    "a faded postcard", "a clay animation",
)  # fmt: skip


def make_captions(count: int = COUNT, seed: int = 0) -> list[str]:
    """Return `count` distinct random captions; the same seed gives the same captions."""
    rng = random.Random(seed)
    cycles = [_cycle(words, rng) for words in (SUBJECTS, PLACES, LIGHTS, STYLES)]
    captions: dict[str, None] = {}
    while len(captions) < count:
        subject, place, light, style = (next(cycle) for cycle in cycles)
        captions[f"{subject} {place}, {light}, {style}"] = None
    return list(captions)


def _cycle(words: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yield the words endlessly, in a new random order after each pass."""
    while True:
        yield from rng.sample(words, len(words))
