"""The samples of a training on the page New: prompt lines of prompts.txt as rows, and how often to sample.

A row shows some options of its line. Only what was changed in a row is changed in its line; other options,
other lines and comments stay as they are written.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.responses import Response

from browser.described_folder import PROMPTS_FILE, ChangedMeanwhileError, DraftFile, edit_toml, read_described
from browser.draft_changes import (
    DraftChange,
    describe_difference,
    plan_change,
    read_draft_file,
    read_keys,
    require_full,
    save_change,
)
from browser.folders import is_written
from browser.new_form import MAX_STEPS, find_model, parse_integer
from browser.recipes import ModelRecipe, is_driven, make_model_recipe
from browser.responses import answer_template, answer_unknown
from browser.sample_sizes import describe_changed_sizes, note_sizes
from browser.server_state import Site
from downloads.catalogue import ModelSet
from generation.prompt_lines import SplitLine, is_blank, split_line, unquote
from generation.sample_lines import find_sample_option
from modules.control_codes import shorten
from modules.errors import OptionError, UserError
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.pages.language import say
from modules.paths import complete_home
from project.model_sizes import needs_image
from project.options import RUN_FILE

MIN_ROWS = 3
MAX_ROWS = 100
MAX_IMAGES = 2000
DEEPEST = 3  # maximum depth of subfolders that are searched for images
EVERY = "sample_every_n_steps"  # keys of run.toml
EVERY_EPOCHS = "sample_every_n_epochs"
AT_FIRST = "sample_at_first"
PROMPTS = "sample_prompts"
# form field of a row -> key of the option, and its letters in a new prompt-line option
FIELDS = {
    "width": ("width", "w"),
    "height": ("height", "h"),
    "frames": ("frame_count", "f"),
    "seed": ("seed", "d"),
    "steps": ("sample_steps", "s"),
    "guidance": ("cfg_scale", "l"),
    "embedded guidance": ("guidance_scale", "g"),
    "negative": ("negative_prompt", "n"),
    "start": ("image_path", "i"),
    "end": ("end_image_path", "ei"),
    "source": ("control_image_path", "ci"),
    "control": ("control_video_path", "cn"),
}
DEFAULT = {"width": "512", "height": "512", "frames": "81", "steps": "20"}
INTEGER_FIELDS = tuple(DEFAULT)  # fields for positive integers
MAX_NUMBER = 1_000_000
SCALES = ("guidance", "embedded guidance")  # fields of any number
NUMBER = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,6})?")
IMAGES = ("start", "end", "source", "control")
TEXTS = ("negative",)
OF_NUMBERS = ("width", "height", "frames", "seed", "steps", "guidance", "embedded guidance")
OF_ALL_MODELS = {"width", "height", "seed", "steps"}


@dataclass(frozen=True)
class PromptRow:
    """A line of prompts.txt as a row of the form; `more` holds the options that have no field."""

    line: int | None  # index of the line in the file; None: a new one
    prompt: str
    texts: Mapping[str, str]  # by the name of the field
    more: str = ""


def _split(line: str) -> SplitLine:
    """Split a line. A line with two prompts, which a training rejects, is shown as one text."""
    try:
        return split_line(line)
    except OptionError:
        return SplitLine(line, [])


def _find_key(part: str) -> str:
    """Return the key of an option in a line; "" if it is unknown."""
    option = find_sample_option(part.partition(" ")[0])
    return "" if option is None else option.key


def _repeats(part: str) -> bool:
    """Return whether each use of an option adds to a list, such as `--ci` for several pictures."""
    option = find_sample_option(part.partition(" ")[0])
    return option is not None and option.repeats


def read_row(number: int, line: str) -> PromptRow:
    """Return the row of a line. If the line has an option twice, the field shows the last one."""
    split = _split(line)
    fields = {key: name for name, (key, _) in FIELDS.items()}
    texts: dict[str, str] = {}
    more = []
    last_parts = {fields.get(_find_key(part)): index for index, part in enumerate(split.options)}
    for index, part in enumerate(split.options):
        name = fields.get(_find_key(part))
        if name is None or (_repeats(part) and last_parts[name] != index):
            more.append(f"--{part.strip()}")
        else:
            texts[name] = unquote(part.partition(" ")[2].strip())
    return PromptRow(number, split.prompt.strip(), texts, " ".join(more))


def read_rows(text: str) -> list[PromptRow]:
    """Return the rows of a prompts.txt, without comments and blank lines."""
    lines = text.split("\n")
    return [read_row(number, line) for number, line in enumerate(lines) if not is_blank(line)]


def edit_line(line: str, prompt: str | None, changes: Mapping[str, str]) -> str:
    """Return a prompt line such as `A cat --w 768` with another prompt and other options.

    Args:
        line: The present line.
        prompt: New prompt; None to keep it.
        changes: New texts by the names of the fields; an empty text removes the option.
    """
    split = _split(line)
    parts = split.options  # options with values, such as `w 768`
    for name, text in changes.items():
        key, characters = FIELDS[name]
        indices = [index for index, part in enumerate(parts) if _find_key(part) == key]
        if text and indices:  # the field shows the last use of an option
            word = parts[indices[-1]].partition(" ")[0]
            parts[indices[-1]] = f"{word} {text}"
        elif text:
            parts.append(f"{characters} {text}")
        else:
            # an option may occur several times, such as --ci: remove only the occurrence that the field shows
            is_list = any(_repeats(parts[index]) for index in indices)
            removed = indices[-1:] if is_list else indices
            parts = [part for index, part in enumerate(parts) if index not in removed]
    return " --".join([split.prompt if prompt is None else prompt, *parts])


def edit_prompts(text: str, fields: Mapping[str, str], check_image: Any) -> str:
    """Return the text of prompts.txt with the edits from its rows applied.

    An emptied prompt removes its line; a new row is added at the end.

    Args:
        text: Current content of prompts.txt.
        fields: Fields of the form, such as `width 2` for the second row.
        check_image: Raises OptionError for a path that is not an image.

    Raises:
        OptionError: If a row is not a valid line.
    """
    lines: list[str | None] = [*text.split("\n")]  # None: the line is removed
    added = []
    for edit in _read_edits(text, fields):
        _check_edit(edit, check_image)
        if edit.row.line is None:  # a row that is not in the file yet
            if edit.prompt:
                added.append(edit_line(edit.prompt, None, edit.changes))
        elif edit.is_emptied:
            lines[edit.row.line] = None
        else:
            lines[edit.row.line] = edit.apply(lines[edit.row.line] or "")
    remaining = "\n".join(line for line in lines if line is not None)
    if not added:
        return remaining
    gap = "" if not remaining or remaining.endswith("\n") else "\n"  # a last line without a line break
    return remaining + gap + "\n".join(added) + "\n"


@dataclass(frozen=True)
class _RowEdit:
    """Changes that a user made in a row of the form."""

    number: int  # index of the row on the page
    row: PromptRow  # the row before the edit
    prompt: str
    changes: Mapping[str, str]  # texts by the name of the field

    @property
    def is_emptied(self) -> bool:
        return self.row.prompt != "" and not self.prompt

    def apply(self, line: str) -> str:
        """Return the row's line with the user's changes applied."""
        return edit_line(line, None if self.prompt == self.row.prompt else self.prompt, self.changes)


def _read_edits(text: str, fields: Mapping[str, str]) -> list[_RowEdit]:
    """Return what the user has changed in each row of the form. `text` is the content of prompts.txt."""
    rows = {str(row.line): row for row in read_rows(text)}
    edits = []
    for number in range(1, MAX_ROWS + 1):
        if f"row {number}" in fields:
            row = rows.get(fields.get(f"line {number}", ""), PromptRow(None, "", {}))
            prompt = fields.get(f"prompt {number}", "").replace("\n", " ").strip()
            edits.append(_RowEdit(number, row, prompt, _read_changes(number, row, fields)))
    return edits


def _read_changes(number: int, row: PromptRow, fields: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of a row's fields that differ from its line, by the name of the field."""
    changes = {}
    for name in FIELDS:
        typed = fields.get(f"{name} {number}", "").strip()
        if f"has {name}" in fields and typed != row.texts.get(name, ""):
            changes[name] = typed
    return changes


