"""Choose the model for a folder: parse its name, ask on a terminal, read the family's properties."""

import argparse
import contextlib
import itertools
import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from dataset.options import read_latent_caching
from downloads.catalogue import ModelSet, family_page, model_sets
from downloads.listing import gigabytes, in_columns, total_bytes
from downloads.naming import (
    NamedModel,
    get_control_page_hint,
    has_other_number,
    is_task_spelling,
    list_model_families,
    plain_name,
    read_family,
    reject_fine_tune,
)
from modules.command import did_you_mean
from modules.errors import OptionError, UserError
from modules.options import get_option_info, read_options
from modules.output_files import ask_on_terminal, has_terminal
from modules.parser import add_options
from modules.speed_options import take_ae
from modules.text_files import read_safetensors_texts
from project.model_sizes import describe_fit, find_smaller, list_transformers, needs_image, transformer_bytes
from project.new_options import NewOptions
from project.options import check_trigger, find_models, script_family
from protocols.families import with_scripts
from protocols.family import get_audio_spec, knows_few_steps
from protocols.few_steps import FewSteps, Verdict
from training.image_options import ImageModelOptions
from training.options import training_parser

T = TypeVar("T")
DTYPE_OPTIONS = ("dit_dtype", "vae_dtype", "text_encoder_dtype")


@dataclass(frozen=True)
class ModelInfo:
    """What `new` needs to know about a model, from its family."""

    max_references: int  # maximum number of reference images; 0: it does not edit
    needs_reference: bool  # it requires a reference image
    trains_on_audio: bool  # it is trained on the audio of clips
    takes_silent_clips: bool  # all clips may be silent, so that only the video is trained
    reads_separate_audio: bool  # uses an audio file named like the clip; accepts silent clips
    trains_on_clips: bool  # False: it is trained only on images
    min_seconds: float  # minimum length of a clip; shorter ones are not used
    trains_on_audio_alone: bool  # it can also be trained on audio without clips
    supports_regularization: bool  # it supports regularization images of the class
    trains_on_alpha: bool  # it is trained on the transparency of images
    trains_on_layers: bool  # it is trained on images with their layers
    # dtype options of networks, by the kind of script (as in `options_record`) that has them
    dtype_options: Mapping[str, Sequence[str]]
    # advice to use another model or an adapter; None if the model is not distilled or has a training adapter
    few_step_advice: FewSteps | None
    task_contradiction: str | None  # how the name of its file contradicts the task
    family: Any  # the family's record, as for caching latents


@dataclass(frozen=True)
class ModelChoice:
    """The selected model and trigger word, with messages about how they were selected."""

    model: ModelSet
    trigger: str | None
    remarks: list[str]  # notes about automatic choices


def read_model_info(model: ModelSet, files: Mapping[str, str] = MappingProxyType({})) -> ModelInfo:
    """Return which media a model trains on, and what its files say about it. Imports the model family.

    `files` maps options, such as `dit`, to the paths of the model's files; the files need not exist.
    """
    family = _make_family_for_caching(model)
    reference_rules = family.references
    max_references = 0
    if reference_rules is not None and not reference_rules.clips:
        max_references = reference_rules.max_references
    dit_options = [part.option.lstrip("-") for part in list_transformers(model) if part.option]
    dits = [Path(files[name]) for name in dit_options if name in files]
    audio = _read_audio_support(family)
    # The dtype options that a model's scripts accept, by kind of options ("Training", ...).
    entry = with_scripts()[script_family(shlex.split(model.commands["latents"]))]
    return ModelInfo(
        max_references=max_references,
        needs_reference=needs_image(model) and max_references > 0,
        trains_on_audio=audio.trains_on_audio,
        takes_silent_clips=audio.takes_silent_clips,
        reads_separate_audio=audio.reads_separate_files,
        trains_on_clips=model.properties["frames"] > 1,
        min_seconds=model.properties.get("least_frames", 0) / model.properties.get("fps", 1),
        trains_on_audio_alone=trains_on_audio_alone(model),
        supports_regularization=bool(model.properties.get("regularises")),
        trains_on_alpha=_read_latent_flag(family, "has_alpha"),
        trains_on_layers=_read_latent_flag(family, "has_layers"),
        dtype_options=(
            {
                kind: [name for name in DTYPE_OPTIONS if name in get_option_info(entry.options_record(kind))]
                for kind in ("LatentCaching", "TextCaching", "Training")
            }
        ),
        few_step_advice=None if model.has_adapter else _find_few_step_advice(family, model, dits),
        task_contradiction=_find_task_contradiction(family, model, dits),
        family=family,
    )


