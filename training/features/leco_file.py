"""Read the prompts file of a LECO run: pairs of prompts, and sliders, which are expanded to pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from modules.errors import OptionError
from modules.text_files import parse_toml, read_text

ERASE, ENHANCE = "erase", "enhance"
SIDE_STEP = 8  # sides are multiples of this number of pixels, one latent
MAX_FACTOR = 1000.0
MAX_SIDE = 8192
YAML = {".yaml", ".yml"}

# keys of pairs and sliders
SHARED_KEYS = (
    *("resolution", "dynamic_resolution", "dynamic_crops", "batch_size", "multiplier", "weight"),
    "guidance_scale",
)
PAIR_KEYS = (*SHARED_KEYS, "target", "positive", "unconditional", "neutral", "action")
NEUTRAL_KEYS = ("neutral", "neutrals", "neutral_prompt_file")
SLIDER_KEYS = (*SHARED_KEYS, "target_class", "positive", "negative", "resolutions", *NEUTRAL_KEYS)
TOP_LEVEL_KEYS = (*dict.fromkeys((*PAIR_KEYS, *SLIDER_KEYS)), "prompts", "slider", "targets")


@dataclass(frozen=True)
class LecoPair:
    """One prompt pair: the prediction for `target` learns neutral +- guidance * (positive - opposite)."""

    target: str  # prompt for denoising latents, whose prediction is trained
    positive: str
    unconditional: str  # the opposite of `positive`
    neutral: str
    action: str  # ERASE moves away from `positive`, ENHANCE toward it
    guidance_scale: float = 1.0
    height: int = 512  # pixels
    width: int = 512
    dynamic_resolution: bool = False  # draw a square side from half to the full resolution
    dynamic_crops: bool = False  # draw the size and crop conditions of models that have them
    batch_size: int = 1
    multiplier: float = 1.0  # strength of the trained LoRA
    weight: float = 1.0  # factor on the loss

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that are encoded."""
        return (self.target, self.positive, self.unconditional, self.neutral)

    @property
    def sign(self) -> int:
        """Sign of the guidance term: 1 to enhance the concept, -1 to erase it."""
        return 1 if self.action == ENHANCE else -1


def read_pairs(path: Path) -> tuple[LecoPair, ...]:
    """Read the pairs of prompts in a TOML or YAML file; sliders in it become pairs too.

    Raises OptionError with the file, the location in it and the remedy.
    """
    location = f"--prompts_file {path}"
    content = _parse(location, path)
    if isinstance(content, list):  # YAML files of the original LECO program are a list of entries
        content = {"prompts": content}
    if not isinstance(content, Mapping):
        raise OptionError(f"{location}: it is empty, or has no entries. Write [[prompts]] with a target")
    _reject_unknown(location, content, TOP_LEVEL_KEYS)
    default = {key: value for key, value in content.items() if key not in ("prompts", "slider", "targets")}
    pairs: list[LecoPair] = []
    for number, entry in enumerate(_list_tables(location, content, "prompts"), 1):
        entry_location = f"{location}, [[prompts]] {number}"
        is_slider = "target_class" in entry or "target_class" in default
        if is_slider:  # several pairs
            pairs += _read_slider(entry_location, path, entry, default)
        else:
            pairs.append(_read_pair(entry_location, entry, default))
    pairs += _read_sliders(location, path, content, default)
    if not pairs:
        raise OptionError(f"{location}: it has no targets. Write [[prompts]] with a target, or [slider]")
    return tuple(pairs)


def _parse(location: str, path: Path) -> Any:
    try:
        text = read_text(path)
        if path.suffix.lower() in YAML:
            from modules.yaml_files import parse_yaml  # few files are YAML

            return parse_yaml(text)
        return parse_toml(text)
    except (OSError, ValueError) as error:
        kind = "YAML" if path.suffix.lower() in YAML else "TOML"
        raise OptionError(
            f"{location}: it is not a {kind} file ({error}). "
            "The documentation of Stable Diffusion shows one: set [[prompts]]"
        ) from None


