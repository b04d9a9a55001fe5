"""Score a run after the options of tools/score.py are read."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from blissful_tuner.metadata import read_value
from dataset.config import load_dataset_config
from modules.console import format_count, list_some
from modules.control_codes import escape_control_codes
from modules.errors import MediaError, NothingFoundError, OptionError, UserError
from modules.media.reading import read_tags
from modules.options import Options, option
from modules.text_files import real_path
from training.reports.history import (
    END,
    RunHistory,
    SampleRow,
    Start,
    history_name,
    read_history,
    read_session,
)
from training.reports.page import Standing, write_training_page
from training.reports.sample_files import ClipStore
from training.reports.scores import (
    NO_TASTE,
    RunScores,
    SampleScore,
    ScoreNote,
    StepScores,
    find_best,
    list_unsampled,
    make_table,
    write_scores,
)
from training.reports.sections import SAMPLES, page_path, scores_path
from training.scoring.embeddings import Embedder, VectorStore, open_path, vectors_path
from training.scoring.model import (
    EmbedsImages,
    ImageTextModel,
    load_image_model,
    load_image_text_model,
)
from training.scoring.tags import RecognizesTags, find_tags, number_tags, tag_recall
from training.scoring.training_pictures import (
    MIN_TO_COMPARE,
    NUM_NEAREST,
    Neighbor,
    TrainingVectors,
    is_copy,
    list_training_media,
)

logger = logging.getLogger(__name__)

LoadTagger = Callable[[Path, int], RecognizesTags]

SOUND = ".wav"
NO_FACES = ScoreNote("faces")  # postprocessing/faces only finds and restores faces
MODEL_FOLDER = Path("models/score_clip")  # tools/download.py downloads the model there


class ScoreOptions(Options, title="what to score"):
    """Options of the run to score, the scoring model, and the dataset that the run was trained on."""

    run: Path = option(
        "folder of a run (its --output_dir), or its ...-history.jsonl if the folder has several runs",
        positional=True,
        place="there",
    )
    model: Path = option(
        "folder of a CLIP or SigLIP model as transformers saves it, with its tokenizer and "
        "preprocessor_config.json",
        default=MODEL_FOLDER,
    )
    likeness_model: Path | None = option(
        "folder of a DINO model as transformers saves it, which compares samples and training images in "
        "place of --model: it sees shapes and details, where CLIP sees what an image is about"
    )
    tagger: Path | None = option(
        "folder of a WD14-like tagger, such as models/wd_tagger: says how many tags of its prompt a sample "
        "shows",
        place="folder",
    )
    dataset_config: Path | None = option(
        "dataset of the training images, .toml or .json; default: the one that the run was trained on",
        place="file",
    )
    num_frames: int = option(
        "frames of a clip that are compared, evenly spaced", default=8, minimum=1, maximum=1024
    )
    batch_size: int = option("images that the model sees at a time", default=16, minimum=1, maximum=4096)
    device: str | None = option("cuda, cuda:1, mps or cpu (default: the best there is)")


@dataclass(frozen=True)
class ScoredRun:
    """A run whose samples are scored: the path and the content of its history."""

    history: Path
    run_history: RunHistory

    @property
    def folder(self) -> Path:
        """Folder of the run's history and results."""
        return self.history.parent

    @property
    def name(self) -> str:
        """Output name of the run."""
        return history_name(self.history)

    def list_samples(self) -> list[tuple[SampleRow, dict[int, Path]]]:
        """Return the existing samples of each step: a row, and paths by prompt number.

        Audio files, and samples at another strength of the LoRA than that of the saved file, are left out.
        """
        rows = []
        for key in sorted(self.run_history.samples):
            row = self.run_history.samples[key]
            paths = {
                index: self.folder / SAMPLES / name for index, name in sorted(row.files_as_trained.items())
            }
            present = {
                index: path for index, path in paths.items() if path.suffix != SOUND and path.is_file()
            }
            if present:
                rows.append((row, present))
        return rows


