"""The prompts of a run's samples as rows of fields, and the edits of these rows."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser.core.server_state import Site
from browser.folders.described_folder import PROMPTS_FILE, edit_toml
from browser.folders.draft_changes import (
    describe_difference,
    read_keys,
)
from browser.folders.folders import is_written
from browser.folders.new_form import MAX_STEPS, parse_integer
from browser.folders.sample_sizes import note_sizes
from browser.runs.recipes import ModelRecipe, can_generate, make_model_recipe
from downloads.catalogue import ModelSet
from generation.prompt_lines import SplitLine, is_blank, split_line, unquote
from generation.sample_lines import find_sample_option
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from modules.pages.language import refusal, say
from modules.paths import complete_home
from project.model_sizes import needs_image
from project.options import RUN_FILE

MIN_ROWS = 3
MAX_ROWS = 100
MAX_IMAGES = 2000
MAX_DEPTH = 3  # maximum depth of subfolders that are searched for images
SAMPLE_EVERY_N_STEPS = "sample_every_n_steps"  # keys of run.toml
SAMPLE_EVERY_N_EPOCHS = "sample_every_n_epochs"
SAMPLE_AT_FIRST = "sample_at_first"
SAMPLE_PROMPTS = "sample_prompts"
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
EXAMPLE_VALUES = {"width": "512", "height": "512", "frames": "81", "steps": "20"}
INTEGER_FIELDS = tuple(EXAMPLE_VALUES)  # fields for positive integers
MAX_NUMBER = 1_000_000
GUIDANCE_FIELDS = ("guidance", "embedded guidance")  # fields for any number
NUMBER = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,6})?")
IMAGE_FIELDS = ("start", "end", "source", "control")
TEXT_FIELDS = ("negative",)
NUMBER_FIELDS = ("width", "height", "frames", "seed", "steps", "guidance", "embedded guidance")
COMMON_NUMBER_FIELDS = {"width", "height", "seed", "steps"}


@dataclass(frozen=True)
class PromptRow:
    """A line of prompts.txt as a row of the form; `more` contains the options without a field."""

    line: int | None  # index of the line in the file; None: a new one
    prompt: str
    texts: Mapping[str, str]  # keyed by the name of the field
    more: str = ""


def _split(line: str) -> SplitLine:
    """Split a prompt line. A line with two prompts, which training runs reject, is shown as one text."""
    try:
        return split_line(line)
    except OptionError:
        return SplitLine(line, [])


def _find_key(part: str) -> str:
    """Return the key of an option in a prompt line; "" if it is unknown."""
    option = find_sample_option(part.partition(" ")[0])
    return "" if option is None else option.key


def _repeats(part: str) -> bool:
    """Return whether a prompt-line option may be repeated, such as `--ci` for several images."""
    option = find_sample_option(part.partition(" ")[0])
    return option is not None and option.repeats


def read_row(number: int, line: str) -> PromptRow:
    """Return the form row of a prompt line. Its last text contains the options that no field shows.

    A field shows the last use of its option. If the option is a list, such as several `--ci`, the earlier
    items are in this text, too.
    """
    split = _split(line)
    field_by_key = {key: name for name, (key, _) in FIELDS.items()}
    field_names = [field_by_key.get(_find_key(option)) for option in split.options]
    last_index = {name: index for index, name in enumerate(field_names)}
    texts: dict[str, str] = {}
    more = []
    for index, (name, option) in enumerate(zip(field_names, split.options, strict=True)):
        is_earlier_list_item = _repeats(option) and last_index[name] != index
        if name is None or is_earlier_list_item:
            more.append(f"--{option.strip()}")
        else:  # if an option is not a list, its last use counts
            _, _, value = option.partition(" ")
            texts[name] = unquote(value.strip())
    return PromptRow(number, split.prompt.strip(), texts, " ".join(more))


def read_rows(text: str) -> list[PromptRow]:
    """Return the rows of a prompts.txt, without comments and blank lines."""
    lines = text.split("\n")
    return [read_row(number, line) for number, line in enumerate(lines) if not is_blank(line)]


def edit_line(line: str, prompt: str | None, changes: Mapping[str, str]) -> str:
    """Return a prompt line such as `A cat --w 768` with another prompt and other options.

    Args:
        prompt: New prompt; None to keep the old one.
        changes: New values by field name; an empty value removes the option.
    """
    split = _split(line)
    options = split.options  # with values, such as `w 768`
    for name, text in changes.items():
        options = _set_option(options, name, text) if text else _remove_option(options, name)
    new_prompt = split.prompt if prompt is None else prompt
    return " --".join([new_prompt, *options])


def _set_option(options: Sequence[str], name: str, text: str) -> list[str]:
    """Return options of a prompt line with a new value of a field."""
    key, short_name = FIELDS[name]
    indices = [index for index, option in enumerate(options) if _find_key(option) == key]
    if not indices:
        return [*options, f"{short_name} {text}"]
    # an option may be repeated; the field shows its last use
    last_index = indices[-1]
    typed_name, _, _ = options[last_index].partition(" ")
    return [*options[:last_index], f"{typed_name} {text}", *options[last_index + 1 :]]


def _remove_option(options: Sequence[str], name: str) -> list[str]:
    """Return options of a prompt line without the option of a field."""
    key, _ = FIELDS[name]
    indices = [index for index, option in enumerate(options) if _find_key(option) == key]
    # from a list, such as several --ci, remove only the item that the field shows
    is_list = any(_repeats(options[index]) for index in indices)
    removed_indices = indices[-1:] if is_list else indices
    return [option for index, option in enumerate(options) if index not in removed_indices]


def edit_prompts(text: str, fields: Mapping[str, str], check_image: Callable[[str], None]) -> str:
    """Return the text of prompts.txt with the edits from its rows applied.

    A row whose prompt is empty is removed; a new row is added at the end.

    Args:
        fields: Fields of the form, such as `width 2` for the second row.
        check_image: Raises OptionError for a path that is not an image.

    Raises:
        OptionError: If a row cannot be written as a valid line.
    """
    lines: list[str | None] = [*text.split("\n")]  # None: the line is removed
    new_lines = []
    for edit in _read_edits(text, fields):
        _check_edit(edit, check_image)
        line_index = edit.row.line
        if line_index is None:  # a row that is not in the file yet
            if edit.prompt:
                new_lines.append(edit_line(edit.prompt, None, edit.changes))
        elif edit.row.prompt != "" and not edit.prompt:
            lines[line_index] = None
        else:
            lines[line_index] = edit.apply(lines[line_index] or "")
    remaining_text = "\n".join(line for line in lines if line is not None)
    if not new_lines:
        return remaining_text
    has_open_line = remaining_text != "" and not remaining_text.endswith("\n")
    separator = "\n" if has_open_line else ""
    return remaining_text + separator + "\n".join(new_lines) + "\n"


@dataclass(frozen=True)
class _RowEdit:
    """A user's changes to one row of the samples form."""

    number: int  # index of the row on the page
    row: PromptRow  # the row before the edit
    prompt: str
    changes: Mapping[str, str]  # values by the name of the field

    def apply(self, line: str) -> str:
        """Return the row's line with the user's changes applied."""
        return edit_line(line, None if self.prompt == self.row.prompt else self.prompt, self.changes)


