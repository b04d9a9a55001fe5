"""--plan: print the memory that a run would need, instead of running it."""

from modules.options import Options, option


class PlanOptions(Options):
    """Whether to plan only, and for how much memory."""

    plan: float | None = option(  # 0: this machine's card; None: run
        "print the predicted peak of device and host memory by part, and exit; GIB: for a card of that size",
        nargs="?",
        const=0.0,
        metavar="GIB",
        least=0,
        hint="the GiB of a card, or no number for this machine's card",
        often=True,
    )

    @property
    def is_asked(self) -> bool:
        """Return whether to print the plan and exit."""
        return self.plan is not None
