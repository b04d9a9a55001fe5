"""Write dataset.toml, prompts.txt and run.toml into a folder, and report what was found and chosen."""

import contextlib
import dataclasses
import difflib
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset.config import load_dataset_config, with_lengths, with_references
from dataset.control_pairs import check_pairs
from dataset.listing import find_sources
from dataset.sources.media_source import LISTED, Fault, MediaSource, list_errors
from dataset.table import DatasetTable
from downloads.catalogue import ModelSet, find_adapted
from downloads.listing import describe_licenses, excludes_many, gigabytes, print_lines, total_bytes
from modules.atomic_write import free_bytes, write_text
from modules.console import format_count, quiet
from modules.errors import DatasetError, OptionError, OutputError
from modules.line_kinds import CAPTIONS, MEND, NEXT, KindLine, fault, show_kinds, warning
from modules.media.reading import first_frame
from modules.media.writing import write_png
from modules.run_limits import temporary_folder
from modules.text_files import read_text
from project import describing
from project.foreign.checking import check_run
from project.foreign.counting import count_epoch_steps, find_pixel_step
from project.foreign.lengths import select_length
from project.foreign.naming import explain_model
from project.foreign.own_files import use_own_files
from project.foreign.places import find_table_keys, omit_table_keys
from project.foreign.project import ForeignProject
from project.foreign.reading import read_foreign
from project.foreign.sample_prompts import MAX_SAMPLES
from project.foreign.settling import DatasetLayout, complete_options, resolve_project
from project.kinds.composing import BY_NAME, find_control_kind, list_kinds
from project.kinds.contract import RunKind
from project.kinds.whole_model import FULL
from project.known_folders import remember_folder
from project.media import (
    FolderContent,
    PlannedTraining,
    SuggestedModels,
    collect_content,
    find_folder_kind,
    name_some,
)
from project.model_choice import (
    ModelChoice,
    ModelInfo,
    check_model_files,
    describe_outputs,
    read_model_info,
    select_model,
    trains_on_audio_alone,
)
from project.model_files import find_embedded_files, name_files, typed_files, without_files
from project.model_sizes import describe_fit, find_memory, needs_image
from project.new_options import NewOptions
from project.options import (
    CAPTION_MODEL,
    CAPTION_MODEL_SIZE,
    DATASET_FILE,
    RUN_FILE,
    WRITTEN,
    as_operand,
    download_options,
    find_models,
    make_caption_argv,
    own_command,
    typed_in,
)
from project.own_commands import (
    describe_length,
    describe_own_images_commands,
    list_distinct_captions,
    write_prompts,
)
from project.own_samples import (
    OWN_FOLDER,
    OWN_PROMPTS,
    REAL_MEDIA,
    balance_origins,
    find_origin,
    use_prompts_as_captions,
)
from project.recipes.reading import TrainingRecipe, complete_options_from_recipe, describe_recipe, find_recipe
from project.script_facts import read_script_options
from project.tags import TagLists, as_words, find_tags, make_argv_to_write_blanks
from project.varied_captions import make_captions
from protocols.new_tokens import find_error

UNCHANGED = "Nothing is written: the three files would stay as they are."
KIND_WORDS = {"video": "clip", "image": "image", "audio": "sound"}  # kind of a file -> its word in a line
# kind of error
UNREADABLE_WITHOUT_CAPTION = (
    "cannot be read and have no caption, which ends a run: delete each, or move it away"
)


def write_project(options: NewOptions) -> None:
    """Write run.toml, dataset.toml and prompts.txt for a folder; print what was found and chosen.

    1. Complete the options from another trainer's project (--from) or a recipe, and choose the model.
    2. Choose what is trained. For an adapter and an empty folder, only write prompts, and stop.
    3. Read the folder, and collect everything that determines the three files.
    4. Write them, with captions from lists, and with the first frames of clips if the model learns images.

    With --dry_run the changes are printed instead of written, with --print_run only the text of run.toml.

    Raises:
        OutputError: If one of the three files exists.
    """
    memory = find_memory() if options.memory is None else options.memory
    template = _Template(
        foreign=None if options.from_file is None else read_foreign(options.from_file, options.trains),
        recipe=None if options.recipe is None else find_recipe(options.recipe),
    )
    completed = template.complete_options(options)
    model_choice = _select_model(completed, memory, template)
    if template.foreign is not None:
        completed = use_own_files(template.foreign, completed, model_choice.model, options)
    # first, because building the family takes seconds
    kind = _select_kind(completed, model_choice, memory, template.name_kind_setting(options))
    # only prompts of an earlier `new` may be in a folder whose images a model is to make itself
    if kind.makes_training_adapter and all(path.name == OWN_PROMPTS for path in completed.folder.iterdir()):
        _begin_with_prompts(completed, model_choice.model)
        return
    setup = _make_setup(completed, model_choice, kind=kind, memory=memory, foreign=template.foreign)
    # after all other checks: --overwrite would not help against a mistyped option
    _reject_existing(completed)
    setup = template.complete_setup(setup)
    if completed.print_run:
        print_lines(describing.describe_run(setup, describing.list_commands(setup)).splitlines())
        return
    texts = _write_files(setup)
    packages = [] if template.foreign is None else template.foreign.missing_packages
    _print_report(setup, model_choice.remarks, texts, template.describe(completed.folder), packages)


