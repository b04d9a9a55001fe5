"""Renew the part of docs/models.md that lists files and licences: python docs/model_tables.py"""

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from downloads.catalogue import Component, Licence, families, model_sets  # noqa: E402
from downloads.listing import UNVERIFIED, describe_size, describe_total  # noqa: E402
from modules.parser import Parser  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
FIRST = "## Wan2.1"  # from here on


def main() -> None:
    Parser(description=__doc__).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(FIRST)] + models_tables(), encoding="utf-8")


def read_list() -> dict[str, Any]:
    return tomllib.loads((ROOT / "downloads" / "catalogue.toml").read_text(encoding="utf-8"))


def page_of(family: str) -> str:
    """Return the name of a family's page."""
    return str(read_list()["family"][family]["page"])


def family_table(family: str) -> list[str]:
    """Return the table of a family's page: the files of its tasks."""
    columns = ("what", "option", "repository", "file", "size", "licence")
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    tasks = {one.task for one in model_sets() if one.family == family}
    for component, needed_by in sorted(_components_of(family).items(), key=lambda item: _order(item[0])):
        which = "" if tasks == set(needed_by) else f" ({', '.join(needed_by)})"
        rows.append(_row(f"{component.role}{which}", component))
    return rows


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
        *("--ckpt", "--dit", "--dit_high_noise", "--lora_weight", "--lora_weight_high_noise"),
        *("--video_vae", "--audio_vae"),
        *("--vae", "--ae", "--t5", "--text_encoder1", "--t5xxl", "--text_encoder", "--tokenizer", "--byt5"),
        *(
            "--gemma2",
            "--gemma_root",
            "--ltx2_text_encoder_checkpoint",
            "--ltx2_video_vae",
            "--ltx2_audio_vae",
        ),
        *("--spatial_upsampler_path", "--distilled_lora_path"),
        *("--clip_l", "--text_encoder2", "--clip"),
        *("--image_encoder", "--model"),
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
    """Return the part of docs/models.md from the first family on: all files, and the licences."""
    lines: list[str] = []
    for family in families():
        title, page = read_list()["family"][family]["title"], page_of(family)
        lines += [f"## {title}", "", f"`--family {family}`; how to use them: [{page}]({page})", ""]
        lines += ["| `--task` | what it does | released by | all files |", "|---|---|---|---|"]
        lines += [
            f"| `{one.task}` | {one.about} | `{one.released_by}` | {describe_total(one.components)} |"
            for one in model_sets()
            if one.family == family
        ]
        lines += ["", *family_table(family), ""]
    lines += ["## Licences", "", "| licence | terms to know |", "|---|---|"]
    for licence in (Licence(**entry) for entry in read_list()["licence"].values()):
        mark = "" if licence.verified else f" ({UNVERIFIED})"
        lines.append(f"| [{licence.name}]({licence.url}){mark} | {licence.terms} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
