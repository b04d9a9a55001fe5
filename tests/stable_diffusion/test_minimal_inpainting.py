"""inpainting_minimal_inference.py: what a mask leaves is kept, and its options are those of gen_img.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from modules.media.reading import read_tags
from stable_diffusion.contract import ImageSettings, RequestedImage
from stable_diffusion.minimal_inpainting import load_for_inpainting, make_mask
from stable_diffusion.minimal_options import gen_img_argv, read_minimal
from stable_diffusion.options import read_gen_img
from stable_diffusion.starting import read_picture, to_pixels
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1

SIZE, STEPS, SCALE, SEED = 64, 3, 4.0, 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((SIZE * 2, SIZE * 2), np.uint8)
    mask[16:80, 32:88] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


def words(folder: Path, model: Path, *further: object) -> list[str]:
    files = ["--ckpt_path", model, "--tokenizer_cache_dir", folder / "tokenizers"]
    files += ["--image", folder / "photo.png", "--width", SIZE + 9, "--height", SIZE]
    return [str(word) for word in (*files, "--steps", STEPS, "--guidance_scale", SCALE, *further)]


def euler(channels: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Latents of our generator, and those of sd-scripts' loop in plain code with diffusers' scheduler."""
    model = write_sd1(folder, channels=channels)
    options = read_minimal(None, words(folder, model, "--mask", folder / "mask.png"))
    make_mask(options.picture, SEED).save(folder / "small.png")
    gen_img = read_gen_img(None, gen_img_argv(options, folder / "small.png", SEED))
    generator = load_for_inpainting(gen_img, torch.device("cpu"))
    settings = ImageSettings(SIZE, SIZE, STEPS, SCALE, strength=1.0)
    requested = RequestedImage("the prompt", "a cat", "ugly", SEED, settings, "")
    requested = replace(requested, image=folder / "photo.png", mask=folder / "small.png")
    ours = generator.make([requested], wants_images=False).latents

    pixels = to_pixels(read_picture(folder / "photo.png"), SIZE, SIZE)
    white = torch.from_numpy(np.asarray(Image.open(folder / "mask.png"))[::2, ::2] > 127).float()[None, None]
    mask = white[:, :, ::8, ::8]
    random = torch.Generator().manual_seed(SEED)
    loaded = generator.model
    with torch.no_grad():
        image = loaded.vae.encode(pixels).latent_dist.sample(random) * loaded.vae.config.scaling_factor
        noise = torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=random)
        masked = loaded.vae.encode(pixels * (1 - white)).latent_dist.sample(random)
    further = torch.cat([mask, masked * loaded.vae.config.scaling_factor], dim=1) if channels == 9 else None
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    scheduler.set_timesteps(STEPS)
    texts = [generator.prompt_encoder.encode(text).context[None] for text in ("ugly", "a cat")]
    latents = noise * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        inputs = scaled if further is None else torch.cat([scaled, further], dim=1)
        with torch.no_grad():
            avoided, asked = (loaded.unet(inputs, timestep, text).sample for text in texts)
        guided = avoided + SCALE * (asked - avoided)
        latents = scheduler.step(guided, timestep, latents).prev_sample
        latents = mask * latents + (1 - mask) * (image + noise * scheduler.sigmas[index + 1])
    return ours, latents


@pytest.mark.parametrize("channels", [4, 9])
def test_each_step_restores_what_the_mask_leaves(channels: int, folder: Path) -> None:
    ours, expected = euler(channels, folder)
    # sums in another order, in float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_script_writes_what_its_options_ask_for(folder: Path) -> None:
    model = write_sd1(folder, channels=9)
    asked = ["--prompt", "a cat", "--negative_prompt", "ugly", "--output_dir", folder / "out", "--seed", 7]
    given = words(folder, model, *asked)
    said = succeed_here("inpainting_minimal_inference.py", *given, folder=folder)

    (path,) = (folder / "out").glob("*.png")
    assert Image.open(path).size == (SIZE, SIZE)
    tags = read_tags(path)
    assert [tags[name] for name in ("prompt", "negative-prompt", "seed", "steps")] == [
        "a cat",
        "ugly",
        "7",
        "3",
    ]
    assert "seed 7 draws a wavy ellipse" in said


def test_errors_name_the_options_that_were_typed(folder: Path) -> None:
    given = words(folder, folder / "none.safetensors")
    code, said = run_here("inpainting_minimal_inference.py", *given, folder=folder)
    assert_one_message(code, said, "--ckpt_path")
    given = words(folder, write_sd1(folder, channels=9), "--mask", folder / "none.png")
    code, said = run_here("inpainting_minimal_inference.py", *given, folder=folder)
    assert_one_message(code, said, "--mask ")