def _read_edits(text: str, fields: Mapping[str, str]) -> list[_RowEdit]:
    """Return the user's changes to each row of the form. `text` is the content of prompts.txt."""
    rows = {str(row.line): row for row in read_rows(text)}
    edits = []
    for number in range(1, MAX_ROWS + 1):
        if f"row {number}" in fields:
            row = rows.get(fields.get(f"line {number}", ""), PromptRow(None, "", {}))
            prompt = fields.get(f"prompt {number}", "").replace("\n", " ").strip()
            changes = {}
            for name in FIELDS:
                typed = fields.get(f"{name} {number}", "").strip()
                if f"has {name}" in fields and typed != row.texts.get(name, ""):
                    changes[name] = typed
            edits.append(_RowEdit(number, row, prompt, changes))
    return edits


def _check_edit(edit: _RowEdit, check_image: Callable[[str], None]) -> None:
    """Raise OptionError if an edited row cannot be written as a valid prompt line."""
    # `check_image` raises OptionError for a path that is not an image.
    title = say("Sample %(number)s", number=edit.number)
    if edit.prompt.startswith("#") and edit.prompt != edit.row.prompt:
        raise refusal(
            "%(title)s: a line that begins with # is a comment. Begin with another letter.", title=title
        )
    if edit.changes and not edit.prompt and edit.row.line is None:
        raise refusal("%(title)s: the prompt is empty. Write one.", title=title)
    for name, text in edit.changes.items():
        if text:
            _check_number(title, name, text)
        # dashes would begin another option of the prompt line
        if " --" in f" {text}":
            raise refusal("%(title)s %(name)s: %(text)s: omit the dashes.", title=title, name=name, text=text)
        if name in IMAGE_FIELDS and text:
            check_image(text)


