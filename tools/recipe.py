"""Make a recipe of a finished run, a file with its values and figures for `new --recipe`; or list recipes."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from project.recipes.saving import RecipeOptions
from protocols.families import plain_script

main = plain_script(__doc__, "project.recipes.saving.run_recipe_command", RecipeOptions)


if __name__ == "__main__":
    main.run()
