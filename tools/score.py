"""Score the samples of a run: how well they fit their prompts, and how like the training images they are.

Writes OUTPUT_NAME-scores.json next to the history of the run, which the page of the run shows, and names the
best file with the reason. May be stopped and started again.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.tags.probabilities import load_tag_probabilities
from protocols.families import plain_script
from training.scoring.run import ScoreOptions, score_run

main = plain_script(
    __doc__,
    score_run,
    ScoreOptions,
    prepare=lambda options: (options, load_tag_probabilities),
    advice_after_interrupt=lambda options: "What was computed is kept: type the same command to continue.",
)


if __name__ == "__main__":
    main.run()
