"""Choose the model for a folder: read its name in any spelling, ask on a terminal, get its family's facts."""

import argparse
import contextlib
import itertools
import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dataset.options import read_latent_caching
from downloads.catalogue import Component, ModelSet, family_page, family_title, model_sets
from downloads.listing import gigabytes, in_columns, total_bytes
from modules.command import did_you_mean
from modules.contract.family import hears_sound, knows_few_steps
from modules.errors import OptionError, UserError
from modules.families import with_scripts
from modules.options import read_options
from modules.output_files import ask_on_terminal, has_terminal
from modules.parser import add_options
from modules.speed_options import take_ae
from modules.text_files import read_safetensors_texts
from project.options import NewOptions, check_trigger, find_models
from training.image_options import ImageModelOptions
from training.options import training_parser

SLOW = "Slow on a CPU"
IN_USE = 2  # GiB of a card that the network itself cannot have: activations, LoRA, optimizer


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model from its family's record."""

    references: int  # most pictures that one is made from; 0: it does not edit
    needs_reference: bool  # it only edits
    hears: bool  # it learns the sound of clips
    learns_clips: bool  # False: it learns pictures alone
    learns_sounds: bool  # it also learns sounds without clips
    few_steps: str | None  # what to train instead, or with; None: it was not distilled to few steps
    contradiction: str | None  # how the name of its file contradicts the task
    family: Any  # the record, of a run that caches latents


@dataclass(frozen=True)
class ModelChoice:
    """The model to train, as options and answers name it."""

    model: ModelSet
    trigger: str | None
    remarks: list[str]  # about what was chosen without being asked for


def ask_family(model: ModelSet, files: Mapping[str, str] = MappingProxyType({})) -> ModelFacts:
    """Return the facts of a model; imports its family. files: its files by option; they need not exist."""
    words = shlex.split(model.commands["latents"])
    name = script_family(words)
    entry = with_scripts()[name]
    for _, option, _ in entry.encoders:  # the facts here need no encoder
        place = words.index(option) if option in words else len(words)
        del words[place : place + 2]
    _, _, own = read_latent_caching(None, entry.options_record("LatentCaching"), words[2:])
    logging.disable(logging.INFO)  # it logs about files that are not given
    try:
        family = entry.make_family("latent_caching", own)
    finally:
        logging.disable(logging.NOTSET)
    references = 0 if family.references is None or family.references.clips else family.references.most
    options = [part.option.lstrip("-") for part in transformers_of(model) if part.option]
    dits = [Path(files[name]) for name in options if name in files]
    try:
        hears = hears_sound(family)
    except UserError:  # a family that cannot tell without a file is one that hears
        hears = True
    return ModelFacts(
        references=references,
        needs_reference=needs_picture(model) and references > 0,
        hears=hears,
        learns_clips=model.data["frames"] > 1,
        learns_sounds="sound_alone" in model.data,
        few_steps=_few_steps(family, model, dits),
        contradiction=_contradiction(family, model, dits),
        family=family,
    )


def check_model_files(model: ModelSet, given: Mapping[str, str]) -> None:
    """Check files of a model that were named, by option, as the training script does.

    Raises OptionError or CheckpointError if one is another kind of file than its option takes.
    """
    if not given:
        return
    entry = with_scripts()[script_family(shlex.split(model.commands["latents"]))]
    record = entry.options_record("Training")
    parser = training_parser(None)
    shared = _names_of(parser)  # how it is trained, which says nothing of its files
    add_options(parser, record)
    of_pictures = {"pretrained_model_name_or_path", "vae"}
    add_options(parser, ImageModelOptions, without=of_pictures & _names_of(parser))
    known = _names_of(parser)
    words = _known_words(shlex.split(model.commands["train"]), known - shared, given)
    words += [word for name, path in given.items() if name in known for word in (f"--{name}", path)]
    args = parser.parse_args(words)
    if "ae" in known:
        take_ae(args)
    logging.disable(logging.INFO)
    try:
        entry.make_family("training", read_options(record, args)).check_given_files()
    finally:
        logging.disable(logging.NOTSET)


