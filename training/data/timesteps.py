"""Choose how noisy each training sample is: draw timesteps, and weight losses.

Letters: u is uniform in 0..1, n standard normal, t the fraction of noise (sigma). Every sampler is a function
of one number per sample, so draws can be spread evenly by spreading u.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    TRUNCATED_LOGIT,
    TimestepOptions,
)

SCAN = 10_000  # evenly spaced numbers u that are tried to find the part of a sampler that is accepted
_IDEOGRAM_SIDE = 16 / 512  # a token is 16 pixels wide, and Ideogram 4's shift is 1 at 512 pixels
_IDEOGRAM_TOKENS = (256, 16384)  # tokens of images with sides of 256 and 2048 pixels
_FOUR_PIXELS = (1, 1, 1, 2, 2)  # shape of latents, B C F H W, that are one token in most models
ROUNDING_TOLERANCE = 1e-6  # tolerance in timesteps for rounding errors: 0.57 * 1000 is 569.9999999999999


@dataclass(frozen=True)
class Timesteps:
    """Noise levels of one micro-batch, as float32 tensors of shape B on the CPU."""

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
    noise: NoiseSpec = FLOW,
    shape: Sequence[int] = (),
    experts: Sequence[Expert] = ONE_EXPERT,
) -> Timesteps:
    """Draw one timestep per sample of a micro-batch, all of them for the same expert.

    The first sample is drawn from the full distribution, and its noise level decides the expert, so that each
    expert is chosen with its true probability. Samples that belong to another expert are drawn again within
    the range of the first sample's expert. Each sample by itself follows the sampler's distribution.

    With --num_timestep_buckets N, every N consecutive samples take one of each of N equal parts.

    Args:
        options: Options of the timesteps.
        batch_size: Number of samples in the micro-batch.
        generator: Generator on the CPU, made for this micro-batch.
        seed: Seed of the run; used with --num_timestep_buckets only.
        first_sample: Number of samples drawn before this micro-batch; used with --num_timestep_buckets only.
        noise: Noise conventions of the family.
        shape: Shape of the latents, B C F H W, for a shift that depends on the size.
        experts: Experts of the run. A level belongs to the expert that runs there in generation; levels below
            the lowest expert are not trained.

    Raises:
        OptionError: If the sampler draws almost nothing between --min_timestep and --max_timestep, or in the
            range of an expert.
    """
    flow_shift = find_shift(options, noise, shape)
    lowest = min(experts, key=lambda expert: expert.lowest)
    uniform = functools.partial(torch.rand, batch_size, generator=generator, dtype=torch.float64)
    # no draw is rejected
    accepts_all = not options.preserve_distribution_shape and lowest.lowest <= 0
    low, high = 0.0, 1.0  # range of the uniform numbers
    if not accepts_all:
        any_expert = replace(lowest, highest=math.inf)  # covers the ranges of all experts
        low, high = find_accepted_range(options, noise, flow_shift, any_expert)

    # fractions are noise levels from 0 (clean) to 1, which samplers compute from uniform numbers u
    def fractions_between(u: Tensor, low: float, high: float) -> Tensor:
        return fractions_of_uniform(options, low + u * (high - low), noise, flow_shift)

    def draw_again(fractions: Tensor, expert: Expert, low: float, high: float) -> Tensor:
        """Replace samples that the expert does not accept, until all are accepted."""
        while True:
            fits = is_accepted(options, fractions, noise, expert)
            if fits.all():
                return fractions
            fractions = torch.where(fits, fractions, fractions_between(uniform(), low, high))

    u = uniform()
    if options.num_timestep_buckets is not None:
        if first_sample is None:
            raise ValueError("with num_timestep_buckets the number of the first sample is needed")
        u = _in_buckets(u, options.num_timestep_buckets, seed, first_sample)
    fractions = fractions_between(u, low, high)
    if not accepts_all:
        fractions = draw_again(fractions, any_expert, low, high)
    if len(experts) == 1:
        return times_at(options, fractions, noise)
    first_level = NUM_TIMESTEPS * float(fractions[0])
    index = _select_expert(first_level, experts, options=options, noise=noise, flow_shift=flow_shift)
    expert = experts[index]
    fractions = draw_again(fractions, expert, *find_accepted_range(options, noise, flow_shift, expert))
    return replace(times_at(options, fractions, noise), expert=index)


def _select_expert(
    level: float, experts: Sequence[Expert], *, options: TimestepOptions, noise: NoiseSpec, flow_shift: float
) -> int:
    """Return the index of the expert of a noise level.

    If the range or the shift of a table leaves an expert less than one of SCAN draws, which is too few to
    fill a batch, the other expert gets the batch.
    """
    index = expert_at(level, experts)
    # experts that the run's distribution reaches at all
    with_draws = [
        expert_index
        for expert_index, expert in enumerate(experts)
        if _has_draws(options, noise, flow_shift=flow_shift, expert=expert)
    ]
    return index if index in with_draws or not with_draws else with_draws[0]


@functools.cache
def _has_draws(options: TimestepOptions, noise: NoiseSpec, flow_shift: float, expert: Expert) -> bool:
    return len(scan(options, noise, flow_shift, expert)[0]) > 0


def find_shift(options: TimestepOptions, noise: NoiseSpec, shape: Sequence[int]) -> float:
    """Return the shift for sampling timesteps: --discrete_flow_shift, or e^mu if it depends on the size.

    mu grows linearly with the number of tokens (`SIZE_SHIFTS`), or with its logarithm (`ideogram_shift`).

    Raises:
        OptionError: If --timestep_sampling depends on the size but the model's shift does not, or counts
            tokens differently.
    """
    if not options.follows_size:
        return options.flow_shift
    if noise.tokens is None:
        raise OptionError(
            f"--timestep_sampling {options.timestep_sampling}: the shift of this model does not follow the "
            "size. "
            "Use shift with --discrete_flow_shift"
        )
    # FLUX.2 has a token for each latent pixel, FLUX.1 one for 2 x 2
    if options.timestep_sampling == "flux2_shift" and noise.tokens(_FOUR_PIXELS) != 4:
        raise OptionError(
            "--timestep_sampling flux2_shift: it counts each latent pixel, as FLUX.2 does. Use flux_shift, "
            "which counts the tokens of this model"
        )
    tokens = noise.tokens(shape)
    if options.timestep_sampling == IDEOGRAM_SHIFT:
        return ideogram_shift(tokens)
    if options.timestep_sampling == SHIFTED_LOGIT:
        return _require_shifted_logit(noise).shift(tokens)
    return size_shift(tokens, *_mu_line_of(options))


def ideogram_shift(tokens: int) -> float:
    """Return the flow shift of Ideogram 4 for an image of this many tokens of 16 x 16 pixels.

    mu = 0.5 ln(pixels / 512^2), so the shift e^mu is the ratio of the sides of square images. Tokens of other
    models are counted in the same way, whatever their size. Source: the open trainers of Ideogram 4.
    """
    return math.sqrt(tokens) * _IDEOGRAM_SIDE


def _require_shifted_logit(noise: NoiseSpec) -> ShiftedLogit:
    assert noise.shifted_logit is not None, "only scripts of models that have it offer this sampler"
    return noise.shifted_logit


def _mu_line_of(options: TimestepOptions) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return the two (tokens, mu) points of `SIZE_SHIFTS` that define the line of the sampler's mu."""
    sampler = options.timestep_sampling
    if sampler == "nextdit_shift":
        return SIZE_SHIFTS["flux_shift"]
    if sampler in MIXTURES:
        return SIZE_SHIFTS[MIXTURES[sampler][0][0]]
    return SIZE_SHIFTS[sampler]


