"""A FramePack video that can be watched while it is made."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpack_generate_video import main
from frame_pack.family import FramePack
from frame_pack.sections import video_frames
from generation.denoise import make_latents
from generation.progress import fade_in_clip
from modules.contract.data import MediaEncoders
from modules.contract.steps import DecodePart, Piece, Section
from modules.media.reading import video_frames as frames_in
from modules.media.writing import write_png
from tests.frame_pack.stubs import CPU, RepeatingVae, family, images, request, texts
from tests.tiny.framepack import write_tiny_framepack

SECTIONS = 4


class RememberingVae:
    """Each frame shows all before it too: what it looks like depends on where decoding began."""

    def __init__(self) -> None:
        self.repeating = RepeatingVae()

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        for chunk in self.decode_unclamped(latents):
            yield chunk.clamp(-1, 1)

    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        mixed = latents.cumsum(2) / torch.arange(1, latents.shape[2] + 1).sqrt().view(-1, 1, 1)
        return self.repeating.decode_unclamped(mixed)


class PaintingDit(nn.Module):
    """In one Euler step a section becomes something of its own, in part beyond the colours there are."""

    def __init__(self) -> None:
        super().__init__()
        self.brush = torch.Generator().manual_seed(3)

    def forward(self, noisy: Tensor, *_: object, **__: object) -> Tensor:
        return noisy - (2 * torch.rand(noisy.shape, generator=self.brush) - 1)


def made(model: FramePack) -> tuple[list[Piece], Tensor]:
    """What each section but the last added, and the latents of the whole."""
    pieces: list[Piece] = []

    def note(section: Section) -> None:
        pieces.extend([] if section.made is None else [section.made])

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
        new, edge = fade_in_clip(edge, pixels(piece.decode, piece.latents), piece.overlap, piece.in_front)
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


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--f1",), marks=pytest.mark.slow)], ids=["anti-drifting", "f1"]
)
def test_the_script_shows_a_video_until_it_is_there(
    tmp_path: Path, more: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    files = write_tiny_framepack(tmp_path / "models")
    write_png(tmp_path / "start.png", (torch.zeros(32, 32, 3, dtype=torch.uint8) + 99).numpy())
    words = [
        "--image_path",
        str(tmp_path / "start.png"),
        "--prompt",
        "a cat",
        "--seed",
        "7",
        "--save_path",
        str(tmp_path / "out"),
    ]
    words += [
        "--video_size",
        "32",
        "32",
        "--latent_window_size",
        "2",
        "--video_sections",
        "3",
        "--infer_steps",
        "1",
    ]
    with caplog.at_level("INFO"):
        main([*words, "--device", "cpu", *files.models, *more])
    (video,) = (tmp_path / "out").iterdir()
    assert sum(1 for _ in frames_in(video)) == video_frames(3, 2)
    assert caplog.text.count(f"Preview: {video.with_suffix('')}_progress.mp4") == 1
    assert "preview of the video has failed" not in caplog.text
