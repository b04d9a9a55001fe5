"""Options of how noisy the training samples are, and how their losses are weighted."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import FREE
from modules.parser import refuse_values

# mu of a shift that follows the size: how many tokens and mu there, at two places of a straight line
SIZE_SHIFTS = {
    "flux_shift": ((256, 0.5), (4096, 1.15)),
    "qwen_shift": ((256, 0.5), (8192, 0.9)),
    "krea2_shift": ((256, 0.5), (6400, 1.15)),
}
# mixed samplers: shares of draws by a sampler, `RARE` for logsnr at nearly clean samples
RARE = "rare"
MIXTURES = {
    "qinglong_flux": (("flux_shift", 0.79), ("logsnr", 0.11), (RARE, 0.1)),
    "qinglong_qwen": (("qwen_shift", 0.95), (RARE, 0.05)),
}
RARE_MEAN, RARE_STD = 5.36, 1.0  # of the logarithm of the signal-to-noise ratio
PLAIN_SAMPLERS = ("sigma", "uniform", "sigmoid", "shift", "logsnr")
SAMPLERS = (*PLAIN_SAMPLERS, *SIZE_SHIFTS, *MIXTURES)
# other samplers whose shift follows the size
SIZE_SAMPLERS = ("nextdit_shift",)
NOT_BUILT = {
    "flux2_shift": "it counts the tokens of FLUX.2, whose latents are packed. Use flux_shift, which counts "
    "those of this model",
    "ideogram4_shift": "its formula is not published. Use flux_shift or shift",
}
WEIGHTINGS = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
WEIGHTS_OF_LOSS = ("cosmap", "sigma_sqrt")  # those that do not shape the draws
NUM_TIMESTEPS = 1000  # all supported models count time in thousandths
MOST_SHIFT = 1000  # beyond it every timestep is pure noise
# a sigmoid of these is 0 or 1 to seven digits
MOST_SCALE, MOST_LOGIT = 100, 16
MOST_BUCKETS = 1_000_000
MOST_PERTURBATION = 10  # beyond it latents are lost in the further noise


@dataclass(frozen=True)
class TimestepOptions:
    """Options of the distribution of timesteps and of the loss weights."""

    timestep_sampling: str
    flow_shift: float = field(metadata={"option": "discrete_flow_shift"})
    sigmoid_scale: float
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    min_timestep: int | None
    max_timestep: int | None
    preserve_distribution_shape: bool
    num_timestep_buckets: int | None
    show_timesteps: str | None = field(metadata=FREE)  # image, console: draw the distribution and exit

    def __post_init__(self) -> None:
        if not 0 < self.flow_shift <= MOST_SHIFT:
            raise OptionError(
                f"--discrete_flow_shift {self.flow_shift:g}: give a number above 0 and at most {MOST_SHIFT}; "
                "1 means no shift, 3 to 7 are usual"
            )
        if not 0 <= self.sigmoid_scale <= MOST_SCALE:
            raise OptionError(
                f"--sigmoid_scale {self.sigmoid_scale:g}: give a number from 0 to {MOST_SCALE}; 1 is usual"
            )
        check_at_least("--logit_std", self.logit_std, 0, "the width of the normal distribution")
        check_at_most("--logit_std", self.logit_std, MOST_LOGIT, "the width of the normal distribution")
        if not abs(self.logit_mean) <= MOST_LOGIT:
            raise OptionError(
                f"--logit_mean {self.logit_mean:g}: give a number from -{MOST_LOGIT} to {MOST_LOGIT}; 0 is "
                "usual"
            )
        if not abs(self.mode_scale) <= MOST_LOGIT:
            raise OptionError(
                f"--mode_scale {self.mode_scale:g}: give a number from -{MOST_LOGIT} to {MOST_LOGIT}; 1.29 "
                "is usual"
            )
        check_at_most(
            "--num_timestep_buckets", self.num_timestep_buckets, MOST_BUCKETS, "10 to 1000 are usual"
        )
        check_at_least(
            "--num_timestep_buckets", self.num_timestep_buckets, 1, "leave it out for independent draws"
        )
        if not 0 <= self.lowest < self.highest <= NUM_TIMESTEPS:
            raise OptionError(
                f"--min_timestep {self.lowest} --max_timestep {self.highest}: need 0 <= min < max <= "
                f"{NUM_TIMESTEPS}"
            )

    @property
    def follows_size(self) -> bool:
        """Return whether the shift depends on width and height of what is trained."""
        return self.timestep_sampling in {*SIZE_SHIFTS, *MIXTURES, *SIZE_SAMPLERS}

    @property
    def lowest(self) -> int:
        """Return the lower bound in thousandths."""
        return 0 if self.min_timestep is None else self.min_timestep

    @property
    def highest(self) -> int:
        """Return the upper bound in thousandths."""
        return NUM_TIMESTEPS if self.max_timestep is None else self.max_timestep


@dataclass(frozen=True)
class NoiseOptions:
    """What is mixed into the latents beside the noise that the model has to find."""

    ip_noise_gamma: float | None  # share of further noise in the input; None: none
    ip_noise_gamma_random_strength: bool  # each sample draws its share, from 0 to --ip_noise_gamma

    def __post_init__(self) -> None:
        check_at_least("--ip_noise_gamma", self.ip_noise_gamma, 0, "0.1 is usual")
        check_at_most("--ip_noise_gamma", self.ip_noise_gamma, MOST_PERTURBATION, "0.1 is usual")
        if self.ip_noise_gamma_random_strength and self.ip_noise_gamma is None:
            raise OptionError(
                "--ip_noise_gamma_random_strength draws a share of --ip_noise_gamma: give both, 0.1 is usual"
            )


PLAIN_NOISE = NoiseOptions(None, False)


def add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `NoiseOptions`."""
    group = parser.add_argument_group("noise")
    group.add_argument(
        "--ip_noise_gamma",
        type=float,
        help="input perturbation: this share of further noise is mixed in, which the model does not have to "
        "predict; 0.1 is usual (arXiv 2301.11706)",
    )
    group.add_argument(
        "--ip_noise_gamma_random_strength",
        action="store_true",
        help="draw the share for each sample, from 0 to --ip_noise_gamma",
    )


