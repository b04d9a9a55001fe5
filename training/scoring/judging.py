"""Judge LoRA files by what they have learned: too weak, right, overcooked, or leaking into other words.

Every prompt is generated three times: as typed with the trigger word, without it, and with the class word in
its place. The likeness of the results to the training images, above that of the model without LoRA, says what
the word has learned, and what is shown without it.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from dataset.config import load_dataset_config
from generation.comparing import ComparedClips, make_clips, write_grid
from generation.grid_options import CompareOptions
from generation.options import GenerationOptions
from generation.prompt_lines import read_prompt_lines
from generation.request import GenerationJob, GenerationRun, make_job, map_lines
from modules.atomic_write import write_text
from modules.console import format_count
from modules.control_codes import escape_control_codes
from modules.devices import Failures
from modules.errors import DatasetError, MediaError, OptionError
from modules.options import Options, option
from protocols.family import Family
from training.scoring.embeddings import Embedder, Medium, VectorStore, open_path, vectors_path
from training.scoring.model import EmbedsImages, load_image_model, load_image_text_model
from training.scoring.run import MODEL_FOLDER, SampleComparison
from training.scoring.training_pictures import TrainingVectors, list_training_media

logger = getLogger(__name__)
NUM_FRAMES = 8  # of a clip that are compared
BATCH_SIZE = 16
STDOUT = "-"
# ways of writing a prompt
WITH_WORD, WITHOUT_WORD, WITH_CLASS = "with the word", "without the word", "with the class word"

MIN_SPAN = 0.02  # of likeness, between the model without LoRA and the training images themselves
WEAK = 0.4  # fraction of that span that the word should have gained
LEAK = 0.5  # fraction of the word's gain that prompts without the word may gain
COPIES = 0.2  # fraction of the results that may be copies of training images
NEAR = 0.5  # fraction of the results that may be nearer to a training image than those to each other
KEPT = 0.9  # fraction of a LoRA's gain that should be left beside another LoRA

# ids of verdicts, and what they mean
VERDICTS = {
    "right": "right",
    "too_weak": "too weak: train longer, or use a higher strength",
    "overcooked": "overcooked: take an earlier file, or use a lower strength",
    "leaks": "leaks into the class: train with regularization images of the class word, which "
    "tools/regularize.py makes",
}


class JudgeOptions(Options, title="what to judge by"):
    """Which word was trained, on which images, and which model measures likeness."""

    trigger_word: str = option("word that the LoRA was trained on, as the prompts have it", required=True)
    class_word: str | None = option("word for what the trigger word is one of, such as dog or man")
    dataset_config: Path = option("dataset of the training images", required=True, place="file")
    score_model: Path = option(
        "folder of a CLIP or SigLIP model as transformers saves it, which measures likeness",
        default=MODEL_FOLDER,
    )
    likeness_model: Path | None = option(
        "folder of a DINO model as transformers saves it, which measures likeness in place of --score_model"
    )
    json: Path | None = option(
        "write the figures as JSON; without PATH, or with -, to standard output",
        nargs="?",
        const=STDOUT,
        place="new file",
    )

    def __post_init__(self) -> None:
        if not self.trigger_word.strip():
            raise OptionError("--trigger_word is empty: write the word that the captions have")


@dataclass(frozen=True)
class Likeness:
    """How like the training images the results of one column are, by the way its prompts are written."""

    with_word: float  # mean cosine to the nearest training images
    without_word: float
    with_class: float | None  # None without a class word
    copied: float  # fraction of the results with the word that are copies of a training image
    near: float  # fraction that are nearer to a training image than 99 of 100 of those to each other
    nearest: str  # training image that is nearest to a result with the word


@dataclass(frozen=True)
class Judgement:
    """What a LoRA file at a strength has learned, as fractions of the way from the model to the images."""

    column: str
    strength: str  # such as "x 0.8"; "" for files that are used beside others
    learned: float  # gained with the trigger word: 0 as without LoRA, 1 as like as the images to each other
    without_word: float  # gained by the same prompts without the word
    with_class: float | None  # gained by the same prompts with the class word
    likeness: Likeness
    verdict: str  # a key of `VERDICTS`

    @property
    def margin(self) -> float:
        """What the word has learned beyond what is shown without it."""
        return self.learned - max(self.without_word, self.with_class or 0.0, 0.0)

    @property
    def label(self) -> str:
        """Name of the file and its strength."""
        return f"{self.column} {self.strength}".rstrip()


def judge(name: str, strength: str, base: Likeness, lora: Likeness, training_likeness: float) -> Judgement:
    """Judge a LoRA by the likeness of its results to the training images.

    Args:
        name: Name of the file.
        strength: Its strength as text.
        base: Likeness of the results without LoRA.
        lora: Likeness of the results with the LoRA.
        training_likeness: Likeness of the training images to each other.

    Raises:
        DatasetError: If results without LoRA are as like the training images as these are to each other.
    """
    span = training_likeness - base.with_word
    if span < MIN_SPAN:
        raise DatasetError(
            f"nothing can be judged: results without LoRA have a likeness of {base.with_word:.3f} to the "
            f"training images, and these of {training_likeness:.3f} to each other. Use prompts that only the "
            "trigger word makes similar to the training images, or --likeness_model"
        )
    learned = (lora.with_word - base.with_word) / span
    without_word = (lora.without_word - base.without_word) / span
    with_class = None
    if lora.with_class is not None and base.with_class is not None:
        with_class = (lora.with_class - base.with_class) / span
    if lora.copied > COPIES or lora.near > NEAR:
        verdict = "overcooked"
    elif learned < WEAK:
        verdict = "too_weak"
    elif without_word > LEAK * learned:
        verdict = "overcooked"
    elif with_class is not None and with_class > LEAK * learned:
        verdict = "leaks"
    else:
        verdict = "right"
    return Judgement(name, strength, learned, without_word, with_class, likeness=lora, verdict=verdict)


def find_file_to_take(judgements: Sequence[Judgement]) -> Judgement:
    """Return the file to take: of those that are right, or else of all, the one with the largest margin."""
    right = [judgement for judgement in judgements if judgement.verdict == "right"]
    return max(right or judgements, key=lambda judgement: judgement.margin)


def find_kept_strength(judgements: Sequence[Judgement]) -> Judgement | None:
    """Return the strongest column beside a LoRA that keeps 90 % of what that LoRA has learned; None if none.

    Args:
        judgements: First the LoRA alone, then each file at each strength, used beside it.
    """
    alone, *together = judgements
    kept = [judgement for judgement in together if judgement.learned >= KEPT * alone.learned]
    return max(kept, key=lambda judgement: float(judgement.strength.removeprefix("x ")), default=None)


def write_prompt(prompt: str, word: str, replacement: str) -> str:
    """Return a prompt with another word, or "", in place of the trigger word.

    Raises:
        OptionError: If the prompt lacks the word.
    """
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    if not re.search(pattern, prompt):
        raise OptionError(
            f"the prompt {prompt!r} lacks the trigger word {word}. Write the word in every prompt"
        )
    changed = re.sub(pattern, lambda _: replacement, prompt)
    # commas and spaces that a removed word leaves
    changed = re.sub(r"\s*,(\s*,)+", ",", re.sub(r"\s+", " ", changed))
    return re.sub(r" ,", ",", changed).strip(" ,")


def judge_loras(
    family: Family, options: GenerationOptions, comparison: CompareOptions, judging: JudgeOptions
) -> None:
    """Generate the prompts in three ways with every LoRA at every strength, and judge each by its results.

    Raises:
        UserError: If a result cannot be made or measured.
    """
    config = load_dataset_config(judging.dataset_config)  # read first: generating takes long
    media = list_training_media(config)
    if len(media) < 2:
        raise DatasetError(
            f"--dataset_config {judging.dataset_config} has {format_count(len(media), 'training image')}: at "
            "least two are needed, whose likeness to each other is the measure"
        )
    texts = {WITH_WORD: judging.trigger_word, WITHOUT_WORD: ""}
    if judging.class_word is not None:
        texts[WITH_CLASS] = judging.class_word
    # prompt label -> way of writing, in the order of the jobs
    ways: dict[str, str] = {}
    list_jobs = partial(_list_jobs, word=judging.trigger_word, texts=texts, ways=ways)
    clips = make_clips(family, options, comparison, list_jobs)
    grids = write_grid(clips.run, clips.variants, clips.jobs, clips.paths)
    logger.info("look at %s", ", ".join(map(str, grids)))
    measurement = _read_results(clips, ways, media, judging)
    base, *likenesses = [measurement.measure_column(index) for index in range(len(clips.variants))]
    judgements = [
        judge(variant.column, variant.strength, base, likeness, measurement.training_likeness)
        for variant, likeness in zip(clips.variants[1:], likenesses, strict=True)
    ]
    has_beside = bool(comparison.beside)
    _write(judgements, base, measurement.training_likeness, judging, has_beside=has_beside)


def _read_results(
    clips: ComparedClips, ways: Mapping[str, str], media: Sequence[Medium], judging: JudgeOptions
) -> "_Measurement":
    """Embed the results and the training images; the model that generates is freed before."""
    clips.run.session.free()
    device = str(clips.run.session.device)
    model: EmbedsImages
    if judging.likeness_model is not None:
        model = load_image_model(judging.likeness_model, device)
    else:
        model = load_image_text_model(judging.score_model, device)
    paths = list(dict.fromkeys(clips.paths.values()))
    with VectorStore(vectors_path(clips.run.options.output.save_path, model)) as store:
        embedder = Embedder(model, store, num_frames=NUM_FRAMES, batch_size=BATCH_SIZE)
        vectors = dict(
            zip(paths, embedder.embed([open_path(path) for path in paths], "results"), strict=True)
        )
        training = TrainingVectors.of(media, embedder.embed(media, "training images"))
    training_likeness = None if training is None else training.measure_mutual_likeness()
    if training is None or training_likeness is None:
        raise MediaError("fewer than two training images can be read: nothing can be compared with them")
    return _Measurement(
        clips,
        ways,
        SampleComparison({}, training, NUM_FRAMES),
        vectors,
        training_likeness,
    )


def _list_jobs(
    run: GenerationRun, word: str, texts: Mapping[str, str], ways: dict[str, str]
) -> list[GenerationJob]:
    """Return a job for each prompt and way of writing it, and note the way of each job's label."""
    lines = read_prompt_lines(run.options.from_file)
    failures = Failures(strict=run.options.from_file is None)

    def make(run: GenerationRun, label: str, values: Mapping[str, Any]) -> list[GenerationJob]:
        """Return the jobs of one line."""
        prompt = str(values.get("prompt", run.options.request.prompt))
        jobs = []
        for way, text in texts.items():
            changed = write_prompt(prompt, word, text)
            if not changed:
                raise OptionError(
                    f"the prompt {prompt!r} is empty without the trigger word: write more than the word, "
                    f"such as a photo of {word}"
                )
            jobs.append(make_job(run, f"{label} {way}", {**values, "prompt": changed}))
            ways[jobs[-1].label] = way
        return jobs

    jobs_by_line = map_lines(run, lines, failures, make)
    failures.raise_if_any(len(lines))
    return [job for jobs in jobs_by_line.values() for job in jobs]


