"""Options of how noisy the training samples are, and how losses are measured and weighted."""

from modules.errors import OptionError
from modules.options import Options, option

# for samplers whose shift e^mu depends on the size: two (tokens, mu) points, between which mu is linear
SIZE_SHIFTS = {
    "flux_shift": ((256, 0.5), (4096, 1.15)),
    "flux2_shift": ((256, 0.5), (4096, 1.15)),
    "qwen_shift": ((256, 0.5), (8192, 0.9)),
    "krea2_shift": ((256, 0.5), (6400, 1.15)),
}
# mixtures of samplers: (sampler, fraction of the draws); `RARE` is logsnr at nearly clean samples
RARE = "rare"
MIXTURES = {
    "qinglong_flux": (("flux_shift", 0.79), ("logsnr", 0.11), (RARE, 0.1)),
    "qinglong_qwen": (("qwen_shift", 0.95), (RARE, 0.05)),
}
RARE_MEAN, RARE_STD = 5.36, 1.0  # mean and deviation of the logarithm of the signal-to-noise ratio
# sampler of Ideogram 4: the shift is the side of a square image over 512 pixels, and the sigmoid is wider
IDEOGRAM_SHIFT = "ideogram4_shift"
IDEOGRAM_SCALE = 1.5  # factor on the normal number before the sigmoid
PLAIN_SAMPLERS = ("sigma", "uniform", "sigmoid", "shift", "logsnr")
SAMPLERS = (*PLAIN_SAMPLERS, *SIZE_SHIFTS, IDEOGRAM_SHIFT, *MIXTURES)
# other samplers whose shift depends on the size, each for one model only
SHIFTED_LOGIT = "shifted_logit_normal"
SIZE_SAMPLERS = ("nextdit_shift", SHIFTED_LOGIT)
TRUNCATED_LOGIT = "cut_logit_normal"  # for one model only, whose rule is `NoiseSpec.cut_logit`
WEIGHTINGS = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
LOSS_WEIGHTINGS = ("cosmap", "sigma_sqrt")  # those that do not shape the draws
NUM_TIMESTEPS = 1000  # all supported models count time in thousandths
MAX_LOGIT = 16  # sigmoid(16) is 1 to seven digits


_IF_LOGIT_NORMAL = {
    "only --weighting_scheme logit_normal and --timestep_sampling logsnr use it": lambda options: (
        options.timestep_sampling in {"logsnr", "qinglong_flux"}
        or (options.timestep_sampling == "sigma" and options.weighting_scheme == "logit_normal")
    )
}


