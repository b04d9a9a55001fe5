"""One call of the U-Net as the denoising loop sees it, and classifier-free guidance."""
# Letters: B pictures, R rows of one call, L tokens, C width, h w latent size

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.contract.data import Conditions
from modules.contract.steps import NO_TWEAKS, Guidance, Predict, Section, Step, Tweaks
from stable_diffusion.contract import Idea, Model, TextState, UnetCall
from stable_diffusion.samplers import SchedulerSolver

# names in the conditions of a pass, with a batch dimension
CONTEXT = "context"  # B L C
POOLED = "text_embeds"  # B C, of SDXL; both names are the U-Net's
SIZES = "time_ids"  # B 6, of SDXL
IS_NEGATIVE = "is_negative"  # B, on the CPU: 1 in rows of negative and empty texts


@dataclass(frozen=True, eq=False)
class UnetPasses:
    """`Passes` of the denoising loop: the samples are B 4 1 h w, and the U-Net's output is unchanged."""

    model: Model
    sampler: SchedulerSolver
    pictures: int  # B
    ideas: Sequence[Idea] = ()  # each sees the call as those before it left it
    # B 5 h w: mask and masked picture, which the U-Net of an inpainting checkpoint sees beside the sample
    beside: Tensor | None = None

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Return the U-Net's noise or v, R 4 1 h w, float32. `timesteps`: R, all equal."""
        turn = tweaks.turn
        assert turn is not None  # the loop sets it
        call = UnetCall(
            step=turn.step,
            num_steps=turn.num_steps,
            timestep=turn.timestep,
            sample=self.sampler.model_input(self.sampler.first + turn.step, noisy.squeeze(2)),
            context=_tensor(cond, CONTEXT),
            pictures=self.pictures,
            negative_rows=int(_tensor(cond, IS_NEGATIVE).sum()),
            added={name: _tensor(cond, name) for name in (POOLED, SIZES) if name in cond},
        )
        for idea in self.ideas:
            call = idea(call)
        return self._call(dit, call).float().unsqueeze(2)

    def _call(self, unet: nn.Module, call: UnetCall) -> Tensor:
        dtype = self.model.dtype
        sample = call.sample
        if self.beside is not None:
            passes = len(sample) // self.pictures
            sample = torch.cat([sample, self.beside.repeat(passes, 1, 1, 1)], dim=1)
        others: dict[str, Any] = {}
        if call.residuals is not None:
            skips, middle = call.residuals
            others["down_block_additional_residuals"] = tuple(skip.to(dtype) for skip in skips)
            others["mid_block_additional_residual"] = middle.to(dtype)
        (said,) = unet(
            sample.to(dtype),
            torch.full((len(sample),), call.timestep, device=sample.device),
            encoder_hidden_states=call.context.to(dtype),
            added_cond_kwargs=dict(call.added) or None,
            return_dict=False,
            **others,
        )
        return said


def _tensor(conditions: Conditions, name: str) -> Tensor:
    value = conditions[name]
    assert isinstance(value, Tensor)
    return value


def make_conditions(
    states: Sequence[TextState], device: torch.device, sizes: Tensor | None = None, negative: bool = False
) -> Conditions:
    """Return the conditions of one pass.

    states: one for each picture, of equal lengths. sizes: 1 6, of SDXL.
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
    """Whether negative texts count. As in diffusers' pipelines a scale below 1 is the same as 1."""
    return scale > 1 or negative_scale is not None


def make_guidance(scale: float, negative_scale: float | None) -> Guidance:
    """Return classifier-free guidance: u + s (c - u), u of the negative text, c of the prompt.

    With negative_scale k the empty text r comes in: r + s (c - r) - k (u - r). Without negative conditions
    it is the prompt's pass alone. Source: Ho and Salimans 2022, arXiv 2207.12598.
    """

    def guide(step: Step, predict: Predict, section: Section) -> Tensor:
        positive, negative, blank = section.positive, section.negative, section.blank
        if negative is None:
            (prompted,) = predict(positive)
            return prompted
        if blank is None or negative_scale is None:
            prompted, avoided = predict(positive, negative)
            return avoided + scale * (prompted - avoided)
        prompted, avoided, empty = predict(positive, negative, blank)
        return empty + scale * (prompted - empty) - negative_scale * (avoided - empty)

    return guide
