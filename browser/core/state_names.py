"""Names of the states of runs and jobs, as pages show them."""

from modules.pages.language import TranslatableText, say

NAMES = (
    say("draft"),
    say("checking"),
    say("faults"),
    say("waiting"),
    say("starting"),
    say("downloading"),
    say("caching"),
    say("loading"),
    say("training"),
    say("sampling"),
    say("validating"),
    say("saving"),
    say("running"),
    say("stopped"),
    say("finished"),
    say("died"),
)
_BY_STATE = {name.english(): name for name in NAMES}


def name_state(state: str) -> TranslatableText:
    """Return a state as translatable text."""
    return _BY_STATE.get(state) or say(state)
