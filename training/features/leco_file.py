"""Read the prompts file of a LECO training: pairs of prompts, and sliders, which are expanded to pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.text_files import parse_toml, read_text

ERASE, ENHANCE = "erase", "enhance"
SIDE_STEP = 8  # sides are multiples of this number of pixels, one latent
MAX_FACTOR = 1000.0
MAX_SIDE = 8192
YAML = {".yaml", ".yml"}

# keys of pairs and sliders
SHARED = (
    *("resolution", "dynamic_resolution", "dynamic_crops", "batch_size", "multiplier", "weight"),
    "guidance_scale",
)
PAIR = (*SHARED, "target", "positive", "unconditional", "neutral", "action")
NEUTRALS = ("neutral", "neutrals", "neutral_prompt_file")
SLIDER = (*SHARED, "target_class", "positive", "negative", "resolutions", *NEUTRALS)
TOP = (*dict.fromkeys((*PAIR, *SLIDER)), "prompts", "slider", "targets")


@dataclass(frozen=True)
class LecoPair:
    """Prompts of one training pair: the target learns neutral +- guidance * (positive - opposite)."""

    target: str  # prompt with which latents are denoised, and whose prediction is trained
    positive: str
    unconditional: str  # the opposite of `positive`
    neutral: str
    action: str  # ERASE goes away from `positive`, ENHANCE toward it
    guidance_scale: float = 1.0
    height: int = 512  # pixels
    width: int = 512
    dynamic_resolution: bool = False  # draw a square side from half to the full resolution
    dynamic_crops: bool = False  # draw the size and crop conditions of models that have them
    batch_size: int = 1
    multiplier: float = 1.0  # strength of the trained LoRA
    weight: float = 1.0  # factor on the loss

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts that are encoded."""
        return (self.target, self.positive, self.unconditional, self.neutral)

    @property
    def sign(self) -> int:
        """Sign of the guidance term: 1 to enhance the concept, -1 to erase it."""
        return 1 if self.action == ENHANCE else -1


def read_pairs(path: Path) -> tuple[LecoPair, ...]:
    """Read the pairs of prompts in a TOML or YAML file; sliders in it become pairs too.

    Raises OptionError that names the file, the place and the remedy.
    """
    place = f"--prompts_file {path}"
    content = _parse(place, path)
    if isinstance(content, list):  # YAML files of the original LECO program are a list of entries
        content = {"prompts": content}
    if not isinstance(content, Mapping):
        raise OptionError(f"{place}: it is empty, or has no entries. Write [[prompts]] with a target")
    _reject_unknown(place, content, TOP)
    default = {key: value for key, value in content.items() if key not in ("prompts", "slider", "targets")}
    pairs: list[LecoPair] = []
    for number, entry in enumerate(_list_tables(place, content, "prompts"), 1):
        entry_name = f"{place}, [[prompts]] {number}"
        # a target_class marks a slider, which is several pairs
        read_entry = _read_slider if "target_class" in entry or "target_class" in default else _read_pair
        pairs += read_entry(entry_name, path, entry, default)
    pairs += _read_sliders(place, path, content, default)
    if not pairs:
        raise OptionError(f"{place}: it has no targets. Write [[prompts]] with a target, or [slider]")
    return tuple(pairs)


def _parse(place: str, path: Path) -> Any:
    try:
        text = read_text(path)
        if path.suffix.lower() in YAML:
            from modules.yaml_files import parse_yaml  # few files are YAML

            return parse_yaml(text)
        return parse_toml(text)
    except (OSError, ValueError) as error:
        kind = "YAML" if path.suffix.lower() in YAML else "TOML"
        raise OptionError(
            f"{place}: it is not a {kind} file ({error}). "
            "The documentation of Stable Diffusion shows one: give [[prompts]]"
        ) from None


