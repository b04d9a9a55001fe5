"""A video that can be watched while it is made: what is final when, the files, errors, and where networks are
meanwhile.
"""

import gc
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from frame_pack.sections import section_frames
from frame_pack.sections import video_frames as frames_of_video
from generation.denoise import make_latents
from generation.experts import ExpertOffloader
from generation.loaded_networks import CPU, Session
from generation.options import GenerationOptions
from generation.progress import GrowingVideo, fade_in_clip
from generation.run import generate
from generation.script_options import ScriptDefaults
from modules.errors import OutputError
from modules.media.pixels import pixels_to_uint8
from modules.media.reading import video_frames
from modules.media.writing import join_segments
from protocols.data import MediaEncoders
from protocols.loading import Placement
from protocols.requests import Request
from protocols.steps import EncodedPrompts, PreviewPiece, Section
from tests.generation.test_run import options as toy_options
from tests.generation.toy_family import WINDOW, ToyDit, ToyFamily, ToyVae

DEFAULTS = ScriptDefaults(fps=16, guidance_scale=1.0, in_sections=True, infer_steps=2)
REQUEST = Request("cat", 3, 48, 32, None, 2, 1.0, None, 3.0, "unipc", 16.0)
TEXTS = {0: EncodedPrompts({"letters": [torch.full((1, 1), 3.0)]})}
ORDERS = pytest.mark.parametrize("backwards", [True, False], ids=["in front", "behind"])


def options(folder: Path) -> GenerationOptions:
    return toy_options(folder, "--prompt", "cat", "--seed", 1, defaults=DEFAULTS)


def session(family: ToyFamily, device: str = "cpu", spare: int = 0, host: int | None = None) -> Session:
    def load(expert: int) -> nn.Module:
        return family.load_dit(Placement(torch.device(device)), expert)

    there = torch.device(device)
    dits = ExpertOffloader(
        family.experts, there, load, spare_bytes=lambda _: spare, free_host_memory=lambda: host
    )
    return Session(family, there, dits)


def pieces_of(family: ToyFamily) -> tuple[list[PreviewPiece], Tensor]:
    """What each section but the last added, and the latents of the whole video."""
    pieces: list[PreviewPiece] = []

    def note(section: Section) -> None:
        if section.previous_piece is not None:
            pieces.append(section.previous_piece)

    latents = make_latents(
        family, lambda _: ToyDit(), family.prepare(REQUEST), TEXTS, {0: {}}, CPU, on_section=note
    )
    return pieces, latents


ENCODERS = MediaEncoders(ToyVae([], {"vae": "cpu"}))


def black_piece(family: ToyFamily) -> PreviewPiece:
    latents = torch.zeros(1, 2, WINDOW, 4, 4)
    return PreviewPiece(latents, 0, True, family.decode_part, latents)


def joined(pieces: list[PreviewPiece]) -> tuple[Tensor, Tensor]:
    """The frames that are final after all pieces, and those that wait."""
    shown: list[Tensor] = []
    edge: Tensor | None = None
    for piece in pieces:
        clip = torch.cat(list(piece.decode(ENCODERS, piece.latents)), dim=2)
        final, edge = fade_in_clip(edge, clip, piece.overlap, piece.is_prepended)
        if final is not None:
            shown = [final, *shown] if piece.is_prepended else [*shown, final]
    assert edge is not None
    return torch.cat(shown, dim=2), edge


def test_what_grows_in_front_is_the_end_of_the_finished_video_to_the_bit() -> None:
    family = ToyFamily(sections_made=5)
    pieces, latents = pieces_of(family)
    finished = torch.cat(list(family.decode(ENCODERS, latents)), dim=2)
    final, edge = joined(pieces)
    assert torch.equal(final, finished[:, :, -final.shape[2] :])
    # four of five sections, without the start
    assert final.shape[2] + edge.shape[2] == section_frames(4 * WINDOW)


