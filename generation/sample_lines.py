"""Prompt files of training samples: lines, or entries of a .toml or .json file. Standard library only."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from generation import prompt_lines
from generation.prompt_lines import find_option_key
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.option_values import parse_bounded_int
from modules.text_files import parse_json, parse_toml

logger = logging.getLogger(__name__)

PROMPT_KEY, SECOND_PROMPT_KEY = "prompt", "prompt_2"
STRENGTH_KEY = "lora_multiplier"  # strength of the trained LoRA, only in samples of a training
Entry = TypeVar("Entry")
Made = TypeVar("Made")


def _read_leading_full(text: str) -> int:
    return parse_bounded_int(_match_leading(r"[+-]?[0-9]+", text))


def _read_sample_seed(text: str) -> int:
    """Return a sample's seed: the number at the start of the text, or a hash of a text without one."""
    if not text.strip():
        raise ValueError("use a number or a text")
    return _read_leading_full(text) if re.match(r"[+-]?[0-9]", text) else prompt_lines.read_seed(text)


def _read_leading_number(text: str) -> float:
    return float(_match_leading(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text))


def _match_leading(pattern: str, text: str) -> str:
    """Return the number at the start of an option's value; warn if text after it is ignored."""
    match = re.match(pattern, text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} does not begin with a number")
    number = match[0]
    if number != text:
        logger.warning(
            "%r in a sample prompt is read as %s: what follows the number is ignored", text, number
        )
    return number


# settings of single models, which arrive in `Request.extra`
MODEL_SPECIFIC_OPTIONS: Mapping[str, prompt_lines.LineOption] = {
    "of": prompt_lines.LineOption("one_frame", prompt_lines.read_name),
    "v": prompt_lines.LineOption("reference_video", prompt_lines.read_path),
    "ctr": prompt_lines.LineOption("cfg_trunc_ratio", _read_leading_number),
    "rcfg": prompt_lines.LineOption("renorm_cfg", _read_leading_number),
    **{name: prompt_lines.LineOption(name, _read_leading_number) for name in ("mu", "y1", "y2")},
    # of networks that see a control image
    "am": prompt_lines.LineOption("control_multiplier", _read_leading_number),
    # of inpainting models
    "m": prompt_lines.LineOption("mask_path", prompt_lines.read_path),
    "mk": prompt_lines.LineOption("mask_path", prompt_lines.read_path),
    # of VACE
    "sm": prompt_lines.LineOption("src_mask", prompt_lines.read_path),
    "vs": prompt_lines.LineOption("vace_scale", prompt_lines.read_name),
    # of Bernini
    "bp": prompt_lines.LineOption("bernini_prompt", prompt_lines.read_name),
    "bg": prompt_lines.LineOption("bernini_guidance", prompt_lines.read_name),
    "gv": prompt_lines.LineOption("guidance_scale_video", _read_leading_number),
    "gi": prompt_lines.LineOption("guidance_scale_images", _read_leading_number),
    # of MiniMax-H3
    "ref": prompt_lines.LineOption("ref", prompt_lines.read_path, repeats=True),
    "ri": prompt_lines.LineOption("reference_image", prompt_lines.read_path, repeats=True),
    "rv": prompt_lines.LineOption("reference_video", prompt_lines.read_path, repeats=True),
    "ra": prompt_lines.LineOption("reference_audio", prompt_lines.read_path, repeats=True),
    "keyframe": prompt_lines.LineOption("keyframe", prompt_lines.read_path, repeats=True),
    "im": prompt_lines.LineOption("inpaint_mask", prompt_lines.read_path),
    "ii": prompt_lines.LineOption("inpaint_invert", prompt_lines.read_switch),
    "it": prompt_lines.LineOption("inpaint_threshold", prompt_lines.read_fraction),
    "gk": prompt_lines.LineOption("keyframe", prompt_lines.read_path, repeats=True),  # of LTX-2, too
    "gl": prompt_lines.LineOption("latent_frame", prompt_lines.read_path, repeats=True),
    "condition_image": prompt_lines.LineOption("condition_image", prompt_lines.read_path, repeats=True),
    "reference_jsonl": prompt_lines.LineOption("reference_jsonl", prompt_lines.read_path),
    "reference_index": prompt_lines.LineOption("reference_index", _read_leading_full),
    "task": prompt_lines.LineOption("task", prompt_lines.read_name),
    "fsa": prompt_lines.LineOption("h3_shift_audio", _read_leading_number),
}
# prompt files of training samples; numbers are read from their leading digits, as other trainers do
SAMPLE_OPTIONS: Mapping[str, prompt_lines.LineOption] = {
    "w": prompt_lines.LineOption("width", _read_leading_full),
    "h": prompt_lines.LineOption("height", _read_leading_full),
    "f": prompt_lines.LineOption("frame_count", _read_leading_full),
    "d": prompt_lines.LineOption("seed", _read_sample_seed),
    "s": prompt_lines.LineOption("sample_steps", _read_leading_full),
    "g": prompt_lines.LineOption("guidance_scale", _read_leading_number),
    "l": prompt_lines.LineOption("cfg_scale", _read_leading_number),
    "fs": prompt_lines.LineOption("discrete_flow_shift", _read_leading_number),
    "n": prompt_lines.LineOption("negative_prompt", str, prompt_lines.NO_TEXT),
    "i": prompt_lines.LineOption("image_path", prompt_lines.read_path),
    "img": prompt_lines.LineOption("image_path", prompt_lines.read_path),
    "ei": prompt_lines.LineOption("end_image_path", prompt_lines.read_path),
    "cn": prompt_lines.LineOption("control_video_path", prompt_lines.read_path),
    "ci": prompt_lines.LineOption("control_image_path", prompt_lines.read_path, repeats=True),
    # the same, as lines of wan_generate_video.py have them for VACE
    "sv": prompt_lines.LineOption("control_video_path", prompt_lines.read_path),
    "sr": prompt_lines.LineOption("control_image_path", prompt_lines.read_path, repeats=True),
    "ss": prompt_lines.LineOption("sample_sampler", prompt_lines.read_name),
    "cs": prompt_lines.LineOption("cfg_schedule", str, prompt_lines.NO_TEXT),
    "p2": prompt_lines.LineOption(SECOND_PROMPT_KEY, str, prompt_lines.NO_TEXT),
    "lm": prompt_lines.LineOption(STRENGTH_KEY, _read_leading_number),
    "fps": prompt_lines.NAMED_OPTIONS["fps"],
    **MODEL_SPECIFIC_OPTIONS,
}


