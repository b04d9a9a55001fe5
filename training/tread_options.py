"""Options of training passes whose middle blocks see fewer tokens. Standard library only."""

from modules.errors import OptionError
from modules.options import HABIT, Options, option

MIDDLE = (2, -2)


class TreadOptions(Options, title="fewer tokens"):
    """How many tokens pass by the middle blocks in training."""

    tread: float | None = option(
        "leave this share of the picture's tokens, drawn anew for each sample, out of the middle blocks in "
        "training: faster steps that take less memory; samples and validation see all tokens",
        above=0,
        below=1,
        metavar="SHARE",
        hint="0.1 to 0.5 are usual",
        facts=HABIT,
    )
    tread_blocks: tuple[int, ...] = option(
        "first and last block that --tread spares tokens; both count, from 0, negative from the end",
        default=MIDDLE,
        needs="tread",
        metavar="BLOCK",
        facts=HABIT,
    )

    def __post_init__(self) -> None:
        if len(self.tread_blocks) != 2:
            raise OptionError(
                f"--tread_blocks takes two numbers and has {len(self.tread_blocks)}: give the first and the "
                "last block, such as 2 -2"
            )


NO_TREAD = TreadOptions.usual()
