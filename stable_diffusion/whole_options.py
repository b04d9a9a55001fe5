"""Options of the scripts that train a whole checkpoint of Stable Diffusion. Standard library only."""

from collections.abc import Callable, Mapping
from typing import Any

from modules.errors import OptionError
from modules.options import CHANGEABLE, IDENTITY, option

LARGEST_RATE = 1000.0  # the same limit as for --learning_rate


def text_rate(help: str, acts_if: Mapping[str, Callable[[Any], bool]] | None = None) -> Any:
    """Declare the option for a text encoder's learning rate."""
    return option(
        f"learning rate of {help}; 0 freezes it; default: --learning_rate",
        minimum=0,
        below=LARGEST_RATE,
        hint="1e-6 is usual; 0 freezes it",
        acts_if=acts_if,
        facts=CHANGEABLE,
    )


class FullFineTuningMixin:
    """Options shared by all scripts for full fine-tuning."""

    full_bf16: bool

    @property
    def is_full(self) -> bool:
        """Whether the script trains all weights; always True for full fine-tuning."""
        return True

    @property
    def learns_in_bf16(self) -> bool:
        """Whether weights are trained in bf16 (--full_bf16)."""
        return self.full_bf16


def text_switch(help: str) -> Any:
    """Declare the option that also trains the text encoders."""
    return option(help, facts=IDENTITY, often=True)


# for rates of text encoders that are trained on request
IF_TRAINED: Mapping[str, Callable[[Any], bool]] = {
    "text encoders learn with --train_text_encoder": lambda options: options.train_text_encoder
}


def read_block_rates(text: str | None) -> tuple[float, ...]:
    """Return the learning rates in --block_lr.

    Raises:
        OptionError: If they are not learning rates.
    """
    if text is None:
        return ()
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--block_lr {text}: use numbers, separated by commas") from None
    if not all(0 <= rate < LARGEST_RATE for rate in rates):
        raise OptionError(f"--block_lr {text}: learning rates are at least 0 and below {LARGEST_RATE:g}")
    return rates
