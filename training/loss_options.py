"""Options of the loss: how a difference between predicted and true velocity counts."""

from modules.options import Options, option

RAW, ADDITIVE, SIGMA_SCALED = "raw", "additive", "sigma_scaled"
PREDICTIONS = (RAW, ADDITIVE, SIGMA_SCALED)
# by what --weighting_scheme weights the loss: the timestep as a whole number, the exact share of noise
TIMESTEP, SIGMA, NOTHING = "timestep", "sigma", "nothing"
WITH_THRESHOLD = ("huber", "smooth_l1")


class LossOptions(Options, title="loss"):
    """The loss of one element, and the threshold above which Huber losses grow linearly."""

    loss_type: str = option(
        "l2: squared error; l1: absolute error; huber, smooth_l1: squared below a threshold, else absolute",
        default="l2",
        choices=("l1", "l2", "huber", "smooth_l1"),
    )
    huber_schedule: str = option(
        "threshold of huber and smooth_l1: constant, or smaller the more noise there is",
        default="snr",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option("threshold of huber and smooth_l1 in pure noise", default=0.1, above=0)
    huber_scale: float = option("factor on the thresholds of constant and exponential", default=1.0, above=0)

    @property
    def has_threshold(self) -> bool:
        """Whether the loss is one of Huber's."""
        return self.loss_type in WITH_THRESHOLD


L2 = LossOptions()


class PredictionOptions(Options, title="prediction"):
    """How an output is compared with the velocity. Video models always compare the output."""

    model_prediction_type: str = option(
        "what is compared with the velocity: raw: the output of the model, as it was trained; additive: "
        "the output plus the noisy latents; sigma_scaled: the noisy latents minus sigma times the output",
        default=RAW,
        choices=PREDICTIONS,
    )

    @property
    def weighted_by(self) -> str:
        """Return by what --weighting_scheme weights the loss, which it always shapes the draws for."""
        return SIGMA if self.model_prediction_type == SIGMA_SCALED else NOTHING
