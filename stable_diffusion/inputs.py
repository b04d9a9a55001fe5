"""Input pictures of a run, which prompts use in turn: for image to image, inpainting, ControlNets."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from modules.errors import OptionError
from modules.media.reading import folder_images, image_size
from stable_diffusion.prompt_options import PictureInputOptions


@dataclass(frozen=True)
class Inputs:
    """Input pictures in the order in which they are used; () where there are none."""

    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    guides: tuple[Path, ...] = ()
    guides_at_once: int = 1  # of each picture that is made: one for each ControlNet

    def image(self, number: int) -> Path | None:
        """Return the picture that the `number`th picture of a run begins with, counted from 0."""
        return _in_turn(self.images, number)

    def mask(self, number: int) -> Path | None:
        """Return its mask."""
        return _in_turn(self.masks, number)

    def guides_of(self, number: int) -> tuple[Path, ...]:
        """Return its guide pictures: one for each ControlNet, or the only one there is for all."""
        if len(self.guides) <= 1:
            return self.guides
        first = number % (len(self.guides) // self.guides_at_once) * self.guides_at_once
        return self.guides[first : first + self.guides_at_once]


def find_inputs(options: PictureInputOptions, control_nets: int) -> Inputs:
    """List the input pictures of a run, and read their headers.

    control_nets: how many guide pictures each picture needs, at least one. Raises OptionError if there are
    not as many, or a multiple, or a file is missing, MediaError if one is no picture.
    """
    guides = [_list_pictures(path) for path in options.guide_image_path or ()]
    inputs = Inputs(
        images=_list_pictures(options.image_path),
        masks=_list_pictures(options.mask_path),
        guides=tuple(chain.from_iterable(guides)),
        guides_at_once=max(control_nets, 1),
    )
    if len(inputs.guides) > 1 and len(inputs.guides) % inputs.guides_at_once:
        raise OptionError(
            f"--guide_image_path: {len(inputs.guides)} pictures for {control_nets} ControlNets. Give one for "
            "each, in their order, as many for the next picture and so on, or a single one for all"
        )
    return inputs


def _list_pictures(path: Path | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    paths = folder_images(path) if path.is_dir() else [path]
    for one in paths:
        image_size(one)
    return tuple(paths)


def _in_turn(paths: Sequence[Path], number: int) -> Path | None:
    return paths[number % len(paths)] if paths else None