def _read_sliders(
    location: str, path: Path, content: Mapping[str, Any], default: Mapping[str, Any]
) -> Iterator[LecoPair]:
    """Yield the pairs of the sliders in a file."""
    # 1. [slider]: one slider, or one for each of its `targets`, with the other keys as defaults.
    # 2. `targets` at the top level: one slider each.
    # 3. A file with a target_class but none of these: its top level is a slider.
    slider = content.get("slider")
    if slider is not None:
        slider_location = f"{location}, [slider]"
        if not isinstance(slider, Mapping):
            raise OptionError(
                f"{slider_location}: it is not a table. Write target_class and positive or negative in it"
            )
        _reject_unknown(slider_location, slider, (*SLIDER_KEYS, "targets"))
        slider_values = {key: value for key, value in slider.items() if key != "targets"}
        entries = _list_tables(slider_location, slider, "targets")
        if not entries:
            yield from _read_slider(slider_location, path, slider_values, default)
        for number, entry in enumerate(entries, 1):
            yield from _read_slider(
                f"{slider_location}, targets {number}", path, entry, {**default, **slider_values}
            )
    targets = _list_tables(location, content, "targets")
    for number, entry in enumerate(targets, 1):
        yield from _read_slider(f"{location}, targets {number}", path, entry, default)
    if not targets and slider is None and "prompts" not in content and "target_class" in default:
        yield from _read_slider(location, path, {}, default)


