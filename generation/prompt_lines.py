"""Prompt lines: `a cat --w 832 --d 7` of --from_file and --interactive; training samples have such lines too.

Standard library only. Both grammars split a line at every ` --`, see `split_line`. The first part is the
prompt; in each other part the first word is the option and the rest its value. An option is given by its
letters or by a long name (`line_options`). Unknown options are ignored with a warning.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.command import did_you_mean
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.limits import MAX_LINE_OPTIONS, MAX_LINE_SHOWN
from modules.option_tables import list_option_names
from modules.option_values import JOINED, height_width, parse_bounded_int, parse_int, text_to_seed
from modules.paths import explain_missing, path_exists
from modules.text_files import read_text
from networks.typed_strengths import read_block_strengths

# the sides of --video_size, which have keys of their own in a line
SIDES = {"width": "video_size_width", "height": "video_size_height"}
# names that are suggested in addition to the options' own
DEFAULT_NAMES = (
    "width", "height", "frames", "size", "seed", "steps", "cfg", "scale", "shift", "negative", "solver",
    "image", "end_image", "control", "reference",
)  # fmt: skip

logger = logging.getLogger(__name__)

# a mapping sets several keys at once
Value = int | float | str | Mapping[str, int] | Sequence[float] | None
# a mistyped option with a number: one dash, or dashes of word processors
_ODD_OPTION = re.compile("(?<=\\s)(-|-?[\u2010-\u2015\u2212]+)([A-Za-z_]+) ([0-9]\\S*)")
_ONE_DASH = re.compile(r"(?<=\s)-rcfg (?=[0-9.])")  # as a guide of image trainers prints it
SOLVERS = {  # --sample_solver -> as `modules.flow.solvers` names it
    "unipc": "unipc",
    "dpm++": "dpm++",
    "vanilla": "euler",
    "dpm++sde": "dpm++sde",
    "lcm": "lcm",
}
# values that unset an option of the command line: empty quotes; for text options also nothing at all
CANCELS = ('""', "''")
NO_TEXT = ("", *CANCELS)
PROMPT = "prompt"  # the option that names the prompt, in lines of the Web UI
# a quoted value, followed by the end of the line or another option
_QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*')(?=\s*$|\s+--)""")
_WORD = re.compile(r"\S*\s+")  # name of an option
_ESCAPED = re.compile(r'\\(["\\])')  # escapes in a double-quoted text, as in a shell
MAX_FPS = 1000  # a higher value must be a typing error


def find_option_key(word: str, keys: Collection[str]) -> str | None:
    """Return the key of the option with a long name, in any spelling; None if there is no such option.

    Args:
        word: The long name.
        keys: Keys of all options: their names on the command line, with keys for the height and the width of
            --video_size.
    """
    name = word.lower().replace("-", "_")
    name = SIDES.get(name, name)  # width and height are sides of --video_size
    if name in keys:
        return name
    from modules.mistyped import find_our_option  # only names of other programs need it

    return find_our_option(name, keys) or None


def known_names(letters: Collection[str], keys: Collection[str], find: Callable[[str], object]) -> list[str]:
    """Return all names that can start an option of a prompt line.

    Args:
        letters: One-letter names of the options.
        keys: Long names of the options.
        find: Returns an option by its name, or None.
    """
    names = dict.fromkeys((*letters, *keys, *DEFAULT_NAMES))
    return [name for name in names if find(name) is not None]


def suggest(word: str, letters: Collection[str], names: Collection[str]) -> str:
    """Return advice about an unknown option of a prompt line: the most similar name, or all letters.

    Args:
        word: The unknown option.
        letters: One-letter options that the line accepts.
        names: All option names, from `known_names`.
    """
    near = did_you_mean(word.lower().replace("-", "_"), names).strip()
    return near.replace("mean ", "mean --") or f"Use {' '.join(f'--{character}' for character in letters)}"


@dataclass(frozen=True)
class LineOption:
    """Key of a prompt line option, and the function `read` that parses its value or raises ValueError."""

    key: str
    read: Callable[[str], Value]
    unset_values: tuple[str, ...] = ()  # accepted empty values, which unset the option
    repeats: bool = False  # whether each use adds to a list; otherwise the last use counts
    # keys of the command line that the option replaces, unless the line gives them too
    replaced_keys: tuple[str, ...] = ()


