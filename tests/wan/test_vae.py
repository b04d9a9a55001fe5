"""The video VAE against recorded numbers, diffusers, and its own whole-clip form."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.tiny.wan_encoders import vae_config, vae_diffusers_tensors, vae_tensors
from wan.vae import MEAN, STD, WanVae, load_vae
from wan.vae_blocks import (
    Downsample,
    TimeMemory,
    Upsample,
    WanCausalConv,
    WanFrameAttention,
    WanResidualBlock,
)
from wan.vae_tiles import tiles

CPU = torch.device("cpu")


def made(tmp_path: Path, tensors: dict[str, Tensor], **settings: object) -> WanVae:
    save_file(tensors, tmp_path / "vae.safetensors")
    return load_vae(tmp_path / "vae.safetensors", CPU, torch.float32, **settings)  # type: ignore[arg-type]


@pytest.fixture
def vae(tmp_path: Path) -> WanVae:
    return made(tmp_path, vae_tensors())


def clip_of(frames: int, height: int = 32, width: int = 48, batch: int = 1) -> Tensor:
    return torch.randn(
        batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)
    ).clamp_(-1, 1)


def joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks), dim=2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_recorded_latents_and_pixels_are_met(tmp_path: Path) -> None:
    description, tensors = read_case("wan_vae")
    vae = made(tmp_path, make_weights(description["weights_model_key"], description["weights"]))
    tolerance = {name: limit["atol"] for name, limit in description["tolerance"].items()}

    latents = vae.encode(tensors["video"])

    assert (latents - tensors["latents_normalised"]).abs().max() <= tolerance["latents_normalised"]
    decoded = joined(vae.decode_unclamped(tensors["z"]))
    assert (decoded - tensors["decoded_unclamped"]).abs().max() <= tolerance["decoded_unclamped"]
    roundtrip = joined(vae.decode_unclamped(latents))
    assert (roundtrip - tensors["roundtrip_unclamped"]).abs().max() <= tolerance["roundtrip_unclamped"]


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_latents_and_pixels_equal_those_of_diffusers(tmp_path: Path, frames: int) -> None:
    tensors = vae_tensors()
    theirs = AutoencoderKLWan(base_dim=8, z_dim=16, latents_mean=list(MEAN), latents_std=list(STD)).eval()
    theirs.load_state_dict(vae_diffusers_tensors(tensors))
    vae, pixels = made(tmp_path, tensors), clip_of(frames, batch=2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))

    with torch.no_grad():
        their_latents = (theirs.encode(pixels).latent_dist.mode() - mean) / std
        their_pixels = theirs.decode(their_latents * std + mean).sample

    assert relative_error(vae.encode(pixels), their_latents) <= 1e-4
    assert relative_error(joined(vae.decode(their_latents)), their_pixels) <= 1e-4


def test_streaming_equals_the_whole_clip_at_once() -> None:
    vae = WanVae(vae_config()).double().eval()
    vae.load_state_dict(vae_tensors())
    pixels = clip_of(13, 16, 16).double()
    memory, groups = TimeMemory(), pixels.split([1, 4, 4, 4], dim=2)
    with torch.no_grad():
        moments = torch.cat([vae.encoder(group, memory) for group in groups], dim=2)
        torch.testing.assert_close(moments, whole_encoder(vae, pixels), rtol=1e-12, atol=1e-12)
        latents, memory = moments[:, :16], TimeMemory()
        decoded = torch.cat(
            [vae.decoder(latents[:, :, index : index + 1], memory) for index in range(4)], dim=2
        )
        torch.testing.assert_close(decoded, whole_decoder(vae, latents), rtol=1e-12, atol=1e-12)


def test_a_chunk_depends_on_no_later_frame(vae: WanVae) -> None:
    pixels = clip_of(9)
    latents = vae.encode(pixels)
    torch.testing.assert_close(vae.encode(pixels[:, :, :1]), latents[:, :, :1])
    torch.testing.assert_close(vae.encode(pixels[:, :, :5]), latents[:, :, :2])
    torch.testing.assert_close(joined(vae.decode(latents[:, :, :2])), joined(vae.decode(latents))[:, :, :5])


def test_pixels_come_in_playing_order_one_frame_and_then_four_at_a_time(vae: WanVae) -> None:
    chunks = list(vae.decode(torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3))
    assert [tuple(chunk.shape) for chunk in chunks] == [
        (1, 3, 1, 32, 32),
        (1, 3, 4, 32, 32),
        (1, 3, 4, 32, 32),
    ]
    assert max(float(chunk.abs().max()) for chunk in chunks) <= 1


def test_features_kept_in_host_memory_change_nothing(tmp_path: Path, vae: WanVae) -> None:
    other = made(tmp_path, vae_tensors(), cache_on_cpu=True)
    pixels = clip_of(13)
    latents = vae.encode(pixels)
    assert torch.equal(other.encode(pixels), latents)
    assert torch.equal(joined(other.decode(latents)), joined(vae.decode(latents)))


def test_what_is_kept_between_chunks_does_not_grow_with_the_clip(vae: WanVae) -> None:
    def kept(frames: int) -> int:
        memory = TimeMemory()
        with torch.no_grad():
            for group in clip_of(frames).split([1] + [4] * (frames // 4), dim=2):
                vae.encoder(group, memory)
        return sum(tensor.untyped_storage().nbytes() for tensor in memory._frames.values())

    assert kept(9) == kept(33)


def test_a_clip_that_fits_one_tile_is_not_cut(tmp_path: Path, vae: WanVae) -> None:
    tiled, pixels = made(tmp_path, vae_tensors(), tile=64), clip_of(5, 64, 64)
    latents = vae.encode(pixels)
    assert torch.equal(tiled.encode(pixels), latents)
    assert torch.equal(joined(tiled.decode(latents)), joined(vae.decode(latents)))


def test_tiles_change_latents_and_pixels_only_a_little(tmp_path: Path, vae: WanVae) -> None:
    # tiles of 8 latents are hardly wider than what a latent depends on, and random weights look farther than
    # trained ones
    tiled, pixels = (
        made(tmp_path, vae_tensors(), tile=64),
        F.interpolate(clip_of(5, 6, 8), size=(5, 88, 64), mode="trilinear"),
    )
    latents = vae.encode(pixels)
    difference = tiled.encode(pixels) - latents
    assert difference.shape == latents.shape
    assert difference.abs().mean() < 0.25 * latents.abs().mean()
    whole, cut = joined(vae.decode(latents)), list(tiled.decode(latents))
    assert [chunk.shape[2] for chunk in cut] == [1, 4]
    assert (torch.cat(cut, dim=2) - whole).abs().mean() < 0.25 * whole.abs().mean()


@pytest.mark.parametrize(
    ("size", "largest"), [(8, 8), (9, 8), (20, 8), (90, 32), (160, 32), (33, 32), (7, 3), (5, 1)]
)
def test_tiles_cover_an_axis_with_weights_that_sum_to_one(size: int, largest: int) -> None:
    total = torch.zeros(size * 8)
    for tile in tiles(size, largest):
        assert tile.size <= largest
        total[tile.pick(8)] += tile.weights(8)
    torch.testing.assert_close(total, torch.ones(size * 8))


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 5, 32, 36)])
def test_sizes_the_vae_cannot_take_are_refused(vae: WanVae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_give_float32_latents_near_the_exact_ones(
    tmp_path: Path, vae: WanVae, dtype: torch.dtype
) -> None:
    half, pixels = load_vae(tmp_path / "vae.safetensors", CPU, dtype), clip_of(5)
    latents = half.encode(pixels)
    assert half.dtype == dtype
    assert latents.dtype == torch.float32
    assert relative_error(latents, vae.encode(pixels)) < 0.1


def test_a_vae_of_another_width_is_read_off_its_tensors(tmp_path: Path) -> None:
    vae = made(tmp_path, vae_tensors(width=16))
    assert vae.encoder.conv1.out_channels == 16
    assert vae.encode(clip_of(5)).shape == (1, 16, 2, 4, 6)


def test_another_number_of_latent_channels_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = WanVae(vae_config(z=8)).state_dict()
    with pytest.raises(CheckpointError, match="8 latent channels"):
        made(tmp_path, {name: torch.zeros(tensor.shape) for name, tensor in names.items()})


# The whole-clip form, written from the description of the streaming rules and not from the streaming code


def causal(conv: torch.nn.Module, x: Tensor) -> Tensor:
    assert isinstance(conv, WanCausalConv)
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)


def normed(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * norm.gamma)


def whole(layer: torch.nn.Module, x: Tensor) -> Tensor:
    match layer:
        case WanResidualBlock():
            parts = layer.residual
            h = causal(parts["6"], normed(parts["3"], causal(parts["2"], normed(parts["0"], x))))
            return h + layer.shortcut(x)
        case WanFrameAttention():
            return layer(x, None)
        case Downsample():
            frames = torch.stack(
                [layer.resample["1"](F.pad(frame, (0, 1, 0, 1))) for frame in x.unbind(2)], dim=2
            )
            return (
                frames
                if layer.time_conv is None
                else torch.cat([frames[:, :, :1], layer.time_conv(frames)], dim=2)
            )
        case Upsample():
            if layer.time_conv is not None:
                pairs = layer.time_conv(F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0))).chunk(2, dim=1)
                x = torch.cat([x[:, :, :1], torch.stack(pairs, dim=3).flatten(2, 3)], dim=2)
            enlarged = [F.interpolate(frame, scale_factor=2, mode="nearest") for frame in x.unbind(2)]
            return torch.stack([layer.resample["1"](frame) for frame in enlarged], dim=2)
    raise TypeError(type(layer))


def whole_encoder(vae: WanVae, x: Tensor) -> Tensor:
    x = causal(vae.encoder.conv1, x)
    for layer in (*vae.encoder.downsamples, *vae.encoder.middle):
        x = whole(layer, x)
    return causal(vae.encoder.head["2"], normed(vae.encoder.head["0"], x))


def whole_decoder(vae: WanVae, x: Tensor) -> Tensor:
    x = causal(vae.decoder.conv1, x)
    for layer in (*vae.decoder.middle, *vae.decoder.upsamples):
        x = whole(layer, x)
    return causal(vae.decoder.head["2"], normed(vae.decoder.head["0"], x))
