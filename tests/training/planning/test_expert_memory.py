"""The plan of a training in two transformers, against the same step counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modules.contract.family import Family
from modules.options import read_options
from modules.parser import add_options
from modules.planning.dry_run import largest
from modules.planning.memory_plan import Phase
from tests.tiny import wan_dit
from tests.training.planning.test_rehearsal import CHECKPOINTED, GIVEN, LAYERS, counted, wan_batch
from training.learning_options import ExpertTrainingOptions
from training.options import TrainingOptions, read_arguments, training_parser
from training.planning.memory import cheaper, predict
from wan.family import family_for_training
from wan.options import WanTrainingOptions

CPU = torch.device("cpu")


def two_experts(folder: Path, *more: str) -> tuple[Family, TrainingOptions]:
    files = []
    for seed in range(2):
        state = wan_dit.tiny_state("t2v", seed, torch.bfloat16, num_layers=LAYERS)
        files.append(str(wan_dit.write_dit(folder, state, name=f"dit{seed}")))
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    add_options(parser, ExpertTrainingOptions)
    network = ["--network_module", "networks.lora_wan", "--network_dim", "32"]
    dits = ["--task", "t2v-A14B", "--dit", files[0], "--dit_high_noise", files[1]]
    args = read_arguments(parser, [*GIVEN, *network, *CHECKPOINTED, *dits, *more], {})
    return family_for_training(read_options(WanTrainingOptions, args)), read_options(TrainingOptions, args)


@pytest.mark.parametrize(
    ("own", "turns"),
    [
        ([], []),
        (["--lora_per_expert"], ["--offload_inactive_dit"]),
        pytest.param(["--lora_per_expert"], [], marks=pytest.mark.slow),
        pytest.param([], ["--offload_inactive_dit"], marks=pytest.mark.slow),
    ],
    ids=["one LoRA, both there", "two LoRAs, turns", "two LoRAs, both there", "one LoRA, turns"],
)
def test_a_step_in_two_experts_takes_what_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str], turns: list[str]
) -> None:
    family, options = two_experts(tmp_path, *own, *turns)
    prediction = predict(family, options, wan_batch(2), CPU)

    phase = prediction.phase(0)
    planned = phase.device - prediction.workspace.device

    _, moment = largest(counted(family, options, wan_batch(2), monkeypatch))
    assert planned == pytest.approx(sum(moment.values()), rel=0.02)
    weights = next(part.device for part in phase.parts if part.name.startswith("weights"))
    assert phase.host == (2 * weights if turns else 0)


def test_swapped_blocks_of_both_are_on_the_host(tmp_path: Path) -> None:
    family, options = two_experts(tmp_path)
    apart = replace(options, experts=replace(options.by_expert, offload_inactive_dit=True))
    both, turns = (predict(family, each, wan_batch(), CPU) for each in (options, apart))

    def line(phase: Phase, name: str) -> tuple[int, int]:
        return next((part.device, part.host) for part in phase.parts if part.name.startswith(name))

    device, host = line(both.phase(0), "weights")
    for blocks in range(1, both.most + 1):
        here, away = line(both.phase(blocks), "weights")
        assert line(both.phase(blocks), "further") == (here, away)
        assert turns.phase(blocks).host == 2 * device > away > host
        assert turns.phase(blocks).device == both.phase(blocks).device - here


def test_turns_are_advised_first(tmp_path: Path) -> None:
    _, options = two_experts(tmp_path)

    line, changed = cheaper(options, others=1)[0]

    assert line == "--offload_inactive_dit"
    assert changed.by_expert.offload_inactive_dit
    assert cheaper(changed, others=1)[0][0] == cheaper(options)[0][0] != line