class _Template(NamedTuple):
    """The file whose values a run adopts: another trainer's project (--from), a recipe, or neither."""

    foreign: ForeignProject | None
    recipe: TrainingRecipe | None

    def complete_options(self, options: NewOptions) -> NewOptions:
        """Return the options of `new` with the template's values where the user typed none."""
        if self.recipe is not None:
            return complete_options_from_recipe(self.recipe, options)
        if self.foreign is not None:
            return complete_options(self.foreign, options)
        return options

    def name_kind_setting(self, typed_options: NewOptions) -> str:
        """Return the project's setting that requests the kind of run; "" if the user typed the kind."""
        if self.foreign is None or typed_options.trains:
            return ""
        return f"{self.foreign.path}: {self.foreign.run.setting}"

    def complete_setup(self, setup: describing.RunSetup) -> describing.RunSetup:
        """Return the setup with the recipe's training options, or the project's that are valid."""
        if self.recipe is not None:
            training_options = dict(self.recipe.training)
            # an option of `new`, which `complete_options` has set
            training_options.pop("max_train_steps", None)
            return dataclasses.replace(setup, training_options=training_options)
        if self.foreign is not None:
            return _remove_rejected_options(setup, self.foreign)
        return setup

    def describe(self, folder: Path) -> list[str]:
        """Return lines about the adopted values."""
        if self.recipe is not None:
            return describe_recipe(self.recipe)
        if self.foreign is not None:
            return self.foreign.format_report(folder)
        return []


def _select_model(options: NewOptions, memory: float, template: _Template) -> ModelChoice:
    """Choose the model. If this fails, the error also says which model the other trainer's project names."""
    try:
        return select_model(options, memory, lambda: _reject_existing(options))
    except OptionError as error:
        raise (error if template.foreign is None else explain_model(template.foreign, error)) from None


def _write_files(setup: describing.RunSetup) -> dict[Path, str]:
    """Write run.toml, dataset.toml and prompts.txt, unless --dry_run is set; return their texts by path."""
    # Captions from lists and first frames of clips are written first.
    options = setup.options
    text_by_name = _make_project_texts(setup, describing.list_commands(setup))
    if setup.kind.makes_training_adapter and _can_be_made_anew(setup):
        # the model will generate images from these captions, to learn from
        text_by_name[OWN_PROMPTS] = write_prompts(list_distinct_captions(setup))
    text_by_path = {options.folder / name: text for name, text in text_by_name.items()}
    if not options.dry_run:
        # first frames of clips, and captions from lists; caption files that exist are not changed
        for image, clip in setup.content.first_frames.items():
            image.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, first_frame(clip))
        for caption_file, caption in setup.content.new_captions.items():
            if not caption_file.exists() or caption_file.with_suffix(".png") in setup.content.first_frames:
                write_text(caption_file, f"{caption}\n")
        for path, text in text_by_path.items():
            write_text(path, text)
        remember_folder(options.folder, options.models)
    return text_by_path


