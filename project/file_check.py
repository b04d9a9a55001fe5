"""Check one file of a model as `new` does: `python -m project.file_check FAMILY TASK OPTION PATH`.

A page calls it in a separate process, because families load torch. It prints why the file does not fit, or
nothing.
"""

import sys
from collections.abc import Sequence

from modules.errors import CheckpointError, UserError
from project.model_choice import check_model_files
from project.options import find_models
from protocols.families import identify


def main(argv: Sequence[str]) -> int:
    """Print why a model file does not fit an option; return 1 if it does not, otherwise 0.

    Args:
        argv: Family, task, option and path.
    """
    family, task, option, path = argv
    for model in find_models():
        if (model.family, model.task) == (family, task):
            try:
                check_model_files(model, {option: path})
            except CheckpointError as error:
                hint = None if error.path is None else identify(error.path)
                sys.stdout.write("\n".join(filter(None, (str(error), hint))))
                return 1
            except UserError as error:
                sys.stdout.write(str(error))
                return 1
            return 0
    sys.stdout.write(f"{family} {task}: there is no such model")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
