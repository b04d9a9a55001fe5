"""The video VAE of MiniMax-H3 against diffusers: layouts of files, clips, tiles."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3
from safetensors.torch import save_file
from torch import Tensor

from minimax_h3.released import LATENTS_MEAN, LATENTS_STD
from minimax_h3.vae_checkpoints import read_video_vae
from minimax_h3.video_vae import PIXEL_MEAN, PIXEL_STD, H3VideoVae, cut_axis, load_video_vae
from modules.errors import CheckpointError
from tests.manifests import fit, tensor_list, write_hollow

CPU = torch.device("cpu")
EXACT = 1e-5  # float32, values up to 2; sums in another order through a dozen layers
SMALL = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "spatial_downsample_factors": (2, 2, 2, 1),
    "temporal_downsample_factors": (1, 2, 2, 1),
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_ffn_mult": 2,
}


@cache
def their_vae(**changes: Any) -> AutoencoderKLMiniMaxH3:
    torch.manual_seed(3)
    statistics = {"latents_mean": LATENTS_MEAN, "latents_std": LATENTS_STD}
    vae = AutoencoderKLMiniMaxH3(**SMALL, **statistics, **changes).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith(("scale1", "scale2", "register_tokens")):
            torch.nn.init.normal_(parameter, std=0.5)
    return vae


def interleave(parts: list[Tensor], width: int = 64) -> Tensor:
    """Rows of queries, keys and values as the release has them: by head."""
    rows = [part.unflatten(0, (-1, width)) for part in parts]
    return torch.stack(rows, dim=1).flatten(0, 2)


def released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Written here once more, by the names in the list of the released file."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = name.replace("down_blocks", "down").replace("resnets", "block")
        ours = ours.replace("downsamplers.0", "downsample").replace("conv_shortcut", "nin_shortcut")
        ours = ours.replace("decoder.proj_in", "decoder.x_embedder").replace("to_out.0", "to_out")
        ours = ours.replace("net.0.proj", "w1").replace("net.2", "w2")
        if ".w1." in ours:
            value, gate = tensor.chunk(2)
            tensor = torch.cat([gate, value])
        if ".to_q." in ours:
            parts = [tensors[name.replace("to_q", f"to_{character}")] for character in "qkv"]
            made[ours.replace("to_q", "to_qkv")] = interleave(parts)
        elif ".to_k." not in ours and ".to_v." not in ours:
            made[ours] = tensor.contiguous()
    made["decoder.mask_token"] = torch.zeros(1, 1, made["decoder.norm_out.bias"].numel())
    return made


def single_file(folder: Path, tile: int | None = None, **changes: Any) -> H3VideoVae:
    path = folder / "h3 ä.safetensors"
    save_file(released(their_vae(**changes).state_dict()), path)
    return load_video_vae(path, CPU, torch.float32, tile)


def pixels_of(frames: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def normalised(pixels: Tensor) -> Tensor:
    """As diffusers' VAE is given them."""
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1, 1) for numbers in (PIXEL_MEAN, PIXEL_STD))
    return ((pixels + 1) / 2 - mean) / std


def joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks), dim=2)


def their_pixels(vae: AutoencoderKLMiniMaxH3, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1, 1) for numbers in (LATENTS_MEAN, LATENTS_STD))
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample
    color_mean, color_std = (torch.tensor(numbers).view(1, 3, 1, 1, 1) for numbers in (PIXEL_MEAN, PIXEL_STD))
    return (decoded * color_std + color_mean) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 22, 39])
