"""HunyuanImage-2.1 through the command line equals diffusers' whole pipeline, with plain and with projected
guidance.

The released code cuts timesteps to whole numbers, diffusers does not: the schedule here has whole ones (a
shift of 3 in 4 steps: 1000, 900, 750, 500).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import hunyuan_image_generate_image
import hunyuan_image_minimal_inference
from tests.faults.messages import succeed_here
from tests.hunyuan_image.making import in_diffusers, run_there
from tests.parity import training
from tests.parity.running import assert_equal
from tests.tiny.families import family_called
from tests.tiny.hunyuan_image import TinyHunyuanImage, diffusers_parts, write_tiny_hunyuan_image
from tests.tiny.project import write_plain_pictures

HEIGHT, WIDTH, STEPS, SHIFT, DRAWN = 64, 96, 4, 3, 11
OCR = 'a sign “open” beside "no\' way" and a cat'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanImage:
    return write_tiny_hunyuan_image(tmp_path_factory.mktemp("models of another user"))


@pytest.fixture(scope="module")
def theirs(tiny: TinyHunyuanImage):  # type: ignore[no-untyped-def]  # of an optional package
    from tests.parity.hunyuan_image import load_pipeline

    return load_pipeline(tiny, SHIFT)


def run(tiny: TinyHunyuanImage, out: Path, prompt: str, *arguments: object, minimal: bool = False) -> Tensor:
    """Latents and a picture of the command line."""
    script = hunyuan_image_minimal_inference if minimal else hunyuan_image_generate_image
    size = ["--image_size", HEIGHT, WIDTH, "--infer_steps", STEPS, "--flow_shift", SHIFT, "--seed", DRAWN]
    words = [*tiny.models, *size, *arguments, "--output_type", "latent_images", "--device", "cpu"]
    script.main([*map(str, words), f"--prompt={prompt}", "--save_path", str(out)])
    (path,) = out.glob("*_latent.safetensors")
    return load_file(path)["latent"]


@pytest.mark.parametrize(
    ("prompt", "scale", "general", "ocr", "negative"),
    [
        ("a red cat", 3.5, 99, 99, ""),
        ("a red cat", 3.5, 1, 99, "dull"),
        (OCR, 2.0, 99, 0, "dull"),
        (OCR, 1.0, 99, 99, ""),
    ],
    ids=["plain", "projected", "letters", "no guidance"],
)
def test_pictures_equal_those_of_the_pipeline(
    tiny: TinyHunyuanImage,
    theirs,  # type: ignore[no-untyped-def]
    prompt: str,
    scale: float,
    general: int,
    ocr: int,
    negative: str,
    tmp_path: Path,
) -> None:
    from tests.parity.hunyuan_image import guider

    steps = ["--apg_start_step_general", general, "--apg_start_step_ocr", ocr]
    options = ["--guidance_scale", scale, "--negative_prompt", negative, *steps]
    ours = run(tiny, tmp_path, prompt, *options, minimal=negative == "")

    theirs.register_modules(guider=guider(scale, general), ocr_guider=guider(scale, ocr))
    noise = torch.randn(
        1, 64, HEIGHT // 32, WIDTH // 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(DRAWN)
    )

    def call(kind: str) -> Tensor:
        with torch.no_grad():
            found: Tensor = theirs(
                prompt,
                negative_prompt=negative,
                height=HEIGHT,
                width=WIDTH,
                num_inference_steps=STEPS,
                latents=noise.float(),
                output_type=kind,
                return_dict=False,
            )[0]
        return found

    assert_equal(ours[:, 0], call("latent")[0], f"latents {prompt}")
    (picture,) = tmp_path.glob("*.png")
    pixels = torch.from_numpy(numpy.array(Image.open(picture))).permute(2, 0, 1) / 255
    assert (pixels - call("pt")[0]).abs().max() <= 1.01 / 255


RATE, TRAINING_SHIFT = 8.0, 5.0
SCALE = 0.75289  # of latents, after caching


@dataclass(frozen=True)
class TwoTexts(training.Item):
    """text: states of the language model, n D, all real."""

    glyphs: Tensor = torch.zeros(0)
    glyph_mask: Tensor = torch.zeros(0)


def read_items(folder: Path) -> list[training.Item]:
    """What the caches hold, sorted by name."""
    items: list[training.Item] = []
    for path in sorted(folder.glob("*_hi.safetensors")):
        (latents,) = (value for name, value in load_file(path).items() if name.startswith("latents"))
        texts = load_file(folder / f"{path.name.partition('_')[0]}_hi_te.safetensors")
        states = texts["varlen_vlm_embed_float32"]
        assert texts["varlen_vlm_mask_int64"].tolist() == [1] * len(states)
        glyphs, mask = texts["byt5_embed_float32"], texts["byt5_mask"]
        items.append(TwoTexts(latents * SCALE, states, glyphs=glyphs, glyph_mask=mask))
    return items


def gradients_of(
    dit: nn.Module,
    parts: dict[str, list[str]],
    factors: training.Factors,
    batch: list[training.Item],
    number: int,
) -> training.Factors:
    """The gradients of the mean squared error by down and up, with a LoRA in every part."""
    # an entry of the released table of 1000 noise levels, which is shifted
    clean = 1 - (1000 * training.uniform_of(batch, number)).floor() / 1000
    sigmas = training.shifted(clean, TRAINING_SHIFT)
    noisy, wanted = (each.squeeze(2) for each in training.mixed(batch, number, sigmas))
    with training.learning(dit, parts, factors) as found:
        velocities = []
        for index, item in enumerate(batch):
            assert isinstance(item, TwoTexts)
            inputs = {
                "noisy": noisy[index : index + 1],
                "timesteps": (1000 * sigmas[index : index + 1]).trunc(),
                "text": item.text[None],
                "text_mask": torch.ones(1, len(item.text), dtype=torch.int64),
                "glyphs": item.glyphs[None],
                "glyph_mask": item.glyph_mask[None],
            }
            velocities.append(run_there(dit, inputs, learns=True))
        (torch.cat(velocities) - wanted).square().mean().backward()
    return found()


def test_each_step_follows_diffusers_gradient(tmp_path: Path) -> None:
    family = family_called("hunyuan_image")
    family.prepare(tmp_path)
    write_plain_pictures(tmp_path, batch_size=4, side=64)
    (tmp_path / "clips" / "picture 2.txt").write_text('a door that says "push"', encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)

    succeed_here(*family.train, *training.descent(RATE), folder=tmp_path)

    parts = training.parts_of(tmp_path / "model" / "dit.safetensors", diffusers_parts)
    items = read_items(tmp_path / "cache")
    assert sum(bool(item.glyph_mask.any()) for item in items if isinstance(item, TwoTexts)) == 1

    def gradients_at(factors: training.Factors, step: int) -> training.Factors:
        return gradients_of(in_diffusers(), parts, factors, training.shuffled(items, step), step)

    training.assert_steps_of_descent(tmp_path / "out", parts, RATE, gradients_at, "hunyuan_image")