def add_timestep_arguments(parser: argparse.ArgumentParser, samplers: Sequence[str] = SAMPLERS) -> None:
    """Add the arguments of `TimestepOptions`. samplers: those that the family can use."""
    group = parser.add_argument_group("timesteps and loss weights")
    sampling = group.add_argument(
        "--timestep_sampling",
        default="sigma",
        choices=samplers,
        help="how timesteps are drawn; the shift of flux_shift, qwen_shift, krea2_shift and of the "
        "qinglong mixtures grows with width and height",
    )
    refuse_values(sampling, NOT_BUILT)
    group.add_argument(
        "--discrete_flow_shift",
        type=float,
        default=1.0,
        help="time shift of --timestep_sampling shift; for image models also of sigma; no other sampler uses "
        "it",
    )
    group.add_argument(
        "--sigmoid_scale",
        type=float,
        default=1.0,
        help="factor on the normal number of sigmoid and all shifts",
    )
    group.add_argument(
        "--weighting_scheme",
        default="none",
        choices=WEIGHTINGS,
        help="logit_normal and mode shape the draws of --timestep_sampling sigma; cosmap and sigma_sqrt "
        "weight the loss",
    )
    group.add_argument(
        "--logit_mean", type=float, default=0.0, help="mean of logit_normal, logsnr, qinglong_flux"
    )
    group.add_argument(
        "--logit_std", type=float, default=1.0, help="width of logit_normal, logsnr, qinglong_flux"
    )
    group.add_argument("--mode_scale", type=float, default=1.29, help="scale of the weighting scheme mode")
    group.add_argument(
        "--min_timestep",
        type=int,
        help="lower bound, 0 to 999; with --timestep_sampling sigma it counts from the noisy end",
    )
    group.add_argument(
        "--max_timestep",
        type=int,
        help="upper bound, 1 to 1000; with --timestep_sampling sigma it counts from the noisy end",
    )
    group.add_argument(
        "--preserve_distribution_shape",
        action="store_true",
        help="draw again outside min_timestep..max_timestep instead of squeezing the range",
    )
    group.add_argument(
        "--num_timestep_buckets",
        type=int,
        help="spread the draws evenly: each run of N samples takes one from each of N equal parts, shuffled",
    )
    group.add_argument(
        "--show_timesteps",
        choices=("image", "console"),
        help="show the distribution of timesteps and weights, then exit",
    )
