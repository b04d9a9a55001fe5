"""Dynamic prompts: `a {red|green} cat`, where one variant is chosen for each picture. Standard library only.

    {a|b|c}             one of them
    {2$$a|b|c}          two of them, joined by ", ", in the order in which they are written
    {1-2$$a|b|c}        one or two of them; {-2$$...} none to two, {2-$$...} two to all
    {2$$ and $$a|b|c}   joined by " and "
    {e$$a|b}            each of them in a picture of its own; {e$$2$$a|b|c} each pair
    \\{ and \\}           braces that stay

Groups may hold groups: the innermost are replaced first.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from random import Random

from modules.errors import OptionError

MOST_VARIANTS = 10_000  # of one prompt that enumerates
JOINER = ", "
_GROUP = re.compile(r"(?<!\\)\{((?:[^{}\\]|\\.)*)\}", re.DOTALL)
_COUNTS = re.compile(r"(?:(\d{1,9})|(\d{0,9})-(\d{0,9}))\$\$(?:((?:(?!\$\$)[^|])*)\$\$)?")
_EACH = re.compile(r"[eE]\$\$")


def enumerates(text: str) -> bool:
    """Return whether a text has a group that makes several pictures."""
    return any(_EACH.match(found[1]) for found in re.finditer(r"(?<!\\)\{([^{}]{1,3})", text))


def expand(text: str, random: Random) -> list[str]:
    """Return the texts that a prompt stands for: one, or with `{e$$...}` groups one for each choice of them.

    Choices are drawn from `random`, for each of the texts from the same state. Equal texts are given once.
    Raises OptionError if there are more texts than any run would make.
    """
    texts: dict[str, None] = {}
    for count, one in enumerate(_expansions(text, random), 1):
        texts[re.sub(r"\\([{}])", r"\1", one)] = None
        if count > MOST_VARIANTS:
            raise OptionError(f"{text[:60]!r} has more than {MOST_VARIANTS:,} variants. Leave some out")
    return list(texts)


def _expansions(text: str, random: Random) -> Iterator[str]:
    while (group := _GROUP.search(text)) is not None:
        before, after = text[: group.start()], text[group.end() :]
        each = _EACH.match(group[1])
        if each is not None:
            state = random.getstate()
            for chosen in _all_choices(*_read_group(group[1][each.end() :])):
                random.setstate(state)
                yield from _expansions(before + chosen + after, random)
            return
        options, fewest, most, joiner = _read_group(group[1])
        places = sorted(random.sample(range(len(options)), random.randint(fewest, most)))
        text = before + joiner.join(options[place] for place in places) + after
    yield text


def _all_choices(options: Sequence[str], fewest: int, most: int, joiner: str) -> Iterator[str]:
    for count in range(fewest, most + 1):
        yield from (joiner.join(chosen) for chosen in combinations(options, count))


def _read_group(content: str) -> tuple[list[str], int, int, str]:
    """Return the options of a group, how many of them are taken at least and at most, and what joins them."""
    counts = _COUNTS.match(content)
    if counts is None:
        return content.split("|"), 1, 1, JOINER
    options = content[counts.end() :].split("|")
    exact, low, high, joiner = counts.groups()
    fewest, most = (exact, exact) if exact is not None else (low or "0", high or str(len(options)))
    ends = sorted(min(int(end), len(options)) for end in (fewest, most))
    return options, ends[0], ends[1], JOINER if joiner is None else joiner
