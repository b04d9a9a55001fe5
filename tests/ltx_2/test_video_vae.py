"""The video VAE of LTX-2 against diffusers: all file layouts, in chunks and in tiles."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.model_files import read_once
from encoders.tiles import split_into_tiles
from ltx_2.vae_checkpoints import read_video_vae
from ltx_2.video_vae import LtxVideoVae, load_video_vae
from modules.errors import CheckpointError
from tests.ltx_2.tiny_media import VIDEO_VAES, video_vae, video_vae_official
from tests.manifests import fit, manifest_names, tensor_list, write_hollow
from tests.tiny.hunyuan_vae import vae_tensors as hunyuan_tensors

CPU = torch.device("cpu")
EXACT = 1e-5  # float32, values up to 2; sums in another order through 40 layers
each_version = pytest.mark.parametrize("version", VIDEO_VAES)
tiny = cache(video_vae)


def made(
    tmp_path: Path,
    tensors: Mapping[str, Tensor],
    told: Mapping[str, Any] | None = None,
    tile: int | None = None,
) -> LtxVideoVae:
    """Our VAE with these tensors. told: settings in the file's metadata."""
    path = tmp_path / "ltx ä.safetensors"
    save_file(dict(tensors), path, {} if told is None else {"config": json.dumps({"vae": told})})
    return load_video_vae(path, CPU, torch.float32, tile)


def official(version: str) -> dict[str, Tensor]:
    return video_vae_official(tiny(version).state_dict())


def clip_of(frames: int, height: int = 64, width: int = 96, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 3, frames, height, width, generator=generator).clamp_(-1, 1)


def joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks), dim=2)


def their_means(vae: AutoencoderKLLTX2Video, pixels: Tensor) -> Tensor:
    """Normalized as diffusers' pipelines do."""
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
    return (mean - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)


def their_pixels(vae: AutoencoderKLLTX2Video, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(
            latents * vae.latents_std.view(1, -1, 1, 1, 1) + vae.latents_mean.view(1, -1, 1, 1, 1)
        ).sample


def compare(ours: LtxVideoVae, theirs: AutoencoderKLLTX2Video, pixels: Tensor) -> None:
    latents = their_means(theirs, pixels)
    torch.testing.assert_close(ours.encode(pixels), latents, rtol=0, atol=EXACT)
    decoded = joined(ours.decode(latents, clamps=False))
    torch.testing.assert_close(decoded, their_pixels(theirs, latents), rtol=0, atol=EXACT)


@pytest.mark.slow_cases("1-96-64-1-2.0", "49-64-96-1-2.0", "49-64-96-1-2.3")
@each_version
@pytest.mark.parametrize(
    ("frames", "height", "width", "batch"), [(1, 96, 64, 1), (9, 64, 64, 2), (49, 64, 96, 1)]
)
def test_clips_equal_those_of_diffusers(
    tmp_path: Path, version: str, frames: int, height: int, width: int, batch: int
) -> None:
    """In chunks: also a clip that is shorter, and one that is longer than what the decoder looks ahead."""
    compare(made(tmp_path, official(version)), tiny(version), clip_of(frames, height, width, batch))


def test_no_chunk_is_longer_than_a_latent_frame_makes(tmp_path: Path) -> None:
    chunks = list(made(tmp_path, official("2.3")).decode(torch.randn(1, 16, 9, 2, 2)))
    assert max(chunk.shape[2] for chunk in chunks) <= 8
    assert sum(chunk.shape[2] for chunk in chunks) == 65
    assert max(float(chunk.abs().max()) for chunk in chunks) == 1  # clamped


@pytest.mark.slow_cases("2.0")
@each_version
def test_diffusers_folder_is_the_official_file(tmp_path: Path, version: str) -> None:
    """With config.json, which says what no tensor does, and without."""
    folder = tmp_path / "vae"
    tiny(version).save_pretrained(folder)
    pixels = clip_of(9)
    expected = made(tmp_path, official(version))
    for _ in range(2):
        ours = load_video_vae(folder, CPU, torch.float32)
        assert ours.config == expected.config
        assert torch.equal(ours.encode(pixels), expected.encode(pixels))
        (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"decoder_causal": True}, {"causal_decoder": True}),
        (
            {"upsample_residual": (False, True, False)},
            {"decoder_blocks": [["compress_all", {"residual": one}] for one in (False, True, False)]},
        ),
        (
            {"decoder_spatial_padding_mode": "zeros", "encoder_spatial_padding_mode": "reflect"},
            {"spatial_padding_mode": "zeros", "encoder_spatial_padding_mode": "reflect"},
        ),
    ],
)
def test_settings_that_no_tensor_shows_are_read(
    tmp_path: Path, settings: dict[str, Any], told: dict[str, Any]
) -> None:
    theirs, default = video_vae("2.0", **settings), [["res_x", {}], ["compress_all", {"residual": True}]] * 3
    theirs.save_pretrained(tmp_path / "vae")
    record = {"causal_decoder": False, "spatial_padding_mode": "reflect", "decoder_blocks": default, **told}

    ours = made(tmp_path, video_vae_official(theirs.state_dict()), record)

    compare(ours, theirs, clip_of(17))
    assert load_video_vae(tmp_path / "vae", CPU, torch.float32).config == ours.config


