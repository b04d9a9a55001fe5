"""Renew the tables of models, files, licenses, recipes and evenings in these pages.

python docs/model_tables.py
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.evening_figures import list_figures, make_proven_table  # noqa: E402
from downloads.catalogue import (  # noqa: E402
    Component,
    families,
    family_page,
    family_title,
    known_licenses,
    model_sets,
)
from downloads.listing import UNVERIFIED, describe_size, describe_total  # noqa: E402
from modules.parser import Parser  # noqa: E402
from project.recipes.reading import list_shipped  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
FIRST = "## Models and tasks"  # from here on
RECIPE_TABLE_HEAD = "| recipe |"  # the last table of docs/recipes.md
PROVEN_HEADING = "## What has come"  # the end of docs/proven.md
TOKENIZER = "its tokenizer"


def main() -> None:
    """Write the table of all models to docs/models.md and the tables of each family to the family's page."""
    Parser(description=__doc__).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(FIRST)] + models_tables(), encoding="utf-8")
    by_page: dict[str, list[str]] = {}
    for family in families():
        by_page.setdefault(family_page(family), []).append(family)
    for name, page_families in by_page.items():
        page = PAGE.with_name(name)
        page.write_text(
            renew_family_tables(page.read_text(encoding="utf-8"), page_families), encoding="utf-8"
        )
    page = PAGE.with_name("recipes.md")
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.index(RECIPE_TABLE_HEAD)] + recipe_table(), encoding="utf-8")
    page = PAGE.with_name("proven.md")
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.index(PROVEN_HEADING)] + proven_part(), encoding="utf-8")


def proven_part() -> str:
    """Return the end of docs/proven.md: the figures of the files in docs/proven."""
    return f"{PROVEN_HEADING}\n\n{make_proven_table(list_figures(PAGE.with_name('proven')))}"


def recipe_table() -> str:
    """Return the table of the recipes of this program, the end of docs/recipes.md."""
    columns = ("recipe", "for", "model", "values", "tried on", "figures")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for recipe in list_shipped():
        cells = (
            f"`{recipe.name}`",
            recipe.title,
            f"`{recipe.family} {recipe.task}`, {recipe.train}",
            f"`{recipe.values_text}`",
            recipe.tried_on,
            recipe.figures_text,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def family_table(family: str) -> list[str]:
    """Return the table of a family's page: the files of its tasks."""
    columns = ("what", "option", "repository", "file", "size", "license")
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    tasks = {one.task for one in model_sets() if one.family == family}
    for component, needed_by in sorted(_components_of(family).items(), key=lambda item: _order(item[0])):
        if component.role == TOKENIZER and component.option is None:  # docs/models.md says where scripts look
            continue
        which = "" if tasks == set(needed_by) else f" ({', '.join(needed_by)})"
        rows.append(_row(f"{component.role}{which}", component))
    return rows


def renew_family_tables(text: str, page_families: Sequence[str]) -> str:
    """Return a page with the tables of its families, which stand there in the order of the catalogue.

    Raises ValueError if it has another number of such tables.
    """
    head = re.escape(family_table(page_families[0])[0])
    parts = re.split(rf"^{head}\n(?:\|.*\n)*", text, flags=re.MULTILINE)
    if len(parts) != len(page_families) + 1:
        raise ValueError(f"{len(parts) - 1} tables of files for the families {', '.join(page_families)}")
    tables = ["\n".join(family_table(family)) + "\n" for family in page_families]
    return "".join(part + table for part, table in zip(parts, [*tables, ""], strict=True))


def _components_of(family: str) -> dict[Component, list[str]]:
    """Return the components of a family's tasks, each with the tasks that need it."""
    found: dict[Component, list[str]] = {}
    for one in [*model_sets(), *model_sets(fp8_encoders=True)]:
        for component in one.components if one.family == family else ():
            names = found.setdefault(component, [])
            names += [] if one.task in names else [one.task]
    return found


def _order(component: Component) -> tuple[int, str]:
    """Return the place of a row: by the option's place in a command; tokenizers and 8 bits behind theirs."""
    places = (
        "--ltx2_checkpoint",
        *("--ckpt", "--dit", "--dit_high_noise", "--unconditional_dit"),
        *("--lora_weight", "--lora_weight_high_noise"),
        *("--video_vae", "--audio_vae", "--vocoder"),
        *("--vae", "--ae", "--t5", "--text_encoder1", "--t5xxl", "--text_encoder", "--qwen3"),
        "--text_encoder_qwen",
        *("--tokenizer", "--byt5"),
        *(
            "--gemma2",
            "--gemma_root",
            "--ltx2_text_encoder_checkpoint",
            "--ltx2_video_vae",
            "--ltx2_audio_vae",
        ),
        *("--spatial_upsampler_path", "--distilled_lora_path", "--training_adapter"),
        *("--clip_l", "--text_encoder2", "--text_encoder_clip", "--clip"),
        *("--image_encoder", "--model", "--model_dir", "--background", "--depth"),
        *("--clip_guidance_model", "--vgg16_guidance_model"),
    )
    if component.option is not None:
        return places.index(component.option), ""
    beside = {
        "clip_l": "--text_encoder2",
        "facefix": "--model",
        "qwen_2.5_vl": "--text_encoder",
        "t5xxl": "--t5xxl",
        "tokenizer": "--gemma2",
    }
    return places.index(beside.get(component.path.parent.name, "--text_encoder1")), "beside it"


def _row(what: str, component: Component) -> str:
    files = component.files
    start = os.path.commonprefix([file.file for file in files])
    names = [f"{start}*"] if len(files) > 1 and start else [file.file for file in files]
    cells = (
        what,
        f"`{component.option}`" if component.option else "found by itself",
        f"`{files[0].repository}`",
        ", ".join(f"`{name}`" for name in names),
        describe_size(component),
        component.licence.name,
    )
    return f"| {' | '.join(cells)} |"


def models_tables() -> str:
    """Return the part of docs/models.md about all models: their tasks, and the licenses."""
    lines = [FIRST, "", "| model | `--family` | `--task` | what it does | released by | all files |"]
    lines.append("|---|---|---|---|---|---|")
    for family in families():
        page = family_page(family)
        named = f"[{family_title(family)}]({page}) | `{family}`"
        for one in model_sets():
            if one.family == family:
                total = describe_total(one.components)
                lines.append(f"| {named} | `{one.task}` | {one.about} | `{one.released_by}` | {total} |")
                named = " | "  # in the first row of a family alone
    lines.append("")
    lines += ["## Licenses", "", "| license | terms to know |", "|---|---|"]
    for licence in known_licenses().values():
        mark = "" if licence.verified else f" ({UNVERIFIED})"
        lines.append(f"| [{licence.name}]({licence.url}){mark} | {licence.terms} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
