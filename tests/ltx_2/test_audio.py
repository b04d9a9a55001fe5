"""LTX-2's sound against diffusers' pieces, and the mel spectrogram against its formula."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_2.audio import (
    Vocoder,
    build_audio_vae,
    build_vocoder,
    latent_count,
    load_audio_vae,
    load_vocoder,
    log_mel,
    read_audio_vae,
    read_vocoder,
)
from modules.errors import CheckpointError
from tests.ltx_2.tiny_media import audio_vae, audio_vae_official, vocoder, vocoder_official
from tests.manifests import fit, manifest_names, tensor_list, write_hollow

CPU = torch.device("cpu")
EXACT = 1e-5  # float32, the same operations as theirs
RATES = {"2.0": 24000, "2.3": 48000}
their_vae, their_vocoder = cache(audio_vae), cache(vocoder)


def waveform_of(samples: int, batch: int = 1) -> Tensor:
    """A swept tone in noise, other in the two channels."""
    generator = torch.Generator().manual_seed(samples)
    times = torch.arange(samples) / 16000
    tone = torch.sin(2 * torch.pi * (200 + 2000 * times) * times)
    noise = torch.randn(batch, 2, samples, generator=generator)
    return tone * torch.tensor([0.5, 0.2])[:, None] + 0.05 * noise


def written(tmp_path: Path, network: nn.Module, is_official: bool) -> Path:
    """A single file of both networks, or a folder of diffusers."""
    if not is_official:
        network.save_pretrained(tmp_path / "part")
        return tmp_path / "part"
    tensors = {
        **audio_vae_official(their_vae().state_dict()),
        "model.diffusion_model.patchify_proj.weight": torch.zeros(1),
        "vae.encoder.conv_in.conv.weight": torch.zeros(1),
        "audio_vae.per_channel_statistics.mean-of-stds": torch.zeros(16),
        **(vocoder_official(network.state_dict()) if network is not their_vae() else {}),
    }
    save_file(tensors, tmp_path / "ltx ä.safetensors")
    return tmp_path / "ltx ä.safetensors"


def slaney(frequency: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Slaney's mel scale: 15 mels for each 1000 Hz, above that 27 for each factor of 6.4."""
    high = 15 + 27 * numpy.log(numpy.maximum(frequency, 1) / 1000) / numpy.log(6.4)
    return numpy.where(frequency < 1000, frequency * 15 / 1000, high)


