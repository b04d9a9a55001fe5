"""The video VAEs of both generations against recorded numbers and diffusers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from encoders.tiles import split_into_tiles
from modules.errors import CheckpointError
from runtime.planning.dry_run import allocate_empty_weights, dry_run, find_peak_phase
from tests.golden_cases import make_weights, read_case
from tests.tiny.wan_encoders import (
    vae22_config,
    vae22_tensors,
    vae_config,
    vae_diffusers_tensors,
    vae_tensors,
)
from wan.configs import WAN_2_1, WAN_2_2, VaeRelease
from wan.spec import LATENT
from wan.vae import WanVae, load_vae
from wan.vae_blocks import WanVaeConfig
from wan.vae_checkpoints import check_latents

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Generation:
    """A tiny VAE of one generation, here and in diffusers."""

    release: VaeRelease
    tensors: Callable[[], dict[str, Tensor]]
    config: Callable[[], WanVaeConfig]
    in_diffusers: dict[str, Any]  # arguments of its class there

    @property
    def side(self) -> int:
        return self.release.stride[1]


OF_2_2 = {"decoder_base_dim": 12, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
GENERATIONS = [
    pytest.param(Generation(WAN_2_1, vae_tensors, vae_config, {}), id="2.1"),
    pytest.param(Generation(WAN_2_2, vae22_tensors, vae22_config, OF_2_2), id="2.2"),
]
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


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
    decoded = joined(vae.decode(tensors["z"], clamps=False))
    assert (decoded - tensors["decoded_unclamped"]).abs().max() <= tolerance["decoded_unclamped"]
    roundtrip = joined(vae.decode(latents, clamps=False))
    assert (roundtrip - tensors["roundtrip_unclamped"]).abs().max() <= tolerance["roundtrip_unclamped"]


@pytest.mark.slow_cases("13-2.1", "13-2.2")
@each_generation
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_latents_and_pixels_equal_those_of_diffusers(
    tmp_path: Path, generation: Generation, frames: int
) -> None:
    release, tensors = generation.release, generation.tensors()
    statistics = {"latents_mean": list(release.mean), "latents_std": list(release.std)}
    theirs = AutoencoderKLWan(
        base_dim=8, z_dim=release.channels, **statistics, **generation.in_diffusers
    ).eval()
    theirs.load_state_dict(vae_diffusers_tensors(tensors))
    vae, pixels = made(tmp_path, tensors), clip_of(frames, 32, 48, batch=2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (release.mean, release.std))

    with torch.no_grad():
        their_latents = (theirs.encode(pixels).latent_dist.mode() - mean) / std
        their_pixels = theirs.decode(their_latents * std + mean).sample

    size = 32 // generation.side, 48 // generation.side
    assert their_latents.shape == (2, release.channels, (frames - 1) // 4 + 1, *size)
    # float32: sums in another order; measured at most 5e-6
    assert relative_error(vae.encode(pixels), their_latents) <= 1e-5
    assert relative_error(joined(vae.decode(their_latents)), their_pixels) <= 1e-5


@each_generation
def test_a_chunk_depends_on_no_later_frame(tmp_path: Path, generation: Generation) -> None:
    vae, pixels = made(tmp_path, generation.tensors()), clip_of(9)
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


@pytest.mark.slow_cases("2.2")
@each_generation
def test_features_kept_in_host_memory_change_nothing(tmp_path: Path, generation: Generation) -> None:
    vae = made(tmp_path, generation.tensors())
    other = made(tmp_path, generation.tensors(), cache_on_cpu=True)
    pixels = clip_of(9, 32, 32)
    latents = vae.encode(pixels)
    assert torch.equal(other.encode(pixels), latents)
    assert torch.equal(joined(other.decode(latents)), joined(vae.decode(latents)))


@pytest.mark.slow_cases("2.1", "2.2")
@each_generation
def test_peak_memory_does_not_grow_with_the_clip(generation: Generation) -> None:
    with torch.device("meta"):
        vae = WanVae(generation.config())
    side, channels = generation.side, generation.release.channels

    def peaks(frames: int) -> tuple[int, ...]:
        found = []
        for shape in ((3, 4 * frames - 3, 8 * side, 8 * side), (channels, frames, 8, 8)):
            given = torch.empty(1, *shape, device="meta")
            with dry_run() as ledger:
                allocate_empty_weights(vae, ledger)
                for _ in [vae.encode(given)] if shape[0] == 3 else vae.decode(given):
                    pass
            found.append(sum(find_peak_phase(ledger.peaks)[1].values()))
        return tuple(found)

    latents = 4 * channels * 8 * 8  # bytes of one latent frame
    for short, long in zip(peaks(3), peaks(4), strict=True):
        # only the latents of a clip are kept, and while they are joined twice
        assert short <= long <= short + 3 * 2 * latents
        assert long < 1.05 * short


@each_generation
def test_a_clip_that_fits_one_tile_is_not_cut(tmp_path: Path, generation: Generation) -> None:
    vae, edge = made(tmp_path, generation.tensors()), 4 * generation.side
    tiled, pixels = made(tmp_path, generation.tensors(), tile=edge), clip_of(5, edge, edge)
    latents = vae.encode(pixels)
    assert torch.equal(tiled.encode(pixels), latents)
    assert torch.equal(joined(tiled.decode(latents)), joined(vae.decode(latents)))


@pytest.mark.slow_cases("2.2")
@each_generation
def test_tiles_change_latents_and_pixels_only_a_little(tmp_path: Path, generation: Generation) -> None:
    # tiles of 8 latents are hardly wider than what a latent depends on, and random weights look farther than
    # trained ones
    vae, side = made(tmp_path, generation.tensors()), generation.side
    tiled = made(tmp_path, generation.tensors(), tile=8 * side)
    pixels = F.interpolate(clip_of(5, 6, 8), size=(5, 11 * side, 8 * side), mode="trilinear")
    latents = vae.encode(pixels)
    difference = tiled.encode(pixels) - latents
    assert difference.shape == latents.shape
    assert 0 < difference.abs().mean() < 0.25 * latents.abs().mean()
    full, cut = joined(vae.decode(latents)), list(tiled.decode(latents))
    assert [chunk.shape[2] for chunk in cut] == [1, 4]
    assert 0 < (torch.cat(cut, dim=2) - full).abs().mean() < 0.25 * full.abs().mean()


@pytest.mark.parametrize(
    ("size", "largest"), [(8, 8), (9, 8), (20, 8), (90, 32), (160, 32), (33, 32), (7, 3), (7, 2), (5, 1)]
)
def test_tiles_cover_an_axis_with_weights_that_sum_to_one(size: int, largest: int) -> None:
    total, found = torch.zeros(size * 8), split_into_tiles(size, largest)
    assert all(tile.after > 0 for tile in found[:-1]) or largest == 1  # else there were a seam
    for tile in found:
        assert tile.size <= largest
        total[tile.pixel_slice(8)] += tile.weights(8)
    torch.testing.assert_close(total, torch.ones(size * 8))


@pytest.mark.slow_cases("2.1")
@each_generation
def test_16_bit_weights_give_float32_latents_near_the_exact_ones(
    tmp_path: Path, generation: Generation
) -> None:
    vae = made(tmp_path, generation.tensors())
    half, pixels = load_vae(tmp_path / "vae.safetensors", CPU, torch.bfloat16), clip_of(5)
    latents = half.encode(pixels)
    assert half.dtype == torch.bfloat16
    assert latents.dtype == torch.float32
    assert relative_error(latents, vae.encode(pixels)) < 0.1


def test_a_vae_of_another_width_is_read_off_its_tensors(tmp_path: Path) -> None:
    vae = made(tmp_path, vae_tensors(width=16))
    assert vae.encoder.conv1.out_channels == 16
    assert vae.encode(clip_of(5)).shape == (1, 16, 2, 4, 6)
    vae = made(tmp_path, vae22_tensors(width=4, decoder_width=8))
    assert (vae.encoder.conv1.out_channels, vae.decoder.head["2"].in_channels) == (4, 8)
    assert vae.encode(clip_of(5)).shape == (1, 48, 2, 2, 3)


def zeros_of(config: WanVaeConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        names = WanVae(config).state_dict()
    return {name: torch.zeros(tensor.shape) for name, tensor in names.items()}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (vae_config(z=8), "8 latent channels"),
        (vae22_config(z=16), r"scales time by 4 and space by 16, the one of Wan2.1 by 4 and 8"),
        (vae_config(z=48), r"scales time by 4 and space by 8, the one of Wan2.2 by 4 and 16"),
    ],
)
def test_a_vae_of_neither_generation_is_refused(tmp_path: Path, config: WanVaeConfig, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        made(tmp_path, zeros_of(config))


def test_a_vae_of_pixels_with_alpha_is_refused_where_pixels_have_none(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    with pytest.raises(CheckpointError, match="is a VAE for pixels with alpha; --task t2v-1.3B needs one"):
        check_latents(replace(vae_config(), colors=4), LATENT, path, "--task t2v-1.3B")


def test_a_vae_of_pixels_with_another_number_of_channels_is_refused(tmp_path: Path) -> None:
    tensors = vae_tensors() | {"encoder.conv1.weight": torch.zeros(8, 5, 3, 3, 3)}
    with pytest.raises(CheckpointError, match="takes 5 channels"):
        made(tmp_path, tensors)
