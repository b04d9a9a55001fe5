"""Write a page about a dataset: what a training will see of it, and what is wrong with it."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.report.page import ReportOptions
from dataset.config import load_dataset_config
from protocols.families import plain_script

main = plain_script(
    __doc__,
    "data_tools.report.run.run_report",
    ReportOptions,
    prepare=lambda options: (load_dataset_config(options.dataset_config), options),
)


if __name__ == "__main__":
    main.run()