def read_seed(text: str) -> int:
    """Return the seed in a text; a text that is not a number is hashed, and its seed is logged.

    Raises ValueError if the seed is out of range.
    """
    seed = text_to_seed(text)
    if seed == -1:  # it means a random seed in other programs
        logger.warning("seed -1 is a seed like any other here: omit it for a random one")
    if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
        logger.info("Seed of the text %r: %d", text, seed)
    return seed


def read_number(text: str) -> float:
    """Parse a number; raise ValueError for any other text."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def read_fraction(text: str) -> float:
    """Parse a number from 0 to 1; raise ValueError for any other text."""
    number = read_number(text)
    if not 0 <= number <= 1:
        raise ValueError(f"{text} is not from 0 to 1")
    return number


def read_switch(text: str) -> int:
    """Parse 0 (off) or 1 (on); raise ValueError for any other text."""
    if text not in ("0", "1"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return int(text)


def _read_rate(text: str) -> int:
    rate = parse_int(text)
    if not 1 <= rate <= MAX_FPS:
        raise ValueError(f"{text} is not a frame rate: use a number from 1 to {MAX_FPS}")
    return rate


def read_size(text: str) -> dict[str, int]:
    """Parse `480 832` (height, width) into `video_size_height` and `video_size_width`.

    Raises:
        ValueError: If the text is not of this form.
    """
    match = JOINED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a height and a width, such as 480 832")
    height = match[1]
    separator = match[2]
    width = match[3]
    if separator.strip():
        logger.warning("video_size %s: taken as a height of %s and a width of %s", text, height, width)
    return {"video_size_height": parse_bounded_int(height), "video_size_width": parse_bounded_int(width)}


def _read_side(text: str) -> int:
    joined = JOINED.fullmatch(text)
    if joined is not None:
        height, width = height_width(joined)
        raise ValueError(f"{text!r} is not a whole number: pass --w {width} --h {height}")
    return parse_int(text)


def read_path(text: str) -> str:
    """Remove enclosing quotation marks from a path."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def read_name(text: str) -> str:
    """Return the text unchanged; the parser of options that accept any text."""
    return text


def read_blocks(text: str) -> str:
    """Return strengths of blocks as typed, for the LoRA file of the same position; "" for full strength.

    Raises:
        OptionError: If they cannot be parsed.
    """
    read_block_strengths(text, "--lb")
    return text


# --from_file and --interactive: letters of the established Wan script, and its newer `ei`
GENERATION_OPTIONS: Mapping[str, LineOption] = {
    "w": LineOption("video_size_width", _read_side),
    "h": LineOption("video_size_height", _read_side),
    "f": LineOption("video_length", parse_int),
    "d": LineOption("seed", read_seed),
    "s": LineOption("infer_steps", parse_int),
    "g": LineOption("guidance_scale", read_number),
    "l": LineOption("guidance_scale", read_number),
    "fs": LineOption("flow_shift", read_number),
    "i": LineOption("image_path", read_path, CANCELS),
    "ei": LineOption("end_image_path", read_path, CANCELS),
    "cn": LineOption("control_path", read_path, CANCELS),
    "v": LineOption("video_path", read_path, CANCELS),
    "vd": LineOption("denoise", read_number),
    "ii": LineOption("i2i_path", read_path, CANCELS),
    "n": LineOption("negative_prompt", str, NO_TEXT),
    "nag": LineOption("nag_prompt", str, NO_TEXT),
    "cs": LineOption("cfg_schedule", str, NO_TEXT),
    "lb": LineOption("lora_blocks", read_blocks, CANCELS, repeats=True),
    "mcrr": LineOption("magcache_retention_ratio", read_number),
    "mct": LineOption("magcache_threshold", read_number),
    "mck": LineOption("magcache_k", parse_int),
    "tct": LineOption("teacache_threshold", read_number),
}


# the same for models that take embedded guidance as an input: there `g` sets it, and `l` sets the
# classifier-free guidance scale
EMBEDDED_GENERATION_OPTIONS: Mapping[str, LineOption] = {
    **GENERATION_OPTIONS,
    "g": LineOption("embedded_cfg_scale", read_number),
    "p2": LineOption("prompt_2", str, NO_TEXT),
}


# additional option for models that take reference images
REFERENCES = {"ci": LineOption("control_image_path", read_path, CANCELS, repeats=True)}


