"""The scripts that generate with Stable Diffusion: their pictures are those of gen_img.py."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import run_script
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sd2, write_sdxl

SIZE = ["--image_size", "64", "96"]
SD, XL, GEN_IMG = "sd_generate_image.py", "sdxl_generate_image.py", "gen_img.py"
# by case: the script, its own words, and what gen_img.py has in their place
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "ancestral": (XL, ["--sampler", "euler_a"], ["--sampler", "euler_a"]),
    "second order": (SD, ["--sampler", "heun"], ["--sampler", "heun"]),
    "v": (
        SD,
        ["--sampler", "dpmsolver++", "--v_parameterization", "--zero_terminal_snr"],
        ["--sampler", "dpmsolver++", "--v_parameterization", "--zero_terminal_snr"],
    ),
    "texts": (
        XL,
        ["--clip_skip", "1", "--max_embeddings_multiples", "3"],
        ["--clip_skip", "1", "--max_embeddings_multiples", "3"],
    ),
    "picture": (XL, ["--i2i_path", "start.png", "--strength", "0.5"], ["--image_path", "start.png"]),
    "picture, second order": (
        SD,
        ["--i2i_path", "start.png", "--strength", "0.5", "--sampler", "dpm_2_a"],
        ["--image_path", "start.png", "--sampler", "dpm_2_a"],
    ),
}
PROMPT = "a (very:1.4) long [red] cat " + "with a small hat " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_sd1(folder)
    write_sd2(folder)
    write_sdxl(folder)
    tokenizer_folder(folder / "tokenizers")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "start.png")
    return folder


def generate(folder: Path, script: str, model: str, *words: str) -> str:
    files = ["--ckpt", f"{model}.safetensors", "--tokenizer_cache_dir", "tokenizers"]
    process = run_script(script, *files, *words, folder=folder)
    return process.stdout + process.stderr


def pixels_of(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_gen_img(folder: Path, case: str) -> None:
    script, own, theirs = CASES[case]
    model = "sdxl" if script == XL else "sd2" if case == "v" else "sd1"
    shared = ["--steps", "4", "--seed", "5", "--scale", "4", "--prompt"]
    generate(
        folder,
        script,
        model,
        *own,
        *SIZE,
        *shared,
        PROMPT,
        "--negative_prompt",
        "(ugly:1.2)",
        "--save_path",
        case,
    )
    line = f"{PROMPT} --n (ugly:1.2)"
    strength = ["--strength", "0.5"] if "--image_path" in theirs else []
    outdir = f"{case} of gen_img"
    generate(
        folder,
        GEN_IMG,
        model,
        *theirs,
        *strength,
        "--W",
        "96",
        "--H",
        "64",
        *shared,
        line,
        "--outdir",
        outdir,
    )

    made, expected = pixels_of(folder / case), pixels_of(folder / outdir)
    assert made.std() > 5
    assert abs(made - expected).max() <= 1
