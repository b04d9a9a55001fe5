"""The VAE of HunyuanVideo 1.5 equals diffusers', computed in groups of frames and in tiles."""

from pathlib import Path

import pytest
import torch

from hunyuan_video_15 import vae as ours
from modules.errors import CheckpointError
from tests.hunyuan_video_15.making import tiny_vae, vae_in_diffusers
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_video_15 import VAE, diffusers_vae, vae_state

NEAR = 2e-5  # float32 on the CPU, of values near 1


def draw_clip(frames: int, height: int = 48, width: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_latents_equal_diffusers(frames: int) -> None:
    pixels = draw_clip(frames)

    made = tiny_vae().encode(pixels)

    there = vae_in_diffusers(vae_state())  # which takes one clip at a time
    expected = torch.cat([there.encode(clip).latent_dist.mode() for clip in pixels.split(1)])
    assert made.shape == (2, 32, (frames - 1) // 4 + 1, 3, 2)
    torch.testing.assert_close(made, expected, rtol=0, atol=NEAR)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_pixels_equal_diffusers(frames: int) -> None:
    latents = torch.randn(2, 32, frames, 3, 2, generator=torch.Generator().manual_seed(4))

    chunks = list(tiny_vae().decode(latents))

    there = vae_in_diffusers(vae_state())
    expected = torch.cat([there.decode(latent).sample.clamp(-1, 1) for latent in latents.split(1)])
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (frames - 1)
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=0, atol=NEAR)


def test_tiles_equal_diffusers() -> None:
    """Their edge is a fourth of the release's, and they overlap by a quarter."""
    pixels = draw_clip(5, 144, 96, batch=1)
    vae, there = tiny_vae(tile=64), vae_in_diffusers(vae_state())
    there.enable_tiling(64, 64, 4, 4)

    latents = vae.encode(pixels)
    made = torch.cat(list(vae.decode(latents)), dim=2)

    expected = there.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, expected, rtol=0, atol=NEAR)
    torch.testing.assert_close(made, there.decode(expected).sample.clamp(-1, 1), rtol=0, atol=NEAR)
    assert (tiny_vae().encode(pixels) - latents).abs().max() > 100 * NEAR


def test_bytes_are_encoded_as_pixels() -> None:
    frames = torch.randint(0, 256, (1, 3, 5, 32, 32), dtype=torch.uint8)

    made = tiny_vae().encode(frames)

    assert torch.equal(made, tiny_vae().encode(frames.float() / 127.5 - 1))


@pytest.mark.parametrize("size", [(4, 32, 32), (5, 40, 32), (5, 32, 40)])
def test_other_sizes_are_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny_vae().encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("layout", ["released", "diffusers", "in one file with others"])
def test_every_layout_of_a_file_is_read(tmp_path: Path, layout: str) -> None:
    state = vae_state()
    layouts = {
        "released": state,
        "diffusers": diffusers_vae(state),
        "in one file with others": {f"vae.{name}": tensor for name, tensor in state.items()},
    }
    path = save(tmp_path / "vae.safetensors", layouts[layout])

    loaded = ours.load_vae(path, torch.device("cpu"), torch.float32)

    for name, tensor in tiny_vae().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.encoder.moments == 2 * VAE.latent_channels


def test_another_vae_is_refused_by_its_kind(tmp_path: Path) -> None:
    """With 16 latent channels, and with a level less."""
    state = vae_state()
    narrow = {**state, "decoder.conv_in.conv.weight": state["decoder.conv_in.conv.weight"][:, :16]}
    short = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.down.4.")}

    for tensors, said in ((narrow, "16 latent channels"), (short, "4 and 5 levels"), ({}, "is not the VAE")):
        path = save(tmp_path / "vae.safetensors", tensors or {"some.weight": torch.zeros(2)})
        with pytest.raises(CheckpointError, match=said):
            ours.load_vae(path, torch.device("cpu"), torch.float32)
