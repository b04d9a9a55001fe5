"""gen_img.py and the tools for finished videos on the emulated device: nothing raises, no step waits."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from modules.media.reading import read_image
from modules.media.writing import write_png, write_video
from tests.emulated_cuda.pairs import Done, run_on_device
from tests.faults.messages import succeed_here
from tests.post.stages_here import write_clip
from tests.tiny import post_restorers
from tests.tiny.control_nets import write_control_net
from tests.tiny.post_faces import write_red_detector
from tests.tiny.post_flowformer import write_flowformer
from tests.tiny.post_interpolation import write_gimm_f, write_gimm_r
from tests.tiny.post_upscaling import write_rrdb, write_swinir
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl

pytestmark = pytest.mark.slow

SAMPLERS = ("ddim", "euler_a", "dpmsolver++", "heun", "dpm_2", "lms", "pndm")
PICTURE = ("--W", "64", "--H", "64", "--steps", "4", "--scale", "4", "--seed", "5", "--sequential_file_name")
CLIP = ("--codec", "h264", "--container", "mp4", "--keep_pngs")


def both(*commands: list[str], folder: Path) -> tuple[list[Done], list[list[Path]]]:
    """Run commands on the device and, in a copy of the folder, on the CPU.

    Returns what was done on the device, and the pictures of both, in order.
    """
    there = folder.with_name("there")
    shutil.copytree(folder, there)
    done = run_on_device(*commands, folder=folder)
    for command in commands:
        succeed_here(command[0], "--device", "cpu", *command[1:], folder=there)
    before = {path.relative_to(there) for path in there.rglob("*.png")}
    return done, [sorted(each / path for path in before) for each in (folder, there)]


def assert_alike(here: list[Path], there: list[Path], steps: int = 1) -> None:
    """steps: of 255, by which a pixel may differ; 16 bits round where the CPU computes in 32."""
    assert here
    for one, other in zip(here, there, strict=True):
        apart = np.abs(read_image(one).astype(int) - read_image(other)).max()
        assert apart <= steps, f"{one.name}: {apart}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "here"
    made.mkdir()
    return made


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_pictures_of_stable_diffusion(folder: Path, kind: str) -> None:
    model = (write_sd1 if kind == "sd1" else write_sdxl)(folder)
    tokenizer_folder(folder / "t")
    write_png(folder / "start.png", np.full((64, 64, 3), 90, np.uint8))
    write_png(folder / "mask.png", np.pad(np.full((32, 32, 3), 255, np.uint8), ((16, 16), (16, 16), (0, 0))))
    common = ["gen_img.py", "--ckpt", model.name, "--tokenizer_cache_dir", "t", *PICTURE]
    common += ["--prompt", "a (cat:1.3) --n bad", "--outdir"]
    commands = [[*common, f"out {name}", "--sampler", name] for name in SAMPLERS]
    commands += [
        [*common, "two", "--highres_fix_scale", "0.5", "--highres_fix_steps", "2", "--batch_size", "2"]
        + ["--images_per_prompt", "2"],
        [*common, "image", "--image_path", "start.png", "--strength", "0.7", "--mask_image", "mask.png"],
        [*common, "sliced", "--vae_slices", "2"],
    ]
    if kind == "sd1":
        write_control_net(folder / "control.safetensors", "sd1")
        control = ["--control_net_models", "control.safetensors", "--guide_image_path", "start.png"]
        commands.append([*common, "control", *control])

    done, pictures = both(*commands, folder=folder)

    assert_alike(*pictures, steps=3)
    for command, each in zip(commands, done, strict=True):
        # diffusers sends noise, which comes from the pictures' own generators, with a wait
        waits = {"stable_diffusion/samplers.py step": 4} if "euler_a" in command else {}
        if "--mask_image" in command:  # and the timestep that it begins at
            waits = {"stable_diffusion/samplers.py add_noise": 1}
        assert each.places("denoise") == waits, (command[-2:], each.places("denoise"))


def test_a_clip_through_upscalers(folder: Path) -> None:
    write_clip(folder / "clip.mp4", frames=3, width=32, height=16)
    write_rrdb(folder / "r.pth")
    write_swinir(folder / "s.safetensors")
    chain = ["--model", "r.pth", "--mode", "esrgan", "--input", "clip.mp4", *CLIP]

    _, pictures = both(
        ["blissful_tuner/upscaler.py", *chain, "--then", "upscaler", "model=s.safetensors", "scale=1"],
        folder=folder,
    )

    assert_alike(*pictures, steps=3)


@pytest.mark.parametrize("mode", ["gimmvfi_r", "gimmvfi_f"])
def test_a_clip_with_pictures_between(folder: Path, mode: str) -> None:
    write_gimm_f(write_gimm_r(folder))
    write_flowformer(folder / "flowformer_sintel_fp32.safetensors")
    write_clip(folder / "clip.mp4", frames=3, width=144, height=128)
    words = ["--input", "clip.mp4", "--model", ".", "--mode", mode, "--factor", "2", *CLIP]

    _, pictures = both(["blissful_tuner/GIMMVFI.py", *words], folder=folder)

    assert_alike(*pictures, steps=3)


@pytest.mark.parametrize("mode", ["gfpgan", "codeformer"])
def test_a_clip_with_faces(folder: Path, mode: str) -> None:
    post_restorers.write_model(folder / "GFPGANv1.4.pth", post_restorers.gfpgan_weights(), "params_ema")
    post_restorers.write_model(folder / "codeformer.safetensors", post_restorers.codeformer_weights())
    post_restorers.write_model(folder / "parsing_parsenet.pth", post_restorers.parsenet_weights(part=1))
    write_red_detector(folder / "detection_Resnet50_Final.pth", 24)
    frames = np.full((3, 64, 96, 3), 40, np.uint8)
    frames[:, 20:28, 40:48] = (255, 0, 0)
    write_video(folder / "clip.mp4", list(frames), 12)
    words = ["--input", "clip.mp4", "--model", ".", "--mode", mode, *CLIP]

    _, pictures = both(["blissful_tuner/facefix.py", *words], folder=folder)

    assert_alike(*pictures, steps=3)
