"""The job of the queue that scores the samples of a run."""

from pathlib import Path

from browser.runs.runs import RunSummary
from data_tools.tags.labels import MODEL_FOLDER
from project.options import MODELS

SCORE_MODEL = "score_clip"  # folder below that of the models, which tools/download.py fills


def make_score_argv(run: RunSummary, models: Path = MODELS) -> list[str]:
    """Return the command that scores a run's samples; [] without samples or without a scoring model."""
    model = models / SCORE_MODEL
    if not (run.sample and run.is_trusted and model.is_dir()):
        return []
    argv = ["python", "tools/score.py", str(run.history), "--model", str(model)]
    tagger = models / MODEL_FOLDER.name
    return [*argv, "--tagger", str(tagger)] if tagger.is_dir() else argv