class _AudioSupport(NamedTuple):
    trains_on_audio: bool
    reads_separate_files: bool  # an audio file named like a clip replaces the clip's audio
    takes_silent_clips: bool = False  # clips may all be silent


def _read_audio_support(family: Any) -> _AudioSupport:
    """Return how a family trains on audio; assume audio in clips if this depends on a missing checkpoint."""
    try:
        audio = get_audio_spec(family)
    except UserError:
        return _AudioSupport(trains_on_audio=True, reads_separate_files=False)
    if audio is None:
        return _AudioSupport(trains_on_audio=False, reads_separate_files=False)
    return _AudioSupport(
        trains_on_audio=True,
        reads_separate_files=audio.is_in_latent_cache,
        takes_silent_clips=not audio.silent_option,
    )


def trains_on_audio_alone(model: ModelSet) -> bool:
    """Return whether the model can be trained on audio without images."""
    return bool(model.properties.get("sound_alone"))


def _read_latent_flag(family: Any, name: str) -> bool:
    """Return a flag of the latent space, such as has_alpha; False if it depends on a missing VAE file."""
    with contextlib.suppress(UserError):
        return bool(getattr(family.latent, name))
    return False


def _make_family_for_caching(model: ModelSet) -> Any:
    """Return the family object that caching latents would use, without loading its encoders."""
    words = shlex.split(model.commands["latents"])
    entry = with_scripts()[script_family(words)]
    for _, option, _ in entry.encoders:  # the properties read here need no encoder
        index = words.index(option) if option in words else len(words)
        del words[index : index + 2]
    _, _, family_options = read_latent_caching(None, entry.options_record("LatentCaching"), words[2:])
    with _without_log():
        return entry.make_family("latent_caching", family_options)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Log only warnings during the block: the model family's constructor logs missing files."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def check_model_files(model: ModelSet, files: Mapping[str, str]) -> None:
    """Check the files that --model_file names with the checks of the training script.

    Its parser reads the options of the model's own command, then these files; the family's constructor
    checks the files. Raises OptionError or CheckpointError if an option does not accept its file.
    """
    if not files:
        return
    entry = with_scripts()[script_family(shlex.split(model.commands["latents"]))]
    record = entry.options_record("Training")
    parser = training_parser(None)
    common_options = _option_names(parser)
    add_options(parser, record)
    # some families declare these options of image models themselves
    declared_by_family = {"pretrained_model_name_or_path", "vae"} & _option_names(parser)
    add_options(parser, ImageModelOptions, without=declared_by_family)
    accepted = _option_names(parser)
    family_options = accepted - common_options
    argv = _select_options(shlex.split(model.commands["train"]), family_options, files)
    for name, path in files.items():
        if name in accepted:
            argv += [f"--{name}", path]
    args = parser.parse_args(argv)
    if "ae" in accepted:  # puts --ae into --vae
        take_ae(args)
    with _without_log():
        entry.make_family("training", read_options(record, args)).check_named_files()


def _option_names(parser: argparse.ArgumentParser) -> set[str]:
    return {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}


def _select_options(words: Sequence[str], names: Collection[str], files: Mapping[str, str]) -> list[str]:
    """Return those options of a command whose names are in `names`, with their values."""
    # `files` maps placeholders such as {vae} to paths. Options with an unknown placeholder are omitted.
    selected: list[str] = []
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        values = [files.get(word.strip("{}"), word) for word in words[start + 1 : end]]
        is_missing = any(value.startswith("{") for value in values)
        if words[start].lstrip("-") in names and not is_missing:
            selected += [words[start], *values]
    return selected


def _find_few_step_advice(family: Any, model: ModelSet, dits: Sequence[Path]) -> FewSteps | None:
    """Return the family's advice about few-step models if this model is distilled, otherwise None."""
    if not knows_few_steps(family):
        return None
    reason = None
    with contextlib.suppress(UserError):  # the files may not be downloaded yet, only their names count
        reason = family.few_steps_evidence()  # the released model that the options name
    for dit, released in zip(dits, _list_released_dits(model), strict=False):
        verdict = _judge_distillation(family, dit) or _judge_distillation(family, released)
        if verdict is not None and verdict.is_distilled:
            reason = verdict.evidence
    return None if reason is None else family.few_steps


