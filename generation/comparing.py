"""Compare LoRAs: generate every prompt with every LoRA at every strength, on a model that is loaded once.

Finished clips of an earlier run with the same settings and LoRA files are kept: the same command continues
an interrupted comparison.
"""

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from blissful_tuner.metadata import CREATED, as_tags, lora_name
from checkpoints.model_files import load_latents
from generation import making, network_setup
from generation.embedding_marks import with_embeddings
from generation.grid_options import CompareOptions
from generation.loaded_networks import select_prompts
from generation.memory import resolve_options
from generation.options import GenerationOptions
from generation.outputs import LATENT_SUFFIX, PREVIEW_SUFFIX, make_prompt_slug, reserve_stem
from generation.progress import NAMING, shorten_prompt
from generation.prompt_lines import read_prompt_lines
from generation.request import EncodedJob, GenerationJob, GenerationRun, make_job, map_lines
from generation.run import check_models, explain_lack, make_session
from generation.sheets import ClipGrid, Row, write_grids
from generation.switched_loras import LoraGroup, load_for_groups
from modules.atomic_write import make_folder
from modules.command import quote_command
from modules.console import format_count, format_duration, show_box
from modules.devices import Failures, allow_fp16_accumulation, format_peak_memory, select_device
from modules.errors import OptionError, UserError
from modules.media.layers import COMPOSITE
from modules.media.reading import read_tags
from networks.loading import WeightedLora
from networks.text_loras import TextLoras, add_lora_words
from networks.use_options import multipliers_for
from protocols.family import Family
from protocols.rules import Expert
from protocols.steps import EncodedPrompts
from runtime.compile import check_compilation
from runtime.planning.device_memory import device_memory_to_plan

SEED = "0"  # default seed, because all columns need the same one
WITHOUT = "without LoRA"


@dataclass(frozen=True)
class Variant:
    """One column of a comparison: a LoRA at a strength (one LoRA per expert if there are two), or no LoRA."""

    column: str
    strength: str  # "x 0.6"; empty without LoRA
    uses: tuple[tuple[WeightedLora, ...], ...]  # by expert
    sha256: Mapping[str, str]  # key in the clips' metadata -> hash of the LoRA file

    @property
    def label(self) -> str:
        """Heading of a column in a comparison: the LoRA and its strength."""
        return f"{self.column} {self.strength}".rstrip()


class Cell(NamedTuple):
    """A cell of a comparison: a prompt, and its clip in one column."""

    prompt: GenerationJob
    clip: GenerationJob


class ClipFiles(NamedTuple):
    """Paths of a comparison's finished clip or image, and of its latents."""

    video: Path
    latents: Path

    @property
    def exist(self) -> bool:
        """Whether the clip or its latents exist."""
        return self.video.exists() or self.latents.exists()


Column = tuple[Variant, Sequence[Cell]]


@dataclass(frozen=True)
class ComparedClips:
    """The finished clips of a comparison."""

    run: GenerationRun
    variants: Sequence[Variant]  # the first one is without LoRA
    jobs: Sequence[GenerationJob]  # of the prompts
    paths: Mapping[str, Path]  # by the label of `get_path`

    def get_path(self, job: GenerationJob, variant: Variant) -> Path:
        """Return the clip of a prompt in a column."""
        return self.paths[f"{job.label}, {variant.label}"]


def compare(family: Family, options: GenerationOptions, comparison: CompareOptions) -> None:
    """Generate clips of each prompt without LoRA and with each LoRA at each strength; write them as grids.

    Clips that exist from an earlier run are not generated again.

    Raises:
        UserError: If a clip or grid cannot be made.
    """
    start = time.monotonic()
    clips = make_clips(family, options, comparison, make_prompts)
    grids = write_grid(clips.run, clips.variants, clips.jobs, clips.paths)
    show_box(
        "Comparison is finished",
        [
            ("look at", "\n".join(map(str, grids))),
            ("time", format_duration(time.monotonic() - start)),
            ("peak memory", format_peak_memory(clips.run.session.device)),
        ],
    )


