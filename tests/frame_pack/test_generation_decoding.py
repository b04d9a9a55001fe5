"""Latents of FramePack become pixels."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frame_pack.family import family_for_generation
from frame_pack.options import FramePackGenerationOptions
from frame_pack.sections import section_frames
from hunyuan_model.spec import LATENT as VAE_LATENT
from modules.contract.data import MediaEncoders
from modules.options import read_options
from modules.parser import add_options
from tests.frame_pack.stubs import RepeatingVae, family
from tests.tiny.hunyuan_vae import write_vae


def frames(latents: torch.Tensor, **settings: bool | int) -> tuple[torch.Tensor, list[int]]:
    """The values of a corner over the frames, and the lengths that were decoded at once."""
    vae = RepeatingVae()
    pixels = torch.cat(list(family(**settings).decode(MediaEncoders(vae), latents)), dim=2)
    return pixels[0, 0, :, 0, 0], vae.lengths


def rising(count: int) -> torch.Tensor:
    """Latents whose frames are 0, 1/64, 2/64 ... once they are scaled as the VAE takes them."""
    return (torch.arange(count).float() / 64 * VAE_LATENT.scale).view(1, 1, -1, 1, 1).repeat(1, 16, 1, 2, 2)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("window", [9, 4])
def test_sections_decode_to_as_many_frames_as_all_at_once(count: int, window: int) -> None:
    latents = rising(window * count + 1)

    blended, parts = frames(latents, window=window)
    bulk, whole = frames(latents, window=window, bulk_decode=True)

    assert len(blended) == len(bulk) == 4 * window * count + 1
    assert whole == [window * count + 1]
    assert parts == ([window + 1] if count == 1 else [2 * window + 1, *[2 * window] * (count - 2), window])


class NumberingVae(RepeatingVae):
    """Clips are a half, one, one and a half ...

    all over, in the order of decoding: colours from 1 on do not exist.
    """

    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        for chunk in super().decode_unclamped(latents):
            yield torch.full_like(chunk, 0.5 * len(self.lengths))


def test_seams_go_over_linearly_from_the_earlier_clip_to_the_later() -> None:
    """Colours out of range are cut off after the transition, as released."""
    chunks = family().decode(MediaEncoders(NumberingVae()), rising(28))
    blended = torch.cat(list(chunks), dim=2)[0, 0, :, 0, 0]
    overlap, weights = section_frames(9), torch.linspace(1, 0, section_frames(9))
    seams = [weights * 0.5 * number + (1 - weights) * 0.5 * (number + 1) for number in (1, 2)]
    expected = torch.cat([torch.full((73 - overlap,), 0.5), seams[0], torch.ones(69 - 2 * overlap), seams[1]])
    torch.testing.assert_close(blended, expected.clamp(max=1))


def test_what_is_decoded_together_is_cut_in_space_and_not_in_time(tmp_path: Path) -> None:
    """Sections have transitions of their own; the VAE's would be further ones within them."""
    parser = argparse.ArgumentParser()
    add_options(parser, FramePackGenerationOptions)
    args = parser.parse_args(
        ["--vae", str(write_vae(tmp_path / "vae.safetensors")), "--vae_dtype", "float32"]
    )
    model = family_for_generation(read_options(FramePackGenerationOptions, args))
    tiling = model.media_encoders(torch.device("cpu"), images=False).vae.tiling
    assert tiling.edge == 256
    assert tiling.frames >= 4 * 10_000
