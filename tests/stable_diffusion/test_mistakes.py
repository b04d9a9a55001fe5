"""Mistakes at gen_img.py's command line, files that are no models among them: one message each."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.containers import SafetensorsFile
from tests.faults import damage
from tests.faults.messages import assert_one_message, run_here
from tests.faults.mistakes import Loading, drop
from tests.stable_diffusion.loaded import change_json, load, save, write_guide, write_kohya
from tests.tiny import flux
from tests.tiny.guides import vgg_state, write_clip
from tests.tiny.picture_encoders import write_autoencoder
from tests.tiny.stable_diffusion import tokenizer_folder, write_folder, write_sd1, write_sdxl

GOOD = (
    *("--ckpt", "sd1.safetensors", "--tokenizer_cache_dir", "tokenizers", "--prompt", "cat"),
    *("--W", "32", "--H", "32", "--steps", "1", "--outdir", "made"),
)
SOURCES = ("--from_file", "--from_module", "--interactive")
GUIDE = "--guide_image_path picture.png"
CLIP = "--clip_guidance_scale 1 --clip_guidance_model"
VGG = f"--vgg16_guidance_scale 1 {GUIDE} --vgg16_guidance_model"
LAYERS = ("IN01", "IN02", "MID", "OUT03", "OUT04", "OUT05")  # cross-attentions of the tiny model
# a line to add to the good command, which replaces its options, and what the message has to hold
NUMBERS = (
    ("--W 100", "--W 100: sizes are multiples of 8"),
    ("--steps 2.5", "2.5 is not a whole number"),
    ("--steps 1000", "--steps 1000"),
    ("--sampler pndm --steps 3", "--steps 3: the sampler pndm"),
    (
        "--sampler pndm --highres_fix_scale 0.5 --highres_fix_steps 3",
        "--highres_fix_steps 3: the sampler pndm",
    ),
    ("--scale nan", "--scale nan"),
    ("--scale inf", "--scale inf"),
    ("--seed 99999999999999999999", "does not fit in 64 bits"),
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
    ("--fp16 --bf16", "--fp16 and --bf16 exclude each other: pass one of them"),
    ("--sdxl", "--sdxl: sd1.safetensors is Stable Diffusion 1.x"),
    ("--v2", "--v2: sd1.safetensors is Stable Diffusion 1.x"),
    ("--ckpt BAD/sdxl.safetensors --v1", "--v1: BAD/sdxl.safetensors is Stable Diffusion XL"),
    ("--noise_offset_prob 1 --noise_offset_range 1 0", "pass the smaller number first"),
    ("--network_regional_mask_max_color_codes 3", "needs --mask_path"),
    ("--vgg16_guidance_scale 1 --vgg16_guidance_model v", "--vgg16_guidance_scale needs --guide_image_path"),
    (f"{VGG} v --control_net_models a", "--vgg16_guidance_scale and --control_net_models both take"),
    (
        f"{VGG} v --highres_fix_scale 1 --highres_fix_disable_control_net",
        "--highres_fix_disable_control_net with --vgg16_guidance_scale",
    ),
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
    ("--image_path picture.png --clip_vision_strength 1", "is Stable Diffusion 1.x, which has no pooled"),
    (f"{CLIP} clip --clip_image_guidance_scale 1", "--clip_image_guidance_scale needs --guide_image_path"),
    (f"--XTI_embeddings layers.safetensors --control_net_models a {GUIDE}", "do not work together"),
    ("--ckpt BAD/sdxl.safetensors --XTI_embeddings layers.safetensors", "this is Stable Diffusion XL"),
    (
        "--XTI_embeddings layers.safetensors --textual_inversion_embeddings BAD/layers.safetensors",
        "are both for the word layers",
    ),
    ("--highres_fix_scale 0.5 --highres_fix_upscaler no.such.module", "no.such.module"),
)
FILES = (
    ("--ckpt nothing.safetensors", "nothing.safetensors"),
    ("--ckpt BAD/flux.safetensors", "FLUX"),
    ("--ckpt BAD/flux_vae.safetensors", "it looks like a VAE"),
    ("--ckpt lora.safetensors", "looks like a LoRA"),
    ("--ckpt BAD/text.txt", "neither a safetensors nor a PyTorch file"),
    ("--ckpt BAD/no_text.safetensors", "has no text encoder"),
    ("--ckpt BAD/half.safetensors", "missing: up_blocks"),
    ("--ckpt BAD/other_size.safetensors", "takes text states of width 5"),
    ("--ckpt BAD/no_unet", "has no folder unet"),
    ("--ckpt BAD/no_config", "config.json"),
    ("--ckpt BAD/empty_folder", "not in the layout of diffusers"),
    ("--vae BAD/flux_vae.safetensors", "16 latent channels"),
    ("--vae lora.safetensors", "it looks like a LoRA"),
    ("--network_weights BAD/flux_lora.safetensors", "not for Stable Diffusion"),
    ("--network_weights BAD/sdxl_lora.safetensors", "does not fit"),
    ("--network_weights BAD/sdxl.safetensors", "is not a LoRA"),
    ("--textual_inversion_embeddings BAD/wide_word.safetensors", "width 99"),
    ("--textual_inversion_embeddings lora.safetensors", "is not a textual inversion"),
    ("--textual_inversion_embeddings nothing.pt", "nothing.pt"),
    ("--XTI_embeddings word.safetensors", "IN01 is missing"),
    ("--XTI_embeddings BAD/wide_layers.safetensors", "width 99"),
    ("--XTI_embeddings nothing.pt", "nothing.pt"),
    (f"{CLIP} nothing", "nothing: there is no such file or folder"),
    (f"{CLIP} lora.safetensors", "is not a CLIP image encoder"),
    (f"{CLIP} BAD/blind_clip", "is not a CLIP image encoder"),
    (f"{CLIP} BAD/clip_without_projection", "text_projection.weight"),
    (f"{VGG} lora.safetensors", "is not VGG16"),
    (f"{VGG} BAD/half_vgg16.pth", "features.19.bias"),
    (f"{VGG} BAD/short_vgg16.pth", "the last layer in BAD/short_vgg16.pth is 4. Use a lower one"),
    (f"--control_net_models lora.safetensors {GUIDE}", "is not a ControlNet"),
    ("--from_file nothing.txt", "nothing.txt"),
    ("--from_file BAD/nothing.txt", "has no prompt"),
    ("--from_file picture.png", "not UTF-8"),
    ("--from_module BAD/module.py", "ValueError: broken"),
    ("--from_module BAD/empty_module.py", "no function get_prompter"),
    ("--image_path nothing.png", "nothing.png"),
    ("--image_path BAD/text.png", "is not an image"),
    ("--image_path BAD/empty_folder", "empty_folder"),
    ("--image_path picture.png --mask_path BAD/truncated.png", "truncated.png"),
    ("--outdir sd1.safetensors", "it is a file"),
)
HOSTILE = (
    *((f"--ckpt BAD/{name}_ckpt.safetensors", name) for name in ("truncated", "one_byte_short", "empty")),
    ("--network_weights BAD/truncated_lora.safetensors", "truncated"),
    ("--ckpt BAD/web_page_ckpt.safetensors", "web page"),
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
    ("--textual_inversion_embeddings BAD/empty_word.safetensors", "not a row of vectors"),
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


def write_good(folder: Path) -> Path:
    """A project that works: sd1.safetensors, tokenizers, lora.safetensors, picture.png, mask.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load(write_sd1(folder), "--tokenizer_cache_dir", tokenizer_folder(folder / "tokenizers"))
    write_kohya(folder / "lora.safetensors", model, lambda path: ".attn" in path)
    write_guide(folder / "picture.png", size=(64, 64))
    mask = Image.new("RGB", (64, 64), (0, 255, 0))
    mask.paste((255, 0, 0), (0, 0, 32, 64))
    mask.save(folder / "mask.png")
    save(folder / "word.safetensors", {"emb_params": torch.ones(2, 64)})
    save(folder / "layers.safetensors", {name: torch.ones(2, 64) for name in LAYERS})
    return folder