def fractions_of_uniform(options: TimestepOptions, u: Tensor, noise: NoiseSpec, flow_shift: float) -> Tensor:
    """Apply `noise_fractions` to uniform numbers, or to their normal quantiles if the sampler takes those.

    --timestep_focus P with a range from LOW to HIGH (in thousandths) makes a mixture: numbers u below P
    become the noise fraction (LOW + (HIGH - LOW) u / P) / 1000, and for the other ones the sampler gets
    (u - P) / (1 - P). The range refers to final noise levels, after any shift of the sampler.
    """
    if options.timestep_focus is not None:
        return _focus_fractions(options, options.timestep_focus, u.double(), noise, flow_shift=flow_shift)
    return sample_fractions(options, u, noise, flow_shift)


def sample_fractions(options: TimestepOptions, u: Tensor, noise: NoiseSpec, flow_shift: float) -> Tensor:
    """Map uniform numbers to noise fractions with the sampler, without --timestep_focus."""
    u = u.double().clamp(1e-9, 1 - 1e-9)
    return noise_fractions(options, torch.special.ndtri(u) if takes_normal(options) else u, noise, flow_shift)


def _focus_fractions(
    options: TimestepOptions, focus: float, u: Tensor, noise: NoiseSpec, *, flow_shift: float
) -> Tensor:
    """Map uniform numbers `u` to noise fractions with --timestep_focus, B float64."""
    low, high = options.timestep_focus_range
    in_range = (low + (high - low) * u / focus) / NUM_TIMESTEPS
    unfocused = sample_fractions(options, (u - focus) / (1 - focus), noise, flow_shift)
    return torch.where(u < focus, in_range, unfocused)