def test_moments_are_those_of_diffusers(tmp_path: Path, frames: int) -> None:
    theirs = their_vae()
    theirs.use_tiling = False
    pixels = pixels_of(frames)
    with torch.no_grad():
        expected = theirs.encode(normalised(pixels)).latent_dist.parameters

    moments = single_file(tmp_path).encode_moments(pixels)

    assert moments.shape[2] == (1 if frames == 1 else (frames - 5) // 17 * 5 + 2)
    torch.testing.assert_close(moments, expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("latent_frames", [7, 12])
def test_pixels_are_those_of_diffusers(tmp_path: Path, latent_frames: int) -> None:
    theirs = their_vae()
    theirs.use_tiling = False
    latents = torch.randn(1, 24, latent_frames, 4, 6, generator=torch.Generator().manual_seed(1))

    pixels = joined(single_file(tmp_path).decode(latents, clamps=False))

    assert pixels.shape[2] == (latent_frames - 2) // 5 * 17 + 5
    torch.testing.assert_close(pixels, their_pixels(theirs, latents), atol=5 * EXACT, rtol=EXACT)


@pytest.mark.parametrize("frames", [1, 22])
def test_a_folder_of_diffusers_is_the_same_vae(tmp_path: Path, frames: int) -> None:
    theirs = their_vae()
    theirs.save_pretrained(tmp_path / "vae")
    theirs.use_tiling = False
    pixels = pixels_of(frames)
    with torch.no_grad():
        expected = theirs.encode(normalised(pixels)).latent_dist.parameters

    ours = load_video_vae(tmp_path / "vae", CPU, torch.float32, tile=None)

    torch.testing.assert_close(ours.encode_moments(pixels), expected, atol=EXACT, rtol=EXACT)
    if frames > 1:
        latents = ours.normalize(expected[:, :24])
        pixels = joined(ours.decode(latents, clamps=False))
        torch.testing.assert_close(pixels, their_pixels(theirs, latents), atol=5 * EXACT, rtol=EXACT)


@pytest.mark.parametrize(
    "size",
    [
        (40, 56),  # two by two: an overlap that grows, and one of 8
        (32, 80),  # three in a row, the middle one with a neighbor on both sides
    ],
)
def test_tiles_are_those_of_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """Tiles of 32 that share 8 at least; the release has 256 and 64."""
    monkeypatch.setattr("minimax_h3.video_vae.OVERLAP", 8)
    theirs = their_vae()
    theirs.enable_tiling(32, 32, 8, 8)
    pixels = pixels_of(22, *size)
    with torch.no_grad():
        expected = theirs.encode(normalised(pixels)).latent_dist.parameters

    ours = single_file(tmp_path, tile=32)
    moments = ours.encode_moments(pixels)

    torch.testing.assert_close(moments, expected, atol=EXACT, rtol=EXACT)
    latents = ours.normalize(moments[:, :24])
    found = joined(ours.decode(latents, clamps=False))
    torch.testing.assert_close(found, their_pixels(theirs, latents), atol=5 * EXACT, rtol=EXACT)


def test_tiles_of_the_release() -> None:
    """768 x 1344 pixels: overlaps grow by 16 until the tiles end with the picture, the first ones first."""
    assert cut_axis(768, 256, 64, 16).starts == (0, 160, 336, 512)
    assert cut_axis(1344, 256, 64, 16).overlaps == (80, 80, 80, 80, 64, 64)
    assert cut_axis(256, 256, 64, 16).starts == (0,)


def test_one_frame_is_decoded_by_itself(tmp_path: Path) -> None:
    """diffusers decodes none. The frame is the last one of the decoder's four, whose others are padding."""
    theirs = their_vae()
    theirs.use_tiling = False
    ours = single_file(tmp_path)
    latents = torch.randn(1, 24, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = theirs.decoder(theirs.post_quant_conv(ours.denormalize(latents)))[:, :, 3:]

    found = normalised(joined(ours.decode(latents, clamps=False)))

    torch.testing.assert_close(found, decoded, atol=5 * EXACT, rtol=EXACT)


@pytest.mark.parametrize("manifest", ["minimax-h3-video-vae", "minimax-h3-video-vae-diffusers"])
def test_the_released_files_fit(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list(manifest))
    vae = fit(path, read_video_vae, H3VideoVae)
    assert (vae.config.time_stride, vae.config.space_stride, vae.config.head_width) == (4, 16, 64)
    assert [level.time_stride for level in vae.config.levels] == [1, 2, 2, 1, 1, 1]
    assert (vae.config.num_layers, vae.config.clip_latents, vae.config.shared_frames) == (36, 5, 5)


@pytest.mark.parametrize("frames", [4, 6, 17, 21])
def test_other_numbers_of_frames_are_refused(tmp_path: Path, frames: int) -> None:
    with pytest.raises(ValueError, match=r"17n \+ 5"):
        single_file(tmp_path).encode_moments(pixels_of(frames))


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("token_drop", "3", "'token_drop' is '3'"),
        ("latents_std", [1.0], "24 means and 1 deviations"),
        ("latents_std", [0.0] * 24, "not possible"),
        ("spatial_downsample_factors", [2, 2], "strides of 2 and 4 levels"),
        ("spatial_downsample_factors", [2, 4, 2, 1], "patches of width 768"),
        ("decoder_attention_head_dim", 0, "no heads of 0"),
        ("norm_num_groups", 48, "48 norm groups"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: Any, fault: str) -> None:
    their_vae().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {key: value}), "utf-8")
    with pytest.raises(CheckpointError, match=fault):
        load_video_vae(tmp_path, CPU, torch.float32)