def _list_released_dits(model: ModelSet) -> list[Path]:
    return [Path(part.path) for part in list_transformers(model) if part.option]


def _judge_distillation(family: Any, dit: Path) -> Verdict | None:
    """Return whether a model file is distilled to few steps, by its name and metadata; None if unknown."""
    metadata: Mapping[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        metadata = read_safetensors_texts(dit)
    verdict: Verdict | None = family.few_steps.judge(dit, metadata)
    return verdict


def _seems_distilled(family: Any, dit: Path) -> bool:
    verdict = _judge_distillation(family, dit)
    return verdict is not None and verdict.is_distilled


def _find_task_contradiction(family: Any, model: ModelSet, dits: Sequence[Path]) -> str | None:
    """Return a message if only one of a file and its task's released file is distilled to few steps."""
    # None if no file contradicts the task, or if none reveals whether it is distilled.
    if not knows_few_steps(family):
        return None
    for dit, released in zip(dits, _list_released_dits(model), strict=False):
        verdict = _judge_distillation(family, dit)
        if verdict is None or verdict.is_distilled == _seems_distilled(family, released):
            continue
        subject = "the model before it was distilled to few steps"
        if verdict.is_distilled:
            subject = "a model of few steps"
        task = _find_matching_task(family, model, verdict.is_distilled)
        instead = "" if task is None else f"--task {task}, or "
        return (
            f"{dit} seems to be {subject} ({verdict.evidence}), and --task {model.task} is not: "
            f"pass {instead}the file of {model.task}"
        )
    return None


def _find_matching_task(family: Any, model: ModelSet, is_distilled: bool) -> str | None:
    """Return another task of the family whose model is (or is not) distilled; None if there is none."""
    for candidate in find_models():
        if candidate.family != model.family or candidate.task == model.task or needs_image(candidate):
            continue
        if candidate.has_adapter != model.has_adapter:
            continue
        if _seems_distilled(family, _list_released_dits(candidate)[0]) == is_distilled:
            return candidate.task
    return None


def describe_outputs(model: ModelSet, model_info: ModelInfo) -> str:
    """Return what a model generates, such as `clips and sound`."""
    if model_info.trains_on_layers:
        kinds = ["layers"]
    elif model_info.needs_reference:
        kinds = ["edits"]
    else:
        kinds = ["images" if model.properties["frames"] == 1 else "clips"]
        if model_info.max_references:
            kinds.append("edits")
    if model_info.trains_on_audio:
        kinds.append("sound")
    return " and ".join(kinds)


def select_model(
    options: NewOptions, memory: float, reject_before_questions: Callable[[], None]
) -> ModelChoice:
    """Return the model that the options name, and the trigger word; ask for missing ones in a terminal.

    The trigger word is only asked for if the family or the task is asked for, too.

    Args:
        options: The command-line options.
        memory: The GPU memory in GiB.
        reject_before_questions: Called before each question about the model; raises errors that would make
            the answers useless.

    Raises:
        OptionError: If the model is unknown, or if it is not named and there is no terminal to ask on.
    """
    models = find_models()
    if options.family is None:
        reject_before_questions()
        # Ask for the family on a terminal
        families = list_model_families(models)
        if not has_terminal():
            raise OptionError(f"--family is missing: pass one of {', '.join(families)}")

        def read(text: str) -> NamedModel:
            return read_family(_read_table_row(text, families), models)

        table = _make_family_table(models, memory, options.memory is not None)
        named_model = _ask("--family", read, table)
    else:
        named_model = read_family(options.family, models)
        if not options.model_files:
            reject_fine_tune(named_model, options.family, models)
    candidates = _list_candidates(named_model, options.task, models)
    asks_for_task = len(candidates) > 1 and has_terminal()
    if asks_for_task:
        reject_before_questions()
        model = _ask_for_task(options, candidates, memory)
        remarks = []
    else:
        # the first model of the typed task; without a task, the family's only base model
        if options.task is not None or len(candidates) == 1:
            model = candidates[0]
        else:
            base_models = [model for model in candidates if _is_base_model(model)]
            if len(base_models) != 1:
                names = ", ".join(f"{model.task} ({model.about})" for model in candidates)
                raise OptionError(f"--task is missing: pass one of {names}")
            model = base_models[0]
        # a line about the choice, unless the user typed the exact task
        if len(candidates) > 1:
            not_taken = ", ".join(candidate.task for candidate in candidates if candidate is not model)
            remarks = [f"--task {model.task} is taken: {model.about}. Others: {not_taken}"]
        elif options.task is not None and plain_name(options.task) not in (
            {plain_name(model.task), plain_name(_training_task(model))}
        ):
            remarks = [f"--task {options.task}: {model.task} is taken, {model.about}"]
        else:
            remarks = []
    remarks += _describe_smaller_models(model, models, memory)
    trigger = options.trigger_word
    if trigger is None and (asks_for_task or options.family is None):
        question = "--trigger_word (a made-up word for the subject; empty: none)"
        trigger = _ask(question, _read_trigger, "")
    return ModelChoice(model, trigger or None, remarks)


def _describe_smaller_models(model: ModelSet, models: Sequence[ModelSet], memory: float) -> list[str]:
    """Return a line about smaller models if this one does not fit into `memory` GiB on the GPU, else []."""
    smaller = find_smaller(model, models, memory)
    if not smaller:
        return []
    listed = ", ".join(f"--task {other.task} ({other.about})" for other in smaller)
    return [
        f"--task {model.task}: the network has {gigabytes(transformer_bytes(model))}, and a card of "
        f"{memory:.0f} GiB holds a part of it. Smaller: {listed}"
    ]


def _ask_for_task(options: NewOptions, models: Sequence[ModelSet], memory: float) -> ModelSet:
    """Ask the user in a terminal for the task, and return its model."""
    # `memory` is the GPU memory in GiB, for the table of tasks.
    tasks = [model.task for model in models]

    def read(text: str) -> str:
        return _read_tasks(_read_table_row(text, tasks), models)[0].task

    # A text table of tasks: description, download size, and whether they fit the GPU
    is_typed = options.memory is not None
    # `is_typed` says that `memory`, the GPU memory in GiB, comes from the command line.
    rows = []
    for model in models:
        size = gigabytes(total_bytes(model.components))
        rows.append((model.task, model.about, size, describe_fit(model, memory)))
    table = _format_fit_table(("task", "", "download"), rows, memory, is_typed)
    task = _ask("--task", read, table)
    return next(model for model in models if model.task == task)


def _list_candidates(named: NamedModel, typed_task: str | None, models: Sequence[ModelSet]) -> list[ModelSet]:
    """Return the models that match the named family and --task; if several do, the user has to choose."""
    family_models = [model for model in models if model.family == named.family]
    if typed_task is not None:
        tasks = _read_tasks(typed_task, family_models)
        if named.task is not None and named.task not in [model.task for model in tasks]:
            raise OptionError(
                f"--family names {named.family} {named.task}, and --task {typed_task} is {tasks[0].task}. "
                "Omit one of them"
            )
        return tasks
    if named.task is not None:
        return [model for model in family_models if model.task == named.task]
    return family_models


def _is_base_model(model: ModelSet) -> bool:
    """Return whether a model is not distilled to few steps, has no training adapter, and edits no image."""
    if model.has_adapter or needs_image(model):
        return False
    transformer_paths = {
        (component.option or "").lstrip("-"): str(component.path) for component in list_transformers(model)
    }
    return read_model_info(model, transformer_paths).few_step_advice is None


def _ask(question: str, read: Callable[[str], T], table: str) -> T:
    """Show a table, and ask until the answer is valid. Raises OptionError at the end of standard input."""
    while True:
        answer = ask_on_terminal(f"{table}{question}? ")
        if not answer:
            raise OptionError(f"{question.split()[0]} is missing: no answer was given")
        try:
            return read(answer.strip())
        except OptionError as error:
            table = f"{error}\n"


def _read_table_row(text: str, names: Sequence[str]) -> str:
    """If the text is a row number of the printed table, return that row's name, otherwise the text."""
    if text in names or not re.fullmatch(r"[1-9]\d?", text):
        return text
    number = int(text)
    return names[number - 1] if number <= len(names) else text


def _read_trigger(text: str) -> str:
    if text:
        check_trigger(text)
    return text


def _read_tasks(text: str, tasks: Sequence[ModelSet]) -> list[ModelSet]:
    """Return the models of a family whose tasks a typed name may mean."""
    # The name may be a task's name here, its name in the training script, which may stand for several tasks,
    # or a part of the name of only one task.
    matches = [model for model in tasks if is_task_spelling(text, model.task)]
    if not matches and plain_name(text):
        matches = [model for model in tasks if is_task_spelling(text, _training_task(model))]
    if matches:
        return matches
    partial_matches = [model for model in tasks if _is_part_of_task_name(text, model.task)]
    if len(partial_matches) == 1:
        return partial_matches
    raise _make_task_error(text, tasks, partial_matches)


def _is_part_of_task_name(text: str, task: str) -> bool:
    """Return whether a text is part of a task's name; False if their numbers differ (14b, 5b)."""
    normalized = plain_name(text)
    return len(normalized) > 1 and normalized in plain_name(task) and not has_other_number(text, task)


def _make_task_error(
    text: str, tasks: Sequence[ModelSet], partial_matches: Sequence[ModelSet]
) -> OptionError:
    """Return the error for an unknown or ambiguous task, with the families, pages or tasks it may mean."""
    family = tasks[0].family
    names = [model.task for model in tasks]
    # families of this training script, which are easily confused
    models = [model for model in find_models() if _training_script(model) == _training_script(tasks[0])]
    other_families = list(
        dict.fromkeys(model.family for model in models if is_task_spelling(text, model.task))
    )
    if other_families:
        return OptionError(
            f"--task {text} is one of --family {' or '.join(other_families)}; {family} has {', '.join(names)}"
        )
    # the task of a control network, or one that `new` does not set up
    hint = get_control_page_hint(text) or _make_unsupported_task_hint(plain_name(text), family)
    if not hint and partial_matches:
        hint = f" Did you mean {' or '.join(model.task for model in partial_matches)}?"
    if not hint:
        hint = did_you_mean(text, names)
    if all(_is_of_release(text, model) for model in tasks):  # --task 2.3: both av and v
        names = [f"{model.task} ({model.about})" for model in tasks]
        return OptionError(
            f"--task {text}: that is the release of all of them. Choose from {', '.join(names)}"
        )
    return OptionError(f"--task {text}: choose from {', '.join(names)}.{hint}")


def _is_of_release(text: str, model: ModelSet) -> bool:
    """Return whether a text is a number, such as 2.3, that the name of the model's transformer has."""
    names = [part.path.name for part in list_transformers(model)]
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None and any(
        re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.])", name) for name in names
    )