def _print_report(
    setup: describing.RunSetup,
    remarks: list[str],
    texts: Mapping[Path, str],
    adopted_lines: Sequence[str],
    missing_packages: Sequence[str],
) -> None:
    """Print what was found and chosen, and the next commands; the run needs these packages with pip first."""
    options = setup.options
    problems = _check_dataset(setup, texts[options.folder / DATASET_FILE])
    lines = describe_licenses(setup.model) if excludes_many(setup.model) else []
    # lines are in the order of the decisions: model, captions, tags, then problems
    lines += adopted_lines
    lines += _describe_choice(setup, remarks)
    lines += _describe_captions(setup)
    lines += _describe_tags(setup)
    lines += [*problems.control_pair_warnings, *problems.errors]
    if options.dry_run:
        lines += _describe_changes(texts)
    else:
        written = ", ".join(str(options.folder / name) for name in WRITTEN)
        lines.append(f"written: {written}")
        # The closing line of `new`: the training command, after any steps that must come first
        has_errors = bool(problems.errors)
        command = ["run", as_operand(setup.options.folder)]
        downloads = ""
        if not all(Path(path).exists() for path in setup.model_files.values()):
            command += download_options(setup.options.models)
            downloads = "downloads the model, "
        run_text = f"{own_command(*command)} {downloads}checks, caches and trains"
        steps_before = [f"pip install {' '.join(missing_packages)}"] if missing_packages else []
        if has_errors:
            steps_before.append("fix the problems listed above")
        if _find_uncaptioned_media(setup):
            steps_before.append("add captions or a trigger word as above")
        text = run_text
        if steps_before:
            text = f"First {', and '.join(steps_before)}. Then {run_text}"
        lines.append(KindLine(MEND if has_errors else NEXT, text))
    print_lines(show_kinds(lines))


def _reject_existing(options: NewOptions) -> None:
    """Raise OutputError if a project file already exists, unless --overwrite or a dry run is requested."""
    existing = [path for path in (options.folder / name for name in WRITTEN) if path.exists()]
    if existing and not (options.overwrite or options.dry_run or options.print_run):
        raise OutputError(f"{existing[0]} already exists. Edit it, or pass --overwrite to replace all three.")


def _begin_with_prompts(options: NewOptions, model: ModelSet) -> None:
    """Write prompts for images that the model will generate into an empty folder; print the next commands."""
    text = write_prompts(make_captions())
    if not options.dry_run:
        write_text(options.folder / OWN_PROMPTS, text)
    download = [
        "download",
        "--family",
        model.family,
        "--task",
        model.task,
        "--to",
        as_operand(options.models),
    ]
    lines = [
        f"{options.folder} is empty: {len(text.splitlines())} varied captions are in {OWN_PROMPTS}. First:",
        f"  {own_command(*download)}",
        *describe_own_images_commands(options, model, name_files(options, model)),
    ]
    print_lines(lines)


def _make_project_texts(setup: describing.RunSetup, commands: list[list[str]]) -> dict[str, str]:
    """Return the contents of run.toml, dataset.toml and prompts.txt by file name."""
    dataset = describing.describe_dataset(setup)
    samples = describing.describe_samples(setup)
    return dict(zip(WRITTEN, (dataset, samples, describing.describe_run(setup, commands)), strict=True))


def _describe_changes(texts: Mapping[Path, str]) -> list[str]:
    """Return the changes to the existing files in `diff -u` format."""
    lines: list[str] = []
    for path, text in texts.items():
        old_text = read_text(path) if path.exists() else ""
        changes = difflib.unified_diff(
            old_text.splitlines(),
            text.splitlines(),
            fromfile=path.name,
            tofile=f"{path.name} as it would be",
            n=1,
            lineterm="",
        )
        lines += changes
    if not lines:
        return [UNCHANGED]
    return ["Nothing is written. So the three files would change:", *lines]


def _make_setup(
    options: NewOptions,
    model_choice: ModelChoice,
    *,
    kind: RunKind,
    memory: float,
    foreign: ForeignProject | None,
) -> describing.RunSetup:
    """Read the folder, and return everything that determines run.toml, dataset.toml and prompts.txt."""
    # 1. Find the model's files, and check those that were typed.
    # 2. Collect the media of the folder, and their tags.
    # 3. Choose size and length, and apply another trainer's project.
    # `kind` is what the run trains, `memory` the GPU memory in GiB. `foreign` is another trainer's project,
    # which --from names.
    model = model_choice.model
    if 0 < memory < describing.SMALL_CARD_GIB:
        # the same model with text encoders in 8 bits
        model = next(
            candidate
            for candidate in find_models(fp8_encoders=True)
            if (candidate.family, candidate.task) == (model.family, model.task)
        )
    typed_paths = typed_files(options)
    # networks inside a typed checkpoint need no separate file
    embedded_files = find_embedded_files(model, typed_paths)
    if embedded_files:
        model = without_files(model, embedded_files)
    files = name_files(options, model)
    model_info = read_model_info(model, files)
    check_model_files(model, {name: files[name] for name in typed_paths})
    content = _collect_content(options, model, model_info, kind)
    if kind.makes_training_adapter:  # an adapter learns from images that the model itself generated
        use_prompts_as_captions(content)
        balance_origins(content)
    tags = find_tags(_list_caption_texts(content)) if "tags" in model.properties else None
    setup = describing.RunSetup(
        options=options,
        model=model,
        kind=kind,
        model_info=model_info,
        content=content,
        memory=memory,
        target_size=describing.select_size(model, content.media),
        frames=describing.select_frames(model, content.media, memory),
        model_files=files,
        embedded_model_files=embedded_files,
        options_without_download=[*typed_paths, *embedded_files],
        trigger_word=model_choice.trigger,
        tags=tags,
        general_keys={},
        table_keys_by_folder={},
        training_options={},
        may_hold_out_validation=True,
    )
    return setup if foreign is None else _apply_foreign_project(setup, foreign)