@explain_lack("Finished clips are kept: the same command continues.")
def make_clips(
    family: Family,
    options: GenerationOptions,
    comparison: CompareOptions,
    list_jobs: Callable[[GenerationRun], list[GenerationJob]],
) -> ComparedClips:
    """Generate clips of each prompt without LoRA and with each LoRA at each strength, unless they exist.

    Args:
        family: The model family.
        options: Options of the run.
        comparison: LoRA files and strengths.
        list_jobs: Makes the jobs of the prompts.

    Raises:
        UserError: If a clip cannot be made.
    """
    check_options(options, "a comparison")
    device = select_device(options.device)
    options = prepare_options(family, options, device)
    loras = network_setup.expert_loras(family, options, with_texts=True)
    # add prompt words from LoRA files and from --textual_inversion_embeddings
    family = add_lora_words(family, loras)
    family = with_embeddings(family, options.textual_inversion_embeddings or ())
    variants = make_variants(family.experts, loras, comparison)
    run = make_run(family, options, device)
    jobs = list_jobs(run)
    check_models(run)
    run = run.with_previews()
    make_folder(options.output.save_path, "--save_path")
    columns = _make_columns(run, variants, jobs)
    missing = _list_missing_cells(run, columns)
    _show_start(run, jobs, columns, missing)
    if missing:
        denoise_cells(run, missing)
    # by label, because columns may share a clip
    clips = {cell.clip.label: cell.clip for _, cells in columns for cell in cells}
    return ComparedClips(run, variants, jobs, decode_cells(run, list(clips.values())))


def make_run(family: Family, options: GenerationOptions, device: torch.device) -> GenerationRun:
    """Return the run for these options, without LoRAs; its networks are loaded later."""
    options, predicted = resolve_options(family, options, device, device_memory_to_plan(device))
    loader = network_setup.dit_loader(family, (), device, options)
    session = make_session(family, options, loader, keep=False)
    return GenerationRun(family, options, session, predicted)


def _make_columns(
    run: GenerationRun, variants: Sequence[Variant], jobs: Sequence[GenerationJob]
) -> list[Column]:
    """Make the generation job of each clip; columns with equal labels share their clips."""
    cells_by_label: dict[str, list[Cell]] = {}
    for variant in variants:
        clips = [make_cell(run, variant, job, line) for line, job in enumerate(jobs, 1)]
        cells_by_label[variant.label] = list(map(Cell, jobs, clips))
    return [(variant, cells_by_label[variant.label]) for variant in variants]


def prepare_options(family: Family, options: GenerationOptions, device: torch.device) -> GenerationOptions:
    """Return the options with what a comparison needs, such as a fixed seed, and prepare the device."""
    if options.optimized:
        options = network_setup.leave_out_missing(family, options, device)
    output = replace(options.output, no_progressive_save=True)
    options = replace(options, output=output)
    if options.request.seed is None:
        options = replace(options, request=replace(options.request, seed=SEED))
    if options.speed.fp16_accumulation:
        allow_fp16_accumulation(device)
    check_compilation(options.speed.compilation.choice, device)
    return options


def make_prompts(run: GenerationRun) -> list[GenerationJob]:
    """Make the generation job of each prompt line; raise UserError if a line is invalid."""
    options = run.options
    lines = read_prompt_lines(options.from_file)
    failures = Failures(strict=options.from_file is None)
    jobs = list(map_lines(run, lines, failures, make_job).values())
    failures.raise_if_any(len(lines))
    if any(job.lora_blocks is not None for job in jobs):
        raise OptionError("--lb in a prompt line has no meaning for a comparison: pass --lora_blocks instead")
    making.warn_about_unused_sources(options.request.source, options.typed_options, jobs)
    return jobs


def _list_missing_cells(run: GenerationRun, columns: Sequence[Column]) -> list[Column]:
    """Return the columns with only the cells that lack a clip and saved latents, without finished columns."""
    incomplete: list[Column] = []
    for variant, cells in columns:
        missing = [cell for cell in cells if not _files(run, cell.clip).exist]
        if missing:
            incomplete.append((variant, missing))
    return incomplete


def _show_start(
    run: GenerationRun, jobs: Sequence[GenerationJob], columns: Sequence[Column], missing: Sequence[Column]
) -> None:
    """Log the columns to compare and the number of clips that are already finished."""
    total = len(columns) * len(jobs)
    num_missing = sum(len(cells) for _, cells in missing)
    finished = f", {total - num_missing} of them made before" if num_missing < total else ""
    model_names = filter(None, map(run.family.metadata.get, NAMING))
    labels = [re.sub(r"\s+", " ", variant.label) for variant, _ in columns]
    show_box(
        "Comparing",
        [
            ("model", ", ".join(model_names)),
            ("columns", "\n".join(labels)),
            ("prompts", f"{len(jobs)}; the first: {shorten_prompt(jobs[0].prepared.request.prompt)}"),
            ("clips", f"{format_count(total, 'clip')}{finished}"),
            ("folder", str(run.options.output.save_path)),
        ],
    )


