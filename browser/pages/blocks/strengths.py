"""Strengths of blocks as text and as fields: `0-9=0.5,28-=0` and a number for each block."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from modules.control_codes import shorten
from modules.errors import OptionError
from modules.pages.language import refusal
from networks.typed_strengths import OTHER, BlockStrength, read_block_strengths

MAX_STRENGTH = 1000  # as of whole LoRAs
IS_BLOCK = re.compile(r"(?P<list>\w*?)_?(?P<number>\d+)")  # as tools/diagnose.py names it: blocks_3


class LoraBlock(NamedTuple):
    """A block of a LoRA: its list, such as `double_blocks`, and its number; OTHER for all else."""

    block_list: str
    number: int

    @property
    def name(self) -> str:
        """Name of the block in tables."""
        return OTHER if self.block_list == OTHER else f"{self.block_list}_{self.number}".lstrip("_")


def read_blocks(names: Iterable[str]) -> list[LoraBlock]:
    """Return the blocks with these names, as tools/diagnose.py writes them, without unknown ones."""
    blocks = []
    for name in names:
        match = IS_BLOCK.fullmatch(name)
        if name == OTHER:
            blocks.append(LoraBlock(OTHER, 0))
        elif match is not None:
            blocks.append(LoraBlock(match["list"], int(match["number"])))
    return blocks


def parse_strengths(text: str) -> list[BlockStrength]:
    """Return the items of a text as users type it.

    Raises:
        OptionError: If it is anything else. Files after @ are not read.
    """
    typed = " ".join(text.split())
    try:
        if typed.startswith("@"):
            raise OptionError(typed)
        return read_block_strengths(typed)
    except OptionError:
        raise refusal(
            "Strengths %(text)s: write blocks and their strength, such as 0-9=0.5, 30-=0, "
            "double_blocks:3=1 or other=0.5.",
            text=shorten(typed, 80),
        ) from None


def apply_text(text: str, blocks: Sequence[LoraBlock]) -> dict[LoraBlock, float]:
    """Return the strength of each block by a text; 1 for those that it does not name.

    Raises:
        OptionError: If the text is not valid, or names no block of the file.
    """
    strengths = dict.fromkeys(blocks, 1.0)
    lists = {block.block_list for block in blocks} - {OTHER}
    for item in parse_strengths(text):
        is_unclear = item.block_list is None and len(lists) > 1
        named = [] if is_unclear else [block for block in blocks if _is_named(item, block)]
        if not named:
            raise refusal(
                "Strengths %(text)s: the file has no such block. It has %(blocks)s.",
                text=item.typed,
                blocks=describe_blocks(blocks),
            )
        strengths |= dict.fromkeys(named, item.strength)
    return strengths


def _is_named(item: BlockStrength, block: LoraBlock) -> bool:
    if OTHER in (item.block_list, block.block_list):
        return item.block_list == block.block_list
    return item.block_list in (None, block.block_list) and item.first <= block.number <= item.last


def describe_blocks(blocks: Sequence[LoraBlock]) -> str:
    """Return the ranges of the blocks of a file, such as `0-39` or `double_blocks:0-18, other`."""
    lists: dict[str, list[LoraBlock]] = {}
    for block in blocks:
        lists.setdefault(block.block_list, []).append(block)
    return ", ".join(_name_range(min(named), max(named), blocks) for named in lists.values())


def format_strengths(strengths: Mapping[LoraBlock, float]) -> str:
    """Return the shortest text that sets these strengths; blocks of strength 1 are not named."""
    blocks = sorted(strengths)
    runs: list[list[LoraBlock]] = []  # consecutive blocks of equal strength
    for block in blocks:
        previous = runs[-1][-1] if runs else None
        is_next = previous == LoraBlock(block.block_list, block.number - 1)
        if previous is not None and is_next and strengths[previous] == strengths[block]:
            runs[-1].append(block)
        else:
            runs.append([block])
    texts = []
    for run in runs:
        strength = strengths[run[0]]
        if strength != 1:
            texts.append(f"{_name_range(run[0], run[-1], blocks)}={format_number(strength)}")
    return ",".join(texts)


def _name_range(first: LoraBlock, last: LoraBlock, blocks: Sequence[LoraBlock]) -> str:
    if first.block_list == OTHER:
        return OTHER
    lists = {block.block_list for block in blocks} - {OTHER}
    start = f"{first.block_list}:" if len(lists) > 1 else ""
    numbers = str(first.number) if first == last else f"{first.number}-{last.number}"
    return start + numbers


def format_number(strength: float) -> str:
    """Return a strength with at most three decimals."""
    return f"{strength:.3f}".rstrip("0").rstrip(".")


def read_strength(text: str, block: str) -> float:
    """Return the strength in the field of a block, with at most three decimals.

    Raises:
        OptionError: If it is not a number, or too large.
    """
    try:
        strength = round(float(text), 3)
    except ValueError:
        strength = math.nan
    if not abs(strength) <= MAX_STRENGTH:  # NaN is not either
        raise refusal("Strength of %(block)s: use a number, such as 0.5.", block=block)
    return strength


def read_preset(content: str) -> str:
    """Return the text in a preset: an item a line, comments after #.

    Raises:
        OptionError: If it contains anything else.
    """
    lines = [line.partition("#")[0].strip() for line in content.splitlines()]
    text = ",".join(line.strip(",") for line in lines if line)
    parse_strengths(text)
    return text