def score_run(options: ScoreOptions, load_tagger: LoadTagger) -> None:
    """Score the samples of a run: print a table, write the scores, and rewrite the run's page.

    1. Embed samples, prompts and training images, and score the samples of each step by their similarity.
    2. With a tagger, add how many of the prompts' tags it finds in the samples.
    3. Collect notes for the reader, and write everything.

    Args:
        options: The run and the models.
        load_tagger: Loads the tagger from a folder, given the folder and the batch size.

    Raises:
        UserError: If there is nothing to score or the model cannot be used.
    """
    run = open_run(options.run)
    rows = run.list_samples()
    if not rows:
        raise NothingFoundError(
            f"{run.history}: the run has no samples to score. Train with --sample_prompts "
            "prompts.txt --sample_every_n_steps 200, at the steps that are saved; samples at another "
            "strength of the LoRA than 1 do not count."
        )
    dataset = _find_dataset(options, run)
    model = load_image_text_model(options.model, options.device)
    for_prompts, for_likeness = _embed_samples(run, rows, options, model=model, dataset=dataset.path)
    prompts = _list_prompts(rows)
    comparison = SampleComparison(
        dict(zip(prompts, model.embed_texts(prompts), strict=True)) if prompts else {},
        for_likeness.training,
        options.num_frames,
    )
    vectors, likeness_vectors = for_prompts.samples, for_likeness.samples
    scored = [
        _score_step(
            run, row, files, vectors=vectors, likeness_vectors=likeness_vectors, comparison=comparison
        )
        for row, files in rows
    ]
    notes = [*dataset.notes, *_note_truncated_prompts(model, prompts)]
    if options.tagger is not None:
        tagger = load_tagger(options.tagger, options.batch_size)
        scored = _add_recalls(scored, rows, tagger, _embed(run, rows, options, tagger, None).samples)
        if all(row.tag_recall is None for row in scored):
            notes.append(ScoreNote("no_tags"))
    unreadable = [*dict.fromkeys((*for_prompts.unreadable, *for_likeness.unreadable))]
    notes += _list_notes(run, unreadable, comparison)
    _write(run, _make_scores(run, options, scored, comparison, notes))


def _make_scores(
    run: ScoredRun,
    options: ScoreOptions,
    scored: Sequence[StepScores],
    comparison: "SampleComparison",
    notes: Sequence[ScoreNote],
) -> RunScores:
    """Return the record of a run's scores, without steps of which no sample was scored."""
    folders = [options.model, options.likeness_model, options.tagger]
    scored_rows = tuple(row for row in scored if row.samples)
    return RunScores(
        model=", ".join(real_path(folder).name for folder in folders if folder is not None),
        rows=scored_rows,
        num_training=0 if comparison.training is None else len(comparison.training.media),
        near_threshold=comparison.threshold,
        notes=tuple(notes),
        unsampled=list_unsampled(scored_rows, run.run_history, run.folder),
    )


def _write(run: ScoredRun, scores: RunScores) -> None:
    """Write the scores of a run, print them as a table, and rewrite the run's page."""
    path = scores_path(run.folder, run.name)
    write_scores(path, scores)
    sys.stdout.write(escape_control_codes(describe(scores)) + "\n")
    logger.info("wrote %s", path)
    _write_page_again(run)


@dataclass(frozen=True)
class EmbeddedRun:
    """Embeddings of a run's samples and training images, computed by one model."""

    samples: Mapping[Path, Tensor | None]  # each F D; None: the file cannot be read
    training: TrainingVectors | None  # None: there are no training images, or no dataset was passed
    unreadable: Sequence[str]  # names of files that could not be read


def _embed_samples(
    run: ScoredRun,
    rows: Sequence[tuple[SampleRow, Mapping[int, Path]]],
    options: ScoreOptions,
    *,
    model: ImageTextModel,
    dataset: Path | None,
) -> tuple[EmbeddedRun, EmbeddedRun]:
    """Return embeddings of the samples to compare with prompts, and to compare with training images."""
    # Without --likeness_model, both are the same embeddings.
    if options.likeness_model is None:
        embedded = _embed(run, rows, options, model, dataset)
        return embedded, embedded
    likeness_model = load_image_model(options.likeness_model, options.device)
    to_prompts = _embed(run, rows, options, model, None)
    return to_prompts, _embed(run, rows, options, likeness_model, dataset)


def _embed(
    run: ScoredRun,
    rows: Sequence[tuple[SampleRow, Mapping[int, Path]]],
    options: ScoreOptions,
    model: EmbedsImages,
    config: Path | None,
) -> EmbeddedRun:
    """Embed all samples and, if a dataset file is given, the training images."""
    paths = [path for _, files in rows for path in files.values()]
    with VectorStore(vectors_path(run.folder, model)) as store:
        embedder = Embedder(model, store, num_frames=options.num_frames, batch_size=options.batch_size)
        vectors = embedder.embed([open_path(path) for path in paths], "samples")
        training = None if config is None else _embed_training_images(embedder, config)
    return EmbeddedRun(dict(zip(paths, vectors, strict=True)), training, embedder.unreadable)


def _embed_training_images(embedder: Embedder, config: Path) -> TrainingVectors | None:
    media = list_training_media(load_dataset_config(config))
    return TrainingVectors.of(media, embedder.embed(media, "training images"))


