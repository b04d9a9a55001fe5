"""The description of the family: Wan's, with its own name."""

from dataclasses import dataclass, field, fields

from reelsmith.wan import family as wan


@dataclass(frozen=True)
class Dawn(wan.Wan):
    name: str = field(default="dawn", init=False)


def family_for_training(options):
    made = wan.family_for_training(options)
    return Dawn(**{each.name: getattr(made, each.name) for each in fields(made) if each.init})


family_for_samples = wan.family_for_samples
