"""Let some tokens bypass the middle blocks in training: --tread. Standard library only.

`tread_routes.py` draws these tokens; `tread_runner.py` runs the blocks in such a pass.
Source: Krause et al. 2025, arXiv 2501.04765.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import BETWEEN_BLOCKS, HABIT, option
from training.features.contract import AT_LOSS, Feature, FeatureOptions, given_values
from training.features.hooks import RunFeatures
from training.features.phases import PREDICT

if TYPE_CHECKING:
    from torch import Tensor

    from protocols.family import Family
    from training.loss import NoisyBatch
    from training.targets.passes import TrainingPasses

MIDDLE = (2, -2)  # first and last bypassed block, as in --tread_blocks


class TreadOptions(FeatureOptions, title="fewer tokens", at=AT_LOSS, facts=HABIT):
    """Options of TREAD: the share of tokens that skip middle blocks in training, and the blocks."""

    tread: float | None = option(
        "let this fraction of the image tokens, drawn for each sample, bypass the middle blocks in "
        "training: faster steps and less memory; samples and validation use all tokens",
        above=0,
        below=1,
        metavar="SHARE",
        hint="0.1 to 0.5 are usual",
        known_as=("tread_config", "tread_ratio", "selection_ratio"),
        facts=BETWEEN_BLOCKS,
    )
    tread_blocks: tuple[int, ...] = option(
        "first and last block that the tokens of --tread bypass, both included; counted from 0, "
        "negative numbers from the end",
        default=MIDDLE,
        needs="tread",
        metavar="BLOCK",
    )

    @property
    def drop_rate(self) -> float:
        """Fraction of tokens, 0..1, that bypass the middle blocks."""
        return self.tread or 0.0


def check_tread(options: TreadOptions, family: "Family", counts: Sequence[int]) -> None:
    """Raise OptionError if the model's blocks cannot omit tokens, or if --tread_blocks is wrong.

    Args:
        options: Options of the run.
        family: The model family.
        counts: Number of blocks in each list; empty if unknown.
    """
    name = f"--tread {options.tread:g}"
    reason = ""
    if family.abilities.trains_audio:
        reason = "its blocks have a second stream, for audio, whose tokens would need a separate selection"
    elif family.dit.side_list:
        reason = "a second stream of blocks adds to all tokens of the first one"
    elif family.dit.has_additions:
        reason = "the ControlNet adds to all tokens after each block"
    if reason:
        raise OptionError(f"{name}: the model {family.name} cannot omit tokens: {reason}. Omit it")
    if not counts:
        return
    num_blocks = sum(counts)
    first, last = (index + num_blocks if index < 0 else index for index in options.tread_blocks)
    if not 0 <= first <= last < num_blocks:
        blocks = " ".join(map(str, options.tread_blocks))
        raise OptionError(
            f"{name} with --tread_blocks {blocks}: the model {family.name} has {num_blocks} blocks, from 0 "
            f"to {num_blocks - 1}, and these are {first} to {last}. Pass two of them, the first not after "
            "the last"
        )


def _describe(options: TreadOptions) -> str:
    first, last = options.tread_blocks
    percent = f"{100 * options.drop_rate:g} %"
    return f"{percent} of the tokens bypass the blocks {first} to {last}, in passes with gradients"


def predict_from_fewer_tokens(
    options: TreadOptions,
    predict: "Callable[[TrainingPasses, NoisyBatch], Tensor]",
    passes: "TrainingPasses",
    noisy_batch: "NoisyBatch",
) -> "Tensor":
    """Return the prediction of a pass in which some tokens, drawn for this batch, skip the middle blocks."""
    from training.features.tread_routes import select_kept_tokens
    from training.features.tread_runner import Route, bypassing_blocks  # torch: only with --tread

    first, last = options.tread_blocks
    select = partial(select_kept_tokens, noisy_batch, drop_rate=options.drop_rate, seed=passes.rule.seed)
    with bypassing_blocks(passes.dit, Route(first, last, select)):
        return predict(passes, noisy_batch)


def _register(run: RunFeatures, options: TreadOptions) -> None:
    """Register --tread, which lets some tokens bypass middle blocks; check --tread_blocks."""
    if len(options.tread_blocks) != 2:
        raise OptionError(
            f"--tread_blocks needs two numbers and has {len(options.tread_blocks)}: pass the first and the "
            "last block, such as 2 -2"
        )
    dividing_option = run.options.speed.modes.divides_tokens
    if dividing_option:
        raise OptionError(
            f"--tread {options.tread:g} with {dividing_option}: each process has only some of the "
            "tokens, but --tread selects from those of the whole clip. Omit one of the two"
        )
    run.info.targets.append(_describe(options))
    run.info.in_files |= given_values(options)
    run.on.check.append(partial(check_tread, options))
    run.around(PREDICT, partial(predict_from_fewer_tokens, options))


TREAD = Feature(
    name="tread",
    options=TreadOptions,
    is_on=lambda options: options.tread is not None,
    join=_register,
)