def _add_recalls(
    scored: Sequence[StepScores],
    rows: Sequence[tuple[SampleRow, Mapping[int, Path]]],
    tagger: RecognizesTags,
    probabilities: Mapping[Path, Tensor | None],
) -> list[StepScores]:
    """Return the scores of each step with the tag recall of its samples added."""
    indices = number_tags(tagger.names)
    steps = []
    for step, (row, files) in zip(scored, rows, strict=True):
        samples = []
        for sample in step.samples:
            tags = find_tags(row.prompts.get(sample.prompt, ""), indices)
            tag_probabilities = probabilities[files[sample.prompt]]
            recall = None if tag_probabilities is None else tag_recall(tags, tag_probabilities)
            samples.append(replace(sample, tag_recall=recall))
        steps.append(replace(step, samples=tuple(samples)))
    return steps


def _list_notes(run: ScoredRun, unreadable: Sequence[str], comparison: "SampleComparison") -> list[ScoreNote]:
    """Return notes about unreadable files, ignored audio samples, and scores that could not be computed."""
    notes = []
    if unreadable:
        notes.append(ScoreNote("unreadable", {"names": list_some(unreadable)}))
    training = comparison.training
    if training is not None and comparison.threshold is None:
        few = {"n": str(len(training.media)), "least": str(MIN_TO_COMPARE)}
        notes.append(ScoreNote("few", few))
    if any(name.endswith(SOUND) for row in run.run_history.samples.values() for name in row.files.values()):
        notes.append(ScoreNote("sounds"))
    return [*notes, NO_FACES]


def open_run(path: Path) -> ScoredRun:
    """Return the run of a history file, or the only run of a folder.

    Raises:
        OptionError: If the path is anything else, or the folder has several runs.
    """
    history_path = _select_history(path) if path.is_dir() else path
    if not history_path.name.endswith(END):
        raise OptionError(f"{path}: pass the folder of a run, or its history, a file named ...{END}")
    try:
        session = read_session(history_path)
        if session is None:
            raise OptionError(f"{history_path}: this is not the history of a training run")
        run_history = read_history(history_path, session)
    except OSError as error:
        raise OptionError(f"{history_path} cannot be read: {error.strerror or error}") from None
    return ScoredRun(history_path, run_history)


def _select_history(folder: Path) -> Path:
    """Return the only history file of a folder. Raises OptionError if there are none or several."""
    histories = _find_histories(folder, f"*{END}")
    if not histories:
        inner = {str(path.parent): None for path in _find_histories(folder, f"*/*{END}")}
        advice = f"There is one in {list_some([*inner])}: pass that folder." if inner else ""
        raise OptionError(
            f"{folder}: there is no run in this folder: no ...{END}. "
            + (advice or "Pass the --output_dir of a training that was not run with --no_page.")
        )
    if len(histories) > 1:
        raise OptionError(
            f"{folder}: there are {len(histories)} runs in this folder. Pass the history of one: "
            f"{list_some([str(path) for path in histories])}"
        )
    return histories[0]


def _find_histories(folder: Path, pattern: str) -> list[Path]:
    """Return the history files of training runs, excluding those of `reelsmith run`."""
    return [path for path in sorted(folder.glob(pattern)) if not path.name.endswith(f".run{END}")]


class TrainingDataset(NamedTuple):
    """The dataset file of a run's training images, or None, and a note if it is missing."""

    path: Path | None
    notes: Sequence[ScoreNote] = ()


def _find_dataset(options: ScoreOptions, run: ScoredRun) -> TrainingDataset:
    """Return the dataset file of --dataset_config, or the one that the run was trained on."""
    if options.dataset_config is not None:
        return TrainingDataset(options.dataset_config)
    start = run.run_history.start
    typed_path = None if start is None else dict(start.changed).get("dataset_config")
    if start is None or typed_path is None:
        return TrainingDataset(None, [ScoreNote("no_dataset")])
    for folder in (Path(), Path(start.working_folder)):
        if (folder / typed_path).is_file():
            return TrainingDataset(folder / typed_path)
    return TrainingDataset(None, [ScoreNote("dataset_gone", {"path": typed_path})])


def _list_prompts(rows: Sequence[tuple[SampleRow, Mapping[int, Path]]]) -> list[str]:
    """Return the non-empty prompts of all samples, each once."""
    return sorted({prompt for row, _ in rows for prompt in row.prompts.values() if prompt.strip()})


def _note_truncated_prompts(model: ImageTextModel, prompts: Sequence[str]) -> list[ScoreNote]:
    """Return a note about prompts that have more tokens than the model accepts; [] if there are none."""
    num_truncated = sum(model.is_truncated(prompt) for prompt in prompts)
    if not num_truncated:
        return []
    counts = {"n": str(num_truncated), "all": str(len(prompts)), "most": str(model.max_tokens)}
    return [ScoreNote("cut", counts)]


