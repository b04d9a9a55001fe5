"""Make the regularization images of a described folder with its base model, and add them to its dataset."""

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.config import load_dataset_config
from dataset.listing import find_sources
from dataset.sources.frames import find_bucket
from dataset.sources.media_source import MediaSource
from dataset.sources.remarks import unvaried_captions
from downloads.listing import print_lines
from modules import installation
from modules.atomic_write import make_folder, write_text
from modules.console import format_count
from modules.errors import INTERRUPTED, DatasetError, OptionError
from modules.media.reading import image_size
from modules.open_files import replace_file
from modules.option_values import missing_words, option_argv
from modules.run_limits import limit_run
from modules.text_files import read_text
from project.options import DATASET_FILE, RUN_FILE, as_operand, own_command, typed_in
from project.prompt_lines import format_options
from project.regularization import (
    CAPTION_SUFFIX,
    FOLDER_NAME,
    RegularizationOptions,
    add_regularization,
    write_class_caption,
)
from project.running import Project, read_project, run_command
from protocols.families import FAMILIES, FamilyEntry
from runtime.options import say_for_generation
from training.next_commands import FIELD_BY_OPTION, SAMPLE_OPTION_NAMES, TrainingCommand
from training.options import TrainingOptions
from training.samples import read_requests, settings_to_repeat

# names of images that a generation script writes: a time, the seed, and underscores where names were taken
_MADE = re.compile(r"\d{8}-\d{6}_(\d+)_*\.png")


@dataclass(frozen=True)
class BaseModel:
    """The model of a run before its training, and how the run samples."""

    entry: FamilyEntry
    family: Any
    command: list[str]  # generates with the model; without prompts and the place of the results
    seed: int


@dataclass(frozen=True)
class ClassImage:
    """A regularization image to make."""

    path: Path
    caption: str
    size: tuple[int, int]  # width, height
    seed: int

    @property
    def line(self) -> str:
        """The line of a prompt file that makes it."""
        width, height = self.size
        return f"{self.caption} {format_options({'w': width, 'h': height, 'd': self.seed})}"


def make_regularization_images(options: RegularizationOptions) -> None:
    """Generate an image of the class for each image of a described folder, and add them to its dataset.toml.

    Exits with the code of the generation script if it fails; what it made is kept.

    Raises:
        UserError: If the folder, its run or its model has no regularization images.
    """
    project = read_project(options.folder, {})
    folder = project.folder
    if project.kind.uses_control_images or project.kind.trains_embedding:
        raise OptionError(
            f"{options.folder}: {project.kind.title} uses no regularization images. Train a LoRA"
        )
    if project.missing_model_files:
        run = own_command("run", as_operand(options.folder), "--download")
        raise OptionError(f"{project.missing_model_files[0]} is missing. Download the model first: {run}")
    # run.toml may come from a stranger: its commands write only into the folder
    with limit_run([folder], (), "regularize"):
        model = _read_model(project)
        text = add_regularization(folder / DATASET_FILE)
        images = _plan_images(model, folder, text, options)
        missing = [image for image in images if not image.path.exists()]
        if options.dry_run:
            lines = [image.line for image in missing]
            print_lines([*lines, "", f"$ {typed_in(model.command, folder)} --from_file PROMPTS"])
            return
        if missing:
            _make_images(model, folder, missing)
    made = format_count(len(missing), "regularization image")
    lines = [f"{folder / FOLDER_NAME}: {made} made, {len(images) - len(missing)} were there"]
    before = read_text(folder / DATASET_FILE)
    if text != before:
        write_text(folder / f"{DATASET_FILE}.bak", before)
        write_text(folder / DATASET_FILE, text)
        lines.append(f"{DATASET_FILE} has them as is_reg now; as it was before: {DATASET_FILE}.bak")
    print_lines([*lines, f"Next: {own_command('run', as_operand(options.folder))}"])


