"""A run of gen_img.py: load the networks once, then generate and save images batch by batch."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL.Image import Image

from generation.asking import line_reader
from generation.prompt_lines import is_blank
from modules.atomic_write import claim_name, make_folder, replace_surrogates
from modules.command import drop_repeated_warnings
from modules.console import format_count
from modules.control_codes import replace_control_codes
from modules.devices import Failures, free_memory, freeze_libraries, select_device
from modules.errors import MemoryPlanError, OutputError
from modules.integers import ceil_div
from modules.media.writing import write_png
from modules.text_files import real_path
from stable_diffusion.asking import RequestBuilder, batches, check_line, make_seeds
from stable_diffusion.assembling import assemble
from stable_diffusion.contract import SDXL, ImageSettings, ModelKind, RequestedImage
from stable_diffusion.highres import FIRST, Highres, make_images, prepare_highres
from stable_diffusion.lines import (
    LINE_OPTIONS,
    LONGEST_NAME,
    Inputs,
    Line,
    find_inputs,
    import_prompter,
    list_lines,
    module_lines,
)
from stable_diffusion.making import ImageGenerator
from stable_diffusion.options import GenImgOptions, ImageOutputOptions

logger = logging.getLogger(__name__)


# File names of the images, and the metadata in them.


@dataclass
class ImageFiles:
    """Save a run's images under unused file names."""

    options: ImageOutputOptions
    kind: ModelKind
    sampler: str  # value of --sampler
    now: Callable[[], datetime] = datetime.now
    _last: dict[str, int] = field(default_factory=dict)  # number of the last file, by name prefix

    def save(self, request: RequestedImage, image: Image, stage_digit: str, number: int) -> Path:
        """Write an image under an unused name, completely or not at all.

        Args:
            request: The request that the image belongs to.
            image: The image.
            stage_digit: Text for the stage in the name; empty if there is one stage.
            number: Index of the image in its batch.

        Returns:
            The path of the file.

        Raises:
            OutputError: If the file cannot be written.
        """
        metadata = self._make_metadata(request)
        with self._reserve_path(self._yield_names(request, stage_digit, number)) as path:
            write_png(path, np.asarray(image.convert("RGB")), metadata)
        return path

    def _make_metadata(self, request: RequestedImage) -> dict[str, str]:
        """Return the PNG text entries of an image: its prompts and settings."""
        settings = request.settings
        # keys in the spelling of common guides to image generation
        entries: dict[str, object] = {
            "prompt": request.prompt,
            "seed": request.seed,
            "sampler": self.sampler,
            "steps": settings.steps,
            "scale": settings.scale,
            "negative-prompt": request.negative_prompt or None,
            "negative-scale": settings.negative_scale,
            "clip-prompt": request.clip_prompt,
            "raw-prompt": request.raw_prompt,
        }
        if self.kind is SDXL:
            entries |= _describe_sizes(settings)
        return {key: replace_surrogates(str(value)) for key, value in entries.items() if value is not None}

    def _yield_names(self, request: RequestedImage, stage_digit: str, number: int) -> Iterator[str]:
        """Yield candidate file names for an image, without suffix, in order of preference."""
        if request.file_name is not None:
            return _named(request.file_name.removesuffix(".png"), stage_digit)
        if self.options.use_original_file_name and request.image is not None:
            # without control codes, cut to the maximum number of bytes of --f
            stem = replace_control_codes(request.image.stem).encode("utf-8")[:LONGEST_NAME]
            return _named(stem.decode("utf-8", "ignore"), stage_digit)
        if self.options.sequential_file_name:
            return self._yield_numbered(f"im_{stage_digit}")
        start = f"im_{self.now():%Y%m%d%H%M%S}_{stage_digit}"
        return (f"{start}{free:03d}_{request.seed}" for free in count(number))

    def _yield_numbered(self, start: str) -> Iterator[str]:
        """Yield numbered file names that start after the folder's highest number."""
        if start not in self._last:
            names = (path.stem.removeprefix(start) for path in self.options.outdir.glob(f"{start}??????.png"))
            self._last[start] = max((int(name) for name in names if name.isdecimal()), default=0)
        for number in count(self._last[start] + 1):
            self._last[start] = number
            yield f"{start}{number:06d}"

    @contextmanager
    def _reserve_path(self, names: Iterator[str]) -> Iterator[Path]:
        """Reserve the first file name that is used neither by a file nor by another run."""
        for name in names:
            path = self.options.outdir / f"{name}.png"
            if path.exists():
                continue
            with claim_name(path) as is_ours:
                if is_ours and not path.exists():
                    yield path
                    return