def check_options(
    options: GenerationOptions, purpose: str, also_refused: Mapping[str, bool] | None = None
) -> None:
    """Raise OptionError if an option is given that has no meaning for a command that denoises in its own way.

    Args:
        options: Options of the run.
        purpose: What the command makes, for the message, such as "a comparison".
        also_refused: Further options, and whether they are given.
    """
    output = options.output
    output_types = ("images", "latent_images") if output.pictures else ("video", "both")
    refused = {
        "--interactive": options.interactive,
        "--sheet": options.sheet.sheet is not None,
        "--latent_path": bool(options.latent_path),
        "--save_merged_model": options.save_merged_model is not None,
        "--num_videos": options.num_videos > 1,
        "--prompt_rewrite": options.rewriting.prompt_rewrite is not None,
        "--plan": options.speed.plan.is_planning,
        **dict.fromkeys(options.speed.modes.flags, True),  # options that use several processes
        f"--output_type {output.output_type}": output.output_type not in output_types,
        "--no_metadata": output.no_metadata,
        "--keep_pngs": output.format.keep_pngs,
        "--post": bool(options.post.tools),
        "--save_last_frame": output.save_last_frame,
        f"The file {output.file_name} of --save_path": bool(output.file_name),
        **(also_refused or {}),
    }
    for option, is_given in refused.items():
        if is_given:
            raise OptionError(f"{option} has no meaning for {purpose}: omit it")


def make_variants(
    experts: Sequence[Expert], uses: network_setup.LorasByExpert, comparison: CompareOptions
) -> list[Variant]:
    """Return the columns of a comparison: one without LoRA, then every file at every strength.

    Files at the same position in each expert's list share a column, named after the first file. With
    `beside`, the second column has these files alone, and all later columns have them too.

    Args:
        experts: Networks of the model, with their noise levels.
        uses: LoRA files by expert; files of `beside` are the last ones.
        comparison: Strengths to compare, and files that are used in all columns.
    """
    variants = [Variant(WITHOUT, "", ((),) * len(experts), {})]
    beside: Sequence[tuple[WeightedLora, ...]] = ((),) * len(experts)
    if comparison.beside:
        beside = _select_beside(uses, comparison)
        uses = [expert_uses[: -len(comparison.beside)] for expert_uses in uses]
        name = " and ".join(path.stem for path in comparison.beside)
        variants.append(Variant(f"{name} alone", "", tuple(beside), _hash_files(experts, beside)))
    num_columns = max(map(len, uses), default=0)
    columns = []
    for index in range(num_columns):
        # one file of each expert, or none if the expert has fewer files
        columns.append([expert_uses[index : index + 1] for expert_uses in uses])
    paths = [next(expert_uses[0] for expert_uses in column if expert_uses).lora.path for column in columns]
    names = [path.stem for path in paths]
    for column, path in zip(columns, paths, strict=True):
        heading = path.stem
        if names.count(heading) > 1:  # equal file names in several folders
            heading = f"{path.parent.name}/{heading}"
        together = [(*own, *others) for own, others in zip(column, beside, strict=True)]
        sha256 = _hash_files(experts, together)
        for strength in dict.fromkeys(comparison.lora_multiplier):
            weighted = [
                (*(replace(use, multiplier=strength) for use in own), *others)
                for own, others in zip(column, beside, strict=True)
            ]
            variants.append(Variant(heading, f"x {strength:g}", tuple(weighted), sha256))
    return variants


def _select_beside(
    uses: network_setup.LorasByExpert, comparison: CompareOptions
) -> list[tuple[WeightedLora, ...]]:
    """Return the files that all columns have, which are each expert's last ones, at their strengths."""
    if len({len(expert_uses) for expert_uses in uses}) > 1:
        raise OptionError(
            "--beside: the model has two experts, and a file is for one of them only. Merge each pair "
            "into a file for both, or omit --beside"
        )
    files = comparison.beside or ()
    multipliers = multipliers_for(files, comparison.beside_multiplier, "--beside_multiplier", warns=True)
    beside = []
    for expert_uses in uses:
        weighted_uses = zip(expert_uses[-len(files) :], multipliers, strict=True)
        beside.append(tuple(replace(use, multiplier=strength) for use, strength in weighted_uses))
    return beside


