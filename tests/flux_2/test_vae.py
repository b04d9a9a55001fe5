"""FLUX.2's autoencoder against diffusers', in every layout, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.opening import open_checkpoint
from encoders.autoencoder import load_autoencoder
from flux_2.vae import load_vae, read_vae
from modules.errors import CheckpointError
from tests.flux_2.making import autoencoder_in_diffusers
from tests.manifests import tensor_list, write_hollow
from tests.parity.running import assert_equal
from tests.tiny.flux_2 import vae_diffusers, vae_state
from tests.tiny.picture_encoders import autoencoder_tensors

CPU = torch.device("cpu")
NEAR = 1e-5  # of the largest value, float32: the same layers, memory laid out in another order


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    path = folder / "vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.mark.slow_cases("diffusers")
@pytest.mark.parametrize("layout", ["released", "diffusers"])
@torch.no_grad()
def test_latents_and_pictures_equal_those_of_diffusers(tmp_path: Path, layout: str) -> None:
    state, generator = vae_state(), torch.Generator().manual_seed(2)
    ours = load_vae(
        write(tmp_path, state if layout == "released" else vae_diffusers(state)), CPU, torch.float32
    )
    theirs = autoencoder_in_diffusers(state)
    pixels = torch.randint(0, 256, (2, 3, 1, 48, 80), generator=generator, dtype=torch.uint8)

    latents = ours.encode(pixels)

    means = theirs.encode(pixels[:, :, 0] / 127.5 - 1).latent_dist.mode()
    packed = torch.nn.functional.pixel_unshuffle(means, 2)
    deviation = (state["bn.running_var"] + 1e-4).sqrt()[:, None, None]
    expected = (packed - state["bn.running_mean"][:, None, None]) / deviation
    assert latents.shape == (2, 128, 1, 3, 5)
    assert_equal(latents[:, :, 0], expected, "latents", NEAR)
    assert_equal(ours.decode_unclamped(latents)[:, :, 0], theirs.decode(means).sample, "pixels", NEAR)


def test_large_pictures_are_cut_into_tiles_and_statistics_stay_in_float32(tmp_path: Path) -> None:
    path = write(tmp_path, vae_state())
    full, tiled = (load_vae(path, CPU, torch.float32, tile) for tile in (None, 64))
    pixels = torch.rand(1, 3, 1, 96, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1

    latents = tiled.encode(pixels)
    made = tiled.decode(latents)

    # neighbors are blended in the last quarter of a tile
    assert_equal(latents[..., :3, :3], full.encode(pixels[..., :64, :64])[..., :3, :3], "latents", NEAR)
    assert_equal(made[..., :48, :48], full.decode(latents[..., :4, :4])[..., :48, :48], "pixels", NEAR)
    half = load_vae(path, CPU, torch.bfloat16)
    assert (half.dtype, half.mean.dtype, half.deviation.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert torch.equal(half.mean, full.mean)


@pytest.mark.parametrize(
    ("manifest", "of_decoder"),
    [
        ("flux2-vae", (128, 256, 512, 512)),
        ("flux2-vae-diffusers", (128, 256, 512, 512)),
        ("moss-image-vae-diffusers", (96, 192, 384, 384)),
    ],
)
def test_the_released_file_has_the_known_sizes(
    tmp_path: Path, manifest: str, of_decoder: tuple[int, ...]
) -> None:
    with open_checkpoint(write_hollow(tmp_path / "vae.safetensors", tensor_list(manifest))) as checkpoint:
        config = read_vae(checkpoint).config

    assert (config.latent_channels, config.widths) == (32, (128, 256, 512, 512))
    assert (config.decoder_widths or config.widths) == of_decoder


def test_another_autoencoder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"16 latent channels, but the autoencoder of FLUX.2 has 32 and one"
    ):
        load_vae(write(tmp_path, autoencoder_tensors()), CPU, torch.float32)
    with pytest.raises(CheckpointError, match="32 latent channels and a quant_conv, .* has 16 and none"):
        load_autoencoder(write(tmp_path, vae_state()), CPU, torch.float32)
    state = vae_state()
    del state["bn.running_var"]
    with pytest.raises(
        CheckpointError, match="bn.running_var, the statistics of its 128 channels, is missing"
    ):
        load_vae(write(tmp_path, state), CPU, torch.float32)
