"""A run of gen_img.py: prompts become pictures, batch by batch; the networks are loaded once."""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from generation.asking import line_reader
from generation.prompt_lines import is_blank
from modules.atomic_write import make_folder
from modules.command import each_warning_once
from modules.console import count_of
from modules.devices import choose_device, free_memory
from modules.errors import MemoryPlanError, OutputError
from modules.failures import Failures
from stable_diffusion.asking import Asking, batches, check_line, draw_seed, make_seeds
from stable_diffusion.contract import Picture
from stable_diffusion.files import PictureFiles
from stable_diffusion.highres import Highres, Makes, make_pictures, prepare_highres
from stable_diffusion.inputs import Inputs, find_inputs
from stable_diffusion.lines import Line, Prompter, import_prompter, lines_of_module, list_lines, make_prompter
from stable_diffusion.options import GenImgOptions
from stable_diffusion.viewing import show_picture, viewer_command

logger = logging.getLogger(__name__)

PROMPT_SIGN = "> "


@dataclass(frozen=True, eq=False)
class Loaded:
    """What makes pictures, and the LoRAs it makes them with, for modules of --from_module."""

    maker: Makes
    networks: Any = None


Load = Callable[[GenImgOptions, torch.device], Loaded]


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of a run."""

    options: GenImgOptions
    maker: Makes
    highres: Highres | None
    asking: Asking
    files: PictureFiles

    def make_all(self, lines: Iterable[Line], failures: Failures) -> list[Path]:
        """Make the pictures of lines, batch by batch, and write them. Returns the paths.

        What fails is noted. Raises OutputError if pictures cannot be written.
        """
        paths = []
        asked = self.asking.pictures(lines, failures)
        for batch in batches(asked, self.options.prompts.batch_size):
            paths += self._make_batch(batch, failures)
        return paths

    def _make_batch(self, batch: Sequence[Picture], failures: Failures) -> list[Path]:
        if len(batch) > 1:
            try:
                return self._make(batch)
            except OutputError:
                raise
            except Exception as error:
                what = count_of(len(batch), "picture")
                logger.warning("A batch of %s failed and is made one by one: %s", what, error)
        paths = []
        for picture in batch:
            with failures.note_errors(picture.label, fatal=OutputError):
                paths += self._make([picture])
        return paths

    def _make(self, batch: Sequence[Picture]) -> list[Path]:
        """Make a batch and write its pictures as soon as a stage of them is there."""
        paths = []
        try:
            for stage in make_pictures(self.maker, self.highres, batch):
                assert stage.made.images is not None
                made = zip(stage.pictures, stage.made.images, strict=True)
                for number, (picture, image) in enumerate(made):
                    paths.append(self.files.save(picture, image, stage.digit, number))
                    logger.info("%s", paths[-1])
        except torch.OutOfMemoryError as error:
            free_memory(self.maker.model.device)
            raise _too_little(error, batch) from error
        return paths


def _too_little(error: torch.OutOfMemoryError, batch: Sequence[Picture]) -> MemoryPlanError:
    settings = batch[0].settings
    return MemoryPlanError(
        f"the device has too little memory for {count_of(len(batch), 'picture')} of {settings.width} x "
        f"{settings.height}: {str(error).partition('. ')[0]}.\n"
        "  Use --fp16 or --bf16, --vae_slices 32, --vae_batch_size 1, a smaller --batch_size, or smaller --W and "
        "--H, enlarged by --highres_fix_scale or not"
    )


def generate(options: GenImgOptions, load: Load | None = None) -> None:
    """Make all pictures that the options ask for. load: loads what makes them; None: the checkpoint.

    Raises UserError; with several prompts only after all that work are made.
    """
    with each_warning_once():
        _generate(options, load or load_checkpoint)


def load_checkpoint(options: GenImgOptions, device: torch.device) -> Loaded:
    """Load the checkpoint and all that acts on it."""
    from stable_diffusion.assembling import assemble

    return assemble(options, device)


def _generate(options: GenImgOptions, load: Load) -> None:
    device = choose_device(options.device)
    make_folder(options.output.outdir, "--outdir")
    control = options.control
    inputs = find_inputs(
        options.prompts, len(control.control_net_models or control.control_net_lllite_models or ())
    )
    module = None if options.prompts.from_module is None else import_prompter(options.prompts.from_module)
    lines = list_lines(options, inputs)
    is_alone = lines is not None and len(lines) * options.prompts.n_iter == 1
    failures = Failures(strict=is_alone)
    asked = len(lines or ())
    if lines is not None:
        lines = _without_mistakes(options, lines, failures)
    if lines != []:
        highres = prepare_highres(options.highres, options.model.vae_batch_size)
        loaded = load(options, device)
        run = _make_run(options, loaded, highres, inputs, lines)
        if options.prompts.interactive:
            converse(run)
        elif module is not None:
            asked = _make_rounds_of_module(run, module, loaded, failures)
        else:
            _make_rounds(run, lines or [], failures)
    where = options.prompts.from_file
    failures.raise_if_any(asked, "" if where is None else f"{where}: ")
