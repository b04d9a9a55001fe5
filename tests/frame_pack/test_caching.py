"""Which tables FramePack caches, and what lies in memory while it does.

Numbers: tests/parity/test_framepack_caches.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from frame_pack.caching import clip_entries, clip_sections, count_sections
from frame_pack.family import family_for_latent_caching
from frame_pack.image_encoder import load_siglip
from frame_pack.inputs import apply_masks
from frame_pack.options import FramePackLatentCachingOptions
from frame_pack.sections import ANTI_DRIFTING, F1, Order
from hunyuan_model.options import HunyuanVaeOptions
from hunyuan_model.vae import load_vae
from modules.contract.data import CacheEntry, MediaBatch, MediaEncoders, MediaTable
from modules.speed_options import VaeOptions
from tests.tiny.framepack import write_siglip
from tests.tiny.hunyuan_vae import write_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> MediaEncoders:
    folder = tmp_path_factory.mktemp("encoders")
    vae = load_vae(write_vae(folder / "vae.safetensors"), CPU, torch.float32, tile=256)
    return MediaEncoders(vae, load_siglip(write_siglip(folder / "siglip.safetensors"), CPU, torch.float32))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Tables


@pytest.mark.parametrize(
    ("window", "frames", "sections"),
    [(9, 37, 1), (9, 72, 1), (9, 73, 2), (9, 1801, 50), (5, 41, 2), (1, 5, 1), (20, 81, 1)],
)
def test_sections_are_counted_by_the_window(window: int, frames: int, sections: int) -> None:
    assert count_sections(MediaTable(window=window), frames) == sections


# The family


def caching_options(**switches: Any) -> FramePackLatentCachingOptions:
    vae = HunyuanVaeOptions(
        file=VaeOptions(vae=None, vae_dtype=None, vae_tiling=False, vae_spatial_tile_sample_min_size=None),
        vae_chunk_size=None,
    )
    given = dict.fromkeys(("f1", "one_frame", "one_frame_no_2x", "one_frame_no_4x"), False) | switches
    return FramePackLatentCachingOptions(vae=vae, image_encoder=None, **given)


def test_every_switch_that_changes_caches_is_part_of_what_they_were_made_from(tmp_path: Path) -> None:
    models = {
        "vae": write_vae(tmp_path / "vae.safetensors"),
        "image_encoder": write_siglip(tmp_path / "siglip.safetensors"),
    }
    switches: list[dict[str, bool]] = [{}, {"f1": True}]
    for no_2x in (False, True):
        switches += [
            {"one_frame": True, "one_frame_no_2x": no_2x, "one_frame_no_4x": no_4x} for no_4x in (False, True)
        ]
    vae = HunyuanVaeOptions(
        file=VaeOptions(
            vae=models["vae"], vae_dtype=None, vae_tiling=False, vae_spatial_tile_sample_min_size=None
        ),
        vae_chunk_size=None,
    )
    found = []
    for given in switches:
        all_given = dict.fromkeys(("f1", "one_frame", "one_frame_no_2x", "one_frame_no_4x"), False) | given
        options = FramePackLatentCachingOptions(vae=vae, image_encoder=models["image_encoder"], **all_given)
        found.append(dict(family_for_latent_caching(options).media_identity))
    assert len({str(sorted(identity.items())) for identity in found}) == len(switches)
    assert all(
        identity.keys() == {"vae", "vae_dtype", "tile", "tile_frames", "image_encoder", "sections"}
        for identity in found
    )


def test_the_vae_is_tiled_unasked_and_in_time_from_six_seconds_on() -> None:
    encoders = family_for_latent_caching(caching_options()).files
    assert (encoders.vae_tile, encoders.vae_tile_frames) == (256, 192)


# What lies in memory


@pytest.mark.parametrize("order", [ANTI_DRIFTING, F1])
def test_items_encoded_together_equal_those_encoded_alone(encoders: MediaEncoders, order: Order) -> None:
    """As a GPU encodes them; each has its own sample of the posterior."""
    media = MediaBatch(noise(2, 21, 16, 16, 3), ("one", "two"), ((0, 21),) * 2, table=MediaTable(window=2))
    assert_same(
        clip_entries(encoders, media, order),
        [clip_entries(encoders, one, order)[0] for one in media.split_for(torch.device("cpu"))],
    )


def assert_same(items: list[list[CacheEntry]], others: list[list[CacheEntry]]) -> None:
    for entries, alone in zip(items, others, strict=True):
        for entry, other in zip(entries, alone, strict=True):
            assert (entry.section, entry.grid, entry.tensors.keys()) == (
                other.section,
                other.grid,
                other.tensors.keys(),
            )
            for name, tensor in entry.tensors.items():
                # float32: a batch sums in another order
                torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-4, atol=1e-4, msg=name)


# Masks


def test_what_is_hidden_has_no_latents() -> None:
    alpha = torch.zeros(2, 32, 48, dtype=torch.uint8)
    alpha[1, :, 24:] = 255
    latents = apply_masks(torch.ones(2, 16, 1, 4, 6), alpha)
    assert latents.shape == (2, 16, 1, 4, 6)
    assert not latents[0].any()
    # Lanczos swings beside the edge: by a step of 255 where it is two latents away
    assert latents[1, ..., :2].abs().max() <= 2 / 255
    assert (1 - latents[1, ..., -2:]).abs().max() <= 2 / 255
    assert torch.equal(latents, latents[:, :1].expand_as(latents))


@pytest.mark.parametrize("order", [ANTI_DRIFTING, F1])
def test_a_section_says_where_in_the_clip_its_target_is(order: Order) -> None:
    """Masks of the loss are cut by it."""
    latents = torch.randn(1, 16, 1 + 3 * 9, 2, 2)

    entries = clip_sections(latents, torch.zeros(3, 4), order, 9)

    assert sorted(entry.start for entry in entries) == [1, 10, 19]
    for entry in entries:
        assert torch.equal(entry.tensors["latents"], latents[0, :, entry.start : entry.start + 9])