def _apply_foreign_project(setup: describing.RunSetup, foreign: ForeignProject) -> describing.RunSetup:
    """Apply the settings of another trainer's project (--from) to a run; return the changed setup."""
    model = setup.model
    content = setup.content
    script = read_script_options(setup.kind.find_training_command(model)[0])
    dataset_layout = DatasetLayout(
        side_multiple=find_pixel_step(setup.model_info.family),
        supports_subsets="shuffle_caption" in script.accepted,
        uses_subsets=bool(content.regularization_folders) or setup.tags is not None,
        target_size=setup.target_size,
        clip_lengths=describing.list_clip_lengths(model, content.media),
        has_regularization=bool(content.regularization_folders),
    )
    resolve_project(foreign, model, setup.kind, script, setup.memory, dataset_layout)
    folder = setup.options.folder
    media_folders = dict.fromkeys(item.path.parent for item in content.media)
    setup = dataclasses.replace(
        setup,
        target_size=foreign.general_keys.get("resolution", [setup.target_size])[0],  # the largest
        frames=max(foreign.list_clip_lengths(), default=setup.frames),
        general_keys=foreign.general_keys,
        table_keys_by_folder=find_table_keys(foreign, folder, media_folders),
        training_options=foreign.training_options,
        may_hold_out_validation=False,  # the project decides itself about validation
    )
    if setup.has_subsets:  # subsets accept fewer keys
        omit_table_keys(foreign)
    setup = _use_foreign_samples(setup, foreign)
    # the project may give its length in epochs, whose steps depend on the media
    steps_per_epoch = count_epoch_steps(setup)
    options = select_length(foreign, setup.options, steps_per_epoch, len(content.media))
    return dataclasses.replace(setup, options=options)


def _use_foreign_samples(setup: describing.RunSetup, foreign: ForeignProject) -> describing.RunSetup:
    """Return the setup with the project's samples, unless samples need images of the folder; report which."""
    if not foreign.sample_keys:
        return setup
    if not foreign.samples:
        reason = "there is no prompt; prompts.txt has some of your captions"
    elif not setup.has_text_samples:
        reason = "samples need images of the folder here; prompts.txt has some with them"
    else:
        samples = foreign.samples[:MAX_SAMPLES]
        count = format_count(len(samples), "prompt")
        foreign.change_lines.append(f"{', '.join(foreign.sample_keys)}: {count} in prompts.txt")
        if len(foreign.samples) > len(samples):
            foreign.omission_lines.append(
                f"{len(foreign.samples) - len(samples)} more sample prompts: each takes as long as a "
                "generation"
            )
        return dataclasses.replace(setup, foreign_samples=samples)
    for key in foreign.sample_keys:
        foreign.report_omitted_key(key, reason)
    return setup


def _remove_rejected_options(setup: describing.RunSetup, foreign: ForeignProject) -> describing.RunSetup:
    """Return the setup without the adopted options that the training script rejects."""

    def make_run_files(training_options: Mapping[str, Any]) -> dict[str, str]:
        changed = dataclasses.replace(setup, training_options=training_options)
        return _make_project_texts(changed, describing.list_commands(changed))

    script = read_script_options(setup.kind.find_training_command(setup.model)[0])
    check_run(foreign, script.name, setup.folder, make_run_files)
    return dataclasses.replace(setup, training_options=foreign.training_options)


