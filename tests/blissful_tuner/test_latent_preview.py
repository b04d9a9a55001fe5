"""Latent previews: what is shown, when, and that nothing depends on them."""

import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from blissful_tuner.latent_preview import LatentPreviews, check_preview, make_previews, preview_clip
from blissful_tuner.preview_options import PreviewOptions
from blissful_tuner.taehv import TinyVae, enlarge, project
from modules.contract.family import LatentSpec
from modules.contract.generation import Piece, Section
from modules.contract.steps import Step, StepDone
from modules.errors import OptionError
from modules.media.reading import read_image, video_frames, video_info
from tests.commands import ROOT
from tests.tiny.taehv import CONFIG
from wan.family import LATENT

CPU = torch.device("cpu")


def previews_in(folder: Path, every: int = 1, **more: object) -> LatentPreviews:
    return LatentPreviews(every, folder, LATENT, CPU, lambda _: True, **more)  # type: ignore[arg-type]


def draw(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 16, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def step(index: int, num_steps: int, frames: int = 1, section: Section | None = None) -> StepDone:
    noisy, velocity = draw(frames, index), draw(frames, 100 + index)
    section = section or Section(noisy, {})
    return StepDone(Step(index, num_steps, 0.7, 700.0, noisy), velocity, section)


def colours_of(latents: Tensor) -> list[np.ndarray]:
    return list(enlarge(project(latents[0], LATENT), 8, 8))


@dataclass
class Shown(LatentPreviews):
    """Notes what would be written, instead of writing it."""

    seen: list[np.ndarray] = field(default_factory=list)

    def take(self, latents: Tensor, fps: float) -> None:
        self.seen.append(latents)


def shown(every: int, steps: Sequence[StepDone]) -> list[Tensor]:
    """What is shown of these steps, one clip after the other so that none replaces another."""
    previews = Shown(every, Path(), LATENT, torch.device("meta"), lambda _: True)
    with previews.of(16.0) as clip:
        assert [clip.watch(done) for done in steps] == [False] * len(steps)
    return previews.seen


def test_the_clean_clip_is_shown_and_not_the_noisy_one(tmp_path: Path) -> None:
    done = step(0, 4)
    with previews_in(tmp_path).of(16.0) as clip:
        clip.watch(done)

    picture = read_image(tmp_path / "latent_preview.png")
    clean = done.step.noisy - 0.7 * done.velocity
    assert np.array_equal(picture, colours_of(clean)[0])
    assert not np.array_equal(picture, colours_of(done.step.noisy)[0])


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4]), (6, []), (7, [])]
)
def test_previews_come_after_every_nth_step_but_not_after_the_last(every: int, expected: list[int]) -> None:
    steps = [step(index, 6) for index in range(6)]
    found = shown(every, steps)
    assert len(found) == len(expected)
    assert all(torch.equal(one, steps[index].clean) for one, index in zip(found, expected, strict=True))