def _names_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}


def _known_words(words: Sequence[str], known: Collection[str], given: Mapping[str, str]) -> list[str]:
    """Return those options of a command that are known, with their values, and with the files given."""
    found: list[str] = []
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        values = [given.get(word.strip("{}"), word) for word in words[start + 1 : end]]
        is_missing = any(value.startswith("{") for value in values)
        if words[start].lstrip("-") in known and not is_missing:
            found += [words[start], *values]
    return found


def needs_picture(model: ModelSet) -> bool:
    """Return whether the model's command to generate edits a picture."""
    return "--control_image_path" in shlex.split(model.commands["generate"])


def script_family(words: Sequence[str]) -> str:
    """Return the family of a command that caches latents. Raises KeyError if it is none."""
    scripts = {f"{entry.cache}_latents.py": name for name, entry in with_scripts().items()}
    return scripts[words[1]]


def _few_steps(family: Any, model: ModelSet, dits: Sequence[Path]) -> str | None:
    if not knows_few_steps(family):
        return None
    why = None
    with contextlib.suppress(UserError):  # only names are known: files may still have to be downloaded
        why = family.why_few_steps()  # a release that an option names
    for dit, released in zip(dits, _released_names(model), strict=False):
        told = _told_few_steps(family, dit) or _told_few_steps(family, released)
        if told is not None and told[0]:
            why = told[1]
    return None if why is None else family.few_steps.instead


def _released_names(model: ModelSet) -> list[Path]:
    return [Path(part.path) for part in transformers_of(model) if part.option]


