"""Command lines of one tool and of several: what each option belongs to, and what is refused."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from downloads.catalogue import model_sets
from modules.errors import MediaError, OptionError, OutputError
from modules.media.options import FormatOptions
from modules.media.writing import write_png
from modules.output_files import Answer
from postprocessing.chain_options import TASKS, default_model, read_chain, read_named_tools
from postprocessing.naming import FileJob, log_suffix, plan_jobs
from postprocessing.options import (
    CODEFORMER,
    GFPGAN,
    WITH_FLOWFORMER,
    WITH_RAFT,
    FacefixOptions,
    InterpolationOptions,
)
from postprocessing.run import run_chain
from tests.postprocessing.stages_here import H264, PRORES, Asked, Same, chain_of, files_in, write_clip
from tests.tiny.project import moving_square

BASE = ("--model", "x.pth", "--input", str(Path(__file__)))


def read(*words: str) -> object:
    return read_chain("upscaler", "", [*BASE, *words])


def test_each_tool_has_its_own_options() -> None:
    first_two = "--scale 4 --seed 1 --then=facefix --model faces --only_center"

    chain = read_chain(
        "upscaler", "", [*BASE, *f"{first_two} --then gimmvfi model=vfi factor=3 seed=2".split()]
    )

    (_, first), (_, second), (_, third) = chain.tools
    assert isinstance(second, FacefixOptions)
    assert isinstance(third, InterpolationOptions)
    assert (first.network.seed, second.network.seed, third.network.seed) == ("1", None, "2")
    assert (second.network.model, second.only_center, third.factor) == (Path("faces"), True, 3)
    assert (chain.name_suffix, chain.needs_video) == ("SWINIR_GFPGAN_VFI", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--then"], r"^--then: the name of a tool is missing\. Pass upscaler"),
        (["--then", "facefx"], r"^--then facefx: facefx is not a tool.*Did you mean facefix\?"),
        (["--then", "facefix", "-y"], r"^--then facefix: -y applies to the whole run\. Write it before"),
        (["--then", "facefix", "--model="], r"^--then facefix: --model is empty"),
        (["--then", "facefix", "model=x", "weight=0.7"], r"--weight 0\.7 is for --mode codeformer"),
        (["--then", "gimmvfi", "model=x", "mode=film"], "--mode film"),
        (["--then", "gimmvfi", "model=x", "ds_factor=0.29"], r"--ds_factor 0\.29"),
        (["--then", "gimmvfi", "model=x", "ds_factor=1e-30"], "--ds_factor 1e-30: pass a simple fraction"),
        (["--tile", "48", "--tile_overlap", "32"], "--tile_overlap 32 is more than half of --tile 48"),
    ],
)
def test_what_cannot_be_in_a_chain_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(*words)


def test_a_model_that_is_not_named_is_looked_for_among_the_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="--then facefix: no model is given.*\n.*--task gfpgan"):
        read("--then", "facefix")
    file = Path("models", "facefix", "GFPGANv1.4.pth")
    file.parent.mkdir(parents=True)
    file.touch()

    assert read("--then", "facefix").tools[1][1].network.model == file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--the", "facefix"], "write --then in full"),
        (["--then", "facefix", "--modl", "x"], "--then facefix: error: Unknown option --modl"),
    ],
)
def test_mistakes_of_typing_name_the_tool(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        read(*words)

    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_of_a_later_tool_needs_nothing_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read_chain("GIMMVFI", "", ["--then", "upscaler", "--help"])

    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "--scale" in said
    assert "--factor" not in said
    assert "--codec" not in said


def test_metadata_tell_a_tool_and_its_settings_but_no_folder() -> None:
    texts = ("upscaler --model '/home/me/my model.pth' scale=2 --then gimmvfi model=vfi", "facefix model=y")

    said = read_named_tools(texts, "--post").in_words

    first, second, third = said.split(" --then ")
    assert first.startswith("upscaler 'model=my model.pth' dtype=fp32 ")
    assert "scale=2.0" in first
    assert second.startswith("GIMMVFI model=vfi ")
    assert third.startswith("facefix model=y ")
    assert "home" not in said


TOOL = [Same("swin")]


def write_image(path: Path) -> Path:
    write_png(path, moving_square(1, 16, 16, 1)[0])
    return path


@pytest.mark.parametrize(
    ("given", "form", "expected"),
    [
        (None, H264, "a_SWIN.mp4"),
        ("new/b.mp4", PRORES, "new/b.mkv"),
        ("b.v2", H264, "b.v2.mp4"),
        ("made/", H264, "made/a_SWIN.mp4"),
        ("there", H264, "there/a_SWIN.mp4"),
    ],
)
def test_a_video_is_written_beside_itself_or_where_output_says(
    given: str | None, form: FormatOptions, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    output = None if given is None else f"{tmp_path}/{given}"

    (job,) = plan_jobs(chain_of(TOOL, write_clip(tmp_path / "a.mp4"), output, form), Asked())

    assert job == FileJob(tmp_path / "a.mp4", tmp_path / expected, False)


def test_results_do_not_lie_among_captioned_clips(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a square", encoding="utf-8")

    for given in (tmp_path, clip):
        with pytest.raises(OptionError, match=r"looks like a data set.*--output .*_SWIN/"):
            plan_jobs(chain_of(TOOL, given, None, H264), Asked())
        assert len(plan_jobs(chain_of(TOOL, given, f"{tmp_path}/made/", H264), Asked())) == 1


def test_pictures_are_png_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    chain = chain_of(TOOL, write_image(tmp_path / "a.png"), tmp_path / "b.jpg")

    jobs = plan_jobs(chain, Asked())
    log_suffix(chain, jobs)

    assert jobs == [FileJob(tmp_path / "a.png", tmp_path / "b.png", True)]
    assert caplog.messages == [f"The result is written to {tmp_path / 'b.png'}: images are PNG files"]


def test_prores_in_mp4_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain = chain_of(TOOL, write_clip(tmp_path / "a.mp4"), form=replace(PRORES, container="mp4"))

    log_suffix(chain, plan_jobs(chain, Asked()))

    assert caplog.messages == ["--codec prores is written as .mkv because mp4 does not support it"]


def test_of_a_folder_all_videos_and_pictures_but_no_results(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mkv", "c_SWIN.mkv", "c_SWIN_.mkv", "d_SWIN_VFI.mp4"):
        write_clip(tmp_path / name, frames=1)
    write_image(tmp_path / "e.png")
    (tmp_path / "notes.txt").write_text("no video", encoding="utf-8")
    (tmp_path / "frames").mkdir()
    (tmp_path / ".f.mkv.00000000.tmp").write_bytes(b"")

    jobs = plan_jobs(chain_of(TOOL, tmp_path), Asked())

    assert [job.source.name for job in jobs] == ["a.mkv", "b.mp4", "d_SWIN_VFI.mp4", "e.png"]
    assert [job.output.name for job in jobs][-2:] == ["d_SWIN_VFI_SWIN.mp4", "e_SWIN.png"]


def test_a_tool_between_pictures_takes_the_videos_and_animations_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.3GP", "c.mts"):
        write_clip(tmp_path / "clip.mp4", frames=1).rename(tmp_path / name)
    first, *others = [Image.fromarray(frame) for frame in moving_square(2, 16, 16, 1)]
    for name in ("d.gif", "e.webp"):
        first.save(tmp_path / name, save_all=True, append_images=others, duration=100)
    for name in ("f.gif", "g.png", "h.webp"):
        first.save(tmp_path / name)

    jobs = plan_jobs(chain_of(TOOL, tmp_path, needs_video=True), Asked())

    assert [job.source.name for job in jobs] == ["a.mp4", "b.3GP", "c.mts", "d.gif", "e.webp"]
    assert not any(job.is_image for job in jobs)


@pytest.mark.parametrize("given", ["link.mkv", "hard.mkv"])
def test_the_input_is_never_overwritten(given: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mkv")
    (tmp_path / "link.mkv").symlink_to(clip)
    (tmp_path / "hard.mkv").hardlink_to(clip)

    with pytest.raises(OutputError, match=r"is the input, which is never overwritten\. Choose another"):
        plan_jobs(chain_of(TOOL, clip, tmp_path / given, PRORES, yes=True), Asked())


@pytest.mark.parametrize(
    ("source", "output", "error", "words"),
    [
        ("missing.mp4", None, OptionError, "--input .*: no such file"),
        ("empty", None, MediaError, "without a video or image"),
        ("results", None, MediaError, "except 1 with _SWIN, which are results"),
        ("clips", "out.mkv", OptionError, "is a file, and --input"),
        ("clips/a.mp4", "folder", OutputError, r"a_SWIN\.mp4 is a folder"),
        ("two", None, OutputError, r"a\.mkv and a\.mp4 would both be written to .*a_SWIN\.mp4"),
    ],
)
def test_what_cannot_be_is_said_before_anything_loads(
    source: str, output: str | None, error: type[Exception], words: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("clips/a.mp4", "two/a.mp4", "two/a.mkv"):
        write_clip(tmp_path / name, frames=1)
    write_clip(tmp_path / "results" / "a_SWIN.mp4", frames=1)
    (tmp_path / "folder" / "a_SWIN.mp4").mkdir(parents=True)
    given = None if output is None else tmp_path / output

    with pytest.raises(error, match=words):
        plan_jobs(chain_of(TOOL, tmp_path / source, given), Asked())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("overwrite", ["a_SWIN.mp4", "b_SWIN.mp4", "c_SWIN.mp4"]),
        ("leave", ["c_SWIN.mp4"]),
        ("free", ["a_SWIN__.mp4", "b_SWIN_.mp4", "c_SWIN.mp4"]),
    ],
)
def test_existing_results_are_asked_about_once(answer: Answer, expected: list[str], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_clip(tmp_path / f"{name}.mp4", frames=1)
    for name in ("a_SWIN.mp4", "a_SWIN_.mp4", "b_SWIN.mp4"):
        (tmp_path / name).write_bytes(b"mine")
    ask = Asked(answer)

    jobs = plan_jobs(chain_of(TOOL, tmp_path), ask)

    assert [job.output.name for job in jobs] == expected
    assert len(ask.questions) == 1
    assert files_in(tmp_path) >= {"a_SWIN.mp4", "b_SWIN.mp4"}


def test_yes_asks_nothing_and_nothing_to_do_ends_well(tmp_path: Path) -> None:
    clip, ask = write_clip(tmp_path / "a.mp4", frames=1), Asked("leave")
    (tmp_path / "a_SWIN.mp4").write_bytes(b"mine")

    assert len(plan_jobs(chain_of(TOOL, clip, yes=True), ask)) == 1
    assert not ask.questions
    assert plan_jobs(chain_of(TOOL, clip), ask) == []
    assert len(ask.questions) == 1


def test_a_tool_between_pictures_refuses_a_single_one_before_it_looks_for_models(tmp_path: Path) -> None:
    chain = chain_of(TOOL, write_image(tmp_path / "a.png"), needs_video=True)

    with pytest.raises(OptionError, match="swin works between the frames of a video"):
        run_chain(chain, Asked())


SETS = {one.task: one for one in model_sets() if one.family == "tools"}


def write_set(folder: Path, task: str) -> None:
    """Empty files in the places of a set."""
    for file in SETS[task].components[0].files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).touch()


# models of tools for data and runs
OF_OTHER_TOOLS = {"wd_tagger", "clipseg", "u2net", "depth_anything_v2_small", "score_clip"}


def test_every_set_of_tools_is_taken_by_a_mode() -> None:
    modes = ("swinir", "esrgan", WITH_RAFT, WITH_FLOWFORMER, GFPGAN, CODEFORMER, "")
    assert sorted(task for mode in modes for task in TASKS.get(mode, (mode,))) == sorted(
        SETS.keys() - OF_OTHER_TOOLS
    )


@pytest.mark.parametrize(
    ("tool", "mode", "task", "found"),
    [
        ("upscaler", "esrgan", "realesrgan_x2", "upscalers/RealESRGAN_x2plus.pth"),
        ("GIMMVFI", "gimmvfi_r", "gimmvfi_r", "gimmvfi"),
        ("yolo_blur", "", "yunet", "facefix/face_detection_yunet_2023mar.onnx"),
    ],
)
def test_what_was_downloaded_is_found_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tool: str, mode: str, task: str, found: str
) -> None:
    write_set(tmp_path / "second", task)

    with caplog.at_level(logging.INFO):
        path = default_model(tool, mode, [tmp_path / "first", tmp_path / "second"])

    assert path == tmp_path / "second" / found
    assert f"{path} is used" in caplog.text


def test_a_model_that_is_not_there_is_answered_with_its_download(tmp_path: Path) -> None:
    write_set(tmp_path, "gimmvfi_r")
    (tmp_path / "gimmvfi" / "gimmvfi_f_arb_lpips_fp32.safetensors").touch()  # without its optical flow

    with pytest.raises(OptionError, match=r"download\.py --family tools --task gimmvfi_f$"):
        default_model("GIMMVFI", "gimmvfi_f", [tmp_path])
