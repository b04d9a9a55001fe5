"""Options of learning from pairs of a better and a worse picture or clip. Standard library only."""

from modules.options import HABIT, Options, option


class PreferenceOptions(Options, title="preferences"):
    """How strongly the better one of each pair is preferred."""

    preference: float | None = option(
        "learn from pairs of a better and a worse picture or clip (worse_directory in the dataset): predict "
        "the better one more exactly than the model without the network, the worse one less exactly. BETA "
        "says how soon a pair counts as learned. Two passes in each step, one of them without gradients, of "
        "batches twice as large",
        above=0,
        most=1_000_000,
        metavar="BETA",
        hint="2000 to 5000 are usual",
        facts=HABIT,
    )
    preference_data_weight: float = option(
        "also add this weight times the usual loss of the better one",
        default=0.0,
        least=0,
        most=1000,
        needs="preference",
        metavar="W",
        facts=HABIT,
    )


NO_PREFERENCE = PreferenceOptions.usual()
