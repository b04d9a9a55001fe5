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
        rows: The field values of each row, by row number.
        recipe: The model; None if the page does not know its sizes.
    """
    notes: dict[int, str] = {}
    for number, texts in rows.items():
        sides = {name: int(texts[name]) for name in (*SIDES, "frames") if is_number(texts.get(name, ""))}
        sentences = [] if recipe is None else [*_describe_fields(sides, recipe)]
        if sentences:
            notes[number] = join(" ", sentences)
    return notes


def is_number(text: str) -> bool:
    """Return whether a text is a positive integer of few digits."""
    return text.isdecimal() and text.isascii() and len(text) < 7 and int(text) > 0


def _describe_fields(values: Mapping[str, int], recipe: ModelRecipe) -> Iterable[str]:
    """Yield a sentence for each size in a row of the samples form that the model cannot generate."""
    # `values` are the row's sizes by field name.
    for name in SIDES:
        pixels = values.get(name)
        used_size = None if pixels is None else fit_side(pixels, recipe.side_step)
        if used_size != pixels:
            yield say(
                "%(name)s %(pixels)s: use a multiple of %(side_step)s. The sample is generated "
                "with %(made)s.",
                name=SIDE_NAMES[name],
                pixels=pixels,
                side_step=recipe.side_step,
                made=used_size,
            )
    frames = values.get("frames")
    if frames is None or "frames" not in recipe.fields or recipe.counts_seconds:
        return
    used_size = recipe.defaults.lengths.fit(frames)
    if used_size != frames:
        yield say(
            "%(frames)s frames: use a length of %(lengths)s. The sample is generated with %(made)s.",
            frames=frames,
            lengths=recipe.defaults.lengths,
            made=used_size,
        )


def _describe_line(number: int, values: Mapping[str, Any], recipe: ModelRecipe) -> Iterable[str]:
    """Yield a sentence for each size in a prompts.txt line that the model cannot generate."""
    # `values` are the line's options by name, `number` is the line number.
    for name in SIDES:
        pixels = values.get(name)
        used_size = None if pixels is None else fit_side(pixels, recipe.side_step)
        if used_size != pixels:
            yield say(
                "%(file)s, line %(number)s, --%(letter)s %(pixels)s: use a multiple of "
                "%(side_step)s. The sample is generated with %(made)s.",
                file=PROMPTS_FILE,
                number=number,
                letter=name[0],  # the options are --w and --h
                pixels=pixels,
                side_step=recipe.side_step,
                made=used_size,
            )
    frames = values.get("frame_count")
    if frames is None or "frames" not in recipe.fields or recipe.counts_seconds:
        return
    used_size = recipe.defaults.lengths.fit(frames)
    if used_size != frames:
        yield say(
            "%(file)s, line %(number)s, --f %(frames)s: use a length of %(lengths)s. The sample is "
            "generated with %(made)s.",
            file=PROMPTS_FILE,
            number=number,
            frames=frames,
            lengths=recipe.defaults.lengths,
            made=used_size,
        )
