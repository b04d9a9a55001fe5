"""One picture in place of a video: a section with a single target, whose place in time says how far it is
from the controls.

`target_index` is how much the picture may change; control images stand at places of their own and take the
part of the start image. So a model of motion edits pictures (kisekaeichi: two controls, of which one is in a
later place; 1f-mc: two in a row).
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from frame_pack.sections import Indices, later_indices
from modules.errors import OptionError

logger = logging.getLogger(__name__)

# before the start too, as fp_1f_clean_indices and fp_1f_target_index of a dataset
_WHOLE = re.compile(r"-?[0-9]+")
MOST_PLACE = 9999  # 40 is far already; more digits are a slip of the finger


@dataclass(frozen=True)
class OneFrame:
    """Where the target and the controls stand, and which frames that a section has are left out."""

    target_index: int | None = None  # None: the number of latent frames in a window
    control_indices: tuple[int, ...] = ()  # of the first controls; the others stand at 0
    has_post: bool = True  # one black frame behind the controls
    has_2x: bool = True  # two black frames at half resolution
    has_4x: bool = True  # sixteen at quarter resolution


def parse_one_frame(text: str) -> OneFrame:
    """Read --one_frame_inference, as "target_index=1,control_index=0;10,no_post,no_2x,no_4x" or "default".

    Raises OptionError for another word or where a number is missing.
    """
    settings = OneFrame()
    for item in (piece.strip() for piece in text.split(",")):
        word, _, value = item.partition("=")
        if item in _SWITCHES:
            settings = _SWITCHES[item](settings)
        elif word == "target_index":
            settings = replace(settings, target_index=_index(value, text))
        elif word == "control_index":
            settings = replace(
                settings, control_indices=tuple(_index(number, text) for number in value.split(";"))
            )
        elif _WHOLE.fullmatch(item):
            raise _refused(
                text, f"{item!r} stands alone: places have a semicolon between them, as control_index=0;10"
            )
        else:
            raise _refused(text, f"{item!r} is none of them")
    return settings


_SWITCHES: Mapping[str, Callable[[OneFrame], OneFrame]] = {
    "default": lambda settings: settings,
    "no_post": lambda settings: replace(settings, has_post=False),
    "no_2x": lambda settings: replace(settings, has_2x=False),
    "no_4x": lambda settings: replace(settings, has_4x=False),
}


def _index(number: str, text: str) -> int:
    if not _WHOLE.fullmatch(number.strip()):
        raise _refused(text, f"{number.strip()!r} is no whole number")
    if len(number.strip().lstrip("-")) > len(str(MOST_PLACE)):
        raise _refused(text, f"places go to {MOST_PLACE}")
    return int(number)


def _refused(text: str, why: str) -> OptionError:
    return OptionError(
        f"--one_frame_inference {text!r}: {why}. Give default, no_post, no_2x, no_4x, target_index=N and "
        "control_index=N;N, "
        "with commas between them."
    )


def one_frame_indices(settings: OneFrame, controls: int, window: int) -> Indices:
    """Places of the controls, the black frames behind them and the target. controls: how many control images
    there are.

    Without an image a black frame is the control. The order in `clean` is that of the latents: controls, then
    the black frame.
    """
    controls = max(controls, 1)
    if len(settings.control_indices) > controls:
        logger.warning(
            "control_index names %d places; those after the first %d are ignored because there are no more "
            "control images",
            len(settings.control_indices),
            controls,
        )
    given = settings.control_indices[:controls]
    places = (*given, *[0] * (controls - len(given)))
    black = later_indices(1 + window)
    return Indices(
        clean=(*places, *black.clean) if settings.has_post else places,
        clean_2x=black.clean_2x if settings.has_2x else (),
        clean_4x=black.clean_4x if settings.has_4x else (),
        target=(window if settings.target_index is None else settings.target_index,),
    )
