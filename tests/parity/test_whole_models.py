"""Whole transformers of picture families learn as computed with diffusers; the file and its state follow."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.messages import succeed_here
from tests.parity.test_training_steps import CASES, cached
from tests.parity.training import (
    assert_step_of_all_weights,
    changes_of_descent,
    descent,
    shuffled,
)
from tests.tiny.families import family_called

RATE = 0.1
FULL = (
    *("krea2", "anima", "flux", "chroma", "lumina", "hunyuan_image"),
    *("flux_2", "flux_3", "qwen_image_21", "moss_image", "kontext", "ernie_image", "hidream_o1"),
)
DAILY = {"krea2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in FULL]
)
def test_a_step_of_all_weights_equals_that_of_diffusers(tmp_path: Path, name: str) -> None:
    """Compared in diffusers' names, whose readers take the file; a resumed run ends with equal bytes."""
    items, case, family = cached(tmp_path, name), CASES[name], family_called(name)
    models = family.train[1 : family.train.index("--network_module")]
    options = [str(word) for word in case.options if "include_patterns" not in str(word)]
    words = [*models, *descent(RATE), *options, "--save_state"]
    if "--network_args" in words:
        words.remove("--network_args")

    succeed_here(family.train_full, *words, folder=tmp_path)

    first, last = tmp_path / "out" / "lora-step00000001.safetensors", tmp_path / "out" / "lora.safetensors"
    network = case.network(load_file(tmp_path / "model" / "dit.safetensors")).requires_grad_(True)
    before = {key: weight.detach().clone() for key, weight in network.named_parameters()}
    loss = case.error(network, shuffled(items, 0), 0).square().mean()
    after = {key: weight.detach() for key, weight in case.network(load_file(first)).named_parameters()}
    assert_step_of_all_weights(before, after, changes_of_descent(network, loss, RATE), name)

    state = tmp_path / "out" / "lora-step00000001-state"
    succeed_here(family.train_full, *words, "--resume", state, "--output_dir", "resumed", folder=tmp_path)
    full, resumed = load_file(last), load_file(tmp_path / "resumed" / "lora.safetensors")
    assert all(torch.equal(resumed[key], weight) for key, weight in full.items())
