"""Scores of a run's samples as a file next to its history: read and written, the best file, the page's part.

`OUTPUT_NAME-scores.json` is written by tools/score.py. Scores are means over the samples of a step.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modules.atomic_write import replace_surrogates, write_text
from modules.pages.charts import Chart, Curve
from modules.pages.language import join, say, say_count
from modules.text_files import parse_json, read_text
from training.reports.history import MeasuredFile, RunHistory, select_lowest_loss
from training.reports.sections import PageSection, scores_path

VERSION = 1
MAX_BYTES = 64 << 20
MAX_ROWS = 10_000
MAX_SHOWN = 100  # rows of the page
# means of two steps that differ by less are equal: repeated seeds of one LoRA differ by about as much
TOLERANCE = 0.005
NO_TASTE = say(
    "Scores do not measure taste: they say how a model that describes images sees the samples, not which "
    "ones you like. Look at the samples before you decide."
)
# notes below a table, by their names in files
NOTES = {
    "unreadable": say("Files that could not be read and are left out: %(names)s."),
    "no_dataset": say("The history does not name a dataset: --dataset_config gives one for the likeness."),
    "dataset_gone": say("The dataset %(path)s is not here: --dataset_config gives one for the likeness."),
    "cut": say(
        "Prompts longer than the %(most)s tokens that the model reads: %(n)s of %(all)s. Their "
        "remaining tokens are not compared."
    ),
    "few": say(
        "Training images: %(n)s, too few to say from which cosine a sample is very near to one (%(least)s "
        "are needed). Copies are found nevertheless."
    ),
    "faces": say("Likeness of faces is left out: no network here describes faces."),
    "no_tags": say("No prompt has tags, with commas between them, that the tagger knows."),
    "sounds": say("Samples with audio only are left out."),
}


@dataclass(frozen=True)
class ScoreNote:
    """A note about the scores of a run: a key of `NOTES`, and the values for the placeholders of its text."""

    kind: str
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The note as text in the current language."""
        return say(NOTES[self.kind], **self.values)


@dataclass(frozen=True)
class SampleScore:
    """Scores of one sample; a score that was not measured is None."""

    prompt: int  # number of the prompt
    file: str
    clip: float | None = None  # cosine of sample and prompt, -1..1
    likeness: float | None = None  # mean cosine to the nearest training images
    nearest: str = ""  # the nearest training image
    nearest_cosine: float | None = None
    is_copied: bool = False  # the sample is nearly the same as the nearest training image
    is_near: bool = False  # the sample is nearer to that image than training images are to each other
    steps: int | None = None  # denoising steps
    tag_recall: float | None = None  # fraction of the prompt's tags that a tagger sees


@dataclass(frozen=True)
class StepScores:
    """Scores of the samples of one step, with the file saved at that step."""

    step: int
    step_label: str  # as in the names of the samples, such as 000020 or e000001
    samples: tuple[SampleScore, ...]
    saved: str = ""  # name of the saved file; "": no file was kept
    loss: float | None = None  # validation loss, measured nearest to the step
    loss_step: int | None = None  # step at which the loss was measured

    @property
    def clip(self) -> float | None:
        """Mean CLIP score of the samples; None if none was scored."""
        return _mean([sample.clip for sample in self.samples])

    @property
    def likeness(self) -> float | None:
        """Mean likeness of the samples to the dataset; None if none was scored."""
        return _mean([sample.likeness for sample in self.samples])

    @property
    def tag_recall(self) -> float | None:
        """Mean fraction of the prompts' tags that a tagger detects; None if it was not measured."""
        return _mean([sample.tag_recall for sample in self.samples])

    @property
    def nearest_cosine(self) -> float | None:
        """Return the largest cosine similarity between a sample and its nearest training image, or None."""
        return max(
            (one.nearest_cosine for one in self.samples if one.nearest_cosine is not None), default=None
        )

    @property
    def copies(self) -> list[SampleScore]:
        """Samples that are copies of a dataset item."""
        return [sample for sample in self.samples if sample.is_copied]

    @property
    def near(self) -> list[SampleScore]:
        """Samples that resemble a training item closely without copying it."""
        return [sample for sample in self.samples if sample.is_near and not sample.is_copied]

    @property
    def denoising_steps(self) -> str:
        """Return the number of denoising steps of the samples: `4`, `4-20`, or "" if unknown."""
        numbers = sorted({sample.steps for sample in self.samples if sample.steps is not None})
        return "-".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else ""


@dataclass(frozen=True)
class RunScores:
    """Scores of a run, in the order of its steps."""

    model: str  # name of the folder of the model
    rows: tuple[StepScores, ...]
    num_training: int = 0  # training images and clips that samples were compared with
    near_threshold: float | None = None  # cosine from which a sample is too near; None: too few to say
    notes: tuple[ScoreNote, ...] = ()
    version: int = VERSION
    # files without samples, which may be the best ones; not written to the file, as they may be removed
    unsampled: tuple[MeasuredFile, ...] = ()


