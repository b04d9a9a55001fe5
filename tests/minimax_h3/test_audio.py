"""The audio VAE of MiniMax-H3 against diffusers, from files alone."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3Audio
from safetensors.torch import save_file

from minimax_h3.audio import build_audio_vae, latent_count, load_audio_vae, read_audio_vae
from minimax_h3.released import AUDIO_MEAN, AUDIO_STD
from modules.errors import CheckpointError
from tests.manifests import fit, tensor_list, write_hollow

CPU = torch.device("cpu")
EXACT = 1e-5  # the same network: only whether channels go through it together
SMALL: dict[str, Any] = {
    "encoder_dim": 4,
    "encoder_rates": (2, 5),
    "latent_dim": 64,
    "decoder_dim": 16,
    "decoder_rates": (5, 2),
    "decoder_kernel_sizes": (9, 4),
    "resblock_kernel_sizes": (3, 7),
    "resblock_dilation_sizes": ((1, 3, 5), (1, 3, 5)),
}


@cache
def their_vae(**changes: Any) -> AutoencoderKLMiniMaxH3Audio:
    """diffusers' network with random weights. changes: of `SMALL`."""
    torch.manual_seed(2)
    return AutoencoderKLMiniMaxH3Audio(**{**SMALL, **changes}).eval()


def test_each_channel_is_encoded_and_decoded_as_in_diffusers(tmp_path: Path) -> None:
    path = tmp_path / "audio ä.safetensors"
    save_file(their_vae().state_dict(), path)
    waveform = torch.rand(1, 2, 75, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(numbers).view(1, -1, 1) for numbers in (AUDIO_MEAN, AUDIO_STD))
    with torch.no_grad():
        means = their_vae().encode(waveform[0].unsqueeze(1)).latent_dist.mode()  # 2 Z A
        heard = their_vae().decode(means).sample[:, 0]

    ours = load_audio_vae(path, CPU)
    latents = ours.encode(waveform)

    assert latents.shape == (1, 32, 2, 8)
    torch.testing.assert_close(latents[0], ((means - mean) / std).transpose(0, 1), atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(ours.decode(latents).samples, heard, atol=EXACT, rtol=EXACT)
    assert ours.decode(latents).rate == 32000


def test_nothing_warns_of_old_norms_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "audio.safetensors"
    save_file(their_vae().state_dict(), path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_audio_vae(path, CPU)

    names = dict(ours._network.named_parameters())
    assert "decoder.ups.0.0.parametrizations.weight.original0" in names
    assert not any(name.endswith(("weight_g", "weight_v")) for name in names)


def test_a_folder_of_diffusers_says_its_own_statistics(tmp_path: Path) -> None:
    torch.manual_seed(2)
    statistics = {"latents_mean": [0.5] * 32, "latents_std": [2.0] * 32}
    AutoencoderKLMiniMaxH3Audio(**SMALL, **statistics).save_pretrained(tmp_path / "audio_vae")
    save_file(their_vae().state_dict(), tmp_path / "plain.safetensors")
    waveform = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(1))

    with_own = load_audio_vae(tmp_path / "audio_vae", CPU).encode(waveform)
    released = load_audio_vae(tmp_path / "plain.safetensors", CPU).encode(waveform)

    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (AUDIO_MEAN, AUDIO_STD))
    torch.testing.assert_close(with_own, (released * std + mean - 0.5) / 2, atol=EXACT, rtol=EXACT)


def test_the_released_file_fits(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "audio.safetensors", tensor_list("minimax-h3-audio-vae"))
    network = fit(path, lambda checkpoint: read_audio_vae(checkpoint, "--audio_vae"), build_audio_vae)
    assert network.config.encoder_rates == (2, 4, 4, 5, 5)
    assert network.config.decoder_rates == (5, 5, 2, 2, 2, 2, 2)


@pytest.mark.parametrize(("frames", "latents"), [(124, 207), (345, 575), (1, 2), (22, 37)])
def test_sound_has_forty_latents_a_second(frames: int, latents: int) -> None:
    assert latent_count(frames, 24) == latents


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not an audio VAE of MiniMax-H3"):
        load_audio_vae(tmp_path / "other.safetensors", CPU)