def _select_kind(options: NewOptions, chosen: ModelChoice, memory: float, kind_setting: str) -> RunKind:
    """Return what a run trains: as typed, else a control network if there are control images, else a LoRA."""
    # `chosen` contains the model and the trigger word. `kind_setting` is the setting of another trainer's
    # project that requests this kind; "" if the user typed the kind.
    model = chosen.model
    if options.trains is None:
        return find_folder_kind(options.folder, model, has_word=chosen.trigger is not None)
    kind = BY_NAME[options.trains]
    rejection = kind.why_unsupported(model, memory)
    if rejection is not None:
        typed = "--whole_model" if options.whole_model else f"--train {kind.name}"
        possible = [other.name for other in list_kinds(model) if other.why_unsupported(model, memory) is None]
        remedy = "Pass --train lora" if kind_setting else "Omit it"
        raise OptionError(
            f"{kind_setting or typed}: {rejection}. {remedy} to train a LoRA, or choose another --task. "
            f"This one has --train {', '.join(possible)}"
        )
    if kind.trains_embedding:
        # what is learned is the trigger word
        if chosen.trigger is None:
            raise OptionError(
                f"--train {kind.name}: {kind.title} is a new word: pass it as --trigger_word, such as "
                "mrsfluff"
            )
        error = find_error(chosen.trigger)
        if error:
            raise OptionError(f"--trigger_word {chosen.trigger!r} {error}")
    return kind


def _list_caption_texts(content: FolderContent) -> list[str]:
    return [item.caption for item in content.media if item.caption]


def _collect_content(
    options: NewOptions, model: ModelSet, model_info: ModelInfo, kind: RunKind
) -> FolderContent:
    """Return the content of the folder, with hints about more suitable models of other tasks."""
    # Models for folders that this one cannot use: with references, audio alone, or silent clips
    models = find_models()
    family_models = [other for other in models if other.family == model.family]
    audio_options = [f"--task {other.task}" for other in family_models if trains_on_audio_alone(other)]
    if not audio_options:  # suggest other families
        audio_families = dict.fromkeys(other.family for other in models if trains_on_audio_alone(other))
        audio_options = [f"--family {family}" for family in audio_families]
    silent_task = ""
    if model_info.trains_on_audio:
        silent_tasks = (other.task for other in family_models if not read_model_info(other).trains_on_audio)
        silent_task = next(silent_tasks, "")
    training = PlannedTraining(
        model_info=model_info,
        model_name=f"{model.family} {model.task}",
        kind=kind,
        control_kind=find_control_kind(model),
        suggested_models=SuggestedModels(
            editing_task=next((other.task for other in family_models if needs_image(other)), ""),
            audio_options=" or ".join(audio_options),
            silent_task=silent_task,
        ),
    )
    return collect_content(options.folder, training)


class DatasetProblems(NamedTuple):
    """Messages about a dataset: errors, and warnings about control images."""

    errors: list[str]  # would end a training run
    control_pair_warnings: list[str]


def _check_dataset(setup: describing.RunSetup, dataset_toml: str) -> DatasetProblems:
    """Check the media, captions and control images of a dataset as a training run would."""
    # Images that --dry_run does not write are not checked. Missing captions are omitted, because other lines
    # report them, except for files that cannot be read.
    if setup.options.dry_run and setup.content.first_frames:
        return DatasetProblems([], [])
    errors: list[Fault] = []
    pair_warnings: list[str] = []
    # dataset.toml is not written yet: a temporary copy is read, in the folder that its paths start from
    with temporary_folder() as copies, contextlib.chdir(setup.options.folder), quiet():
        copy = copies / DATASET_FILE
        write_text(copy, dataset_toml)
        # Load a dataset.toml with the clip lengths and references that the model accepts.
        family = setup.model_info.family
        config = with_lengths(load_dataset_config(copy), describing.get_clip_lengths(setup.model))
        config = with_references(config, family.references, family.abilities.references)
        for table in config.datasets:
            errors += _find_table_errors(table, setup.content.unreadable_media)
        if setup.kind.uses_control_images and not errors:
            try:
                check_pairs(config, setup.kind.title, pair_warnings.append)
            except DatasetError as error:
                errors.append(Fault("tables cannot be used", str(error)))
    written = str(setup.options.folder / DATASET_FILE)
    lines = [line.replace(str(copy), written) for line in list_errors(errors, LISTED)]
    # indented lines belong to the error above them
    lines = [line if line.startswith(" ") else fault(line) for line in lines]
    return DatasetProblems(lines, pair_warnings)


def _find_table_errors(table: DatasetTable, unreadable_media: Iterable[Path]) -> list[Fault]:
    """Return a dataset.toml table's errors that stop a run, including unreadable media without caption."""
    faults: list[Fault] = []
    sources: list[MediaSource] = []
    try:
        sources = find_sources(table, faults=faults)
    except DatasetError as error:
        faults.append(Fault("tables cannot be used", str(error)))
    errors = [found for found in faults if found.is_fatal]
    unreadable_names = {path.name for path in unreadable_media}
    for source in sources:
        if source.caption is None and source.path.name in unreadable_names:
            errors.append(Fault(UNREADABLE_WITHOUT_CAPTION, str(source.path)))
    return errors