# the same for models whose videos are made in sections: each section may have its own text and start image,
# and lengths are in seconds
SECTIONED_GENERATION_OPTIONS: Mapping[str, LineOption] = {
    **{letter: option for letter, option in GENERATION_OPTIONS.items() if letter not in {"cn", "ii"}},
    "f": LineOption("video_seconds", read_number, replaced_keys=("video_sections",)),
    "vs": LineOption("video_sections", parse_int),
    "embedded_cfg_scale": LineOption("embedded_cfg_scale", read_number),
    **REFERENCES,
    "cim": LineOption("control_image_mask_path", read_path, CANCELS, repeats=True),
    "of": LineOption("one_frame_inference", read_name),
    "p2": LineOption("prompt_2", str, NO_TEXT),
}


# the same for models that make images, which have no frames and take no videos
IMAGE_GENERATION_OPTIONS: Mapping[str, LineOption] = {
    **{letter: option for letter, option in GENERATION_OPTIONS.items() if letter not in {*"fiv", "ei", "cn"}},
    # the image guides have another name for one solver
    "ss": LineOption("sample_solver", lambda text: {"euler": "vanilla"}.get(text, text)),
}
EMBEDDED_IMAGE_OPTIONS: Mapping[str, LineOption] = {
    **IMAGE_GENERATION_OPTIONS,
    "g": LineOption("embedded_cfg_scale", read_number),
    "p2": LineOption("prompt_2", str, NO_TEXT),
}


# options of generation lines that have only the long name of the command line
NAMED_OPTIONS: Mapping[str, LineOption] = {
    **dict.fromkeys(("video_size", "image_size"), LineOption("video_size", read_size)),
    "fps": LineOption("fps", _read_rate),
    "guidance_scale_high_noise": LineOption("guidance_scale_high_noise", read_number),
    "sample_solver": LineOption("sample_solver", read_name),
    "from_latent": LineOption("from_latent", read_path, CANCELS),
    **dict.fromkeys(("strength", "v2v_denoise", "denoise_strength"), LineOption("denoise", read_number)),
}


# options of the lines of all generation scripts, by name and by letter
ALL_LINE_OPTIONS: Mapping[str, LineOption] = {
    # a letter may have different meanings; `option.key` keeps all names
    **{option.key: option for option in SECTIONED_GENERATION_OPTIONS.values()},
    **SECTIONED_GENERATION_OPTIONS,
    **IMAGE_GENERATION_OPTIONS,
    **EMBEDDED_GENERATION_OPTIONS,
}


def find_option(word: str, options: Mapping[str, LineOption]) -> LineOption | None:
    """Return the prompt line option with this letter or long name; None if there is none."""
    option = options.get(word)
    if option is not None:
        return option
    by_name = {**NAMED_OPTIONS, **{option.key: option for option in options.values()}}
    name = word.lower().replace("-", "_")
    # do not guess another name for an option of other scripts' lines: seconds would be taken for frames
    if name not in by_name and any(name == option.key for option in ALL_LINE_OPTIONS.values()):
        return None
    key = find_option_key(word, by_name)
    return None if key is None else by_name[key]


def store_value(values: dict[str, Any], option: LineOption, value: Value) -> None:
    """Store an option's value, and remove the options that it replaces."""
    if isinstance(value, Mapping):
        values.update(value)
    elif option.repeats:
        values.setdefault(option.key, []).append(value)
    else:
        values[option.key] = value
    for key in option.replaced_keys:
        values.setdefault(key, None)


def parse_generation_line(
    line: str, options: Mapping[str, LineOption] = GENERATION_OPTIONS, source_name: str = "the prompt line"
) -> dict[str, Any]:
    """Parse a line into `prompt` and its options by key; None cancels the command line's value.

    Option names are case-sensitive.

    Args:
        line: The prompt line.
        options: Options of a line, by their letters.
        source_name: Name of the line in warnings.

    Raises:
        OptionError: If a value cannot be parsed.
    """
    return parse_option_line(line, options, source_name, lambda word: find_option(word, options))


@dataclass(frozen=True)
class SplitLine:
    """A prompt line split into its prompt and options; option names have no dashes."""

    prompt: str
    options: list[str]


