"""Validation loss: held-out items at fixed noise and fixed timesteps, in bands from little to much noise.

The loss of one training step means little, because its timestep and noise are random. Here both belong to the
item, so values of two steps, and of two runs with the same items, can be compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dataset.batches.checks import SameEncoders
from dataset.batches.items import CachingCommands, TrainingItem
from dataset.batches.order import RunPlace, change_captions
from dataset.cache.records import CacheChecks
from modules.bars import track
from modules.contract.data import SOUND
from modules.contract.rules import expert_at
from training.data.feed import BatchSources, draw_given_frames, seed_generator
from training.data.live import NO_TEXTS, LiveTexts
from training.data.timesteps import times_at
from training.loss import (
    PLAIN_LOSS,
    Autocast,
    DitOf,
    LossRule,
    NoisyBatch,
    NoisySound,
    Trains,
    measure_errors,
)
from training.noise_options import NUM_TIMESTEPS, TimestepOptions
from training.reports.history import LOSS

NUM_BANDS = 5
STEP, EPOCH = "step", "epoch"  # after what a validation comes: in the names of logs


@dataclass(frozen=True)
class ValidationRule:
    """Noise levels of a validation, number of its items, and its names in logs."""

    sigmas: tuple[float, ...] = ()  # () the middle of each of five bands
    most: int | None = None  # items of a validation, over all processes; None: all
    seed: int | None = None  # of the noise, beside the item
    # log the mean and its distance to the loss of training, by the names that image trainers use
    is_compared: bool = False

    def logged(self, losses: Mapping[str, float], occasion: str, running: float | None) -> dict[str, float]:
        """Return the numbers for the trackers. occasion: STEP or EPOCH. running: loss of the last steps."""
        if not self.is_compared:
            return dict(losses)
        values = {f"loss/validation/{occasion}_average": losses[LOSS]}
        if running is not None:
            values[f"loss/validation/{occasion}_divergence"] = losses[LOSS] - running
        return values


@dataclass(frozen=True)
class Validation:
    """Hold the items to measure and this process' share of them."""

    family: Trains
    items: Sequence[TrainingItem]  # of all processes; repeats are left out
    timesteps: TimestepOptions
    commands: CachingCommands
    device: torch.device
    process: int
    processes: int
    loss: LossRule = PLAIN_LOSS
    rule: ValidationRule = ValidationRule()
    checks: CacheChecks = field(default_factory=CacheChecks)
    sources: BatchSources = field(default_factory=BatchSources)
    encoders: SameEncoders = field(default_factory=SameEncoders)  # of the caches that were read
    texts: LiveTexts = NO_TEXTS  # encoded in each validation
    in_lockstep: bool = False  # all processes run equally many passes

    @property
    def sigmas(self) -> tuple[float, ...]:
        levels = self.rule.sigmas or [(band + 0.5) / NUM_BANDS for band in range(NUM_BANDS)]
        lowest = min(expert.lowest for expert in self.family.experts)
        # above the last band there is still the end, which is pure noise
        return tuple(level for level in levels if NUM_TIMESTEPS * level >= lowest) or (1.0,)

    @torch.no_grad()
    def measure(self, dit_at: DitOf, autocast: Autocast) -> dict[str, float]:
        """Return the mean loss over the items as `validation/loss`, and per level as `validation/loss_100`.

        The number of a level is its timestep; levels below all experts are left out. dit_at:
        expert -> its network. The networks are in evaluation mode. All processes must call it and get the
        same numbers.
        """
        chosen, levels = self.items[: self.rule.most], self.sigmas
        items = chosen[self.process :: self.processes]
        lacks = self.in_lockstep and len(items) * self.processes < len(chosen)
        repeated = [chosen[-1]] if lacks else []
        experts = [expert_at(NUM_TIMESTEPS * sigma, self.family.experts) for sigma in levels]
        sums = torch.zeros(len(levels) + 1, dtype=torch.float64)
        sums[-1] = len(items)
        # all items by one network, then by the next: bringing one to the device takes longer than reading
        for expert in sorted(set(experts)) if items or repeated else ():
            dit, places = dit_at(expert), [place for place, which in enumerate(experts) if which == expert]
            for item in track(items, f"validation, {len(places)} noise levels", len(items), unit="item"):
                losses = self._losses(item, [levels[place] for place in places], dit, autocast)
                sums[places] += torch.tensor(losses, dtype=torch.float64)
            for item in repeated:  # for the others, which gather the blocks from this process
                self._losses(item, [levels[place] for place in places], dit, autocast)
        if self.processes > 1:
            shared = sums.to(self.device)
            torch.distributed.all_reduce(shared)
            sums = shared.cpu()
        means = (sums[:-1] / sums[-1]).tolist()
        bands = {
            f"validation/loss_{round(1000 * sigma):03d}": loss
            for sigma, loss in zip(self.sigmas, means, strict=True)
        }
        return {LOSS: sum(means) / len(means), **bands}

    def _losses(
        self, item: TrainingItem, sigmas: Sequence[float], dit: nn.Module, autocast: Autocast
    ) -> list[float]:
        """Return the loss of one item at each of these noise levels."""
        stream = "validation", item.key
        batch = self.sources.read((item,), self.family.latent, self.commands, self.checks, stream)
        if self.process == 0:
            self.encoders.warn(batch.made_by)
        if self.sources.tables:
            place = RunPlace(0, 0, 1, 1)  # wildcards are drawn alike each time, all parts are there
            batch = replace(batch, captions=change_captions((item,), batch.captions, (0,), place))
        if self.texts.encoders:
            with autocast():
                batch = self.texts.add_to(batch)
        shape = batch.tensor("latents").shape
        # in all bands, and in all runs of one probability
        given_frames = draw_given_frames(self.family.noise, shape[2], "validation", item.key, "given frames")
        losses = []
        seed = () if self.rule.seed is None else (self.rule.seed,)
        for sigma in sigmas:
            level = int(NUM_BANDS * sigma) if not self.rule.sigmas else round(NUM_TIMESTEPS * sigma)
            # seeded by the item alone: not by the run's seed, so that runs can be compared
            noise = torch.randn(shape, generator=seed_generator("validation", *seed, item.key, level))
            times = times_at(self.timesteps, torch.tensor([sigma]), self.family.noise)
            heard, sound = batch.tensors.get(SOUND), None
            if isinstance(heard, Tensor):  # as noisy as the picture
                generator = seed_generator("validation sound", *seed, item.key, level)
                of_sound = torch.randn(heard.shape, generator=generator)
                sound = NoisySound(of_sound, times.sigmas, times.timesteps, torch.ones(1))
            noisy_batch = NoisyBatch(
                batch,
                noise,
                times.sigmas,
                times.timesteps,
                torch.ones(1),
                given_frames,
                sound=sound,
            ).to(self.device)
            losses.append(measure_errors(self.family, dit, noisy_batch, autocast, self.loss))
        return torch.cat(losses).tolist()