def _list_tables(location: str, content: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    tables = content.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise OptionError(f"{location}: {key} is not a list of tables. Write [[{key}]] for each entry")
    return tables


def _reject_unknown(location: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(key) for key in table if key not in known]
    if unknown:
        raise OptionError(f"{location}: unknown key {unknown[0]}. Use {', '.join(known)}")


def _read_pair(location: str, entry: Mapping[str, Any], default: Mapping[str, Any]) -> LecoPair:
    """Return the pair of an entry of [[prompts]]; `location` names the entry in messages."""
    # `default` has the keys at the file's top level, which apply to entries that do not set them. Without
    # positive, it is the target; without neutral, it is unconditional.
    _reject_unknown(location, entry, PAIR_KEYS)
    values = {**default, **entry}
    target = _read_text(location, values, "target")
    if target is None:
        raise OptionError(f'{location}: it has no target. Write target = "a prompt"')
    positive = _read_text(location, values, "positive")
    unconditional = _read_text(location, values, "unconditional") or ""
    neutral = _read_text(location, values, "neutral")
    action = values.get("action", ERASE)
    if action not in (ERASE, ENHANCE):
        raise OptionError(f"{location}: action = {action!r}: write {ERASE} or {ENHANCE}")
    height, width = _read_resolution(location, values.get("resolution", 512))
    return LecoPair(
        target=target,
        positive=target if positive is None else positive,
        unconditional=unconditional,
        neutral=unconditional if neutral is None else neutral,
        action=action,
        height=height,
        width=width,
        multiplier=_read_number(location, values, "multiplier", signed=True),
        **_read_shared_fields(location, values, height == width),
    )


def _read_slider(
    location: str, path: Path, entry: Mapping[str, Any], default: Mapping[str, Any]
) -> Iterator[LecoPair]:
    """Yield the pairs of a slider, for each combination of a neutral prompt and a size."""
    _reject_unknown(location, entry, SLIDER_KEYS)
    values = {**default, **entry}
    target = _read_text(location, values, "target_class")
    if target is None:
        raise OptionError(f'{location}: it has no target_class. Write target_class = "person", or ""')
    directions = _read_directions(location, values)
    # any neutral prompts of the slider replace all those at the top level
    has_own_neutrals = any(key in entry for key in NEUTRAL_KEYS)
    neutrals = _list_neutrals(location, path, entry if has_own_neutrals else values)
    sizes = _read_sizes(location, values)
    strength = _read_number(location, values, "multiplier", signed=True)
    for neutral, (height, width) in product(neutrals, sizes):
        shared = _read_shared_fields(location, values, height == width)
        for direction in directions:
            yield LecoPair(
                target=target,
                positive=direction.positive,
                unconditional=direction.unconditional,
                neutral=neutral,
                action=direction.action,
                height=height,
                width=width,
                multiplier=direction.sign * strength,
                **shared,
            )


def _read_sizes(location: str, values: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the heights and widths of a slider, from its `resolutions` or its single `resolution`."""
    resolutions = values.get("resolutions")
    if resolutions is None:
        return [_read_resolution(location, values.get("resolution", 512))]
    if not isinstance(resolutions, list) or not resolutions:
        raise OptionError(f"{location}: resolutions = {resolutions!r} is not a list. Write [512, 768]")
    return [_read_resolution(location, value) for value in resolutions]


class _PairDirection(NamedTuple):
    """Fields that differ between the LecoPairs of one slider, and the sign of the multiplier."""

    positive: str
    unconditional: str
    action: str
    sign: int


def _read_directions(location: str, values: Mapping[str, Any]) -> list[_PairDirection]:
    """Return what a slider learns at positive and at negative strength, each toward one of its prompts."""
    # One of the two prompts, positive and negative, may be missing.
    positive, negative = (_read_text(location, values, key) or "" for key in ("positive", "negative"))
    if positive and negative:
        return [
            _PairDirection(negative, positive, ERASE, sign=1),
            _PairDirection(positive, negative, ENHANCE, sign=1),
            _PairDirection(positive, negative, ERASE, sign=-1),
            _PairDirection(negative, positive, ENHANCE, sign=-1),
        ]
    if negative:
        return [_PairDirection(negative, "", ERASE, sign=1), _PairDirection(negative, "", ENHANCE, sign=-1)]
    if positive:
        return [_PairDirection(positive, "", ENHANCE, sign=1), _PairDirection(positive, "", ERASE, sign=-1)]
    raise OptionError(f"{location}: write positive, negative or both")


def _list_neutrals(location: str, path: Path, values: Mapping[str, Any]) -> list[str]:
    """Return the neutral prompts of a slider, from three keys; one empty prompt if none is set."""
    single = _read_text(location, values, "neutral")
    neutrals = [] if single is None else [single]
    neutral_list = values.get("neutrals", [])
    if not isinstance(neutral_list, list) or not all(isinstance(prompt, str) for prompt in neutral_list):
        raise OptionError(
            f'{location}: neutrals = {neutral_list!r} is not a list of prompts. Write ["a", "b"]'
        )
    neutrals += neutral_list
    name = _read_text(location, values, "neutral_prompt_file")
    if name is not None:
        try:
            lines = read_text(path.parent / name).split("\n")
        except (OSError, ValueError) as error:
            raise OptionError(
                f"{location}: neutral_prompt_file {path.parent / name} cannot be read ({error}). Fix it"
            ) from None
        neutrals += [line.strip() for line in lines if line.strip()]
    return neutrals or [""]


def _read_shared_fields(location: str, values: Mapping[str, Any], is_square: bool) -> dict[str, Any]:
    """Return the values of the fields that pairs and sliders share, by name."""
    switches = {key: values.get(key, False) for key in ("dynamic_resolution", "dynamic_crops")}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise OptionError(f"{location}: {key} = {value!r}: write true or false")
    if switches["dynamic_resolution"] and not is_square:
        raise OptionError(f"{location}: dynamic_resolution is for a square resolution. Omit one of the two")
    batch_size = values.get("batch_size", 1)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= 1024:
        raise OptionError(f"{location}: batch_size = {batch_size!r}: use a whole number from 1 to 1024")
    numbers = {key: _read_number(location, values, key) for key in ("guidance_scale", "weight")}
    return {**switches, **numbers, "batch_size": batch_size}


def _read_text(location: str, values: Mapping[str, Any], key: str) -> str | None:
    text = values.get(key)
    if text is not None and not isinstance(text, str):
        raise OptionError(f'{location}: {key} = {text!r} is not text. Write {key} = "a prompt"')
    return text


def _read_number(location: str, values: Mapping[str, Any], key: str, signed: bool = False) -> float:
    value = values.get(key, 1.0)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 < (abs(value) if signed else value) <= MAX_FACTOR):
        low = "other than 0" if signed else "above 0"
        raise OptionError(f"{location}: {key} = {value!r}: use a number {low}, of at most {MAX_FACTOR:g}")
    return float(value)


def _read_resolution(location: str, value: Any) -> tuple[int, int]:
    """Parse a resolution, one number for both sides or [height, width]; return height and width."""
    sides = value if isinstance(value, list) else [value, value]
    are_sides = len(sides) == 2 and all(
        isinstance(side, int) and not isinstance(side, bool) and 64 <= side <= MAX_SIDE for side in sides
    )
    if not are_sides or any(side % SIDE_STEP for side in sides):
        raise OptionError(
            f"{location}: resolution = {value!r}: use a side from 64 to {MAX_SIDE}, or [height, width], in "
            f"multiples of {SIDE_STEP}"
        )
    return sides[0], sides[1]
