"""Options of grids of videos: comparison sheets, and tools/compare.py. Standard library only."""

import contextlib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from generation.prompt_lines import LineOption, Value, find_option, store_value
from modules.errors import OptionError
from modules.options import Options, option
from modules.paths import explain_missing, sort_by_numbers
from modules.text_files import read_safetensors_texts

MAX_AXES = 2
MAX_CELLS = 100  # of a sheet: their videos are all open while it is drawn
PROMPT = LineOption("prompt", str)
# no axes, and why
REJECTED = {
    "fps": "it changes no image, and the cells of a sheet play at one rate. Omit it",
    "lora_multiplier": "it applies to a whole run. tools/compare.py makes a column of each strength",
}


@dataclass(frozen=True)
class Axis:
    """A grid axis: an option and its values, both as typed and as parsed."""

    name: str  # on the command line: guidance_scale
    option: LineOption
    texts: tuple[str, ...]
    values: tuple[Value, ...]

    def describe(self, index: int) -> str:
        """Return the label of a grid axis's value, such as `guidance_scale = 3`."""
        return f"{self.name} = {self.texts[index]}"


class SheetOptions(Options, title="comparison sheet"):
    """Axes of a comparison sheet; without axes, no sheet is made."""

    sheet: tuple[str, ...] | None = option(
        "make one labeled grid of all values of one or two options of a prompt line: --sheet seed=1,2,3 "
        "guidance_scale=3,5. The first goes across, the second down. Values with commas: separate them with "
        "| instead",
        metavar="AXIS=V1,V2",
    )

    @property
    def has_prompts(self) -> bool:
        """Whether one of the axes varies the prompt."""
        return any(axis.partition("=")[0].strip() == PROMPT.key for axis in self.sheet or ())

    def axes(self, line_options: Mapping[str, LineOption]) -> tuple[Axis, ...]:
        """Parse the axes; the first one runs horizontally, the second one vertically.

        Args:
            line_options: Options of a prompt line.

        Raises:
            OptionError: If a value cannot be parsed; the message names the axis and the value.
        """
        if self.sheet is None:
            return ()
        if not 1 <= len(self.sheet) <= MAX_AXES:
            raise OptionError(
                f"--sheet takes one or two axes, {len(self.sheet)} are given: write them as seed=1,2,3 "
                "guidance_scale=3,5, a text with spaces in quotes"
            )
        axes = tuple(_read_axis(text, line_options) for text in self.sheet)
        if len({axis.option.key for axis in axes}) < len(axes):
            raise OptionError(
                f"--sheet {' '.join(self.sheet)}: both axes are {axes[0].name}. Pass two options"
            )
        cells = prod(len(axis.texts) for axis in axes)
        if cells > MAX_CELLS:
            raise OptionError(
                f"--sheet has {cells} cells, at most {MAX_CELLS} are possible: use fewer values"
            )
        return axes


def split_values(text: str) -> list[str]:
    """Split the values of a grid axis at each `|`, or at each comma if there is no `|`.

    A backslash before a separator makes it part of a value.
    """
    parts = re.split(r"(?<!\\)\|", text)
    if len(parts) == 1:
        parts = re.split(r"(?<!\\),", text)
    return [re.sub(r"\\([,|])", r"\1", part).strip() for part in parts]


def _read_axis(text: str, line_options: Mapping[str, LineOption]) -> Axis:
    """Parse one axis of --sheet, such as `seed=1,2,3`."""
    name, equals, values_text = text.partition("=")
    name = name.strip().lstrip("-")
    if not equals:
        raise OptionError(f"--sheet {text}: no values are given. Write AXIS=VALUE,VALUE, such as seed=1,2,3")
    if name in REJECTED:
        raise OptionError(f"--sheet {name}: {REJECTED[name]}")
    option = PROMPT if name == PROMPT.key else find_option(name, line_options)
    if option is None:
        keys = sorted({line_option.key for line_option in line_options.values()})
        raise OptionError(
            f"--sheet {name}: it is not an option of a prompt line. Use one of prompt, {', '.join(keys)}"
        )
    value_texts = split_values(values_text)
    return Axis(option.key, option, tuple(value_texts), _read_values(name, option, value_texts))


def _read_values(name: str, option: LineOption, texts: Sequence[str]) -> tuple[Value, ...]:
    """Parse a grid axis's values; raise OptionError that names the axis and the invalid value."""
    for text in texts:
        if texts.count(text) > 1:
            raise OptionError(f"--sheet {name}: the value {text!r} is given twice. Omit one")
    values = []
    for text in texts:
        try:
            values.append(option.read(text))
        except ValueError as error:
            raise OptionError(f"--sheet {name}: {error}. Fix that value") from None
        if option is PROMPT and not text:
            raise OptionError("--sheet prompt: one of the prompts is empty. Write it, or omit it")
    return tuple(values)