def _hash_files(experts: Sequence[Expert], column: network_setup.LorasByExpert) -> dict[str, str]:
    """Return the SHA-256 hashes of a column's LoRA files, by the metadata keys that store them."""
    hashes: dict[str, str] = {}
    for expert, expert_uses in zip(experts, column, strict=True):
        name = lora_name(network_setup.get_lora_key(expert))
        for index, use in enumerate(expert_uses):
            hashes[f"{name}_sha256_{index}"] = _hash(use.lora.path)
    return hashes


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_cell(run: GenerationRun, variant: Variant, job: GenerationJob, line: int) -> GenerationJob:
    """Make the job that generates a prompt in one column of the comparison.

    Its file name contains line, seed and column; `_` is appended if another clip already has this name.

    Args:
        run: The run.
        variant: The column.
        job: The prompt's job.
        line: Number of the prompt line.
    """
    loras = {
        network_setup.get_lora_key(expert): [(use.lora.path.name, use.multiplier) for use in uses]
        for expert, uses in zip(run.family.experts, variant.uses, strict=True)
    }
    metadata = dict(run.metadata(job.prepared, loras) or {})
    metadata |= {f"bt_{name}": sha256 for name, sha256 in variant.sha256.items()}
    column = make_prompt_slug(variant.label.replace(".", "_")) or "lora"
    # a hash, because shortened labels may be equal and a LoRA file may have been replaced
    content = f"{variant.label} {' '.join(variant.sha256.values())}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:6]
    stem = f"{line:03d}_{job.prepared.seed}_{column}_{digest}"
    cell = GenerationJob(f"{job.label}, {variant.label}", job.prepared, stem, metadata)
    while not _is_same_clip(run, cell):
        cell = replace(cell, stem=f"{cell.stem}_")
    return cell


def _files(run: GenerationRun, cell: GenerationJob) -> ClipFiles:
    """Return the paths of a cell's output files: the clip or image, and its latents."""
    options = run.options
    if run.family.latent.has_layers:
        suffix = f"{COMPOSITE}.png"
    elif cell.prepared.frames > 1:
        suffix = options.output.format.suffix
    else:
        suffix = "_000.png" if options.output.numbers_single else ".png"
    folder = options.output.save_path
    return ClipFiles(folder / f"{cell.stem}{suffix}", folder / f"{cell.stem}{LATENT_SUFFIX}")


def _is_same_clip(run: GenerationRun, cell: GenerationJob) -> bool:
    """Return whether a cell's output files were made with the cell's settings; True if there are none."""
    video, latents = _files(run, cell)
    settings = _select_making_settings(as_tags(cell.metadata or {}))
    try:
        if video.exists() and _select_making_settings(read_tags(video)) != settings:
            return False
        return not latents.exists() or _select_making_settings(load_latents(latents).metadata) == settings
    except (UserError, OSError):
        return False  # damaged, or another program's


