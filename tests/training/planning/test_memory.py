"""Which batch is planned for, and what is said about it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dataset.batches.items import ItemKind, TrainingItem
from dataset.config import load_dataset_config
from modules.planning.memory_plan import CONTEXT, GIB, Room
from tests.training.planning.test_rehearsal import CHECKPOINTED, wan, wan_batch
from tests.training.toy import write_caches
from training.loss import NoisyBatch
from training.options import TrainingOptions
from training.planning.memory import advice, cheaper, cut, largest_batch, predict, prepare_memory, shrunk
from wan.spec import LATENT

CPU = torch.device("cpu")


def test_the_batch_with_most_pixels_counts(tmp_path: Path) -> None:
    (table,) = load_dataset_config(write_caches(tmp_path, batch_size=4)).datasets

    def items(bucket: tuple[int, ...], count: int) -> list[TrainingItem]:
        return [
            TrainingItem(f"{bucket} {index}", 0, table, bucket, ItemKind("toy")) for index in range(count)
        ]

    few_large, many_small = items((64, 64), 1), items((48, 48), 7)
    assert largest_batch([*few_large, *many_small]) == tuple(many_small[:4])
    assert largest_batch([*few_large, *many_small[:1]]) == tuple(few_large)


def test_a_batch_is_cut_in_all_its_tensors() -> None:
    small = cut(wan_batch(3), 1, 2, 6, 4)
    assert small.noise.shape == small.batch.tensor("latents").shape == (1, 16, 2, 6, 4)
    assert len(small.batch.tensors["t5"]) == len(small.batch) == len(small.sigmas) == 1


def test_what_stands_beside_the_latents_becomes_as_small_as_they() -> None:
    """An image condition has other frames than the latents, and the same rows and columns."""
    batch = beside(wan_batch(3, (3, 8, 12)), latents_image=torch.zeros(3, 16, 1, 8, 12))
    small = cut(batch, 1, 2, 6, 4)
    assert small.batch.tensor("latents_image").shape == (1, 16, 1, 6, 4)


def test_a_section_is_made_smaller_but_no_shorter() -> None:
    """Its length is the model's, and each of its frames has a place in time."""
    places, past = torch.arange(3).expand(2, -1), torch.zeros(2, 16, 2, 8, 12)
    batch = beside(
        wan_batch(2, (3, 8, 12)),
        latent_indices=places,
        latents_clean=past,
        clean_latent_indices=places[:, :2],
    )

    found = dict(shrunk(replace(LATENT, in_sections=True), batch))

    assert [size for size, _ in found["batch_size"]] == ["1"]
    assert found["target_frames"] == []
    assert found["resolution"]
    for size, small in found["resolution"]:
        width, height = (int(side) // 8 for side in size.strip("[]").split(","))
        assert small.noise.shape == small.batch.tensor("latents").shape == (1, 16, 3, height, width)
        assert small.batch.tensor("latents_clean").shape == (1, 16, 2, height, width)
        assert small.batch.tensor("latent_indices").shape == (1, 3)


def beside(noisy_batch: NoisyBatch, **tensors: torch.Tensor) -> NoisyBatch:
    """The batch with more tensors."""
    batch = replace(noisy_batch.batch, tensors={**noisy_batch.batch.tensors, **tensors})
    return replace(noisy_batch, batch=batch)


def test_cheaper_options_come_one_after_the_other(tmp_path: Path) -> None:
    _, options = wan(tmp_path)
    found = cheaper(options)
    assert [line for line, _ in found] == [
        "--gradient_checkpointing",
        "--fp8_base --fp8_scaled",
        "--gradient_checkpointing_cpu_offload",
    ]
    assert found[-1][1].loop.gradient_checkpointing
    assert found[-1][1].speed.fp8.fp8_scaled


def test_auto_swaps_nothing_on_a_cpu(tmp_path: Path) -> None:
    family, options = wan(tmp_path, "--blocks_to_swap", "auto")
    accelerator = SimpleNamespace(device=CPU, is_main_process=True, num_processes=1)
    plan: Any = SimpleNamespace(family=family, options=options, accelerator=accelerator)  # no more is read
    swap, watch = prepare_memory(plan)
    assert swap.number == 0
    assert watch is None


def test_a_swapped_block_leaves_the_prediction_and_goes_to_the_host(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED)
    prediction = predict(family, options, wan_batch(), CPU)
    steps = [prediction.device(count) - prediction.device(count + 1) for count in range(prediction.most - 1)]
    assert len(set(steps)) == 1
    assert steps[0] > 0
    assert prediction.phase(1).host > prediction.phase(0).host == 0


def test_advice_ends_with_what_fits(tmp_path: Path) -> None:
    family, options = wan(tmp_path)
    batch = wan_batch(1, (3, 16, 16))
    prediction = predict(family, options, batch, CPU)
    checkpointed = replace(options, loop=replace(options.loop, gradient_checkpointing=True))
    needed = predict(family, checkpointed, batch, CPU).device(0)
    assert needed < prediction.device(0)
    lines = advice(family, prediction, batch, room_for(needed), CPU)
    assert len(lines) == 1
    assert lines[0].startswith("--gradient_checkpointing:")
    assert lines[0].endswith("fits")


def room_for(size: int) -> Room:
    """A card on which exactly so many bytes can be used."""
    total = next(
        total
        for total in range(size + CONTEXT, size + CONTEXT + GIB, 1 << 20)
        if Room("", total, total).usable >= size
    )
    return Room("a card", total, total)


def test_offloaded_activations_wait_on_the_host(tmp_path: Path) -> None:
    options: TrainingOptions
    family, options = wan(tmp_path, *CHECKPOINTED, "--gradient_checkpointing_cpu_offload")
    prediction = predict(family, options, wan_batch(1, (3, 16, 16)), CPU)
    tokens = 3 * 8 * 8
    assert prediction.waiting == 4 * tokens * 128 * 4  # all but the last of five blocks, float32
