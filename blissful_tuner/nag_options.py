"""Options of normalised attention guidance. Standard library only."""

from modules.options import Options, option

MOST_SCALE = 100  # of some hundreds the products overflow in float16


NAG = "normalised attention guidance (NAG)"


class NagOptions(Options, title=NAG):
    """Options of normalised attention guidance, which steers attention away from --nag_prompt."""

    nag_scale: float | None = option(
        "steer attention away from --nag_prompt, with or without --guidance_scale; 4 to 11 are usual, 1 "
        "turns it off",
        least=1,
        most=MOST_SCALE,
        hint="1 is off, 4 to 11 are usual",
    )
    nag_tau: float = option(
        "how many times as large --nag_scale may make what a token sees; more is scaled back",
        default=3.5,
        above=0,
        hint="2.5 to 5 are usual",
    )
    nag_alpha: float = option(
        "share of the steered attention in the result, 0 to 1", default=0.5, least=0, most=1, hint="0 is off"
    )

    @property
    def is_on(self) -> bool:
        """Whether attention is steered; scale 1 and alpha 0 would change nothing and are not computed."""
        return self.nag_scale not in (None, 1) and self.nag_alpha != 0


NO_NAG = NagOptions()