def takes_normal(options: TimestepOptions) -> bool:
    """Return whether the sampler maps a normally distributed number, not a uniform one."""
    by_weighting = options.timestep_sampling == "sigma" and options.weighting_scheme == "logit_normal"
    return by_weighting or options.timestep_sampling in {
        "sigmoid",
        "shift",
        "logsnr",
        IDEOGRAM_SHIFT,
        *SIZE_SHIFTS,
    }


def noise_fractions(options: TimestepOptions, draws: Tensor, noise: NoiseSpec, flow_shift: float) -> Tensor:
    """Return the noise fraction t, or the position in the family's table of noise levels: B float64, 0..1.

    Args:
        options: Options of the run.
        draws: Random draws, B: standard normal if `takes_normal`, else uniform in 0..1.
        noise: Noise conventions of the family.
        flow_shift: Shift from `find_shift`.
    """
    match options.timestep_sampling:
        case "sigma":  # applies the bounds of the timesteps itself
            return _from_table(options, draws, noise)
        case "uniform":
            t = draws
        case "sigmoid":
            t = torch.sigmoid(options.sigmoid_scale * draws)
        case name if name == "shift" or name in SIZE_SHIFTS:
            t = shift_sigmas(torch.sigmoid(options.sigmoid_scale * draws), flow_shift)
        case name if name == IDEOGRAM_SHIFT:
            t = shift_sigmas(torch.sigmoid(IDEOGRAM_SCALE * draws), flow_shift)
        case "qinglong_flux" | "qinglong_qwen":
            t = _sample_mixture(options, draws, flow_shift)
        case "nextdit_shift":
            t = shift_sigmas(draws.clamp(min=1e-7), flow_shift)
        case "shifted_logit_normal":
            t = _shifted_logit_normal(_require_shifted_logit(noise), draws, options.sigmoid_scale, flow_shift)
        case "logsnr":
            t = _from_logsnr(options.logit_mean, options.logit_std, draws)
        case name if name == TRUNCATED_LOGIT:
            assert noise.cut_logit is not None, "only scripts of models that have it offer this sampler"
            t = _truncated_logit_normal(noise.cut_logit, draws)
        case other:
            raise ValueError(f"unknown timestep sampling {other}")
    # squeeze all draws into the bounds; otherwise the caller rejects those outside
    if not options.preserve_distribution_shape:
        t = t * (options.highest - options.lowest) / NUM_TIMESTEPS + options.lowest / NUM_TIMESTEPS
    return t


def times_at(options: TimestepOptions, fractions: Tensor, noise: NoiseSpec = FLOW) -> Timesteps:
    """Return sigmas and timesteps at these noise fractions.

    Without a table, the sigma is the fraction after the family's base shift, and the timestep is 1000 sigma
    plus the family's offset. With a table, the timestep is the index of the table's entry.

    Args:
        options: Options of the run.
        fractions: Fractions of noise, B, 0..1; for a family with a table of sigmas, positions in the table.
        noise: Noise conventions of the family.
    """
    if noise.table:
        # the fraction t in ((i - 1) / 1000, i / 1000] is entry i - 1 of the table
        entries = (NUM_TIMESTEPS * fractions.double() - ROUNDING_TOLERANCE).ceil() - 1
        indices = entries.clamp(0, NUM_TIMESTEPS - 1).long()
        sigmas = torch.tensor(noise.table)[indices]
        return Timesteps(sigmas, indices.float(), levels=sigmas)
    # the sampler `sigma` already draws whole timesteps, and needs no offset
    offset = 0 if options.timestep_sampling == "sigma" else noise.training_offset
    shifted = fractions.double()
    if noise.base_shift != 1:
        shifted = shift_sigmas(shifted, noise.base_shift)
    timesteps = NUM_TIMESTEPS * shifted + offset
    timesteps = (timesteps + ROUNDING_TOLERANCE).floor() if noise.integer_timesteps else timesteps
    return Timesteps(shifted.float(), timesteps.float(), levels=fractions.float())