def _check_edit(edit: _RowEdit, check_image: Any) -> None:
    """Raise OptionError if a row does not make a valid line."""
    title = say("Sample %(number)s", number=edit.number)
    if edit.prompt.startswith("#") and edit.prompt != edit.row.prompt:
        raise OptionError(
            say("%(title)s: a line that begins with # is a comment. Begin with another letter.", title=title)
        )
    if edit.changes and not edit.prompt and edit.row.line is None:
        raise OptionError(say("%(title)s: write its prompt.", title=title))
    for name, text in edit.changes.items():
        if name in INTEGER_FIELDS and text and parse_integer(text, MAX_NUMBER) is None:
            raise OptionError(
                say(
                    "%(title)s %(name)s: %(text)s is no whole number above 0, such as %(usual)s.",
                    title=title,
                    name=name,
                    text=shorten(text, 40),
                    usual=DEFAULT[name],
                )
            )
        if name in SCALES and text and not NUMBER.fullmatch(text):
            raise OptionError(
                say(
                    "%(title)s %(name)s: %(text)s is no number, such as 4 or 3.5.",
                    title=title,
                    name=name,
                    text=shorten(text, 40),
                )
            )
        # dashes would begin another option of the prompt line
        if " --" in f" {text}":
            raise OptionError(
                say("%(title)s %(name)s: %(text)s: leave out the dashes.", title=title, name=name, text=text)
            )
        if name in IMAGES and text:
            check_image(text)