def _told_few_steps(family: Any, dit: Path) -> tuple[bool, str] | None:
    """Return whether a transformer was distilled to few steps by its name or metadata; None: neither says."""
    metadata: Mapping[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        metadata = read_safetensors_texts(dit)
    told: tuple[bool, str] | None = family.few_steps.told_by(dit, metadata)
    return told


def _contradiction(family: Any, model: ModelSet, dits: Sequence[Path]) -> str | None:
    """Return how the name of a file contradicts the task that it is given for; None if it does not."""
    if not knows_few_steps(family):
        return None
    for dit, usual in zip(dits, _released_names(model), strict=False):
        told = _told_few_steps(family, dit)
        is_few = (_told_few_steps(family, usual) or (False,))[0]
        if told is None or told[0] == is_few:
            continue
        what = "a model of few steps" if told[0] else "the model before it was distilled to few steps"
        others = [
            one.task
            for one in find_models()
            if one.family == model.family
            and one.task != model.task
            and not needs_picture(one)
            and (_told_few_steps(family, _released_names(one)[0]) or (False,))[0] == told[0]
        ]
        instead = f"give --task {others[0]}" if others else "give another --task"
        return (
            f"{dit} seems to be {what} ({told[1]}), and --task {model.task} is not: {instead}, or the file "
            f"of {model.task}"
        )
    return None


def describe_makes(model: ModelSet, facts: ModelFacts) -> str:
    made = ["edits"] if facts.needs_reference else ["pictures" if model.data["frames"] == 1 else "clips"]
    made += ["edits"] if facts.references and not facts.needs_reference else []
    return " and ".join([*made, *(["sound"] if facts.hears else [])])


def transformer_bytes(model: ModelSet) -> int:
    return sum(part.size_bytes or 0 for part in transformers_of(model))


def transformers_of(model: ModelSet) -> list[Component]:
    return [part for part in model.components if part.role.startswith("transformer")]


def is_small(model: ModelSet, memory: float) -> bool:
    """Return whether the released transformer leaves half of a card of `memory` GiB free."""
    return transformer_bytes(model) <= memory / 2 * 2**30


def describe_fit(model: ModelSet, memory: float) -> str:
    """Return whether a model can be trained on a card of `memory` GiB, by the size of its transformer."""
    if not memory:
        return SLOW
    if is_small(model, memory):
        return "fits"
    left = transformer_bytes(model) / 2 / 2**30 - max(memory - IN_USE, 0)
    return "fits in 8 bits" if left <= 0 else f"in 8 bits, {left:.0f} GiB in RAM"


def choose_model(options: NewOptions, memory: float) -> ModelChoice:
    """Return the named model and the trigger word; ask for missing ones on a terminal.

    memory: GiB of the card. Raises OptionError if the model is unknown, or nobody can be asked.
    """
    models = find_models()
    asks = options.family is None and has_terminal()
    named = None if options.family is None else _read_family(options.family, models)
    if named is None:
        known = list(dict.fromkeys(one.family for one in models))
        if not asks:
            raise OptionError(f"--family is missing: give one of {', '.join(known)}")
        table = _family_table(models, memory, options.memory is not None)
        named = _ask("--family", lambda text: _read_family(_by_number(text, known), models), table)
    family, task = named
    tasks = [one for one in models if one.family == family]
    remarks: list[str] = []
    if options.task is not None:
        tasks = _read_tasks(options.task, tasks)
    elif task is not None:
        tasks = [one for one in tasks if one.task == task]
    if len(tasks) > 1 and has_terminal():
        asks, names = True, [one.task for one in tasks]
        table = _task_table(tasks, memory, options.memory is not None)
        task = _ask("--task", lambda text: _read_tasks(_by_number(text, names), tasks)[0].task, table)
        tasks = [one for one in tasks if one.task == task]
    elif len(tasks) > 1:
        chosen = _choose_task(options.task, tasks)
        others = ", ".join(one.task for one in tasks if one is not chosen)
        remarks.append(f"--task {chosen.task} is taken: {chosen.about}. Others: {others}")
        tasks = [chosen]
    word = options.trigger_word
    if asks and word is None:
        word = _ask("--trigger_word (a made-up word for what is learned; empty: none)", _read_trigger, "")
    return ModelChoice(tasks[0], word or None, remarks)


def _choose_task(text: str | None, tasks: Sequence[ModelSet]) -> ModelSet:
    """Return the task to take if nobody can be asked. Raises OptionError if several are as good.

    text: what was given as --task, which fits all of `tasks`; None: nothing.
    """
    if text is not None:
        return tasks[0]
    to_train = []
    for one in tasks:
        paths = {(part.option or "").lstrip("-"): str(part.path) for part in transformers_of(one)}
        if not needs_picture(one) and ask_family(one, paths).few_steps is None:
            to_train.append(one)
    if len(to_train) != 1:
        names = ", ".join(f"{one.task} ({one.about})" for one in tasks)
        raise OptionError(f"--task is missing: give one of {names}")
    return to_train[0]


def _ask(question: str, read: Callable[[str], Any], table: str) -> Any:
    """Show a table and ask until the answer can be read. Raises OptionError at the end of the input."""
    while True:
        said = ask_on_terminal(f"{table}{question}? ")
        if not said:
            raise OptionError(f"{question.split()[0]} is missing: no answer was given")
        try:
            return read(said.strip())
        except OptionError as error:
            table = f"{error}\n"


def _by_number(text: str, known: Sequence[str]) -> str:
    number = int(text) if re.fullmatch(r"[1-9]\d?", text) and text not in known else 0
    return known[number - 1] if 0 < number <= len(known) else text


def _read_trigger(text: str) -> str:
    if text:
        check_trigger(text)
    return text


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _read_family(text: str, models: Sequence[ModelSet]) -> tuple[str, str | None]:
    """Read the name of a family, and of a task if one is given, in any spelling. Raises OptionError."""
    known = list(dict.fromkeys(one.family for one in models))
    spelled = {_plain(entry.script): name for name, entry in with_scripts().items() if name in known}
    spelled |= {_plain(title): name for name in known if (title := family_title(name))}
    spelled |= {_plain(name): name for name in known}
    plain = _plain(text)
    if plain in spelled:
        return spelled[plain], None
    for one in models:
        if plain in {_plain(name + one.task) for name, family in spelled.items() if family == one.family}:
            return one.family, one.task
    released = [one for one in models if plain in map(_plain, (one.released_by, Path(one.released_by).name))]
    if released:  # by the name of its repository; the catalogue has what most want first
        return released[0].family, released[0].task
    near = list(dict.fromkeys(name for each, name in spelled.items() if len(plain) > 1 and plain in each))
    if not near and len(plain) > 2:
        same = [(one.family, one.task) for one in models if plain in _plain(one.task)]
        if len(same) == 1:
            return same[0]
        near = list(dict.fromkeys(family for family, _ in same))
    if len(near) == 1:
        return near[0], None
    hint = f" Did you mean {' or '.join(near)}?" if near else did_you_mean(text.lower(), known)
    hint = _page_of_control(text) or hint
    hint = hint or " Others are not described here; those that learn from control clips have pages in docs/."
    raise OptionError(f"--family {text}: choose from {', '.join(known)}.{hint}")


def _read_tasks(text: str, tasks: Sequence[ModelSet]) -> list[ModelSet]:
    """Read the name of a task in any spelling; several if the training's own name stands for all of them.

    Raises OptionError if there is none, or if it is not clear.
    """
    known, plain = [one.task for one in tasks], _plain(text)
    same = [one for one in tasks if _plain(one.task) == plain]
    same = same or [one for one in tasks if _plain(_training_task(one)) == plain and plain]
    near = [one for one in tasks if len(plain) > 1 and plain in _plain(one.task)]
    if same or len(near) == 1:
        return same or near
    hint = did_you_mean(text, known)
    if near:
        hint = f" Did you mean {' or '.join(one.task for one in near)}?"
    page = _page_of_control(text)
    raise OptionError(f"--task {text}: choose from {', '.join(known)}.{page or hint}")


def _training_task(model: ModelSet) -> str:
    """Return the --task of a model's training script, which several sets may share; "" if it has none."""
    words = shlex.split(model.commands["train"])
    return words[words.index("--task") + 1] if "--task" in words else ""


def _page_of_control(text: str) -> str:
    """Return which page describes a model that learns from control clips; "" if the text names none."""
    plain = _plain(text)
    for one in model_sets():
        names = {_plain(name) for name in (one.family, one.task, family_title(one.family))}
        if one.data.get("control") and (plain in names or (len(plain) > 2 and plain in _plain(one.task))):
            return (
                f" {family_title(one.family)} {one.task} learns from control clips, which `new` does not "
                f"describe: see docs/{family_page(one.family)}."
            )
    return ""


def _family_table(models: Sequence[ModelSet], memory: float, is_given: bool) -> str:
    rows = []
    for name in dict.fromkeys(one.family for one in models):
        tasks = [one for one in models if one.family == name]
        smallest = min(tasks, key=transformer_bytes)
        sizes = sorted({round(total_bytes(one.components) / 1e9) for one in tasks})
        size = f"{sizes[0]} GB" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} GB"
        makes = dict.fromkeys(describe_makes(one, ask_family(one)) for one in tasks)
        rows.append((name, ", ".join(makes), size, describe_fit(smallest, memory)))
    return _table_of_fits(("family", "makes", "download"), rows, memory, is_given)


def _task_table(tasks: Sequence[ModelSet], memory: float, is_given: bool) -> str:
    rows = [
        (one.task, one.about, gigabytes(total_bytes(one.components)), describe_fit(one, memory))
        for one in tasks
    ]
    return _table_of_fits(("task", "", "download"), rows, memory, is_given)


def _table_of_fits(head: Sequence[str], rows: Sequence[Sequence[str]], memory: float, is_given: bool) -> str:
    """Return a numbered table whose last column says what fits the card, and a line below it for a CPU."""
    if memory:
        where = f"on {memory:.0f} GiB" if is_given else f"on this machine ({memory:.0f} GiB)"
        return _numbered((*head, where), rows)
    machine = "A CPU" if is_given else "This machine has no NVIDIA card: its CPU"
    return (
        f"{_numbered(head, [row[:-1] for row in rows])}{machine} trains slowly. With --memory 12 the table "
        "says what fits a card of 12 GiB\n"
    )


def _numbered(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = in_columns([("", *head), *((str(number), *row) for number, row in enumerate(rows, 1))])
    return "\n".join([*lines, ""])
