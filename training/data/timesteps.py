"""Choose how noisy each training sample is: draw timesteps, and weight losses.

Letters: u is uniform in 0..1, n standard normal, t the fraction of noise (sigma). Every sampler is a function
of one number per sample, so draws can be spread evenly by spreading u.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from modules.errors import OptionError
from modules.flow.schedule import shift_sigmas, size_shift
from modules.seeds import derive_seed
from protocols.family import FLOW, NoiseSpec
from protocols.rules import ONE_EXPERT, CutLogit, Expert, ShiftedLogit, expert_at
from training.noise_options import (
    IDEOGRAM_SCALE,
    IDEOGRAM_SHIFT,
    MIXTURES,
    NUM_TIMESTEPS,
    RARE_MEAN,
    RARE_STD,
    SHIFTED_LOGIT,
    SIZE_SHIFTS,
    TimestepOptions,
)

NUM_SCANNED_DRAWS = (
    10_000  # evenly spaced numbers u that are tried to find the part of a sampler that is accepted
)
_IDEOGRAM_SIDE = 16 / 512  # a token is 16 pixels wide, and Ideogram 4's shift is 1 at 512 pixels
_IDEOGRAM_TOKENS = (256, 16384)  # tokens of images with sides of 256 and 2048 pixels
_FOUR_PIXELS = (1, 1, 1, 2, 2)  # shape of latents, B C F H W, that are one token in most models
ROUNDING_TOLERANCE = 1e-6  # tolerance in timesteps for rounding errors: 0.57 * 1000 is 569.9999999999999


@dataclass(frozen=True)
class Timesteps:
    """Timesteps and noise levels of one micro-batch, as float32 tensors of shape B on the CPU."""

    sigmas: Tensor  # fraction of noise in the mixture, 0..1
    timesteps: Tensor  # input of the network
    levels: Tensor  # sigmas before `NoiseSpec.base_shift`: options refer to these
    expert: int = 0  # index of the expert that all samples go to


def draw(
    options: TimestepOptions,
    batch_size: int,
    generator: torch.Generator,
    seed: int = 0,
    first_sample: int | None = None,
    noise_spec: NoiseSpec = FLOW,
    shape: Sequence[int] = (),
    experts: Sequence[Expert] = ONE_EXPERT,
) -> Timesteps:
    """Draw one timestep per sample of a micro-batch, all of them for the same expert.

    The first sample is drawn from the full distribution, and its noise level decides the expert, so that each
    expert is chosen with its true probability. Samples that belong to another expert are drawn again within
    the range of the first sample's expert. Each sample by itself follows the sampler's distribution.

    With --num_timestep_buckets N, every N consecutive samples get one draw from each of N equal intervals of
    the accepted draws. With two experts this holds for micro-batches of one sample: samples that are drawn
    again for the first one's expert are independent.

    Args:
        options: Options of the timesteps.
        batch_size: Number of samples in the micro-batch.
        generator: Generator on the CPU, made for this micro-batch.
        seed: Seed of the run; used with --num_timestep_buckets only.
        first_sample: Number of samples drawn before this micro-batch; used with --num_timestep_buckets only.
        noise_spec: Noise conventions of the family.
        shape: Shape of the latents, B C F H W, for a shift that depends on the size.
        experts: Experts of the run. A level belongs to the expert used there in generation; levels below
            the lowest expert are not trained.

    Raises:
        OptionError: If the sampler draws almost nothing between --min_timestep and --max_timestep, or in the
            range of an expert.
    """
    flow_shift = find_shift(options, noise_spec, shape)
    lowest_expert = min(experts, key=lambda expert: expert.min_timestep)
    any_expert = replace(lowest_expert, max_timestep=math.inf)  # covers the ranges of all experts
    accepts_all_draws = not options.preserve_distribution_shape and lowest_expert.min_timestep <= 0
    low, high = 0.0, 1.0  # range of the uniform numbers u
    if not accepts_all_draws:
        low, high = find_accepted_range(options, noise_spec, flow_shift, any_expert)
    u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    if options.num_timestep_buckets is not None:
        if first_sample is None:
            raise ValueError("first_sample is required with num_timestep_buckets")
        u = _stratify(u, options.num_timestep_buckets, seed, first_sample)
    u = low + u * (high - low)
    if options.num_timestep_buckets is not None and not accepts_all_draws:
        # the equal parts are those of the accepted draws, which may have gaps: hardly a draw is rejected
        u = _skip_rejected(u, low, high, scan_draws(options, noise_spec, flow_shift, any_expert).u)
    fractions = map_uniform_to_fractions(options, u, noise_spec, flow_shift)
    redraw_rejected = functools.partial(
        _redraw_rejected, options, noise_spec=noise_spec, flow_shift=flow_shift, generator=generator
    )
    if not accepts_all_draws:
        fractions = redraw_rejected(fractions, any_expert)
    if len(experts) == 1:
        return times_at(options, fractions, noise_spec)
    first_level = NUM_TIMESTEPS * float(fractions[0])
    index = _select_expert(
        first_level, experts, options=options, noise_spec=noise_spec, flow_shift=flow_shift
    )
    fractions = redraw_rejected(fractions, experts[index])
    return replace(times_at(options, fractions, noise_spec), expert=index)


def _redraw_rejected(
    options: TimestepOptions,
    fractions: Tensor,
    expert: Expert,
    *,
    noise_spec: NoiseSpec,
    flow_shift: float,
    generator: torch.Generator,
) -> Tensor:
    """Redraw noise fractions that are not accepted for the expert, until all are."""
    low, high = find_accepted_range(options, noise_spec, flow_shift, expert)
    while True:
        accepted = is_accepted(options, fractions, noise_spec, expert)
        if accepted.all():
            return fractions
        u = torch.rand(len(fractions), generator=generator, dtype=torch.float64)
        redrawn = map_uniform_to_fractions(options, low + u * (high - low), noise_spec, flow_shift)
        fractions = torch.where(accepted, fractions, redrawn)


def _select_expert(
    level: float,
    experts: Sequence[Expert],
    *,
    options: TimestepOptions,
    noise_spec: NoiseSpec,
    flow_shift: float,
) -> int:
    """Return the index of the expert that runs at a noise level."""
    # If the timestep options give this expert fewer than one in NUM_SCANNED_DRAWS draws, too few to fill a
    # batch, the first expert with more draws is returned instead.
    index = expert_at(level, experts)
    indices_with_draws = [
        expert_index
        for expert_index, expert in enumerate(experts)
        if _has_draws(options, noise_spec, flow_shift=flow_shift, expert=expert)
    ]
    if index in indices_with_draws or not indices_with_draws:
        return index
    return indices_with_draws[0]


@functools.cache
def _has_draws(options: TimestepOptions, noise_spec: NoiseSpec, flow_shift: float, expert: Expert) -> bool:
    return len(scan_draws(options, noise_spec, flow_shift, expert).u) > 0


def find_shift(options: TimestepOptions, noise_spec: NoiseSpec, shape: Sequence[int]) -> float:
    """Return the shift for sampling timesteps: --discrete_flow_shift, or e^mu if it depends on the size.

    mu grows with the number of tokens (linearly, see `SIZE_SHIFTS`) or with its logarithm (see
    `ideogram_shift`); models with a `ShiftedLogit` have their own rule.

    Raises:
        OptionError: If --timestep_sampling depends on the size but the model's shift does not, or counts
            tokens differently.
    """
    if not options.follows_size:
        return options.flow_shift
    tokens = _count_tokens(options, noise_spec, shape)
    if options.timestep_sampling == IDEOGRAM_SHIFT:
        return ideogram_shift(tokens)
    if options.timestep_sampling == SHIFTED_LOGIT:
        return _require_shifted_logit(noise_spec).shift(tokens)
    return size_shift(tokens, *_get_mu_points(options))


def _count_tokens(options: TimestepOptions, noise_spec: NoiseSpec, shape: Sequence[int]) -> int:
    """Return the number of tokens of latents; raise OptionError if the sampler does not fit the model."""
    if noise_spec.count_tokens is None:
        raise OptionError(
            f"--timestep_sampling {options.timestep_sampling}: the shift of this model does not depend on "
            "the size. Use shift with --discrete_flow_shift"
        )
    # FLUX.2 has a token for each latent pixel, FLUX.1 one for 2 x 2
    if options.timestep_sampling == "flux2_shift" and noise_spec.count_tokens(_FOUR_PIXELS) != 4:
        raise OptionError(
            "--timestep_sampling flux2_shift counts each latent pixel as a token, as FLUX.2 does. Use "
            "flux_shift, which counts the tokens of this model"
        )
    return noise_spec.count_tokens(shape)


def ideogram_shift(tokens: int) -> float:
    """Return the flow shift of Ideogram 4 for an image of this many tokens of 16 x 16 pixels.

    mu = 0.5 ln(pixels / 512^2), so for square images the shift e^mu is their side divided by 512. Tokens of
    other models count as 16 x 16 pixels too, whatever their size. Source: the open trainers of Ideogram 4.
    """
    return math.sqrt(tokens) * _IDEOGRAM_SIDE


def _require_shifted_logit(noise_spec: NoiseSpec) -> ShiftedLogit:
    assert noise_spec.shifted_logit is not None, "only scripts of models that have it offer this sampler"
    return noise_spec.shifted_logit


def _get_mu_points(options: TimestepOptions) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return two (tokens, mu) points of `SIZE_SHIFTS`: the sampler's mu is linear in the token count."""
    sampler = options.timestep_sampling
    if sampler == "nextdit_shift":
        return SIZE_SHIFTS["flux_shift"]
    if sampler in MIXTURES:
        return SIZE_SHIFTS[MIXTURES[sampler][0][0]]
    return SIZE_SHIFTS[sampler]