def _check_number(title: str, name: str, text: str) -> None:
    """Raise OptionError if the text of a numeric field is not a valid number. `title` names its row."""
    if name in INTEGER_FIELDS and parse_integer(text, MAX_NUMBER) is None:
        raise refusal(
            "%(title)s %(name)s: %(text)s is not a whole number above 0, such as %(usual)s.",
            title=title,
            name=name,
            text=shorten(text, 40),
            usual=EXAMPLE_VALUES[name],
        )
    if name in GUIDANCE_FIELDS and not NUMBER.fullmatch(text):
        raise refusal(
            "%(title)s %(name)s: %(text)s is not a number, such as 4 or 3.5.",
            title=title,
            name=name,
            text=shorten(text, 40),
        )


def edit_sampling_intervals(text: str, fields: Mapping[str, str]) -> str:
    """Return the text of run.toml with a form's sampling intervals.

    Raises OptionError if an interval is not valid, ValueError if `text` is not valid TOML.
    """
    keys = read_keys(text)
    changes: dict[str, Any] = {}
    typed_interval = fields.get("every", "").strip()
    if typed_interval != str(keys.get(SAMPLE_EVERY_N_STEPS, "")):
        number = parse_integer(typed_interval, MAX_STEPS)
        if typed_interval and number is None:
            raise refusal(
                "Generated after every: %(every)s is not a whole number above 0, such as 200.",
                every=shorten(typed_interval, 40),
            )
        changes[SAMPLE_EVERY_N_STEPS] = number  # None removes the key
    samples_at_first = "first" in fields
    if samples_at_first != bool(keys.get(SAMPLE_AT_FIRST)):
        changes[SAMPLE_AT_FIRST] = samples_at_first or None
    if any(changes.values()) and SAMPLE_PROMPTS not in keys:  # a training run samples only with a prompt file
        changes[SAMPLE_PROMPTS] = PROMPTS_FILE
    return edit_toml(text, changes)


def check_image(site: Site, folder: Path, text: str) -> None:
    """Raise OptionError if a path, relative to a folder, is not an image or clip below the roots."""
    path = folder / text
    is_media = Path(text).suffix.lower() in {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}
    if "\0" in text or not is_media or not site.runs.is_inside(path):
        raise refusal("%(text)s: there is no such image in %(folder)s", text=text, folder=folder)


def read_typed_texts(fields: Mapping[str, str]) -> dict[int, dict[str, str]]:
    """Return the field values of each row of the samples form, by row number."""
    rows: dict[int, dict[str, str]] = {}
    for number in range(1, MAX_ROWS + 1):
        if f"row {number}" in fields:
            texts = {name: fields.get(f"{name} {number}", "").strip() for name in FIELDS}
            rows[number] = texts | {name: complete_home(texts[name]) for name in IMAGE_FIELDS}
    return rows


def read_typed_rows(text: str, fields: Mapping[str, str]) -> list[PromptRow]:
    """Return the rows of the prompt file `text`, with the values that the user typed into the form."""
    rows = []
    typed = read_typed_texts(fields)
    for edit in _read_edits(text, fields):
        rows.append(PromptRow(edit.row.line, edit.prompt, typed[edit.number], edit.row.more))
    return rows


def find_recipe(model: ModelSet | None) -> ModelRecipe | None:
    """Return a model's generation options as a recipe; None if pages cannot generate with the model."""
    return make_model_recipe(model, Path(), Path()) if model is not None and can_generate(model) else None


def has_layers(recipe: ModelRecipe | None) -> bool:
    """Return whether the model generates layered images, where the field `frames` is the number of layers."""
    return recipe is not None and "layers" in recipe.fields