def split_line(line: str) -> SplitLine:
    """Split a line into its prompt and its options.

    A value in quotation marks may contain dashes. A line may also name its prompt, as in the Web UI:
    `--prompt "a castle" --steps 3`.

    Raises:
        OptionError: If a line names its prompt but starts with another text, or names several prompts.
    """
    starts_with_option = line.lstrip().startswith("--")
    # an option is only recognized after a space
    text, *option_texts = _cut_options(f" {line.lstrip()}" if starts_with_option else line)
    prompt_options = [part for part in option_texts if part.partition(" ")[0].lower() == PROMPT]
    if not prompt_options:
        # a line that starts with dashes is a prompt, as in other programs, unless a space precedes them
        if line.startswith("--"):
            return SplitLine(f"--{option_texts[0]}", option_texts[1:])
        return SplitLine(text, option_texts)
    if len(prompt_options) > 1 or text.strip():
        raise OptionError(f"--{PROMPT}: the line has two prompts. Write one, before or after --{PROMPT}")
    other_options = [part for part in option_texts if part is not prompt_options[0]]
    return SplitLine(unquote(prompt_options[0].partition(" ")[2].strip()), other_options)


def _cut_options(line: str) -> list[str]:
    """Split a prompt line into the prompt before the first ` --`, and each option with its value."""
    parts = []
    start = 0
    position = line.find(" --", _find_object_end(line, 0) or 0)
    while position >= 0:
        parts.append(line[start:position])
        start = position + len(" --")
        value = _WORD.match(line, start)
        position = line.find(" --", start if value is None else _find_value_end(line, value.end()) or start)
    return [*parts, line[start:]]


def _find_value_end(line: str, start: int) -> int | None:
    """Return the end index of the quoted text or JSON object at `start`; None if neither begins there."""
    quoted = _QUOTED.match(line, start)
    return _find_object_end(line, start) if quoted is None else quoted.end()


def _find_object_end(line: str, start: int) -> int | None:
    """Return the end index of the JSON object that starts at `start`; None if there is none."""
    # Dashes inside its strings do not begin options.
    object_start = len(line) - len(line[start:].lstrip())
    if not line.startswith("{", object_start):
        return None
    try:
        return json.JSONDecoder().raw_decode(line, object_start)[1]
    except (ValueError, RecursionError):  # such as {red|blue}
        return None


def unquote(text: str) -> str:
    """Remove the quotation marks around a text, if it has any."""
    if _QUOTED.fullmatch(text) is None:
        return text
    return _ESCAPED.sub(r"\1", text[1:-1]) if text[0] == '"' else text[1:-1]


def _check_count(options: int) -> None:
    """Raise OptionError if a prompt line has implausibly many options."""
    if options > MAX_LINE_OPTIONS:
        raise OptionError(
            f"it has {options:,} options (words after --), and {MAX_LINE_OPTIONS} are the most. Remove "
            "those that are not meant as options"
        )


def parse_option_line(
    line: str,
    options: Mapping[str, LineOption],
    source_name: str,
    find: Callable[[str], LineOption | None],
    unsupported_hint: str = "It has no effect in lines of this script",
) -> dict[str, Any]:
    """Parse a prompt line, `a cat --w 832 --d 7`, into its prompt and the values of its options, by key.

    Args:
        line: The prompt line.
        options: Options of a line, by their letters.
        source_name: Name of the line in warnings.
        find: Returns an option by its name, or None.
        unsupported_hint: End of the warning about an option that exists only for other scripts.

    Raises:
        OptionError: If a value cannot be parsed.
    """
    line = _ONE_DASH.sub("--rcfg ", line)  # some guides print it with one dash
    split = split_line(line)
    _check_count(len(split.options))
    displayed_line = f"{source_name} {shorten(line.strip(), MAX_LINE_SHOWN)!r}"
    if split.prompt.startswith("--"):
        _warn_of_leading_dashes(displayed_line, split.prompt)
    values: dict[str, Any] = {"prompt": split.prompt.strip()}
    spellings_by_key = _list_spellings(split.options, find)
    usable_names = functools.cache(functools.partial(_list_usable_names, options, find))
    errors = _find_odd_options(line, find)  # all errors of the line are raised together
    for name_and_value in split.options:
        name, _, text = name_and_value.partition(" ")
        text = text.strip()
        option = find(name)
        if option is None:
            # of lines of other scripts, or of their command lines
            is_other_script_option = find_option(name, ALL_LINE_OPTIONS) is not None
            is_other_script_option |= name.replace("-", "_") in list_option_names()
            hint = unsupported_hint if is_other_script_option else suggest(name, options, usable_names())
            logger.warning(
                "%s: the unknown option --%s is ignored. %s",
                displayed_line,
                shorten(name_and_value.strip(), MAX_LINE_SHOWN),
                hint,
            )
            continue
        if not read_path(text) and text not in option.unset_values:
            errors.append(f"--{name} has no value. Write it, or omit --{name}")
            continue
        if not option.repeats and option.key not in values:
            _warn_of_repeated_option(displayed_line, spellings_by_key[option.key])
        try:
            # only text options have backslash escapes, because paths use backslashes
            store_value(values, option, option.read(unquote(text) if option.read is str else read_path(text)))
        except ValueError as error:
            errors.append(f"--{name}: {error}")
    if errors:
        raise OptionError("; ".join(errors))
    return values