def map_uniform_to_fractions(
    options: TimestepOptions, u: Tensor, noise_spec: NoiseSpec, flow_shift: float
) -> Tensor:
    """Apply `noise_fractions` to uniform numbers, or to their normal quantiles if the sampler takes those.

    --timestep_focus P with a range from LOW to HIGH (in thousandths) makes a mixture: numbers u below P
    become the noise fraction (LOW + (HIGH - LOW) u / P) / 1000, and for the other ones the sampler gets
    (u - P) / (1 - P). The range refers to final noise levels, after any shift of the sampler.
    """
    if options.timestep_focus is not None:
        return _focus_fractions(
            options, options.timestep_focus, u.double(), noise_spec, flow_shift=flow_shift
        )
    return sample_fractions(options, u, noise_spec, flow_shift)


def sample_fractions(options: TimestepOptions, u: Tensor, noise_spec: NoiseSpec, flow_shift: float) -> Tensor:
    """Map uniform numbers to noise fractions with the sampler, without --timestep_focus."""
    u = u.double().clamp(1e-9, 1 - 1e-9)
    return noise_fractions(
        options, torch.special.ndtri(u) if takes_normal_draws(options) else u, noise_spec, flow_shift
    )


def _focus_fractions(
    options: TimestepOptions, focus: float, u: Tensor, noise_spec: NoiseSpec, *, flow_shift: float
) -> Tensor:
    """Map uniform numbers `u`, B, to noise fractions, B float64, with --timestep_focus."""
    low, high = options.timestep_focus_range
    in_range = (low + (high - low) * u / focus) / NUM_TIMESTEPS
    unfocused = sample_fractions(options, (u - focus) / (1 - focus), noise_spec, flow_shift)
    return torch.where(u < focus, in_range, unfocused)