def edit_times(text: str, fields: Mapping[str, str]) -> str:
    """Return run.toml with the sampling intervals of a form. Raises OptionError, ValueError."""
    keys = read_keys(text)
    changes: dict[str, Any] = {}
    typed_interval = fields.get("every", "").strip()
    if typed_interval != str(keys.get(EVERY, "")):
        number = parse_integer(typed_interval, MAX_STEPS)
        if typed_interval and number is None:
            raise OptionError(
                say(
                    "Made after every: %(every)s is no whole number above 0, such as 200.",
                    every=shorten(typed_interval, 40),
                )
            )
        changes[EVERY] = number  # None removes the key
    is_first = "first" in fields
    if is_first != bool(keys.get(AT_FIRST)):
        changes[AT_FIRST] = is_first or None
    if any(changes.values()) and PROMPTS not in keys:  # a training samples only with a prompt file
        changes[PROMPTS] = PROMPTS_FILE
    return edit_toml(text, changes)


class SamplePages:
    """Shows the samples of a described folder, and saves them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, folder: Path, query: Mapping[str, str]) -> Response:
        """Return the HTML of the sample section; `rows` of the query is the minimum number of rows."""
        number = query.get("rows", "0")
        return self.answer(folder, num_rows=int(number) if re.fullmatch(r"[0-9]{1,3}", number) else 0)

    def read_drafts(self, folder: Path) -> tuple[DraftFile, DraftFile]:
        """Read prompts.txt and run.toml. Raises OptionError if the run's prompts are in another file."""
        run = read_draft_file(self.site, folder, RUN_FILE)
        name = str(read_keys(run.text).get(PROMPTS, PROMPTS_FILE))
        if name != PROMPTS_FILE:
            raise OptionError(
                say(
                    "The prompts are in %(name)s (%(prompts)s of %(run_file)s), which is edited "
                    'elsewhere. With %(prompts)s = "%(prompts_file)s" they are edited here.',
                    name=name,
                    prompts=PROMPTS,
                    run_file=RUN_FILE,
                    prompts_file=PROMPTS_FILE,
                )
            )
        return read_draft_file(self.site, folder, PROMPTS_FILE), run

    def answer(
        self,
        folder: Path,
        change: DraftChange | None = None,
        num_rows: int = 0,
        is_rejected: bool = False,
        typed: Mapping[str, str] | None = None,
    ) -> Response:
        """Return the HTML of the sample section.

        Args:
            folder: The described folder.
            change: What a form would save; None without a form.
            num_rows: Minimum number of rows to show.
            is_rejected: Whether the page reports an error.
            typed: Fields of the form that are not saved; None if the form shows the files.
        """
        values: dict[str, Any] = {"folder": folder, "change": change or DraftChange(part=""), "problem": ""}
        try:
            values |= self.collect_values(folder, num_rows)
            if typed is not None:
                described = read_described(folder)
                recipe = find_recipe(find_model(described.family, described.task))
                values["notes"] = note_sizes(read_typed_texts(typed), recipe)
        except (OSError, ValueError, UserError) as error:
            values["problem"] = str(error)
        return answer_template("sample_rows.html", say("Samples"), values, is_rejected)

    def collect_values(self, folder: Path, num_rows: int) -> dict[str, Any]:
        """Return the template values. Raises OSError, ValueError or OptionError if a file is invalid."""
        prompts, run = self.read_drafts(folder)
        described = read_described(folder)
        keys = read_keys(run.text)
        model = find_model(described.family, described.task)
        return {
            "prompts": prompts,
            "run": run,
            **describe_rows(read_rows(prompts.text), model, folder, num_rows),
            "every": str(keys.get(EVERY, "")),
            "every_epochs": str(keys.get(EVERY_EPOCHS, "")),
            "at_first": bool(keys.get(AT_FIRST)),
            "can_write": not self.site.read_only,
        }

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Preview or save the changes of the sample form."""
        if action not in ("look", "save"):
            return answer_unknown()
        try:
            require_full(fields)
            prompts, run = self.read_drafts(folder)
            # the form sends the checksums that both files had when the form was built
            if prompts.mark != fields.get("have", "") or run.mark != fields.get("have run", ""):
                raise ChangedMeanwhileError
            prompts_after = edit_prompts(
                prompts.text, fields, lambda text: check_image(self.site, folder, text)
            )
            texts = {prompts: prompts_after, run: edit_times(run.text, fields)}
            change = plan_change(self.site, "samples", texts, run)
            if action == "save":
                change = save_change(change, texts)
            # changed sizes are reported at their fields, not in the note
            sizes = describe_changed_sizes(prompts_after, folder)
            change = replace(change, note=change.note.removeprefix(sizes).strip())
        except ChangedMeanwhileError:
            change = DraftChange(part="samples", fault=describe_conflict(folder, fields))
        except (OSError, ValueError, UserError) as error:
            change = DraftChange(part="samples", fault=str(error))
        is_rejected = action == "save" and change.fault != ""
        is_open = is_rejected or action == "look"
        # a field `row N` for each prompt of the form
        num_rows = sum(name.startswith("row ") for name in fields) if is_open else 0
        return self.answer(folder, change, num_rows, is_rejected, fields if is_open else None)


def check_image(site: Site, folder: Path, text: str) -> None:
    """Raise OptionError if a path, relative to a folder, is not an image or clip below the roots."""
    path = folder / text
    is_media = Path(text).suffix.lower() in {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}
    if "\0" in text or not is_media or not site.runs.is_inside(path):
        raise OptionError(say("%(text)s: there is no such picture in %(folder)s", text=text, folder=folder))


def read_typed_texts(fields: Mapping[str, str]) -> dict[int, dict[str, str]]:
    """Return the texts in the fields of each row of a form, by the number of the row."""
    rows: dict[int, dict[str, str]] = {}
    for number in range(1, MAX_ROWS + 1):
        if f"row {number}" in fields:
            texts = {name: fields.get(f"{name} {number}", "").strip() for name in FIELDS}
            rows[number] = texts | {name: complete_home(texts[name]) for name in IMAGES}
    return rows


def read_typed_rows(text: str, fields: Mapping[str, str]) -> list[PromptRow]:
    """Return the rows with the values typed into a form. `text` is the content of the prompt file."""
    rows = []
    typed = read_typed_texts(fields)
    for edit in _read_edits(text, fields):
        rows.append(PromptRow(edit.row.line, edit.prompt, typed[edit.number], edit.row.more))
    return rows


def find_recipe(model: ModelSet | None) -> ModelRecipe | None:
    """Return the recipe of a model; None if the page cannot generate with it."""
    return make_model_recipe(model, Path(), Path()) if model is not None and is_driven(model) else None


def has_layers(recipe: ModelRecipe | None) -> bool:
    """Return whether a sample's number of frames is its number of layers."""
    return recipe is not None and "layers" in recipe.fields