def _warn_of_leading_dashes(displayed_line: str, prompt: str) -> None:
    first_word = prompt.removeprefix("--").partition(" ")[0]
    logger.warning(
        "%s begins with --%s, which is taken as its text. Write the prompt first, or as --%s TEXT",
        displayed_line,
        first_word,
        PROMPT,
    )


def _list_usable_names(
    options: Mapping[str, LineOption], find: Callable[[str], LineOption | None]
) -> list[str]:
    return known_names(options, [option.key for option in options.values()], find)


def _warn_of_repeated_option(displayed_line: str, spellings: Sequence[str]) -> None:
    if len(spellings) > 1:
        typed = " and --".join(dict.fromkeys(spellings))
        logger.warning("%s: --%s: given more than once, the last counts", displayed_line, typed)


def _list_spellings(
    names_and_values: Sequence[str], find: Callable[[str], LineOption | None]
) -> dict[str, list[str]]:
    """Return the spellings of each option in a prompt line, in order, by the option's key."""
    spellings: dict[str, list[str]] = {}
    for name_and_value in names_and_values:
        name = name_and_value.partition(" ")[0]
        option = find(name)
        if option is not None:
            spellings.setdefault(option.key, []).append(name)
    return spellings


def _find_odd_options(line: str, find: Callable[[str], LineOption | None]) -> list[str]:
    """Return an error message for each option of a line that begins with dashes other than two hyphens."""
    return [
        f"{dash}{word} {value}: an option begins with two plain dashes. Write --{word}"
        for dash, word, value in _ODD_OPTION.findall(line)[:MAX_LINE_OPTIONS]
        if find(word) is not None
    ]


def is_blank(line: str) -> bool:
    """Return whether a line contains no prompt: it is empty or a comment."""
    return not line.strip() or line.lstrip().startswith("#")


def read_generation_lines(path: Path) -> list[tuple[int, str]]:
    """Read the prompt lines of a --from_file file with their line numbers, from 1.

    Raises:
        OptionError: If the file cannot be read or has no prompt line.
    """
    if path.suffix.lower() in {".csv", ".json", ".jsonl", ".toml", ".yaml", ".yml"}:
        raise OptionError(
            f"--from_file {path}: pass a text file with a prompt on each line and its options after it, "
            "such as: a cat --w 832 --h 480 --d 7"
        )
    lines = numbered_lines(read_prompt_file(path, "--from_file"))  # without empty lines and comments
    if not lines:
        raise OptionError(f"--from_file {path}: the file has no prompt. Write one per line.")
    return lines


def read_prompt_lines(path: Path | None) -> dict[str, str | None]:
    """Return the prompt lines of a --from_file file by label, such as "line 3"; without a file, one None."""
    if path is None:
        return {"the prompt": None}
    return {f"line {number}": line for number, line in read_generation_lines(path)}


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that contain a prompt, each with its line number from 1."""
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if not is_blank(line)]


# beginnings of files that were saved instead of the intended one: a Git LFS pointer, a web page
_NO_PROMPTS = re.compile(r"\s*(version https://git-lfs|<!doctype html|<html)", re.IGNORECASE)


def read_prompt_file(path: Path, option: str) -> str:
    """Return the text of a prompt file.

    Args:
        path: The text file.
        option: Option that names the file, for messages.

    Raises:
        OptionError: If the file cannot be read, is not UTF-8 text, or is a web page or a Git LFS pointer.
    """
    try:
        text = read_text(path)
        if _NO_PROMPTS.match(text):
            raise OptionError(
                f"{option} {path}: the file is a web page or a Git LFS pointer, not a list of prompts. "
                "Download it again"
            )
        return text
    except OSError as error:
        reason = "is a folder" if path.is_dir() else error.strerror or error
        near = "" if path_exists(path) else explain_missing(path)
        raise OptionError(
            f"{option} {path}: {reason}.{near} Pass a text file with a prompt on each line"
        ) from None
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{option} {path}: the file is not UTF-8 text ({error.reason} at byte {error.start}). Save it as "
            "UTF-8"
        ) from None
