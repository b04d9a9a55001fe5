"""Qwen-Image through the command lines equals diffusers: whole pipelines, caches, and full tuning."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import qwen_image_generate_image
from modules.media.reading import read_image
from tests.faults.messages import succeed_here
from tests.parity.hunyuan_image import language_model
from tests.parity.running import assert_equal, latents_in, picture_in
from tests.parity.test_training_steps import CASES, cached
from tests.parity.training import RANK, descent, shuffled
from tests.qwen_image.making import in_diffusers, pack
from tests.qwen_image.test_family import SCHEDULER
from tests.tiny.qwen_image import TinyQwenImage, write_tiny_qwen_image
from tests.tiny.wan_encoders import vae_diffusers_tensors

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS = 32, 48, 4
RATE = 0.5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyQwenImage:
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models"))


def their_vae(path: Path) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(base_dim=8)
    vae.load_state_dict(vae_diffusers_tensors(load_file(path)))
    return vae.eval()


def theirs(files: TinyQwenImage, scheduler: FlowMatchEulerDiscreteScheduler) -> QwenImagePipeline:
    """diffusers' pipeline with the weights of these files, in float32 on the CPU."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    pipe = QwenImagePipeline(
        scheduler=scheduler,
        vae=their_vae(files.vae),
        text_encoder=language_model(files.text_encoder),
        tokenizer=tokenizer,
        transformer=in_diffusers(load_file(files.dit)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_lightning(files: TinyQwenImage, path: Path) -> Path:
    """Write a LoRA with names as those of lightx2v's LoRAs for few steps: bare paths and kohya's endings."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, weight in load_file(files.dit).items():
        if name.startswith("transformer_blocks.") and weight.ndim == 2 and "_mod." not in name:
            module = name.removesuffix(".weight")
            tensors[f"{module}.lora_down.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
            tensors[f"{module}.lora_up.weight"] = 0.1 * torch.randn(len(weight), RANK, generator=generator)
            tensors[f"{module}.alpha"] = torch.tensor(RANK / 2.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("how", ["guided", "unguided", "plain shift", "lightning"])
@torch.no_grad()
def test_pictures_equal_those_of_diffusers(files: TinyQwenImage, tmp_path: Path, how: str) -> None:
    scale = 1.0 if how in {"unguided", "lightning"} else 4.0
    words = [*files.models, "--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--vae_dtype", "float32"]
    words += ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS), "--seed", str(SEED)]
    words += ["--guidance_scale", str(scale), "--output_type", "latent_images"]
    shift = ["--flow_shift", "3"] if how in {"plain shift", "lightning"} else []
    lora = write_lightning(files, tmp_path / "lightning.safetensors") if how == "lightning" else None
    words += [] if lora is None else ["--lora_weight", str(lora)]

    qwen_image_generate_image.main([*words, *shift, "--device", "cpu", "--save_path", str(tmp_path / "out")])

    # of the distilled LoRAs for four and eight steps: one shift for all sizes, and no last level
    plain = {**SCHEDULER, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
    pipe = theirs(files, FlowMatchEulerDiscreteScheduler(**(plain if shift else SCHEDULER)))
    if lora is not None:
        unchanged = pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone()
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        assert not torch.equal(pipe.transformer.transformer_blocks[0].attn.to_q.weight, unchanged)
    asked = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "true_cfg_scale": scale,
        "generator": torch.Generator().manual_seed(SEED),
    }
    expected = pipe(**asked, output_type="latent").images
    assert_equal(pack(latents_in(tmp_path / "out")[None]), expected, "latents")
    again = {**asked, "generator": torch.Generator().manual_seed(SEED)}
    pixels = torch.from_numpy(pipe(**again, output_type="np").images[0])
    assert (picture_in(tmp_path / "out") - pixels * 255).abs().max() < 0.51  # as near as bytes can be


def test_two_steps_of_full_tuning_equal_those_computed_with_diffusers(tmp_path: Path) -> None:
    """Of every weight; diffusers reads the file, and a resumed run ends alike."""
    items, error = cached(tmp_path, "qwen_image"), CASES["qwen_image"].error
    dit_file = tmp_path / "model" / "dit.safetensors"
    words = ["qwen_image_train.py", "--dataset_config", "dataset.toml", "--dit", dit_file, "--sdpa"]
    words += [*CASES["qwen_image"].options, *descent(RATE), "--save_state"]

    succeed_here(*words, folder=tmp_path)

    dit = in_diffusers(load_file(dit_file))
    before = {name: weight.detach().clone() for name, weight in dit.named_parameters()}
    for step, name in enumerate(("lora-step00000001", "lora")):
        error(dit, shuffled(items, step), step).square().mean().backward()
        found, worst, changes = load_file(tmp_path / "out" / f"{name}.safetensors"), 0.0, []
        assert found.keys() == dit.state_dict().keys()
        with torch.no_grad():
            for key, weight in dit.named_parameters():
                if weight.grad is not None:
                    weight -= RATE * weight.grad
                scale = float(weight.abs().max().clamp(min=1e-3))
                worst = max(worst, float((found[key] - weight).abs().max()) / scale)
                changes.append(float((weight - before[key]).abs().max()) / scale)
        dit.zero_grad()
        print(f"parity qwen_image full tuning, step {step + 1}: {worst:.2e}")  # noqa: T201
        assert worst <= 1e-4  # of the largest value of each weight
        # all but keys' biases, which change no attention, and what the last block makes of the text
        assert sum(change > 1e-3 for change in changes) >= len(changes) - 17
    state = tmp_path / "out" / "lora-step00000001-state"
    succeed_here(*words, "--resume", state, "--output_dir", "resumed", folder=tmp_path)
    whole, resumed = (load_file(tmp_path / place / "lora.safetensors") for place in ("out", "resumed"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@torch.no_grad()
def test_cached_latents_are_those_of_diffusers(tmp_path: Path) -> None:
    items = cached(tmp_path, "qwen_image")
    vae = their_vae(tmp_path / "model" / "vae.safetensors")
    mean, std = (
        torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    for path, item in zip(sorted((tmp_path / "clips").glob("*.png")), items, strict=True):
        pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
        assert_equal(item.latents, expected[0], "cached latents")
