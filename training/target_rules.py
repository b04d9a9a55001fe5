"""Records of the targets of a run."""

from dataclasses import dataclass

from networks.teacher_options import TeacherOptions

THOUSAND = 1000


@dataclass(frozen=True)
class Band:
    """The shares of noise, 0..1, at which a teacher knows more than the network; both ends count."""

    lowest: float
    highest: float

    def holds(self, level: float) -> bool:
        return self.lowest <= level <= self.highest


@dataclass(frozen=True)
class Split:
    """Weights of the parts of a comparison: see `errors.split_errors`."""

    size_weight: float
    colour_weight: float


EVEN_SPLIT = Split(1.0, 1.0)


@dataclass(frozen=True)
class TeacherTarget:
    """How the network is compared with a frozen model."""

    weight: float  # share in the loss, 0..1
    band: Band | None = None  # None: the teacher knows more at all levels
    anchor_weight: float = 1.0  # factor outside the band
    split: Split | None = None  # None: squared differences, or those of --loss_type
    view: str = ""  # `Batch.view` inside the band


@dataclass(frozen=True)
class Targets:
    """All that a run compares with besides the clip itself."""

    teacher: TeacherTarget | None = None


NO_TARGETS = Targets()


def make_targets(teacher: TeacherOptions) -> Targets:
    """Return the targets that options ask for."""
    return Targets(
        teacher=_make_teacher(teacher),
    )


def _make_teacher(options: TeacherOptions) -> TeacherTarget | None:
    if options.teacher is None:
        return None
    band = None
    if options.band is not None:
        low, high = options.band
        band = Band(low / THOUSAND, high / THOUSAND)
    split = None
    if options.teacher_split:
        split = Split(options.teacher_size_weight, options.teacher_colour_weight)
    return TeacherTarget(
        options.teacher_weight,
        band=band,
        anchor_weight=options.teacher_anchor_weight,
        split=split,
        view=options.view,
    )