def test_tiles_are_added_by_their_weights(tmp_path: Path) -> None:
    """160 x 64 pixels in tiles of at most 96: rows 0-2 and 2-4 of latents."""
    ours, theirs = made(tmp_path, official("2.3"), tile=96), tiny("2.3")
    pixels, latents = clip_of(9, 160, 64), torch.randn(1, 16, 2, 5, 2)
    means, decoded = torch.zeros(1, 16, 2, 5, 2), torch.zeros(1, 3, 9, 160, 64)
    for row in split_into_tiles(5, 3):
        means[..., row.pixel_slice(1), :] += (
            their_means(theirs, pixels[..., row.pixel_slice(32), :]) * row.weights(1)[:, None]
        )
        decoded[..., row.pixel_slice(32), :] += (
            their_pixels(theirs, latents[..., row.pixel_slice(1), :]) * row.weights(32)[:, None]
        )
    torch.testing.assert_close(ours.encode(pixels), means, rtol=0, atol=EXACT)
    torch.testing.assert_close(joined(ours.decode(latents, clamps=False)), decoded, rtol=0, atol=EXACT)


def test_statistics_stay_exact_in_sixteen_bits(tmp_path: Path) -> None:
    exact_vae = made(tmp_path, official("2.3"))
    vae = load_video_vae(tmp_path / "ltx ä.safetensors", CPU, torch.bfloat16)
    assert torch.equal(vae.latents_std, tiny("2.3").latents_std)
    assert vae.dtype == torch.bfloat16
    exact = joined(exact_vae.decode(latents := torch.randn(1, 16, 2, 2, 2)))
    # bfloat16 has 8 bits; errors of 20 layers add up
    assert (joined(vae.decode(latents)) - exact).abs().max() < 0.1


def test_only_the_own_part_of_a_single_file_is_used(tmp_path: Path) -> None:
    others = {"model.diffusion_model.patchify_proj.weight", "audio_vae.encoder.conv_in.conv.weight"}
    others |= {"vocoder.conv_pre.weight", "text_embedding_projection.aggregate_embed.weight"}
    tensors = {**official("2.3"), **{name: torch.zeros(1) for name in others}}
    tensors["vae.per_channel_statistics.mean-of-stds"] = torch.zeros(16)
    compare(made(tmp_path, tensors), tiny("2.3"), clip_of(1))


@pytest.mark.parametrize("manifest", manifest_names("ltx2.3-video-vae"))
def test_released_lists_fit(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list(manifest))
    vae = fit(path, read_video_vae, LtxVideoVae)
    assert vae.config.stride == (8, 32, 32)
    assert (vae.config.latent_channels, vae.config.patch) == (128, 4)
    assert not vae.config.decoder.reflects
    assert not any(part.is_residual for part in vae.config.decoder.resamplings)


TIMED = {"vae.decoder.timestep_scale_multiplier": torch.ones(())}


def without(start: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in official("2.3").items() if not name.startswith(start)}


@pytest.mark.parametrize(
    ("tensors", "told", "message"),
    [
        (hunyuan_tensors, None, "not a video VAE of LTX-2; it looks like the HunyuanVideo VAE"),
        (lambda: without("vae.encoder.conv_in"), None, "encoder.conv_in.conv.weight is missing"),
        (lambda: without("vae.decoder.up_blocks.8"), None, "not a video VAE"),
        (lambda: without("vae.encoder.down_blocks.1.conv.conv"), None, "a VAE of LTX-Video or LTX-2"),
        (lambda: without("vae.per_channel"), None, "missing: latents_mean"),
        (lambda: official("2.3") | TIMED, None, "requires a timestep, as LTX-Video's does"),
        (lambda: official("2.3"), {"spatial_padding_mode": "replicate"}, "'replicate'"),
        (lambda: official("2.3"), {"decoder_blocks": [["compress_all", {}]]}, "cannot be used"),
        (lambda: official("2.3"), {"decoder_blocks": 3}, "cannot be used"),
        (lambda: official("2.3"), {"causal_decoder": "no"}, "causal decoder no"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: Any, told: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        made(tmp_path, tensors(), told)


def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save_file(official("2.3"), tmp_path / "vae.safetensors", {"config": "{"})
    with pytest.raises(CheckpointError, match="settings in its metadata cannot be read"):
        read_once(tmp_path / "vae.safetensors", read_video_vae)


def test_bytes_stand_for_numbers_and_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    vae = made(tmp_path, official("2.0"))
    frames = torch.randint(0, 256, (1, 3, 9, 64, 64), dtype=torch.uint8)
    assert torch.equal(vae.encode(frames), vae.encode(frames / 127.5 - 1))
    with pytest.raises(ValueError, match="8n \\+ 1 frames with sides that are multiples of 32"):
        vae.encode(clip_of(8))
    with pytest.raises(ValueError, match="latents of 1 x 3: this VAE mirrors borders"):
        list(vae.decode(torch.zeros(1, 16, 1, 1, 3)))
