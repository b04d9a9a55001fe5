"""Compare LoRAs: every prompt with every LoRA at every strength, on a model that is loaded once.

A clip that was finished by an earlier run with the same settings and the same LoRA is kept, so that an
interrupted comparison goes on with the same command.
"""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from pathlib import Path

from blissful_tuner.metadata import CREATED, as_tags, lora_name
from generation import dressing, making
from generation.experts import plan_turns
from generation.grid_options import CompareOptions
from generation.memory import resolve_options
from generation.options import GenerationOptions
from generation.outputs import LATENT_SUFFIX, PREVIEW_SUFFIX, own_stem, words_of
from generation.progress import NAMING, in_short
from generation.prompt_lines import lines_of
from generation.request import GenerationJob, GenerationRun, make_job, of_each_line
from generation.run import check_models, explain_lack, make_session
from generation.session import wanted_texts
from generation.sheets import ClipGrid, Row, write_grids
from modules.atomic_write import make_folder
from modules.checkpoints.model_files import load_latents
from modules.command import as_typed
from modules.compile import check_compilation
from modules.console import count_of, in_words, show_box
from modules.contract.family import Family
from modules.contract.rules import Expert
from modules.devices import Failures, allow_fp16_accumulation, choose_device, peak_in_words
from modules.errors import OptionError, UserError
from modules.media.reading import read_tags
from modules.planning.device_memory import room_on
from networks.apply import OriginalWeights
from networks.loading import LoraUse, on_side
from networks.text_loras import TextLoras

SEED = "0"  # if the command line and a prompt line give none: all columns need the same one
FIRST_TIMESTEP = 1000.0
WITHOUT = "without LoRA"


@dataclass(frozen=True)
class Variant:
    """A column: a LoRA at a strength, or no LoRA; with several experts, one LoRA for each."""

    column: str
    strength: str  # "x 0.6"; empty without LoRA
    uses: tuple[tuple[LoraUse, ...], ...]  # by expert
    sha256: Mapping[str, str]  # of the files, by the name that metadata give them

    @property
    def label(self) -> str:
        return f"{self.column} {self.strength}".rstrip()


Cell = tuple[GenerationJob, GenerationJob]  # a prompt, and its clip in one column


@explain_lack("Finished clips are kept: the same command goes on.")
def compare(family: Family, options: GenerationOptions, asked: CompareOptions) -> None:
    """Make all clips that are missing, then the grids. Raises UserError."""
    _check(options)
    start, device = time.monotonic(), choose_device(options.device)
    if options.optimized:
        options = dressing.leave_out_missing(family, options, device)
    output = replace(options.output, no_progressive_save=True)
    options = replace(options, output=output)
    if options.request.seed is None:
        options = replace(options, request=replace(options.request, seed=SEED))
    if options.speed.fp16_accumulation:
        allow_fp16_accumulation(device)
    check_compilation(options.speed.compilation.choice, device)
    variants = make_variants(
        family.experts, dressing.expert_loras(family.experts, options, with_texts=True), asked.lora_multiplier
    )
    options, predicted = resolve_options(family, options, device, room_on(device))
    session = make_session(family, options, dressing.dit_loader(family, (), device, options), keep=False)
    run = GenerationRun(family, options, session, predicted)
    lines, failures = lines_of(options.from_file), Failures(strict=options.from_file is None)
    jobs = [*of_each_line(run, lines, failures, make_job).values()]
    failures.raise_if_any(len(lines))
    making.tell_unused_sources(options.request.source, jobs)
    check_models(run)
    run = run.with_previews()
    make_folder(options.output.save_path, "--save_path")
    cells = {
        variant.label: [(job, make_cell(run, variant, job, line)) for line, job in enumerate(jobs, 1)]
        for variant in variants
    }
    to_make = []
    for variant in variants:
        pairs = [pair for pair in cells[variant.label] if not any(map(Path.exists, _files(options, pair[1])))]
        to_make += [(variant, pairs)] if pairs else []
    missing = sum(len(pairs) for _, pairs in to_make)
    total = len(variants) * len(jobs)
    kept = f", {total - missing} of them made before" if missing < total else ""
    show_box(
        "Comparing",
        [
            ("model", ", ".join(filter(None, map(family.metadata.get, NAMING)))),
            ("columns", "\n".join(re.sub(r"\s+", " ", variant.label) for variant in variants)),
            ("prompts", f"{len(jobs)}; the first: {in_short(jobs[0].prepared.asked.prompt)}"),
            ("clips", f"{count_of(total, 'clip')}{kept}"),
            ("folder", str(options.output.save_path)),
        ],
    )
    if to_make:
        denoise_cells(run, to_make)
    paths = decode_cells(run, [cell for pairs in cells.values() for _, cell in pairs])
    grids = write_grid(run, variants, jobs, paths)
    costs = [("time", in_words(time.monotonic() - start)), ("peak memory", peak_in_words(device))]
    show_box("Comparison is finished", [("look at", "\n".join(map(str, grids))), *costs])


