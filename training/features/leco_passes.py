"""The passes of LECO: the network denoises latents for some steps; the model without it gives the target."""
# Letters: B samples of a pair

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.seeds import derive_seed
from networks.rank_masks import set_levels
from protocols.data import SIZES, Conditions
from protocols.family import Family, NoiseSpec, Trains
from training.data.feed import NoiseSampler, seed_generator
from training.data.live import stack_texts
from training.features.encoded_captions import EncodedCaptions, encode_captions
from training.features.leco_file import LecoPair
from training.features.leco_options import LecoOptions
from training.loss import NoisyBatch
from training.targets.passes import RunPasses, StreamErrors, TrainingPasses, measure_errors

NUM_TRAIN_TIMESTEPS = 1000
RESOLUTION_STEP = 64
MAX_SCALE = 3.0  # with dynamic_crops: largest ratio of the original size to the size, as conditions


@dataclass(frozen=True)
class LecoTarget:
    """Training target for the prompt pairs of a LECO file, with their encoded prompts."""

    options: LecoOptions
    pairs: Sequence[LecoPair]
    captions: EncodedCaptions
    has_sizes: bool  # whether the model is given sizes and crops of images

    def make_conditions(self, prompt: str, sizes: Tensor, device: torch.device) -> Conditions:
        """Return the conditions of a prompt for B samples; `sizes`, B 6, are SDXL size conditions."""
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for name, value in self.captions.encoded[prompt].items():
            stacked = stack_texts([value] * len(sizes), name in self.captions.variable_length)
            if isinstance(stacked, list):
                conditions[name] = [item.to(device) for item in stacked]
            else:
                conditions[name] = stacked.to(device)
        if self.has_sizes:
            conditions[SIZES] = sizes
        return conditions


