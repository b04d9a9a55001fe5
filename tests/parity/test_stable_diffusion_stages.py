"""Pictures of gen_img.py in stages, or with ControlNets, equal compositions of diffusers' pipelines."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import gen_img
from stable_diffusion.contract import UnetCall
from tests.parity.stable_diffusion import (
    SIZE,
    Files,
    FilesOf,
    assert_close,
    generators,
    pipeline,
    run_script,
    their_pixels,
    write_image,
    write_mask,
)
from tests.stable_diffusion.test_highres import walk
from tests.tiny.control_nets import control_net, write_control_net, write_lllite

PROMPT, NEGATIVE = "a red cat sits on a table", "blurred, ugly"
TEXTS = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0}
LINE = f"{PROMPT} --n {NEGATIVE} --l 5 --d 7"
STAGES = ["--highres_fix_scale", 0.5, "--highres_fix_steps", 3, "--steps", 4, "--highres_fix_strength", 0.7]


def first(files: Files, sampler: str, **others: Any) -> Any:
    made = pipeline(files, "", sampler)(
        **TEXTS, num_inference_steps=3, width=SIZE // 2, height=SIZE // 2, generator=generators(7), **others
    )
    return made.images


def second(files: Files, sampler: str, image: Any) -> np.ndarray[Any, Any]:
    made = pipeline(files, "Img2Img", sampler)(
        **TEXTS, num_inference_steps=4, image=image, strength=0.7, generator=generators(8)
    )
    return their_pixels(made)


def test_two_stages_with_pictures_between(files_of: FilesOf, tmp_path: Path) -> None:
    files = files_of("sdxl")
    (small,) = first(files, "euler_a")
    large = small.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    ours = run_script(files, tmp_path, "--prompt", LINE, "--sampler", "euler_a", *STAGES)
    assert_close(ours, second(files, "euler_a", large))


def test_two_stages_with_a_module_between(
    files_of: FilesOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror.py").write_text(
        "class Mirror:\n"
        "    def upscale(self, vae, imgs, latents, dtype, width, height, batch_size, vae_batch_size):\n"
        "        return [image.transpose(0).resize((width, height), self.filter) for image in imgs]\n"
        "def create_upscaler(filter):\n"
        "    made = Mirror()\n"
        "    made.filter = int(filter)\n"
        "    return made\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (small,) = first(files_of("sd1"), "ddim")
    large = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    module = ["--highres_fix_upscaler", "mirror", "--highres_fix_upscaler_args", "filter=0"]
    out = tmp_path / "out"
    say = ["--prompt", LINE, *STAGES, *module, "--highres_fix_save_1st"]
    words = [*files_of("sd1").options, "--outdir", out, "--sequential_file_name", "--W", SIZE, "--H", SIZE]
    gen_img.main([str(word) for word in [*words, *say]])
    assert_close(pixels(next(out.glob("im_1*.png"))), second(files_of("sd1"), "ddim", large))
    saved = next(out.glob("im_0*.png"))
    assert_close(pixels(saved), np.asarray(small)[None])
    assert Image.open(saved).text["seed"] == "7"  # type: ignore[attr-defined]


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))[None]


def test_deep_shrink(files_of: FilesOf, tmp_path: Path) -> None:
    pipe = pipeline(files_of("sd1"), "", "ddim")
    unet, depths = pipe.unet, []

    def shrunk(
        sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> Any:
        t = float(timestep)
        depths.append(2 if t >= 600 else 4 if t >= 300 else None)
        call = UnetCall(0, 1, t, sample, encoder_hidden_states, 1)
        return (walk(unet, call, depths[-1], 0.5),)

    normal, unet.forward = unet.forward, shrunk
    try:
        theirs = pipe(**TEXTS, num_inference_steps=4, width=SIZE, height=SIZE, generator=generators(7))
    finally:
        unet.forward = normal
    assert set(depths) == {2, 4, None}
    line = f"{LINE} --dsd1 2 --dst1 600 --dsd2 4 --dst2 300"
    assert_close(run_script(files_of("sd1"), tmp_path, "--prompt", line, "--steps", 4), their_pixels(theirs))


@torch.no_grad()
def test_gradual_latent(files_of: FilesOf, tmp_path: Path) -> None:
    side, pipe = 16, pipeline(files_of("sd1"), "", "euler_a")
    negative, positive = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)[::-1]
    scheduler, (generator,) = pipe.scheduler, generators(7)
    scheduler.set_timesteps(5)
    x = torch.randn(1, 4, side, side, generator=generator) * scheduler.init_noise_sigma
    x, grown = interpolate(x, (side // 2, side // 2), mode="bicubic"), 0
    for sigma, below, t in zip(scheduler.sigmas, scheduler.sigmas[1:], scheduler.timesteps, strict=False):
        scaled = torch.cat([x / (sigma**2 + 1) ** 0.5] * 2)
        avoided, wanted = pipe.unet(scaled, t, torch.cat([negative, positive])).sample.chunk(2)
        epsilon = avoided + 5 * (wanted - avoided)
        up = (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5
        x = x + epsilon * ((below**2 - up**2) ** 0.5 - sigma)
        if t < 800 and not grown:
            x, grown = interpolate(x, (side, side), mode="bicubic"), int(t)
        x = x + torch.randn(x.shape, generator=generator) * up
    theirs = pipe.image_processor.postprocess(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample)
    assert grown
    line = f"{LINE} --glt 800 --gls 0.5 --w {side * 8} --h {side * 8}"
    ours = run_script(files_of("sd1"), tmp_path, "--prompt", line, "--steps", 5, "--sampler", "euler_a")
    assert_close(ours, np.stack([np.asarray(image) for image in theirs]))


STEPS, SCALE, STRENGTH = 4, 5.0, 0.8


def theirs(files: Files, task: str, sampler: str, **asked: Any) -> np.ndarray[Any, Any]:
    """Pictures of a pipeline with a ControlNet. task: "", "Img2Img" or "Inpaint"."""
    base = pipeline(files, "", sampler)
    made_by = getattr(
        diffusers, f"StableDiffusion{'XL' if files.kind == 'sdxl' else ''}ControlNet{task}Pipeline"
    )
    others = {name: base.config[name] for name in ("requires_safety_checker",) if name in base.config}
    if files.kind == "sdxl":
        others = {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
    made = made_by(**base.components, controlnet=control_net(files.kind), **others)
    made.set_progress_bar_config(disable=True)
    default = {"num_inference_steps": STEPS, "width": SIZE, "height": SIZE, "generator": generators(7)}
    return their_pixels(made(**TEXTS, controlnet_conditioning_scale=STRENGTH, **{**default, **asked}))


def ours(
    files: Files, folder: Path, sampler: str, *words: object, steps: int = STEPS
) -> np.ndarray[Any, Any]:
    """Pictures of the script with the same ControlNet and the guide of `guide_in`."""
    return run_script(
        files,
        folder / "out",
        *("--prompt", f"{PROMPT} --n {NEGATIVE} --l {SCALE} --s {steps} --d 7", "--sampler", sampler),
        *("--control_net_models", write_control_net(folder / "net.safetensors", files.kind)),
        *("--control_net_weights", STRENGTH, "--guide_image_path", folder / "guide.png", *words),
    )


def guide_in(folder: Path, size: tuple[int, int] = (96, 80)) -> Image.Image:
    return Image.open(write_image(folder / "guide.png", size, seed=5))


def test_pictures_from_text(files_of: FilesOf, tmp_path: Path) -> None:
    files, guide = files_of("sdxl"), guide_in(tmp_path)

    wanted = theirs(files, "", "euler", image=guide)

    assert_close(ours(files, tmp_path, "euler"), wanted)
    asked = {"num_inference_steps": STEPS, "width": SIZE, "height": SIZE, "generator": generators(7)}
    without = their_pixels(pipeline(files, "", "euler")(**TEXTS, **asked))
    assert np.abs(wanted.astype(int) - without).max() > 20  # the guide is seen


def test_it_ends_after_its_share_of_the_steps(files_of: FilesOf, tmp_path: Path) -> None:
    guide = guide_in(tmp_path)
    # the third of four steps begins at one half, and ends at three quarters
    wanted = theirs(files_of("sd1"), "", "ddim", image=guide, control_guidance_end=0.75)
    assert_close(ours(files_of("sd1"), tmp_path, "ddim", "--control_net_ratios", 0.5), wanted)


def test_pictures_from_pictures(files_of: FilesOf, tmp_path: Path) -> None:
    files, guide = files_of("sd1"), guide_in(tmp_path, (SIZE, SIZE))
    source = write_image(tmp_path / "source.png", (SIZE, SIZE))
    asked = {"image": Image.open(source), "strength": 0.6, "num_inference_steps": 5}

    wanted = theirs(files, "Img2Img", "ddim", control_image=guide, **asked)

    words = ("--image_path", source, "--strength", 0.6)
    assert_close(ours(files, tmp_path, "ddim", *words, steps=5), wanted)


@pytest.mark.slow
def test_inpainting_with_a_checkpoint_for_it(files_of: FilesOf, tmp_path: Path) -> None:
    files, guide = files_of("sd1 painter"), guide_in(tmp_path, (SIZE, SIZE))
    source = write_image(tmp_path / "source.png", (SIZE, SIZE))
    mask = write_mask(tmp_path / "mask.png", (SIZE, SIZE), (11, 5, 43, 50))
    asked = {"image": Image.open(source), "mask_image": Image.open(mask), "strength": 1.0}

    wanted = theirs(files, "Inpaint", "ddim", control_image=guide, **asked)

    words = ("--image_path", source, "--mask_path", mask, "--strength", 1.0)
    assert_close(ours(files, tmp_path, "ddim", *words), wanted)


def test_a_batch_with_two_guides_each_equals_single_pictures(files_of: FilesOf, tmp_path: Path) -> None:
    (tmp_path / "guides").mkdir()
    for number in range(4):
        write_image(tmp_path / "guides" / f"{number}.png", (SIZE, 72), seed=number)
    (tmp_path / "lines.txt").write_text("a cat --d 3\nthe sea --n ugly --d 4\n", encoding="utf-8")
    words = [
        *("--from_file", tmp_path / "lines.txt", "--sampler", "euler_a", "--steps", 3, "--W", 72, "--H", 56),
        *("--control_net_lllite_models", write_lllite(tmp_path / "1.safetensors")),
        *(write_lllite(tmp_path / "2.safetensors", seed=61), "--control_net_preps", "none", "canny_63_191"),
        *("--guide_image_path", tmp_path / "guides"),
    ]

    batch = run_script(files_of("sdxl"), tmp_path / "batch", *words, "--batch_size", 2)
    single = run_script(files_of("sdxl"), tmp_path / "single", *words)

    assert_close(batch, single)
    assert np.abs(batch[0].astype(int) - batch[1]).max() > 20


@pytest.mark.slow
def test_the_second_stage_can_do_without(files_of: FilesOf, tmp_path: Path) -> None:
    guide_in(tmp_path)
    lines = ("--prompt", f"{PROMPT} --s 3 --d 7", "--highres_fix_scale", 0.5, "--highres_fix_steps", 3)
    net = write_control_net(tmp_path / "net.safetensors", "sd1")
    control = ("--control_net_models", net, "--guide_image_path", tmp_path / "guide.png")

    found = [
        run_script(files_of("sd1"), tmp_path / str(number), *lines, *words).tobytes()
        for number, words in enumerate(((), control, (*control, "--highres_fix_disable_control_net")))
    ]

    assert len(set(found)) == 3  # in no stage, in both, in the first
