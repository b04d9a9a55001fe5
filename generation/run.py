"""Modes of a generation script: one prompt, a prompt file, interactive, decode only, save a merged model."""

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from blissful_tuner.metadata import frame_rate_in, read_decoded_metadata, seed_in
from generation.asking import line_reader, ring_after
from generation.dressing import DitLoader, LorasByExpert, dit_loader, expert_loras, leave_out_missing
from generation.experts import DitTurns
from generation.making import decode, make_outputs, make_tracks
from generation.options import GenerationOptions
from generation.outputs import SUFFIXES, FrameTools, output_stem, own_stem, save_pixels
from generation.progress import show_end
from generation.prompt_lines import find_option, is_blank, lines_of
from generation.request import GenerationRun, make_job, of_each_line, seed_of
from generation.script_options import LATENT_OUTPUTS, UNDECODED
from generation.session import Session
from modules.atomic_write import make_folder
from modules.attention.attend import check_backend
from modules.checkpoints.model_files import SavedLatents, load_latents
from modules.command import refuse_other_splits
from modules.contract.family import Family, hears_sound
from modules.contract.loading import Placement
from modules.devices import Failures, allow_fp16_accumulation, choose_device
from modules.dressing import have_joined, shared_blocks
from modules.errors import CheckpointError, OptionError, OutputError
from modules.installation import import_own
from modules.offload.swap_plan import check_swap
from modules.output_files import refuse_replacing
from modules.planning.device_memory import room_on, too_little

logger = logging.getLogger(__name__)

STRENGTHS = "lora_strengths"  # key of a line's option for the strengths of the LoRAs


def decode_files(run: GenerationRun, paths: Sequence[Path]) -> None:
    """Decode latent files; outputs get their metadata and the settings of this decoding."""
    saved = [check_latents(run.family, path) for path in paths]
    if run.post is not None:
        for path, one in zip(paths, saved, strict=True):
            run.post.check_length(
                (one.latents.shape[2] - 1) * run.family.latent.stride[0] + 1, f"--latent_path {path}"
            )
    options, output = run.options, run.options.output
    if output.file_name:
        output.check_file_name((saved[0].latents.shape[2] - 1) * run.family.latent.stride[0] + 1)
    failures = Failures(strict=len(paths) == 1)
    start, results = time.monotonic(), []
    make_folder(output.save_path, "--save_path")
    tracks = make_tracks(
        run, {str(path): one.sound for path, one in zip(paths, saved, strict=True)}, failures.note_errors
    )
    with run.session.media(images=False, again=False) as encoders:
        for path, one in zip(paths, saved, strict=True):
            if str(path) in failures.reasons:  # its sound
                continue
            with failures.note_errors(str(path)):
                fps, usual = options.request.fps, run.family.defaults.fps
                if fps in (None, usual):  # --fps is not given
                    fps = frame_rate_in(one.metadata) or usual
                said = read_decoded_metadata(one.metadata, options.settings, options.decoding_options, fps)
                metadata = None if output.no_metadata else said
                seed = seed_in(one.metadata)
                name = output_stem(datetime.now(), seed, path, start=output.name_start)
                with own_stem(output.save_path, name, SUFFIXES[1:]) as stem:  # the latents have it already
                    chunks, track = decode(run.family, encoders, one.latents), tracks.get(str(path))
                    results.append(save_pixels(output, stem, chunks, fps, metadata, run.post, track))
                    if len(paths) > 1:
                        logger.info("%s: %s", path, results[-1])
    if results:
        show_end(results, time.monotonic() - start, run.session.device, len(failures.reasons))
    failures.raise_if_any(len(paths))