def _describe_choice(setup: describing.RunSetup, remarks: list[str]) -> list[str]:
    """Return lines about the folder, the model, and how well they fit."""
    # `remarks` are lines about how the model was chosen.
    contradiction = setup.model_info.task_contradiction
    # Warnings about clips that are too short, and about images that the model does not use
    warnings = [_describe_short_clips(setup), _describe_clips_used_as_images(setup), _describe_images(setup)]
    # A line for each folder of images that a control network learns from
    alternative = "" if setup.options.trains else ". --train lora trains a LoRA without them"
    lines = []
    for folder, control_folder in setup.content.control_folders.items():
        data = f"its pairs with {control_folder}"
        if setup.kind.inpaints_images:
            data = "its images, in which each step masks a random part to repaint"
        lines.append(f"{folder}: {setup.kind.title} learns from {data}{alternative}")
    return [
        _summarize(setup),
        *setup.content.report_lines,
        *remarks,
        *_describe_size(setup),
        _describe_model(setup),
        *setup.kind.describe(setup.model, setup.memory),
        *lines,
        *[
            f"--{name}: taken from {checkpoint}. --model_file {name}=FILE uses another one"
            for name, checkpoint in setup.embedded_model_files.items()
        ],
        *_describe_precision(setup),
        *([warning(contradiction)] if contradiction else []),
        *_describe_distillation(setup),
        *_describe_adapter_training(setup),
        *[
            f"{folder}: made from {reference_folder}"
            for folder, reference_folder in setup.content.reference_folders.items()
        ],
        *([warning(text) for text in warnings if text]),
    ]


def _describe_size(setup: describing.RunSetup) -> list[str]:
    """Return why the images have this size; [] for the model's usual size, or if a project sets it."""
    reason = describing.explain_size(setup.model, setup.media)
    if not reason or "resolution" in setup.general_keys:
        return []
    width, height = setup.target_size
    return [f"{width}x{height}: {reason}"]


def _describe_adapter_training(setup: describing.RunSetup) -> list[str]:
    """Return lines about the length and the images of a run that makes a training adapter."""
    if not setup.kind.makes_training_adapter:
        return []
    lines = describe_length(setup)
    if _can_be_made_anew(setup):
        lines += describe_own_images_commands(setup.options, setup.model, setup.model_files)
    return lines


def _can_be_made_anew(setup: describing.RunSetup) -> bool:
    """Return whether the model can generate images from captions of real ones, to learn from its own."""
    # in the folder of such images, those of other programs hold no prompt
    is_own = setup.folder.name == OWN_FOLDER and (setup.folder.parent / OWN_PROMPTS).exists()
    is_real = find_origin(setup.content) == REAL_MEDIA and not is_own
    return is_real and bool(list_distinct_captions(setup))


def _describe_precision(setup: describing.RunSetup) -> list[str]:
    """Return lines about training in float32 or float16 on this machine; [] if it trains in bfloat16."""
    lines = []
    if setup.needs_float32:
        lines.append(
            "This processor computes bfloat16 many times slower than float32, so everything is in float32, "
            "which needs twice the memory. On a card, describe the folder again with --memory GIB --overwrite"
        )
    if setup.needs_float16:
        lines.append(
            "This machine's GPU has no bfloat16, so the training is in float16 (mixed_precision in run.toml)."
            ' If its loss becomes NaN, the model leaves the range of float16: write "no" there, for float32'
        )
    return lines


def _describe_distillation(setup: describing.RunSetup) -> list[str]:
    """Return a warning that training unlearns the few steps of a distilled model, with the alternatives."""
    few_steps = setup.model_info.few_step_advice
    if few_steps is None or setup.kind.makes_training_adapter:
        return []
    subject = "It" if setup.model_info.task_contradiction else setup.model_name
    unlearned = few_steps.unlearned_pronoun
    text = f"{subject} {few_steps.distillation_clause}, and plain training unlearns {unlearned}"
    target_hint = (
        f"the comment signs from the lines of a target that keeps {unlearned}, in [training] of {RUN_FILE}"
    )
    if not setup.kind.supports_few_step_targets:
        return [warning(f"{text}. {few_steps.advice_for_full_training}")]
    if few_steps.applies_to_all_files:  # families with only distilled models have no alternative
        text += f". Take {target_hint}"
    else:
        text += f". {few_steps.advice_for_lora}. Or take {target_hint}"
    with_adapter = find_adapted(setup.model)
    if with_adapter is not None:
        text += f". --task {with_adapter.task} downloads an adapter and trains with it"
    return [warning(text)]


