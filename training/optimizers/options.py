"""Options of the optimizer, of the parts that it steps, and of the average of the weights."""

import logging
from typing import Any

from modules.errors import OptionError
from modules.option_values import read_literals
from modules.options import CHANGEABLE, HABIT, IDENTITY, Options, option

logger = logging.getLogger(__name__)

HIGH_RATE = 0.1  # above it a network is usually lost within a few steps
# beginnings of names of optimizers that find their own rate, for which --learning_rate is a factor near 1
FIND_RATE = ("prodigy", "dadapt", "adafactor", "came")
LARGEST_RATE = 1000.0  # far above any that learns; beyond it the first step only makes infinities


class OptimizerOptions(Options, title="optimizer"):
    """Options of the optimizer: which one, with which arguments."""

    optimizer_type: str = option(
        "AdamW (when empty), AdamW8bit, Adafactor, Lion, Prodigy, AdamWScheduleFree, a torch.optim "
        "class or pkg.module.Class",
        default="",
        often=True,
        facts=IDENTITY,
    )
    optimizer_args: tuple[str, ...] | None = option(
        'arguments of the optimizer, e.g. weight_decay=0.01 "betas=0.9,0.95"',
        metavar="KEY=VALUE",
        facts=IDENTITY,
    )
    learning_rate: float = option(
        "how far a step moves the weights; 1e-4 is usual for a LoRA, 1 for Prodigy",
        default=2.0e-6,
        least=0,
        below=LARGEST_RATE,
        hint="1e-4 is usual for a LoRA, 1 for Prodigy; 0 only makes sense if the optimizer finds its rate",
        often=True,
        facts=CHANGEABLE,
    )
    max_grad_norm: float = option(
        "clip the gradient to this norm; 0 turns clipping off",
        default=1.0,
        least=0,
        hint="0 turns clipping off",
        facts=HABIT,
    )

    def __post_init__(self) -> None:
        name = self.optimizer_type.rpartition(".")[2].lower()
        if self.learning_rate > HIGH_RATE and not name.startswith(FIND_RATE):
            logger.warning(
                "--learning_rate %g is very high for %s: 1e-4 is usual for a LoRA, and 1 for Prodigy, which "
                "finds its own rate. The network may be lost within a few steps.",
                self.learning_rate,
                self.optimizer_type or "AdamW",
            )
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return `optimizer_args` with their values read as Python literals."""
        return read_literals("--optimizer_args", self.optimizer_args)


class AverageOptions(Options, title="average of the weights (EMA)"):
    """Options of the average that a run keeps beside its weights."""

    ema_decay: float | None = option(
        "keep an exponential moving average of the trained weights with this decay per step (0.999) and "
        "save it as OUTPUT_NAME...-ema.safetensors beside each file",
        above=0,
        below=1,
        hint="such as 0.999",
    )
    ema_update_every: int = option(
        "update the average every N steps, with the decay of N steps: for a whole model, whose average "
        "lies in host memory",
        default=1,
        least=1,
    )
    sample_ema: bool = option("make samples with the average", needs="ema_decay", hint="0.999 is usual")


class PartsOptions(Options, title="what is trained"):
    """Networks that get a LoRA: the DiT, the text encoders, or both; and their learning rates."""

    network_train_unet_only: bool = option(
        "put the network into the transformer only",
        excludes="network_train_text_encoder_only",
        hint="else nothing is trained",
        facts=IDENTITY,
    )
    network_train_text_encoder_only: bool = option(
        "put the network into the text encoders only", facts=IDENTITY
    )
    unet_lr: float | None = option(
        "learning rate of the transformer's network; default: --learning_rate",
        least=0,
        below=LARGEST_RATE,
        hint="1e-4 is usual",
        facts=CHANGEABLE,
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        "learning rates of the text encoders' networks, one for all or one for each; default: "
        "--learning_rate",
        least=0,
        below=LARGEST_RATE,
        hint="1e-4 is usual",
        facts=CHANGEABLE,
    )
    fused_backward_pass: bool = option(
        "step each weight as soon as its gradient is complete and free the gradient; needs one process, "
        "no accumulation, an optimizer such as Adafactor; --max_grad_norm clips each weight's gradient by "
        "itself",
        facts=HABIT,
    )

    @property
    def trains_dit(self) -> bool:
        """Return whether the DiT gets a LoRA."""
        return not self.network_train_text_encoder_only

    @property
    def trains_texts(self) -> bool:
        """Return whether those text encoders that can learn get one."""
        return not self.network_train_unet_only

    def text_rates(self, count: int, learning_rate: float) -> tuple[float, ...]:
        """Return a learning rate for each of so many text encoders that can learn.

        One value is for all of them, none means --learning_rate. Raises OptionError if there are too many.
        """
        given = self.text_encoder_lr or (learning_rate,)
        if len(given) > max(count, 1):
            raise OptionError(
                f"--text_encoder_lr has {len(given)} values, but {count} text encoders can learn: give one "
                "value, or one for each"
            )
        return (*given, *[given[-1]] * (count - len(given)))[:count]
