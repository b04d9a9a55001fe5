"""A FramePack video that can be watched while it is made."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from frame_pack.family import FramePack, family_for_generation
from frame_pack.options import FramePackGenerationOptions
from frame_pack.sections import video_frames
from generation.denoise import make_latents
from generation.progress import fade_in_clip
from hunyuan_model.spec import LATENT as VAE_LATENT
from modules.script_options import parse_options
from protocols.data import MediaEncoders
from protocols.steps import DecodePart, PreviewPiece, Section
from tests.frame_pack.stubs import CPU, RepeatingVae, family, images, request, texts
from tests.tiny.hunyuan_vae import write_vae

SECTIONS = 4


class RememberingVae(RepeatingVae):
    """Each frame shows all before it too: what it looks like depends on where decoding began."""

    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        mixed = latents.cumsum(2) / torch.arange(1, latents.shape[2] + 1).sqrt().view(-1, 1, 1)
        return super().decode_unclamped(mixed)


class PaintingDit(nn.Module):
    """In one Euler step a section becomes something of its own, in part beyond the colors there are."""

    def __init__(self) -> None:
        super().__init__()
        self.brush = torch.Generator().manual_seed(3)

    def forward(self, noisy: Tensor, *_: object, **__: object) -> Tensor:
        return noisy - (2 * torch.rand(noisy.shape, generator=self.brush) - 1)


def made(model: FramePack) -> tuple[list[PreviewPiece], Tensor]:
    """What each section but the last added, and the latents of the whole."""
    pieces: list[PreviewPiece] = []

    def note(section: Section) -> None:
        pieces.extend([] if section.previous_piece is None else [section.previous_piece])
        assert section.label == f"section {len(pieces) + 1} of {SECTIONS}"

    asked = request(video_frames(SECTIONS, model.window))
    prompts = {index: texts(float(index)) for index in range(SECTIONS)}
    dit = PaintingDit()
    latents = make_latents(model, lambda _: dit, asked, prompts, images(SECTIONS), CPU, on_section=note)
    return pieces, latents


def pixels(decode: DecodePart, latents: Tensor) -> Tensor:
    """What the latents of a whole video or of a part of one decode to."""
    return torch.cat(list(decode(MediaEncoders(RememberingVae()), latents)), dim=2)


@pytest.mark.parametrize("window", [9, 4, 2, 1])  # with 1 a piece is as long as a video of one section
@pytest.mark.parametrize("is_f1", [False, True], ids=["anti-drifting", "f1"])
def test_what_is_shown_is_what_the_finished_video_shows(is_f1: bool, window: int) -> None:
    model = family(is_f1=is_f1, window=window)
    pieces, latents = made(model)
    finished, final, edge = pixels(model.decode, latents), [], None
    for piece in pieces:
        new, edge = fade_in_clip(edge, pixels(piece.decode, piece.latents), piece.overlap, piece.is_prepended)
        final += [] if new is None else [new]
    assert edge is not None
    assert len(finished.unique()) > 5  # pictures, not a surface
    if is_f1:
        shown = torch.cat(final, dim=2)
        # in the finished video these two sections are decoded together with the start image
        first = video_frames(2, window)
        assert torch.equal(shown[:, :, first:].clamp(-1, 1), finished[:, :, first : shown.shape[2]])
        assert shown.shape[2] + edge.shape[2] == video_frames(SECTIONS - 1, window)
    else:
        shown = torch.cat(final[::-1], dim=2)
        assert torch.equal(shown.clamp(-1, 1), finished[:, :, -shown.shape[2] :])
        # all but the start image's latent frame
        assert shown.shape[2] + edge.shape[2] == video_frames(SECTIONS - 1, window) - 4


def decoded_frames(latents: torch.Tensor, **settings: bool | int) -> tuple[torch.Tensor, list[int]]:
    """The values of a corner over the frames, and the lengths that were decoded at once."""
    vae = RepeatingVae()
    pixels = torch.cat(list(family(**settings).decode(MediaEncoders(vae), latents)), dim=2)
    return pixels[0, 0, :, 0, 0], vae.lengths


def rising(count: int) -> torch.Tensor:
    """Latents whose frames are 0, 1/64, 2/64 ... once they are scaled as the VAE takes them."""
    return (torch.arange(count).float() / 64 * VAE_LATENT.scale).view(1, 1, -1, 1, 1).repeat(1, 16, 1, 2, 2)


@pytest.mark.parametrize(("window", "count"), [(9, 1), (9, 2), (4, 5)])
def test_sections_decode_to_as_many_frames_as_all_at_once(window: int, count: int) -> None:
    latents = rising(window * count + 1)

    blended, parts = decoded_frames(latents, window=window)
    bulk, full = decoded_frames(latents, window=window, bulk_decode=True)

    assert len(blended) == len(bulk) == 4 * window * count + 1
    assert full == [window * count + 1]
    assert parts == ([window + 1] if count == 1 else [2 * window + 1, *[2 * window] * (count - 2), window])


def test_latents_that_are_no_whole_sections_are_decoded_at_once() -> None:
    """Such as those of another program, given with --latent_path."""
    frames, parts = decoded_frames(rising(2 * 9 + 4))
    assert (len(frames), parts) == (4 * (2 * 9 + 3) + 1, [2 * 9 + 4])


def test_what_is_decoded_together_is_cut_in_space_and_not_in_time(tmp_path: Path) -> None:
    """Sections have transitions of their own; the VAE's would be further ones within them."""
    words = ["--vae", str(write_vae(tmp_path / "vae.safetensors")), "--vae_dtype", "float32"]
    (options,) = parse_options("", words, FramePackGenerationOptions)
    tiling = family_for_generation(options).media_encoders(CPU, images=False).vae.tiling
    assert tiling.edge == 256
    assert tiling.frames >= 4 * 10_000