def _read_sliders(
    place: str, path: Path, content: Mapping[str, Any], default: Mapping[str, Any]
) -> Iterator[LecoPair]:
    """Yield the pairs of [slider], of `targets`, and of a file whose top level is a slider."""
    slider = content.get("slider")
    if slider is not None:
        where = f"{place}, [slider]"
        if not isinstance(slider, Mapping):
            raise OptionError(
                f"{where}: it is not a table. Write target_class and positive or negative in it"
            )
        _reject_unknown(where, slider, (*SLIDER, "targets"))
        slider_values = {key: value for key, value in slider.items() if key != "targets"}
        entries = _list_tables(where, slider, "targets")
        if not entries:
            yield from _read_slider(where, path, slider_values, default)
        for number, entry in enumerate(entries, 1):
            yield from _read_slider(f"{where}, targets {number}", path, entry, {**default, **slider_values})
    targets = _list_tables(place, content, "targets")
    for number, entry in enumerate(targets, 1):
        yield from _read_slider(f"{place}, targets {number}", path, entry, default)
    # a file whose top level is a slider
    if not targets and slider is None and "prompts" not in content and "target_class" in default:
        yield from _read_slider(place, path, {}, default)


def _list_tables(place: str, content: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    tables = content.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise OptionError(f"{place}: {key} is no list of tables. Write [[{key}]] for each entry")
    return tables


def _reject_unknown(place: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(key) for key in table if key not in known]
    if unknown:
        raise OptionError(f"{place}: unknown key {unknown[0]}. Use {', '.join(known)}")


def _read_pair(
    place: str, path: Path, entry: Mapping[str, Any], default: Mapping[str, Any]
) -> Iterator[LecoPair]:
    """Yield the one pair of an entry of [[prompts]].

    `default` has the keys at the file's top level, which hold for entries that do not set them.
    """
    _reject_unknown(place, entry, PAIR)
    values = {**default, **entry}
    target = _read_text(place, values, "target")
    if target is None:
        raise OptionError(f'{place}: it has no target. Write target = "a prompt"')
    positive = _read_text(place, values, "positive")
    unconditional = _read_text(place, values, "unconditional") or ""
    neutral = _read_text(place, values, "neutral")
    action = values.get("action", ERASE)
    if action not in (ERASE, ENHANCE):
        raise OptionError(f"{place}: action = {action!r}: write {ERASE} or {ENHANCE}")
    height, width = _read_resolution(place, values.get("resolution", 512))
    yield LecoPair(
        target=target,
        positive=target if positive is None else positive,
        unconditional=unconditional,
        neutral=unconditional if neutral is None else neutral,
        action=action,
        height=height,
        width=width,
        multiplier=_read_number(place, values, "multiplier", signed=True),
        **_read_shared(place, values, height == width),
    )


def _read_slider(
    place: str, path: Path, entry: Mapping[str, Any], default: Mapping[str, Any]
) -> Iterator[LecoPair]:
    """Yield the pairs of a slider, for each combination of a neutral prompt and a size.

    Args:
        place: Description of the entry, for messages.
        path: The file; prompt files in it are relative to its folder.
        entry: Keys of the slider.
        default: Keys at the file's top level, for those that the slider does not set.
    """
    _reject_unknown(place, entry, SLIDER)
    values = {**default, **entry}
    target = _read_text(place, values, "target_class")
    if target is None:
        raise OptionError(f'{place}: it has no target_class. Write target_class = "person", or ""')
    positive, negative = (_read_text(place, values, key) or "" for key in ("positive", "negative"))
    if not positive and not negative:
        raise OptionError(f"{place}: write positive, negative or both")
    # neutral prompts of the slider replace all of the top level's, whose keys may be others
    has_neutrals = any(key in entry for key in NEUTRALS)
    neutrals = _list_neutrals(place, path, entry if has_neutrals else values)
    resolutions = values.get("resolutions")
    if resolutions is not None and not (isinstance(resolutions, list) and resolutions):
        raise OptionError(f"{place}: resolutions = {resolutions!r} is no list. Write [512, 768]")
    sides = [_read_resolution(place, value) for value in resolutions or [values.get("resolution", 512)]]
    strength = _read_number(place, values, "multiplier", signed=True)
    for neutral, (height, width) in product(neutrals, sides):
        shared = _read_shared(place, values, height == width)
        # a slider is trained at positive and at negative strength, each toward one of its ends
        for toward, opposite, action, sign in _expand(positive, negative):
            yield LecoPair(
                target=target,
                positive=toward,
                unconditional=opposite,
                neutral=neutral,
                action=action,
                height=height,
                width=width,
                multiplier=sign * strength,
                **shared,
            )


def _expand(positive: str, negative: str) -> list[tuple[str, str, str, int]]:
    """Return tuples of a slider's pairs: positive, its opposite, action, and the sign of the strength."""
    if positive and negative:
        return [
            (negative, positive, ERASE, 1),
            (positive, negative, ENHANCE, 1),
            (positive, negative, ERASE, -1),
            (negative, positive, ENHANCE, -1),
        ]
    if negative:
        return [(negative, "", ERASE, 1), (negative, "", ENHANCE, -1)]
    return [(positive, "", ENHANCE, 1), (positive, "", ERASE, -1)]


def _list_neutrals(place: str, path: Path, values: Mapping[str, Any]) -> list[str]:
    """Return the neutral prompts of a slider; by default, one empty prompt."""
    single = _read_text(place, values, "neutral")
    neutrals = [] if single is None else [single]
    several = values.get("neutrals", [])
    if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
        raise OptionError(f'{place}: neutrals = {several!r} is no list of prompts. Write ["a", "b"]')
    neutrals += several
    name = _read_text(place, values, "neutral_prompt_file")
    if name is not None:
        try:
            lines = read_text(path.parent / name).splitlines()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"{place}: neutral_prompt_file {path.parent / name} cannot be read ({error}). Correct it"
            ) from None
        neutrals += [line.strip() for line in lines if line.strip()]
    return neutrals or [""]