@dataclass(frozen=True)
class BestFile:
    """The best file according to the scores, with the reasons."""

    row: StepScores
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.row.saved

    @property
    def text(self) -> str:
        """The best file and the reasons for it, as a sentence in the current language."""
        return say("Best file: %(file)s: %(reasons)s.", file=self.name, reasons=join("; ", self.reasons))


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def write_scores(path: Path, scores: RunScores) -> None:
    """Write the scores of a run, with the means of each step and the best file.

    Raises OutputError if they cannot be written.
    """
    values = asdict(scores)
    del values["unsampled"]
    for row, row_values in zip(scores.rows, values["rows"], strict=True):
        row_values |= {"clip": row.clip, "clip_score": clip_score(row.clip), "likeness": row.likeness}
        row_values["tag_recall"] = row.tag_recall
        row_values["mark"] = row_values.pop("step_label")  # the key that earlier versions wrote
    best = find_best(scores.rows, scores.unsampled)
    values["best"] = None if best is None else {"file": best.name, "reason": str(best.text)}
    values["remark"] = str(NO_TASTE)
    write_text(path, replace_surrogates(json.dumps(values, ensure_ascii=False, indent=1)) + "\n")


def clip_score(cosine: float | None) -> float | None:
    """Return 100 max(0, cosine), as torchmetrics' `clip_score` does."""
    return None if cosine is None else 100 * max(0.0, cosine)


