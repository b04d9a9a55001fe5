"""Validation loss: held-out items at fixed noise and fixed timesteps, in bands from little to much noise.

The loss of one training step means little, because its timestep and noise are random. Here both belong to the
item, so values of two steps, and of two runs with the same items, can be compared.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dataset.batches.items import TrainingItem
from dataset.batches.order import RunPlace, change_captions
from dataset.cache.records import CacheChecks
from modules.bars import track
from modules.contract.data import SOUND
from modules.contract.rules import expert_at
from training.data.feed import draw_given_frames, seed_generator
from training.data.timesteps import times_at
from training.loss import Autocast, DitOf, LossRule, NoisyBatch, NoisySound, measure_streams
from training.noise_options import NUM_TIMESTEPS
from training.plan import TrainingPlan
from training.reports.history import LOSS

NUM_BANDS = 5
STEP, EPOCH = "step", "epoch"  # after what a validation comes: in the names of logs


class Validation:
    """The items of a plan that are not trained on, and the noise levels at which their loss is measured."""

    def __init__(self, plan: TrainingPlan, loss: LossRule) -> None:
        self.plan, self.loss, self.checks = plan, loss, CacheChecks()
        self.process = plan.accelerator.process_index // plan.steps.peers
        # as image trainers do: four levels between the bounds of the timesteps
        self.is_of_images, times = plan.options.is_for_images, plan.options.timesteps
        low, width = times.lowest, times.highest - times.lowest
        levels = [(band + 0.5) / NUM_BANDS for band in range(NUM_BANDS)]
        if self.is_of_images:
            levels = [int(low + width * place / 5) / NUM_TIMESTEPS for place in range(1, 5)]
        lowest = min(expert.lowest for expert in plan.family.experts)
        # above the last band there is still the end, which is pure noise
        self.sigmas = [level for level in levels if NUM_TIMESTEPS * level >= lowest] or [1.0]

    def logged(self, losses: Mapping[str, float], occasion: str, running: float | None) -> dict[str, float]:
        """Return the numbers for the trackers. For image models these are, under the names of image trainers,
        the mean and its difference to `running`, the loss of the last steps. occasion: STEP or EPOCH.
        """
        if not self.is_of_images:
            return dict(losses)
        values = {f"loss/validation/{occasion}_average": losses[LOSS]}
        if running is not None:
            values[f"loss/validation/{occasion}_divergence"] = losses[LOSS] - running
        return values

    @torch.no_grad()
    def measure(self, dit_at: DitOf, autocast: Autocast) -> dict[str, float]:
        """Return the mean loss over the items as `validation/loss`, and per level as `validation/loss_100`.

        The number of a level is its timestep; levels below all experts are left out. dit_at:
        expert -> its network. The networks are in evaluation mode. All processes must call it and get the
        same numbers.
        """
        steps, processes, levels = self.plan.steps, self.plan.steps.processes, self.sigmas
        chosen = self.plan.validation[: self.plan.options.validation.max_validation_steps]
        items = chosen[self.process :: processes]
        lacks = steps.in_lockstep and len(items) * processes < len(chosen)
        repeated = [chosen[-1]] if lacks else []
        experts = [expert_at(NUM_TIMESTEPS * sigma, self.plan.family.experts) for sigma in levels]
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
        if processes > 1:
            shared = sums.to(self.plan.accelerator.device)
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
        plan, spec, stream = self.plan, self.plan.family.noise, ("validation", item.key)
        batch = plan.sources.read((item,), plan.family.latent, plan.commands, self.checks, stream)
        if self.process == 0:
            plan.encoders.warn(batch.made_by)
        if plan.sources.tables:
            place = RunPlace(0, 0, 1, 1)  # wildcards are drawn alike each time, all parts are there
            batch = replace(batch, captions=change_captions((item,), batch.captions, (0,), place))
        if plan.texts is not None:
            with autocast():
                batch = plan.texts.add_to(batch)
        shape = batch.tensor("latents").shape
        # the same frames in all bands, and in all runs with the same probability
        given_frames = draw_given_frames(spec, shape[2], "validation", item.key, "given frames")
        losses, given = [], plan.options.validation.validation_seed  # of the noise, beside the item
        seed = () if given is None else (given,)
        for sigma in sigmas:
            level = round(NUM_TIMESTEPS * sigma) if self.is_of_images else int(NUM_BANDS * sigma)
            # seeded by the item alone: not by the run's seed, so that runs can be compared
            noise = torch.randn(shape, generator=seed_generator("validation", *seed, item.key, level))
            times = times_at(plan.options.timesteps, torch.tensor([sigma]), spec)
            heard, sound = batch.tensors.get(SOUND), None
            if isinstance(heard, Tensor):  # as noisy as the picture
                generator = seed_generator("validation sound", *seed, item.key, level)
                of_sound = torch.randn(heard.shape, generator=generator)
                sound = NoisySound(of_sound, times.sigmas, times.timesteps, torch.ones(1))
            noisy_batch = NoisyBatch(
                batch, noise, times.sigmas, times.timesteps, torch.ones(1), given_frames, sound=sound
            ).to(plan.accelerator.device)
            errors = measure_streams(plan.family, dit, noisy_batch, autocast, self.loss)
            losses.append(functools.reduce(torch.add, errors))
        return torch.cat(losses).tolist()
