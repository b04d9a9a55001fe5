"""Choose the model for a folder: read its name in any spelling, ask on a terminal, get its family's facts."""

import logging
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dataset.options import read_latent_caching
from downloads.catalogue import Component, ModelSet, family_title
from downloads.listing import gigabytes, in_columns, total_bytes
from modules.command import did_you_mean
from modules.contract.family import hears_sound, knows_few_steps
from modules.errors import OptionError, UserError
from modules.families import with_scripts
from modules.output_files import ask_on_terminal, has_terminal
from project.options import NewOptions, check_trigger, find_models

IN_USE = 2  # GiB of a card that the network itself cannot have: activations, LoRA, optimizer


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model from its family's record."""

    references: int  # most pictures that one is made from; 0: it does not edit
    needs_reference: bool  # it only edits
    hears: bool  # it learns the sound of clips
    few_steps: str | None  # what to train instead, or with; None: it was not distilled to few steps


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
    options = [part.option for part in transformers_of(model)]
    dit = next((Path(files[name]) for one in options if one and (name := one.lstrip("-")) in files), None)
    try:
        hears = hears_sound(family)
    except UserError:  # a family that cannot tell without a file is one that hears
        hears = True
    return ModelFacts(references, needs_picture(model) and references > 0, hears, _few_steps(family, dit))


def needs_picture(model: ModelSet) -> bool:
    """Return whether the model's command to generate edits a picture."""
    return "--control_image_path" in shlex.split(model.commands["generate"])


def script_family(words: Sequence[str]) -> str:
    """Return the family of a command that caches latents. Raises KeyError if it is none."""
    scripts = {f"{entry.cache}_latents.py": name for name, entry in with_scripts().items()}
    return scripts[words[1]]


def _few_steps(family: Any, dit: Path | None) -> str | None:
    if not knows_few_steps(family):
        return None
    try:  # a release that an option names
        why = family.why_few_steps()
    except UserError:  # only its name is known: the file may still have to be downloaded
        why = None if dit is None else family.few_steps.found_in(dit, {})
    return None if why is None else family.few_steps.instead


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
        return "Slow on a CPU"
    if is_small(model, memory):
        return "fits"
    left = transformer_bytes(model) / 2 / 2**30 - max(memory - IN_USE, 0)
    return "fits in 8 bits" if left <= 0 else f"in 8 bits, {left:.0f} GiB in RAM"


def choose_model(options: NewOptions, memory: float) -> tuple[ModelSet, str | None]:
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
        table = _family_table(models, memory)
        named = _ask("--family", lambda text: _read_family(_by_number(text, known), models), table)
    family, task = named
    tasks = [one for one in models if one.family == family]
    names = [one.task for one in tasks]
    if options.task is not None:
        task = _read_task(options.task, tasks)
    elif task is None and len(tasks) == 1:
        task = names[0]
    elif task is None and has_terminal():
        asks, table = True, _task_table(tasks, memory)
        task = _ask("--task", lambda text: _read_task(_by_number(text, names), tasks), table)
    elif task is None:
        raise OptionError(
            "--task is missing: give one of " + ", ".join(f"{one.task} ({one.about})" for one in tasks)
        )
    word = options.trigger_word
    if asks and word is None:
        word = _ask("--trigger_word (a made-up word for what is learned; empty: none)", _read_trigger, "")
    return next(one for one in tasks if one.task == task), word or None


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
    hint = hint or " Others are not described here; those that learn from control clips have pages in docs/."
    raise OptionError(f"--family {text}: choose from {', '.join(known)}.{hint}")


def _read_task(text: str, tasks: Sequence[ModelSet]) -> str:
    """Read the name of a task in any spelling. Raises OptionError."""
    known, plain = [one.task for one in tasks], _plain(text)
    same = [name for name in known if _plain(name) == plain]
    near = same or [name for name in known if len(plain) > 1 and plain in _plain(name)]
    if len(near) == 1:
        return near[0]
    hint = f" Did you mean {' or '.join(near)}?" if near else did_you_mean(text, known)
    raise OptionError(f"--task {text}: choose from {', '.join(known)}.{hint}")


def _family_table(models: Sequence[ModelSet], memory: float) -> str:
    rows = []
    for name in dict.fromkeys(one.family for one in models):
        tasks = [one for one in models if one.family == name]
        smallest = min(tasks, key=transformer_bytes)
        sizes = sorted({round(total_bytes(one.components) / 1e9) for one in tasks})
        size = f"{sizes[0]} GB" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} GB"
        makes = dict.fromkeys(describe_makes(one, ask_family(one)) for one in tasks)
        rows.append((name, ", ".join(makes), size, describe_fit(smallest, memory)))
    return _numbered(("family", "makes", "download", f"--memory {memory:.0f}"), rows)


def _task_table(tasks: Sequence[ModelSet], memory: float) -> str:
    rows = [
        (one.task, one.about, gigabytes(total_bytes(one.components)), describe_fit(one, memory))
        for one in tasks
    ]
    return _numbered(("task", "", "download", f"--memory {memory:.0f}"), rows)


def _numbered(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = in_columns([("", *head), *((str(number), *row) for number, row in enumerate(rows, 1))])
    return "\n".join([*lines, ""])