def check_latents(family: Family, path: Path) -> SavedLatents:
    """Load a latent file. Raises CheckpointError if it is not of this family's latent space."""
    saved = load_latents(path)
    _, channels, frames, rows, columns = saved.latents.shape
    if channels != family.latent.channels:
        raise CheckpointError(
            f"--latent_path {path} has {channels} channels, {family.source.who} has {family.latent.channels}",
            path,
        )
    if saved.sound is not None:
        _, channels, _, bands = saved.sound.shape
        fps, spec = family.defaults.fps, family.sound if hears_sound(family) else None
        shape = None if spec is None else spec.shape(frames, fps)
        if shape is None:
            logger.warning("--latent_path %s: its sound is left out because this model makes none", path)
        elif (shape[0], shape[2]) != (channels, bands):
            raise CheckpointError(
                f"--latent_path {path}: its sound has {channels} x {bands} values at a time, "
                f"{family.source.who} has {shape[0]} x {shape[2]}",
                path,
            )
    step, vertical, horizontal = family.latent.stride
    size = columns * horizontal, rows * vertical, (frames - 1) * step + 1
    if not frames:
        logger.info("%s: sound alone", path)
        return saved
    logger.info("%s: %d x %d (width x height), %d frame%s", path, *size, "" if size[2] == 1 else "s")
    return saved


