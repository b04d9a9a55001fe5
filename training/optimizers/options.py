"""Options of the optimizer."""

import argparse
import logging
from dataclasses import dataclass, field
from typing import Any

from modules.option_values import check_at_least, check_below, read_literals
from modules.options import CHANGEABLE, HABIT, IDENTITY

logger = logging.getLogger(__name__)

HIGH_RATE = 0.1  # above it a network is usually lost within a few steps
# beginnings of names of optimizers that find their own rate, for which --learning_rate is a factor near 1
FIND_RATE = ("prodigy", "dadapt", "adafactor", "came")
LARGEST_RATE = 1000.0  # far above any that learns; beyond it the first step only makes infinities


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimizer: which one, with which arguments."""

    optimizer_type: str = field(metadata=IDENTITY)  # a name or an import path; "" means AdamW
    optimizer_args: tuple[str, ...] | None = field(metadata=IDENTITY)  # key=value
    learning_rate: float = field(metadata=CHANGEABLE)
    max_grad_norm: float = field(metadata=HABIT)  # 0 turns clipping off

    def __post_init__(self) -> None:
        check_at_least(
            "--learning_rate",
            self.learning_rate,
            0,
            "0 only makes sense with an optimizer that finds its own rate",
        )
        check_below(
            "--learning_rate", self.learning_rate, LARGEST_RATE, "1e-4 is usual for a LoRA, 1 for Prodigy"
        )
        name = self.optimizer_type.rpartition(".")[2].lower()
        if self.learning_rate > HIGH_RATE and not name.startswith(FIND_RATE):
            logger.warning(
                "--learning_rate %g is very high for %s: 1e-4 is usual for a LoRA, and 1 for Prodigy, which "
                "finds its own rate. The network may be lost within a few steps.",
                self.learning_rate,
                self.optimizer_type or "AdamW",
            )
        check_at_least("--max_grad_norm", self.max_grad_norm, 0, "0 turns clipping off")
        read_literals("--optimizer_args", self.optimizer_args)

    def arguments(self) -> dict[str, Any]:
        """Return `optimizer_args` with their values read as Python literals."""
        return read_literals("--optimizer_args", self.optimizer_args)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `OptimizerOptions`."""
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer_type",
        default="",
        help="AdamW (when empty), AdamW8bit, Adafactor, Lion, Prodigy, AdamWScheduleFree, a torch.optim "
        "class or pkg.module.Class",
    )
    group.add_argument(
        "--optimizer_args",
        nargs="*",
        metavar="KEY=VALUE",
        help='arguments of the optimizer, e.g. weight_decay=0.01 "betas=0.9,0.95"',
    )
    group.add_argument(
        "--learning_rate",
        type=float,
        default=2.0e-6,
        help="how far a step moves the weights; 1e-4 is usual for a LoRA, 1 for Prodigy",
    )
    group.add_argument(
        "--max_grad_norm",
        type=float,
        default=1.0,
        help="clip the gradient to this norm; 0 turns clipping off",
    )