def select_text_fields(recipe: ModelRecipe | None, rows: Sequence[PromptRow]) -> list[str]:
    """Return the text fields that the model uses, or that a line of the prompt file fills."""
    used = set() if recipe is None else {*recipe.fields}
    return [name for name in TEXTS if name in used or any(name in row.texts for row in rows)]


def describe_rows(
    rows: Sequence[PromptRow], model: ModelSet | None, folder: Path, num_rows: int
) -> dict[str, Any]:
    """Return the values for the template of the rows of samples, and of their fields.

    Args:
        rows: Rows of the prompt file; at most `MAX_ROWS` are shown.
        model: The model that makes the samples; None if the catalogue does not have it.
        folder: Folder in which relative paths begin.
        num_rows: Minimum number of rows to show.
    """
    count = min(max(MIN_ROWS, len(rows), num_rows), MAX_ROWS)
    filled = list(rows[:MAX_ROWS])
    blank = PromptRow(None, "", {})
    recipe = find_recipe(model)
    image_fields = select_image_fields(model, recipe, filled)
    return {
        "rows": [*filled, *[blank] * (count - len(filled))],
        "next_count": count + 1,
        "number_fields": select_number_fields(model, recipe, filled),
        "text_fields": select_text_fields(recipe, filled),
        "picture_fields": image_fields,
        "has_layers": has_layers(recipe),
        "notes": note_sizes({number: row.texts for number, row in enumerate(filled, 1)}, recipe),
        "pictures": list_images(folder) if image_fields else [],
    }