@dataclass(frozen=True)
class DdpmSchedule:
    """The DDPM schedule for denoising latents. Source: Ho et al. 2020, arXiv 2006.11239."""

    noise: NoiseSpec
    num_steps: int

    def timestep(self, index: int) -> int:
        """Return the timestep of denoising step `index`; the last step has timestep 0."""
        return (self.num_steps - 1 - index) * (NUM_TRAIN_TIMESTEPS // self.num_steps)

    def step(self, index: int, output: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents after one DDPM step (Ho et al. 2020), which moves them closer to clean latents.

        Args:
            index: Index of the step.
            output: Output of the network, noise or v, B C F h w.
            x: Latents before the step.
            generator: Draws the noise of the step.
        """
        timestep = self.timestep(index)
        previous_timestep = timestep - NUM_TRAIN_TIMESTEPS // self.num_steps
        # named as in DDPMScheduler of diffusers
        alpha_prod_t = 1 - self.noise.table[timestep] ** 2
        alpha_prod_t_prev = 1 - self.noise.table[previous_timestep] ** 2 if previous_timestep >= 0 else 1.0
        current_beta_t = 1 - alpha_prod_t / alpha_prod_t_prev
        if self.noise.predicts_v:
            pred_original_sample = alpha_prod_t**0.5 * x - (1 - alpha_prod_t) ** 0.5 * output
        else:
            pred_original_sample = (x - (1 - alpha_prod_t) ** 0.5 * output) / alpha_prod_t**0.5
        mean = (
            alpha_prod_t_prev**0.5 * current_beta_t * pred_original_sample
            + (1 - current_beta_t) ** 0.5 * (1 - alpha_prod_t_prev) * x
        )
        mean = mean / (1 - alpha_prod_t)
        if timestep == 0:
            return mean
        variance = (1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * current_beta_t
        return mean + variance**0.5 * torch.randn(x.shape, generator=generator).to(x)


def encode_pairs(
    family: Family, options: LecoOptions, pairs: Sequence[LecoPair], device: torch.device
) -> LecoTarget:
    """Encode all prompts of the pairs, one encoder at a time. Raises OptionError if an encoder is missing."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.prompts))
    captions = encode_captions(family, texts, device)
    return LecoTarget(options, pairs, captions, family.latent.has_size_conditions)


def weigh_equally(_: NoiseSampler, noisy_batch: NoisyBatch) -> NoisyBatch:
    """Return the batch with loss weights of 1, because LECO passes draw their own noise levels."""
    return replace(noisy_batch, weights=torch.ones_like(noisy_batch.weights))


def leco_passes(
    target: LecoTarget,
    at_strength: Callable[[float], AbstractContextManager[None]],
    _: RunPasses,
    passes: TrainingPasses,
    noisy_batch: NoisyBatch,
) -> Iterator[StreamErrors]:
    """Train on a random pair of prompts: yield |f(target) - (b(neutral) +- g (b(positive) - b(opposite)))|^2.

    b is the base model, and f the model with the LoRA at the pair's strength; + enhances, - erases.

    1. f denoises pure noise for a random number of steps of the schedule.
    2. b predicts from these latents with each of the target's three prompts.
    3. f predicts the target prompt, and the error is yielded. The strength stays set until the caller has
       computed the gradients.
    """
    rng = random.Random(derive_seed(passes.rule.seed, "leco", noisy_batch.number))
    pair = target.pairs[rng.randrange(len(target.pairs))]
    num_steps = target.options.max_denoising_steps
    num_done = rng.randrange(1, num_steps)
    height, width = _draw_resolution(pair, rng)
    size_conditions = _draw_size_conditions(pair, height, width, rng)
    step = PairStep(target, pair, passes, size_conditions, noisy_batch)
    with at_strength(pair.multiplier):
        passes.reset_network_seed(noisy_batch)
        with torch.set_grad_enabled(target.options.leco_walk_gradients):
            latents = step.denoise_noise(num_done, height, width)
    # timestep of the latents: the first `num_done` of the steps are done
    timestep = NUM_TRAIN_TIMESTEPS - 1 - num_done * NUM_TRAIN_TIMESTEPS // num_steps
    target_prediction = step.predict_target(latents, timestep)
    with at_strength(pair.multiplier):
        passes.reset_network_seed(noisy_batch)
        yield step.measure(latents, timestep, target_prediction)


@dataclass(frozen=True)
class PairStep:
    """One LECO training step on a pair of prompts."""

    target: LecoTarget
    pair: LecoPair
    passes: TrainingPasses
    size_conditions: Tensor  # B 6: original size, crop and target size, the size inputs of SDXL
    noisy_batch: NoisyBatch  # batch of the training loop, for its number and device

    @property
    def _noise(self) -> NoiseSpec:
        return self.passes.family.noise

    def predict(self, prompt: str, x: Tensor, timestep: int) -> Tensor:
        """Return the network's output for a prompt, B C F h w float32."""
        timesteps = torch.full((len(x),), float(timestep), device=x.device)
        set_levels(self.passes.dit, torch.full_like(timesteps, self._noise.table[timestep]))
        conditions = self.target.make_conditions(prompt, self.size_conditions, x.device)
        with self.passes.autocast():
            return self.passes.family.predict(self.passes.dit, x, timesteps, conditions).float()

    def denoise_noise(self, num_done: int, height: int, width: int) -> Tensor:
        """Denoise pure noise for `num_done` steps of the schedule; return the latents, B C F h w."""
        generator = seed_generator(self.passes.rule.seed, "leco noise", self.noisy_batch.number)
        noise = _draw_noise(self.passes.family, self.pair.batch_size, height, width, generator)
        x = noise.to(self.noisy_batch.noise.device)
        options = self.target.options
        schedule = DdpmSchedule(self._noise, options.max_denoising_steps)
        for index in range(num_done):
            timestep = schedule.timestep(index)
            unconditional = self.predict(self.pair.unconditional, x, timestep)
            conditional = self.predict(self.pair.target, x, timestep)
            guided = unconditional + options.leco_denoise_guidance_scale * (conditional - unconditional)
            x = schedule.step(index, guided, x, generator)
        return x

    def predict_target(self, x: Tensor, timestep: int) -> Tensor:
        """Return the base model's target prediction, neutral +- guidance * (positive - opposite)."""
        assert self.passes.rule.as_base is not None  # only LoRAs are trained with LECO
        with torch.no_grad(), self.passes.rule.as_base():
            positive = self.predict(self.pair.positive, x, timestep)
            neutral = self.predict(self.pair.neutral, x, timestep)
            opposite = self.predict(self.pair.unconditional, x, timestep)
        return neutral + self.pair.sign * self.pair.guidance_scale * (positive - opposite)

    def measure(self, x: Tensor, timestep: int, target_prediction: Tensor) -> StreamErrors:
        """Return the error of the network's prediction for the target prompt against `target_prediction`.

        It is multiplied by the pair's weight and by the family's loss factor of the timestep.

        Args:
            x: Noisy latents.
            timestep: Timestep of x.
            target_prediction: The prediction to learn, from `predict_target`.

        Returns:
            The error of each sample, B, in a tuple with one entry for images, and one for any audio.
        """
        output = self.predict(self.pair.target, x, timestep)
        ones = torch.ones(len(x), device=x.device)
        noisy_batch = replace(
            self.noisy_batch, noise=x, sigmas=self._noise.table[timestep] * ones, timesteps=timestep * ones
        )
        factor = self._noise.loss_factors[timestep] if self._noise.loss_factors else 1.0
        errors = measure_errors(self.passes, output, target_prediction, noisy_batch)
        return tuple(self.pair.weight * factor * error for error in errors)


def _draw_resolution(pair: LecoPair, rng: random.Random) -> tuple[int, int]:
    """Return height and width; with dynamic_resolution, draw a square side from half to full height."""
    if not pair.dynamic_resolution:
        return pair.height, pair.width
    sides = range(pair.height // 2 // RESOLUTION_STEP * RESOLUTION_STEP, pair.height + 1, RESOLUTION_STEP)
    side = rng.choice([side for side in sides if side] or [pair.height])
    return side, side


def _draw_size_conditions(pair: LecoPair, height: int, width: int, rng: random.Random) -> Tensor:
    """Draw SDXL size conditions, B 6 float32: original size, crop and target size, height first."""
    original, crop = (height, width), (0, 0)
    if pair.dynamic_crops:
        scale = rng.uniform(1, MAX_SCALE)
        original = (int(scale * height), int(scale * width))
        crop = (rng.randint(0, original[0] - height), rng.randint(0, original[1] - width))
    row = [*original, *crop, height, width]
    return torch.tensor([row] * pair.batch_size, dtype=torch.float32)


def _draw_noise(family: Trains, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return the initial noise on the CPU, as the family modifies it, for example with --noise_offset."""
    noise = torch.randn((count, *family.latent.shape(1, height, width)[1:]), generator=generator)
    if family.noise.vary_noise is not None:
        noise = family.noise.vary_noise(noise, torch.zeros_like(noise), generator)
    return noise
