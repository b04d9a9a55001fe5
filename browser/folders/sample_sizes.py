"""Find sample sizes that a model cannot generate, before the training run changes them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from browser.folders.described_folder import PROMPTS_FILE, read_described
from browser.folders.new_form import find_model
from browser.runs.recipes import SIDES, ModelRecipe, can_generate, make_model_recipe
from generation.prompt_lines import numbered_lines
from generation.sample_lines import fit_side, parse_sample_line
from modules.pages.language import join, say

SIDE_NAMES = {"width": say("width"), "height": say("height")}


def describe_changed_sizes(text: str, folder: Path) -> str:
    """Return a sentence for each size in a prompts.txt that the folder's model cannot generate.

    Raises OSError, ValueError or UserError if the folder or a line cannot be read.
    """
    described = read_described(folder)
    model = find_model(described.family, described.task)
    if model is None or not can_generate(model):
        return ""
    recipe = make_model_recipe(model, Path(), Path())
    sentences: list[str] = []
    for number, line in numbered_lines(text):
        sentences += _describe_line(number, parse_sample_line(line), recipe)
    return " ".join(sentences)


def note_sizes(rows: Mapping[int, Mapping[str, str]], recipe: ModelRecipe | None) -> dict[int, str]:
    """Return, by row number, a note on each sample whose size the model cannot generate.

    Args:
        recipe: The model; None if the page does not know its sizes.
    """
    notes: dict[int, str] = {}
    for number, texts in rows.items():
        sizes = {name: int(texts[name]) for name in (*SIDES, "frames") if is_number(texts.get(name, ""))}
        sentences = [] if recipe is None else [*_describe_fields(sizes, recipe)]
        if sentences:
            notes[number] = join(" ", sentences)
    return notes


def is_number(text: str) -> bool:
    """Return whether a text is a positive integer of few digits."""
    return text.isdecimal() and text.isascii() and len(text) < 7 and int(text) > 0


def _fit_sizes(sizes: Mapping[str, int], recipe: ModelRecipe) -> dict[str, int]:
    """Return what is generated instead of each size that the model cannot generate, by name."""
    # `sizes` are the sides in pixels and the frames, as far as they are set
    fitted = {name: fit_side(sizes[name], recipe.side_step) for name in SIDES if name in sizes}
    if "frames" in sizes and "frames" in recipe.fields and not recipe.counts_seconds:
        fitted["frames"] = recipe.defaults.lengths.fit(sizes["frames"])
    return {name: size for name, size in fitted.items() if size != sizes[name]}


def _describe_fields(sizes: Mapping[str, int], recipe: ModelRecipe) -> Iterable[str]:
    """Yield a sentence for each size in a row of the samples form that the model cannot generate."""
    for name, used_size in _fit_sizes(sizes, recipe).items():
        if name in SIDES:
            yield say(
                "%(name)s %(pixels)s: use a multiple of %(side_step)s. The sample is generated "
                "with %(made)s.",
                name=SIDE_NAMES[name],
                pixels=sizes[name],
                side_step=recipe.side_step,
                made=used_size,
            )
        else:
            yield say(
                "%(frames)s frames: use a length of %(lengths)s. The sample is generated with %(made)s.",
                frames=sizes[name],
                lengths=recipe.defaults.lengths,
                made=used_size,
            )


def _describe_line(number: int, values: Mapping[str, Any], recipe: ModelRecipe) -> Iterable[str]:
    """Yield a sentence for each size in a prompts.txt line that the model cannot generate."""
    # `values` are the line's options by name, `number` is the line number.
    options = {"width": "width", "height": "height", "frames": "frame_count"}
    sizes = {name: values[option] for name, option in options.items() if values.get(option) is not None}
    for name, used_size in _fit_sizes(sizes, recipe).items():
        if name in SIDES:
            yield say(
                "%(file)s, line %(number)s, --%(letter)s %(pixels)s: use a multiple of "
                "%(side_step)s. The sample is generated with %(made)s.",
                file=PROMPTS_FILE,
                number=number,
                letter=name[0],  # the options are --w and --h
                pixels=sizes[name],
                side_step=recipe.side_step,
                made=used_size,
            )
        else:
            yield say(
                "%(file)s, line %(number)s, --f %(frames)s: use a length of %(lengths)s. The sample is "
                "generated with %(made)s.",
                file=PROMPTS_FILE,
                number=number,
                frames=sizes[name],
                lengths=recipe.defaults.lengths,
                made=used_size,
            )