def _summarize(setup: describing.RunSetup) -> str:
    """Return the summary line: number of files, model, size and GPU."""
    size = ""
    if not setup.has_only_audio:
        size = f" at {setup.target_size[0]}x{setup.target_size[1]}"
    if setup.frames > 1:
        size += f", {setup.frames} frames"
    card = "a CPU (--memory 12: a card of 12 GiB)"
    if setup.memory:
        card = f"a card of {setup.memory:.0f} GiB"
    # The number of files of each kind as text, such as `3 clips and 1 image`
    counts = Counter[str](item.kind for item in setup.media)
    texts = [format_count(counts[kind], word) for kind, word in KIND_WORDS.items() if counts[kind]]
    media = " and ".join(texts)
    return f"{setup.options.folder}: {media}. {setup.model_name}{size}, on {card}"


def _describe_model(setup: describing.RunSetup) -> str:
    """Return a line about the model: what it generates, its download size, and whether it fits the GPU."""
    model = setup.model
    existing = {f"--{name}" for name, path in setup.model_files.items() if Path(path).exists()}
    missing_files = [part for part in model.components if part.option and part.option not in existing]
    missing_bytes = total_bytes(missing_files)
    download = f"{gigabytes(missing_bytes)} to download" if missing_bytes else "its files are there"
    outputs = describe_outputs(model, setup.model_info)
    summary = f"{setup.model_name} makes {outputs}; {download}"
    if setup.kind is FULL:  # other lines report the memory
        free = gigabytes(free_bytes(setup.folder))
        slow = "" if setup.memory else f". {describe_fit(model, setup.memory)}"
        return f"{summary}{slow}. {free} are free on the disk of {setup.folder}"
    subject = "Its transformer: " if setup.memory else ""
    return f"{summary}. {subject}{describe_fit(model, setup.memory)}"


def _describe_short_clips(setup: describing.RunSetup) -> str:
    """Return which clips have fewer frames than the run trains on; "" if none has."""
    model = setup.model
    if setup.frames == 1:  # `_describe_clips_used_as_images` describes them
        return ""
    timed = [item for item in setup.media if item.is_clip and item.seconds is not None]
    short_clips = [clip.path for clip in timed if describing.count_frames(clip, model) < setup.frames]
    if not short_clips:
        return ""
    fps = model.properties.get("fps")
    return f"{name_some(short_clips)}: shorter than {setup.frames} frames (at {fps} a second)"


def _describe_clips_used_as_images(setup: describing.RunSetup) -> str:
    """Return what a run on single frames does with the clips; "" if it trains on clips or has none."""
    model = setup.model
    clips = [item.path for item in setup.media if item.is_clip]
    if not clips or setup.frames > 1:
        return ""
    consequence = "which learns their first frame"
    if not describing.can_train_single_frames(model):
        minimum = describing.min_clip_frames(model)
        fps = model.properties["fps"]
        consequence = f"which cannot train on clips of fewer than {minimum} frames (at {fps} a second)"
    return f"{name_some(clips)}: too short for a clip of this model, {consequence}"


def _describe_images(setup: describing.RunSetup) -> str:
    """Return which images a model that makes clips from images cannot train on; "" if there are none."""
    images = [item.path for item in setup.media if item.kind == "image"]
    if not images or not setup.model.properties.get("from_image"):
        return ""
    return f"{name_some(images)}: images, which this model cannot train on"


def _find_uncaptioned_media(setup: describing.RunSetup) -> list[Path]:
    """Return the media that `run` would refuse, because they have no caption and nothing can replace it."""
    if setup.trigger_word:
        return []
    content = setup.content
    lacking = [item.path for item in setup.media if item.caption is None]
    unnamed = [path for path in lacking if path.parent not in content.parsed_folder_names]
    return [path for path in unnamed if path not in content.undecodable_captions]