@dataclass(frozen=True)
class _Measurement:
    """The results of a comparison with their embeddings, and the training images to compare them with."""

    clips: ComparedClips
    ways: Mapping[str, str]  # label of a prompt -> the way it is written
    comparison: SampleComparison
    vectors: Mapping[Path, Any]  # embeddings of each result, F D; None if it cannot be read
    training_likeness: float  # of the training images to each other

    def measure_column(self, index: int) -> Likeness:
        """Return the likeness of a column's results to the training images, by the way of writing."""
        variant = self.clips.variants[index]
        scores: dict[str, list[Any]] = {way: [] for way in (WITH_WORD, WITHOUT_WORD, WITH_CLASS)}
        for job in self.clips.jobs:
            path = self.clips.get_path(job, variant)
            frames = self.vectors[path]
            if frames is None:
                raise MediaError(f"{path} cannot be read: delete it, and type the same command again")
            scores[self.ways[job.label]].append(self.comparison.score(0, path, "", frames, frames))
        means = {
            way: sum(score.likeness for score in of_way) / len(of_way)
            for way, of_way in scores.items()
            if of_way
        }
        with_word = scores[WITH_WORD]
        return Likeness(
            with_word=means[WITH_WORD],
            without_word=means[WITHOUT_WORD],
            with_class=means.get(WITH_CLASS),
            copied=sum(score.is_copied for score in with_word) / len(with_word),
            near=sum(score.is_near for score in with_word) / len(with_word),
            nearest=max(with_word, key=lambda score: score.nearest_cosine).nearest,
        )