class SampleComparison:
    """Compare samples with their prompts and with the training images."""

    def __init__(self, prompts: dict[str, Tensor], training: TrainingVectors | None, num_frames: int) -> None:
        self.prompts, self.training, self.num_frames = prompts, training, num_frames
        self.threshold = None if training is None else training.near_threshold()

    def score(
        self, index: int, path: Path, prompt: str, vectors: Tensor, likeness_vectors: Tensor | None
    ) -> SampleScore:
        """Return the scores of a sample.

        Args:
            index: Index of the sample.
            path: File of the sample.
            prompt: The prompt.
            vectors: Embeddings of its frames, F D, to compare with the prompt.
            likeness_vectors: Embeddings of its frames, F D, to compare with training images; None if unknown.
        """
        text = self.prompts.get(prompt)
        score = SampleScore(
            prompt=index,
            file=path.name,
            clip=None if text is None else float((vectors @ text).mean()),
            steps=_read_steps(path),
        )
        if self.training is None or likeness_vectors is None:
            return score
        neighbors = self.training.find_nearest(likeness_vectors)
        copied = self._find_copied(path, neighbors, self.training)
        nearest = neighbors[0] if copied is None else copied
        return replace(
            score,
            likeness=sum(neighbor.cosine for neighbor in neighbors) / len(neighbors),
            nearest=Path(self.training.media[nearest.media_index].name).name,
            nearest_cosine=nearest.cosine,
            is_copied=copied is not None,
            is_near=self.threshold is not None and nearest.cosine > self.threshold,
        )

    def _find_copied(
        self, path: Path, neighbors: Sequence[Neighbor], training: TrainingVectors
    ) -> Neighbor | None:
        """Return the first of the nearest training images that a sample is a copy of, if any."""
        for neighbor in neighbors:
            try:
                if is_copy(open_path(path).open(), training.media[neighbor.media_index], self.num_frames):
                    return neighbor
            except (MediaError, OSError) as error:
                logger.warning("%s is not checked for copies: %s", path.name, error)
        return None


def _score_step(
    run: ScoredRun,
    row: SampleRow,
    files: dict[int, Path],
    *,
    vectors: Mapping[Path, Tensor | None],
    likeness_vectors: Mapping[Path, Tensor | None],
    comparison: SampleComparison,
) -> StepScores:
    """Score the samples of a step; samples that cannot be read are left out."""
    samples = []
    for index, path in files.items():
        frames = vectors[path]
        if frames is not None:
            prompt = row.prompts.get(index, "")
            samples.append(comparison.score(index, path, prompt, frames, likeness_vectors[path]))
    validated = run.run_history.nearest_validation(row.step)
    # The name of the file saved at a step, the shortest if several exist; "" if none exists
    names = [
        name
        for name, saved_step in run.run_history.saved.items()
        if saved_step == row.step
        and not run.run_history.is_average(name)
        and not run.run_history.is_embedding(name)
        and (run.folder / name).exists()
    ]
    return StepScores(
        step=row.step,
        step_label=row.step_label,
        samples=tuple(samples),
        saved=min(names, key=lambda name: (len(name), name), default=""),
        loss=None if validated is None else validated.loss,
        loss_step=None if validated is None else validated.step,
    )


def _read_steps(path: Path) -> int | None:
    """Return the number of denoising steps from a sample's metadata; None if it is missing."""
    try:
        text = read_value(read_tags(path), "infer_steps") or ""
    except (OSError, ValueError, UserError):
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def describe(scores: RunScores) -> str:
    """Return the scores as a table for a terminal, with the best file below it."""
    table = make_table(scores)
    # Each row as a line, with the columns padded to equal widths
    rows = [table.headings, *table.rows]
    texts = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]
    best = find_best(scores.rows, scores.unsampled)
    if best is not None:
        lines += ["", str(best.text)]
    else:
        lines += ["", "No saved file has samples of its step: save and sample at the same steps."]
    if scores.num_training:
        lines.append(
            f"likeness: mean cosine to the {min(NUM_NEAREST, scores.num_training)} nearest of "
            f"{format_count(scores.num_training, 'training image')}."
        )
    if scores.near_threshold is not None:
        lines.append(
            f"Very near: a cosine above {scores.near_threshold:.4f}; 99 of 100 training images have no "
            "other one as near as that."
        )
    lines += [*(str(note.text) for note in scores.notes), str(NO_TASTE)]
    return "\n".join(lines)


def _write_page_again(run: ScoredRun) -> None:
    """Rewrite the page of a run to include the scores, if the run has ended and has a page."""
    path = page_path(run.folder, run.name)
    if run.run_history.ending is None or not path.is_file():
        return
    text, kind = run.run_history.ending
    step = next(reversed(run.run_history.loss), 0)
    standing = Standing(run.run_history.start or Start("", step), step, text, kind)
    load = ClipStore(run.folder / SAMPLES).for_page() if run.run_history.samples else None
    write_training_page(path, run.history, run.run_history, standing, load=load)
    logger.info("wrote %s", path)