def takes_normal_draws(options: TimestepOptions) -> bool:
    """Return whether the timestep sampler takes normally distributed random numbers, not uniform ones."""
    by_weighting = options.timestep_sampling == "sigma" and options.weighting_scheme == "logit_normal"
    return by_weighting or options.timestep_sampling in {
        "sigmoid",
        "shift",
        "logsnr",
        IDEOGRAM_SHIFT,
        *SIZE_SHIFTS,
    }


def noise_fractions(
    options: TimestepOptions, draws: Tensor, noise_spec: NoiseSpec, flow_shift: float
) -> Tensor:
    """Map random draws to noise fractions with the sampler of --timestep_sampling: B float64, 0..1.

    For a family with a table of noise levels, the fractions are positions in the table.

    Args:
        options: Options of the run.
        draws: Random draws, B: standard normal if `takes_normal_draws`, else uniform in 0..1.
        noise_spec: Noise conventions of the family.
        flow_shift: Shift from `find_shift`.
    """
    match options.timestep_sampling:
        case "sigma":  # applies the bounds of the timesteps itself
            return _sample_sigma_timesteps(options, draws, noise_spec)
        case "uniform":
            t = draws
        case "sigmoid":
            t = torch.sigmoid(options.sigmoid_scale * draws)
        case "shift" | "flux_shift" | "flux2_shift" | "qwen_shift" | "krea2_shift":
            t = shift_sigmas(torch.sigmoid(options.sigmoid_scale * draws), flow_shift)
        case "ideogram4_shift":
            t = shift_sigmas(torch.sigmoid(IDEOGRAM_SCALE * draws), flow_shift)
        case "nextdit_shift":
            t = shift_sigmas(draws.clamp(min=1e-7), flow_shift)
        case "logsnr":
            t = _from_logsnr(options.logit_mean, options.logit_std, draws)
        case "qinglong_flux" | "qinglong_qwen":
            t = _sample_mixture(options, draws, flow_shift)
        case "shifted_logit_normal":
            rule = _require_shifted_logit(noise_spec)
            t = _shifted_logit_normal(rule, draws, options.sigmoid_scale, flow_shift)
        case "cut_logit_normal":
            assert noise_spec.cut_logit is not None, "only scripts of models that have it offer this sampler"
            t = _truncated_logit_normal(noise_spec.cut_logit, draws)
        case other:
            raise ValueError(f"unknown timestep sampling {other}")
    # squeeze all draws into the bounds; otherwise the caller rejects those outside
    if not options.preserve_distribution_shape:
        t = t * (options.highest - options.lowest) / NUM_TIMESTEPS + options.lowest / NUM_TIMESTEPS
    return t