def times_of_audio(times: Timesteps, noise: NoiseSpec) -> Timesteps:
    """Return the noise levels of the audio in clips whose images have the noise levels `times`."""
    if noise.audio_shift == 1:
        return times
    # computed from the levels, because sigmas of images near 1 have lost digits
    sigmas = shift_sigmas(times.levels.double(), noise.base_shift * noise.audio_shift)
    timesteps = NUM_TIMESTEPS * sigmas + noise.training_offset
    return replace(times, sigmas=sigmas.float(), timesteps=timesteps.float())


def is_in_range(options: TimestepOptions, fractions: Tensor, noise: NoiseSpec = FLOW) -> Tensor:
    """Return a mask of the noise fractions between --min_timestep and --max_timestep: B bool.

    For the sampler `sigma` these bounds count from the noisy end.
    """
    fractions = fractions.float().double()
    if options.timestep_sampling == "sigma":
        if noise.table_is_shifted:
            fractions = shift_sigmas(fractions, 1 / options.flow_shift)
        index = (NUM_TIMESTEPS - NUM_TIMESTEPS * fractions).round()
        return (index >= options.lowest) & (index < options.highest)
    timesteps = NUM_TIMESTEPS * fractions
    return (timesteps >= options.lowest) & (timesteps <= options.highest)


def is_accepted(options: TimestepOptions, fractions: Tensor, noise: NoiseSpec, expert: Expert) -> Tensor:
    """Return which drawn noise levels may be used, B bool.

    A level must lie in the range of the expert and, with --preserve_distribution_shape, between the minimum
    and maximum timestep: the latter rejects draws instead of squeezing them into the range.

    Args:
        options: Options of the timestep distribution.
        fractions: Fraction of noise of each draw, B, 0..1.
        noise: Noise conventions of the family.
        expert: The network that the batch trains, with its range of timesteps.
    """
    levels = NUM_TIMESTEPS * fractions.double()
    fits = (levels >= expert.lowest) & (levels < expert.highest)
    return fits & is_in_range(options, fractions, noise) if options.preserve_distribution_shape else fits


@functools.cache
def find_accepted_range(
    options: TimestepOptions, noise: NoiseSpec, flow_shift: float, expert: Expert = ONE_EXPERT[0]
) -> tuple[float, float]:
    """Return the smallest range of u that contains all accepted draws, slightly widened.

    If u is drawn from this range, few draws are rejected.

    Raises:
        OptionError: If no draw is accepted.
    """
    accepted, _ = scan(options, noise, flow_shift, expert)
    is_table = options.timestep_sampling == "sigma"
    if not len(accepted) and expert.name:
        raise OptionError(
            f"no timestep of this run reaches the {expert.words}, which is trained from {expert.lowest:g} "
            f"{'on' if expert.highest == math.inf else f'to {expert.highest:g}'}: of {SCAN} draws of "
            f"--timestep_sampling {options.timestep_sampling} none lies there. Leave this transformer out, "
            "or change --min_timestep, --max_timestep, --discrete_flow_shift (or the dataset's keys of these "
            "names) or --timestep_boundary"
            + (". This sampler counts the first two from the noisy end" if is_table else "")
        )
    if not len(accepted):
        raise OptionError(
            f"--min_timestep {options.lowest} --max_timestep {options.highest}: of {SCAN} draws of "
            "--timestep_sampling "
            f"{options.timestep_sampling} none lies between. Widen the range or leave out "
            "--preserve_distribution_shape."
        )
    return max(0.0, float(accepted.min()) - 1 / SCAN), min(1.0, float(accepted.max()) + 1 / SCAN)


