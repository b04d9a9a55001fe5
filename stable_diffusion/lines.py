"""Lines of prompts, and where they come from: an option, a file, a module, the metadata of pictures."""

import importlib.util
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from generation.prompt_lines import read_generation_lines
from modules.errors import OptionError, UserError
from modules.installation import import_user_module
from modules.media.reading import folder_images, image_size, read_tags
from modules.options import option_values
from stable_diffusion.options import GenImgOptions, PictureInputOptions

logger = logging.getLogger(__name__)


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


# generator of seeds, seed of the round, number of the call, pictures so far -> prompts; None: no more
Prompter = Callable[[Random, int | None, int, int], Sequence[str] | None]


@dataclass(frozen=True)
class Line:
    """A prompt as it was typed, with options in it."""

    label: str  # in messages: "line 3"
    text: str
    # of an input picture's metadata, in place of options in the text; nothing is expanded in it
    negative_prompt: str | None = None
    image_number: int | None = None  # the input picture that it belongs to; None: that which is next
    pictures: int | None = None  # how many are made of it; None: as the options say

    @property
    def is_plain(self) -> bool:
        """Return whether the text is a bare prompt, without options and variants."""
        return self.image_number is not None


def list_lines(options: GenImgOptions, inputs: Inputs) -> list[Line]:
    """Return the lines of a run whose prompts do not come one by one.

    Raises OptionError if there are none, MediaError if an input picture cannot be read.
    """
    prompts = options.prompts
    if prompts.from_file is not None:
        return [
            Line(f"line {number}", line.strip()) for number, line in read_generation_lines(prompts.from_file)
        ]
    if prompts.prompt is not None:
        return [Line("the prompt", prompts.prompt)]
    return _lines_of_images(inputs.images)


def _lines_of_images(images: Sequence[Path]) -> list[Line]:
    lines = []
    for number, path in enumerate(images):
        texts = read_tags(path)
        if "prompt" in texts:
            negative = texts.get("negative-prompt", "")
            lines.append(Line(path.name, texts["prompt"], negative, image_number=number))
        else:
            logger.warning("%s is left out because its metadata have no prompt", path)
    if not lines:
        raise OptionError(
            "There is no prompt, and the pictures of --image_path have none in their metadata. Give --prompt "
            "or --from_file"
        )
    return lines


def import_prompter(name: str) -> ModuleType:
    """Import the module of `--from_module`: an import path, or a .py file.

    The working folder is searched too. The code in it runs, as the user asks for. Raises OptionError if it
    cannot be imported or has no get_prompter.
    """
    if name.endswith(".py"):
        module = _import_file(Path(name))
    else:
        remedy = " Correct it, or use --from_file"
        module = import_user_module("--from_module", name, "package.module, or FILE.py", remedy)
    if not callable(getattr(module, "get_prompter", None)):
        raise OptionError(
            f"--from_module {name} has no function get_prompter(args, pipe, networks). Use another module"
        )
    return module


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # likewise
        raise OptionError(
            f"--from_module {path} cannot be imported: {type(error).__name__}: {error}. Correct it, or use "
            "--from_file"
        ) from error
    return module


def make_prompter(module: ModuleType, options: GenImgOptions, pipe: Any, networks: Any) -> Prompter:
    """Call a module's get_prompter(args, pipe, networks); return the function that gives prompts.

    args: the options by their names, as attributes. pipe: the loaded `contract.Model`, whose `unet`, `vae`
    and `texts` are the networks. networks: `loras.ChosenLoras`, or None. Raises UserError if it fails.
    """
    args = Namespace(**option_values(options))
    name = f"--from_module {options.prompts.from_module}"
    try:
        prompter = module.get_prompter(args, pipe, networks)
    except Exception as error:  # it runs any code of its own
        raise UserError(_failure(name, "get_prompter", error)) from error
    if not callable(prompter):
        raise UserError(f"{name}: get_prompter returned no function. Correct the module")

    def prompts(random: Random, round_seed: int | None, index: int, made: int) -> list[str] | None:
        try:
            found = prompter(args, pipe, random, round_seed, index, made)
        except Exception as error:  # likewise
            raise UserError(_failure(name, "the prompter", error)) from error
        are_texts = isinstance(found, (list, tuple)) and all(isinstance(one, str) for one in found)
        if found is not None and not are_texts:
            raise UserError(
                f"{name}: the prompter returned {type(found).__name__}. Make it return a list of texts, or "
                "None at the end"
            )
        return found

    return prompts


def _failure(name: str, what: str, error: Exception) -> str:
    return f"{name}: {what} failed: {type(error).__name__}: {error}. Correct the module"


def prompted_lines(
    prompts: Prompter, random: Random, round_seed: int | None, made: Callable[[], int]
) -> Iterator[Line]:
    """Yield the lines of one round, until the module gives None.

    A single prompt is made --images_per_prompt times, of several each once. random: draws seeds. round_seed:
    of --iter_same_seed. made: returns how many pictures there are in this round. Raises UserError as
    `make_prompter` says.
    """
    number = 0
    for index in count():
        found = prompts(random, round_seed, index, made())
        if found is None:
            return
        for text in found:
            number += 1
            yield Line(f"prompt {number}", text, pictures=1 if len(found) > 1 else None)
