"""What reaches into attention, through the generation scripts of all families on tiny models."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fpack_generate_video
import hv_generate_video
import wan_generate_video
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import write_image
from tests.tiny.wan import write_tiny_wan

SAY = ("--prompt", "a cat", "--seed", "7", "--video_size", "32", "48", "--infer_steps", "2")
NAG = ("--nag_scale", "5", "--nag_prompt", "a dull dog")
BLOCKS = {"double_blocks": 2, "single_blocks": 6}  # of which one and a half can be swapped


@dataclass(frozen=True)
class Script:
    """One model's generation script."""

    module: ModuleType
    write: Callable[..., Any]  # folder -> files with `.models`
    options: tuple[str, ...]
    kind: dict[str, Any]


SCRIPTS = {
    "wan": Script(wan_generate_video, write_tiny_wan, ("--task", "t2v-1.3B", "--video_length", "5"), {}),
    "wan i2v": Script(
        wan_generate_video,
        write_tiny_wan,
        ("--task", "i2v-14B", "--video_length", "5", "--image_path", "start.png", "--guidance_scale", "1"),
        {"kind": "i2v"},
    ),
    "hv": Script(hv_generate_video, write_tiny_hunyuan, ("--video_length", "5"), BLOCKS),
    "fpack": Script(
        fpack_generate_video,
        write_tiny_framepack,
        ("--video_sections", "2", "--latent_window_size", "2", "--image_path", "start.png"),
        BLOCKS,
    ),
}


@dataclass(frozen=True)
class Made:
    """Latents of a run, and what their file says."""

    latents: Tensor
    says: dict[str, str]


Generate = Callable[..., Made]


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Generate:
    """Run a script with more options; models and equal runs are made once."""
    models: dict[str, list[str]] = {}
    known: dict[tuple[str, ...], Made] = {}

    def run(name: str, *more: str) -> Made:
        script = SCRIPTS[name]
        if name not in models:
            folder = tmp_path_factory.mktemp("model")
            models[name] = script.write(folder, **script.kind).models
            write_image(folder / "start.png", 48, 32)
            models[name] += [word.replace("start.png", str(folder / "start.png")) for word in script.options]
        if (name, *more) not in known:
            folder = tmp_path_factory.mktemp("made")
            words = ["--save_path", str(folder), "--device", "cpu", "--output_type", "latent"]
            script.module.main([*words, *models[name], *SAY, *more])
            (path,) = folder.glob("*_latent.safetensors")
            with safe_open(path, "pt") as file:
                known[name, *more] = Made(load_file(path)["latent"], file.metadata())
        return known[name, *more]

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_normalised_guidance_changes_the_video(name: str, generate: Generate) -> None:
    plain, steered = generate(name), generate(name, *NAG)

    assert not torch.allclose(steered.latents, plain.latents, atol=1e-3)
    assert steered.latents.isfinite().all()
    assert (steered.says["bt_nag_scale"], steered.says["bt_nag_prompt"]) == ("5.0", "a dull dog")
    assert not [key for key in plain.says if "nag" in key]


def test_a_prompt_without_a_scale_is_said_to_be_ignored(
    generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    ignored = generate("hv", "--nag_prompt", "a dull dog")

    assert torch.equal(ignored.latents, generate("hv").latents)
    assert "--nag_prompt 'a dull dog' is ignored because --nag_scale is not given" in caplog.text


def test_a_slowed_frequency_changes_long_videos_only(
    generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    slow, long = ("--riflex_index", "4"), ("--video_length", "53")

    assert torch.equal(generate("hv", *slow).latents, generate("hv").latents)
    assert "--riflex_index 4 is ignored because the video has 5 frames" in caplog.text
    assert not torch.allclose(generate("hv", *long, *slow).latents, generate("hv", *long).latents, atol=1e-4)
    assert torch.equal(generate("hv", *long, "--riflex_index", "0").latents, generate("hv", *long).latents)
