"""Prompt lines of gen_img.py: `a cat --n ugly --w 512 --d 1,2`. Standard library only.

The grammar is that of the other scripts (generation/prompt_lines.py); letters and values are those of the
image guides. Keys are the names of the options on the command line, whose checks apply.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

from generation.prompt_lines import LineOption, Value, parse_line, read_number, read_whole
from modules.control_codes import replace_control_codes, shorten
from modules.errors import OptionError
from modules.paths import MOST_OF_NAME
from stable_diffusion.sampling_options import read_unsharp

SEEDS = "seeds"
MULTIPLIERS = "network_mul"
SEED_BITS = 64
# bytes of a name, which "_0_1234.png" and, while it is written, the mark of a temporary file come after
LONGEST_NAME = MOST_OF_NAME - 35


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(read_whole(part.strip()) for part in text.split(","))
    if not all(-(2**63) <= seed < 2**SEED_BITS for seed in seeds):
        raise ValueError("a seed has at most 64 bits")
    return seeds


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(read_number(part.strip()) for part in text.split(","))


def _or_none(read: Callable[[str], Value]) -> Callable[[str], Value]:
    return lambda text: None if text.lower() == "none" else read(text)


def _unsharp(text: str) -> str | None:
    if text.lower() == "none":
        return None
    try:
        read_unsharp("", text)
    except OptionError as error:
        raise ValueError(str(error).strip()) from None
    return text


LINE_OPTIONS: Mapping[str, LineOption] = {
    "n": LineOption("negative_prompt", str),
    "w": LineOption("W", read_whole),
    "h": LineOption("H", read_whole),
    "s": LineOption("steps", read_whole),
    "d": LineOption(SEEDS, _seeds),
    "l": LineOption("scale", read_number),
    "nl": LineOption("negative_scale", _or_none(read_number)),
    "t": LineOption("strength", read_number),
    "am": LineOption(MULTIPLIERS, _numbers),
    "c": LineOption("clip_prompt", str),
    "f": LineOption("file_name", str),
    "ow": LineOption("original_width", read_whole),
    "oh": LineOption("original_height", read_whole),
    "nw": LineOption("original_width_negative", read_whole),
    "nh": LineOption("original_height_negative", read_whole),
    "ct": LineOption("crop_top", read_whole),
    "cl": LineOption("crop_left", read_whole),
    "dsd1": LineOption("ds_depth_1", _or_none(read_whole)),
    "dst1": LineOption("ds_timesteps_1", read_whole),
    "dsd2": LineOption("ds_depth_2", _or_none(read_whole)),
    "dst2": LineOption("ds_timesteps_2", read_whole),
    "dsr": LineOption("ds_ratio", read_number),
    "glt": LineOption("gradual_latent_timesteps", _or_none(read_whole)),
    "glr": LineOption("gradual_latent_ratio", read_number),
    "gls": LineOption("gradual_latent_ratio_step", read_number),
    "gle": LineOption("gradual_latent_every_n_steps", read_whole),
    "glsn": LineOption("gradual_latent_s_noise", read_number),
    "glus": LineOption("gradual_latent_unsharp_params", _unsharp),
}


def read_line(line: str, where: str = "the prompt") -> dict[str, Any]:
    """Read a prompt line into `prompt` and its options by key; unknown options are ignored with a warning.

    where: names the line in warnings. Raises OptionError if a value cannot be read, or --f is no name.
    """
    values = parse_line(line, LINE_OPTIONS, where)
    name = values.get("file_name")
    if name is not None:
        _check_name(name)
    return values


def _check_name(name: str) -> None:
    """Raise OptionError if --f is no name of a file, on this system or another."""
    shown = repr(shorten(name, 80))
    is_path = not name or set(name) & set('/\\:*?"<>|') or set(name) <= {".", " "}
    if is_path or replace_control_codes(name) != name:
        raise OptionError(
            f"--f {shown}: give a file's name, without folders and characters that some systems do "
            "not take. Pictures are written to --outdir"
        )
    size = len(name.encode("utf-8", "replace"))
    if size > LONGEST_NAME:
        raise OptionError(
            f"--f {shown}: the name has {size} bytes, and files take {LONGEST_NAME} beside the number and "
            "the ending. Give a shorter one"
        )


def split_seeds(line: str) -> tuple[int, ...] | None:
    """Return the seeds of a line's --d, which are needed before its variants are chosen; None without them.

    Raises ValueError if they cannot be read.
    """
    for part in line.split(" --")[1:]:
        word, _, text = part.partition(" ")
        if word.lower() == "d":
            return _seeds(text.strip())
    return None


# Dynamic prompts: `a {red|green} cat`, where one variant is chosen for each picture.
#
# {a|b|c}             one of them
# {2$$a|b|c}          two of them, joined by ", ", in the order in which they are written
# {1-2$$a|b|c}        one or two of them; {-2$$...} none to two, {2-$$...} two to all
# {2$$ and $$a|b|c}   joined by " and "
# {e$$a|b}            each of them in a picture of its own; {e$$2$$a|b|c} each pair
# \{ and \}           braces that stay
#
# Groups may hold groups: the innermost are replaced first.
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
    """Return the options of a group, how many of them are taken at least and at most, and their separator."""
    counts = _COUNTS.match(content)
    if counts is None:
        return content.split("|"), 1, 1, JOINER
    options = content[counts.end() :].split("|")
    exact, low, high, joiner = counts.groups()
    fewest, most = (exact, exact) if exact is not None else (low or "0", high or str(len(options)))
    ends = sorted(min(int(end), len(options)) for end in (fewest, most))
    return options, ends[0], ends[1], JOINER if joiner is None else joiner
