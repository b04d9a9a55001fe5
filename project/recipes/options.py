"""Options of tools/recipe.py. Standard library only."""

import re
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option

SAVE, LIST = "save", "list"
NAME = re.compile(r"\w[\w-]{0,80}")


class RecipeOptions(Options):
    """Options of `recipe`: list the recipes, or save a run's recipe."""

    action: str = option(
        "save: make a recipe of a finished run; list: show all recipes", positional=True, choices=(SAVE, LIST)
    )
    run: Path | None = option(
        "for save: folder of a run, or its ...-history.jsonl; a folder that `new` described has its run in "
        "it",
        positional=True,
        nargs="?",
        place="there",
        hint="a folder with a run, or its history",
    )
    name: str | None = option("for save: name of the recipe (default: that of the run)")
    title: str | None = option(
        "for save: what the recipe is for, in a few words (default: its model and name)"
    )
    tried_on: str | None = option(
        "for save: what was trained and on which data, in a few words (default: the name of the model's file)"
    )
    to: Path = option("for save: folder to write NAME.toml into", default=Path("recipes"))
    overwrite: bool = option("for save: replace the file if it exists")

    def __post_init__(self) -> None:
        if self.action == SAVE and self.run is None:
            raise OptionError("recipe save: pass the folder of a run, such as clips/output")
        if self.name is not None and NAME.fullmatch(self.name) is None:
            raise OptionError(f"--name {self.name!r}: pass a name of letters, digits, _ and -")