def _read_shared(place: str, values: Mapping[str, Any], is_square: bool) -> dict[str, Any]:
    """Return the values of the fields that pairs and sliders share, by name."""
    switches = {key: values.get(key, False) for key in ("dynamic_resolution", "dynamic_crops")}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise OptionError(f"{place}: {key} = {value!r}: write true or false")
    if switches["dynamic_resolution"] and not is_square:
        raise OptionError(f"{place}: dynamic_resolution is for a square resolution. Leave out one of the two")
    batch_size = values.get("batch_size", 1)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= 1024:
        raise OptionError(f"{place}: batch_size = {batch_size!r}: give a whole number from 1 to 1024")
    numbers = {key: _read_number(place, values, key) for key in ("guidance_scale", "weight")}
    return {**switches, **numbers, "batch_size": batch_size}


def _read_text(place: str, values: Mapping[str, Any], key: str) -> str | None:
    text = values.get(key)
    if text is not None and not isinstance(text, str):
        raise OptionError(f'{place}: {key} = {text!r} is no text. Write {key} = "a prompt"')
    return text


def _read_number(place: str, values: Mapping[str, Any], key: str, signed: bool = False) -> float:
    value = values.get(key, 1.0)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 < (abs(value) if signed else value) <= MAX_FACTOR):
        low = "other than 0" if signed else "above 0"
        raise OptionError(f"{place}: {key} = {value!r}: give a number {low}, of at most {MAX_FACTOR:g}")
    return float(value)


def _read_resolution(place: str, value: Any) -> tuple[int, int]:
    """Return height and width from one number for both, or from [height, width]."""
    sides = value if isinstance(value, list) else [value, value]
    are_sides = len(sides) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 64 <= side <= MAX_SIDE for side in sides
    )
    if not are_sides or any(side % SIDE_STEP for side in sides):
        raise OptionError(
            f"{place}: resolution = {value!r}: give a side from 64 to {MAX_SIDE}, or [height, width], in "
            f"multiples of {SIDE_STEP}"
        )
    return sides[0], sides[1]
