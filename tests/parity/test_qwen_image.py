"""Qwen-Image through the command lines equals diffusers: whole pipelines, steps of training, and LoRAs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import qwen_image_generate_image
from modules.media.reading import read_image
from tests.faults.messages import succeed_here
from tests.parity.hunyuan_image import language_model
from tests.parity.running import assert_equal, assert_same_effect
from tests.parity.training import (
    RANK,
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    normal_share,
    padded,
    ratio_of,
    shifted,
    shuffled,
)
from tests.qwen_image.making import in_diffusers, pack, predict_with, tiny_inputs
from tests.qwen_image.test_family import SCHEDULER
from tests.tiny.project import write_plain_pictures
from tests.tiny.qwen_image import TinyQwenImage, write_tiny_qwen_image
from tests.tiny.wan_encoders import vae_diffusers_tensors

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS = 32, 48, 4
RATE, WHOLE_RATE = 20.0, 0.5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyQwenImage:
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models"))


def theirs(files: TinyQwenImage, scheduler: FlowMatchEulerDiscreteScheduler) -> QwenImagePipeline:
    """diffusers' pipeline with the weights of these files, in float32 on the CPU."""
    vae = AutoencoderKLQwenImage(base_dim=8)
    vae.load_state_dict(vae_diffusers_tensors(load_file(files.vae)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    pipe = QwenImagePipeline(
        scheduler=scheduler,
        vae=vae.eval(),
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

    qwen_image_generate_image.main([*words, *shift, "--device", "cpu", "--save_path", str(tmp_path)])

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
    (latents,) = (load_file(path)["latent"] for path in tmp_path.rglob("*_latent.safetensors"))
    assert_equal(pack(latents[None]), expected, "latents")
    again = {**asked, "generator": torch.Generator().manual_seed(SEED)}
    pixels = torch.from_numpy(pipe(**again, output_type="np").images[0])
    (picture,) = tmp_path.rglob("*.png")
    levels = torch.from_numpy(read_image(picture))
    assert (levels - pixels * 255).abs().max() < 0.51  # as near as bytes can be


@dataclass(frozen=True)
class QwenItem(Item):
    """An item with its references, each 16 1 h w."""

    references: tuple[Tensor, ...] = ()


def read_items(folder: Path, tag: str = "qi") -> list[QwenItem]:
    """What our caches hold, in the order of their names."""
    items = []
    for path in sorted(folder.glob(f"*_{tag}.safetensors")):
        (text,) = load_file(folder / f"{path.name.rsplit('_', 2)[0]}_{tag}_te.safetensors").values()
        found = load_file(path)
        references = [found.pop(name) for name in sorted(found) if name.startswith("latents_control_")]
        (latents,) = found.values()
        items.append(QwenItem(latents, text, references=tuple(references)))
    return items


def modules_of(files: TinyQwenImage) -> dict[str, str]:
    """The modules that a LoRA is on, by the names in its file."""
    paths = [name.removesuffix(".weight") for name in load_file(files.dit) if name.endswith(".weight")]
    return {
        path.replace(".", "_"): path
        for path in paths
        if path.startswith("transformer_blocks.") and "_mod." not in path and ".norm_" not in path
    }


def squared_error(dit: QwenImageTransformer2DModel, batch: Sequence[QwenItem], step: int) -> Tensor:
    """The loss of micro-batch `step`, of diffusers' network."""
    references = [torch.stack(one) for one in zip(*(item.references for item in batch), strict=True)]
    tokens = batch[0].latents.shape[-1] * batch[0].latents.shape[-2] // 4
    sigmas = shifted(normal_share(batch, step), ratio_of(tokens, 8192, 0.9))  # qwen_shift
    noisy, velocity = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    timesteps = 1000 * sigmas + 1  # as the known trainer
    given = {"noisy": noisy, "timesteps": timesteps, "text": text, "text_mask": mask}
    return (predict_with(dit, given, references) - pack(velocity)).square().mean()


def gradients(
    files: TinyQwenImage,
    modules: dict[str, str],
    factors: Factors,
    batch: Sequence[QwenItem],
    step: int,
    clean_references: bool = False,
) -> Factors:
    """Of the loss of a batch, by the factors of a LoRA in diffusers' network."""
    dit = in_diffusers(load_file(files.dit), clean_references).requires_grad_(False)
    with learning(dit, {name: [path] for name, path in modules.items()}, factors) as found:
        squared_error(dit, batch, step).backward()
        every = found()
    # what the last block makes of the text is not used
    learned = {name: both for name, both in every.items() if both[1] is not None and both[1].any()}
    assert len(every) - len(learned) == 4
    return learned


def write_caches(files: TinyQwenImage, folder: Path) -> list[str]:
    """Pictures of one bucket with their caches; the options that every training of them begins with."""
    write_plain_pictures(folder, batch_size=4)
    dataset = ["--dataset_config", "dataset.toml"]
    reading = ["--text_encoder", files.text_encoder, "--text_encoder_dtype", "float32"]
    succeed_here(
        "qwen_image_cache_latents.py", *dataset, "--vae", files.vae, "--vae_dtype", "float32", folder=folder
    )
    succeed_here("qwen_image_cache_text_encoder_outputs.py", *dataset, *reading, folder=folder)
    sampling = ["--timestep_sampling", "qwen_shift", "--discrete_flow_shift", "2.2"]
    return [*dataset, "--dit", str(files.dit), "--sdpa", *sampling]


def test_two_steps_of_training_equal_those_computed_with_diffusers(
    files: TinyQwenImage, tmp_path: Path
) -> None:
    """And the LoRA that comes out has the same effect in diffusers as here."""
    words = write_caches(files, tmp_path)
    words += ["--network_module", "networks.lora_qwen_image", "--network_dim", str(RANK), *descent(RATE)]
    succeed_here("qwen_image_train_network.py", *words, folder=tmp_path)

    items = read_items(tmp_path / "cache")
    modules = modules_of(files)
    assert len(items) == 4
    assert len({len(item.text) for item in items}) > 1  # so that padding is masked
    assert len(modules) == 24
    assert_latents(files, tmp_path, items)
    output = tmp_path / "out"
    assert_steps_of_descent(
        output,
        modules,
        RATE,
        lambda factors, step: gradients(files, modules, factors, shuffled(items, step), step),
        "qwen_image",
    )
    assert_same_effect(
        theirs(files, FlowMatchEulerDiscreteScheduler(**SCHEDULER)),
        lambda dit: predict_with(dit, tiny_inputs()),
        lambda merged: in_diffusers(load_file(merged)),
        files.dit,
        output / "lora.safetensors",
    )


def assert_latents(files: TinyQwenImage, folder: Path, items: Sequence[Item]) -> None:
    """What is cached of each picture is what diffusers' VAE makes of it, normalised."""
    vae = theirs(files, FlowMatchEulerDiscreteScheduler(**SCHEDULER)).vae
    mean, std = (
        torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    for path, item in zip(sorted((folder / "clips").glob("*.png")), items, strict=True):
        pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        with torch.no_grad():
            expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
        assert_equal(item.latents, expected[0], "cached latents")


def test_two_steps_of_full_tuning_equal_those_computed_with_diffusers(
    files: TinyQwenImage, tmp_path: Path
) -> None:
    """Of every weight; diffusers reads the file, and a resumed run ends alike."""
    words = ["qwen_image_train.py", *write_caches(files, tmp_path), *descent(WHOLE_RATE), "--save_state"]

    succeed_here(*words, folder=tmp_path)

    items, dit = read_items(tmp_path / "cache"), in_diffusers(load_file(files.dit))
    before = {name: weight.detach().clone() for name, weight in dit.named_parameters()}
    for step, name in enumerate(("lora-step00000001", "lora")):
        squared_error(dit, shuffled(items, step), step).backward()
        found, worst, changes = load_file(tmp_path / "out" / f"{name}.safetensors"), 0.0, []
        assert found.keys() == dit.state_dict().keys()
        with torch.no_grad():
            for key, weight in dit.named_parameters():
                if weight.grad is not None:
                    weight -= WHOLE_RATE * weight.grad
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
    given = tiny_inputs()
    with torch.no_grad():
        assert_equal(
            predict_with(in_diffusers(whole), given), predict_with(dit, given), "trained transformer"
        )
