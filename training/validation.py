"""Validation loss: held-out items at fixed noise and fixed timesteps, in bands from little to much noise.

The loss of one training step means little, because its timestep and noise are random. Here both depend on the
item only, so values of two steps, or of two runs with the same items, can be compared.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dataset.batches.items import TrainingItem
from dataset.batches.order import RunPosition, change_captions
from dataset.cache.records import CacheChecks
from modules.bars import track
from protocols.data import Batch
from protocols.family import trains_audio
from protocols.rules import expert_at
from training.data.feed import add_audio, draw_num_clean_frames, seed_generator
from training.data.timesteps import times_at
from training.loss import Autocast, GetDit, LossRule, NoisyBatch
from training.noise_options import NUM_TIMESTEPS, TimestepOptions
from training.plan import TrainingPlan
from training.reports.history import LOSS
from training.targets.passes import measure_streams, weigh_losses

NUM_BANDS = 5
STEP, EPOCH = "step", "epoch"  # occasions of a validation, in the names of logged values


class Validation:
    """The held-out items of a run, and the noise levels at which their validation loss is measured."""

    def __init__(self, plan: TrainingPlan, loss: LossRule) -> None:
        self.plan = plan
        self.loss = loss
        self.checks = CacheChecks()
        self.process = plan.accelerator.process_index // plan.steps.processes_per_batch
        self.is_for_images = plan.options.is_for_images
        sigmas = [(band + 0.5) / NUM_BANDS for band in range(NUM_BANDS)]  # the middle of each band
        if self.is_for_images:
            sigmas = _list_image_sigmas(plan.options.timesteps)
        lowest = min(expert.min_timestep for expert in plan.family.experts)
        # levels below all trained experts are left out; an expert above all levels is measured at pure noise
        self.sigmas = [sigma for sigma in sigmas if NUM_TIMESTEPS * sigma >= lowest] or [1.0]

    def name_tracked_values(
        self, losses: Mapping[str, float], occasion: str, training_loss: float | None
    ) -> dict[str, float]:
        """Return the values of a validation that TensorBoard or wandb records.

        For image models these are the mean and its difference from the training loss, under the names of
        image trainers.

        Args:
            losses: Validation losses by name.
            occasion: STEP or EPOCH, part of the names.
            training_loss: Mean loss of the last training steps; None before the first.
        """
        if not self.is_for_images:
            return dict(losses)
        values = {f"loss/validation/{occasion}_average": losses[LOSS]}
        if training_loss is not None:
            values[f"loss/validation/{occasion}_divergence"] = losses[LOSS] - training_loss
        return values

    @torch.no_grad()
    def measure(self, dit_at: GetDit, autocast: Autocast) -> dict[str, float]:
        """Return the mean loss over the items as `validation/loss`, and per level as `validation/loss_100`.

        The number in a name is the level's timestep; levels at which no expert is trained are skipped. The
        networks must be in evaluation mode. All processes must call this, and all get the same averages.

        Args:
            dit_at: Returns the network of an expert.
            autocast: Opens the autocast context of a pass.
        """
        sums = self._sum_losses(dit_at, autocast)
        if self.plan.steps.data_parallel_size > 1:
            shared = sums.to(self.plan.accelerator.device)
            torch.distributed.all_reduce(shared)
            sums = shared.cpu()
        means = (sums[:-1] / sums[-1]).tolist()  # the last entry is the number of items
        losses = {LOSS: sum(means) / len(means)}
        for sigma, mean in zip(self.sigmas, means, strict=True):
            losses[f"validation/loss_{round(1000 * sigma):03d}"] = mean
        return losses

    def _sum_losses(self, dit_at: GetDit, autocast: Autocast) -> Tensor:
        """Return the sum of this process's losses at each noise level, and its number of items as last value.

        Args:
            dit_at: Returns the loaded DiT of an expert, given its index.
            autocast: Opens the autocast context of a pass.
        """
        steps = self.plan.steps
        all_items = self.plan.validation[: self.plan.options.validation.max_validation_steps]
        items = all_items[self.process :: steps.data_parallel_size]
        # processes that share a sharded network have to run as many passes as the one with the most items
        lacks_item = steps.in_lockstep and len(items) * steps.data_parallel_size < len(all_items)
        sums = torch.zeros(len(self.sigmas) + 1, dtype=torch.float64)
        sums[-1] = len(items)
        if not (items or lacks_item):
            return sums
        # one network after the other: moving a network to the device takes longer than reading all items
        for expert, levels in sorted(self._levels_by_expert().items()):
            dit = dit_at(expert)
            sigmas = [self.sigmas[level] for level in levels]
            title = f"validation, {len(levels)} noise levels"
            for item in track(items, title, len(items), unit="item"):
                losses = self._losses(item, sigmas, dit, autocast)
                sums[levels] += torch.tensor(losses, dtype=torch.float64)
            if lacks_item:  # an additional pass, because other processes need this one's part of the blocks
                self._losses(all_items[-1], sigmas, dit, autocast)
        return sums

    @torch.no_grad()
    def measure_items(
        self, items: Sequence[TrainingItem], dit_at: GetDit, autocast: Autocast
    ) -> dict[str, float]:
        """Return the loss of each item by key: the mean over the noise levels, at noise that is the same.

        The networks must be in evaluation mode. Each process measures a part of the items.

        Args:
            items: The items of all processes.
            dit_at: Returns the network of an expert.
            autocast: Opens the autocast context of a pass.
        """
        own_items = items[self.process :: self.plan.steps.data_parallel_size]
        sums = dict.fromkeys((item.key for item in own_items), 0.0)
        for expert, levels in sorted(self._levels_by_expert().items()):
            dit = dit_at(expert)
            sigmas = [self.sigmas[level] for level in levels]
            for item in track(own_items, "measuring items", len(own_items), unit="item"):
                sums[item.key] += sum(self._losses(item, sigmas, dit, autocast))
        return {key: total / len(self.sigmas) for key, total in sums.items()}

    def _levels_by_expert(self) -> dict[int, list[int]]:
        """Return the indices of the noise levels at which each expert is used."""
        levels: dict[int, list[int]] = {}
        for level, sigma in enumerate(self.sigmas):
            expert = expert_at(NUM_TIMESTEPS * sigma, self.plan.family.experts)
            levels.setdefault(expert, []).append(level)
        return levels

    def _losses(
        self, item: TrainingItem, sigmas: Sequence[float], dit: nn.Module, autocast: Autocast
    ) -> list[float]:
        """Return the loss of one item at each of these noise levels."""
        batch = self._read(item, autocast)
        frames = batch.tensor("latents").shape[2]
        # the draw depends on the item only: it is the same at all noise levels and in all runs
        num_clean_frames = draw_num_clean_frames(
            self.plan.family.noise, frames, "validation", item.key, "given frames"
        )
        losses = []
        for sigma in sigmas:
            noisy_batch = self._add_noise(batch, sigma, item.key, num_clean_frames)
            noisy_batch = noisy_batch.to(self.plan.accelerator.device)
            errors = measure_streams(self.plan.family, dit, noisy_batch, autocast=autocast, rule=self.loss)
            losses.append(functools.reduce(torch.add, weigh_losses(errors, noisy_batch)))
        return torch.stack(losses).tolist()

    def _read(self, item: TrainingItem, autocast: Autocast) -> Batch:
        """Read an item as a batch, and encode its captions if text encoders run during training."""
        plan = self.plan
        batch = plan.sources.read(
            (item,),
            checks=self.checks,
            # seeds random choices: equal each time that the item is read
            seed_parts=("validation", item.key),
        )
        if self.process == 0:
            plan.sources.encoders.warn(batch.cache_origins)  # warns if caches come from several text encoders
        if plan.sources.tables:
            # constant, so that wildcards are the same each time; at the last step, so captions are complete
            last_position = RunPosition(seed=0, micro_batch=0, step=1, total_steps=1)
            batch = replace(batch, captions=change_captions((item,), batch.captions, (0,), last_position))
        if plan.live_encoders is not None:
            with autocast():
                batch = plan.live_encoders.add_encoded_captions(batch)
        return batch

    def _add_noise(self, batch: Batch, sigma: float, key: str, num_clean_frames: int) -> NoisyBatch:
        """Return a batch of one item at a noise level."""
        # The noise is seeded by the item's key, the level, and --validation_seed if it is set, but not by the
        # run's seed, so that runs can be compared.
        noise_spec = self.plan.family.noise
        seed = self._noise_seed(sigma, key)
        shape = batch.tensor("latents").shape
        noise = torch.randn(shape, generator=seed_generator("validation", *seed))
        times = times_at(self.plan.options.timesteps, torch.tensor([sigma]), noise_spec)
        if noise_spec.change_conditions is not None:
            generator = seed_generator("validation inputs", *seed)
            batch = replace(batch, tensors=noise_spec.change_conditions(batch.tensors, "", generator))
        clean_tokens = None
        if noise_spec.clean_token_rule is not None:
            generator = seed_generator("validation given tokens", *seed)
            clean_tokens = noise_spec.clean_token_rule.draw(batch, generator)
        noisy_batch = NoisyBatch(
            batch=batch,
            noise=noise,
            sigmas=times.sigmas,
            timesteps=times.timesteps,
            weights=torch.ones(1),
            num_clean_frames=num_clean_frames,
            clean_tokens=clean_tokens,
        )
        if not trains_audio(self.plan.family):
            return noisy_batch
        return add_audio(
            noisy_batch,
            self.plan.family.audio_learning,
            times=times,
            noise_spec=noise_spec,
            generator=seed_generator("validation sound", *seed),
            draw_own_times=lambda shape: times,  # audio with its own times is measured at the same levels
            weigh=lambda audio_times: torch.ones(1),
        )

    def _noise_seed(self, sigma: float, key: str) -> list[int | str]:
        """Return the parts of the seed of an item's noise at a noise level."""
        # the noise level as part of the seed: in thousandths for images, as one of NUM_BANDS for clips
        level = round(NUM_TIMESTEPS * sigma) if self.is_for_images else int(NUM_BANDS * sigma)
        validation_seed = self.plan.options.validation.validation_seed
        return [key, level] if validation_seed is None else [validation_seed, key, level]


def _list_image_sigmas(options: TimestepOptions) -> list[float]:
    """Return four noise levels between the bounds of the timesteps, at which image trainers validate."""
    width = options.highest - options.lowest
    return [int(options.lowest + width * fifth / 5) / NUM_TIMESTEPS for fifth in range(1, 5)]