def times_at(options: TimestepOptions, fractions: Tensor, noise_spec: NoiseSpec = FLOW) -> Timesteps:
    """Return sigmas and timesteps at these noise fractions.

    Without a table, the sigma is the fraction after the family's base shift, and the timestep is 1000 sigma
    plus the family's offset. With a table, the timestep is the index of the table's entry.

    Args:
        options: Options of the run.
        fractions: Fractions of noise, B, 0..1; for a family with a table of sigmas, positions in the table.
        noise_spec: Noise conventions of the family.
    """
    if noise_spec.table:
        # the fraction t in ((i - 1) / 1000, i / 1000] is entry i - 1 of the table
        entries = (NUM_TIMESTEPS * fractions.double() - ROUNDING_TOLERANCE).ceil() - 1
        indices = entries.clamp(0, NUM_TIMESTEPS - 1).long()
        sigmas = torch.tensor(noise_spec.table)[indices]
        return Timesteps(sigmas, indices.float(), levels=sigmas)
    # the sampler `sigma` already draws whole timesteps, and needs no offset
    offset = 0 if options.timestep_sampling == "sigma" else noise_spec.training_offset
    shifted = fractions.double()
    if noise_spec.base_shift != 1:
        shifted = shift_sigmas(shifted, noise_spec.base_shift)
    timesteps = NUM_TIMESTEPS * shifted + offset
    timesteps = (timesteps + ROUNDING_TOLERANCE).floor() if noise_spec.integer_timesteps else timesteps
    return Timesteps(shifted.float(), timesteps.float(), levels=fractions.float())


def shift_audio_timesteps(times: Timesteps, noise_spec: NoiseSpec) -> Timesteps:
    """Return the audio timesteps and noise levels that correspond to the video timesteps `times`."""
    if noise_spec.audio_shift == 1:
        return times
    # computed from the levels, because image sigmas near 1 have lost precision
    sigmas = shift_sigmas(times.levels.double(), noise_spec.base_shift * noise_spec.audio_shift)
    timesteps = NUM_TIMESTEPS * sigmas + noise_spec.training_offset
    return replace(times, sigmas=sigmas.float(), timesteps=timesteps.float())


def is_in_range(options: TimestepOptions, fractions: Tensor, noise_spec: NoiseSpec = FLOW) -> Tensor:
    """Return a mask of the noise fractions between --min_timestep and --max_timestep: B bool.

    For the sampler `sigma` these bounds count from the noisy end.
    """
    fractions = fractions.float().double()
    if options.timestep_sampling == "sigma":
        if noise_spec.table_is_shifted:
            fractions = shift_sigmas(fractions, 1 / options.flow_shift)
        index = (NUM_TIMESTEPS - NUM_TIMESTEPS * fractions).round()
        return (index >= options.lowest) & (index < options.highest)
    timesteps = NUM_TIMESTEPS * fractions
    return (timesteps >= options.lowest) & (timesteps <= options.highest)