def _check(options: GenerationOptions) -> None:
    taken = ("images", "latent_images") if options.output.pictures else ("video", "both")
    refused = {
        "--interactive": options.interactive,
        "--sheet": options.sheet.sheet is not None,
        "--latent_path": bool(options.latent_path),
        "--save_merged_model": options.save_merged_model is not None,
        "--num_videos": options.num_videos > 1,
        "--prompt_rewrite": options.rewriting.prompt_rewrite is not None,
        "--plan": options.speed.plan.is_asked,
        **dict.fromkeys(options.speed.shared_by, True),
        f"--output_type {options.output.output_type}": options.output.output_type not in taken,
        "--no_metadata": options.output.no_metadata,
        "--keep_pngs": options.output.format.keep_pngs,
        "--post": bool(options.post.tools),
        "--save_last_frame": options.output.save_last_frame,
        f"The file {options.output.file_name} of --save_path": bool(options.output.file_name),
    }
    found = [name for name, is_given in refused.items() if is_given]
    if found:
        raise OptionError(f"{found[0]} has no meaning for a comparison: leave it out")


def make_variants(
    experts: Sequence[Expert], uses: dressing.LorasByExpert, strengths: Sequence[float]
) -> list[Variant]:
    """Return the columns: without LoRA, then every file at every strength.

    uses: by expert. Files at the same position in each expert's list share a column, named after the first.
    """
    variants = [Variant(WITHOUT, "", ((),) * len(experts), {})]
    count = max(map(len, uses), default=0)
    # by column: one file for each expert, or none
    columns = [[of_expert[index : index + 1] for of_expert in uses] for index in range(count)]
    first = [next(found[0] for found in column if found) for column in columns]
    names = [use.lora.path.stem for use in first]
    for column, use, name in zip(columns, first, names, strict=True):
        shown = name if names.count(name) == 1 else f"{use.lora.path.parent.name}/{name}"
        sha256 = {
            f"{lora_name(dressing.key_of(expert))}_sha256_0": _hash(found[0].lora.path)
            for expert, found in zip(experts, column, strict=True)
            if found
        }
        for strength in dict.fromkeys(strengths):
            of_experts = tuple(tuple(replace(one, multiplier=strength) for one in found) for found in column)
            variants.append(Variant(shown, f"x {strength:g}", of_experts, sha256))
    return variants


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_cell(run: GenerationRun, variant: Variant, job: GenerationJob, line: int) -> GenerationJob:
    """Return the job of a prompt in a column, with its name: line, seed and column.

    If other clips already have this name, `_` is appended: existing files with the stem are of exactly this
    clip.
    """
    loras = {
        dressing.key_of(expert): [(use.lora.path.name, use.multiplier) for use in uses]
        for expert, uses in zip(run.family.experts, variant.uses, strict=True)
    }
    metadata = dict(run.metadata(job.prepared, loras) or {})
    metadata |= {f"bt_{name}": sha256 for name, sha256 in variant.sha256.items()}
    column = words_of(variant.label.replace(".", "_")) or "lora"
    mark = hashlib.sha256(f"{variant.label} {' '.join(variant.sha256.values())}".encode()).hexdigest()[:6]
    stem = f"{line:03d}_{job.prepared.seed}_{column}_{mark}"
    cell = GenerationJob(f"{job.label}, {variant.label}", job.prepared, stem, metadata)
    while not _is_own(run.options, cell):
        cell = replace(cell, stem=f"{cell.stem}_")
    return cell


def _files(options: GenerationOptions, cell: GenerationJob) -> tuple[Path, Path]:
    """Return the paths of the finished clip or picture, and of its latents."""
    if cell.prepared.frames > 1:
        suffix = options.output.format.suffix
    else:
        suffix = "_000.png" if options.output.numbers_single else ".png"
    folder = options.output.save_path
    return folder / f"{cell.stem}{suffix}", folder / f"{cell.stem}{LATENT_SUFFIX}"


def _is_own(options: GenerationOptions, cell: GenerationJob) -> bool:
    """Return whether existing files of this name are of exactly this clip; True if there are none."""
    video, latents = _files(options, cell)

    def about_making(tags: Mapping[str, str]) -> dict[str, str]:
        ours = {name: text for name, text in tags.items() if name.startswith("bt_") and text}
        return {name: text for name, text in ours.items() if name != f"bt_{CREATED}"}

    own = about_making(as_tags(cell.metadata or {}))
    try:
        if video.exists() and about_making(read_tags(video)) != own:
            return False
        return not latents.exists() or about_making(load_latents(latents).metadata) == own
    except (UserError, OSError):
        return False  # damaged, or another program's


def denoise_cells(run: GenerationRun, columns: Sequence[tuple[Variant, Sequence[Cell]]]) -> None:
    """Make the latents of these clips; each is written when it is done."""
    jobs = {job.label: job for _, cells in columns for job, _ in cells}
    wanted = [wanted_texts(job.prepared, run.options.guidance) for job in jobs.values()]
    texts = dict(zip(jobs, run.session.texts(wanted), strict=True))
    changed = {}
    for variant, _ in columns:
        loras = TextLoras(variant.uses[0])
        if not loras.is_empty:
            found = run.session.texts_with(loras, wanted)
            changed[variant.label] = dict(zip(jobs, found, strict=True))
    inputs = making.encode_all_inputs(run, list(jobs.values()), Failures(strict=True))
    ready = [
        (
            variant,
            [(cell, changed.get(variant.label, texts)[job.label], inputs[job.label]) for job, cell in cells],
        )
        for variant, cells in columns
    ]
    whole = [one for _, of_variant in ready for one in of_variant]
    for _ in making.denoise_all(run, whole, Failures(strict=True), networks_with(run, ready)):
        pass  # read again when they are decoded


