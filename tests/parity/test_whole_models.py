"""Whole transformers of picture families learn as computed with diffusers; the file and its state follow."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.faults.messages import succeed_here
from tests.parity.test_training_steps import CASES, cached
from tests.parity.training import descent, shuffled
from tests.tiny.families import family_called

RATE = 0.1
WHOLE = (
    *("krea2", "anima", "flux", "chroma", "lumina", "hunyuan_image"),
    *("flux_2", "flux_3", "qwen_image_21", "kontext"),
)
DAILY = {"krea2"}


def changes_of_descent(dit: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The change of each weight that has a gradient."""
    loss.backward()
    return {name: -RATE * weight.grad for name, weight in dit.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in WHOLE]
)
def test_a_step_of_all_weights_equals_that_of_diffusers(tmp_path: Path, name: str) -> None:
    """Compared in diffusers' names, whose readers take the file; a resumed run ends with equal bytes."""
    items, case, family = cached(tmp_path, name), CASES[name], family_called(name)
    models = family.train[1 : family.train.index("--network_module")]
    options = [str(word) for word in case.options if "include_patterns" not in str(word)]
    words = [*models, *descent(RATE), *options, "--save_state"]
    if "--network_args" in words:
        words.remove("--network_args")

    succeed_here(family.train_whole, *words, folder=tmp_path)

    first, last = tmp_path / "out" / "lora-step00000001.safetensors", tmp_path / "out" / "lora.safetensors"
    before = case.network(load_file(tmp_path / "model" / "dit.safetensors")).requires_grad_(True)
    expected = changes_of_descent(before, case.error(before, shuffled(items, 0), 0).square().mean())
    weights, found = dict(before.named_parameters()), dict(case.network(load_file(first)).named_parameters())
    assert found.keys() == weights.keys()
    worst, moved = 0.0, 0
    for key, weight in weights.items():
        change = (found[key] - weight).detach()
        wanted = expected.get(key, torch.zeros_like(weight))
        # a change of a bit of the weight is the least that the file can hold
        least = float(weight.detach().abs().max().clamp(min=1e-3)) * 1e-6
        worst = max(worst, float((change - wanted).abs().max()) / max(float(wanted.abs().max()), least))
        moved += bool(wanted.abs().max() > least)
    print(f"parity {name} whole, one step: {worst:.2e}, {moved} of {len(weights)}")  # noqa: T201

    state = tmp_path / "out" / "lora-step00000001-state"
    succeed_here(family.train_whole, *words, "--resume", state, "--output_dir", "resumed", folder=tmp_path)
    whole, resumed = load_file(last), load_file(tmp_path / "resumed" / "lora.safetensors")
    assert all(torch.equal(resumed[key], weight) for key, weight in whole.items())
    assert worst <= 1e-2
    assert moved >= 0.9 * len(weights)
