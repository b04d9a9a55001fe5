"""Clips from keyframes and references through minimax_h3_generate_video.py, against diffusers' pipeline."""

import json
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import resolve_canvas_size
from diffusers.modular_pipelines.minimax_h3.references import (
    MiniMaxH3AudioReference,
    MiniMaxH3ImageReference,
    MiniMaxH3VideoReference,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from minimax_h3.family import MiniMaxH3
from minimax_h3.files import UNDECIDED, H3Files
from minimax_h3.references import read_media
from modules.errors import OptionError
from protocols.data import AUDIO_LATENTS
from protocols.requests import Request
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.minimax_h3.test_generation import SCRIPT, latents_in
from tests.parity.running import assert_equal
from tests.tiny.minimax_h3 import TinyH3, their_pipeline, write_tiny_h3

PROMPT = "a cat purrs"
EDGE = 64  # short side of references


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a clip of 25 frames a second, and a sound."""
    folder = tmp_path_factory.mktemp("media ä")
    rng = numpy.random.default_rng(1)
    for name, size in {"first": (90, 70), "last": (200, 60), "subject": (80, 100)}.items():
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), numpy.uint8)).save(folder / f"{name}.png")
    write_clip(folder / "clip.mkv", 55)
    write_audio(folder / "voice.wav", 32000, 40000)
    write_audio(folder / "long.wav", 32000, 200000, channels=1)
    return folder


def write_clip(path: Path, frames: int) -> None:
    """Write a clip without loss, of 25 frames a second."""
    rng = numpy.random.default_rng(2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (64, 96, 3), numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def for_references(files: TinyH3, folder: Path) -> TinyH3:
    """The same files, whose transformer has the name of the other one."""
    other = folder / "minimax_h3_ref2va_bf16.safetensors"
    other.symlink_to(files.dit)
    return replace(files, dit=other)


def write_audio(path: Path, rate: int, count: int, channels: int = 2) -> None:
    samples = numpy.random.default_rng(count).integers(-9000, 9000, (count, channels)).astype("<i2")
    with wave.open(str(path), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(samples.tobytes())


def generate(tmp_path: Path, files: TinyH3, *words: str) -> dict[str, Tensor]:
    tmp_path.mkdir(exist_ok=True)
    fixed = ["--prompt", PROMPT, "--seed", "7", "--infer_steps", "2", "--device", "cpu"]
    size = [] if "--ratio" in words else ["--video_size", "32", "64"]
    words = (*size, "--output_type", "latent", "--save_path", "made", *words)
    succeed_here(SCRIPT, *files.words, *fixed, *words, folder=tmp_path)
    return latents_in(tmp_path / "made")


def theirs(files: TinyH3, configs: dict[str, int] | None = None, **inputs: Any) -> Any:
    pipe = their_pipeline(files, decodes=False, **(configs or {}))
    return pipe(
        prompt=PROMPT,
        height=32,
        width=64,
        num_frames=124,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        **inputs,
    ).values


def check(made: dict[str, Tensor], expected: Any) -> None:
    assert_equal(made["latent"], expected["latents"][0], "pictures")
    assert_equal(made[AUDIO_LATENTS], expected["audio_latents"].transpose(0, 1), "sound")


@pytest.mark.parametrize(
    "which",
    [
        ("first", "last"),
        pytest.param(("first",), marks=pytest.mark.slow),
        pytest.param(("last",), marks=pytest.mark.slow),
    ],
)
def test_keyframes_are_those_of_diffusers(
    tmp_path: Path, files: TinyH3, folder: Path, which: tuple[str, ...]
) -> None:
    """The first one given is stretched, the other one cropped."""
    names = {"first": "image", "last": "last_image"}
    images = {names[name]: Image.open(folder / f"{name}.png") for name in which}
    words = [word for name in which for word in (f"--{name}_frame", str(folder / f"{name}.png"))]
    check(generate(tmp_path, files, *words), theirs(files, **images))


def test_references_are_those_of_diffusers(tmp_path: Path, files: TinyH3, folder: Path) -> None:
    """A sound, a clip with another one, a picture and a silent clip, in this order."""
    voice, long = (
        MiniMaxH3AudioReference.from_file(str(folder / name)) for name in ("voice.wav", "long.wav")
    )
    clip = MiniMaxH3VideoReference.from_file(str(folder / "clip.mkv"))
    with_audio = MiniMaxH3VideoReference(clip.frames, clip.fps, long.audio, long.sample_rate)
    image = MiniMaxH3ImageReference.from_file(str(folder / "subject.png"))
    configs = {"canvas_short_edge": EDGE, "reference_image_short_edge": EDGE}
    expected = theirs(files, configs, references=[voice, with_audio, image, clip])

    made = generate(
        tmp_path,
        for_references(files, tmp_path),
        *("--ref", f"{folder / 'voice.wav'}"),
        *("--ref", f"{folder / 'clip.mkv'};type=video;audio={folder / 'long.wav'}"),
        *("--ref", f"{folder / 'subject.png'}"),
        *("--ref", f"{folder / 'clip.mkv'}"),
        *("--reference_image_short_edge", str(EDGE), "--reference_video_short_edge", str(EDGE)),
    )

    check(made, expected)


def words_of(folder: Path, *names: str) -> list[str]:
    edges = ["--reference_image_short_edge", "32", "--reference_video_short_edge", "32"]
    return [*(word for name in names for word in ("--ref", str(folder / name))), *edges]


SHORT = ("--video_length", "22", "--allow_experimental_duration")


def equal(made: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(made[name], other[name]) for name in ("latent", AUDIO_LATENTS))


def test_a_line_of_a_dataset_names_references(tmp_path: Path, files: TinyH3, folder: Path) -> None:
    """In its order, paths as typed; null leaves out the sound of a video, which has none here anyway."""
    references = [
        {"type": "image", "path": str(folder / "subject.png")},
        {"path": str(folder / "clip.mkv"), "audio_path": str(folder / "voice.wav")},
    ]
    lines = [{"caption": "a"}, {"references": references}]
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    model = for_references(files, tmp_path)
    edges = words_of(folder)

    by_list = generate(
        tmp_path / "a", model, "--reference_jsonl", str(listed), "--reference_index", "1", *edges, *SHORT
    )
    by_ref = generate(
        tmp_path / "b",
        model,
        *words_of(folder, "subject.png", f"clip.mkv;audio={folder / 'voice.wav'}"),
        *SHORT,
    )
    without = generate(tmp_path / "c", model, *words_of(folder, "subject.png", "clip.mkv"), *SHORT)

    assert equal(by_list, by_ref)
    assert not equal(by_list, without)


def test_lines_of_a_file_have_keyframes_of_their_own(tmp_path: Path, files: TinyH3, folder: Path) -> None:
    first, last = folder / "first.png", folder / "last.png"
    options = [f" --first_frame {first} --last_frame {last}", f" --i {first} --ei {last}", ""]
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(f"{PROMPT}{words} --d 7" for words in options), encoding="utf-8")
    words = ["--infer_steps", "2", "--device", "cpu", "--video_size", "32", "64", "--output_type", "latent"]
    words += ["--save_path", "made", "--from_file", str(listed), *SHORT]

    succeed_here(SCRIPT, *files.words, *words, folder=tmp_path)

    paths = sorted((tmp_path / "made").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    by_name, by_character, plain = map(load_file, paths)
    assert equal(by_name, by_character)
    assert not equal(by_name, plain)


def test_a_single_picture_stands_at_its_frame(tmp_path: Path, files: TinyH3, folder: Path) -> None:
    images = ["--condition_image", str(folder / "first.png"), "--condition_image", str(folder / "last.png")]
    places = [
        "target_index=5,control_index=0;10",
        "target_index=5,control_index=0;11",
        "target_index=6,control_index=0;10",
    ]

    made = [
        generate(tmp_path / str(number), files, "--one_frame_inference", text, *images)
        for number, text in enumerate(places)
    ]

    assert made[0]["latent"].shape == (24, 1, 4, 8)
    assert made[0][AUDIO_LATENTS].shape == (32, 2, 2)
    assert not equal(made[0], made[1])
    assert not equal(made[0], made[2])


def test_an_adaptive_ratio_is_that_of_the_first_keyframe(files: TinyH3, folder: Path) -> None:
    """Of the last frame if there is no first one; without a size as of --ratio adaptive."""
    model = H3Files(dit=files.dit, vae=files.video_vae, audio_vae=files.audio_vae, task=UNDECIDED)
    request = Request("a", 1, end_image_path=folder / "last.png", frames=124)
    prepared = MiniMaxH3(model).prepare(request)
    assert (prepared.height, prepared.width) == resolve_canvas_size(200, 60, 16, 768, 768 * 1344)


def test_prompt_lines_cannot_ask_for_guidance(
    files: TinyH3, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No more than the command line can: it is built in."""
    model = MiniMaxH3(H3Files(dit=files.dit, vae=files.video_vae, audio_vae=files.audio_vae, task=UNDECIDED))
    request = Request("a", 1, width=64, height=32, frames=124, negative_prompt="blurry")
    prepared = model.prepare(request)
    assert prepared.request.negative_prompt is None
    assert "--negative_prompt (--n) has no effect" in caplog.text
    assert "short_edge" not in caplog.text
    replace(model, image_edge=64).prepare(request)
    assert "--reference_image_short_edge 64 is ignored because there are no references" in caplog.text
    with pytest.raises(OptionError, match=r"--l\) 3: the guidance of MiniMax-H3 is built in"):
        model.prepare(replace(request, guidance_scale=3.0))


def test_paths_in_a_line_of_a_dataset_may_be_relative_to_its_list(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("subject.png", "clip.mkv", "voice.wav"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "here" / "clip.mkv").symlink_to(folder / "clip.mkv")
    references = [{"path": "subject.png"}, {"path": "clip.mkv", "audio_path": "voice.wav"}]
    (tmp_path / "list.jsonl").write_text(json.dumps({"references": references}), encoding="utf-8")

    media = read_media(Request("a cat", 1, extra={"reference_jsonl": "../list.jsonl"}))

    image, clip = media.references
    assert image.path == Path("../subject.png")
    assert (clip.path, clip.audio) == (Path("clip.mkv"), Path("../voice.wav"))  # the working folder first


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--ref", "voice.wav"], "all references are audio"),
        (["--ref", "subject.png;audio=voice.wav"], "belongs to a video"),
        (["--ref", "subject.png;type=text"], "'text' is unknown"),
        (["--ref", "none.png"], "no such file"),
        (["--ref", "subject.png"] * 10, "10 images"),
        (["--ref", "clip.mkv"] * 4, "4 videos"),
        (["--ref", "subject.png", *["--ref", "voice.wav"] * 4], "4 references with audio"),
        (["--ref", "subject.png", "--reference_image", "subject.png"], "order would be unknown"),
        (["--ref", "subject.png", "--first_frame", "first.png"], "keyframes and references"),
        (["--ref", "subject.png", "--task", "fl2va"], "--task fl2va"),
        (["--ref", "short.mkv"], "takes 0.4 s"),
        (["--ref", "narrow.png"], "1:4 to 4:1"),
        (["--reference_jsonl", "list.jsonl"], 'has no "references"'),
        (["--reference_jsonl", "list.jsonl", "--reference_index", "3"], "has 1 lines"),
        (["--keyframe", "first.png", "--first_frame", "first.png"], "mean the same"),
        (["--keyframe", "first.png"] * 3, "3 images"),
        (["--one_frame_inference", "target_index=1", "--video_length", "22"], "a single image"),
        (["--one_frame_inference", "control_index=1;2", "--condition_image", "first.png"], "2 positions"),
        (["--one_frame_inference", "no_post"], "FramePack"),
    ],
)
def test_media_that_cannot_be_used_are_refused(
    tmp_path: Path, files: TinyH3, folder: Path, words: list[str], part: str
) -> None:
    for name in ("voice.wav", "subject.png", "clip.mkv", "first.png"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "list.jsonl").write_text('{"caption": "a"}', encoding="utf-8")
    Image.new("RGB", (90, 20)).save(tmp_path / "narrow.png")
    write_clip(tmp_path / "short.mkv", 10)
    model = for_references(files, tmp_path) if "--ref" in words else files
    fixed = ["--prompt", "a cat", "--video_size", "32", "64", "--save_path", "made"]
    code, said = run_here(SCRIPT, *model.words, *fixed, *words, folder=tmp_path)
    assert part in assert_one_message(code, said), said
    assert not (tmp_path / "made").exists()