@ORDERS
def test_the_preview_grows_with_each_section_and_shows_all_that_is_there(
    tmp_path: Path, backwards: bool
) -> None:
    family = ToyFamily(sections_made=4, makes_last_first=backwards)
    pieces, _ = pieces_of(family)
    lengths = []
    video = GrowingVideo(session(family), tmp_path / "film_progress.mp4", 16)
    for piece in pieces:
        video.add(piece)
        lengths.append(sum(1 for _ in video_frames(tmp_path / "film_progress.mp4")))
    extra = -3 if backwards else 1  # the start is there from the beginning, or never
    assert lengths == [4 * WINDOW * count + extra for count in (1, 2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["film_progress.mp4"]
    # the encoder loses little: the frames are those that have been put together, in their order
    final, edge = joined(pieces)
    expected = pixels_to_uint8(torch.cat([edge, final] if backwards else [final, edge], dim=2)).astype(int)
    shown = np.stack(list(video_frames(tmp_path / "film_progress.mp4"))).astype(int)
    assert np.abs(shown - expected).mean() < 3


def test_a_run_writes_the_preview_and_removes_it_when_the_video_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = ToyFamily(sections_made=3)
    with caplog.at_level(logging.INFO):
        generate(family, options(tmp_path))
    notes = [line for line in family.diary if not line.startswith(("pass", "encode", "free", "load text"))]
    # two previews, three slices of the whole; on a CPU the VAE does not wait
    assert notes == ["load dit", *["load vae", "decode"] * 2, "load vae", *["decode"] * 3]
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".mp4"
    assert not path.stem.endswith("_progress")
    assert caplog.text.count(f"Preview: {path.with_name(path.stem)}_progress.mp4") == 1


def test_a_preview_that_cannot_be_removed_does_not_spoil_the_video(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on Windows, where a player that has it open keeps it from being removed."""

    def hold() -> None:
        for preview in tmp_path.glob("*_progress.mp4"):
            if preview.is_file():
                preview.unlink()
                preview.mkdir()

    generate(ToyFamily(sections_made=3, on_chunk=hold), options(tmp_path))
    # and no latents
    assert sorted(path.name.rpartition("_1")[2] for path in tmp_path.iterdir()) == [".mp4", "_progress.mp4"]
    assert "_progress.mp4 is no longer needed and cannot be removed" in caplog.text


def test_ctrl_c_leaves_what_was_made_and_says_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        # two steps each: in the third section
        generate(ToyFamily(sections_made=4, interrupt_pass=2 * 2 + 1), options(tmp_path))
    (preview,) = tmp_path.iterdir()
    assert preview.name.endswith("_1_progress.mp4")
    assert sum(1 for _ in video_frames(preview)) == 8 * WINDOW - 3
    assert f"is kept in {preview}" in caplog.text


def test_a_failure_of_the_last_decoding_leaves_preview_and_latents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = ToyFamily(sections_made=3, lengths_without_room=frozenset({3 * WINDOW + 1}))
    with pytest.raises(Exception, match="no room"):
        generate(family, options(tmp_path))
    (preview,) = tmp_path.glob("*_1_progress.mp4")
    assert len(list(tmp_path.glob("*_1_latent.safetensors"))) == 1
    assert f"is kept in {preview}" in caplog.text


@pytest.mark.parametrize("length", [WINDOW, 2 * WINDOW], ids=["at once", "later"])
def test_a_preview_that_fails_is_told_once_and_the_video_is_made(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    generate(ToyFamily(sections_made=4, lengths_without_room=frozenset({length})), options(tmp_path))
    (path,) = tmp_path.iterdir()
    assert sum(1 for _ in video_frames(path)) == frames_of_video(4, WINDOW)
    assert caplog.text.count("The preview of the video has failed (OutOfMemoryError: no room)") == 1


def test_a_preview_that_a_player_holds_is_replaced_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = iter([False, True, True, False])

    def join(path: Path, *more: Any) -> None:
        if next(held):
            raise OutputError(f"{path} cannot be written: permission denied.")
        join_segments(path, *more)

    family = ToyFamily(sections_made=5)
    pieces, _ = pieces_of(family)
    lengths = []
    video = GrowingVideo(session(family), tmp_path / "film_progress.mp4", 16)
    video.join = join
    for piece in pieces:
        video.add(piece)
        lengths.append(sum(1 for _ in video_frames(video.path)))
    assert lengths == [4 * WINDOW * count - 3 for count in (1, 1, 1, 4)]
    assert caplog.text.count("permission denied. It is retried after each section") == 1


# Where networks are meanwhile


@contextmanager
def dit_at_work(made: Session) -> Iterator[None]:
    with made.dits.phase():
        yield
        assert made.family.places["dit"] == str(made.device)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),  # no workspace
    ],
)
def test_the_dit_leaves_the_device_where_it_turns_out_that_both_do_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    family = ToyFamily(sections_made=4, has_room_for_two=False, no_room=error)
    pieces, _ = pieces_of(family)
    made = session(family, "cuda", 100)
    video = GrowingVideo(made, tmp_path / "film_progress.mp4", 16, 100)
    with caplog.at_level(logging.INFO), dit_at_work(made):
        for piece in pieces:
            video.add(piece)
    notes = [line for line in family.diary if not line.startswith("pass")]
    assert notes == ["load dit", "load vae", "decode", "decode", "decode"]
    assert caplog.text.count("Too little memory to decode next to the transformer") == 1
    assert sum(1 for _ in video_frames(video.path)) == 4 * WINDOW * 3 - 3


@pytest.mark.parametrize("spare", [0, 100], ids=["at once", "when it turns out that it has to leave"])
def test_a_dit_for_which_the_host_has_no_room_stays_and_there_is_no_preview(
    tmp_path: Path, spare: int, caplog: pytest.LogCaptureFixture
) -> None:
    family = ToyFamily(sections_made=2, has_room_for_two=False)
    made = session(family, "cuda", spare, host=-1)
    with dit_at_work(made):
        GrowingVideo(made, tmp_path / "film_progress.mp4", 16, 100).add(black_piece(family))
    assert "would have to move to host memory" in caplog.text
    assert not list(tmp_path.iterdir())
    assert "decode" not in family.diary


def test_ctrl_c_while_a_piece_is_decoded_brings_the_dit_back(tmp_path: Path) -> None:
    family = ToyFamily(sections_made=2, stop_loading={"media"})
    made = session(family, "cuda")
    with pytest.raises(KeyboardInterrupt), dit_at_work(made):
        GrowingVideo(made, tmp_path / "film_progress.mp4", 16).add(black_piece(family))
    assert family.places["dit"] == "cuda"


# Memory


@pytest.mark.slow_cases("behind", "in front")
@ORDERS
def test_pixels_that_are_held_at_once_do_not_grow_with_the_number_of_sections(
    tmp_path: Path, backwards: bool
) -> None:
    def maximum(sections: int) -> int:
        found: list[int] = []
        with held_memory() as held:
            family = ToyFamily(
                sections_made=sections, makes_last_first=backwards, on_chunk=lambda: found.append(held())
            )
            generate(family, options(tmp_path / str(sections)))
        return max(found)

    maximum(3)  # what a first run loads
    few, many = maximum(4), maximum(8)
    frame_bytes = 3 * 32 * 48 * 4
    assert few > section_frames(2 * WINDOW) * frame_bytes  # a clip at least is seen
    assert many - few < 3 * frame_bytes  # of 48 frames that are more: latents and notes


@contextmanager
def held_memory() -> Iterator[Callable[[], int]]:
    """A function that says how many bytes are held of what was made inside the block; memory that several
    share counts once.

    Tensors are found among the objects that Python can walk through, arrays by the memory that numpy says it
    takes.
    """

    def held() -> int:
        tensors = [each for each in gc.get_objects() if type(each) is Tensor]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(storages.values()) + tracemalloc.get_traced_memory()[0]

    gc.collect()
    gc.freeze()  # what is there now is neither walked through nor counted
    tracemalloc.start()
    try:
        yield held
    finally:
        tracemalloc.stop()
        gc.unfreeze()