def list_cells(
    axes: Sequence[Axis], line: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Yield the indices (column, row) of each cell and the values of its prompt line, row by row.

    Args:
        axes: Axes of the sheet.
        line: Values of the prompt line, which the values of the axes override.
    """
    axis_keys = {axis.option.key for axis in axes}
    # the last axis, which runs vertically, varies slowest
    for reversed_indices in product(*(range(len(axis.texts)) for axis in reversed(axes))):
        indices = reversed_indices[::-1]
        values = {key: value for key, value in line.items() if key not in axis_keys}
        # unset the options that an axis replaces; if such an option is an axis too, it is set below
        for axis in axes:
            values.update(dict.fromkeys(axis.option.replaced_keys))
        for axis, index in zip(axes, indices, strict=True):
            store_value(values, axis.option, axis.values[index])
        yield indices, values


MAX_COLUMNS = 64


class CompareOptions(Options, title="comparison"):
    """Which LoRA files and strengths tools/compare.py compares side by side."""

    family: str | None = option("family of the model; default: as the first LoRA says")
    lora: tuple[Path, ...] = option(
        "LoRA files to compare; patterns such as my_lora-*.safetensors",
        nargs="+",
        required=True,
    )
    lora_high_noise: tuple[Path, ...] | None = option(
        "of models with two experts the LoRA files for --dit_high_noise, as many as for --lora, which then "
        "are for --dit: the first two make the first column, both at the strength of the column",
        nargs="+",
    )
    lora_multiplier: tuple[float, ...] = option(
        "strengths to compare each file at", nargs="+", default=(1.0,)
    )

    beside: tuple[Path, ...] | None = option(
        "LoRA files that are used in every column but the first, such as yours if --lora is an adapter or a "
        "Turbo LoRA; a column has them alone",
        nargs="+",
        place="there",
        excludes="lora_high_noise",
    )
    beside_multiplier: tuple[float, ...] = option(
        "strength of each file of --beside; missing ones are 1",
        nargs="+",
        default=(1.0,),
        ignored_without="beside",
    )

    def __post_init__(self) -> None:
        if self.lora_high_noise and len(self.lora_high_noise) != len(self.lora):
            raise OptionError(
                f"--lora has {len(self.lora)} files, --lora_high_noise {len(self.lora_high_noise)}: use as "
                "many, the first of each for the first column"
            )
        columns = len(self.lora) * len(self.lora_multiplier) + 1 + bool(self.beside)
        if columns > MAX_COLUMNS:
            raise OptionError(
                f"--lora and --lora_multiplier give {columns} columns, {MAX_COLUMNS} are the most. Use "
                "fewer files or strengths."
            )


def expand_patterns(patterns: tuple[Path, ...], flag: str = "--lora") -> tuple[Path, ...]:
    """Return the files of all patterns, without duplicates, in natural order of the numbers in their names.

    Shells on Windows do not expand patterns.

    Raises:
        OptionError: If a pattern or a name matches no file.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        if pattern.is_file():
            paths[pattern] = None
            continue
        if pattern.is_dir():
            raise OptionError(f"{flag} {pattern} is a folder: pass {pattern / '*.safetensors'}")
        matches = [Path(name) for name in glob.glob(str(pattern))]  # noqa: PTH207 (of any folder)
        matching_files = sort_by_numbers(match for match in matches if match.is_file())
        if not matching_files:
            hint = explain_missing(pattern) or " Pass LoRA files or a pattern that matches some."
            raise OptionError(f"{flag} {pattern}: no such file.{hint}")
        paths |= dict.fromkeys(matching_files)
    return tuple(paths)


def list_lora_arguments(options: CompareOptions) -> list[str]:
    """Return the command-line options that pass the compared LoRA files to the generation script."""
    argv = ["--lora_weight", *map(str, (*options.lora, *(options.beside or ())))]
    if options.lora_high_noise:
        argv += ["--lora_weight_high_noise", *map(str, options.lora_high_noise)]
    return argv


def explain_rejected_option(argv: Sequence[str]) -> str | None:
    """Return the message about a generation option that a comparison sets itself; None if there is none."""
    names = {word.partition("=")[0] for word in argv}
    for own_option in ("--lora", "--lora_high_noise"):
        generation_option = own_option.replace("lora", "lora_weight")
        if generation_option in names:
            return f"{generation_option}: pass the files to {own_option}, which makes a column of each"
    if "--lora_multiplier_high_noise" in names:
        return "--lora_multiplier_high_noise: both LoRAs of a column have its strength, --lora_multiplier"
    return None


def read_lora_family(path: Path, families: Mapping[str, Sequence[str]]) -> str:
    """Return the model family that is named in a LoRA file's metadata.

    Args:
        path: File of the LoRA.
        families: Other models that each family's scripts run, by family.

    Raises:
        OptionError: If the metadata names no family.
    """
    metadata: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # an error is reported when it is read as a LoRA
        metadata = read_safetensors_texts(path)
    keys = ("ss_base_model_version", "modelspec.architecture")
    description = " ".join(metadata.get(key, "") for key in keys)
    compact = re.sub(r"[^a-z0-9]", "", description.lower())
    without_digits = re.sub(r"\d", "", compact)  # for names such as flux-1-kontext
    family_by_model: dict[str, str] = {}
    for family, models in families.items():
        family_by_model |= dict.fromkeys((family, *models), family)
    # long names first: "flux" also occurs in flux_kontext and flux_2
    for name in sorted(family_by_model, key=len, reverse=True):
        compact_name = name.replace("_", "")
        if compact_name in (without_digits if compact_name.isalpha() else compact):
            return family_by_model[name]
    raise OptionError(
        f"--lora {path} does not say which model it is for. Pass --family: {', '.join(families)}."
    )
