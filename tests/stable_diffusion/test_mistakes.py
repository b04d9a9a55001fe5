"""Mistakes on the command line of gen_img.py, and files that are wrong, damaged or hostile: one message each,
before the checkpoint is loaded.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from modules.checkpoints.containers import SafetensorsFile
from tests.faults.messages import assert_one_message, run_here
from tests.faults.mistakes import Loading, drop
from tests.stable_diffusion.bad_files import write_bad, write_good

GOOD = (
    *("--ckpt", "sd1.safetensors", "--tokenizer_cache_dir", "tokenizers", "--prompt", "cat"),
    *("--W", "32", "--H", "32", "--steps", "1", "--outdir", "made"),
)
SOURCES = ("--from_file", "--from_module", "--interactive")
GUIDE = "--guide_image_path picture.png"
CLIP = "--clip_guidance_scale 1 --clip_guidance_model"
VGG = f"--vgg16_guidance_scale 1 {GUIDE} --vgg16_guidance_model"
# a line to add to the good command, which replaces its options, and what the message has to hold
NUMBERS = (
    ("--W 100", "--W 100: sizes are multiples of 8"),
    ("--steps 2.5", "2.5 is not a whole number"),
    ("--scale nan", "--scale nan"),
    ("--scale inf", "--scale inf"),
    ("--seed 99999999999999999999", "does not fit 64 bits"),
    ("--clip_skip 9", "--clip_skip 9"),
    ("--sampler eulr", "Did you mean euler?"),
    ("--network_weights lora.safetensors --network_mul 1 2 3", "--network_mul has 3 values"),
    ("--network_weights lora.safetensors --network_mul nan", "--network_mul nan"),
    (
        f"--control_net_models sd1.safetensors --control_net_multipliers 1 2 {GUIDE}",
        "--control_net_multipliers",
    ),
)
TOGETHER = (
    ("--fp16 --bf16", "--fp16 and --bf16 exclude each other: give one of them"),
    ("--sdxl", "--sdxl: sd1.safetensors is Stable Diffusion 1.x"),
    ("--zero_terminal_snr", "--zero_terminal_snr needs a model that predicts v"),
    ("--mask_path mask.png", "Write AND between its parts"),
    ("--from_file parts.txt --mask_path mask.png --network_weights lora.safetensors", "3 parts between AND"),
    (
        "--from_file parts.txt --mask_path mask.png --network_weights lora.safetensors --network_pre_calc",
        "--network_pre_calc folds LoRAs",
    ),
    (GUIDE, "--guide_image_path needs --control_net_models"),
    ("--control_net_models sd1.safetensors", "--guide_image_path"),
    ("--gradual_latent_timesteps 750", "works with --sampler euler_a only"),
    ("--image_path picture.png --clip_vision_strength 1", "--clip_vision_strength"),
    (f"{CLIP} clip --clip_image_guidance_scale 1", "--clip_image_guidance_scale needs --guide_image_path"),
    ("--highres_fix_scale 0.5 --highres_fix_upscaler no.such.module", "no.such.module"),
)
FILES = (
    ("--ckpt nothing.safetensors", "nothing.safetensors"),
    ("--ckpt BAD/flux.safetensors", "FLUX"),
    ("--ckpt BAD/flux_vae.safetensors", "it looks like a VAE"),
    ("--ckpt lora.safetensors", "looks like a LoRA"),
    ("--ckpt BAD/text.txt", "neither a safetensors nor a torch file"),
    ("--ckpt BAD/no_text.safetensors", "has no text encoder"),
    ("--ckpt BAD/half.safetensors", "missing: up_blocks"),
    ("--ckpt BAD/other_size.safetensors", "takes text states of 5 numbers"),
    ("--ckpt BAD/no_unet", "has no folder unet"),
    ("--ckpt BAD/no_config", "config.json"),
    ("--ckpt BAD/empty_folder", "not in the layout of diffusers"),
    ("--vae BAD/flux_vae.safetensors", "16 latent channels"),
    ("--vae lora.safetensors", "it looks like a LoRA"),
    ("--vae BAD/empty_folder", "empty_folder"),
    ("--network_weights BAD/flux_lora.safetensors", "not for Stable Diffusion"),
    ("--network_weights BAD/sdxl_lora.safetensors", "does not fit"),
    ("--network_weights BAD/sdxl.safetensors", "is no LoRA"),
    ("--textual_inversion_embeddings BAD/wide_word.safetensors", "99 numbers"),
    ("--textual_inversion_embeddings lora.safetensors", "is not a textual inversion"),
    ("--textual_inversion_embeddings nothing.pt", "nothing.pt"),
    ("--XTI_embeddings word.safetensors", "IN01 is missing"),
    ("--XTI_embeddings BAD/wide_layers.safetensors", "99 numbers"),
    ("--XTI_embeddings nothing.pt", "nothing.pt"),
    (f"{CLIP} nothing", "nothing: there is no such file or folder"),
    (f"{CLIP} lora.safetensors", "is not a CLIP image encoder"),
    (f"{CLIP} BAD/blind_clip", "is not a CLIP image encoder"),
    (f"{CLIP} BAD/clip_without_projection", "text_projection.weight"),
    (f"{VGG} lora.safetensors", "is not VGG16"),
    (f"{VGG} BAD/half_vgg16.pth", "features.19.bias"),
    (f"{VGG} BAD/short_vgg16.pth", "the last layer in BAD/short_vgg16.pth is 4. Give a lower one"),
    (f"--control_net_models lora.safetensors {GUIDE}", "is not a ControlNet"),
    ("--from_file nothing.txt", "nothing.txt"),
    ("--from_file BAD/nothing.txt", "has no prompt"),
    ("--from_file picture.png", "not UTF-8"),
    ("--from_module BAD/module.py", "ValueError: broken"),
    ("--from_module BAD/empty_module.py", "no function get_prompter"),
    ("--image_path nothing.png", "nothing.png"),
    ("--image_path BAD/text.png", "no image"),
    ("--image_path BAD/no_pictures", "no_pictures"),
    ("--image_path picture.png --mask_path BAD/truncated.png", "truncated.png"),
    ("--outdir sd1.safetensors", "it is a file"),
)
HOSTILE = (
    *((f"--ckpt BAD/{name}_ckpt.safetensors", name) for name in ("truncated", "one_byte_short", "empty")),
    *(
        (f"--network_weights BAD/{name}_lora.safetensors", name)
        for name in ("truncated", "one_byte_short", "empty")
    ),
    ("--ckpt BAD/web_page_ckpt.safetensors", "web page"),
    ("--network_weights BAD/web_page_lora.safetensors", "web page"),
    ("--ckpt BAD/pickled_code_ckpt.ckpt", "program code"),
    ("--ckpt BAD/old_pickled_code_ckpt.ckpt", "program code"),
    ("--network_weights BAD/pickled_code_lora.ckpt", "program code"),
    ("--textual_inversion_embeddings BAD/harmful.pt", "program code"),
    ("--XTI_embeddings BAD/harmful.pt", "program code"),
    (f"{CLIP} BAD/harmful.pt", "program code"),
    (f"{VGG} BAD/harmful.pt", "program code"),
    ("--ckpt BAD/text.safetensors", "damaged or incomplete"),
    ("--ckpt BAD/nan.safetensors", "NaN or infinite"),
    ("--network_weights BAD/nan_lora.safetensors", "NaN or infinite"),
    ("--textual_inversion_embeddings BAD/nan_word.safetensors", "NaN or infinite"),
    ("--textual_inversion_embeddings BAD/empty_word.safetensors", "no row of vectors"),
    ("--ckpt BAD/bad_config", "config.json cannot be read"),
    ("--ckpt BAD/wide_config", "cannot build a network of these dimensions"),
    ("--ckpt BAD/hostile_config", "os.system"),
    ("--tokenizer_cache_dir BAD/bad_tokenizers", "cannot be read as a tokenizer"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    good = write_good(tmp_path_factory.mktemp("project"))
    (good / "parts.txt").write_text("a AND b AND c\n", encoding="utf-8")
    write_bad(good / "BAD", good)
    return good


def try_mistake(folder: Path, line: str) -> tuple[int, str]:
    """Run the good command with a mistake; Loading where tensors of its checkpoint are read."""

    def guard(method: Any) -> Any:
        def read(self: Any, name: str, *rest: Any) -> Any:
            if self.path.name == "sd1.safetensors":
                raise Loading
            return method(self, name, *rest)

        return read

    words = line.split()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    replaced = [*options, *(["--prompt"] if set(SOURCES) & set(options) else [])]
    with patch.object(SafetensorsFile, "borrow", guard(SafetensorsFile.borrow)):
        return run_here("gen_img.py", *drop(GOOD, replaced), *words, folder=folder)


def test_without_a_mistake_the_checkpoint_is_loaded(folder: Path) -> None:
    with pytest.raises(Loading):
        try_mistake(folder, "--scale 5")


@pytest.mark.parametrize(("line", "words"), [*NUMBERS, *TOGETHER, *FILES, *HOSTILE])
def test_a_mistake_is_one_message_before_anything_is_loaded(line: str, words: str, folder: Path) -> None:
    code, said = try_mistake(folder, line)

    assert_one_message(code, said, words, remedy=False)
    assert not list(folder.rglob("*.was_run"))
    assert not list((folder / "made").glob("*.png"))
