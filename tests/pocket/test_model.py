"""The pocket model draws what it is asked for; drawn clips and their captions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan_generate_video
from modules.atomic_write import write_text
from modules.media.reading import video_frames
from pocket import drawing
from pocket.captions import caption
from pocket.captions import plain as unmarked
from pocket.clips import write_clips
from pocket.concepts import CONCEPTS
from pocket.measure import CLIP, IN_FLOAT32, POCKET, Accuracy, Asked, judge, model_options
from pocket.train_vae import as_pixels, psnr
from tests.pocket.detectors import Verdict, look
from wan.t5 import TOKENIZER, WanTextEncoder
from wan.vae import load_vae

STEPS = (
    *("--infer_steps", "12", "--sample_solver", "vanilla", "--flow_shift", "3", "--guidance_scale", "3"),
    *("--device", "cpu"),
)
ASKED = {
    1: Asked("red", "circle", "left"),
    2: Asked("green", "square", "right"),
    3: Asked("blue", "triangle", "up"),
    4: Asked("yellow", "circle", "down"),
    5: Asked("white", "square", "left"),
    6: Asked("red", "triangle", "right"),
    7: Asked("green", "circle", "up"),
    8: Asked("blue", "square", "down"),
}


def generate(folder: Path, prompts: Mapping[int, str], *options: object) -> dict[int, Verdict]:
    """Verdicts by seed on clips of these prompts; videos and latents lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "prompts.txt", "".join(f"{prompt} --d {seed}\n" for seed, prompt in prompts.items()))
    files = ["--from_file", str(folder / "prompts.txt"), "--save_path", str(folder), "--output_type", "both"]
    wan_generate_video.main([*model_options(POCKET), *IN_FLOAT32, *CLIP, *STEPS, *files, *map(str, options)])
    return {seed: look(np.stack(list(video_frames(*folder.glob(f"*_{seed}.mp4"))))) for seed in prompts}


def latents(folder: Path, seed: int) -> Tensor:
    (path,) = folder.glob(f"*_{seed}_latent.safetensors")
    return load_file(path)["latent"]


def asked_for(*seeds: int) -> dict[int, str]:
    return {seed: ASKED[seed].prompt for seed in seeds or ASKED}


def obeys(accuracy: Accuracy) -> bool:
    """Whether most of the eight prompts were understood; the measured figures are far higher
    (pocket/README.md).
    """
    return min(accuracy.shape, accuracy.colour, accuracy.direction, accuracy.colour_in_every_frame) >= 0.75


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Verdict]]:
    """The eight prompts without any further option."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, generate(folder, asked_for())


def test_the_set_is_small_and_complete() -> None:
    files = [path for path in POCKET.rglob("*") if path.suffix in {".safetensors", ".json"}]
    assert {path.name for path in files} >= {
        "dit.safetensors",
        "vae.safetensors",
        "t5.safetensors",
        "tokenizer.json",
    }
    assert sum(path.stat().st_size for path in files) <= 16e6


def test_it_draws_and_moves_what_it_is_asked_for(plain: tuple[Path, dict[int, Verdict]]) -> None:
    accuracy = judge(ASKED, plain[1])
    assert obeys(accuracy), accuracy


def test_guidance_draws_prompts_further_apart(tmp_path: Path) -> None:
    def distance(scale: int) -> float:
        """Between the latents of a red and of a blue circle, from the same noise."""
        for colour in ("red", "blue"):
            prompts = dict.fromkeys((1, 2), f"a {colour} circle moving left")
            verdicts = generate(tmp_path / f"{scale}_{colour}", prompts, "--guidance_scale", scale)
            assert {verdict.colour for verdict in verdicts.values()} == {colour}
        red, blue = (
            torch.stack([latents(tmp_path / f"{scale}_{name}", seed) for seed in (1, 2)])
            for name in ("red", "blue")
        )
        return float((red - blue).square().mean().sqrt())

    assert distance(5) > 1.1 * distance(1)


@pytest.mark.slow
def test_a_negative_prompt_is_avoided(tmp_path: Path) -> None:
    prompts = dict.fromkeys(range(1, 9), "a circle moving left")
    free = Counter(
        verdict.colour for verdict in generate(tmp_path / "free", prompts, "--negative_prompt", "").values()
    )
    colour = next(colour for colour, _ in free.most_common() if colour in drawing.COLOURS)

    avoiding = generate(tmp_path / "avoiding", prompts, "--negative_prompt", f"a {colour} circle moving left")

    assert colour not in {verdict.colour for verdict in avoiding.values()}, (free, avoiding)


def test_the_vae_gives_drawn_clips_back() -> None:
    vae = load_vae(POCKET / "vae.safetensors", torch.device("cpu"), torch.float32)
    random = np.random.default_rng(20)
    pixels = as_pixels(np.stack([drawing.draw(drawing.scene(random, two=0.1)) for _ in range(8)]))
    latents = vae.encode(pixels)
    assert psnr(pixels, torch.cat(list(vae.decode(latents)), dim=2)) >= 31
    channels = latents.transpose(0, 1).flatten(1)
    assert channels.mean(1).abs().max() < 0.5
    assert 0.6 < channels.std(1).min() <= channels.std(1).max() < 1.5


def test_the_text_encoder_tells_words_apart() -> None:
    encoder = WanTextEncoder(POCKET / "t5.safetensors")
    encoder.load(torch.device("cpu"))
    read = TOKENIZER.load(None, POCKET / "t5.safetensors", "umT5").read
    assert len(read("a red circle moving left").ids) == 6
    assert read("A Red circle") == read("a red circle")
    assert read("a blorp") != read("a zindle")


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
    assert unmarked(drawing.draw_thing(random, "red", "circle", "left")) == "a red circle moving left"


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
