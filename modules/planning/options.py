"""--plan: print the memory that a run would need, instead of running it."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError


@dataclass(frozen=True)
class PlanOptions:
    """Whether to plan only, and for how much memory."""

    plan: float | None  # GiB of the card to plan for; 0: this machine's card; None: run

    def __post_init__(self) -> None:
        if self.plan is not None and not 0 <= self.plan < float("inf"):
            raise OptionError(
                f"--plan {self.plan:g}: give the GiB of a card, or no number for this machine's card"
            )

    @property
    def is_asked(self) -> bool:
        """Return whether to print the plan and exit."""
        return self.plan is not None


def add_plan_argument(group: argparse._ArgumentGroup) -> None:
    """Add the argument of `PlanOptions`."""
    group.add_argument(
        "--plan",
        type=float,
        nargs="?",
        const=0.0,
        metavar="GIB",
        help="print the predicted peak of device and host memory by part, and exit; GIB: for a card of that "
        "size",
    )
