"""Options of a run that begins later than at its first step without a saved state."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_least
from modules.parser import add_unneeded


@dataclass(frozen=True)
class StartOptions:
    """Where the run begins. The data and the noise of the steps before are left out."""

    initial_epoch: int | None  # from 1
    initial_step: int | None  # steps before the first one

    def __post_init__(self) -> None:
        check_at_least("--initial_epoch", self.initial_epoch, 1, "1 is the first epoch")
        check_at_least("--initial_step", self.initial_step, 0, "0 begins at the first step")
        if self.initial_epoch is not None and self.initial_step is not None:
            raise OptionError("--initial_epoch and --initial_step both say where to begin: give one of them")

    @property
    def is_given(self) -> bool:
        """Return whether the run does not begin at its first step."""
        return self.initial_epoch is not None or self.initial_step is not None


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `StartOptions`."""
    group = parser.add_argument_group("beginning later")
    group.add_argument(
        "--initial_epoch",
        type=int,
        help="begin at this epoch, from 1, as with --network_weights from a run that ended before it; "
        "without the optimizer's state, which --resume has",
    )
    group.add_argument("--initial_step", type=int, help="begin after so many steps, likewise")
    add_unneeded(
        group,
        "--skip_until_initial_step",
        instead="the data before the initial step are always left out.",
        action="store_true",
    )