def is_accepted(options: TimestepOptions, fractions: Tensor, noise_spec: NoiseSpec, expert: Expert) -> Tensor:
    """Return which drawn noise levels may be used, B bool.

    A level must lie in the range of the expert and, with --preserve_distribution_shape, between the minimum
    and maximum timestep: that option rejects draws instead of squeezing them into the range.

    Args:
        options: Options of the timestep distribution.
        fractions: Fraction of noise of each draw, B, 0..1.
        noise_spec: Noise conventions of the family.
        expert: The transformer that the batch trains, with its range of timesteps.
    """
    levels = NUM_TIMESTEPS * fractions.double()
    fits = (levels >= expert.min_timestep) & (levels < expert.max_timestep)
    return fits & is_in_range(options, fractions, noise_spec) if options.preserve_distribution_shape else fits


@functools.cache
def find_accepted_range(
    options: TimestepOptions, noise_spec: NoiseSpec, flow_shift: float, expert: Expert = ONE_EXPERT[0]
) -> tuple[float, float]:
    """Return the smallest range of u that contains all accepted draws, slightly widened.

    If u is drawn from this range, few draws are rejected.

    Raises:
        OptionError: If no draw is accepted.
    """
    accepted = scan_draws(options, noise_spec, flow_shift, expert).u
    if not len(accepted):
        raise _explain_no_draws(options, expert)
    margin = 1 / NUM_SCANNED_DRAWS
    return max(0.0, float(accepted.min()) - margin), min(1.0, float(accepted.max()) + margin)


def _explain_no_draws(options: TimestepOptions, expert: Expert) -> OptionError:
    """Return the error for a sampler that draws no noise level within the bounds or an expert's range."""
    sampler = options.timestep_sampling
    if not expert.name:
        return OptionError(
            f"--min_timestep {options.lowest} --max_timestep {options.highest}: of {NUM_SCANNED_DRAWS} draws "
            f"of --timestep_sampling {sampler} none lies between them. Widen the range or omit "
            "--preserve_distribution_shape."
        )
    end = "on" if expert.max_timestep == math.inf else f"to {expert.max_timestep:g}"
    hint = ". This sampler counts the first two from the noisy end" if sampler == "sigma" else ""
    return OptionError(
        f"no timestep of this run reaches the {expert.description}, which is trained from "
        f"{expert.min_timestep:g} {end}: of {NUM_SCANNED_DRAWS} draws of --timestep_sampling {sampler} none "
        "lies there. Omit this transformer, or change --min_timestep, --max_timestep, "
        "--discrete_flow_shift (or the dataset's keys of these names) or --timestep_boundary" + hint
    )


def spread_evenly() -> Tensor:
    """Return NUM_SCANNED_DRAWS evenly spaced numbers between 0 and 1, float64."""
    return (torch.arange(NUM_SCANNED_DRAWS, dtype=torch.float64) + 0.5) / NUM_SCANNED_DRAWS


class AcceptedDraws(NamedTuple):
    """Evenly spaced draws (NUM_SCANNED_DRAWS in all) whose noise levels an expert is trained on."""

    u: Tensor  # uniform numbers, 0..1
    fractions: Tensor  # noise fractions that the sampler maps them to


@functools.cache
def scan_draws(
    options: TimestepOptions, noise_spec: NoiseSpec, flow_shift: float, expert: Expert = ONE_EXPERT[0]
) -> AcceptedDraws:
    """Map evenly spaced u in 0..1 to noise fractions with the timestep sampler; return the accepted ones."""
    u = spread_evenly()
    fractions = map_uniform_to_fractions(options, u, noise_spec, flow_shift)
    accepted = is_accepted(options, fractions, noise_spec, expert)
    return AcceptedDraws(u[accepted], fractions[accepted])


def find_level_range(
    options_by_table: Sequence[TimestepOptions], noise_spec: NoiseSpec
) -> tuple[float, float]:
    """Estimate the lowest and the highest noise level that a run draws, in thousandths.

    Args:
        options_by_table: Timestep options of each table, which may differ.
        noise_spec: Noise conventions of the family.
    """
    table_fractions = []
    for options in options_by_table:
        # use 1 for shifts that depend on the size, which is not known here
        flow_shift = 1.0 if options.follows_size else options.flow_shift
        table_fractions.append(scan_draws(options, noise_spec, flow_shift).fractions)
    fractions = torch.cat(table_fractions)
    if not len(fractions):
        return 0.0, 0.0
    return NUM_TIMESTEPS * float(fractions.min()), NUM_TIMESTEPS * float(fractions.max())


