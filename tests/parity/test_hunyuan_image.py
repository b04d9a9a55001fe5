"""HunyuanImage-2.1 through the command line equals diffusers' whole pipeline, with plain and with projected
guidance.

The released code cuts timesteps to whole numbers, diffusers does not: the schedule here has whole ones (a
shift of 3 in 4 steps: 1000, 900, 750, 500).
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hunyuan_image_generate_image
import hunyuan_image_minimal_inference
from tests.parity.running import assert_equal, latents_in, picture_in
from tests.tiny.hunyuan_image import TinyHunyuanImage, write_tiny_hunyuan_image

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
    return latents_in(out)


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
    assert (picture_in(tmp_path).permute(2, 0, 1) / 255 - call("pt")[0]).abs().max() <= 1.01 / 255