def _describe_captions(setup: describing.RunSetup) -> list[str]:
    """Return lines about media without captions: what is used instead, or two ways to get captions."""
    trigger = setup.trigger_word
    uncaptioned = _find_uncaptioned_media(setup)
    lines = []
    with_empty_caption = [item.path for item in setup.media if item.caption == ""]
    if with_empty_caption:
        noun = "an empty caption" if len(with_empty_caption) == 1 else "empty captions"
        meaning = f"only {trigger} is learned there" if trigger else "nothing is learned under a name"
        lines.append(warning(f"{name_some(with_empty_caption)}: {noun}: {meaning}"))
    captioned_by_trigger = _find_replaced_by_trigger(setup, uncaptioned)
    if captioned_by_trigger:
        names = name_some(captioned_by_trigger)
        suffix = setup.content.caption_suffix
        text = f"{names}: no caption in a {suffix} file; {trigger} (class_tokens) stands for it"
        lines.append(KindLine(CAPTIONS, text))
    if uncaptioned:
        # Lines about media without captions: how a model writes them, or a trigger word replaces them
        captioning_argv = make_caption_argv([shlex.split(setup.model.commands["latents"])])
        problem = (
            f"{name_some(uncaptioned)}: without a caption in a {setup.content.caption_suffix} file next to "
            "it, "
            f"which `run` refuses. A model ({CAPTION_MODEL}, {CAPTION_MODEL_SIZE} to download) writes them, "
            f"in the folder {setup.folder}:"
        )
        lines += [
            KindLine(CAPTIONS, problem),
            f"  {typed_in(captioning_argv, setup.folder)}",
            KindLine(CAPTIONS, "or name what they show by a made-up word alone:"),
            f"  {_make_new_command(setup, trigger_word='WORD')}",
        ]
    return lines


def _describe_tags(setup: describing.RunSetup) -> list[str]:
    """Return lines about captions that are lists of tags, and how they are shuffled."""
    tags = setup.tags or find_tags(_list_caption_texts(setup.content))
    if tags is None:
        return []
    count = format_count(len(tags.lists), "caption")
    example = ", ".join(tags.lists[0][:3])
    found_text = f"{count}: lists of tags ({example}, ...)"
    if setup.tags is None:
        return [f"{found_text}, used unchanged: {setup.model_name} was trained on sentences"]
    # if the model was trained on sentences, many models derived from it were trained on tags
    was_trained_on_tags = bool(setup.model.properties["tags"])
    reader = f"Models made from {setup.model_name} on tags read"
    if was_trained_on_tags:
        reader = f"{setup.model_name} reads"
    # A text about the tags that stay in place and about {a|b} choices, with the keys for both
    keys = tags.make_keys(setup.trigger_word)
    text = ""
    if "keep_tokens_separator" in keys:
        text = f", but for those before {keys['keep_tokens_separator']} (keep_tokens_separator)"
    elif "keep_tokens" in keys:
        text = f", but for the first {keys['keep_tokens']} (keep_tokens)"
    if "enable_wildcard" in keys:
        text += "; one of {a|b} is drawn (enable_wildcard)"
    line = (
        f"{found_text}. {reader} such lists, so they are in another order each time "
        f"(shuffle_caption){text}. The training encodes them in each step"
    )
    owner = "the model" if was_trained_on_tags else "such a model"
    return [line, *_describe_underscores(setup, tags, owner)]


def _describe_underscores(setup: describing.RunSetup, tags: TagLists, owner: str) -> list[str]:
    """Return lines about how to replace underscores in tags with the spaces that the model was trained on."""
    if tags.first_with_underscore is None:
        return []
    lines = [
        f"{tags.first_with_underscore}: {owner}'s own tags have spaces "
        f"({as_words(tags.first_with_underscore)}). To convert yours (the old captions are kept as .bak), "
        f"run this in the folder {setup.folder}:",
        f"  {typed_in(make_argv_to_write_blanks(tags), setup.folder)}",
    ]
    if tags.separator != ",":
        lines += [
            "then run `new` again, because the lists are separated by commas afterwards:",
            f"  {_make_new_command(setup)}",
        ]
    return lines


def _find_replaced_by_trigger(setup: describing.RunSetup, uncaptioned: Sequence[Path]) -> list[Path]:
    """Return the media for which the trigger word serves as the missing caption."""
    # `uncaptioned` are the media that have neither a caption nor a replacement.
    content = setup.content
    lacking = [item.path for item in setup.media if item.caption is None]
    replaced = [path for path in lacking if path not in {*uncaptioned, *content.undecodable_captions}]
    return [path for path in replaced if path.parent not in content.parsed_folder_names]


def _make_new_command(setup: describing.RunSetup, **changed_options: str) -> str:
    """Return the `new` command that describes this folder again, with changed or added options."""
    model = setup.model
    changes = {"family": model.family, "task": model.task, "overwrite": True, **changed_options}
    return own_command(*setup.options.make_argv(setup.options.folder, **changes))
