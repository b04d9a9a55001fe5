"""The pocket model draws what it is asked for; drawn clips and their captions."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import wan_generate_video
from modules.atomic_write import write_text
from pocket import drawing, measure
from pocket.captions import caption
from pocket.captions import plain as unmarked
from pocket.clips import write_clips
from pocket.concepts import CONCEPTS
from pocket.measure import CLIP, IN_FLOAT32, POCKET, model_options, read_verdicts
from pocket.train_vae import as_pixels, psnr
from wan.t5 import TOKENIZER
from wan.vae import load_vae

STEPS = (
    *("--infer_steps", "12", "--sample_solver", "vanilla", "--flow_shift", "3", "--guidance_scale", "3"),
    *("--device", "cpu"),
)


def colors_of(folder: Path, *options: object) -> list[str | None]:
    """What clips of eight prompts without a color show."""
    folder.mkdir()
    write_text(folder / "prompts.txt", "".join(f"a circle moving left --d {seed}\n" for seed in range(1, 9)))
    files = ["--from_file", str(folder / "prompts.txt"), "--save_path", str(folder)]
    wan_generate_video.main([*model_options(POCKET), *IN_FLOAT32, *CLIP, *STEPS, *files, *map(str, options)])
    return [verdict.colour for verdict in read_verdicts(folder).values()]


def test_the_set_is_small_and_complete() -> None:
    files = [path for path in POCKET.rglob("*") if path.suffix in {".safetensors", ".json"}]
    needed = {"dit.safetensors", "vae.safetensors", "t5.safetensors", "tokenizer.json"}
    assert {path.name for path in files} >= needed
    assert sum(path.stat().st_size for path in files) <= 16e6


@pytest.mark.slow
def test_it_draws_and_moves_what_it_is_asked_for(tmp_path: Path) -> None:
    """The measured figures are far higher (pocket/README.md)."""
    measure.main(["--prompts", "6", "--save_path", str(tmp_path), *STEPS])

    accuracy = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    for name in ("shape", "colour", "direction", "colour_in_every_frame"):
        assert accuracy[name] >= 0.75, accuracy


@pytest.mark.slow
def test_a_negative_prompt_is_avoided(tmp_path: Path) -> None:
    free = Counter(colors_of(tmp_path / "free", "--negative_prompt", ""))
    color = next(color for color, _ in free.most_common() if color in drawing.COLOURS)

    avoiding = colors_of(tmp_path / "avoiding", "--negative_prompt", f"a {color} circle moving left")

    assert color not in avoiding, free


@pytest.mark.slow
def test_the_vae_gives_drawn_clips_back() -> None:
    vae = load_vae(POCKET / "vae.safetensors", torch.device("cpu"), torch.float32)
    random = np.random.default_rng(20)
    pixels = as_pixels(np.stack([drawing.draw(drawing.scene(random, two=0.1)) for _ in range(8)]))
    latents = vae.encode(pixels)
    assert psnr(pixels, torch.cat(list(vae.decode(latents)), dim=2)) >= 31
    channels = latents.transpose(0, 1).flatten(1)
    assert channels.mean(1).abs().max() < 0.5
    assert 0.6 < channels.std(1).min() <= channels.std(1).max() < 1.5


def test_the_tokenizer_tells_words_apart() -> None:
    read = TOKENIZER.load(None, POCKET / "t5.safetensors", "umT5").read
    assert len(read("a red circle moving left").ids) == 6
    assert read("A Red circle") == read("a red circle")
    assert read("a blorp") != read("a zindle")


def test_a_seed_names_a_clip() -> None:
    first, second = (drawing.draw(drawing.scene(np.random.default_rng(4))) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (drawing.FRAMES, drawing.SIZE, drawing.SIZE, 3)


def test_captions_name_colour_shape_and_direction() -> None:
    random = np.random.default_rng(9)
    for _ in range(100):
        scene = drawing.scene(random, two=0.3)
        text = caption(random, scene)
        for thing in scene.things:
            assert all(word in text for word in (thing.colour, thing.shape, thing.direction))
    assert unmarked(drawing.draw_thing(random, "red", "circle", "left")) == "a red circle moving left"


def test_clips_are_written_once(tmp_path: Path) -> None:
    concept = CONCEPTS["blorp"]
    write_clips(tmp_path, 2, seed=0, make=concept.make)
    names = {f"0000{number}.{ending}" for number in (0, 1) for ending in ("mp4", "txt")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "blorp" in (tmp_path / "00000.txt").read_text(encoding="utf-8")
    before = (tmp_path / "00000.mp4").stat().st_mtime_ns
    write_clips(tmp_path, 2, seed=0, make=concept.make)
    assert (tmp_path / "00000.mp4").stat().st_mtime_ns == before
