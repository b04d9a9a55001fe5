"""Caches and full tuning of Qwen-Image equal those computed with diffusers."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from modules.media.reading import read_image
from tests.faults.messages import succeed_here
from tests.parity import pipelines
from tests.parity.running import assert_equal
from tests.parity.test_training_steps import CASES, cached
from tests.parity.training import descent, shuffled
from tests.qwen_image.making import in_diffusers

RATE = 0.5


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
    full, resumed = (load_file(tmp_path / place / "lora.safetensors") for place in ("out", "resumed"))
    assert all(torch.equal(resumed[name], weight) for name, weight in full.items())


@torch.no_grad()
def test_cached_latents_are_those_of_diffusers(tmp_path: Path) -> None:
    items = cached(tmp_path, "qwen_image")
    vae = pipelines.qwen_image_vae(tmp_path / "model" / "vae.safetensors")
    mean, std = (
        torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    for path, item in zip(sorted((tmp_path / "clips").glob("*.png")), items, strict=True):
        pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
        assert_equal(item.latents, expected[0], "cached latents")
