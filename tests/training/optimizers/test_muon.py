"""Muon for matrices and AdamW for the rest: against torch's own; fused weights are split into their parts."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from moss_image.configs import DIT
from tests.faults.messages import run_here, succeed_here
from tests.moss_image.making import tiny_model
from tests.tiny.families import family_called
from tests.tiny.runs import make_project
from tests.training.test_whole_models import full_words
from training.optimizers.muon import BETAS, MATCH_RMS_ADAMW, NUM_MATRICES, MuonWithAdam, arrange_groups
from training.trainable import prepare_dit

STEPS = ("--max_train_steps", "2")
NEAR = 0.06  # of the largest move: Newton-Schulz steps are in bf16, and torch rounds before it divides


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def take_steps(optimizer: torch.optim.Optimizer, weights: list[Parameter], rows: list[slice]) -> None:
    """Take three steps; the gradient of each weight is a piece of one that is the same for all."""
    for step in range(3):
        gradient = draw(24, 10, seed=step + 1)
        for weight, piece in zip(weights, rows, strict=True):
            weight.grad = gradient[piece].clone()
        optimizer.step()


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("adjustment", [None, MATCH_RMS_ADAMW])
def test_a_fused_weight_is_stepped_as_separate_matrices_are(parts: int, adjustment: str | None) -> None:
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "adjust_lr_fn": adjustment}
    start = draw(24, 10)
    fused = Parameter(start.clone())
    height = 24 // parts
    rows = [slice(place, place + height) for place in range(0, 24, height)]
    apart = [Parameter(start[piece].clone()) for piece in rows]

    take_steps(MuonWithAdam([{"params": [fused], NUM_MATRICES: parts}], **settings), [fused], [slice(None)])
    take_steps(torch.optim.Muon(apart, **settings), apart, rows)

    expected = torch.cat([weight.detach() for weight in apart])
    moved = (expected - start).abs().max()
    assert (fused.detach() - expected).abs().max() < NEAR * moved
    if parts > 1:
        full = Parameter(start.clone())
        take_steps(torch.optim.Muon([full], **settings), [full], [slice(None)])
        assert (full.detach() - expected).abs().max() > 5 * NEAR * moved


@pytest.mark.parametrize(("shape", "group"), [((7,), {}), ((3, 2, 3, 3), {}), ((6, 5), {NUM_MATRICES: 0})])
def test_other_weights_are_stepped_by_adamw(shape: tuple[int, ...], group: dict[str, int]) -> None:
    ours, theirs = Parameter(draw(*shape)), Parameter(draw(*shape))
    optimizers = (
        MuonWithAdam([{"params": [ours], **group}], lr=0.1, weight_decay=0.01),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01, betas=BETAS),
    )
    for step in range(3):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = draw(*shape, seed=step + 1)
            optimizer.step()

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_weights_of_moss_image_are_grouped_as_its_report_trains_them() -> None:
    trainable = prepare_dit(tiny_model().requires_grad_(True), 1e-3)

    arranged = arrange_groups(trainable, DIT)

    names = trainable.names
    by_parts = {
        group[NUM_MATRICES]: {names[weight].removeprefix("dit.") for weight in group["params"]}
        for group in arranged.groups
    }
    assert by_parts.keys() == {0, 1, 2, 3}
    assert by_parts[2] == {f"layers.{number}.proj.ffn_up_gate.weight" for number in range(3)}
    assert by_parts[3] == {f"text_embedder.blocks.{number}.qkv.weight" for number in range(2)}
    ends = ("proj.q", "proj.k", "proj.v", "proj.o", "proj.ffn_down")
    refiner_ends = ("proj", "ffn_gate", "ffn_up", "ffn_down")
    matrices = {f"layers.{number}.{end}.weight" for number in range(3) for end in ends}
    matrices |= {f"text_embedder.blocks.{n}.{end}.weight" for n in range(2) for end in refiner_ends}
    assert by_parts[1] == matrices
    assert {"video_embedder.weight", "time_embedding.0.weight", "layers.0.norm1.weight"} <= by_parts[0]
    assert {"shared_block_modulation.weight", "final_linear_video.weight"} <= by_parts[0]
    assert {group[NUM_MATRICES]: group.get("weight_decay") for group in arranged.groups} == {
        0: 0.0, 1: None, 2: None, 3: None
    }  # fmt: skip
    assert sorted(map(id, arranged.parameters)) == sorted(map(id, trainable.parameters))


def prepare_whole_training(folder: Path) -> list[str]:
    """Make a project. Returns the command that trains its transformer with Muon."""
    family = family_called("moss_image")
    make_project(family, folder)
    words = [*full_words(family), "--optimizer_type", "muon", "--learning_rate", "1e-2"]
    return [*words, "--optimizer_args", "weight_decay=0.01", f"adjust_lr_fn={MATCH_RMS_ADAMW}", *STEPS]


@pytest.mark.slow
def test_a_plan_is_made_with_muon(tmp_path: Path) -> None:
    """Slow, as plans of other optimizers are made each day: tests/training/planning."""
    printed = io.StringIO()
    words = prepare_whole_training(tmp_path)
    assert run_here(*words, "--plan", folder=tmp_path, printed=printed)[0] == 0
    assert "optimizer" in printed.getvalue()


def test_a_whole_transformer_is_trained_with_muon_as_its_page_says(tmp_path: Path) -> None:
    """Every weight moves, in float32 and in bf16; a resumed run ends with equal bytes."""
    words = prepare_whole_training(tmp_path)
    saved = ("--save_state", "--save_every_n_steps", "1")
    before = load_file(tmp_path / "model" / "dit.safetensors")

    for place, more in (("plain", ()), ("narrow", ("--full_bf16", "--mixed_precision", "bf16"))):
        said = succeed_here(*words, *saved, *more, "--output_dir", place, folder=tmp_path)
        assert "Muon steps 22 weights in blocks, AdamW the 40 others" in said
        after = load_file(tmp_path / place / "lora.safetensors")
        unmoved = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
        assert unmoved == []
        resume = ("--resume", f"{place}/lora-step00000001-state", "--output_dir", f"{place}_again")
        succeed_here(*words, *more, *resume, folder=tmp_path)
        again = load_file(tmp_path / f"{place}_again" / "lora.safetensors")
        assert [name for name, tensor in again.items() if not torch.equal(tensor, after[name])] == []