def _select_making_settings(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that records a clip's settings, without the time of its creation."""
    return {
        name: text
        for name, text in tags.items()
        if name.startswith("bt_") and text and name != f"bt_{CREATED}"
    }


def denoise_cells(run: GenerationRun, columns: Sequence[Column]) -> None:
    """Denoise the clips of a comparison; each latent file is written as soon as its clip is finished."""
    jobs = {cell.prompt.label: cell.prompt for _, cells in columns for cell in cells}
    encoded_prompts = _encode_texts(run, jobs, [variant for variant, _ in columns])
    inputs = making.encode_all_inputs(run, list(jobs.values()), Failures(strict=True))
    groups: list[LoraGroup] = []
    for variant, cells in columns:
        variant_texts = encoded_prompts[variant.label]
        cells_ready = [EncodedJob(clip, variant_texts[job.label], inputs[job.label]) for job, clip in cells]
        groups.append(LoraGroup(variant.uses, cells_ready))
    all_ready = [cell for group in groups for cell in group.jobs]
    for _ in making.denoise_all(run, all_ready, Failures(strict=True), load_for_groups(run, groups)):
        pass  # `decode_cells` reads the latents from the files


def _encode_texts(
    run: GenerationRun, jobs: Mapping[str, GenerationJob], variants: Sequence[Variant]
) -> dict[str, dict[str, Mapping[int, EncodedPrompts]]]:
    """Encode the prompts for each column."""
    # Columns whose LoRAs do not change text encoders share the results.
    prompts = [select_prompts(job.prepared, run.options.guidance) for job in jobs.values()]
    texts_without_loras = dict(zip(jobs, run.session.encode_texts(prompts), strict=True))
    encoded_by_label: dict[str, dict[str, Mapping[int, EncodedPrompts]]] = {}
    for variant in variants:
        encoded_by_label[variant.label] = texts_without_loras
        loras = TextLoras(variant.uses[0], run.options.lora_rounding)
        if not loras.is_empty:
            encoded = run.session.encode_with_loras(loras, prompts)
            encoded_by_label[variant.label] = dict(zip(jobs, encoded, strict=True))
    return encoded_by_label


def decode_cells(run: GenerationRun, cells: Sequence[GenerationJob]) -> dict[str, Path]:
    """Decode the latents of comparison cells to clips; return the paths of all clips by label.

    Latent files are removed unless --output_type asks for them.
    """
    cell_files = {cell.label: _files(run, cell) for cell in cells}

    def read_latents(cell: GenerationJob, path: Path) -> GenerationJob:
        saved = load_latents(path)
        preview = path.with_name(f"{cell.stem}{PREVIEW_SUFFIX}")
        return replace(cell, latent_path=path, preview=preview, latents=saved.latents, audio=saved.audio)

    missing = [cell for cell in cells if not cell_files[cell.label].video.exists()]
    if missing:
        denoised = (read_latents(cell, cell_files[cell.label].latents) for cell in missing)
        making.decode_all(run, denoised, Failures(strict=True), are_named=False)
    return {label: paths.video for label, paths in cell_files.items()}


def write_grid(
    run: GenerationRun, variants: Sequence[Variant], jobs: Sequence[GenerationJob], paths: Mapping[str, Path]
) -> list[Path]:
    """Write the page, the sheet and the video of all clips under a new name; return their paths.

    Columns are LoRA files; rows are prompts at each strength. Each row starts with the clip without LoRA.

    Args:
        run: The run.
        variants: Columns of the grid.
        jobs: Videos or images to generate.
        paths: Paths of the clips, by label.
    """
    without_lora = variants[0]
    with_lora = variants[1:]
    # each strength once, in order; one row for each prompt if there is no LoRA
    strengths = list(dict.fromkeys(variant.strength for variant in with_lora if variant.strength)) or [""]
    columns = tuple(dict.fromkeys(variant.column for variant in variants))
    variant_at = {(variant.column, variant.strength): variant for variant in with_lora}
    rows: list[Row] = []
    for job, strength in product(jobs, strengths):
        # columns without a strength are repeated in each row: those without LoRA, and with --beside alone
        row_variants = [
            variant_at.get((column, strength)) or variant_at.get((column, ""), without_lora)
            for column in columns
        ]
        row = _make_row(
            run.family.experts,
            job,
            strength,
            variants=row_variants,
            paths=paths,
        )
        rows.append(row)
    folder = run.options.output.save_path
    grid = ClipGrid(columns, tuple(rows))
    with reserve_stem(folder, f"compare_{datetime.now():%Y%m%d-%H%M%S}") as stem:
        # The prompt of a single job, or the names of the compared training runs. Numbers of epochs or steps
        # are removed: file x-000010 belongs to run x.
        if len(jobs) == 1:
            title = shorten_prompt(jobs[0].prepared.request.prompt)
        else:
            trainings = [re.sub(r"-(step)?\d+$", "", name) for name in columns[1:]]
            title = ", ".join(dict.fromkeys(trainings))
        return write_grids(folder, stem, grid, title=title)


def _make_row(
    experts: Sequence[Expert],
    job: GenerationJob,
    strength: str,
    variants: Sequence[Variant],
    paths: Mapping[str, Path],
) -> Row:
    """Return the row of one prompt at one strength in a comparison."""
    steps = format_count(job.prepared.num_steps, "step")
    return Row(
        prompt=job.prepared.request.prompt,
        fps=job.prepared.fps,
        paths=tuple(paths[f"{job.label}, {variant.label}"] for variant in variants),
        details=f"{job.label}, seed {job.prepared.seed}, {steps}",
        strength=strength,
        commands=tuple(_command(experts, variant) for variant in variants),
    )


def _command(experts: Sequence[Expert], variant: Variant) -> str:
    """Return the options that select this column's LoRAs in a generation script, as a command line."""
    words: list[str] = []
    for expert, uses in zip(experts, variant.uses, strict=True):
        weight = network_setup.LORA_OPTIONS[network_setup.get_lora_key(expert)]
        multiplier = weight.replace("weight", "multiplier")
        if uses:
            words += [weight, *(str(use.lora.path) for use in uses)]
            words += [multiplier, *(f"{use.multiplier:g}" for use in uses)]
    return quote_command(words)