def _read_model(project: Project) -> BaseModel:
    """Return the base model of a run, as its training script reads the options of run.toml."""
    argv = project.commands[-1]
    read: list[BaseModel] = []

    # the training script calls this instead of training
    def start(
        name: str, script: str, options: TrainingOptions, family_options: Any, script_options: Sequence[Any]
    ) -> int:
        entry = FAMILIES[name]
        if entry.makes != "image":
            raise OptionError(
                f"{argv[1]} trains a video model, which has no regularization images. Use an image model"
            )
        if entry.captions:
            raise OptionError(
                f"{argv[1]}: captions of this model are JSON objects, in which no class word can be put"
            )
        if options.loop.dataset_config != Path(DATASET_FILE):
            raise OptionError(
                f"{RUN_FILE} trains on {options.loop.dataset_config}: only {DATASET_FILE} can be extended"
            )
        family = entry.make_family("training", family_options)
        sample: dict[str, Any] = {}
        if options.samples.sample_prompts is not None:
            _, requests = read_requests(family, options.samples.sample_prompts)
            sample = settings_to_repeat(requests[0], is_seeded=False, family=family)
        typed = TrainingCommand(script, script_options).typed_flags
        generation = entry.generation_argv(family_options, sample, typed)
        flags = {name: entry.spellings.get(name, f"--{name}") for name in SAMPLE_OPTION_NAMES}
        values = {flag: sample.get(FIELD_BY_OPTION.get(name, name)) for name, flag in flags.items() if flag}
        command = [
            "python",
            *generation,
            *option_argv(say_for_generation(options.speed)),
            *option_argv(values),
        ]
        unknown = missing_words(command)
        if unknown:
            raise OptionError(f"{RUN_FILE} lacks {', '.join(unknown)}, which generation needs. Add it there")
        read.append(BaseModel(entry, family, command, seed=options.loop.seed or 0))
        return 0

    script = installation.find_script(argv[1])
    assert script is not None  # `read_project` has checked it
    main = installation.import_own(".".join(script.with_suffix("").parts)).main
    with contextlib.chdir(project.folder):
        main(argv[2:], start)
    return read[0]


def _plan_images(
    model: BaseModel, folder: Path, text: str, options: RegularizationOptions
) -> list[ClassImage]:
    """Return an image of the class for each training image, in the size in which that is trained."""
    # `text` is the dataset file with the regularization images, whose sizes may differ from those before.
    assert options.class_word is not None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".regularization") as name:
        config_path = Path(name, DATASET_FILE)
        write_text(config_path, text)
        with contextlib.chdir(folder):
            load_dataset_config(Path(DATASET_FILE))  # so that messages name that file
            config = load_dataset_config(config_path)
            sources: dict[Path, MediaSource] = {}
            for table in config.datasets:
                if not table.learning.is_reg:
                    for source in find_sources(table):
                        sources.setdefault(source.path, source)
            stems = Counter(path.stem for path in sources)
            images = []
            for index, (path, source) in enumerate(sources.items()):
                table = source.table
                if source.control or source.references:
                    raise DatasetError(f"{path} is learned with control images, which images of a class lack")
                word = options.trigger_word or table.captions.trigger_word
                if not word:
                    raise OptionError(
                        f"{DATASET_FILE} has no trigger_word: pass --trigger_word with that of the captions"
                    )
                caption = next(iter(unvaried_captions(source)), "")
                stem = path.stem if stems[path.stem] == 1 else f"{path.parent.name}_{path.stem}"
                image = ClassImage(
                    folder / FOLDER_NAME / f"{stem}.png",
                    write_class_caption(caption, word, options.class_word),
                    find_bucket(table, image_size(path), model.family.latent.pixel_step, path),
                    seed=model.seed + index,
                )
                images.append(image)
    same = [path for path, count in Counter(image.path for image in images).items() if count > 1]
    if same:
        raise DatasetError(f"two images would have the regularization image {same[0]}. Rename one of them")
    return images


def _make_images(model: BaseModel, folder: Path, images: Sequence[ClassImage]) -> None:
    """Generate images in one run of the generation script, and move them to their places with captions."""
    make_folder(folder / FOLDER_NAME, "the folder of regularization images")
    by_seed = {image.seed: image for image in images}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".regularization") as name:
        prompts, made = Path(name, "prompts.txt"), Path(name, "made")
        write_text(prompts, "".join(f"{image.line}\n" for image in images))
        save_path = model.entry.spellings.get("save_path", "--save_path")
        argv = [*model.command, "--from_file", str(prompts), save_path, str(made)]
        print_lines([f"$ {typed_in(argv, folder)}"])
        code = run_command(argv, folder)
        for path in sorted(made.iterdir()) if made.is_dir() else ():
            match = _MADE.fullmatch(path.name)
            image = by_seed.get(int(match[1])) if match is not None else None
            if image is not None:
                # the image comes last: a name that exists is complete, with its caption
                write_text(image.path.with_suffix(CAPTION_SUFFIX), f"{image.caption}\n")
                replace_file(path, image.path)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    lost = [image.path.name for image in images if not image.path.exists()]
    if lost:
        raise DatasetError(f"{model.command[1]} has not made {', '.join(lost[:3])}: see its messages above")
