"""The whole command: frames, times and sound of clips, their list, and what a second run does."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_tools.cutting.clips import VideoAnalysis, analyze_video
from dataset.caching.loop import cache_media
from dataset.config import DatasetConfig
from dataset.listing import find_sources
from modules.errors import DatasetError, MediaError, OptionError, OutputError
from modules.media.streams import shown_frames, source_info
from tests.data_tools.cutting.films import find_frame, plain, scene, write_film
from tests.dataset.cache.killing import needs_fork, run_to_step
from tests.dataset.making import make_table
from tests.dataset.toy_family import ToyFamily, options
from tests.modules.media.test_streams import RATE, audio_of
from tests.sound_media import Track, clicks_in, write_media
from tools.split_video import main

NTSC = Fraction(24000, 1001)
# a film: two scenes that move, one that stands, black, and one that is too short
FILM = (*scene(1, 30), *scene(2, 26), *scene(3, 25, 0), *plain(0, 25), *scene(5, 9))
KEPT = [(0, 30), (30, 56)]


def run(source: Path, output: Path, *more: object) -> list[Path]:
    """Run the command in this process; returns the clips that are there."""
    words = ["--input", source, "--output", output, "--preset", "ultrafast", *more]
    main([str(word) for word in words])
    return clips_in(output)


def clips_in(output: Path) -> list[Path]:
    return sorted(path for path in output.iterdir() if path.suffix in {".mp4", ".mkv"})


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "clips.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers_in(clip: Path, film: Path) -> list[int]:
    """Which frames of a film are in a clip."""
    frames = [frame.pixels for frame in shown_frames(film)]
    return [find_frame(frame.pixels, frames) for frame in shown_frames(clip)]


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_film(tmp_path / "a film.mp4", FILM, NTSC)


def test_clips_hold_the_frames_of_their_scenes_at_the_rate_of_the_source(tmp_path: Path) -> None:
    source, rate = write_film(tmp_path / "film.mkv", FILM, NTSC), NTSC

    clips = run(source, tmp_path / "out", "--crf", 0)

    assert [clip.name for clip in clips] == ["film_00001.mp4", "film_00002.mp4"]
    original = list(shown_frames(source))
    for clip, (first, end) in zip(clips, KEPT, strict=True):
        shown = list(shown_frames(clip))
        assert numbers_in(clip, source) == list(range(first, end))
        assert [frame.start for frame in shown] == [number / rate for number in range(end - first)]
        assert source_info(clip).rate == rate
        for ours, theirs in zip(shown, original[first:end], strict=True):
            # without loss except for the conversion of colors
            assert np.abs(ours.pixels.astype(int) - theirs.pixels).mean() < 1.5


def test_times_of_a_variable_rate_are_kept(tmp_path: Path) -> None:
    lights = [*scene(1, 20), *scene(2, 20)]
    steps = [Fraction(1, 25)] * 20 + [Fraction(1, 10), Fraction(1, 5)] * 10
    times = [sum(steps[:number], Fraction(0)) for number in range(len(steps) + 1)]
    source = write_film(tmp_path / "phone.mp4", lights, times)

    clips = run(source, tmp_path / "out", "--min_seconds", 0.5)

    first, second = ([frame.start for frame in shown_frames(clip)] for clip in clips)
    assert first == times[:20]
    assert second == [time - times[20] for time in times[20:40]]
    line = lines_of(tmp_path / "out")[1]
    assert (line["start_seconds"], line["end_seconds"], line["frames"]) == (0.8, 3.8, 20)


def test_clips_have_the_sound_of_the_source_unless_it_is_not_wanted(tmp_path: Path) -> None:
    track = Track((0.7, 2.2, 3.1), seconds=4.0)
    source = write_media(tmp_path / "clicks.mp4", track, frames=100)
    words = ("--keep_static", "--keep_black", "--max_seconds", 2)

    first, second = run(source, tmp_path / "out", *words)

    for clip, clicks in ((first, [0.7]), (second, [0.2, 1.1])):
        found = [place / RATE for place in clicks_in(audio_of(clip))]
        assert found == pytest.approx(clicks, abs=0.002)
    for clip in run(source, tmp_path / "silent", *words, "--no_audio"):
        with av.open(str(clip)) as container:
            assert not container.streams.audio


def test_the_list_is_a_table_that_is_cached_from_any_folder(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    run(Path(film.name), Path("out"))
    monkeypatch.chdir(elsewhere)
    keys = {"resolution": (64, 32), "target_frames": (17,), "source_fps": "auto"}
    table = make_table(tmp_path, jsonl_file=tmp_path / "out" / "clips.jsonl", directory=None, **keys)
    config = DatasetConfig(table.config_path, (table,))

    sources = find_sources(table)
    assert [source.path.name for source in sources] == ["a film_00001.mp4", "a film_00002.mp4"]
    assert {source.caption for source in sources} == {None}
    assert cache_media(ToyFamily(), config, options()).written == 2
    line = lines_of(tmp_path / "out")[1]
    assert "caption" not in line
    info = {"scene": 2, "first_frame": 30, "frames": 26, "fps": 23.976024, "width": 128, "height": 72}
    assert info.items() <= line.items()
    assert line["source"] == str(film)


def test_a_second_run_does_nothing_and_keeps_what_users_changed(film: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    clips = run(film, output)
    lines = lines_of(output)
    lines[0]["caption"] = "a hill"
    text = "\n".join([json.dumps(lines[0]), "# a remark", ""])  # the second line is taken out
    (output / "clips.jsonl").write_text(text, encoding="utf-8")
    clips[1].unlink()
    before = state_of(output)

    run(film, output)

    assert state_of(output) == before


def test_changed_options_cut_anew_what_is_ours(
    film: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    run(film, output)
    own = output / "notes.mp4"
    own.write_bytes(b"mine")

    clips = run(film, output, "--max_frames", 28, "--min_seconds", 0.5)

    assert "is cut again: --min_seconds 0.5 (was 1.0), --max_frames 28 (was 0)" in caplog.text
    assert [clip.name for clip in clips] == [
        *(f"a film_0000{number}.mp4" for number in (1, 2, 3)),
        "notes.mp4",
    ]
    assert [line["frames"] for line in lines_of(output)] == [15, 15, 26]
    assert own.read_bytes() == b"mine"
    assert [clip.name for clip in run(film, output)] == ["a film_00001.mp4", "a film_00002.mp4", "notes.mp4"]


@pytest.mark.parametrize("work", ["sidecar", "line", "clip"])
def test_clips_with_work_of_the_user_are_not_cut_anew(film: Path, tmp_path: Path, work: str) -> None:
    output = tmp_path / "out"
    clips = run(film, output)
    if work == "sidecar":
        clips[1].with_suffix(".txt").write_text("a hill", encoding="utf-8")
    elif work == "line":
        lines = [{**line, "caption": "a hill"} for line in lines_of(output)]
        (output / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    else:
        clips[1].write_bytes(b"cut by hand")
    before = state_of(output)

    with pytest.raises(OutputError, match=r"--max_frames 28 \(was 0\).*a film_0000"):
        run(film, output, "--max_frames", 28)

    assert state_of(output) == before


def test_captions_that_are_written_while_a_video_is_looked_at_stay(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    clips = run(film, output)

    def write_and_look(*arguments: Any) -> VideoAnalysis:
        lines = [{**line, "caption": "a hill"} for line in lines_of(output)]
        (output / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return analyze_video(*arguments)

    monkeypatch.setattr("data_tools.cutting.run.analyze_video", write_and_look)
    with pytest.raises(OutputError, match=r"with a caption in clips\.jsonl"):
        run(film, output, "--max_frames", 28)

    assert [line["caption"] for line in lines_of(output)] == ["a hill", "a hill"]
    assert clips_in(output) == clips


def test_a_file_of_the_user_is_never_replaced(film: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    own = output / "a film_00002.mp4"
    own.write_bytes(b"mine")

    with pytest.raises(OutputError, match="this command has not made"):
        run(film, output)

    assert own.read_bytes() == b"mine"
    assert clips_in(output) == [own]


def test_a_damaged_video_is_reported_and_the_others_are_cut(
    film: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    content = film.read_bytes()
    (folder / "b.mp4").write_bytes(content)
    (folder / "a.mp4").write_bytes(content[: len(content) // 2])
    (folder / "c.mp4").write_bytes(b"no video")

    with pytest.raises(DatasetError, match="2 of the 3 videos could not be used; all others are done"):
        run(folder, tmp_path / "out", "--num_workers", 2)

    assert [clip.name for clip in clips_in(tmp_path / "out")] == ["b_00001.mp4", "b_00002.mp4"]
    assert len(lines_of(tmp_path / "out")) == 2
    assert caplog.text.count("is skipped") == 2


@needs_fork
def test_a_run_that_is_killed_leaves_whole_clips_and_the_next_one_finishes_it(
    film: Path, tmp_path: Path
) -> None:
    """Names are given in this order: record, clip 1, clip 2, record, list, record."""
    undisturbed = {clip.name: clip.read_bytes() for clip in run(film, tmp_path / "reference")}
    for step in range(1, 7):
        output = tmp_path / str(step)
        assert not run_to_step(lambda output=output: run(film, output) and None, step)  # type: ignore[misc]
        there = {clip.name: clip.stat().st_mtime_ns for clip in clips_in(output)}
        assert {name: (output / name).read_bytes() for name in there}.items() <= undisturbed.items()

        clips = run(film, output)

        assert {clip.name: clip.read_bytes() for clip in clips} == undisturbed
        assert {name: (output / name).stat().st_mtime_ns for name in there} == there
        assert [Path(line["video_path"]).name for line in lines_of(output)] == list(undisturbed)
        left = {path.name for path in output.iterdir() if path.suffix != ".tmp"}  # those go when they are old
        assert left == {*undisturbed, "clips.jsonl", ".split_video"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "out", "--scene_threshold", "2"], "at most 1"),
        (["--output", "out", "--max_seconds", "0.5"], "--max_seconds 0.5 is less than --min_seconds 1"),
        (["--output", "out", "--min_frames", "5", "--max_frames", "4"], "--max_frames 4 is less than"),
        (["--output", "out", "--jsonl", "clips.toml"], "ends in .jsonl"),
        (["--output", "out", "--input", "empty"], "is a folder without videos"),
        (["--output", "in"], "is --input too"),
    ],
)
def test_mistakes_end_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "film.mp4").write_bytes(b"never opened")

    with pytest.raises((OptionError, MediaError), match=message):
        main([*words, *([] if "--input" in words else ["--input", "in"])])