def spread_evenly() -> Tensor:
    """Return SCAN evenly spread numbers between 0 and 1, float64."""
    return (torch.arange(SCAN, dtype=torch.float64) + 0.5) / SCAN


def scan(
    options: TimestepOptions, noise: NoiseSpec, flow_shift: float, expert: Expert = ONE_EXPERT[0]
) -> tuple[Tensor, Tensor]:
    """Map SCAN evenly spaced numbers u to noise fractions; return the accepted u and their fractions."""
    u = spread_evenly()
    fractions = fractions_of_uniform(options, u, noise, flow_shift)
    fits = is_accepted(options, fractions, noise, expert)
    return u[fits], fractions[fits]


def levels_reached(several: Sequence[TimestepOptions], noise: NoiseSpec) -> tuple[float, float]:
    """Estimate the lowest and the highest noise level that a run draws, in thousandths.

    Args:
        several: Timestep options of each table, which may differ.
        noise: Noise conventions of the family.
    """
    drawn = []
    for options in several:
        # 1 stands for shifts that follow the size, which is not known here
        flow_shift = 1.0 if options.follows_size else options.flow_shift
        drawn.append(scan(options, noise, flow_shift)[1])  # fractions of evenly spaced, accepted draws
    fractions = torch.cat(drawn)
    if not len(fractions):
        return 0.0, 0.0
    return NUM_TIMESTEPS * float(fractions.min()), NUM_TIMESTEPS * float(fractions.max())


def is_reached(options: TimestepOptions, noise: NoiseSpec, expert: Expert) -> bool:
    """Return whether the timestep options draw any noise level within an expert's range.

    If the shift depends on the image size, its smallest and its largest value are tried.
    """
    return any(len(scan(options, noise, shift, expert)[0]) for shift in _list_shifts(options))


def _list_shifts(options: TimestepOptions) -> list[float]:
    """Return the flow shift, or for samplers that depend on the size, the smallest and the largest shift."""
    if options.timestep_sampling == IDEOGRAM_SHIFT:
        return [ideogram_shift(tokens) for tokens in _IDEOGRAM_TOKENS]
    if not options.follows_size or options.timestep_sampling == SHIFTED_LOGIT:
        return [options.flow_shift]
    return [math.exp(mu) for _, mu in _mu_line_of(options)]


def check_reaches(several: Sequence[TimestepOptions], noise: NoiseSpec, experts: Sequence[Expert]) -> None:
    """Raise OptionError if an expert would never be trained.

    Args:
        several: Timestep options of each table, which may differ.
        noise: Noise conventions of the family.
        experts: Networks of the model, with their noise levels.
    """
    for expert in experts:
        if not any(is_reached(options, noise, expert) for options in several):
            find_accepted_range(several[0], noise, _list_shifts(several[0])[0], expert)


def loss_weights(options: TimestepOptions, times: Timesteps, exactly: bool = False) -> Tensor:
    """Return the weight of each sample's loss, B float32 (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Timesteps are rounded to 1..1000. With `exactly`, the noise fraction is used unrounded but is at least a
    thousandth, because some weights divide by it.
    """
    # noise in thousandths
    counted = NUM_TIMESTEPS * times.sigmas.double() if exactly else times.timesteps.double().round()
    sigmas = counted.clamp(1, NUM_TIMESTEPS) / NUM_TIMESTEPS
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
    """Return t from a mixture of samplers: the uniform number of each sample selects one of them.

    The number's position within the range of the selected sampler is uniform too, so it is that sampler's
    input.
    """
    t = torch.zeros_like(draws)
    start = 0.0
    for sampler, share in MIXTURES[options.timestep_sampling]:
        # position within this sampler's part of 0..1, as a uniform number
        uniform = ((draws - start) / share).clamp(1e-9, 1 - 1e-9)
        normal = torch.special.ndtri(uniform)
        match sampler:
            case "logsnr":
                drawn = _from_logsnr(options.logit_mean, options.logit_std, normal)
            case "rare":
                drawn = _from_logsnr(RARE_MEAN, RARE_STD, normal)
            case _:
                drawn = shift_sigmas(torch.sigmoid(options.sigmoid_scale * normal), flow_shift)
        # samplers that follow replace this one's values from their own start on
        t = torch.where(draws >= start, drawn, t)
        start += share
    return t


