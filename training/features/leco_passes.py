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
from training.data.feed import Randomness, seed_generator
from training.data.live import stack_texts
from training.features.encoded_captions import EncodedCaptions, encode_captions
from training.features.leco_file import LecoPair
from training.features.leco_options import LecoOptions
from training.loss import NoisyBatch
from training.targets.passes import StreamErrors, TrainingPasses, measure_errors

TRAINED_STEPS = 1000
RESOLUTION_STEP = 64
MAX_SCALE = 3.0  # with dynamic_crops: largest ratio of the original size to the size, as conditions


@dataclass(frozen=True)
class LecoTarget:
    """Teach the prompt pairs of a LECO file; holds the encoded prompts of each pair."""

    options: LecoOptions
    pairs: Sequence[LecoPair]
    captions: EncodedCaptions
    has_sizes: bool  # whether the model is given sizes and crops of images

    def make_conditions(self, prompt: str, sizes: Tensor, device: torch.device) -> Conditions:
        """Return the conditions of a prompt for B samples; `sizes`, B 6, are the size inputs of SDXL."""
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for name, value in self.captions.encoded[prompt].items():
            stacked = stack_texts([value] * len(sizes), name in self.captions.variable_length)
            on_device = [item.to(device) for item in stacked] if isinstance(stacked, list) else stacked
            conditions[name] = on_device if isinstance(on_device, list) else on_device.to(device)
        if self.has_sizes:
            conditions[SIZES] = sizes
        return conditions


