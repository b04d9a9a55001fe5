"""Let tokens pass by the middle blocks in training: --tread. Standard library only.

Which tokens these are is drawn in `tread_routes.py`; the runner of such a pass is `running/routes.py`.
Source: Krause et al. 2025, arXiv 2501.04765.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from modules.errors import OptionError
from modules.options import HABIT, Options, option
from running.ways.composing import tokens_option
from training.features.contract import AT_LOSS, Feature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from contract.family import Family
    from training.features.hooks import Hooks, LearningPass, OptionsOfRun
    from training.loss import NoisyBatch
    from training.steps import Progress

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
        known_as=("tread_config", "tread_ratio", "selection_ratio"),
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

    @property
    def share(self) -> float:
        """Return the share of tokens, 0..1, that are left out."""
        return self.tread or 0.0


def _refuse(options: "OptionsOfRun") -> None:
    dividing = tokens_option(options.speed)
    if dividing:
        raise OptionError(
            f"--tread {options.of(TreadOptions).tread:g} with {dividing}: each process has some of the "
            "tokens, and --tread leaves out tokens of the whole clip. Leave out one of the two"
        )


def check_tread(options: TreadOptions, family: "Family", counts: Sequence[int]) -> None:
    """Raise OptionError if blocks of the model cannot see a part of the tokens, or are too few.

    counts: of the blocks of each list; empty: not known.
    """
    name = f"--tread {options.tread:g}"
    reason = ""
    if family.can.hear:
        reason = "its blocks have a second stream, the sound, which would need a choice of its own"
    elif family.dit.side_list:
        reason = "a second stream of blocks adds to all tokens of the first one"
    elif family.dit.has_additions:
        reason = "the ControlNet adds to all tokens behind each block"
    if reason:
        raise OptionError(f"{name}: the model {family.name} cannot leave out tokens: {reason}. Leave it out")
    if not counts:
        return
    total = sum(counts)
    first, last = (number + total if number < 0 else number for number in options.tread_blocks)
    if not 0 <= first <= last < total:
        numbers = " ".join(map(str, options.tread_blocks))
        raise OptionError(
            f"{name} with --tread_blocks {numbers}: the model {family.name} has {total} blocks, from 0 to "
            f"{total - 1}, and these are {first} to {last}. Give two of them, the first not behind the last"
        )


def _describe(options: TreadOptions) -> str:
    first, last = options.tread_blocks
    share = f"{100 * options.share:g} %"
    return f"{share} of the tokens pass by the blocks {first} to {last}, in passes with gradients"


def _metadata(options: TreadOptions, _: "Progress") -> Mapping[str, Any]:
    values: dict[str, Any] = {"tread": options.tread}
    if options.tread_blocks != MIDDLE:
        values["tread_blocks"] = " ".join(map(str, options.tread_blocks))
    return values


def _pass_by(
    options: TreadOptions, choose: "Callable[[NoisyBatch, tuple[int, ...]], Tensor]"
) -> "LearningPass":
    """Return the context in which tokens pass by the middle blocks. choose: returns the places that take
    part.
    """
    from functools import partial

    from running.routes import Route, routed  # torch: only with --tread

    first, last = options.tread_blocks

    def enter(dit: "nn.Module", noisy_batch: "NoisyBatch") -> AbstractContextManager[None]:
        return routed(dit, Route(first, last, partial(choose, noisy_batch)))

    return enter


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    from functools import partial

    from training.features.tread_routes import choose_places  # torch: only with --tread

    tread = options.of(TreadOptions)
    hooks.learning_pass.append(_pass_by(tread, partial(choose_places, share=tread.share, seed=progress.seed)))


def _rehearse(options: TreadOptions, noisy_batch: "NoisyBatch") -> "LearningPass":
    """Return the pass of a batch without content: it has as many tokens as the batch itself."""
    from modules.private_torch import disable_modes
    from training.features.tread_routes import choose_places

    def choose(_: "NoisyBatch", grid: tuple[int, ...]) -> "Tensor":
        with disable_modes():
            return choose_places(noisy_batch, grid, share=options.share, seed=0)

    return _pass_by(options, choose)


TREAD = Feature(
    name="tread",
    options=TreadOptions,
    place=AT_LOSS,
    is_on=lambda options: options.tread is not None,
    facts=HABIT,
    refuse=_refuse,
    check=check_tread,
    of_blocks=("tread",),
    describe=_describe,
    metadata=_metadata,
    install=_install,
    rehearse=_rehearse,
)