def can_reach_expert(options: TimestepOptions, noise_spec: NoiseSpec, expert: Expert) -> bool:
    """Return whether the timestep options draw any noise level within an expert's range.

    If the shift depends on the image size, its smallest and its largest value are tried.
    """
    return any(
        len(scan_draws(options, noise_spec, shift, expert).u) for shift in _list_extreme_shifts(options)
    )


def _list_extreme_shifts(options: TimestepOptions) -> list[float]:
    """Return the flow shift; if it depends on the image size, its smallest and its largest value."""
    if options.timestep_sampling == IDEOGRAM_SHIFT:
        return [ideogram_shift(tokens) for tokens in _IDEOGRAM_TOKENS]
    if not options.follows_size or options.timestep_sampling == SHIFTED_LOGIT:
        return [options.flow_shift]
    return [math.exp(mu) for _, mu in _get_mu_points(options)]


def check_experts_reached(
    options_by_table: Sequence[TimestepOptions], noise_spec: NoiseSpec, experts: Sequence[Expert]
) -> None:
    """Raise OptionError if an expert would never be trained.

    Args:
        options_by_table: Timestep options of each table, which may differ.
        noise_spec: Noise conventions of the family.
        experts: Transformers of the model, each with its range of noise levels.
    """
    for expert in experts:
        if not any(can_reach_expert(options, noise_spec, expert) for options in options_by_table):
            options = options_by_table[0]
            find_accepted_range(options, noise_spec, _list_extreme_shifts(options)[0], expert)  # raises


def loss_weights(options: TimestepOptions, times: Timesteps, exact_sigmas: bool = False) -> Tensor:
    """Return the weight of each sample's loss, B float32 (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Weights depend on the timesteps, rounded to 1..1000, or with `exact_sigmas` on the sigmas, clamped to at
    least 0.001 because sigma_sqrt divides by them.
    """
    if exact_sigmas:
        thousandths = NUM_TIMESTEPS * times.sigmas.double()
    else:
        thousandths = times.timesteps.double().round()
    sigmas = thousandths.clamp(1, NUM_TIMESTEPS) / NUM_TIMESTEPS
    match options.weighting_scheme:
        case "sigma_sqrt":
            weights = sigmas**-2
        case "cosmap":
            weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
        case _:  # logit_normal and mode shape the draws instead
            weights = torch.ones_like(sigmas)
    return weights.float()


def _from_logsnr(mean: float, std: float, draws: Tensor) -> Tensor:
    """Return noise levels t with normally distributed log signal-to-noise ratio, log((1 - t)^2 / t^2)."""
    return torch.sigmoid(-(mean + std * draws) / 2)


def _sample_mixture(options: TimestepOptions, draws: Tensor, flow_shift: float) -> Tensor:
    """Return the noise fractions t of a mixture of samplers, B, from uniform `draws`, B."""
    # Each sampler has an interval of 0..1, as long as its share of the draws. A draw selects the sampler in
    # whose interval it lies; its position in the interval is a uniform number again, the sampler's input.
    t = torch.zeros_like(draws)
    start = 0.0  # of the sampler's interval
    for sampler, share in MIXTURES[options.timestep_sampling]:
        # the normal quantiles of 0 and 1 are infinite
        uniform = ((draws - start) / share).clamp(1e-9, 1 - 1e-9)
        normal = torch.special.ndtri(uniform)
        match sampler:
            case "logsnr":
                drawn = _from_logsnr(options.logit_mean, options.logit_std, normal)
            case "rare":
                drawn = _from_logsnr(RARE_MEAN, RARE_STD, normal)
            case _:
                drawn = shift_sigmas(torch.sigmoid(options.sigmoid_scale * normal), flow_shift)
        t = torch.where(draws >= start, drawn, t)  # later samplers replace the values of their intervals
        start += share
    return t


