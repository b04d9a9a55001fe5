"""Which batch is planned for and what is said about it, with one transformer and with two."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dataset.batches.items import TableCacheInfo, TrainingItem
from dataset.config import load_dataset_config
from modules.devices import GIB
from protocols.family import Family
from runtime.planning.device_memory import CONTEXT, DeviceMemory
from runtime.planning.dry_run import find_peak_phase
from runtime.planning.memory_plan import Phase
from tests.tiny import wan_dit
from tests.tiny.project import write_lora
from tests.training.planning.test_rehearsal import CHECKPOINTED, LAYERS, counted, read_family, wan, wan_batch
from tests.training.toy import write_caches
from training.options import TrainingOptions
from training.planning.memory import (
    MAX_BATCH,
    MemoryPrediction,
    describe_batch,
    largest_batch,
    list_memory_savings,
    list_smaller_shapes,
    predict_memory,
    prepare_memory,
    suggest_changes,
    suggest_larger_batch,
)
from wan.family import family_for_training
from wan.options import WanTrainingOptions
from wan.spec import LATENT

CPU = torch.device("cpu")


def test_the_batch_with_most_pixels_counts(tmp_path: Path) -> None:
    (table,) = load_dataset_config(write_caches(tmp_path, batch_size=4)).datasets

    def items(bucket: tuple[int, ...], count: int) -> list[TrainingItem]:
        return [
            TrainingItem(f"{bucket} {index}", 0, table, bucket, TableCacheInfo("toy"))
            for index in range(count)
        ]

    few_large, many_small = items((64, 64), 1), items((48, 48), 7)
    assert largest_batch([*few_large, *many_small]) == tuple(many_small[:4])
    assert largest_batch([*few_large, *many_small[:1]]) == tuple(few_large)
    sounding = replace(many_small[6], has_cached_audio=True)  # then its batch has sound for all
    assert largest_batch([*many_small[:6], sounding]) == (sounding, *many_small[:3])
    others = [replace(item, bucket=(72, 32), has_cached_audio=False) for item in many_small]
    assert largest_batch([*others, *many_small[:6], sounding])[0] is sounding


def test_shorter_clips_have_a_length_of_the_model() -> None:
    """Clips of 17 frames, with 5 behind them, are encoded by themselves."""
    latent = replace(LATENT, clip_frames=17, tail_frames=5)
    shape = (1, latent.count_latents(124), 8, 12)

    found = [
        (size, shape) for name, size, shape in list_smaller_shapes(latent, shape) if name == "target_frames"
    ]

    assert [size for size, _ in found] == ["56", "22", "5", "1"]
    assert [frames for _, (_, frames, *_) in found] == [17, 7, 2, 1]
    assert describe_batch(latent, (1, 7, 8, 12)) == "96x64, 22 frames, batch 1"


def test_a_section_is_made_smaller_but_no_shorter() -> None:
    """Its length is the model's."""
    found = list_smaller_shapes(replace(LATENT, in_sections=True), (2, 3, 8, 12))

    assert [(size, shape) for name, size, shape in found if name == "batch_size"] == [("1", (1, 3, 8, 12))]
    assert {name for name, *_ in found} == {"batch_size", "resolution"}
    for name, size, shape in found:
        if name == "resolution":
            width, height = (int(side) // 8 for side in size.strip("[]").split(","))
            assert shape == (1, 3, height, width)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> MemoryPrediction:
    """Of a step with a clip of 3 x 64 x 64 latents."""
    made = wan(tmp_path_factory.mktemp("whole"), *CHECKPOINTED)
    return predict_memory(*made, wan_batch(1, (3, 64, 64)), CPU)


@pytest.mark.slow
def test_a_smaller_batch_takes_what_its_size_says(whole: MemoryPrediction, tmp_path: Path) -> None:
    """As a rehearsal of it does, but for the text, which does not shrink."""
    half = predict_memory(*wan(tmp_path, *CHECKPOINTED), wan_batch(1, (3, 32, 64)), CPU)

    assert whole.scaled(0.5).device_bytes(0) == pytest.approx(half.device_bytes(0), rel=0.01)
    assert whole.scaled(0.5).device_bytes(0) < whole.device_bytes(0)


@pytest.mark.slow
def test_an_average_of_the_weights_counts(whole: MemoryPrediction, tmp_path: Path) -> None:
    made = wan(tmp_path, *CHECKPOINTED, "--ema_decay", "0.5")

    assert predict_memory(*made, wan_batch(1, (3, 64, 64)), CPU).device_bytes(0) > whole.device_bytes(0)


def test_cheaper_options_come_one_after_the_other(tmp_path: Path) -> None:
    _, options = wan(tmp_path)
    found = list_memory_savings(options)
    lines = ["--gradient_checkpointing", "--fp8_base --fp8_scaled", "--gradient_checkpointing_cpu_offload"]
    assert [line for line, _ in found] == lines
    assert found[-1][1].loop.gradient_checkpointing
    assert found[-1][1].speed.fp8.fp8_scaled


def test_auto_swaps_nothing_on_a_cpu(tmp_path: Path) -> None:
    family, options = wan(tmp_path, "--blocks_to_swap", "auto")
    accelerator = SimpleNamespace(device=CPU, is_main_process=True, num_processes=1)
    plan: Any = SimpleNamespace(family=family, options=options, accelerator=accelerator)  # no more is read
    swap, watch = prepare_memory(plan)
    assert (swap.number, watch) == (0, None)


def test_a_swapped_block_leaves_the_prediction_and_goes_to_the_host(whole: MemoryPrediction) -> None:
    steps = {
        whole.device_bytes(count) - whole.device_bytes(count + 1)
        for count in range(whole.max_swapped_blocks - 1)
    }
    assert len(steps) == 1
    assert steps.pop() > 0
    assert whole.phase(1).host > whole.phase(0).host == 0


@pytest.mark.slow
def test_advice_ends_with_what_fits(tmp_path: Path) -> None:
    family, options = wan(tmp_path)
    batch = wan_batch(1, (3, 16, 16))
    prediction = predict_memory(family, options, batch, CPU)
    checkpointed = replace(options, loop=replace(options.loop, gradient_checkpointing=True))
    needed = predict_memory(family, checkpointed, batch, CPU).device_bytes(0)
    assert needed < prediction.device_bytes(0)
    (line,) = suggest_changes(family, prediction, batch, room_for(needed), CPU)
    assert line.startswith("--gradient_checkpointing:")
    assert line.endswith("fits")


def room_for(size: int) -> DeviceMemory:
    """A card on which exactly so many bytes can be used."""
    totals = range(size + CONTEXT, size + CONTEXT + GIB, 1 << 20)
    return next(room for total in totals if (room := DeviceMemory("a card", total, total)).usable >= size)


@pytest.mark.slow
def test_offloaded_activations_wait_on_the_host(tmp_path: Path) -> None:
    made = wan(tmp_path, *CHECKPOINTED, "--gradient_checkpointing_cpu_offload")
    tokens = 3 * 8 * 8
    # all but the last of five blocks, float32
    assert predict_memory(*made, wan_batch(1, (3, 16, 16)), CPU).host_activation_bytes == 4 * tokens * 128 * 4


def two_experts(folder: Path, *more: str) -> tuple[Family, TrainingOptions]:
    low, high = (
        wan_dit.write_dit(
            folder, wan_dit.tiny_state("t2v", seed, torch.bfloat16, num_layers=LAYERS), name=f"dit{seed}"
        )
        for seed in range(2)
    )
    words = ("--task", "t2v-A14B", "--dit", low, "--dit_high_noise", high, "--network_dim", 32, *more)
    own, options = read_family(WanTrainingOptions, False, *CHECKPOINTED, *words)
    return family_for_training(own), options


@pytest.mark.slow
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
    prediction = predict_memory(family, options, wan_batch(2), CPU)

    phase = prediction.phase(0)
    planned = phase.device - prediction.workspace.device

    _, moment = find_peak_phase(counted(family, options, wan_batch(2), monkeypatch))
    assert planned == pytest.approx(sum(moment.values()), rel=0.02)
    assert phase.host == (2 * size_of(phase, "weights")[0] if turns else 0)


def size_of(phase: Phase, name: str) -> tuple[int, int]:
    """Bytes on the device and on the host of the part whose name begins so."""
    return next((part.device, part.host) for part in phase.parts if part.name.startswith(name))


@pytest.mark.slow
def test_swapped_blocks_of_both_are_on_the_host(tmp_path: Path) -> None:
    family, options = two_experts(tmp_path)
    apart = replace(options, experts=replace(options.by_expert, offload_inactive_dit=True))
    both, turns = (predict_memory(family, each, wan_batch(), CPU) for each in (options, apart))

    device, host = size_of(both.phase(0), "weights")
    for blocks in range(1, both.max_swapped_blocks + 1):
        here, away = size_of(both.phase(blocks), "weights")
        assert size_of(both.phase(blocks), "further") == (here, away)
        assert turns.phase(blocks).host == 2 * device > away > host
        assert turns.phase(blocks).device == both.phase(blocks).device - here


@pytest.mark.slow
def test_an_adapter_of_two_experts_is_there_twice_also_if_they_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_lora(path, tmp_path / "none", rank=64)
    plain, adapted = (
        predict_memory(*two_experts(tmp_path, "--offload_inactive_dit", *more), wan_batch(), CPU).phase(0)
        for more in ([], ["--training_adapter", str(path)])
    )

    factors = 2 * sum(tensor.numel() for tensor in load_file(path).values() if tensor.ndim)
    assert adapted.host == plain.host
    assert size_of(adapted, "LoRA in training steps only")[0] == 2 * factors


def test_turns_are_advised_first(tmp_path: Path) -> None:
    _, options = two_experts(tmp_path)

    line, changed = list_memory_savings(options, num_further_dits=1)[0]

    assert line == "--offload_inactive_dit"
    assert changed.by_expert.offload_inactive_dit
    assert (
        list_memory_savings(changed, num_further_dits=1)[0][0] == list_memory_savings(options)[0][0] != line
    )


@dataclass
class Growing:
    """A prediction of 1 GiB for each sample, and 2 for the weights."""

    shape: tuple[int, ...]
    samples: float

    def scaled(self, share: float) -> "Growing":
        return Growing(self.shape, self.samples * share)

    def device_bytes(self, blocks: int) -> int:
        return round((2 + self.samples) * GIB)


@pytest.mark.parametrize(("usable", "batch_size"), [(9.5, 7), (100, MAX_BATCH), (4.5, None)])
def test_a_plan_proposes_the_batch_that_fills_the_card(usable: float, batch_size: int | None) -> None:
    room: Any = SimpleNamespace(usable=round(usable * GIB))
    prediction: Any = Growing((2, 1, 8, 8), 2)

    lines = suggest_larger_batch(prediction, 0, room)

    proposed = [f"batch_size {batch_size} in --dataset_config"] if batch_size else []
    assert [line.split(" fits")[0] for line in lines] == proposed
    assert suggest_larger_batch(prediction, 0, None) == []