def networks_with(
    run: GenerationRun, columns: Sequence[tuple[Variant, Sequence[making.Ready]]]
) -> making.Networks:
    """Yield the clips of each column with the networks that have its LoRAs.

    A network is loaded once and its weights are changed. It is loaded again for each column only if its
    weights are in 8 bits, swapped or compiled, or if there are several experts: copies of the original
    weights would then double the host memory.
    """
    family, options, dits = run.family, run.options, run.session.dits
    speed = options.speed
    is_plain = speed.fp8.quantisation is None and not speed.swap.number and speed.compilation.choice is None
    if not is_plain or len(family.experts) > 1:
        for variant, ready in columns:
            loader = dressing.dit_loader(family, variant.uses, dits.device, options)
            dits.load, dits.load_aside = loader, loader.aside
            with dits.phase(plan_turns(family, [job.prepared for job, _, _ in ready])) as dit_at:
                yield ready, dit_at
        return
    of_dit = [on_side(variant.uses[0], False) for variant, _ in columns]
    originals = OriginalWeights([use for uses in of_dit for use in uses])
    loader = dressing.dit_loader(family, (), dits.device, options, [originals])
    dits.load, dits.load_aside = loader, loader.aside
    requests = [job.prepared for _, ready in columns for job, _, _ in ready]
    with dits.phase(plan_turns(family, requests)) as dit_at:
        for (_, ready), uses in zip(columns, of_dit, strict=True):
            originals.switch(dit_at(FIRST_TIMESTEP), uses)
            yield ready, dit_at


def decode_cells(run: GenerationRun, cells: Sequence[GenerationJob]) -> dict[str, Path]:
    """Turn latents into clips; latent files stay only if --output_type asks for them. Return all by label."""
    paths = {cell.label: _files(run.options, cell) for cell in cells}

    def read_latents(cell: GenerationJob, path: Path) -> GenerationJob:
        saved, preview = load_latents(path), path.with_name(f"{cell.stem}{PREVIEW_SUFFIX}")
        cell = replace(cell, latent_path=path, preview=preview)
        return replace(cell, latents=saved.latents, sound=saved.sound)

    missing = [cell for cell in cells if not paths[cell.label][0].exists()]
    if missing:
        done = (read_latents(cell, paths[cell.label][1]) for cell in missing)
        making.decode_all(run, done, Failures(strict=True), are_named=False)
    return {label: video for label, (video, _) in paths.items()}


def write_grid(
    run: GenerationRun, variants: Sequence[Variant], jobs: Sequence[GenerationJob], paths: Mapping[str, Path]
) -> list[Path]:
    """Write the page, the sheet and the video of all clips under a new name; return their paths.

    Columns are files, rows are prompts at each strength; the clip without LoRA stands in each of them. paths:
    of the clips, by their labels.
    """
    without, *others = variants
    strengths = tuple(dict.fromkeys(variant.strength for variant in others)) or ("",)
    columns = tuple(dict.fromkeys(variant.column for variant in variants))
    of_place = {(variant.column, variant.strength): variant for variant in others}
    rows = []
    for job, strength in product(jobs, strengths):
        in_row = [of_place.get((column, strength), without) for column in columns]
        rows.append(
            Row(
                job.prepared.asked.prompt,
                job.prepared.fps,
                tuple(paths[f"{job.label}, {variant.label}"] for variant in in_row),
                f"{job.label}, seed {job.prepared.seed}, {count_of(job.prepared.num_steps, 'step')}",
                strength,
                tuple(_command(run.family.experts, variant) for variant in in_row),
            )
        )
    # the trainings that saved the files: x for x-000010 and x-step00000020
    trainings = dict.fromkeys(re.sub(r"-(step)?\d+$", "", name) for name in columns[1:])
    title = in_short(jobs[0].prepared.asked.prompt) if len(jobs) == 1 else ", ".join(trainings)
    with own_stem(run.options.output.save_path, f"compare_{datetime.now():%Y%m%d-%H%M%S}") as stem:
        return write_grids(run.options.output.save_path, stem, ClipGrid(columns, tuple(rows)), title)


def _command(experts: Sequence[Expert], variant: Variant) -> str:
    """Return the generation script's options for this column's LoRAs."""
    words: list[str] = []
    for expert, uses in zip(experts, variant.uses, strict=True):
        weight = dressing.LORA_OPTIONS[dressing.key_of(expert)]
        multiplier = weight.replace("weight", "multiplier")
        for use in uses:
            words += [weight, str(use.lora.path), multiplier, f"{use.multiplier:g}"]
    return as_typed(words)
