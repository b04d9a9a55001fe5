"""A run of gen_img.py: prompts become pictures, batch by batch; the networks are loaded once."""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from generation.asking import line_reader
from generation.prompt_lines import is_blank
from modules.atomic_write import make_folder
from modules.command import each_warning_once
from modules.console import count_of
from modules.devices import choose_device, free_memory
from modules.errors import MemoryPlanError, OutputError
from modules.failures import Failures
from stable_diffusion.asking import Asking, Seeds, batches, check_line, make_seeds
from stable_diffusion.assembling import Loaded, assemble
from stable_diffusion.contract import Picture
from stable_diffusion.files import PictureFiles
from stable_diffusion.highres import Highres, Makes, make_pictures, prepare_highres
from stable_diffusion.inputs import find_inputs
from stable_diffusion.lines import Line, import_prompter, list_lines, make_prompter, prompted_lines
from stable_diffusion.options import GenImgOptions
from stable_diffusion.viewing import show_picture, viewer_command

logger = logging.getLogger(__name__)

PROMPT_SIGN = "> "


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
        "  Use --fp16 or --bf16, --vae_slices 32, --vae_batch_size 1, or smaller --W and --H"
    )


def generate(options: GenImgOptions, load: Load = assemble) -> None:
    """Make all pictures that the options ask for. load: loads what makes them; usually the checkpoint.

    Raises UserError; with several prompts only after all that work are made.
    """
    with each_warning_once():
        _generate(options, load)


def _generate(options: GenImgOptions, load: Load) -> None:
    device = choose_device(options.device)
    make_folder(options.output.outdir, "--outdir")
    control = options.control
    inputs = find_inputs(
        options.prompts, len(control.control_net_models or control.control_net_lllite_models or ())
    )
    module = None if options.prompts.from_module is None else import_prompter(options.prompts.from_module)
    lines = list_lines(options, inputs)
    rounds = options.prompts.n_iter
    failures = Failures(strict=lines is not None and len(lines) * rounds == 1)
    usable = None if lines is None else _without_mistakes(options, lines, failures)
    if usable != []:
        highres = prepare_highres(options.highres, options.model.vae_batch_size)
        loaded = load(options, device)
        kind = loaded.maker.model.kind
        asking = Asking(options, kind, inputs, make_seeds(options, lines))
        files = PictureFiles(options.output, kind, options.sampling.sampler)
        run = Run(options, loaded.maker, highres, asking, files)
        if usable is not None:
            _make_rounds(run, lambda _: usable, failures)
        elif module is None:
            converse(run)
        else:
            _make_rounds(run, _module_lines(run, module, loaded), failures)
    where = options.prompts.from_file
    asked = len(failures.reasons) if lines is None else len(lines) * rounds
    failures.raise_if_any(asked, "" if where is None else f"{where}: ")


def _without_mistakes(options: GenImgOptions, lines: Sequence[Line], failures: Failures) -> list[Line]:
    """Return the lines that can be made, before a model is loaded; what is wrong with the others is noted."""
    usable = []
    for line in lines:
        with failures.note_errors(line.label):
            check_line(options, line)
            usable.append(line)
    return usable


def _make_rounds(run: Run, lines_of: Callable[[Seeds], Iterable[Line]], failures: Failures) -> None:
    """Go through all prompts --n_iter times. lines_of: returns the lines of a round, given its seeds."""
    prompts, seeds = run.options.prompts, run.asking.seeds
    for number in range(1, prompts.n_iter + 1):
        if prompts.n_iter > 1:
            logger.info("Round %d of %d", number, prompts.n_iter)
        if prompts.iter_same_seed:
            seeds.begin_round()
        lines = lines_of(seeds)
        if prompts.shuffle_prompts:
            lines = list(lines)
            seeds.random.shuffle(lines)
        if prompts.n_iter > 1:
            lines = (replace(line, label=f"{line.label}, round {number}") for line in lines)
        run.asking.made = 0
        run.make_all(lines, failures)


def _module_lines(run: Run, module: ModuleType, loaded: Loaded) -> Callable[[Seeds], Iterable[Line]]:
    prompter = make_prompter(module, run.options, loaded.maker.model, loaded.networks)

    def lines(seeds: Seeds) -> Iterable[Line]:
        return prompted_lines(prompter, seeds.random, seeds.round_seed, lambda: run.asking.made)

    return lines


def converse(run: Run) -> None:
    """Read prompts from the console until the end of input. Ctrl-C cancels the current prompt."""
    ask = line_reader(PROMPT_SIGN)
    viewer = None if run.options.prompts.no_preview else viewer_command()
    logger.info(
        "Enter a prompt and options such as --s 20 --d 7. Ctrl-C cancels the current prompt, Ctrl-D quits."
    )
    while True:
        try:
            line = ask()
            if is_blank(line):
                continue
            paths = run.make_all([Line("the prompt", line.strip())], Failures())
            if viewer is not None:
                for path in paths:
                    show_picture(viewer, path)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            logger.warning("The prompt is cancelled. Ctrl-D quits.")
