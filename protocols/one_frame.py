"""Settings of --one_frame_inference: time indices of a single image and its control images."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from modules.errors import OptionError

# negative indices are allowed, as for fp_1f_clean_indices and fp_1f_target_index of a dataset
_FULL = re.compile(r"-?[0-9]+")
MAX_INDEX = 9999  # 40 is far away already; more digits are a typo


@dataclass(frozen=True)
class OneFrame:
    """Frame indices of the target and control images, and which black frames are added after them."""

    target_index: int | None = None  # None: the family's default
    control_indices: tuple[int, ...] = ()  # indices of the first control images
    has_post: bool = True  # one black frame after the controls
    has_2x: bool = True  # two black frames at half resolution
    has_4x: bool = True  # sixteen at quarter resolution


def parse_one_frame(text: str) -> OneFrame:
    """Parse --one_frame_inference, such as "target_index=1,control_index=0+10,no_post" or "default".

    Control indices are separated by `+`, `,` or, as other programs write them, `;`.

    Raises:
        OptionError: If a word is unknown or a number is missing.
    """
    settings = OneFrame()
    key = ""
    for item in (piece.strip() for piece in text.split(",")):
        # a bare number after control_index continues its list: "control_index=0,10"
        if key == "control_index" and _FULL.fullmatch(item):
            indices = (*settings.control_indices, _index(item, text))
            settings = replace(settings, control_indices=indices)
            continue
        key, _, value = item.partition("=")
        if item in _SWITCHES:
            settings = _SWITCHES[item](settings)
        elif key == "target_index":
            settings = replace(settings, target_index=_index(value, text))
        elif key == "control_index":
            indices = tuple(_index(number, text) for number in re.split("[;+]", value))
            settings = replace(settings, control_indices=indices)
        elif _FULL.fullmatch(item):
            raise _reject(text, f"{item!r} stands alone: write indices as in control_index=0+10")
        else:
            raise _reject(text, f"{item!r} is unknown")
    return settings


_SWITCHES: Mapping[str, Callable[[OneFrame], OneFrame]] = {
    "default": lambda settings: settings,
    "no_post": lambda settings: replace(settings, has_post=False),
    "no_2x": lambda settings: replace(settings, has_2x=False),
    "no_4x": lambda settings: replace(settings, has_4x=False),
}


def _index(number: str, text: str) -> int:
    if not _FULL.fullmatch(number.strip()):
        raise _reject(text, f"{number.strip()!r} is not a whole number")
    if len(number.strip().lstrip("-")) > len(str(MAX_INDEX)):
        raise _reject(text, f"the largest index is {MAX_INDEX}")
    return int(number)


def _reject(text: str, why: str) -> OptionError:
    return OptionError(
        f"--one_frame_inference {text!r}: {why}. Pass default, no_post, no_2x, no_4x, target_index=N and "
        "control_index=N+N, separated by commas."
    )


def semicolon_hint(text: str) -> str:
    """Return a hint that the shell may have cut the text at a semicolon; "" if nothing suggests that."""
    if not re.search(r"control_index=-?[0-9]+$", text):
        return ""
    return (
        ". If control_index has several indices separated by ;, the shell ended the command at "
        "the first: write control_index=0+10, or put it in quotes"
    )