# options of prompt lines by their keys -> their letters, which sample lines share
_CHARACTERS = {
    option.key: letter
    for letter, option in {
        "ss": prompt_lines.IMAGE_GENERATION_OPTIONS["ss"],
        **prompt_lines.EMBEDDED_GENERATION_OPTIONS,
        **prompt_lines.REFERENCES,
    }.items()
    if letter in SAMPLE_OPTIONS and letter not in MODEL_SPECIFIC_OPTIONS
}


def _read_size(text: str) -> Mapping[str, int]:
    """Parse `480 832` (height, width, as in --video_size) into `height` and `width`."""
    sides = prompt_lines.read_size(text)
    return {"height": sides["video_size_height"], "width": sides["video_size_width"]}


_SIZE_OPTION = prompt_lines.LineOption("size", _read_size)


def fit_side(pixels: int, step: int) -> int:
    """Round a sample's width or height down to a multiple of `step`, which the model requires."""
    return max(pixels // step, 1) * step


def find_sample_option(word: str) -> prompt_lines.LineOption | None:
    """Return the option of a sample prompt line with this letter or long name; None if there is none."""
    option = SAMPLE_OPTIONS.get(word.lower())
    if option is not None:
        return option
    by_name = {option.key: option for option in SAMPLE_OPTIONS.values()}
    by_name |= {key: SAMPLE_OPTIONS[character] for key, character in _CHARACTERS.items()}
    by_name |= dict.fromkeys(("video_size", "image_size"), _SIZE_OPTION)
    by_name |= {"controlnet_image": SAMPLE_OPTIONS["cn"]}  # of other image trainers
    key = find_option_key(word, by_name)
    return None if key is None else by_name[key]


def parse_sample_line(line: str, where: str = "the sample prompt") -> dict[str, Any]:
    """Parse a line of a training prompt file into `prompt` and its options by key.

    Args:
        line: The prompt line.
        where: Name of the line in messages.

    Raises:
        OptionError: If a value cannot be parsed.
    """
    try:
        return prompt_lines.parse_option_line(
            line,
            SAMPLE_OPTIONS,
            where,
            find=find_sample_option,
            unsupported_hint="It has no effect in samples of a training",
        )
    except OptionError as error:
        raise OptionError(f"{where} {line.strip()!r}: {error}. Fix the line") from None


def read_sample_file(path: Path) -> str:
    """Read the text of a training prompt file.

    Raises:
        OptionError: If the file cannot be read.
    """
    return prompt_lines.read_prompt_file(path, "--sample_prompts")


def parse_sample_prompts(text: str, path: Path) -> list[dict[str, Any]]:
    """Parse the text of a training prompt file (.txt, .toml or .json); return one dictionary per sample.

    The keys are `prompt` and the keys of `SAMPLE_OPTIONS`. In TOML, `[prompt]` contains values that all
    `[[prompt.subset]]` tables share; a subset takes precedence. JSON is a list of prompt lines and objects.

    Args:
        text: The text of the file.
        path: Path of the file; its suffix determines the format.

    Raises:
        OptionError: If an entry cannot be parsed; the message names the file, the entry and the key.
    """
    option = f"--sample_prompts {path}"
    suffix = path.suffix.lower()
    try:
        entries = _split_entries(text, suffix)
    except ValueError as error:
        raise OptionError(f"{option}: {error}") from None
    if not entries:
        minimum = "one per line" if suffix == ".txt" else "at least one"
        raise OptionError(f"{option}: the file has no prompt. Write {minimum}.")
    entry_name = "line" if suffix == ".txt" else "entry"

    def read_entry(numbered_entry: tuple[int, Any]) -> dict[str, Any]:
        number, entry = numbered_entry
        where = f"{path}, {entry_name} {number}"
        return parse_sample_line(entry, where) if isinstance(entry, str) else _check_entry(entry, where)

    return read_all(entries, read_entry)


def _split_entries(text: str, suffix: str) -> list[tuple[int, Any]]:
    """Split a prompt file into its entries, numbered from 1."""
    if suffix == ".txt":
        return [*prompt_lines.numbered_lines(text)]
    if suffix == ".toml":
        # The `[[prompt.subset]]` tables of a TOML prompt file, each with the shared values filled in.
        table = parse_toml(text).get("prompt")
        subsets = table.get("subset", []) if isinstance(table, dict) else None
        if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
            raise ValueError("write a table [prompt] with tables [[prompt.subset]]")
        shared = {key: value for key, value in (table or {}).items() if key != "subset"}
        return [*enumerate(([{**shared, **subset} for subset in subsets]), 1)]
    if suffix == ".json":
        entries = parse_json(text)
        if not isinstance(entries, list) or not all(isinstance(entry, (str, dict)) for entry in entries):
            raise ValueError("write a list of prompts (texts or objects)")
        return [*enumerate(entries, 1)]
    raise ValueError(f"{suffix or 'a file without suffix'} is not supported. Use .txt, .toml or .json")


def read_all(entries: Iterable[Entry], read: Callable[[Entry], Made]) -> list[Made]:
    """Call `read` on each entry and return the results; one OptionError reports the errors of all entries."""
    results = []
    errors = []
    for entry in entries:
        try:
            results.append(read(entry))
        except OptionError as error:
            errors.append(str(error))
    if errors:
        raise OptionError("\n  ".join(["--sample_prompts:", *errors] if len(errors) > 1 else errors))
    return results


def _check_entry(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert the values of one prompt's table; return them by key, or raise OptionError for a wrong type."""
    # the type that each key of a prompt's table accepts
    types: dict[str, type] = {}
    for known_option in SAMPLE_OPTIONS.values():
        types[known_option.key] = list if known_option.repeats else type(known_option.read("1"))
    types["prompt"] = str
    values: dict[str, Any] = {}
    for name, value in entry.items():
        key = name
        option = find_sample_option(name)
        if name not in types and option is not None and option.key in types:
            key = option.key  # `name` is a name that prompt lines use, such as steps
            if key in entry:  # the key itself takes precedence
                continue
        if option is _SIZE_OPTION:  # keys of a single side take precedence over the size
            # such as [480, 832] or "480 832"
            try:
                sides = _read_size(" ".join(map(str, value)) if isinstance(value, list) else str(value))
            except ValueError as error:
                raise OptionError(f"{where}: size: {error}") from None
            values |= {side: number for side, number in sides.items() if side not in entry}
        elif key in types:
            values[key] = _convert(key, value, types[key], where)
        else:
            hint = did_you_mean(key, types) or f" Known: {', '.join(sorted(types))}"
            logger.warning("%s: the unknown key %s is ignored.%s", where, key, hint)
    return values


def _convert(key: str, value: Any, kind: type, where: str) -> Any:
    """Convert a value of a prompt's table to the type of its key."""
    if kind is list and isinstance(value, str):
        value = [value]
    if key == "seed" and isinstance(value, str):
        try:
            value = _read_sample_seed(value)
        except ValueError as error:
            raise OptionError(f"{where}: seed: {error}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):  # bool is a subclass of int
        raise OptionError(f"{where}: {key} = {value!r} must be of type {kind.__name__}")
    return value