def test_a_clip_is_a_video_with_a_quarter_of_the_frames_and_of_the_rate(tmp_path: Path) -> None:
    with previews_in(tmp_path).of(24.0) as clip:
        clip.watch(step(0, 2, frames=3))

    info = video_info(tmp_path / "latent_preview.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 3, 6.0)
    assert [path.name for path in tmp_path.iterdir()] == ["latent_preview.mp4"]


def test_a_tiny_vae_shows_every_frame_at_the_rate_of_the_video(tmp_path: Path) -> None:
    from tests.tiny.taehv import write_taehv

    path = write_taehv(tmp_path / "taehv.pth")
    previews = make_previews(
        PreviewOptions(preview_latent_every=1, preview_vae=path), LATENT, tmp_path, CPU, lambda _: True
    )
    assert previews is not None
    with previews.of(24.0) as clip:
        clip.watch(step(0, 2, frames=3))

    info = video_info(tmp_path / "latent_preview.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 9, 24.0)


@pytest.mark.parametrize("in_front", [True, False])
def test_of_a_video_in_sections_the_finished_ones_are_shown(tmp_path: Path, in_front: bool) -> None:
    previews = Shown(2, tmp_path, LATENT, torch.device("meta"), lambda _: True)
    so_far = [draw(frames) for frames in (3, 6, 9, 12)]
    pieces = [None, *(Piece(one, 0, in_front, lambda *_: iter(()), one) for one in so_far)]
    with previews.of(30.0) as clip:
        for piece in pieces:
            section = Section(draw(3), {}, made=piece, count=5)
            clip.on_section(section)
            for index in range(3):
                clip.watch(step(index, 3, section=section))
    assert [one.shape[2] for one in previews.seen] == [6, 12]
    assert torch.equal(previews.seen[0], so_far[1])


def test_an_error_is_one_warning_and_a_file_that_cannot_be_written_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "latent_preview.png"
    (in_the_way / "x").mkdir(parents=True)
    previews = previews_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            with previews.of(16.0) as clip:
                clip.watch(step(index, 4))
    assert caplog.text.count("A latent preview has failed: OutputError") == 1
    assert "the generation goes on" in caplog.text

    (in_the_way / "x").rmdir()
    in_the_way.rmdir()
    with previews.of(16.0) as clip:
        clip.watch(step(0, 4))
    assert in_the_way.is_file()


def test_any_other_error_ends_the_previews_of_the_run_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = replace(LATENT, channels=2, preview_factors=LATENT.preview_factors[:2])
    previews = LatentPreviews(1, tmp_path, wrong, CPU, lambda _: True)
    for _ in range(2):
        with previews.of(16.0) as clip:
            clip.watch(step(0, 4))
    assert previews.has_ended
    assert len(caplog.records) == 1
    assert "There are no more of this run" in caplog.text
    assert not list(tmp_path.iterdir())


class NoRoom(TinyVae):
    """Runs out of memory."""

    def frames(self, latents: Tensor, device: torch.device) -> None:  # type: ignore[override]
        raise torch.OutOfMemoryError("no room")


def test_without_memory_for_the_tiny_vae_colours_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    previews = previews_in(tmp_path, vae=NoRoom(CONFIG, {}))
    for _ in range(2):
        with previews.of(16.0) as clip:
            clip.watch(step(0, 4))
    assert np.array_equal(read_image(tmp_path / "latent_preview.png"), colours_of(step(0, 4).clean)[0])
    assert [record.message for record in caplog.records] == [
        "Previews are made without --preview_vae because the device ran out of memory."
    ]


def test_the_tiny_vae_stays_out_of_a_device_without_room_beside_the_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def has_room(needed: int | None) -> bool:
        asked.append(needed)
        return False

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    previews = LatentPreviews(1, tmp_path, LATENT, torch.device("meta"), has_room, NoRoom(CONFIG, {}))
    for _ in range(2):
        previews.take(draw(1), 16.0)
    assert len(asked) == 1
    assert asked[0] is not None
    assert asked[0] > 0
    assert "MiB free beside the transformer" in caplog.text


def test_an_interrupted_clip_leaves_no_thread_and_no_part_of_a_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with previews_in(tmp_path).of(16.0) as clip:
            for index in range(3):
                clip.watch(step(index, 4, frames=2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [thread for thread in threading.enumerate() if thread.name == "latent preview"]
    assert {path.name for path in tmp_path.iterdir()} <= {"latent_preview.mp4"}


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from blissful_tuner.latent_preview import LatentPreviews, Shot
from wan.family import LATENT

def frames(killed):
    for index in range(6):
        if killed and index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield np.full((32, 48, 3), 40 * index, np.uint8)

previews = LatentPreviews(1, Path(sys.argv[1]), LATENT, None, None)
previews.write(lambda: Shot(lambda: frames(False), 4.0, False))
previews.write(lambda: Shot(lambda: frames(True), 4.0, False))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_kill_in_the_middle_leaves_the_preview_before(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=120)
    assert done.returncode == -9
    assert len(list(video_frames(tmp_path / "latent_preview.mp4"))) == 6
    left = [path.name for path in tmp_path.iterdir() if path.name != "latent_preview.mp4"]
    assert len(left) == 1  # removed by a later run
    assert left[0].startswith(".latent_preview.mp4.")


def test_several_runs_may_write_into_one_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with previews_in(tmp_path).of(16.0) as one, previews_in(tmp_path).of(16.0) as other:
        for index in range(6):
            for clip in (one, other):
                clip.watch(step(index, 8, frames=2))
    assert len(list(video_frames(tmp_path / "latent_preview.mp4"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["latent_preview.mp4"]
    assert not caplog.records


def test_without_previews_nothing_watches() -> None:
    with preview_clip(None, 16.0) as (watchers, on_section):
        assert watchers == []
        on_section(Section(draw(1), {}))
    assert (
        make_previews(
            PreviewOptions(preview_latent_every=None, preview_vae=None), LATENT, Path(), CPU, lambda _: True
        )
        is None
    )


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--preview_latent_every 0: give a number"):
        PreviewOptions(preview_latent_every=0, preview_vae=None)
    with pytest.raises(OptionError, match=r"--preview_vae .*no.pth: no such file"):
        PreviewOptions(preview_latent_every=1, preview_vae=tmp_path / "no.pth")
    with pytest.raises(OptionError, match=r"add --preview_latent_every"):
        PreviewOptions(preview_latent_every=None, preview_vae=tmp_path)
    bare = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4)
    with pytest.raises(OptionError, match="no map from this model's latents to colours"):
        check_preview(PreviewOptions(preview_latent_every=1, preview_vae=None), bare)


@pytest.mark.gpu
@pytest.mark.parametrize("has_vae", [False, True])
def test_taking_a_preview_does_not_wait_for_the_gpu(tmp_path: Path, has_vae: bool) -> None:
    from tests.tiny.taehv import write_taehv

    cuda, path = torch.device("cuda"), write_taehv(tmp_path / "taehv.pth")
    options = PreviewOptions(preview_latent_every=1, preview_vae=path if has_vae else None)
    previews = make_previews(options, LATENT, tmp_path, cuda, lambda _: True)
    assert previews is not None
    latents = draw(3).to(cuda)
    previews.take(latents, 16.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        shot = previews.take(latents, 16.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    previews.write(lambda: shot)
    assert len(list(video_frames(tmp_path / "latent_preview.mp4"))) == (9 if has_vae else 3)
