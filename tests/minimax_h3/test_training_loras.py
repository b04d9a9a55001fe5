"""LoRAs that a training of MiniMax-H3 begins with, merges into the network first, and writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import MiniMaxH3LoraLoaderMixin
from safetensors.torch import load_file
from torch import Tensor

from tests.minimax_h3.test_loras import (
    ALPHA,
    DIALECTS,
    RANK,
    as_known,
    factors,
    merge,
    predict,
    predict_there,
    write_dit,
    write_lora,
)
from tests.minimax_h3.test_training import CLIPS, Project
from tests.parity.running import assert_equal

STEP = ("--output_dir", "out", "--seed", 5, "--max_data_loader_n_workers", 0, "--max_train_steps", 1)
DAILY = "DiffSynth"  # whose rows stand in another order
DIALECT = pytest.mark.parametrize(
    "dialect", [pytest.param(name, marks=[pytest.mark.slow] * (name != DAILY)) for name in DIALECTS]
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.cache(CLIPS)
    write_dit(project.folder, "dit.safetensors")
    return project


@DIALECT
def test_training_begins_with_a_lora_of_each_dialect(project: Project, dialect: str) -> None:
    """The layers of blocks are trained. The rate is so low that they stay what they are."""
    trained = {
        path: pair
        for path, pair in factors().items()
        if path.startswith("blocks.") and ".adaln_proj." not in path
    }
    write_lora(project.folder / "start.safetensors", DIALECTS[dialect](trained))
    words = ["--network_weights", "start.safetensors", "--dim_from_weights", "--learning_rate", 1e-12]

    project.train(*STEP, *words, "--optimizer_type", "SGD", "--output_name", "begun")

    saved = project.saved("begun")
    assert len(saved) == 3 * len(trained)
    for path, (down, up) in trained.items():
        name = "lora_unet_" + path.replace(".", "_")
        found_down, found_up = (saved[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
        change = float(saved[f"{name}.alpha"]) / len(found_down) * found_up @ found_down
        torch.testing.assert_close(change, ALPHA / RANK * up @ down, atol=1e-5, rtol=1e-4, msg=name)


def ups_after_a_step(project: Project, *words: object) -> Tensor:
    """The first step of the factors that begin at zero: their gradients, times the rate."""
    step = ["--learning_rate", 1, "--optimizer_type", "SGD", "--output_name", "step"]
    project.train(*STEP, *step, *words)
    saved = project.saved("step")
    return torch.cat([saved[name].flatten() for name in sorted(saved) if ".lora_up." in name])


@DIALECT
def test_base_weights_of_each_dialect_are_merged_before(project: Project, dialect: str) -> None:
    """As merge_lora.py does it, whose results are compared with diffusers."""
    known = write_lora(project.folder / "known.safetensors", as_known(factors()))
    merged = merge(project.folder, project.folder / "dit.safetensors", known)
    expected = ups_after_a_step(project, "--dit", merged)
    write_lora(project.folder / "base.safetensors", DIALECTS[dialect](factors()))

    found = ups_after_a_step(project, "--base_weights", "base.safetensors")

    assert_equal(found, expected, dialect, 1e-4)
    assert (ups_after_a_step(project) - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("known", marks=pytest.mark.slow),
        pytest.param("comfyui", marks=pytest.mark.slow),
        "diffusers",
    ],
)
def test_what_is_trained_acts_in_diffusers(project: Project, form: str) -> None:
    """With Adam: each number of a factor moves by 0.1."""
    project.train(*STEP, "--learning_rate", 0.1, "--lora_format", form, "--output_name", form)

    path = project.folder / "out" / f"{form}.safetensors"
    start = {"known": "lora_unet_", "comfyui": "diffusion_model.", "diffusers": "transformer."}[form]
    assert all(name.startswith(start) for name in load_file(path))
    made = predict_there(read_by_diffusers(path))
    merged = merge(project.folder / form, project.folder / "dit.safetensors", path)
    assert_equal(predict(merged), made, form, 1e-5)
    assert (made - predict_there()).abs().max() > 0.01


def read_by_diffusers(path: Path) -> Any:
    def load(dit: Any) -> None:
        tensors, metadata = MiniMaxH3LoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
        dit.load_lora_adapter(tensors, prefix="transformer", metadata=metadata)

    return load