def _describe_sizes(settings: ImageSettings) -> dict[str, object]:
    """Return PNG text entries of SDXL's size conditions: original sizes and crop."""
    sizes = settings.sizes
    height = sizes.original_height or settings.height
    width = sizes.original_width or settings.width
    return {
        "original-height": height,
        "original-width": width,
        "original-height-negative": sizes.original_height_negative or height,
        "original-width-negative": sizes.original_width_negative or width,
        "crop-top": sizes.crop_top or 0,
        "crop-left": sizes.crop_left or 0,
    }


def _named(stem: str, stage_digit: str) -> Iterator[str]:
    stem = f"{stem}_{stage_digit}" if stage_digit == FIRST else stem
    return chain([stem], (f"{stem}_{number}" for number in count(1)))


def viewer_command(platform: str = sys.platform, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the system's command for opening a file; None without a command or a display."""
    if platform == "win32":
        return "explorer"
    if platform == "darwin":
        return shutil.which("open")
    has_screen = environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
    return shutil.which("xdg-open") if has_screen else None


def show_image(program: str, path: Path) -> None:
    """Open an image in a viewer program without waiting for it; ignore its errors."""
    subprocess.Popen(
        [program, str(real_path(path))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


LoadGenerator = Callable[[GenImgOptions, torch.device], ImageGenerator]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of gen_img.py: loaded generator, options and output files."""

    options: GenImgOptions
    image_generator: ImageGenerator
    highres: Highres | None
    request_builder: RequestBuilder
    files: ImageFiles

    def generate_all(self, lines: Iterable[Line], failures: Failures) -> list[Path]:
        """Generate and write the images of prompt lines, batch by batch; errors in lines go to `failures`.

        Returns:
            The paths.

        Raises:
            OutputError: If images cannot be written.
        """
        paths = []
        requests = self.request_builder.build_requests(lines, failures)
        for batch in batches(requests, self.options.prompts.batch_size):
            # None if the batch fails: its images are then generated one at a time
            batch_paths = self._try_batch(batch) if len(batch) > 1 else None
            if batch_paths is not None:
                paths += batch_paths
                continue
            for request in batch:
                with failures.collect_errors(request.label, fatal=OutputError):
                    paths += self._generate_batch([request])
        return paths

    def _try_batch(self, batch: Sequence[RequestedImage]) -> list[Path] | None:
        """Generate a batch; return None on failure, so that its images are generated one at a time."""
        try:
            return self._generate_batch(batch)
        except OutputError:
            raise
        except Exception as error:
            pictures = format_count(len(batch), "image")
            logger.warning("A batch of %s failed and is generated one by one: %s", pictures, error)
            return None

    def _generate_batch(self, batch: Sequence[RequestedImage]) -> list[Path]:
        """Generate a batch and save its images, also those of each highres stage; return their paths."""
        paths = []
        try:
            for stage in make_images(self.image_generator, self.highres, batch):
                assert stage.result.images is not None
                pairs = zip(stage.requests, stage.result.images, strict=True)
                for number, (request, image) in enumerate(pairs):
                    paths.append(self.files.save(request, image, stage.stage_digit, number))
                    logger.info("%s", paths[-1])
        except torch.OutOfMemoryError as error:
            free_memory(self.image_generator.model.device)
            settings = batch[0].settings
            raise MemoryPlanError(
                f"the device has too little memory for {format_count(len(batch), 'image')} of "
                f"{settings.width} x {settings.height}: {str(error).partition('. ')[0]}.\n"
                "  Use --fp16 or --bf16, --vae_slices 32, --vae_batch_size 1, or smaller --W and --H"
            ) from error
        return paths


def generate(options: GenImgOptions, load: LoadGenerator = assemble) -> None:
    """Generate all images that the options request.

    Prompts come from the console (--interactive), from a Python module (--from_module), or from a list: a
    file, an option or the metadata of input images. Only a list is checked before a model is loaded.

    Args:
        options: Options of the run.
        load: Loads the checkpoint and returns an `ImageGenerator`.

    Raises:
        UserError: If something fails. With several prompts it is raised after the images of all usable
            prompts are generated.
    """
    freeze_libraries()
    device = select_device(options.device)
    make_folder(options.output.outdir, "--outdir")
    inputs = find_inputs(options.prompts, len(options.control.specs))
    load_run = partial(_load_run, options, device, load, inputs, prepare_highres(options.highres))
    if options.prompts.interactive:
        converse(load_run())
        return
    failures = Failures()
    with drop_repeated_warnings():
        if options.prompts.from_module is None:
            lines = list_lines(options, inputs)
            num_lines = len(lines) * options.prompts.n_iter
            failures.strict = num_lines == 1  # the error of a single prompt is raised at once
            paths = _generate_from_lines(options, load_run, lines, failures)
        else:
            module = import_prompter(options.prompts.from_module)
            run = load_run()
            paths = _generate_from_module(run, module, failures)
            num_lines = run.request_builder.num_lines
    if len(paths) > 1:
        logger.info("%d images are in %s", len(paths), options.output.outdir)
    prompt_file = options.prompts.from_file
    failures.raise_if_any(num_lines, "" if prompt_file is None else f"{prompt_file}: ")


def _load_run(
    options: GenImgOptions,
    device: torch.device,
    load: LoadGenerator,
    inputs: Inputs,
    highres: Highres | None,
    lines: Sequence[Line] | None = None,
) -> Run:
    """Load the networks for a run."""
    image_generator = load(options, device)
    kind = image_generator.model.kind
    request_builder = RequestBuilder(options, kind, inputs, make_seeds(options, lines))
    files = ImageFiles(options.output, kind, options.sampling.sampler)
    return Run(options, image_generator, highres=highres, request_builder=request_builder, files=files)


def _generate_from_module(run: Run, module: ModuleType, failures: Failures) -> list[Path]:
    """Generate the images of the prompt lines that the user's --from_module module yields."""
    request_builder = run.request_builder
    make_lines = module_lines(
        module,
        run.options,
        pipe=run.image_generator.model,
        networks=run.image_generator.loras,
        random=request_builder.seeds.random,
        count_images=lambda: request_builder.num_images,
    )

    def yield_lines() -> Iterator[Line]:
        """Yield the prompts of one round; an error in the user's module ends the round."""
        with failures.collect_errors("the next prompt"):
            yield from make_lines(request_builder.seeds.round_seed)

    return run.generate_all(_repeat_for_rounds(run, yield_lines), failures)


def _generate_from_lines(
    options: GenImgOptions,
    load_run: Callable[[Sequence[Line]], Run],
    lines: Sequence[Line],
    failures: Failures,
) -> list[Path]:
    """Generate the images of a fixed list of lines; return their paths."""
    # All lines are checked before `load_run` loads a model; invalid lines are skipped.
    usable = []
    for line in lines:
        with failures.collect_errors(line.label):
            check_line(options, line)
            usable.append(line)
    if not usable:
        return []
    run = load_run(lines)
    paths = run.generate_all(_repeat_for_rounds(run, lambda: usable), failures)
    images = run.request_builder.inputs.images
    unused = len(images) - run.request_builder.num_images
    if unused > 0 and not lines[0].is_from_metadata:
        logger.warning(
            "%s of --image_path %s not used, because each generated image takes the next one. Raise "
            "--images_per_prompt to %d to use all",
            format_count(unused, "image"),
            "was" if unused == 1 else "were",
            ceil_div(len(images), len(lines)),
        )
    return paths


def _repeat_for_rounds(run: Run, make_lines: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    """Yield the lines of --n_iter rounds; a round begins when its first line is requested."""
    prompts = run.options.prompts
    request_builder = run.request_builder
    for number in range(1, prompts.n_iter + 1):
        if prompts.n_iter > 1:
            logger.info("Round %d of %d", number, prompts.n_iter)
        request_builder.num_images = 0
        if prompts.iter_same_seed:
            request_builder.seeds.begin_round()
        lines = make_lines()
        if prompts.shuffle_prompts:
            lines = list(lines)
            request_builder.seeds.random.shuffle(lines)
        for line in lines:
            yield line if prompts.n_iter == 1 else replace(line, label=f"{line.label}, round {number}")


def converse(run: Run) -> None:
    """Read prompts from the console until the end of input. Ctrl-C cancels the current prompt."""
    ask = line_reader((character, option.key) for character, option in LINE_OPTIONS.items())
    viewer = None if run.options.prompts.no_preview else viewer_command()
    while True:
        try:
            line = ask()
            if is_blank(line):
                continue
            paths = run.generate_all([Line("the prompt", line.strip())], Failures())
            if viewer is not None:
                for path in paths:
                    show_image(viewer, path)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            logger.warning("The prompt is cancelled. quit or Ctrl-D ends.")
