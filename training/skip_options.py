"""Options of steps that are left out because something went wrong in them. Standard library only."""

from modules.options import Options, option

MOST_FACTOR = 1_000_000.0  # beyond any spike


class SkipOptions(Options, title="steps that go wrong"):
    """Which steps are left out."""

    skip_bad_steps: int | None = option(
        "leave out a step whose loss or gradient norm is NaN or infinite, at most N in a row; the next one "
        "ends the run, as the first one does without this option",
        least=1,
        most=1_000_000,
        metavar="N",
        hint="leave it out to end the run at the first one",
    )
    skip_spikes: float | None = option(
        "leave out a step whose gradient norm is above FACTOR times the median of the last 100 taken "
        "steps, from the 21st step on",
        above=1,
        most=MOST_FACTOR,
        metavar="FACTOR",
        hint="5 to 10 are usual",
    )

    @property
    def flag(self) -> str | None:
        """Return the first of these options that is given; None: no step is left out."""
        if self.skip_bad_steps is not None:
            return "--skip_bad_steps"
        return None if self.skip_spikes is None else "--skip_spikes"


NOTHING_SKIPPED = SkipOptions.usual()