def read_scores(path: Path) -> RunScores | None:
    """Read the scores of a run; None if there is no such file, or if another program or version wrote it."""
    try:
        values = parse_json(read_text(path, MAX_BYTES))
        if values["version"] != VERSION:
            return None
        rows = tuple(_read_row(row) for row in values["rows"][:MAX_ROWS])
        return RunScores(
            model=str(values["model"]),
            rows=rows,
            num_training=int(values["num_training"]),
            near_threshold=_finite_or_none(values["near_threshold"]),
            notes=tuple(_read_note(note) for note in values["notes"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None


def _read_note(values: Mapping[str, Any]) -> ScoreNote:
    note = ScoreNote(str(values["kind"]), {str(name): str(text) for name, text in values["values"].items()})
    _ = note.text  # raises LookupError if the kind or its values are unknown
    return note


def _read_row(values: Mapping[str, Any]) -> StepScores:
    """Parse the scores of one step; raise LookupError, TypeError or ValueError for malformed values."""
    samples = []
    for sample in values["samples"]:
        numbers = {name: _finite_or_none(sample[name]) for name in ("clip", "likeness", "nearest_cosine")}
        samples.append(
            SampleScore(
                prompt=int(sample["prompt"]),
                file=str(sample["file"]),
                nearest=str(sample["nearest"]),
                is_copied=bool(sample["is_copied"]),
                is_near=bool(sample["is_near"]),
                tag_recall=_finite_or_none(sample.get("tag_recall")),  # older files have none
                steps=None if sample["steps"] is None else int(sample["steps"]),
                **numbers,
            )
        )
    return StepScores(
        step=int(values["step"]),
        step_label=str(values["mark"]),  # files keep the key of earlier versions
        samples=tuple(samples),
        saved=str(values["saved"]),
        loss=_finite_or_none(values["loss"]),
        loss_step=None if values["loss_step"] is None else int(values["loss_step"]),
    )


def _finite_or_none(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def list_unsampled(
    rows: Sequence[StepScores], run_history: RunHistory, folder: Path
) -> tuple[MeasuredFile, ...]:
    """Return the saved files that have a validation loss, but whose step has no scored samples."""
    scored = {row.step for row in rows if row.saved}
    return tuple(file for file in run_history.measured_files(folder) if file.step not in scored)


def find_best(rows: Sequence[StepScores], unsampled: Sequence[MeasuredFile] = ()) -> BestFile | None:
    """Return the best saved file; None if there is none.

    1. Files with samples that copy a training image are left out, unless all files have such samples.
    2. If there are validation losses, the file with the lowest one is chosen.
    3. Otherwise, among the files whose samples match their prompts best (within TOLERANCE), the file whose
       samples are most similar to the training images is chosen.

    Args:
        rows: Scores of each step.
        unsampled: Saved files whose step has no scored samples.
    """
    saved = [row for row in rows if row.saved]
    without_copies = [row for row in saved if not row.copies]
    candidates = without_copies or saved
    best = _find_by_loss(rows, candidates, unsampled)
    if best is None:
        if not candidates:
            return None
        # The file whose samples look best by their scores, for runs without validation losses
        row = max(
            _select_by_prompt_similarity(candidates),
            # among equal ones, the earliest
            key=lambda row: (row.likeness or 0.0, row.clip or 0.0, -row.step),
        )
        if row.likeness is None:
            reason = say("fits its prompts best")
        else:
            reason = say(
                "of the files whose samples fit their prompts best (within %(same)s), the one most like the "
                "training images",
                same=f"{TOLERANCE:g}",
            )
        best = BestFile(row, (say("no validation loss was measured"), reason))
    num_copying = len(saved) - len(without_copies)
    if not num_copying:
        return best
    if without_copies:
        remark = say_count(
            num_copying,
            "%(n)s file is left out because its samples copy a training image",
            "%(n)s files are left out because their samples copy a training image",
        )
    else:
        remark = say("samples of all files copy training images")
    return replace(best, reasons=(*best.reasons, remark))


def _find_by_loss(
    rows: Sequence[StepScores], candidates: Sequence[StepScores], unsampled: Sequence[MeasuredFile]
) -> BestFile | None:
    """Return the file with the lowest validation loss; None if none was measured."""
    scores_by_file: dict[MeasuredFile, StepScores] = {}
    for row in candidates:
        if row.loss is not None and row.loss_step is not None:
            scores_by_file[MeasuredFile(row.saved, row.step, row.loss, row.loss_step)] = row
    lowest = select_lowest_loss([*scores_by_file, *unsampled])
    if lowest is None:
        return None
    best = scores_by_file.get(lowest)
    if best is None:  # a file of `unsampled`
        best = StepScores(
            lowest.step, "", (), saved=lowest.name, loss=lowest.loss, loss_step=lowest.loss_step
        )
    step = f"{lowest.loss_step:,}"
    if lowest.loss_step == lowest.step:
        reason = say("validation loss lowest at step %(step)s", step=step)
    else:
        reason = say("validation loss lowest at step %(step)s, the nearest validation", step=step)
    trends = _find_trends(rows, best) if best.samples else [say("there are no samples of its step")]
    return BestFile(best, (reason, *trends))


def _select_by_prompt_similarity(rows: Sequence[StepScores]) -> list[StepScores]:
    """Return the rows of steps whose prompt similarity is at most TOLERANCE below the highest."""
    highest = max((row.clip for row in rows if row.clip is not None), default=None)
    if highest is None:
        return list(rows)
    return [row for row in rows if row.clip is not None and row.clip >= highest - TOLERANCE]


def _find_trends(rows: Sequence[StepScores], best: StepScores) -> list[str]:
    """Describe how the scores change after the best file; each sentence is a reason for this choice."""
    later_steps = [row for row in rows if row.step > best.step]
    if not later_steps:
        return [say("it is the last one with samples")]
    reasons: list[str] = []
    last = later_steps[-1]
    if best.likeness is not None and last.likeness is not None:
        change = last.likeness - best.likeness
        if change > TOLERANCE:
            reasons.append(say("likeness still rises after it"))
        elif change < -TOLERANCE:
            reasons.append(say("likeness falls after it"))
        else:
            reasons.append(say("likeness stays the same after it"))
    if best.clip is not None and last.clip is not None and last.clip < best.clip - TOLERANCE:
        reasons.append(say("later samples match their prompts less"))
    return reasons


@dataclass(frozen=True)
class ScoreTable:
    """Headings and rows of a table with the scores of a run, as text."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)


def make_table(scores: RunScores) -> ScoreTable:
    """Return the table of scores with a row for each step with samples, for the terminal and the page."""
    has_tags = any(row.tag_recall is not None for row in scores.rows)
    headings = (
        say("step"),
        say("file"),
        say("validation loss"),
        say("prompt (cosine)"),
        say("clip_score"),
        say("likeness"),
        say("nearest"),
        *([say("tags seen")] if has_tags else []),
        say("remarks"),
    )
    best = find_best(scores.rows, scores.unsampled)
    table = ScoreTable(headings)
    for row in scores.rows:
        is_best = best is not None and row is best.row
        table.rows.append(_make_table_row(row, is_best, has_tags))
    return table


def _make_table_row(row: StepScores, is_best: bool, has_tags: bool) -> tuple[str, ...]:
    """Return the cells of a step, in the order of the headings."""
    loss = _format_score(row.loss)
    if row.loss_step is not None and row.loss_step != row.step:
        loss = say("%(loss)s (at step %(step)s)", loss=loss, step=f"{row.loss_step:,}")
    clip_points = clip_score(row.clip)
    remarks = _list_warnings(row)
    if is_best:
        remarks.insert(0, say("best"))
    return (
        f"{row.step:,}" if row.step else say("before training"),
        row.saved or "-",
        loss,
        _format_score(row.clip),
        "" if clip_points is None else f"{clip_points:.1f}",
        _format_score(row.likeness),
        _format_score(row.nearest_cosine),
        *([_format_score(row.tag_recall)] if has_tags else []),
        join(", ", remarks),
    )


def _format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _list_warnings(row: StepScores) -> list[str]:
    """Return warnings about the samples of a step, such as copies of training items."""
    remarks: list[str] = [
        say("sample %(n)s copies %(picture)s", n=copy.prompt, picture=copy.nearest) for copy in row.copies
    ]
    remarks += [
        say("sample %(n)s is very near to %(picture)s", n=one.prompt, picture=one.nearest) for one in row.near
    ]
    if row.denoising_steps:
        remarks.append(say("samples made with %(n)s steps", n=row.denoising_steps))
    return remarks


def make_section(folder: Path, name: str, run_history: RunHistory) -> PageSection | None:
    """Return the scores of a run for its page; None if it was not scored.

    Args:
        folder: Folder of the history.
        name: Name of the run.
        run_history: Content of the run's history.
    """
    scores = read_present_scores(folder, name, run_history)
    if scores is None:
        return None
    best = find_best(scores.rows, scores.unsampled)
    notes = [say("No saved file has samples.") if best is None else best.text, NO_TASTE]
    num_unscored = len(run_history.samples.keys() - {(row.step, row.step_label) for row in scores.rows})
    if num_unscored:
        notes.append(
            say_count(
                num_unscored,
                "Samples of %(n)s step are not scored yet: run tools/score.py again.",
                "Samples of %(n)s steps are not scored yet: run tools/score.py again.",
            )
        )
    notes += [note.text for note in scores.notes]
    table = make_table(scores)
    return PageSection(
        key="scores",
        title=say("Scores"),
        notes=notes,
        headings=table.headings,
        rows=table.rows[-MAX_SHOWN:],
    )


def read_present_scores(folder: Path, name: str, run_history: RunHistory) -> RunScores | None:
    """Return the scores of those samples of a run whose files still exist; None if the run was not scored."""
    scores = read_scores(scores_path(folder, name))
    if scores is None:
        return None
    rows = tuple(
        row if (folder / row.saved).is_file() else replace(row, saved="")
        for row in scores.rows
        if _is_from_run(row, run_history)  # a run of the same name may have replaced the samples
    )
    if not rows:
        return None
    return replace(scores, rows=rows, unsampled=list_unsampled(rows, run_history, folder))


@dataclass(frozen=True)
class FoundFile:
    """A run's best saved file, and the reason for the choice."""

    name: str
    reasons: str = ""  # a sentence; "" if the file was chosen by its validation loss, without scores


def find_best_file(folder: Path, name: str, run_history: RunHistory) -> FoundFile | None:
    """Return the best saved file of a run by its scores, or by its losses; None if there are neither.

    Args:
        folder: Value of --output_dir.
        name: Value of --output_name; "" if no scores are read.
        run_history: Content of the run's history.
    """
    scores = read_present_scores(folder, name, run_history) if name else None
    scored = None if scores is None else find_best(scores.rows, scores.unsampled)
    if scored is not None:
        return FoundFile(scored.name, str(scored.text))
    file = run_history.best_file(folder)
    return None if file is None else FoundFile(file)


def _is_from_run(row: StepScores, run_history: RunHistory) -> bool:
    """Return whether the scores of a step are for samples recorded in this history."""
    samples = run_history.samples.get((row.step, row.step_label))
    return samples is not None and {sample.file for sample in row.samples} <= {*samples.files.values()}


def list_score_charts(
    folder: Path, name: str, run_history: RunHistory, low: float = -math.inf, high: float = math.inf
) -> list[Chart]:
    """Return charts of a run's scores over its steps; scores without values are left out.

    Args:
        folder: Folder of the history.
        name: Name of the run.
        run_history: Content of the run's history.
        low: First step that is shown.
        high: Last step that is shown.
    """
    scores = read_present_scores(folder, name, run_history)
    rows = () if scores is None else tuple(row for row in scores.rows if low <= row.step <= high)
    prompts = _make_curve(say("samples and prompts"), [(row.step, row.clip) for row in rows])
    likeness = _make_curve(say("samples and training images"), [(row.step, row.likeness) for row in rows])
    tags = _make_curve(say("tags seen"), [(row.step, row.tag_recall) for row in rows])
    charts = [
        Chart([prompts], "step", "cosine", say("Prompt similarity")),
        Chart([likeness], "step", "cosine", say("Likeness to the training images")),
        Chart([tags], "step", "fraction", say("Tags of the prompts that a tagger sees")),
    ]
    return [chart for chart in charts if chart.curves[0].x]


def _make_curve(name: str, points: Sequence[tuple[int, float | None]]) -> Curve:
    measured = [(step, value) for step, value in points if value is not None]
    return Curve(
        name, [step for step, _ in measured], [value for _, value in measured], has_dots=len(measured) < 60
    )