def _shifted_logit_normal(
    rule: ShiftedLogit, uniform_numbers: Tensor, scale: float, flow_shift: float
) -> Tensor:
    """Return the noise fractions t of the sampler shifted_logit_normal, B, from `uniform_numbers`, B.

    The lowest of these numbers select the uniform share of the draws, the others the shifted logit-normal.
    """
    uniform_fraction = rule.uniform_share if rule.is_stretched else 0.0

    # ndtri maps quantiles to standard normal numbers
    def logit(quantiles: Tensor) -> Tensor:
        return shift_sigmas(torch.sigmoid(scale * torch.special.ndtri(quantiles)), flow_shift)

    # the clamp keeps the quantiles off 0 and 1, whose normal numbers are infinite
    t = logit(((uniform_numbers - uniform_fraction) / (1 - uniform_fraction)).clamp(1e-9, 1 - 1e-9))
    if rule.is_stretched:
        # stretch t so that these two quantiles become 0 and 1; values below the minimum are mirrored
        low, high = logit(torch.tensor([0.005, 0.999], dtype=torch.float64))
        t = (t - low) / (high - low)
        t = torch.where(t < rule.minimum, 2 * rule.minimum - t, t).clamp(0, 1)
        uniform = rule.minimum + (1 - rule.minimum) * uniform_numbers / max(uniform_fraction, 1e-9)
        t = torch.where(uniform_numbers < uniform_fraction, uniform, t)
    return t


def _truncated_logit_normal(rule: CutLogit, draws: Tensor) -> Tensor:
    """Map uniform `draws`, B, to noise levels of cut_logit_normal, whole thousandths above 0."""
    uniform = rule.uniform_share  # the fraction of the levels that is drawn uniformly
    cut = torch.tensor(rule.cut, dtype=torch.float64)
    below_cut = torch.special.ndtr((torch.logit(cut) - rule.mean) / rule.std)  # fraction of the distribution
    quantiles = ((draws - uniform) / (1 - uniform) * below_cut).clamp(1e-12, 1 - 1e-12)
    t = torch.sigmoid(rule.mean + rule.std * torch.special.ndtri(quantiles)) / rule.cut
    t = torch.where(draws < uniform, draws / max(uniform, 1e-9), t)
    return (NUM_TIMESTEPS * t).ceil().clamp(1, NUM_TIMESTEPS) / NUM_TIMESTEPS


def _from_table(options: TimestepOptions, draws: Tensor, noise: NoiseSpec) -> Tensor:
    """Return t of the sampler `sigma`: it draws an index into 1000 ... 1, to which the bounds apply."""
    match options.weighting_scheme:
        case "logit_normal":
            u = torch.sigmoid(options.logit_mean + options.logit_std * draws)
        case "mode":  # of Esser et al. 2024, as `logit_normal`
            u = 1 - draws - options.mode_scale * (torch.cos(math.pi * draws / 2) ** 2 - 1 + draws)
        case _:
            u = draws
    low, high = (
        (0, NUM_TIMESTEPS) if options.preserve_distribution_shape else (options.lowest, options.highest)
    )
    # as sd-scripts does: index 0 is the noisiest entry, so that bounds count from the noisy end
    index = (u * (high - low) + low).floor().clamp(0, NUM_TIMESTEPS - 1)
    sigmas = (NUM_TIMESTEPS - index) / NUM_TIMESTEPS
    return shift_sigmas(sigmas, options.flow_shift) if noise.table_is_shifted else sigmas


def _in_buckets(u: Tensor, num_buckets: int, seed: int, first_sample: int) -> Tensor:
    """Stratify uniform numbers: move each u into one of `num_buckets` equal intervals of 0..1.

    Every `num_buckets` consecutive samples use each interval once, in an order seeded by (seed, round).
    """
    spread = torch.empty_like(u)
    orders: dict[int, Tensor] = {}
    for i in range(len(u)):
        round_index, position = divmod(first_sample + i, num_buckets)
        if round_index not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "timestep buckets", round_index))
            orders[round_index] = torch.randperm(num_buckets, generator=generator)
        spread[i] = (orders[round_index][position] + u[i]) / num_buckets
    return spread
