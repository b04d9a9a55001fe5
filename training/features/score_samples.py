"""Score the samples of each saved checkpoint while the run trains: --score_samples.

A separate process, tools/score.py, computes the scores after each round of samples;
`score_samples_starting.py` starts it. The page shows the scores, and they determine the best file.
"""

from pathlib import Path

from modules.command import quote_command
from modules.errors import OptionError
from modules.options import FREE, option
from training.features.contract import AT_LOGS, Feature, FeatureOptions
from training.features.hooks import RunFeatures


class SampleScoringOptions(FeatureOptions, title="scores of samples", at=AT_LOGS, facts=FREE):
    """Models that score the samples, and the device that the models run on."""

    score_samples: Path | None = option(
        "score the samples as tools/score.py does, each time some were made, by the CLIP or SigLIP model in "
        "this folder, such as models/score_clip; the page shows the scores",
        place="folder",
        hint="the one that `python tools/download.py --family tools --task score_clip --to models` makes",
    )
    score_likeness_model: Path | None = option(
        "folder of a DINO model, which compares samples and training images in place of this model",
        place="folder",
        needs="score_samples",
    )
    score_tagger: Path | None = option(
        "folder of a WD14-like tagger, such as models/wd_tagger: says how many tags of its prompt a sample "
        "shows",
        place="folder",
        needs="score_samples",
        why="it scores samples too",
        hint="the one that `python tools/download.py --family tools --task wd_tagger --to models` makes",
    )
    score_device: str = option(
        "device of this model; it should not be one that trains and is full",
        default="cpu",
        ignored_without="score_samples",
    )


def _start(run: RunFeatures) -> None:
    """Add the recorder that starts a scoring process each time samples have been generated."""
    from training.features.score_samples_starting import SampleScorer  # starts processes: only in training

    folder, name = run.options.saving.folder_and_name
    options = run.options.of(SampleScoringOptions)
    assert options.score_samples is not None  # the feature is on
    models = {
        "--model": options.score_samples,
        "--likeness_model": options.score_likeness_model,
        "--tagger": options.score_tagger,
    }
    scorer = SampleScorer(folder, name, models=models, device=options.score_device)
    run.on.recorders.append(lambda plan, records: scorer)


def _require_file(option_name: str, folder: Path | None, file: str, remedy: str) -> None:
    """Raise OptionError if the folder of an option, if given, does not contain a file."""
    if folder is not None and not (folder / file).is_file():
        raise OptionError(f"{option_name} {folder}: there is no {file} in this folder. {remedy}, or omit it")


def _join(run: RunFeatures, options: SampleScoringOptions) -> None:
    if run.options.samples.sample_prompts is None:
        raise OptionError("--score_samples needs samples: pass --sample_prompts, or omit it")
    if run.options.logs.no_page:
        raise OptionError(
            "--score_samples with --no_page: scores are computed from the run's history, and shown on its "
            "page. Omit one of the two"
        )
    # Raise OptionError, before training begins, if the folder of a scoring model lacks its main file
    words = ["python", "tools/download.py", "--family", "tools", "--to", "models", "--task"]
    score_clip, wd_tagger = (
        f"Download a model: {quote_command([*words, task])}" for task in ("score_clip", "wd_tagger")
    )
    give_dino = "Pass the folder of a DINO model as transformers saves it"
    _require_file(
        "--score_samples",
        options.score_samples,
        "config.json",
        score_clip,
    )
    _require_file("--score_likeness_model", options.score_likeness_model, "config.json", give_dino)
    _require_file(
        "--score_tagger",
        options.score_tagger,
        "model.onnx",
        wd_tagger,
    )
    also = "" if options.score_likeness_model is None else f", likeness by {options.score_likeness_model}"
    if options.score_tagger is not None:
        also += f", tags by {options.score_tagger}"
    run.info.at_start["scores"] = f"of samples, by {options.score_samples}{also} on {options.score_device}"
    run.on.start.append(_start)


SCORE_SAMPLES = Feature(
    name="score_samples",
    options=SampleScoringOptions,
    is_on=lambda options: options.score_samples is not None,
    join=_join,
)
