"""Options of image trainers: which networks learn, how fast each, and when a weight is stepped."""

import argparse
from dataclasses import dataclass, field

from modules.errors import OptionError
from modules.option_values import check_at_least, check_below
from modules.options import CHANGEABLE, HABIT, IDENTITY
from training.optimizers.options import LARGEST_RATE


@dataclass(frozen=True)
class PartsOptions:
    """What gets a LoRA: the DiT, the text encoders, or both; and their learning rates."""

    network_train_unet_only: bool = field(metadata=IDENTITY)  # the DiT
    network_train_text_encoder_only: bool = field(metadata=IDENTITY)
    unet_lr: float | None = field(metadata=CHANGEABLE)  # of the DiT; None: --learning_rate
    text_encoder_lr: tuple[float, ...] | None = field(metadata=CHANGEABLE)  # one for all, or one for each
    fused_backward_pass: bool = field(metadata=HABIT)

    def __post_init__(self) -> None:
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise OptionError(
                "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train: "
                "give one of them"
            )
        rates = {"--unet_lr": [self.unet_lr], "--text_encoder_lr": self.text_encoder_lr or ()}
        for option, values in rates.items():
            for value in values:
                check_at_least(option, value, 0, "1e-4 is usual")
                check_below(option, value, LARGEST_RATE, "1e-4 is usual")

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


def add_parts_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `PartsOptions`."""
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--network_train_unet_only", action="store_true", help="put the network into the transformer only"
    )
    group.add_argument(
        "--network_train_text_encoder_only",
        action="store_true",
        help="put the network into the text encoders only",
    )
    group.add_argument(
        "--unet_lr", type=float, help="learning rate of the transformer's network; default: --learning_rate"
    )
    group.add_argument(
        "--text_encoder_lr",
        type=float,
        nargs="*",
        metavar="RATE",
        help="learning rates of the text encoders' networks, one for all or one for each; default: "
        "--learning_rate",
    )
    group.add_argument(
        "--fused_backward_pass",
        action="store_true",
        help="step each weight as soon as its gradient is complete and free the gradient; needs one process, "
        "no accumulation, an optimizer such as Adafactor; --max_grad_norm clips each weight's gradient by "
        "itself",
    )