def select_number_fields(
    model: ModelSet | None, recipe: ModelRecipe | None, rows: Sequence[PromptRow]
) -> list[str]:
    """Return the number fields to show: those that the model uses, and those that a row fills."""
    fields = {name for row in rows for name in OF_NUMBERS if name in row.texts}
    if model is None:
        return [name for name in OF_NUMBERS if name in OF_ALL_MODELS | fields]
    if has_layers(recipe):
        fields.add("frames")  # for this model, the number of layers
    elif model.properties["frames"] == 1 and all(row.texts.get("frames", "1") == "1" for row in rows):
        fields.discard("frames")  # an image model, whose rows have no other length
    elif model.properties["frames"] > 1:
        fields.add("frames")
    has_embedded = recipe is not None and recipe.keys.get("guidance") == "embedded_cfg_scale"
    fields.add("embedded guidance" if has_embedded else "guidance")
    return [name for name in OF_NUMBERS if name in OF_ALL_MODELS | fields]


def select_image_fields(
    model: ModelSet | None, recipe: ModelRecipe | None, rows: Sequence[PromptRow]
) -> list[str]:
    """Return the image fields that the model uses, or that a line of the prompt file fills."""
    fields = {name for row in rows for name in IMAGES if name in row.texts}
    if recipe is not None:
        fields |= {"end", "control"} & {*recipe.fields}
    if model is not None and model.properties.get("from_image"):
        fields.add("start")
    if model is not None and needs_image(model):
        fields.add("source")
    return [name for name in IMAGES if name in fields]


def describe_conflict(folder: Path, fields: Mapping[str, str]) -> str:
    """Return the message that files changed while the form was open, with the typed changes."""
    base = fields.get("base", "")  # text of the prompts that the form was made from
    try:
        edited = edit_prompts(base, fields, lambda text: None)  # only to compare: accepts every image path
        typed = describe_difference(base, edited)
    except OptionError as error:
        typed = [str(error)]
    return say(
        "%(prompts_file)s or %(run_file)s has changed meanwhile, and nothing was "
        "overwritten. The rows show what it has now. What you changed: %(names)s",
        prompts_file=PROMPTS_FILE,
        run_file=RUN_FILE,
        # no prompt line differs: what was changed is the other field, how often samples are made
        names="; ".join(typed) or "how often",
    )


def list_images(folder: Path) -> list[str]:
    """Return the images of a folder and its subfolders as relative paths; at most MAX_IMAGES."""
    images: list[str] = []
    waiting = [(folder, 0)]
    while waiting and len(images) < MAX_IMAGES:
        subfolder, depth = waiting.pop(0)
        try:
            entries = sorted(os.scandir(subfolder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth < DEEPEST and not is_written(entry.name):
                    waiting.append((subfolder / entry.name, depth + 1))
                continue
            # in a prompt line, two dashes after a blank begin an option
            fits_in_line = re.search(r"\s--", entry.name) is None
            if fits_in_line and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                images.append((subfolder / entry.name).relative_to(folder).as_posix())
    return images[:MAX_IMAGES]
