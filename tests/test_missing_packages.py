"""What runs without packages that it does not need: a machine for training may lack FFmpeg and diffusers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules.errors import InstallationError
from modules.media.writing import write_video
from tests.commands import ROOT, run_program
from tests.tiny.families import FAMILIES
from tests.tiny.project import moving_square, write_animations

MISSING = ("av", "diffusers", "bitsandbytes", "ftfy", "imageio", "flash_attn", "xformers", "sageattention")
PROGRAM = f"""
import importlib, json, sys
from accelerate.state import AcceleratorState
from modules.installation import hide_packages
with hide_packages(*{MISSING}):
    for script, *arguments in json.loads(sys.argv[1]):
        AcceleratorState._reset_state(reset_partial_state=True)
        importlib.import_module(script.removesuffix(".py")).main(arguments)
    assert not [name for name in {MISSING} if sys.modules.get(name)]
"""


def run_without(folder: Path, *commands: list[str]) -> None:
    """Run root scripts one after the other in a process that has none of the packages."""
    run_program(
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(commands),
        folder=folder,
        environment={"PYTHONPATH": str(ROOT)},
    )


def test_caching_training_resuming_and_generation_of_latents_need_none_of_them(tmp_path: Path) -> None:
    family = next(each for each in FAMILIES if each.name == "wan t2v-1.3B")
    family.prepare(tmp_path, write_animations)
    train = [*family.train, "--seed", "1", "--max_data_loader_n_workers", "0", "--output_dir", "output"]
    latents = ["--prompt", "a cat", "--negative_prompt", "dull", "--seed", "7", "--output_type", "latent"]
    size = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--save_path", "made"]

    run_without(
        tmp_path,
        family.cache_latents,
        family.cache_texts,
        [*train, "--output_name", "half", "--max_train_steps", "1", "--save_state"],
        [*train, "--output_name", "x", "--max_train_steps", "2", "--resume", "output/half-state"],
        [*family.generate, *size, *latents, "--lora_weight", "output/x.safetensors"],
    )

    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    assert torch.isfinite(load_file(path)["latent"]).all()


def test_a_video_without_ffmpeg_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InstallationError, match="pip install av"):
        write_video(tmp_path / "clip.mp4", moving_square(2, 32, 32, 1), 8)
    assert not list(tmp_path.iterdir())
