"""Pictures of gen_img.py with ControlNets equal those of diffusers' pipelines with the same weights."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from tests.parity.stable_diffusion import (
    SIZE,
    Files,
    assert_close,
    generators,
    pipeline,
    run_script,
    their_pixels,
    write_files,
    write_mask,
    write_picture,
)
from tests.tiny.control_nets import control_net, write_control_net, write_lllite

PROMPT, NEGATIVE = "a red cat sits on a table", "blurred, ugly"
STEPS, SCALE, STRENGTH = 4, 5.0, 0.8


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files("sdxl", tmp_path_factory.mktemp("sdxl"))


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
    return their_pixels(
        made(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            guidance_scale=SCALE,
            generator=generators(7),
            controlnet_conditioning_scale=STRENGTH,
            **{"num_inference_steps": STEPS, "width": SIZE, "height": SIZE, **asked},
        )
    )


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
    return Image.open(write_picture(folder / "guide.png", size, seed=5))


@pytest.mark.parametrize(
    ("model", "sampler"), [pytest.param("sd1", "euler_a", marks=pytest.mark.slow), ("sdxl", "euler")]
)
def test_pictures_from_text(request: pytest.FixtureRequest, tmp_path: Path, model: str, sampler: str) -> None:
    files: Files = request.getfixturevalue(model)
    guide = guide_in(tmp_path)

    wanted = theirs(files, "", sampler, image=guide)

    assert_close(ours(files, tmp_path, sampler), wanted)
    without = their_pixels(
        pipeline(files, "", sampler)(
            PROMPT,
            negative_prompt=NEGATIVE,
            guidance_scale=SCALE,
            generator=generators(7),
            num_inference_steps=STEPS,
            width=SIZE,
            height=SIZE,
        )
    )
    assert np.abs(wanted.astype(int) - without).max() > 20  # the guide is seen


def test_it_ends_after_its_share_of_the_steps(sd1: Files, tmp_path: Path) -> None:
    guide = guide_in(tmp_path)
    # the third of four steps begins at one half, and ends at three quarters
    wanted = theirs(sd1, "", "ddim", image=guide, control_guidance_end=0.75)
    assert_close(ours(sd1, tmp_path, "ddim", "--control_net_ratios", 0.5), wanted)


def test_pictures_from_pictures(sd1: Files, tmp_path: Path) -> None:
    guide = guide_in(tmp_path, (SIZE, SIZE))
    source = write_picture(tmp_path / "source.png", (SIZE, SIZE))

    wanted = theirs(
        sd1,
        "Img2Img",
        "ddim",
        image=Image.open(source),
        control_image=guide,
        strength=0.6,
        num_inference_steps=5,
    )

    words = ("--image_path", source, "--strength", 0.6)
    assert_close(ours(sd1, tmp_path, "ddim", *words, steps=5), wanted)


@pytest.mark.slow
def test_inpainting_with_a_checkpoint_for_it(tmp_path: Path) -> None:
    files = write_files("sd1", tmp_path, channels=9)
    guide = guide_in(tmp_path, (SIZE, SIZE))
    source = write_picture(tmp_path / "source.png", (SIZE, SIZE))
    mask = write_mask(tmp_path / "mask.png", (SIZE, SIZE), (11, 5, 43, 50))

    wanted = theirs(
        files,
        "Inpaint",
        "ddim",
        image=Image.open(source),
        mask_image=Image.open(mask),
        control_image=guide,
        strength=1.0,
    )

    words = ("--image_path", source, "--mask_path", mask, "--strength", 1.0)
    assert_close(ours(files, tmp_path, "ddim", *words), wanted)


def test_a_batch_with_two_guides_each_equals_single_pictures(sdxl: Files, tmp_path: Path) -> None:
    (tmp_path / "guides").mkdir()
    for number in range(4):
        write_picture(tmp_path / "guides" / f"{number}.png", (SIZE, 72), seed=number)
    (tmp_path / "lines.txt").write_text("a cat --d 3\nthe sea --n ugly --d 4\n", encoding="utf-8")
    words = [
        *("--from_file", tmp_path / "lines.txt", "--sampler", "euler_a", "--steps", 3, "--W", 72, "--H", 56),
        *("--control_net_lllite_models", write_lllite(tmp_path / "1.safetensors")),
        *(write_lllite(tmp_path / "2.safetensors", seed=61), "--control_net_preps", "none", "canny_63_191"),
        *("--guide_image_path", tmp_path / "guides"),
    ]

    batch = run_script(sdxl, tmp_path / "batch", *words, "--batch_size", 2)
    single = run_script(sdxl, tmp_path / "single", *words)

    assert_close(batch, single)
    assert np.abs(batch[0].astype(int) - batch[1]).max() > 20


@pytest.mark.slow
def test_the_second_stage_can_do_without(sd1: Files, tmp_path: Path) -> None:
    guide_in(tmp_path)
    lines = ("--prompt", f"{PROMPT} --s 3 --d 7", "--highres_fix_scale", 0.5, "--highres_fix_steps", 3)
    net = write_control_net(tmp_path / "net.safetensors", "sd1")
    control = ("--control_net_models", net, "--guide_image_path", tmp_path / "guide.png")

    found = [
        run_script(sd1, tmp_path / str(number), *lines, *words).tobytes()
        for number, words in enumerate(((), control, (*control, "--highres_fix_disable_control_net")))
    ]

    assert len(set(found)) == 3  # in no stage, in both, in the first