def write_bad(folder: Path, good: Path) -> Path:
    """The folder of bad files."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = good / "sd1.safetensors"
    _write_of_others(folder, good)
    for name in ("truncated", "one_byte_short", "empty", "web_page", "pickled_code", "old_pickled_code"):
        for kind, source in (("ckpt", checkpoint), ("lora", good / "lora.safetensors")):
            ending = "ckpt" if "pickled" in name else "safetensors"
            getattr(damage, name)(source, folder / f"{name}_{kind}.{ending}")
    damage.pickled_code(checkpoint, folder / "harmful.pt")
    state = load_file(checkpoint)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save(folder / "nan.safetensors", {**state, key: torch.full_like(state[key], torch.nan)})
    save(folder / "half.safetensors", {name: t for name, t in state.items() if "output_blocks" not in name})
    save(folder / "no_text.safetensors", _without(state, "cond_stage_model."))
    save(folder / "other_size.safetensors", {**state, key: torch.ones(3, 5)})
    lora = load_file(good / "lora.safetensors")
    name = next(name for name in lora if name.endswith("lora_up.weight"))
    save(folder / "nan_lora.safetensors", {**lora, name: torch.full_like(lora[name], torch.nan)})
    save(folder / "wide_word.safetensors", {"emb_params": torch.ones(2, 99)})
    save(folder / "empty_word.safetensors", {"emb_params": torch.ones(0, 64)})
    save(folder / "nan_word.safetensors", {"emb_params": torch.full((2, 64), torch.nan)})
    save(folder / "wide_layers.safetensors", {name: torch.ones(2, 99) for name in LAYERS})
    save(folder / "layers.safetensors", {"emb_params": torch.ones(2, 64)})
    _write_guides(folder)
    _write_folders(folder, good)
    for name, text in (
        ("text.txt", "a cat\n"),
        ("text.safetensors", "no checkpoint\n"),
        ("text.png", "no image"),
        ("nothing.txt", "# nothing\n\n"),
        ("module.py", "raise ValueError('broken')\n"),
        ("empty_module.py", "x = 1\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "truncated.png").write_bytes((good / "picture.png").read_bytes()[:100])
    return folder


def _write_of_others(folder: Path, good: Path) -> None:
    """Models and LoRAs of FLUX and Stable Diffusion XL."""
    flux.write_dit(folder, flux.tiny_state())
    write_autoencoder(folder / "flux_vae.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    factors = {f"{name}.lora_down.weight": torch.ones(4, 128), f"{name}.lora_up.weight": torch.ones(384, 4)}
    save(folder / "flux_lora.safetensors", factors)
    model = load(write_sdxl(folder), "--tokenizer_cache_dir", good / "tokenizers")
    write_kohya(folder / "sdxl_lora.safetensors", model, lambda path: ".attn" in path)


def _without(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(start)}


def _write_guides(folder: Path) -> None:
    """CLIP without its image tower or its projection; VGG16 with a part of a layer, or of its layers."""
    write_clip(folder / "clip")
    state = load_file(folder / "clip" / "model.safetensors")
    for name, missing in (("blind_clip", "vision_model."), ("clip_without_projection", "text_projection.")):
        (folder / name).mkdir()
        save(folder / name / "model.safetensors", _without(state, missing))
        shutil.copy(folder / "clip" / "config.json", folder / name)
    layers = vgg_state()
    torch.save(_without(layers, "features.19.bias"), folder / "half_vgg16.pth")
    kept = {name: one for name, one in layers.items() if name.startswith(("features.0.", "features.2."))}
    torch.save(kept, folder / "short_vgg16.pth")


def _write_folders(folder: Path, good: Path) -> None:
    for name in ("no_unet", "no_config", "bad_config", "wide_config", "hostile_config"):
        write_folder("sd1", folder / name)
    shutil.rmtree(folder / "no_unet" / "unet")
    (folder / "no_config" / "unet" / "config.json").unlink()
    (folder / "bad_config" / "unet" / "config.json").write_text("{", encoding="utf-8")
    change_json(folder / "wide_config" / "unet" / "config.json", block_out_channels=[10**9, 10**9])
    hostile = {"_class_name": "os.system", "act_fn": "__import__('os')"}
    change_json(folder / "hostile_config" / "unet" / "config.json", **hostile)
    change_json(folder / "hostile_config" / "model_index.json", unet=["os", "system"])
    (folder / "empty_folder").mkdir()
    shutil.copytree(good / "tokenizers", folder / "bad_tokenizers")
    for vocabulary in (folder / "bad_tokenizers").glob("*/vocab.json"):
        vocabulary.write_text("[1, 2", encoding="utf-8")
