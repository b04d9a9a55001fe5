"""Drawn clips and their captions."""

from pathlib import Path

import numpy as np

from pocket import drawing
from pocket.captions import caption, plain
from pocket.clips import write_clips
from pocket.concepts import CONCEPTS


def scenes(count: int, two: float = 0.0) -> list[drawing.Scene]:
    random = np.random.default_rng(3)
    return [drawing.scene(random, two) for _ in range(count)]


def test_a_seed_names_a_clip() -> None:
    first, second = (drawing.draw(drawing.scene(np.random.default_rng(4))) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (drawing.FRAMES, drawing.SIZE, drawing.SIZE, 3)


def test_captions_name_colour_shape_and_direction() -> None:
    random = np.random.default_rng(9)
    for scene in scenes(100, two=0.3):
        text = caption(random, scene)
        for thing in scene.things:
            assert all(word in text for word in (thing.colour, thing.shape, thing.direction))
    assert plain(drawing.draw_thing(random, "red", "circle", "left")) == "a red circle moving left"


def test_clips_are_written_once(tmp_path: Path) -> None:
    concept = CONCEPTS["blorp"]
    write_clips(tmp_path, 2, seed=0, make=concept.make)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.mp4",
        "00000.txt",
        "00001.mp4",
        "00001.txt",
    ]
    assert "blorp" in (tmp_path / "00000.txt").read_text(encoding="utf-8")
    before = (tmp_path / "00000.mp4").stat().st_mtime_ns
    write_clips(tmp_path, 2, seed=0, make=concept.make)
    assert (tmp_path / "00000.mp4").stat().st_mtime_ns == before
