"""Ranks and learning rates of a LoRA by block number, as in trainers of U-Nets.

In --network_args, block_dims, block_alphas, conv_block_dims and conv_block_alphas list one number per block.
down_lr_weight, mid_lr_weight and up_lr_weight list learning rate factors for the blocks in one part of the
U-Net, or name a curve.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any

from modules.errors import OptionError
from protocols.family import NumberedBlocks

logger = getLogger(__name__)
DIMS, ALPHAS = "block_dims", "block_alphas"
CONV_DIMS, CONV_ALPHAS = "conv_block_dims", "conv_block_alphas"
RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
THRESHOLD = "block_lr_zero_threshold"
KEYS = (DIMS, ALPHAS, CONV_DIMS, CONV_ALPHAS, *RATES, THRESHOLD)
_CURVES = ("sine", "cosine", "linear", "reverse_linear", "zeros")


@dataclass(frozen=True)
class BlockSettings:
    """Settings in --network_args for each transformer block; `fit` matches them to the blocks of a model."""

    arguments: Mapping[str, str]  # as typed
    values_by_argument: Mapping[str, tuple[float, ...]]  # ranks and alphas: one for each block
    rate_factors: tuple[float, ...] = ()  # on the rate of each block; (): all are 1
    numbered: NumberedBlocks | None = None

    @property
    def has_convolutions(self) -> bool:
        """Whether convolutions have a rank of their own (`conv_dim`)."""
        return CONV_DIMS in self.arguments

    @property
    def threshold(self) -> float:
        """Return the learning rate factor at or below which a block gets no LoRA."""
        return float(self.arguments.get(THRESHOLD, 0))

    def fit(self, numbered: NumberedBlocks | None) -> "BlockSettings":
        """Return a copy for the blocks of a model, with each block's learning rate factor if any are set.

        Args:
            numbered: The model's blocks; None if they cannot be addressed by number.

        Raises:
            OptionError: If the model has no numbered blocks, or if a list has the wrong length.
        """
        if numbered is None:
            first_argument = next(iter(self.arguments))
            raise OptionError(
                f"--network_args {first_argument}: the blocks of this model cannot be addressed by number. "
                "Pass ranks and rates by name (network_reg_dims, network_reg_lrs)"
            )
        for name, values in self.values_by_argument.items():
            if len(values) != numbered.count:
                raise OptionError(
                    f"--network_args {name}: it has {len(values)} values, but this model has "
                    f"{numbered.count} blocks. Pass one for each"
                )
        # down, middle and up blocks have their own arguments, each with one factor per block
        has_rates = any(argument in self.arguments for argument, _, _ in numbered.learning_rate_ranges)
        rate_factors = [1.0] * numbered.count if has_rates else []
        for argument, start, count in numbered.learning_rate_ranges:
            if argument in self.arguments:
                factors = read_rate_factors(argument, self.arguments[argument], count)
                rate_factors[start : start + count] = factors
        return replace(self, rate_factors=tuple(rate_factors), numbered=numbered)

    def number_of(self, path: str) -> int | None:
        """Return the index of the block that contains a module; None outside of blocks and before `fit`."""
        return None if self.numbered is None else self.numbered.number_of(path)

    def get_rate_factor(self, path: str) -> float:
        """Return the learning rate multiplier of a module; 1 outside of numbered blocks."""
        number = self.number_of(path)
        return 1.0 if number is None or not self.rate_factors else self.rate_factors[number]

    def is_left_out(self, path: str) -> bool:
        """Return whether a module gets no LoRA because its block's learning rate is below the threshold."""
        return bool(self.rate_factors) and self.get_rate_factor(path) <= self.threshold

    def get_rank_and_alpha(self, path: str, is_convolution: bool) -> tuple[int, float | None] | None:
        """Return the rank and alpha of a module; None if no per-block list gives a rank.

        An alpha of None means the network's alpha.

        Args:
            path: Dotted path of the module.
            is_convolution: Whether the module is a convolution with a kernel larger than 1 x 1.
        """
        index = self.number_of(path)
        ranks = self.values_by_argument.get(CONV_DIMS if is_convolution else DIMS)
        alphas = self.values_by_argument.get(CONV_ALPHAS if is_convolution else ALPHAS)
        if index is None or ranks is None:
            return None
        return int(ranks[index]), None if alphas is None else alphas[index]


