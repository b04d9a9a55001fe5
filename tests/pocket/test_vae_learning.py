"""The differentiable form of the VAE against the streaming one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from modules.media.writing import write_video
from pocket import drawing, train_vae
from pocket.vae_learning import decode, encode, fold_statistics
from tests.tiny.wan_encoders import random_tensors, vae_config
from wan.configs import WAN_2_1
from wan.vae import WanVae, load_vae


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_2_1.mean, WAN_2_1.std))
    return mean, std


@pytest.fixture
def vae() -> WanVae:
    with torch.device("meta"):
        vae = WanVae(vae_config(8, blocks=1))
    vae.load_state_dict(random_tensors(vae, 0), assign=True)
    return vae


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_both_forms_give_the_same(vae: WanVae, frames: int) -> None:
    pixels = torch.randn(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) / 2
    mean, std = statistics()
    with torch.no_grad():
        means = encode(vae, pixels)
        assert torch.allclose(vae.encode(pixels) * std + mean, means, atol=1e-4)
        streamed = torch.cat(list(vae.decode_unclamped((means - mean) / std)), dim=2)
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
    whole = train_vae.train(tmp_path / "whole", {"real": clip}, phases, every=2, statistics_clips=3)
    train_vae.train(tmp_path / "parts", {"real": clip}, phases[:1], every=2, statistics_clips=3)
    parts = train_vae.train(tmp_path / "parts", {"real": clip}, phases, every=2, statistics_clips=3)
    first, second = (
        load_vae(path, torch.device("cpu"), torch.float32).state_dict() for path in (whole, parts)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