@contextlib.contextmanager
def explain_lack(stays: str) -> Iterator[None]:
    """Turn a lack of memory in the block into a UserError. stays: what is kept, and how to go on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise too_little(error, stays) from error


@explain_lack("Finished latents are kept: --latent_path decodes them.")
def generate(family: Family, options: GenerationOptions, device: torch.device | None = None) -> None:
    """Run the mode that the options select, in all processes that make prompts together.

    device: of this process, if several have joined; None: as the options say. Raises UserError; with
    --from_file only after all lines that work are generated.
    """
    refuse_other_splits()
    if device is None and options.speed.shared_by:
        import_own("generation.together").generate_together(generate, family, options)
        return
    device = device or choose_device(options.device)
    if options.optimized and not options.latent_path:  # decoding runs no transformer
        options = leave_out_missing(family, options, device)
    if options.speed.fp16_accumulation:
        allow_fp16_accumulation(device)
    # read first, so that a wrong file shows at once; a merged model is the DiT alone
    uses = expert_loras(family.experts, options, with_texts=options.save_merged_model is None)
    if options.save_merged_model is not None:
        save_merged_model(family, uses, options.save_merged_model, device)
        return
    if options.speed.compilation.choice is not None:
        import_own("modules.compile").check_compilation(options.speed.compilation.choice, device)
    if options.speed.plan.is_asked:
        if options.post.tools:
            logger.warning("--plan does not count what the networks of --post take beside the VAE")
        import_own("generation.memory").plan_generation(family, options, device)
        return
    room, predicted = room_on(device), None
    if room is not None or options.speed.swap.is_auto:
        options, predicted = import_own("generation.memory").resolve_options(family, options, device, room)
    session = make_session(family, options, dit_loader(family, uses, device, options), options.interactive)
    post = make_post(options, device) if options.post.tools else None
    rewriter, asked = None, options.rewriting
    if asked.prompt_rewrite is not None and asked.prompt_rewrite_model is not None:
        rewriting = import_own("blissful_tuner.prompt_rewrite")
        rewriter = rewriting.PromptRewriter(asked.prompt_rewrite_model, asked.prompt_rewrite)
    run = GenerationRun(family, options, session, predicted, rewriter, post=post)
    if options.speed.shared_by:
        # what befalls one process: it ends the others, which wait for its parts of the blocks or its passes
        run = replace(run, fatal=(RuntimeError, OutputError, CheckpointError))
    if options.speed.cfg_parallel and have_joined():
        shared = import_own("generation.together").SharedPasses(options.speed.sharding, device)
        run = replace(run, run_passes=shared, processes=shared.processes)
    if options.latent_path:
        decode_files(run, options.latent_path)
        return
    check_models(run)
    for file, of_expert in zip(family.dit_files, uses, strict=False):
        if of_expert:
            import_own("networks.apply").check_loras_fit(file, of_expert, family.file_beside(file))
    if options.preview.preview_latent_every is not None:
        run = run.with_previews()
    if options.interactive:
        converse(run)
    elif options.from_file is not None or options.sheet.sheet is not None:
        make_lines(run)
    else:
        make_prompt(run)


def make_post(options: GenerationOptions, device: torch.device) -> FrameTools:
    """Return the tools of --post, checked. They are imported by name, as PostOptions explains."""
    post: FrameTools = import_own("post.stages").PostTools(options.post.tools, device)
    post.check()
    if post.hides and options.output.output_type in LATENT_OUTPUTS:
        logger.warning(
            "The latents of --output_type %s hold the video as it is before %s.",
            *(options.output.output_type, " and ".join(options.post.tools.labels)),
        )
    return post


def with_strengths(run: GenerationRun, text: str | None) -> GenerationRun:
    """Return the run with these strengths of its LoRAs; if they change, its networks are freed and read anew.

    text: numbers separated by commas, one for each LoRA; None: as they are. Raises OptionError if it cannot
    be read.
    """
    options = run.options
    if text is None:
        return run
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise OptionError(f"--m {text}: give numbers separated by commas, such as 1,0.5") from None
    count = len(options.lora.lora_weight or ())
    if len(numbers) != count:
        raise OptionError(f"--m {text}: there are {count} LoRAs. Give a number for each")
    if numbers == tuple(options.lora.multipliers()):
        return run
    options = replace(options, lora=replace(options.lora, lora_multiplier=numbers))
    uses = expert_loras(run.family.experts, options, with_texts=True)
    loader = dit_loader(run.family, uses, run.session.device, options)
    run.session.free()  # callers hold the old run for as long as the console is open
    return replace(run, options=options, session=make_session(run.family, options, loader, keep=True))


def make_session(family: Family, options: GenerationOptions, loader: DitLoader, keep: bool) -> Session:
    """Make the session of a run. keep: networks stay in host memory for the next prompt."""
    never_beside, lazy = options.experts.offload_inactive_dit, options.experts.lazy_loading
    if len(family.experts) == 1:
        given = {"--offload_inactive_dit": never_beside, "--lazy_loading": lazy}
        for option in (option for option, is_given in given.items() if is_given):
            logger.warning("%s is ignored because a single transformer takes no turns", option)
        never_beside = lazy = False
    blocks = shared_blocks(options.speed.sharding, loader.device)
    aside, together = (loader.aside, False) if blocks is None else (None, True)
    dits = DitTurns(
        family.experts,
        loader.device,
        loader,
        aside,
        keep=keep,
        never_beside=never_beside,
        lazy=lazy,
        together=together,
    )
    uses, texts = loader.uses[0] if loader.uses else (), None
    if uses and (
        any(use.lora.text_tensors for use in uses) or import_own("networks.loading").on_side(uses, True)
    ):
        texts = import_own("networks.text_loras").TextLoras(uses)
    return Session(family, loader.device, dits, texts, blocks)


def make_prompt(run: GenerationRun) -> None:
    """Generate the prompt of the command line, --num_videos times with seeds that follow one another."""
    request, count = run.options.request, run.options.num_videos
    words = re.findall(r" --([A-Za-z_]+) \S", f" {request.prompt}")
    typed = [f"--{word}" for word in words if find_option(word, run.options.line_options)]
    if typed:
        logger.warning(
            "%s in --prompt is text that the model reads: such options are for lines of --from_file and "
            "--interactive. On the command line they have their full names",
            " ".join(typed),
        )
    if count == 1:
        jobs = [make_job(run, "the prompt", {})]
    else:
        first = None if request.seed is None else seed_of(request.seed)
        seeds = [{} if first is None else {"seed": first + number} for number in range(count)]
        kind = "picture" if run.options.output.pictures else "video"
        jobs = [make_job(run, f"{kind} {number}", seed) for number, seed in enumerate(seeds, 1)]
    failures = Failures(strict=count == 1)
    make_outputs(run, jobs, failures)
    failures.raise_if_any(count)


def check_models(run: GenerationRun) -> None:
    """Raise UserError if a model file that every prompt needs is missing or of another kind.

    Also raises it if the chosen attention is not available. Loads nothing.
    """
    placement = Placement(run.session.device, attention=run.options.speed.attention.choice)
    check_backend(
        placement.attention, placement.device, lambda: run.family.compute_dtype(placement), training=False
    )
    if run.options.preview.preview_latent_every is not None:
        previews = import_own("blissful_tuner.latent_preview")
        previews.check_preview(run.options.preview, run.family.latent)
    run.family.check_files(media=run.options.output.output_type not in UNDECODED)
    run.family.check_given_files()
    counts = run.family.block_counts()
    if counts:
        if run.options.speed.swap.number:
            check_swap(run.family.dit, run.options.speed.swap.number, counts)
        layers = run.options.guidance.skipped_layers
        own = sum(counts[:-1] if run.family.dit.side_list else counts)
        if layers and max(layers) >= own:
            raise OptionError(
                f"--slg_layers: there is no block {max(layers)}, the model has blocks 0 to {own - 1}"
            )


def save_merged_model(family: Family, uses: LorasByExpert, path: Path, device: torch.device) -> None:
    """Write the network's file with the LoRAs merged in, tensor by tensor.

    uses: by expert. With several experts, `_low_noise` and the like are appended to the names; no file is
    written for an expert without LoRAs. Names and shapes of all are compared before the first is written.
    """
    files, experts = family.dit_files, family.experts
    named = len(files) > 1
    targets = [path.with_name(f"{path.stem}_{one.name}{path.suffix}") if named else path for one in experts]
    changed = [index for index in range(len(files)) if uses[index] or not named]
    if not changed:
        raise OptionError("--save_merged_model has nothing to merge: give --lora_weight or the like")
    for index in changed:
        read = [*files, *(use.lora.path for use in uses[index])]
        refuse_replacing("--save_merged_model", targets[index], read)
        if (beside := family.file_beside(files[index])) is not None:
            raise OptionError(
                f"--save_merged_model {path}: the model is in two files, {files[index]} and {beside}. Use "
                "merge_lora.py --dit FILE for each of them; it warns of what the other one has"
            )
        import_own("networks.apply").check_loras_fit(files[index], uses[index])
    for index, expert in enumerate(experts):
        if index in changed:
            import_own("networks.merging").merge_into_file(files[index], uses[index], targets[index], device)
        else:
            logger.warning(f"There is no LoRA for the {expert.words}: {files[index]} is used as it is")


def make_lines(run: GenerationRun) -> None:
    """Generate every prompt line, or its sheet, phase by phase, so that each network is loaded once."""
    path, failures = run.options.from_file, Failures()
    lines = lines_of(path)
    count = len(lines)
    if run.options.sheet.sheet is not None:
        count = import_own("generation.sheets").make_sheets(run, lines, failures)
    else:
        jobs = [*of_each_line(run, lines, failures, make_job).values()]
        if jobs:
            make_outputs(run, jobs, failures)
    failures.raise_if_any(count, "" if path is None else f"{path}: ")


def converse(run: GenerationRun) -> None:
    """Read prompts from the console until the end of input. Ctrl-C cancels the current prompt."""
    remembers = run.options.remembers_lines
    ask = line_reader(
        ((letter, option.key) for letter, option in run.options.line_options.items()),
        " Options hold for the prompts after it; an empty line quits." if remembers else "",
    )
    is_shared = have_joined()
    if is_shared:
        ask = import_own("generation.together").read_together(ask)
    said: dict[str, Any] = {}
    while True:
        try:
            line = ask()
            if remembers and not line.strip():
                return
            if is_blank(line):
                continue
            failures = Failures()
            with ring_after(run.options.output.bell), failures.note_errors("the prompt", run.fatal):
                if run.options.sheet.sheet is not None:
                    import_own("generation.sheets").make_sheets(run, {"the prompt": line}, failures)
                    continue
                values = dict(run.read_line(line))
                values = {**said, **values} if remembers else values
                run = with_strengths(run, values.get(STRENGTHS))
                job = make_job(run, "the prompt", values)
                said = values  # of a line that can be made; nothing reads it unless lines are remembered
                make_outputs(run, [job], failures)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            if is_shared:  # the others are in the midst of the prompt
                raise
            sys.stdout.write("\n")
            logger.warning("The prompt is cancelled. quit or Ctrl-D ends.")