def _shifted_logit_normal(rule: ShiftedLogit, u: Tensor, scale: float, flow_shift: float) -> Tensor:
    """Return the noise fractions t of the sampler shifted_logit_normal, B, from uniform numbers u, B."""
    # 1. t is the shifted sigmoid of the normal quantile of u.
    # 2. If stretched, the 0.5 % and 99.9 % quantiles of t become 0 and 1, and values below the minimum are
    #    reflected at it.
    # 3. If stretched, the lowest u, a fraction `uniform_share` of all, become uniform t instead.
    # u is clamped, because the normal quantiles of 0 and 1 are infinite
    if not rule.is_stretched:
        return _logit_normal(u.clamp(1e-9, 1 - 1e-9), scale, flow_shift)
    share = rule.uniform_share
    t = _logit_normal(((u - share) / (1 - share)).clamp(1e-9, 1 - 1e-9), scale, flow_shift)
    low, high = _logit_normal(torch.tensor([0.005, 0.999], dtype=torch.float64), scale, flow_shift)
    t = (t - low) / (high - low)
    t = torch.where(t < rule.minimum, 2 * rule.minimum - t, t).clamp(0, 1)
    uniform_t = rule.minimum + (1 - rule.minimum) * u / max(share, 1e-9)
    return torch.where(u < share, uniform_t, t)


def _logit_normal(quantiles: Tensor, scale: float, flow_shift: float) -> Tensor:
    """Return noise fractions 0..1: the shifted sigmoid of `scale` times normal quantiles."""
    return shift_sigmas(torch.sigmoid(scale * torch.special.ndtri(quantiles)), flow_shift)


def _truncated_logit_normal(rule: CutLogit, draws: Tensor) -> Tensor:
    """Map uniform `draws`, B, to noise levels of a cut logit-normal, rounded up to thousandths."""
    share = rule.uniform_share  # the lowest draws, this fraction of them, become uniform levels
    cut = torch.tensor(rule.cut, dtype=torch.float64)
    below_cut = torch.special.ndtr((torch.logit(cut) - rule.mean) / rule.std)  # fraction of the distribution
    quantiles = ((draws - share) / (1 - share) * below_cut).clamp(1e-12, 1 - 1e-12)
    t = torch.sigmoid(rule.mean + rule.std * torch.special.ndtri(quantiles)) / rule.cut
    t = torch.where(draws < share, draws / max(share, 1e-9), t)
    return (NUM_TIMESTEPS * t).ceil().clamp(1, NUM_TIMESTEPS) / NUM_TIMESTEPS


def _sample_sigma_timesteps(options: TimestepOptions, draws: Tensor, noise_spec: NoiseSpec) -> Tensor:
    """Return t of --timestep_sampling sigma: 1, 0.999, ... 0.001, at an index drawn within the bounds."""
    match options.weighting_scheme:
        case "logit_normal":
            u = torch.sigmoid(options.logit_mean + options.logit_std * draws)
        case "mode":  # of Esser et al. 2024, as `logit_normal`
            u = 1 - draws - options.mode_scale * (torch.cos(math.pi * draws / 2) ** 2 - 1 + draws)
        case _:
            u = draws
    low, high = 0, NUM_TIMESTEPS
    if not options.preserve_distribution_shape:
        low, high = options.lowest, options.highest
    # as sd-scripts does: index 0 is the noisiest entry, so that bounds count from the noisy end
    index = (u * (high - low) + low).floor().clamp(0, NUM_TIMESTEPS - 1)
    sigmas = (NUM_TIMESTEPS - index) / NUM_TIMESTEPS
    return shift_sigmas(sigmas, options.flow_shift) if noise_spec.table_is_shifted else sigmas


def _skip_rejected(u: Tensor, low: float, high: float, accepted: Tensor) -> Tensor:
    """Map numbers u, spread over low..high, to the `accepted` ones of `spread_evenly`, in their order."""
    position = (u - low) / (high - low) * len(accepted)
    index = position.floor().clamp(0, len(accepted) - 1)
    return accepted[index.long()] + (position - index - 0.5) / NUM_SCANNED_DRAWS


def _stratify(u: Tensor, num_buckets: int, seed: int, first_sample: int) -> Tensor:
    """Stratify uniform numbers: move each u into one of `num_buckets` equal intervals of 0..1."""
    # Every `num_buckets` consecutive samples use each interval once, in an order seeded by (seed, round).
    spread = torch.empty_like(u)
    orders: dict[int, Tensor] = {}
    for i in range(len(u)):
        round_index, position = divmod(first_sample + i, num_buckets)
        if round_index not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "timestep buckets", round_index))
            orders[round_index] = torch.randperm(num_buckets, generator=generator)
        spread[i] = (orders[round_index][position] + u[i]) / num_buckets
    return spread