class TimestepOptions(Options, title="timesteps and loss weights"):
    """Options of the distribution of timesteps and of the loss weights."""

    timestep_sampling: str = option(
        "how timesteps are drawn; the shift of flux_shift, flux2_shift, ideogram4_shift, qwen_shift, "
        "krea2_shift and of the qinglong mixtures grows with width and height",
        default="sigma",
        choices=SAMPLERS,
        often=True,
    )
    flow_shift: float = option(
        "shift of --timestep_sampling shift; for image models also of sigma; no other sampler uses it",
        default=1.0,
        name="discrete_flow_shift",
        above=0,
        maximum=1000,
        hint="1 means no shift, 3 to 7 are usual",
        often=True,
    )
    sigmoid_scale: float = option(
        "factor on the normal number of sigmoid and all shifts",
        default=1.0,
        minimum=0,
        maximum=100,
        hint="1 is usual",
        acts_if={
            "only --timestep_sampling sigmoid and shift use it": lambda options: (
                options.timestep_sampling in {"sigmoid", "shift", *SIZE_SHIFTS, *MIXTURES}
            )
        },
    )
    weighting_scheme: str = option(
        "logit_normal and mode shape the draws of --timestep_sampling sigma; cosmap and sigma_sqrt "
        "weight the loss",
        default="none",
        choices=WEIGHTINGS,
    )
    logit_mean: float = option(
        "mean of logit_normal, logsnr, qinglong_flux",
        default=0.0,
        minimum=-MAX_LOGIT,
        maximum=MAX_LOGIT,
        hint="0 is usual",
        acts_if=_IF_LOGIT_NORMAL,
    )
    logit_std: float = option(
        "width of logit_normal, logsnr, qinglong_flux",
        default=1.0,
        minimum=0,
        maximum=MAX_LOGIT,
        hint="1 is usual",
        acts_if=_IF_LOGIT_NORMAL,
    )
    mode_scale: float = option(
        "scale of the weighting scheme mode",
        default=1.29,
        minimum=-MAX_LOGIT,
        maximum=MAX_LOGIT,
        hint="1.29 is usual",
        acts_if={
            "only --weighting_scheme mode uses it": lambda options: (
                options.timestep_sampling == "sigma" and options.weighting_scheme == "mode"
            ),
        },
    )
    min_timestep: int | None = option(
        "lower bound, 0 to 999; with --timestep_sampling sigma it counts from the noisy end"
    )
    max_timestep: int | None = option(
        "upper bound, 1 to 1000; with --timestep_sampling sigma it counts from the noisy end"
    )
    preserve_distribution_shape: bool = option(
        "redraw timesteps outside min_timestep..max_timestep instead of rescaling the distribution"
    )
    num_timestep_buckets: int | None = option(
        "stratified sampling: each run of N samples takes one timestep from each of N equal parts, shuffled; "
        "of two transformers only with batches of one sample",
        minimum=1,
        maximum=1_000_000,
        hint="omit it for independent draws, 10 to 1000 are usual",
    )
    timestep_focus: float | None = option(
        "draw this fraction of the samples from --timestep_focus_range",
        above=0,
        below=1,
        hint="0.3 to 0.6 are usual; for all samples use --timestep_sampling uniform with --min_timestep and "
        "--max_timestep",
        known_as=("h3_timestep_focus_prob",),
    )
    timestep_focus_range: tuple[int, int] = option(
        "noise levels of --timestep_focus, in thousandths",
        default=(400, 800),
        nargs=2,
        metavar=("LOW", "HIGH"),
        needs="timestep_focus",
        known_as=("h3_timestep_focus_min", "h3_timestep_focus_max"),
    )

    def __post_init__(self) -> None:
        """Raise OptionError if a range of timesteps is empty, or if a focus is combined with a window."""
        if not 0 <= self.lowest < self.highest <= NUM_TIMESTEPS:
            raise OptionError(
                f"--min_timestep {self.lowest} --max_timestep {self.highest}: need 0 <= min < max <= "
                f"{NUM_TIMESTEPS}"
            )
        low, high = self.timestep_focus_range  # checked even without --timestep_focus
        if not 0 <= low < high <= NUM_TIMESTEPS:
            raise OptionError(
                f"--timestep_focus_range {low} {high}: need 0 <= LOW < HIGH <= {NUM_TIMESTEPS}, thousandths "
                "of noise, such as 400 800"
            )
        if self.timestep_focus is not None and self.has_window:
            raise OptionError(
                f"--timestep_focus {self.timestep_focus:g} with --min_timestep {self.lowest} --max_timestep "
                f"{self.highest}: a window leaves levels out, and a focus draws from all of them, from some "
                "more often. Pass one of the two"
            )

    @property
    def has_window(self) -> bool:
        """Whether a minimum or maximum timestep is given."""
        return self.min_timestep is not None or self.max_timestep is not None

    @property
    def follows_size(self) -> bool:
        """Whether the timestep distribution depends on the latents' size, and so on the bucket."""
        return self.timestep_sampling in {*SIZE_SHIFTS, IDEOGRAM_SHIFT, *MIXTURES, *SIZE_SAMPLERS}

    @property
    def lowest(self) -> int:
        """Lower bound of the trained timesteps, 0 to 1000."""
        return 0 if self.min_timestep is None else self.min_timestep

    @property
    def highest(self) -> int:
        """Upper bound of the trained timesteps, 0 to 1000."""
        return NUM_TIMESTEPS if self.max_timestep is None else self.max_timestep


RAW, ADDITIVE, SIGMA_SCALED = "raw", "additive", "sigma_scaled"
PREDICTIONS = (RAW, ADDITIVE, SIGMA_SCALED)
# what --weighting_scheme computes the loss weight from: rounded timestep, exact sigma, or no weighting
TIMESTEP, SIGMA, NOTHING = "timestep", "sigma", "nothing"
WITH_THRESHOLD = ("huber", "smooth_l1")
_IF_HUBER = {
    "only --loss_type huber and smooth_l1 use it": lambda options: options.loss_type in WITH_THRESHOLD,
}


class LossOptions(Options, title="loss"):
    """Type of the loss, and the threshold above which Huber losses become linear."""

    loss_type: str = option(
        "l2: squared error; l1: absolute error; huber, smooth_l1: squared below a threshold, else absolute",
        default="l2",
        choices=("l1", "l2", "huber", "smooth_l1"),
        refused={"mse": "it is called l2 here", "mae": "it is called l1 here"},
    )
    huber_schedule: str = option(
        "threshold of huber and smooth_l1: constant, or smaller the more noise there is",
        default="snr",
        choices=("constant", "exponential", "snr"),
        acts_if=_IF_HUBER,
    )
    huber_c: float = option(
        "threshold of huber and smooth_l1 in pure noise", default=0.1, above=0, acts_if=_IF_HUBER
    )
    huber_scale: float = option(
        "factor on the thresholds of constant and exponential",
        default=1.0,
        above=0,
        acts_if={
            **_IF_HUBER,
            "--huber_schedule snr does not use it": lambda options: options.huber_schedule != "snr",
        },
    )


L2 = LossOptions()


class PredictionOptions(Options, title="prediction"):
    """Options of image models for what the loss compares; video models always compare the raw output."""

    model_prediction_type: str = option(
        "what is compared with the velocity; raw: the output of the model, as it was trained; additive: "
        "the output plus the noisy latents; sigma_scaled: the noisy latents minus sigma times the output",
        default=RAW,
        often=True,
        choices=PREDICTIONS,
    )

    @property
    def weighted_by(self) -> str:
        """Rule for weighting the loss by noise level: SIGMA for sigma-scaled predictions, else NOTHING."""
        return SIGMA if self.model_prediction_type == SIGMA_SCALED else NOTHING
