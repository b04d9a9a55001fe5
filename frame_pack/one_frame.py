"""Single images: a section with one target frame, whose index in time sets the distance to the controls.

A larger `target_index` lets the image change more. Control images have indices too and replace the start
image. So a model of motion edits images (kisekaeichi: two controls, one at a later index; 1f-mc: two in a
row).
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from frame_pack.sections import Indices, later_indices
from modules.errors import OptionError

logger = logging.getLogger(__name__)

# negative places too, as for fp_1f_clean_indices and fp_1f_target_index of a dataset
_WHOLE = re.compile(r"-?[0-9]+")
MOST_PLACE = 9999  # 40 is far already; more digits are a typing error


@dataclass(frozen=True)
class OneFrame:
    """Indices of the target and the controls, and which frames of a section are left out."""

    target_index: int | None = None  # None: the number of latent frames in a window
    control_indices: tuple[int, ...] = ()  # of the first controls; the others have 0
    has_post: bool = True  # one black frame after the controls
    has_2x: bool = True  # two black frames at half resolution
    has_4x: bool = True  # sixteen at quarter resolution


def parse_one_frame(text: str) -> OneFrame:
    """Read --one_frame_inference, as "target_index=1,control_index=0;10,no_post,no_2x,no_4x" or "default".

    Raises OptionError if a word is unknown or a number is missing.
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
            raise _refuse(
                text, f"{item!r} stands alone: separate indices by semicolons, as in control_index=0;10"
            )
        else:
            raise _refuse(text, f"{item!r} is unknown")
    return settings


_SWITCHES: Mapping[str, Callable[[OneFrame], OneFrame]] = {
    "default": lambda settings: settings,
    "no_post": lambda settings: replace(settings, has_post=False),
    "no_2x": lambda settings: replace(settings, has_2x=False),
    "no_4x": lambda settings: replace(settings, has_4x=False),
}


def _index(number: str, text: str) -> int:
    if not _WHOLE.fullmatch(number.strip()):
        raise _refuse(text, f"{number.strip()!r} is not a whole number")
    if len(number.strip().lstrip("-")) > len(str(MOST_PLACE)):
        raise _refuse(text, f"the largest index is {MOST_PLACE}")
    return int(number)


def _refuse(text: str, why: str) -> OptionError:
    return OptionError(
        f"--one_frame_inference {text!r}: {why}. Give default, no_post, no_2x, no_4x, target_index=N and "
        "control_index=N;N, separated by commas."
    )


def one_frame_indices(settings: OneFrame, controls: int, window: int) -> Indices:
    """Return the indices of the controls, the black frames after them and the target.

    controls: number of control images; without one, a black frame is the control. The order in `clean` is
    that of the latents: controls, then the black frame.
    """
    controls = max(controls, 1)
    if len(settings.control_indices) > controls:
        logger.warning(
            "control_index has %d indices; those after the first %d are ignored because there are no more "
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
