"""Samplers (diffusers' schedulers as solvers of the denoising loop), U-Net calls and guidance."""

# Letters: B images, R rows of one call: B for each pass, L tokens, C width, h w latent size

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modules.errors import OptionError
from modules.flow.schedule import Schedule
from protocols.data import Conditions
from protocols.steps import NO_OVERRIDES, Guidance, Overrides, Predict, Section, Step
from stable_diffusion.contract import Model, TextState, UnetCall, UnetHook
from stable_diffusion.diffusers_parts import rescale_zero_terminal_snr, scheduler_class
from stable_diffusion.sampling_options import TRAINED_STEPS

# noise schedule that all Stable Diffusion models were trained with
TRAINED: Mapping[str, Any] = {
    "num_train_timesteps": TRAINED_STEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LMS = "lms_discrete.LMSDiscreteScheduler"
# sampler -> module and class in diffusers, and the settings that differ from the class's defaults
_SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("ddim.DDIMScheduler", {}),
    "pndm": ("pndm.PNDMScheduler", {}),
    "lms": (LMS, {}),
    "euler": ("euler_discrete.EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral_discrete.EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete.HeunDiscreteScheduler", {}),
    "dpm_2": ("k_dpm_2_discrete.KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler", {}),
    # this algorithm cannot step to a noise level of 0
    "dpmsolver": (
        "dpmsolver_multistep.DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("dpmsolver_multistep.DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    # the class would turn this on by itself and log a message
    "dpmsingle": ("dpmsolver_singlestep.DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}


def make_scheduler(
    sampler: str, predicts_velocity: bool, zero_terminal_snr: bool = False, steps_offset: int = 1
) -> Any:
    """Return the diffusers scheduler of a --sampler, with its class's defaults for everything else.

    Args:
        sampler: Value of --sampler.
        predicts_velocity: Whether the network predicts v.
        zero_terminal_snr: Whether the last timestep of training is pure noise and sampling begins there, with
            timesteps spaced from the end. It is only for models that predict v, because predicted noise says
            nothing about a sample of pure noise (Lin et al. 2023, arXiv 2305.08891).
        steps_offset: Lowest timestep, for scheduler classes with this setting.
    """
    class_name, class_settings = _SCHEDULERS[sampler.removeprefix("k_")]
    scheduler_type = scheduler_class(class_name)
    parameters = inspect.signature(scheduler_type.__init__).parameters
    prediction = "v_prediction" if predicts_velocity else "epsilon"
    settings = {**TRAINED, **class_settings, "prediction_type": prediction}
    # settings of only some classes
    optional_settings: dict[str, Any] = {"steps_offset": steps_offset, "clip_sample": False}
    if zero_terminal_snr:
        optional_settings |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        if "rescale_betas_zero_snr" not in parameters:
            settings["trained_betas"] = _make_zero_snr_betas()
    settings |= {name: value for name, value in optional_settings.items() if name in parameters}
    with _no_warnings_to_developers():
        scheduler = scheduler_type(**settings)
    if class_name == LMS:  # diffusers' class needs scipy, which may not be installed
        scheduler.get_lms_coefficient = partial(_compute_lms_coefficient, scheduler)
    return scheduler


def _compute_lms_coefficient(scheduler: Any, order: int, index: int, steps_ago: int) -> float:
    """Return LMS's weight of the derivative from `steps_ago` steps ago (0 is the latest)."""
    # This integrates over the step the Lagrange polynomial that is 1 at this derivative's noise level and 0
    # at the other derivatives' levels. Three Gauss points are exact, because the degree is at most 3.
    start, end = (float(scheduler.sigmas[sigma_index]) for sigma_index in (index, index + 1))
    levels = [float(scheduler.sigmas[index - back]) for back in range(order)]
    points, weights = np.polynomial.legendre.leggauss(3)
    levels_at_points = (start + end) / 2 + (end - start) / 2 * points
    factors = []
    for back, level in enumerate(levels):
        if back != steps_ago:
            factors.append((levels_at_points - level) / (levels[steps_ago] - level))
    return float((end - start) / 2 * (weights * np.prod(factors, axis=0)).sum())


@contextmanager
def _no_warnings_to_developers() -> Iterator[None]:
    """Hide diffusers' FutureWarning and DeprecationWarning, which are of no use to users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def check_sampling(zero_terminal_snr: bool, predicts_velocity: bool) -> None:
    """Raise OptionError if --zero_terminal_snr is used with a model that does not predict v."""
    if zero_terminal_snr and not predicts_velocity:
        raise OptionError(
            "--zero_terminal_snr needs a model that predicts v, but this one predicts noise. Omit it, "
            "or add --v_parameterization if the model was trained that way"
        )


def _make_zero_snr_betas() -> list[float]:
    """Return betas with almost no signal at the last timestep (2^-24), like diffusers' schedulers."""
    low, high = (float(TRAINED[name]) ** 0.5 for name in ("beta_start", "beta_end"))
    betas = rescale_zero_terminal_snr(torch.linspace(low, high, TRAINED["num_train_timesteps"]) ** 2)
    before = float((1 - betas[:-1]).double().prod())
    betas[-1] = 1 - 2**-24 / before
    return [float(beta) for beta in betas]


MIN_SQUARED_ALPHA = 2**-24  # squared fraction of data at the last timestep
MakeStep = Callable[[int, Tensor, Tensor], Tensor]  # index, velocity, sample -> next sample


@dataclass
class SchedulerSolver:
    """Adapt a diffusers scheduler to the denoising loop for one batch; samples are B 4 1 h w.

    All random numbers of a step come from each image's own generator, so no image depends on its batch.
    """

    scheduler: Any
    generators: Sequence[torch.Generator]  # one for each image, on the CPU
    first_index: int = 0  # the index in `schedule` at which denoising begins
    # wraps a step, and gets the scheduler's own step as an argument; None for the plain step
    wrap_step: Callable[[MakeStep, int, Tensor, Tensor], Tensor] | None = None

    @cached_property
    def schedule(self) -> Schedule:
        """Return the scheduler's noise levels and timesteps; some samplers have several per step."""
        timesteps = self.scheduler.timesteps.float()
        indices = timesteps.long().clamp(0, TRAINED["num_train_timesteps"] - 1).to("cpu")
        alphas_cumprod = self.scheduler.alphas_cumprod.to("cpu").double()[indices]
        last_alpha = torch.ones(1, dtype=torch.float64)  # after the last step: no noise
        return Schedule(
            torch.cat([(1 - alphas_cumprod).sqrt(), 0 * last_alpha]).float(),
            timesteps,
            torch.cat([alphas_cumprod.sqrt(), last_alpha]),
        )

    @property
    def step_timesteps(self) -> tuple[float, ...]:
        """Return the timestep at which each step begins; a step may call the network several times."""
        timesteps: list[float] = self.schedule.timesteps.tolist()
        return tuple(timesteps[:: int(self.scheduler.order)])

    @property
    def noise_level(self) -> float:
        """Standard deviation of the initial noise."""
        return float(self.scheduler.init_noise_sigma)

    def model_input(self, index: int, sample: Tensor) -> Tensor:
        """Return a sample, B 4 h w, scaled for the U-Net at a schedule index."""
        return self.scheduler.scale_model_input(sample, self.scheduler.timesteps[index])

    def add_noise(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        """Add noise to clean latents, B 4 h w, at the noise level before step `index`.

        Only call it before the first step, with index `first`, or right after a step, with the next index.
        """
        return self.scheduler.add_noise(latents, noise, self.scheduler.timesteps[index : index + 1])

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Take one scheduler step and return the next sample.

        Args:
            index: Index of the step.
            velocity: Output of the U-Net: predicted noise or v.
            sample: Noisy latents, B 4 1 h w.
        """
        if self.wrap_step is None:
            return self._step(index, velocity, sample)
        return self.wrap_step(self._step, index, velocity, sample)

    def _step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        settings = {"generator": list(self.generators)} if self._draws else {}
        timestep = self.scheduler.timesteps[index]
        (moved, *_) = self.scheduler.step(
            velocity.squeeze(2), timestep, sample.squeeze(2), return_dict=False, **settings
        )
        return moved.float().unsqueeze(2)

    @cached_property
    def _draws(self) -> bool:
        return "generator" in inspect.signature(self.scheduler.step).parameters


def count_skipped_steps(steps: int, strength: float | None) -> int | None:
    """Return the number of initial steps that image-to-image skips; None without an input image.

    Args:
        steps: Number of steps.
        strength: Fraction of the steps to run, rounded down to whole steps. None without an input image.
    """
    return None if strength is None else steps - min(int(steps * strength), steps)


def begin_sampling(
    scheduler: Any, steps: int, generators: Sequence[torch.Generator], num_skipped: int | None = None
) -> SchedulerSolver:
    """Reset a scheduler, set its number of steps, and return its solver.

    If all steps are skipped, the solver starts at `schedule.num_steps`.

    Args:
        scheduler: Scheduler of diffusers.
        steps: Number of steps.
        generators: Generator of each image.
        num_skipped: Number of steps that image-to-image skips; None to begin from noise.
    """
    if "skip_prk_steps" in scheduler.config:  # only PNDM has this setting
        # its Runge-Kutta steps only work from pure noise; diffusers' inpainting skips them too
        scheduler.register_to_config(skip_prk_steps=num_skipped is not None)
    with _no_warnings_to_developers():
        scheduler.set_timesteps(steps, device="cpu")  # CPU: no step waits for the device
    if num_skipped == steps:
        return SchedulerSolver(scheduler, generators, len(scheduler.timesteps))
    # a scheduler of order 2 calls the U-Net twice per step, and counts both calls
    first = (num_skipped or 0) * int(scheduler.order)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return SchedulerSolver(scheduler, generators, first)


@dataclass
class ScaledSolver:
    """Solver for one image around a diffusers scheduler, for U-Nets that take scaled samples.

    The denoising loop works with the scaled sample; the unscaled one is stored here.
    """

    solver: SchedulerSolver
    sample: Tensor  # 1 4 1 h w, not scaled for the U-Net
    noise: Tensor  # 1 4 1 h w, with standard deviation 1
    predicts_v: bool = False
    from_noise: bool = False  # whether the start latents are pure noise, without an image

    @property
    def schedule(self) -> Schedule:
        """Noise schedule of the wrapped solver."""
        return self.solver.schedule

    def begin(self, clean: Tensor) -> tuple[Tensor, int]:
        """Return the initial latents, scaled for the U-Net, and the index of the first step.

        Args:
            clean: Clean latents of the image, 1 4 1 h w.
        """
        first = self.solver.first_index
        if self.from_noise:
            return self.scaled_sample(first), first
        noisy = self.solver.add_noise(first, clean.squeeze(2), self.noise.to(clean).squeeze(2))
        self.sample = noisy.unsqueeze(2)
        return self.scaled_sample(first), first

    def clean(self, sigma: float, noisy: Tensor, output: Tensor) -> Tensor:
        """Predict clean latents from the U-Net's output at a noise level.

        Args:
            sigma: Noise level.
            noisy: Input of the U-Net.
            output: Output of the U-Net: noise or v.
        """
        share = max(1 - sigma**2, MIN_SQUARED_ALPHA) ** 0.5  # fraction of data in the sample
        return share * noisy - sigma * output if self.predicts_v else (noisy - sigma * output) / share

    def scaled_sample(self, index: int) -> Tensor:
        """Return the current sample, 1 4 1 h w, scaled for the U-Net at a schedule index."""
        return self.solver.model_input(index, self.sample.squeeze(2)).unsqueeze(2)

    def step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Take one step; return the next sample scaled for the U-Net or, after the last step, the result."""
        del sample  # scaled for the U-Net; the scheduler needs the unscaled one
        self.sample = self.solver.step(index, velocity, self.sample.to(velocity.device))
        return self.scaled_sample(index + 1) if index + 1 < self.schedule.num_steps else self.sample


# One call of the U-Net as the denoising loop sees it, and classifier-free guidance.
# names in the conditions of a pass, with a batch dimension
CONTEXT = "context"  # B L C
POOLED = "text_embeds"  # B C, of SDXL; both names are the U-Net's
SIZES = "time_ids"  # B 6, of SDXL
IS_NEGATIVE = "is_negative"  # B, on the CPU: 1 in rows of negative and empty texts


@dataclass(frozen=True, eq=False)
class UnetPasses:
    """Adapt the U-Net to the denoising loop; samples are B 4 1 h w, and noise or v is not converted."""

    model: Model
    sampler: SchedulerSolver
    hooks: Sequence[UnetHook] = ()  # each gets the call that the previous one returned
    # B 5 h w: mask and masked image, which the U-Net of an inpainting checkpoint takes with the sample
    inpainting: Tensor | None = None

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Call the U-Net; return noise or v, R 4 1 h w, float32. R is images * guidance passes."""
        step = overrides.step_position  # index of this step, number of steps, and timestep
        assert step is not None  # the loop sets it
        call = UnetCall(
            step=step.step,
            num_steps=step.num_steps,
            timestep=step.timestep,
            sample=self.sampler.model_input(self.sampler.first_index + step.step, noisy.squeeze(2)),
            context=_tensor(cond, CONTEXT),
            negative_rows=int(_tensor(cond, IS_NEGATIVE).sum()),
            added={name: _tensor(cond, name) for name in (POOLED, SIZES) if name in cond},
        )
        for hook in self.hooks:
            call = hook(call)
        dtype = self.model.dtype
        sample = call.sample
        if self.inpainting is not None:
            num_passes = len(sample) // len(self.inpainting)  # guidance passes that are batched in this call
            sample = torch.cat([sample, self.inpainting.repeat(num_passes, 1, 1, 1)], dim=1)
        (output,) = dit(
            sample.to(dtype),
            torch.full((len(sample),), call.timestep, device=sample.device),
            encoder_hidden_states=call.context.to(dtype),
            added_cond_kwargs=dict(call.added) or None,
            return_dict=False,
            **_pass_residuals(call, dtype),
        )
        return output.float().unsqueeze(2)


def _tensor(conditions: Conditions, name: str) -> Tensor:
    value = conditions[name]
    assert isinstance(value, Tensor)
    return value


def _pass_residuals(call: UnetCall, dtype: torch.dtype) -> dict[str, Any]:
    """Return the U-Net arguments that carry ControlNet residuals; {} without ControlNets."""
    if call.residuals is None:
        return {}
    skips, middle = call.residuals
    return {
        "down_block_additional_residuals": tuple(skip.to(dtype) for skip in skips),
        "mid_block_additional_residual": middle.to(dtype),
    }


def make_conditions(
    states: Sequence[TextState], device: torch.device, sizes: Tensor | None = None, negative: bool = False
) -> Conditions:
    """Return the conditions of one pass of the U-Net.

    Args:
        states: States of each image's text, of equal lengths.
        device: Device of the run.
        sizes: Sizes for SDXL, 1 6; None for other kinds.
        negative: Whether these are the conditions of the negative prompt.
    """
    conditions = {
        CONTEXT: torch.stack([state.context for state in states]).to(device),
        IS_NEGATIVE: torch.full((len(states),), int(negative)),
    }
    pooled = [state.pooled for state in states if state.pooled is not None]
    if pooled and sizes is not None:
        conditions[POOLED] = torch.stack(pooled).to(device)
        conditions[SIZES] = sizes.to(device).repeat(len(states), 1)
    return conditions


def is_guided(scale: float, negative_scale: float | None) -> bool:
    """Return whether negative prompts have an effect; a scale below 1 acts as 1, like in diffusers."""
    return scale > 1 or negative_scale is not None


def make_guidance(scale: float, negative_scale: float | None) -> Guidance:
    """Return classifier-free guidance: negative + scale * (prompt - negative), of the U-Net's predictions.

    With a negative_scale it is empty + scale * (prompt - empty) - negative_scale * (negative - empty), where
    empty is the prediction for the empty text. Without negative conditions, it is the prompt's prediction.
    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """

    def guide(step: Step, predict: Predict, section: Section) -> Tensor:
        if section.negative is None:
            (prompt,) = predict(section.positive)
            return prompt
        if section.blank is None or negative_scale is None:
            prompt, negative = predict(section.positive, section.negative)
            return negative + scale * (prompt - negative)
        prompt, negative, empty = predict(section.positive, section.negative, section.blank)
        return empty + scale * (prompt - empty) - negative_scale * (negative - empty)

    return guide