def read_blocks(network_args: Mapping[str, Any]) -> BlockSettings | None:
    """Return the settings for numbered blocks in --network_args; None if there are none.

    Raises:
        OptionError: If a value is not a number, or if an argument requires another argument that is missing.
    """
    arguments = {key: str(network_args[key]) for key in KEYS if network_args.get(key) is not None}
    if not arguments:
        return None
    if set(arguments) == {THRESHOLD}:
        raise OptionError(f"--network_args {THRESHOLD} needs one of {', '.join(RATES)}: pass one of them too")
    for dims, alphas in ((DIMS, ALPHAS), (CONV_DIMS, CONV_ALPHAS)):
        if alphas in arguments and dims not in arguments:
            raise OptionError(f"--network_args {alphas} needs {dims}: pass both")
    values_by_argument: dict[str, tuple[float, ...]] = {}
    for name in (DIMS, ALPHAS, CONV_DIMS, CONV_ALPHAS):
        if name in arguments:
            is_rank = name in (DIMS, CONV_DIMS)
            values_by_argument[name] = _read_numbers(name, arguments[name].split(","), is_rank)
    # Raise OptionError if learning rate factors or the threshold, which `fit` reads, are invalid
    for name in RATES:
        if name in arguments:
            any_count = 2
            read_rate_factors(name, arguments[name], any_count, warns=False)
    if THRESHOLD in arguments:
        _read_numbers(THRESHOLD, [arguments[THRESHOLD]])
    return BlockSettings(arguments, values_by_argument)


def read_rate_factors(name: str, text: str, count: int, warns: bool = True) -> list[float]:
    """Return the learning rate factor of each block in one part of a U-Net.

    The text has one number per block, or a curve such as cosine+.25. As in other trainers, surplus numbers
    are ignored and missing numbers are 1.

    Args:
        name: Name of the argument, for messages.
        text: Value of the argument.
        count: Number of blocks.
        warns: Whether to warn of a wrong count of numbers.

    Raises:
        OptionError: If the text is neither numbers nor a curve.
    """
    curve, plus, base = text.strip().partition("+")
    if curve in _CURVES:
        offset = _read_numbers(name, [base])[0] if plus else 0.0
        return [value + offset for value in _compute_curve(curve, count)]
    without_brackets = text.strip().removeprefix("[").removesuffix("]")
    rate_factors = list(_read_numbers(name, without_brackets.split(",")))
    if warns and len(rate_factors) != count:
        logger.warning(
            "--network_args %s has %d values, but this model has %d such blocks: %s",
            name,
            len(rate_factors),
            count,
            "the last ones are ignored" if len(rate_factors) > count else "missing ones are 1",
        )
    padded = rate_factors + [1.0] * count
    return padded[:count]


def _compute_curve(curve: str, count: int) -> list[float]:
    """Return the values of a named curve at `count` evenly spaced positions from 0 to 1."""
    if curve == "zeros":
        return [0.0] * count
    positions = [index / max(count - 1, 1) for index in range(count)]
    if curve in ("cosine", "reverse_linear"):  # from 1 to 0
        positions.reverse()
    if curve.endswith("linear"):
        return positions
    return [math.sin(math.pi * position / 2) for position in positions]


def _read_numbers(name: str, arguments: Sequence[str], is_integer: bool = False) -> tuple[float, ...]:
    """Parse numbers that are at least 0. Raises OptionError for other values."""
    numbers = []
    for text in arguments:
        try:
            number = int(text) if is_integer else float(text)
        except ValueError:
            number = -1  # rejected below
        if not 0 <= number < math.inf:
            kind = "whole numbers" if is_integer else "numbers"
            curves = f", or one of {', '.join(_CURVES)}" if name in RATES else ""
            raise OptionError(
                f"--network_args {name}: {text.strip()!r} is not a number of at least 0. Write {kind} with "
                f"commas between them{curves}"
            )
        numbers.append(number)
    return tuple(numbers)
