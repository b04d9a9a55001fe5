"""Clips from keyframes and references through minimax_h3_generate_video.py, against diffusers' pipeline."""

import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.references import (
    MiniMaxH3AudioReference,
    MiniMaxH3ImageReference,
    MiniMaxH3VideoReference,
)
from PIL import Image
from torch import Tensor

from contract.data import SOUND
from tests.faults.messages import succeed_here
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
    with av.open(str(folder / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for _ in range(55):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 96, 3), numpy.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_sound(folder / "voice.wav", 32000, 40000)
    write_sound(folder / "long.wav", 32000, 200000, channels=1)
    return folder


def for_references(files: TinyH3, folder: Path) -> TinyH3:
    """The same files, whose transformer has the name of the other one."""
    other = folder / "minimax_h3_ref2va_bf16.safetensors"
    other.symlink_to(files.dit)
    return replace(files, dit=other)


def write_sound(path: Path, rate: int, count: int, channels: int = 2) -> None:
    samples = numpy.random.default_rng(count).integers(-9000, 9000, (count, channels)).astype("<i2")
    with wave.open(str(path), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(samples.tobytes())


def generate(tmp_path: Path, files: TinyH3, *words: str) -> dict[str, Tensor]:
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
    assert_equal(made[SOUND], expected["audio_latents"].transpose(0, 1), "sound")


@pytest.mark.parametrize("which", [("first", "last"), ("first",), ("last",)])
def test_keyframes_are_those_of_diffusers(
    tmp_path: Path, files: TinyH3, folder: Path, which: tuple[str, ...]
) -> None:
    """The first one given is stretched, the other one cropped."""
    names = {"first": "image", "last": "last_image"}
    pictures = {names[name]: Image.open(folder / f"{name}.png") for name in which}
    words = [word for name in which for word in (f"--{name}_frame", str(folder / f"{name}.png"))]
    check(generate(tmp_path, files, *words), theirs(files, **pictures))


def test_references_are_those_of_diffusers(tmp_path: Path, files: TinyH3, folder: Path) -> None:
    """A sound, a clip with another one, a picture and a silent clip, in this order."""
    voice, long = (
        MiniMaxH3AudioReference.from_file(str(folder / name)) for name in ("voice.wav", "long.wav")
    )
    clip = MiniMaxH3VideoReference.from_file(str(folder / "clip.mkv"))
    with_sound = MiniMaxH3VideoReference(clip.frames, clip.fps, long.audio, long.sample_rate)
    picture = MiniMaxH3ImageReference.from_file(str(folder / "subject.png"))
    configs = {"canvas_short_edge": EDGE, "reference_image_short_edge": EDGE}
    expected = theirs(files, configs, references=[voice, with_sound, picture, clip])

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
