"""The scripts that generate with Stable Diffusion: their pictures are those of gen_img.py."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from browser.pages.generate.result_settings import read_settings
from generation.options import read_generation
from modules.errors import OptionError
from stable_diffusion.samplers import ScaledSolver, begin_sampling, make_scheduler
from stable_diffusion.sdxl.options import GENERATION, SdxlGenerationOptions
from tests.commands import assert_user_error, run_script
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


@pytest.mark.slow
def test_a_lora_of_texts_and_unet_changes_pictures_as_in_gen_img(folder: Path) -> None:
    lora = folder / "lora.safetensors"
    generator = torch.Generator().manual_seed(1)
    unet, text = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te_text_model"
    shapes = {unet: 32, f"{text}_encoder_layers_0_self_attn_q_proj": 64}
    tensors = {}
    for name, width in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, lora)
    shared = ["--steps", "3", "--seed", "5", "--prompt", "a cat"]
    generate(folder, SD, "sd1", *SIZE, *shared, "--save_path", "plain")
    strength = ["--lora_weight", "lora.safetensors", "--lora_multiplier", "0.7"]
    generate(folder, SD, "sd1", *SIZE, *shared, *strength, "--save_path", "changed")
    theirs = [
        "--network_module",
        "networks.lora",
        "--network_weights",
        "lora.safetensors",
        "--network_mul",
        "0.7",
    ]
    generate(
        folder, GEN_IMG, "sd1", "--W", "96", "--H", "64", *shared, *theirs, "--outdir", "changed of gen_img"
    )

    changed = pixels_of(folder / "changed")
    assert abs(changed - pixels_of(folder / "plain")).max() > 2
    assert abs(changed - pixels_of(folder / "changed of gen_img")).max() <= 1


def test_saved_latents_are_decoded_to_the_same_picture(folder: Path) -> None:
    words = ["--prompt", "a cat", *SIZE, "--steps", "2", "--seed", "5"]
    generate(folder, SD, "sd1", *words, "--output_type", "latent_images", "--save_path", "both")
    (latents,) = (folder / "both").glob("*_latent.safetensors")
    generate(folder, SD, "sd1", "--latent_path", str(latents), "--save_path", "decoded")
    assert (pixels_of(folder / "decoded") == pixels_of(folder / "both")).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control_net_models", "x"], "--control_net_models is refused: gen_img.py has it"),
        (["--highres_fix_scale", "0.5"], "--highres_fix_scale is refused: gen_img.py has it"),
        (["--nag_scale", "4"], "--nag_scale is refused: the U-Net runs its blocks by itself"),
        (["--blocks_to_swap", "4"], "--blocks_to_swap is refused: the U-Net runs its blocks by itself"),
        (["--prompt_weighting"], "--prompt_weighting is refused: brackets in prompts are weights"),
        (["--save_merged_model", "x.safetensors"], "Use networks/sdxl_merge_lora.py"),
        (["--batch_size", "4"], "--num_images makes several"),
        (["--fp16", "--bf16"], "--fp16"),
    ],
)
def test_what_only_gen_img_or_transformers_have_is_refused_by_name(words: list[str], message: str) -> None:
    files = ["--ckpt", "sdxl.safetensors", "--prompt", "a", "--save_path", "out"]
    with pytest.raises(OptionError, match=re.escape(message)):
        read_generation("", GENERATION, SdxlGenerationOptions, [*files, *words])


def test_a_checkpoint_of_another_kind_names_its_script(folder: Path) -> None:
    words = ["--ckpt", "sd1.safetensors", "--prompt", "a", "--save_path", "out"]
    done = run_script(XL, *words, folder=folder, check=False)
    assert_user_error(done, "is Stable Diffusion 1.x, which sd_generate_image.py takes")


@pytest.mark.parametrize("predicts_v", [False, True])
def test_the_clean_picture_is_predicted_from_noise_or_v(predicts_v: bool) -> None:
    clean, noise = torch.randn(2, 1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = 0.6
    noisy = 0.8 * clean + sigma * noise
    output = 0.8 * noise - sigma * clean if predicts_v else noise
    scheduler = make_scheduler("ddim", predicts_v)
    solver = ScaledSolver(begin_sampling(scheduler, 2, [torch.Generator()]), noisy, noise, predicts_v)
    torch.testing.assert_close(solver.clean(sigma, noisy, output), clean)


@pytest.mark.parametrize(("script", "model", "family"), [(SD, "sd1", "sd1"), (XL, "sdxl", "sdxl")])
def test_a_picture_says_how_it_was_made(folder: Path, script: str, model: str, family: str) -> None:
    words = ["--steps", "1", "--seed", "5", "--prompt", "a cat", *SIZE, "--save_path", f"told {model}"]
    generate(folder, script, model, *words)
    (path,) = (folder / f"told {model}").glob("*.png")
    settings = read_settings(path)
    assert settings is not None
    assert (settings.family, settings.get("prompt"), settings.get("seeds")) == (family, "a cat", "5")