@pytest.mark.parametrize(("samples", "bins"), [(16000, 64), (8123, 32)])
def test_mel_spectrogram_is_that_of_the_formula(samples: int, bins: int) -> None:
    """In float64, with triangles of area 1 around points that are equally far apart on the mel scale."""
    waveform = waveform_of(samples)
    grid = numpy.linspace(0, 8000, 200001)
    points = numpy.interp(numpy.linspace(0, slaney(numpy.array(8000.0)), bins + 2), slaney(grid), grid)
    frequencies = numpy.linspace(0, 8000, 513)
    rising = (frequencies - points[:-2, None]) / numpy.diff(points)[:-1, None]
    falling = (points[2:, None] - frequencies) / numpy.diff(points)[1:, None]
    filters = numpy.maximum(0, numpy.minimum(rising, falling)) * 2 / (points[2:] - points[:-2])[:, None]
    padded = numpy.pad(waveform[0].double().numpy(), ((0, 0), (512, 512)), "reflect")
    window = 0.5 - 0.5 * numpy.cos(2 * numpy.pi * numpy.arange(1024) / 1024)
    starts = range(0, samples + 1, 160)
    spectrum = numpy.stack([numpy.fft.rfft(padded[:, at : at + 1024] * window) for at in starts], axis=1)
    expected = numpy.log(numpy.maximum(numpy.abs(spectrum) @ filters.T, 1e-5))

    found = log_mel(waveform, bins)[0]

    # 1e-3: float32 sums of 1024 samples beside a floor of 1e-5, before the logarithm
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("samples", "batch", "is_official"), [(16000, 1, True), (4800, 2, False)])
def test_latents_equal_those_of_diffusers(
    tmp_path: Path, samples: int, batch: int, is_official: bool
) -> None:
    theirs, waveform = their_vae(), waveform_of(samples, batch)
    mean = theirs.encode(log_mel(waveform, 32)).latent_dist.mode()
    packed = LTX2Pipeline._normalize_audio_latents(
        LTX2Pipeline._pack_audio_latents(mean), theirs.latents_mean, theirs.latents_std
    )
    latents = load_audio_vae(written(tmp_path, theirs, is_official), CPU).encode(waveform)

    assert latents.shape == (batch, 2, -(-(samples // 160 + 1) // 4), 8)
    expected = LTX2Pipeline._unpack_audio_latents(packed, latents.shape[2], 8)
    torch.testing.assert_close(latents, expected, rtol=0, atol=EXACT)


@pytest.mark.slow_cases("2.3-False", "2.3-True")
@pytest.mark.parametrize("is_official", [True, False])
@pytest.mark.parametrize("version", RATES)
def test_sound_of_latents_equals_that_of_diffusers(tmp_path: Path, version: str, is_official: bool) -> None:
    """With LTX-2.3 the waveform is limited before its bandwidth is extended, as in the official code."""
    theirs, speaking = their_vae(), their_vocoder(version)
    latents = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    plain = LTX2Pipeline._denormalize_audio_latents(
        LTX2Pipeline._pack_audio_latents(latents), theirs.latents_mean, theirs.latents_std
    )
    mel = theirs.decode(LTX2Pipeline._unpack_audio_latents(plain, 3, 8)).sample
    expected = speaking(mel)
    (tmp_path / "voice").mkdir()

    found = load_audio_vae(written(tmp_path, theirs, is_official), CPU).decode(latents)
    ours = load_vocoder(written(tmp_path / "voice", speaking, is_official), CPU)

    torch.testing.assert_close(found, mel, rtol=0, atol=EXACT)
    assert ours.rate == RATES[version]
    assert expected.shape == (2, 2, 9 * ours.rate // 100)
    torch.testing.assert_close(ours.decode(found), expected, rtol=0, atol=EXACT)
    if version == "2.3":
        unlimited = vocoder(version)
        unlimited.vocoder.final_act_fn = None
        assert not torch.allclose(expected, unlimited(mel), atol=1e-3)


@pytest.mark.slow_cases("121-24-126", "121-25-121")
@pytest.mark.parametrize(
    ("frames", "fps", "count"), [(121, 24, 126), (121, 25, 121), (1, 24, 1), (97, 29.97, 81), (1, 60, 0)]
)
def test_a_clip_has_25_latents_a_second(tmp_path: Path, frames: int, fps: float, count: int) -> None:
    """Cut or with silence added; what comes after the clip changes nothing."""
    vae = load_audio_vae(written(tmp_path, their_vae(), False), CPU)
    assert latent_count(frames, fps) == count
    for samples in (1500, 100000):
        waveform = waveform_of(samples)
        latents = vae.encode_clip(waveform, frames, fps)
        assert latents.shape == (1, 2, count, 8)
        own = waveform[..., : int(frames / fps * 16000)]
        assert torch.equal(vae.encode_clip(own, frames, fps), latents)
        silence = torch.zeros(1, 2, 16000)
        assert torch.equal(vae.encode_clip(torch.cat([own, silence], 2), frames, fps), latents)


def test_files_in_sixteen_bits_are_computed_in_float32(tmp_path: Path) -> None:
    save_file({name: one.bfloat16() for name, one in their_vae().state_dict().items()}, tmp_path / "a.sft")
    latents = load_audio_vae(tmp_path / "a.sft", CPU).encode(waveform_of(8000))
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.bfloat16().float())


@pytest.mark.slow_cases("ltx2.3-vocoder-diffusers", "ltx2.3-vocoder")
@pytest.mark.parametrize("manifest", [*manifest_names("ltx2.3-audio-vae"), *manifest_names("ltx2.3-vocoder")])
def test_released_lists_fit(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "sound.safetensors", tensor_list(manifest))
    if "vocoder" in manifest:
        network = fit(path, lambda file: read_vocoder(file, "--audio_vae"), build_vocoder)
        assert Vocoder(network, 48000).rate == network.config.output_sampling_rate
        told = (network.config.hop_length, network.config.input_sampling_rate, network.config.filter_length)
        assert told == (80, 16000, 512)
    else:
        network = fit(path, lambda file: read_audio_vae(file, "--audio_vae"), build_audio_vae)
        assert (network.config.mel_bins, network.config.latent_channels) == (64, 8)


@pytest.mark.parametrize(
    ("load", "tensors", "message"),
    [
        (load_audio_vae, lambda: their_vocoder("2.3").state_dict(), "not an audio VAE of LTX-2; it looks"),
        (load_vocoder, lambda: their_vae().state_dict(), "not a vocoder of LTX-2; it looks like"),
        (
            load_vocoder,
            lambda: {**their_vocoder("2.0").state_dict(), "upsamplers.4.weight": torch.zeros(2, 1, 5)},
            "not a vocoder",
        ),
        (
            load_audio_vae,
            lambda: {**their_vae().state_dict(), "encoder.down.0.block.0.norm1.weight": torch.zeros(16)},
            "unexpected: encoder.down.0.block.0.norm1.weight",
        ),
        (
            load_audio_vae,
            lambda: their_vae().state_dict() | {"latents_mean": torch.zeros(15)},
            "not an audio",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, load: Any, tensors: Any, message: str) -> None:
    save_file(tensors(), tmp_path / "sound.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "sound.safetensors", CPU)
