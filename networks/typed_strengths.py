"""Strengths of blocks as users type them: `0-9=0.5, 30-=0`. Standard library only."""

import re
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.text_files import read_text

OTHER = "other"  # modules outside of numbered blocks
OPTION = "--lora_blocks"
# what the text of an option may be, for its help
GRAMMAR = (
    "0-9=0.5,30-=0 halves blocks 0 to 9 and omits those from 30 on; double_blocks:3=1 names the list if "
    "there are several, other=0 what is in no block, @FILE reads them from a file. tools/diagnose.py shows a "
    "file's blocks"
)
_ITEM = re.compile(
    r"(?:(?P<list>\w+):)?(?:(?P<first>\d+)(?P<open>-)?(?P<last>\d+)?|(?P<other>other))\s*=\s*(?P<strength>-?\d*\.?\d+)"
)
MAX_BLOCK = 999  # no model has so many blocks


@dataclass(frozen=True)
class BlockStrength:
    """The strength of consecutive blocks of one list."""

    typed: str  # such as "double_blocks:0-9=0.5"
    block_list: str | None  # such as "double_blocks"; None: the only list of the file
    first: int
    last: int  # included
    strength: float


def read_block_strengths(text: str, option: str = OPTION) -> list[BlockStrength]:
    """Parse strengths by block, such as `0-9=0.5, 30-=0`, `double_blocks:0-9=0.5, other=1` or `@preset.txt`.

    Args:
        text: The text.
        option: Option that has the text as its value, for messages.

    Raises:
        OptionError: If the text, or the file after @, is anything else.
    """
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            text = ",".join(line.partition("#")[0] for line in read_text(path).splitlines())
        except OSError as error:
            raise OptionError(f"{option} @{path} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise OptionError(f"{option} @{path} is not text in UTF-8") from None
    strengths = []
    for typed in filter(None, (item.strip() for item in text.split(","))):
        match = _ITEM.fullmatch(typed)
        if match is None or (match["other"] and match["list"]):
            raise OptionError(
                f"{option} {typed!r}: write blocks and their strength, such as 0-9=0.5, 30-=0, "
                "double_blocks:3=1 or other=0.5"
            )
        first = int(match["first"] or 0)
        last = int(match["last"] or (MAX_BLOCK if match["open"] else first))
        block_list = OTHER if match["other"] else match["list"]
        strengths.append(BlockStrength(typed, block_list, first, last, float(match["strength"])))
    return strengths
