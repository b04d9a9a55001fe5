"""A LoRA for the pocket model from clips to a sample; its VAE in the form that learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modules.media.writing import write_video
from pocket import drawing, train_vae
from pocket.clips import write_clips
from pocket.concepts import CONCEPTS, DATASET
from pocket.measure import IN_FLOAT32, POCKET, model_options
from pocket.vae_learning import decode, encode, fold_statistics
from tests.commands import run_script
from tests.tiny.wan_encoders import random_tensors, vae_config
from wan.configs import WAN_2_1
from wan.vae import WanVae, load_vae

STEPS = 2
SAMPLE = "a red blorp moving left --w 64 --h 64 --f 17 --s 4 --g 4 --fs 3 --d 1\n"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few clips of a concept, cached."""
    folder = tmp_path_factory.mktemp("blorp")
    for name, seed in (("clips", 1), ("known_clips", 3), ("validation_clips", 2)):
        write_clips(folder / name, 2, seed, CONCEPTS["blorp"].make)
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder.as_posix()), encoding="utf-8")
    (folder / "samples.txt").write_text(SAMPLE, encoding="utf-8")
    dataset = ("--dataset_config", folder / "dataset.toml")
    vae = ("--vae", POCKET / "vae.safetensors", "--vae_dtype", "float32")
    run_script("wan_cache_latents.py", *dataset, *vae)
    run_script("wan_cache_text_encoder_outputs.py", *dataset, "--t5", POCKET / "t5.safetensors")
    return folder


def train(folder: Path, name: str, *options: object) -> Path:
    """The LoRA of a run in `folder`/NAME."""
    words = "--network_module networks.lora_wan --network_dim 4 --learning_rate 1e-2 --seed 3 --sdpa"
    words += " --timestep_sampling shift --discrete_flow_shift 3 --max_data_loader_n_workers 0"
    files = ("--dataset_config", folder / "dataset.toml", "--output_dir", folder / name)
    given = (*model_options(POCKET), *IN_FLOAT32, *words.split(), *files, "--output_name", "blorp")
    run_script("wan_train_network.py", *given, *options)
    return folder / name / "blorp.safetensors"


@pytest.fixture(scope="module")
def trained(cached: Path) -> Path:
    """A LoRA of a few steps, with a sample half way and at the end."""
    samples = ("--sample_prompts", cached / "samples.txt", "--sample_every_n_steps", STEPS // 2)
    return train(cached, "whole", "--max_train_steps", STEPS, *samples)


@pytest.mark.slow
def test_a_resumed_run_without_samples_ends_with_the_same_lora(cached: Path, trained: Path) -> None:
    assert len(list((trained.parent / "sample").glob("*.mp4"))) == 2
    train(cached, "parts", "--max_train_steps", STEPS // 2, "--save_state_on_train_end")
    parts = train(cached, "parts", "--max_train_steps", STEPS, "--resume", "latest")
    first, second = load_file(trained), load_file(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def vae() -> WanVae:
    with torch.device("meta"):
        vae = WanVae(vae_config(8, blocks=1))
    vae.load_state_dict(random_tensors(vae, 0), assign=True)
    return vae


@pytest.mark.parametrize("frames", [1, 9])
def test_both_forms_give_the_same(vae: WanVae, frames: int) -> None:
    pixels = torch.randn(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) / 2
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_2_1.mean, WAN_2_1.std))
    with torch.no_grad():
        means = encode(vae, pixels)
        assert torch.allclose(vae.encode(pixels) * std + mean, means, atol=1e-4)
        streamed = torch.cat(list(vae.decode((means - mean) / std, clamps=False)), dim=2)
        assert torch.allclose(decode(vae, means), streamed, atol=1e-4)


def test_gradients_reach_every_weight(vae: WanVae) -> None:
    decode(vae, encode(vae, torch.randn(1, 3, 9, 16, 16))).square().mean().backward()
    logvar = {"conv1.weight", "conv1.bias"}  # half of it belongs to variances, which nothing uses
    assert all(
        parameter.grad is not None and parameter.grad.any()
        for name, parameter in vae.named_parameters()
        if name not in logvar
    )


def test_folding_normalises_latents_and_changes_no_pixel(vae: WanVae) -> None:
    pixels = torch.randn(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(1)) / 2
    with torch.no_grad():
        means = encode(vae, pixels)
        before = decode(vae, means)
    channels = means.transpose(0, 1).flatten(1)
    fold_statistics(vae, channels.mean(1), channels.std(1))
    latents = vae.encode(pixels).transpose(0, 1).flatten(1)
    assert torch.allclose(latents.mean(1), torch.zeros(16), atol=1e-4)
    assert torch.allclose(latents.std(1), torch.ones(16), atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(decode(vae, encode(vae, pixels)), before, atol=1e-4)


@pytest.mark.slow
def test_the_vae_loop_learns_resumes_and_writes_a_file_that_loads(tmp_path: Path) -> None:
    clip = tmp_path / "real.mp4"
    write_video(
        clip, [drawing.draw(drawing.scene(np.random.default_rng(1)))[index % 17] for index in range(60)], 16
    )
    phases = (
        train_vae.LearningPhase("frames", 2, ((2, 1, 16),), 1e-3, 1e-3),
        train_vae.LearningPhase("decoder", 2, ((1, 5, 16),), 1e-3, 1e-4, learns_encoder=False),
    )
    full = train_vae.train(tmp_path / "whole", {"real": clip}, phases, every=2, statistics_clips=3)
    train_vae.train(tmp_path / "parts", {"real": clip}, phases[:1], every=2, statistics_clips=3)
    parts = train_vae.train(tmp_path / "parts", {"real": clip}, phases, every=2, statistics_clips=3)
    first, second = (
        load_vae(path, torch.device("cpu"), torch.float32).state_dict() for path in (full, parts)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