@dataclass(frozen=True)
class Walk:
    """The DDPM schedule with which latents are denoised. Source: Ho et al. 2020, arXiv 2006.11239."""

    noise: NoiseSpec
    num_steps: int

    def timestep(self, index: int) -> int:
        """Return the timestep of denoising step `index`; that of the last step is 0."""
        return (self.num_steps - 1 - index) * (TRAINED_STEPS // self.num_steps)

    def step(self, index: int, output: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents after a step of DDPM (Ho et al. 2020), which goes one timestep towards clean.

        Args:
            index: Index of the step.
            output: Output of the network, noise or v, B C F h w.
            x: Latents before the step.
            generator: Draws the noise of the step.
        """
        time = self.timestep(index)
        previous = time - TRAINED_STEPS // self.num_steps
        data_fraction = 1 - self.noise.table[time] ** 2  # fraction of the variance that is data
        # at the next timestep towards clean; "before" in the order in which noise is added
        data_fraction_before = 1 - self.noise.table[previous] ** 2 if previous >= 0 else 1.0
        noise_fraction = 1 - data_fraction / data_fraction_before
        if self.noise.predicts_v:
            clean = data_fraction**0.5 * x - (1 - data_fraction) ** 0.5 * output
        else:
            clean = (x - (1 - data_fraction) ** 0.5 * output) / data_fraction**0.5
        mean = (
            data_fraction_before**0.5 * noise_fraction * clean
            + (1 - noise_fraction) ** 0.5 * (1 - data_fraction_before) * x
        )
        mean = mean / (1 - data_fraction)
        if time == 0:
            return mean
        drawn = torch.randn(x.shape, generator=generator).to(x)
        return mean + ((1 - data_fraction_before) / (1 - data_fraction) * noise_fraction) ** 0.5 * drawn


def encode_pairs(
    family: Family, options: LecoOptions, pairs: Sequence[LecoPair], device: torch.device
) -> LecoTarget:
    """Encode all prompts of the pairs, one encoder after the other. Raises OptionError if one is missing."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.texts))
    captions = encode_captions(family, texts, device)
    return LecoTarget(options, pairs, captions, family.latent.has_size_conditions)


def weigh_equally(_: Randomness, noisy_batch: NoisyBatch) -> NoisyBatch:
    """Return a batch with loss weights of 1, because the passes draw other noise levels."""
    return replace(noisy_batch, weights=torch.ones_like(noisy_batch.weights))


def leco_passes(
    target: LecoTarget,
    at_strength: Callable[[float], AbstractContextManager[None]],
    passes: TrainingPasses,
    noisy_batch: NoisyBatch,
) -> Iterator[StreamErrors]:
    """Yield the error of one pair: |f(target) - (b(neutral) +- g (b(positive) - b(opposite)))|^2.

    b is the base model, and f the model with the LoRA at the pair's strength; + enhances, - erases. Both get
    latents that f has partly denoised from pure noise, for a random number of steps. The strength stays set
    until the caller has computed the gradients.
    """
    generator = random.Random(derive_seed(passes.rule.seed, "leco", noisy_batch.number))
    pair = target.pairs[generator.randrange(len(target.pairs))]
    num_steps = target.options.max_denoising_steps
    num_done = generator.randrange(1, num_steps)
    height, width = _draw_resolution(pair, generator)
    sizes = _draw_sizes(pair, height, width, generator)
    step = PairStep(target, pair, passes, sizes, noisy_batch)
    with at_strength(pair.multiplier):
        passes.reset_network_seed(noisy_batch)
        with torch.set_grad_enabled(target.options.leco_walk_gradients):
            x = step.make_latents(num_done, height, width)
    # the timestep at which so many of the steps have been done
    time = TRAINED_STEPS - 1 - num_done * TRAINED_STEPS // num_steps
    goal = step.make_goal(x, time)
    with at_strength(pair.multiplier):
        passes.reset_network_seed(noisy_batch)
        yield step.measure(x, time, goal)


@dataclass(frozen=True)
class PairStep:
    """One training step on a pair of prompts."""

    target: LecoTarget
    pair: LecoPair
    passes: TrainingPasses
    sizes: Tensor  # B 6: original size, crop and size of the images that latents stand for
    noisy_batch: NoisyBatch  # batch of the training loop, for its number and device

    @property
    def _noise(self) -> NoiseSpec:
        return self.passes.family.noise

    def predict(self, prompt: str, x: Tensor, time: int) -> Tensor:
        """Return the network's output for a prompt, B C F h w float32."""
        timesteps = torch.full((len(x),), float(time), device=x.device)
        set_levels(self.passes.dit, torch.full_like(timesteps, self._noise.table[time]))
        conditions = self.target.make_conditions(prompt, self.sizes, x.device)
        with self.passes.autocast():
            return self.passes.family.predict(self.passes.dit, x, timesteps, conditions).float()

    def make_latents(self, num_done: int, height: int, width: int) -> Tensor:
        """Denoise pure noise for `num_done` steps of the schedule; return the latents, B C F h w."""
        generator = seed_generator(self.passes.rule.seed, "leco noise", self.noisy_batch.number)
        noise = _draw_noise(self.passes.family, self.pair.batch_size, height, width, generator)
        x = noise.to(self.noisy_batch.noise.device)
        options = self.target.options
        walk = Walk(self._noise, options.max_denoising_steps)
        for index in range(num_done):
            time = walk.timestep(index)
            opposite = self.predict(self.pair.unconditional, x, time)
            toward = self.predict(self.pair.target, x, time)
            guided = opposite + options.leco_denoise_guidance_scale * (toward - opposite)
            x = walk.step(index, guided, x, generator)
        return x

    def make_goal(self, x: Tensor, time: int) -> Tensor:
        """Return the target for the prediction of prompt `target`, from passes of the base model."""
        assert self.passes.rule.as_base is not None  # only LoRAs are trained with LECO
        with torch.no_grad(), self.passes.rule.as_base():
            positive = self.predict(self.pair.positive, x, time)
            neutral = self.predict(self.pair.neutral, x, time)
            opposite = self.predict(self.pair.unconditional, x, time)
        return neutral + self.pair.sign * self.pair.guidance_scale * (positive - opposite)

    def measure(self, x: Tensor, time: int, goal: Tensor) -> StreamErrors:
        """Return how far the network's prediction for prompt `target` is from `goal`.

        Errors are multiplied by the pair's weight and the factor of the noise level.

        Args:
            x: Noisy latents.
            time: Timestep of x.
            goal: The learned prediction.

        Returns:
            The error of each sample, B, in a tuple with one entry for images, and one for any audio.
        """
        output = self.predict(self.pair.target, x, time)
        numbers = torch.ones(len(x), device=x.device)
        seen = replace(
            self.noisy_batch, noise=x, sigmas=self._noise.table[time] * numbers, timesteps=time * numbers
        )
        factor = self._noise.loss_factors[time] if self._noise.loss_factors else 1.0
        errors = measure_errors(self.passes, output, goal, seen)
        return tuple(self.pair.weight * factor * error for error in errors)


def _draw_resolution(pair: LecoPair, rng: random.Random) -> tuple[int, int]:
    """Return height and width; with dynamic_resolution, draw a square side from half to full height."""
    if not pair.dynamic_resolution:
        return pair.height, pair.width
    sides = range(pair.height // 2 // RESOLUTION_STEP * RESOLUTION_STEP, pair.height + 1, RESOLUTION_STEP)
    side = rng.choice([side for side in sides if side] or [pair.height])
    return side, side


def _draw_sizes(pair: LecoPair, height: int, width: int, rng: random.Random) -> Tensor:
    """Draw size conditions of B images, B 6 float32: original size, crop and target size, height first."""
    original, crop = (height, width), (0, 0)
    if pair.dynamic_crops:
        scale = rng.uniform(1, MAX_SCALE)
        original = (int(scale * height), int(scale * width))
        crop = (rng.randint(0, original[0] - height), rng.randint(0, original[1] - width))
    row = [*original, *crop, height, width]
    return torch.tensor([row] * pair.batch_size, dtype=torch.float32)


def _draw_noise(family: Trains, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return the initial noise on the CPU, with the family's changes such as --noise_offset."""
    noise = torch.randn((count, *family.latent.shape(1, height, width)[1:]), generator=generator)
    if family.noise.vary is not None:
        noise = family.noise.vary(noise, torch.zeros_like(noise), generator)
    return noise
