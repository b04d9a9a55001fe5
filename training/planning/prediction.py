"""Predict a training step's memory on the device: rehearse it without data or loaded weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from modules.contract.family import Described
from modules.planning.dry_run import (
    GRADIENTS,
    KEPT,
    NETWORK,
    OPTIMIZER,
    WEIGHTS,
    WORKING,
    Moment,
    largest,
    quiet,
)
from modules.planning.memory_plan import (
    MemoryPart,
    Phase,
    Swapped,
    dtypes_of,
    gib,
    parts_of,
    swaps_of,
    workspace,
)
from training.data.live_text import LiveTexts
from training.experts import placement_of
from training.loss import NoisyBatch, Trains
from training.options import TrainingOptions
from training.planning.rehearsal import rehearse

META = torch.device("meta")


@dataclass(frozen=True)
class StepPrediction:
    """Hold a step's memory before any block is swapped, and the effect of swapping."""

    options: TrainingOptions
    batch: str  # the size of the batch, in words
    size: int  # of the batch: numbers in its latents
    moments: Mapping[str, Moment]
    waiting: int  # bytes of activations in host memory
    weights: str  # their dtypes
    swaps: Sequence[Swapped]  # by --blocks_to_swap, from 0 to the most that can be
    workspace: MemoryPart
    average: int = 0  # bytes of a whole model's average (EMA) in host memory
    others: int = 0  # further transformers that are trained, each like the one that was rehearsed
    sampled: int = 0  # those that only samples need
    texts: LiveTexts | None = None  # encoded in each step

    def phase(self, blocks: int) -> Phase:
        """Return the largest moment of a step with this many blocks swapped."""
        (place, moment), swap = largest(self.moments), self.swaps[blocks]
        notes = {WEIGHTS: self.weights, WORKING: place}
        if swap.host:
            notes[WEIGHTS] += f"; {blocks} blocks swapped, {gib(swap.ring)} to pass through"
        if self.waiting:
            notes[KEPT] = "the rest waits in host memory"
        parts = [*parts_of(moment, swap, notes, self.waiting), *self._others(moment, swap)]
        if self.average:
            parts.append(MemoryPart("average of the weights (EMA)", 0, self.average))
        return Phase(f"training step, {self.batch}", (*parts, self.workspace))

    @property
    def takes_turns(self) -> bool:
        """Return whether one transformer is on the device at a time."""
        return self.sampled > 0 or (self.others > 0 and self.options.by_expert.offload_inactive_dit)

    def _others(self, moment: Moment, swap: Swapped) -> tuple[MemoryPart, ...]:
        """Return the memory of further transformers, and of their trained parts.

        If they take turns, each has all its weights in host memory, also the one at work.
        """
        if not self.others + self.sampled:
            return ()
        weights, count = moment.get(WEIGHTS, 0), self.others + self.sampled
        device, host = count * (weights - swap.saved), count * swap.host
        if self.takes_turns:
            device, host = 0, (1 + count) * weights - swap.host
        note = "they take turns on the device" if self.takes_turns else ""
        parts = [MemoryPart("further transformers", device, host, note)]
        if self.options.by_expert.lora_per_expert:
            # a micro-batch goes to one of them, so that only several of them leave gradients in both
            kinds = [NETWORK, OPTIMIZER] + [GRADIENTS] * (self.options.loop.gradient_accumulation_steps > 1)
            learning = sum(moment.get(kind, 0) for kind in kinds)
            parts.append(MemoryPart("what learns in them", self.others * learning))
        return tuple(parts)

    def device(self, blocks: int) -> int:
        """Return the bytes of the device with this many blocks swapped."""
        return self.phase(blocks).device

    @property
    def most(self) -> int:
        """Return the largest number of blocks that can be swapped."""
        return len(self.swaps) - 1

    @property
    def blocks(self) -> int:
        """Return how many blocks the options swap; 0 for auto."""
        swap = self.options.speed.swap
        return 0 if swap.is_auto else swap.number


def predict(
    family: Trains,
    options: TrainingOptions,
    noisy_batch: NoisyBatch,
    device: torch.device,
    sampled: int = 0,
    texts: LiveTexts | None = None,
) -> StepPrediction:
    """Rehearse a step. noisy_batch: on the CPU. device: of the run. sampled, texts: see `StepPrediction`.

    8-bit products are rehearsed as 16-bit products of the same weights. Raises the errors of loading.
    """
    choice = replace(options.speed.attention.choice, mode="sdpa")  # stands in for all kernels
    placement = replace(placement_of(options, META, options.speed.fp8.quantisation), attention=choice)
    with quiet():
        dit = family.load_dit(placement)
    weights, swaps = dtypes_of(dit), swaps_of(dit, family.dit, options.speed.swap)
    average = _average_bytes(options, dit)
    encoders = () if texts is None else texts.encoders
    try:
        with quiet():
            for encoder in encoders:
                encoder.load(META)
            moments, waiting = rehearse(family, options, dit, noisy_batch, texts)
    finally:
        for encoder in encoders:
            encoder.free()
    return StepPrediction(
        options,
        describe(family, noisy_batch),
        noisy_batch.noise.numel(),
        moments,
        waiting,
        weights,
        swaps,
        workspace(device, is_training=True),
        average,
        len(family.experts) - 1,
        sampled,
        texts,
    )


def _average_bytes(options: TrainingOptions, dit: nn.Module) -> int:
    whole = options.whole_dit
    if whole is None or options.average.ema_decay is None:
        return 0
    parts = whole.name_parts
    return 4 * sum(
        weight.numel()
        for name, weight in dit.named_parameters()
        if not parts or any(part in name for part in parts)
    )


def describe(family: Described, noisy_batch: NoisyBatch) -> str:
    """Return the size of a batch in words: `832x480, 81 frames, batch 1`."""
    count, _, frames, height, width = noisy_batch.noise.shape
    step, rows, columns = family.latent.stride
    return f"{width * columns}x{height * rows}, {(frames - 1) * step + 1} frames, batch {count}"