def select_text_fields(recipe: ModelRecipe | None, rows: Sequence[PromptRow]) -> list[str]:
    """Return the text fields that the model uses, or that a line of the prompt file fills."""
    used = set() if recipe is None else {*recipe.fields}
    return [name for name in TEXT_FIELDS if name in used or any(name in row.texts for row in rows)]


def describe_rows(
    rows: Sequence[PromptRow], model: ModelSet | None, folder: Path, num_rows: int
) -> dict[str, Any]:
    """Return the template values of the samples form: its rows and fields.

    Args:
        rows: Rows of the prompt file; at most `MAX_ROWS` are shown.
        model: The model that generates the samples; None if the catalogue does not contain it.
        folder: Folder to which relative paths refer.
        num_rows: Minimum number of rows to show.
    """
    num_shown = min(max(MIN_ROWS, len(rows), num_rows), MAX_ROWS)
    filled = list(rows[:MAX_ROWS])
    blank = [PromptRow(None, "", {})] * (num_shown - len(filled))
    recipe = find_recipe(model)
    image_fields = select_image_fields(model, recipe, filled)
    return {
        "rows": [*filled, *blank],
        "next_count": num_shown + 1,
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
    fields = {name for row in rows for name in NUMBER_FIELDS if name in row.texts}
    if model is not None:
        fields = _select_frames_field(fields, model, recipe, rows)
        has_embedded = recipe is not None and recipe.option_keys.get("guidance") == "embedded_cfg_scale"
        fields.add("embedded guidance" if has_embedded else "guidance")
    return [name for name in NUMBER_FIELDS if name in COMMON_NUMBER_FIELDS | fields]


def _select_frames_field(
    fields: set[str], model: ModelSet, recipe: ModelRecipe | None, rows: Sequence[PromptRow]
) -> set[str]:
    """Return `fields` with the field `frames` if the model uses it, and without it for images."""
    if has_layers(recipe):
        return fields | {"frames"}  # for this model, the number of layers
    if model.properties["frames"] > 1:
        return fields | {"frames"}
    has_only_images = all(row.texts.get("frames", "1") == "1" for row in rows)
    if model.properties["frames"] == 1 and has_only_images:
        return fields - {"frames"}
    return fields


def select_image_fields(
    model: ModelSet | None, recipe: ModelRecipe | None, rows: Sequence[PromptRow]
) -> list[str]:
    """Return the image fields that the model uses, or that a line of the prompt file fills."""
    fields = {name for row in rows for name in IMAGE_FIELDS if name in row.texts}
    if recipe is not None:
        fields |= {"end", "control"} & {*recipe.fields}
    if model is not None and model.properties.get("from_image"):
        fields.add("start")
    if model is not None and needs_image(model):
        fields.add("source")
    return [name for name in IMAGE_FIELDS if name in fields]


def describe_conflict(fields: Mapping[str, str]) -> str:
    """Return the message that files have changed while the form was open, with the user's changes."""
    base_text = fields.get("base", "")  # text of the prompts that the form was built from
    try:
        # only to compare: accepts every image path
        edited_text = edit_prompts(base_text, fields, lambda text: None)
        user_changes = describe_difference(base_text, edited_text)
    except OptionError as error:
        user_changes = [str(error)]
    return say(
        "%(prompts_file)s or %(run_file)s has changed in the meantime, and nothing was overwritten. "
        "The rows show their current content. What you changed: %(names)s",
        prompts_file=PROMPTS_FILE,
        run_file=RUN_FILE,
        # no prompt line differs: only the sampling interval was changed
        names="; ".join(user_changes) or say("how often"),
    )


def list_images(folder: Path) -> list[str]:
    """Return the images in a folder and its subfolders as relative paths, at most MAX_IMAGES."""
    images: list[str] = []
    unlisted = [(folder, 0)]  # folders with their depth, for a breadth-first search
    while unlisted and len(images) < MAX_IMAGES:
        subfolder, depth = unlisted.pop(0)
        try:
            entries = sorted(os.scandir(subfolder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth < MAX_DEPTH and not is_written(entry.name):
                    unlisted.append((subfolder / entry.name, depth + 1))
                continue
            # in a prompt line, two dashes after a space begin an option
            fits_in_line = re.search(r"\s--", entry.name) is None
            if fits_in_line and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                images.append((subfolder / entry.name).relative_to(folder).as_posix())
    return images[:MAX_IMAGES]
