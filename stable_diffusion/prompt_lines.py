"""Prompt lines of gen_img.py: `a cat --n ugly --w 512 --d 1,2`. Standard library only.

The grammar is that of the other scripts (generation/prompt_lines.py); letters and values are those of the
image guides. Keys are the names of the options on the command line, whose checks apply.
"""

from collections.abc import Callable, Mapping
from typing import Any

from generation.prompt_lines import LineOption, Value, parse_line, read_number, read_whole
from modules.control_codes import replace_control_codes, shorten
from modules.errors import OptionError
from modules.paths import MOST_OF_NAME
from stable_diffusion.shrink_options import read_unsharp

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