def _training_script(model: ModelSet) -> str:
    return next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))


def _training_task(model: ModelSet) -> str:
    """Return the --task value of a model's training script, which several models share; "" if it has none."""
    words = shlex.split(model.commands["train"])
    return words[words.index("--task") + 1] if "--task" in words else ""


def _make_unsupported_task_hint(plain: str, family: str) -> str:
    """Return a hint to the documentation if `new` does not support the task of this name; otherwise ""."""
    for model in model_sets():
        if model.family == family and plain_name(model.task) == plain:
            return f" {model.task} is not described by `new`: see docs/{family_page(family)}."
    return ""


def _make_family_table(models: Sequence[ModelSet], memory: float, is_typed: bool) -> str:
    """Return a text table of model families: output, download size, and whether they fit the GPU."""
    # `is_typed` says that `memory`, the GPU memory in GiB, comes from the command line.
    rows = []
    for family in list_model_families(models):
        tasks = [model for model in models if model.family == family]
        smallest = min(tasks, key=transformer_bytes)
        sizes = sorted({round(total_bytes(model.components) / 1e9) for model in tasks})
        size = f"{sizes[0]} GB" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} GB"
        kinds = dict.fromkeys(describe_outputs(model, read_model_info(model)) for model in tasks)
        rows.append((family, ", ".join(kinds), size, describe_fit(smallest, memory)))
    return _format_fit_table(("family", "makes", "download"), rows, memory, is_typed)


def _format_fit_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], memory: float, is_typed: bool
) -> str:
    """Return a numbered text table of models; its last column says whether they fit the GPU."""
    # `is_typed` says that `memory`, the GPU memory in GiB, comes from the command line.
    if memory:
        where = f"on {memory:.0f} GiB" if is_typed else f"on this machine ({memory:.0f} GiB)"
        return _format_numbered_table((*head, where), rows)
    machine = "A CPU" if is_typed else "This machine has no NVIDIA card: its CPU"
    return (
        f"{_format_numbered_table(head, [row[:-1] for row in rows])}{machine} trains slowly. "
        "With --memory 12 the table says what fits a card of 12 GiB\n"
    )


def _format_numbered_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    numbered_rows = [(str(number), *row) for number, row in enumerate(rows, start=1)]
    lines = in_columns([("", *head), *numbered_rows])
    return "\n".join([*lines, ""])
