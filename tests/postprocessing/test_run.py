"""Runs of tools: one stream from file to file, its order, memory and metadata; bad inputs and bad luck."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modules.errors import MediaError, MemoryPlanError, OutputError, UserError
from modules.media.encoding import OutputFrame
from modules.media.reading import read_image, read_tags, video_frames, video_info
from modules.media.writing import write_png, write_video
from postprocessing.contract import Clip
from postprocessing.naming import plan_jobs
from postprocessing.run import run_jobs
from postprocessing.stages import NamedStage
from tests.commands import QUIET, ROOT
from tests.faults.test_full_disk import hidden
from tests.postprocessing.stages_here import (
    H264,
    PRORES,
    Asked,
    Larger,
    Refusing,
    Same,
    Smoother,
    chain_of,
    files_in,
    frames_of,
    kept_frames,
    run_stages,
    write_clip,
)
from tests.tiny.project import moving_square


def test_the_stream_gives_what_the_whole_clip_at_once_gives(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", frames=7)
    (streamed,) = run_stages([Larger(), Smoother()], clip, form=replace(H264, keep_pngs=True))

    frames = frames_of(clip).repeat(2, 1).repeat(2, 2)
    full = [frames[0]]
    for before, after in zip(frames, frames[1:], strict=False):
        full += [((before.astype(np.uint16) + after) // 2).astype(np.uint8), after]

    assert streamed.name == "a_LARGER_SMOOTHER.mp4"
    np.testing.assert_array_equal(kept_frames(tmp_path), full)
    info = video_info(streamed)
    assert (info.width, info.height, info.frames, info.fps) == (96, 64, 13, 32.0)


@pytest.mark.slow
def test_no_more_memory_is_held_for_a_longer_clip(tmp_path: Path) -> None:
    def peak(frames: int, name: int = 0) -> int:
        clip = write_clip(tmp_path / f"{frames} {name}.mp4", frames, 160, 96)
        tracemalloc.start()  # numpy tells it of its arrays
        try:
            run_stages([Larger(), Smoother()], clip, yes=True)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)  # what is made once

    # how far the threads come apart differs from run to run
    assert peak(64) <= 1.15 * max(peak(16, name) for name in range(4))


def test_a_picture_gives_a_png_with_its_texts_and_what_was_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = moving_square(1, 32, 24, 3)[0]
    write_png(tmp_path / "a.png", frame, {"bt_prompt": "ein Käfer", "post_1": "earlier"})

    (made,) = run_stages([Larger()], tmp_path / "a.png", form=PRORES)

    assert made == tmp_path / "a_LARGER.png"
    np.testing.assert_array_equal(read_image(made), frame.repeat(2, 0).repeat(2, 1))
    assert read_tags(made) == {"bt_prompt": "ein Käfer", "post_1": "earlier", "post_2": "larger"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_transparent_picture_stays_transparent(tmp_path: Path) -> None:
    opacity = np.repeat(np.linspace(0, 255, 16).round().astype(np.uint8)[None], 16, axis=0)
    clear = np.dstack([np.full((16, 16, 3), (10, 20, 30), np.uint8), opacity])
    write_png(tmp_path / "a.png", clear, {"bt_prompt": "glass"})

    (same,) = run_stages([Same()], tmp_path / "a.png")
    (larger,) = run_stages([Larger()], tmp_path / "a.png")

    np.testing.assert_array_equal(read_image(same, alpha=True), clear)
    made = read_image(larger, alpha=True)
    np.testing.assert_array_equal(made[..., :3], clear[..., :3].repeat(2, 0).repeat(2, 1))
    resized = Image.fromarray(opacity).resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(made[..., 3], np.asarray(resized))
    assert read_tags(larger)["bt_prompt"] == "glass"


def test_a_picture_that_is_opaque_everywhere_needs_no_alpha(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (10, 20, 30, 255)).save(tmp_path / "a.png")

    (made,) = run_stages([Same()], tmp_path / "a.png")

    assert read_image(made, alpha=True).tolist() == [[[10, 20, 30]] * 16] * 16


def test_pngs_are_kept_beside_the_input_under_a_free_name(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in" / "a.mp4", frames=3)
    (tmp_path / "in" / "frames").mkdir()
    form = replace(H264, keep_pngs=True)

    run_stages([Larger()], clip, f"{tmp_path / 'out'}/", form)

    assert files_in(tmp_path / "in") == {"a.mp4", "frames", "frames_"}
    assert files_in(tmp_path / "out") == {"a_LARGER.mp4"}
    assert files_in(tmp_path / "in" / "frames_") == {f"{index:06d}.png" for index in range(3)}
    larger = [frame.repeat(2, 0).repeat(2, 1) for frame in video_frames(clip)]
    np.testing.assert_array_equal(read_image(tmp_path / "in" / "frames_" / "000002.png"), larger[2])


class NothingSeenError(UserError):
    exit_code = 3


def write_truncated(path: Path) -> Path:
    generator = np.random.default_rng(0)
    frames = (generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(48))
    write_video(path, frames, 16, preset="ultrafast")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    return path


@pytest.mark.parametrize("is_cut", [True, False])
def test_what_is_no_whole_video_is_named_and_gives_no_file(is_cut: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    if is_cut:
        write_truncated(path)
    else:
        path.write_text("no video", encoding="utf-8")

    with pytest.raises(MediaError, match="cut short" if is_cut else "cannot be read") as failure:
        run_stages([Same()], path)

    assert str(path) in str(failure.value)
    assert files_in(tmp_path) == {"a.mkv"}


@pytest.mark.parametrize("at", [0, 5, None])
def test_a_stage_that_refuses_leaves_only_an_earlier_result(at: int | None, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", frames=12)
    (tmp_path / "a_REFUSING_SAME.mp4").write_bytes(b"earlier")
    stages, form = [Refusing(NothingSeenError("no face"), at), Same()], replace(H264, keep_pngs=True)

    with pytest.raises(NothingSeenError, match=r"^no face$"):
        run_stages(stages, clip, form=form, yes=True)

    assert files_in(tmp_path) == {"a.mp4", "a_REFUSING_SAME.mp4"}
    assert (tmp_path / "a_REFUSING_SAME.mp4").read_bytes() == b"earlier"


def test_an_error_of_a_later_tool_names_it_and_one_of_the_source_does_not(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    with pytest.raises(NothingSeenError, match=r"^--then refusing: no face$"):
        run_stages([Same(), Refusing(NothingSeenError("no face")), Larger()], clip)

    with pytest.raises(MediaError) as failure:
        run_stages([Same(), Larger()], write_truncated(tmp_path / "b.mkv"))
    assert str(failure.value).startswith(str(tmp_path))


def test_of_several_files_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_clip(tmp_path / "a.mp4")
    write_truncated(tmp_path / "b.mkv")
    (tmp_path / "b.webp").write_bytes(b"RIFF")
    write_clip(tmp_path / "c.mp4")

    with pytest.raises(UserError, match=r"2 of 4 failed:\n  .*b\.mkv: MediaError: ") as failure:
        run_stages([Same()], tmp_path)

    assert failure.value.exit_code == 1
    assert files_in(tmp_path) == {"a.mp4", "a_SAME.mp4", "b.mkv", "b.webp", "c.mp4", "c_SAME.mp4"}
    assert any("b.mkv is skipped. MediaError" in message for message in caplog.messages)


def test_a_lack_of_memory_is_said_with_what_to_do(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    with pytest.raises(MemoryPlanError) as failure:
        run_stages([Larger(), Refusing(error, 2), Same()], clip)

    first, *others = str(failure.value).splitlines()
    assert first.startswith("--then refusing: there is too little memory for images of 96 x 64 (")
    assert len(others) == 1
    assert "--dtype" in others[0]
    assert files_in(tmp_path) == {"a.mp4"}


def test_a_lack_of_memory_at_one_file_gives_the_memory_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", frames=2)
    living: list[weakref.ref[object]] = []
    at_start = []

    class Heavy(Same):
        def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
            at_start.append(sum(ref() is not None for ref in living))
            tensor = torch.zeros(8)
            living.append(weakref.ref(tensor))
            yield next(pictures)
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="2 of 2 failed"):
        run_stages([Heavy()], tmp_path)

    assert at_start == [0, 0]
    assert not any(record.exc_info for record in caplog.records)  # no traceback


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    clip = write_clip(tmp_path / "a.mp4", frames=12)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            run_stages([Larger()], clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

    assert files_in(tmp_path) == {"a.mp4"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_ctrl_c_and_kill_leave_no_file_under_a_final_name(
    end: signal.Signals, code: int, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "in" / "a.mp4", frames=200)
    command = [sys.executable, "-m", "tests.postprocessing.stages_here", str(clip), f"{tmp_path / 'out'}/"]
    environment = {**os.environ, **QUIET}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # a shell has what it runs in the background ignore Ctrl-C, and tests hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"at work\n"
        run.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(60)
        assert run.poll() == code

    visible = {path.name for path in tmp_path.rglob("*") if not path.name.startswith(".") and path.is_file()}
    visible -= {path.name for folder in hidden(tmp_path) for path in folder.rglob("*")}
    assert visible == {"a.mp4"}
    if end == signal.SIGINT:
        assert not hidden(tmp_path)
        plan_jobs(chain_of([Same()], clip), Asked())  # nothing is asked about
    run_jobs(chain_of([Same()], clip), plan_jobs(chain_of([Same()], clip), Asked()), [NamedStage(Same())])