def _write(
    judgements: Sequence[Judgement],
    base: Likeness,
    training_likeness: float,
    judging: JudgeOptions,
    has_beside: bool,
) -> None:
    """Print the table and the file to take, or write them as JSON."""
    take = find_file_to_take(judgements)
    kept = find_kept_strength(judgements) if has_beside and len(judgements) > 1 else None
    if judging.json is not None:
        content = {
            "training_likeness": training_likeness,
            "without_lora": asdict(base),
            "judgements": [asdict(judgement) for judgement in judgements],
            "take": take.label,
            "keeps": None if kept is None else kept.label,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        if str(judging.json) == STDOUT:
            sys.stdout.write(text)
            return
        write_text(judging.json, text)
    lines = describe(judgements)
    if has_beside and len(judgements) > 1:
        lines.append(_describe_kept(judgements, kept))
    else:
        suffix = "" if take.verdict == "right" else ", though none is right"
        lines.append(f"Take {take.label}{suffix}: {VERDICTS[take.verdict]}.")
    sys.stdout.write(escape_control_codes("\n".join(lines)) + "\n")


def describe(judgements: Sequence[Judgement]) -> list[str]:
    """Return the lines of the table for a terminal."""
    width = max(len(judgement.label) for judgement in judgements)
    lines = [
        "What is gained on the way from the model (0 %) to the training images (100 %):",
        f"  {'':<{width}}  {'word':>6} {'without':>8} {'class':>6} {'copies':>7}",
    ]
    for judgement in judgements:
        with_class = "" if judgement.with_class is None else f"{judgement.with_class:.0%}"
        lines.append(
            f"  {judgement.label:<{width}}  {judgement.learned:>6.0%} {judgement.without_word:>8.0%} "
            f"{with_class:>6} {judgement.likeness.copied:>7.0%}  {VERDICTS[judgement.verdict]}"
        )
    return lines


def _describe_kept(judgements: Sequence[Judgement], kept: Judgement | None) -> str:
    """Return the sentence about the strength beside a LoRA that keeps what it has learned."""
    alone = judgements[0]
    if kept is None:
        return f"No strength keeps {KEPT:.0%} of what {alone.column} has learned: use lower ones."
    share = kept.learned / alone.learned if alone.learned else 1.0
    return f"{kept.label} keeps {share:.0%} of what {alone.column} has learned; higher strengths keep less."
