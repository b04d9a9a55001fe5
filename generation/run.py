"""Modes of a generation script: one prompt, a prompt file, interactive, decode only, save a merged model."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blissful_tuner.metadata import (
    read_decoded_metadata,
    read_frame_rate,
    read_stored_seed,
    read_visible_region,
)
from generation.experts import ExpertOffloader
from generation.loaded_networks import Session
from generation.making import decode, make_outputs, make_tracks
from generation.network_setup import (
    DitLoader,
    LorasByExpert,
    dit_loader,
    expert_loras,
    leave_out_missing,
    list_loras,
)
from generation.options import GenerationOptions
from generation.outputs import SUFFIXES, FrameTools, output_stem, reserve_stem, save_pixels
from generation.progress import show_end
from generation.prompt_lines import find_option, lines_of
from generation.request import GenerationRun, make_job, map_lines, seed_of
from generation.script_options import LATENT_OUTPUTS, UNDECODED
from modules.atomic_write import make_folder
from modules.attention.attend import check_backend
from modules.devices import Failures, allow_fp16_accumulation, freeze_libraries, select_device
from modules.errors import CheckpointError, OptionError, OutputError
from modules.installation import DRIVEN
from modules.media.tracks import Track
from modules.output_files import reject_replacing
from protocols.data import MediaEncoders
from protocols.families import HIGH_NOISE
from protocols.family import Family, trains_audio
from protocols.loading import BlockSharder, Placement
from protocols.requests import Box
from runtime.offload.joining import have_joined, launched_processes
from runtime.offload.swap_plan import check_swap
from runtime.planning.device_memory import device_memory_to_plan, too_little
from runtime.ways.composing import (
    count_shared_passes,
    make_block_sharder,
    make_passes,
    reject_other_splits,
)

if TYPE_CHECKING:  # loaded only with --latent_path, or with LoRAs of text encoders
    from checkpoints.model_files import SavedLatents
    from networks.text_loras import TextLoras

logger = logging.getLogger(__name__)


def decode_files(run: GenerationRun, paths: Sequence[Path]) -> None:
    """Decode latent files; outputs have the files' metadata and the settings of this decoding."""
    saved_latents = {path: check_latents(run.family, path) for path in paths}
    _check_lengths(run, saved_latents)
    failures = Failures(strict=len(paths) == 1)
    start = time.monotonic()
    make_folder(run.options.output.save_path, "--save_path")
    audios = {str(path): saved_latents[path].audio for path in paths}
    tracks = make_tracks(run, audios, failures.collect_errors)
    decoded: list[Path] = []
    with run.session.media(with_image_encoder=False, needed_again=False) as encoders:
        for path in paths:
            label = str(path)
            if label in failures.reasons:  # its audio could not be decoded
                continue
            with failures.collect_errors(label):
                video = _decode_file(run, encoders, path, saved=saved_latents[path], track=tracks.get(label))
                decoded.append(video)
                if len(paths) > 1:
                    logger.info("%s: %s", path, video)
    if decoded:
        show_end(decoded, time.monotonic() - start, run.session.device, len(failures.reasons))
    failures.raise_if_any(len(paths))


def _check_lengths(run: GenerationRun, files: "Mapping[Path, SavedLatents]") -> None:
    """Raise OptionError if the number of frames does not suit --post or the suffix of --save_path."""
    latent = run.family.latent
    frames = {path: latent.count_frames(saved.latents.shape[2]) for path, saved in files.items()}
    if run.post is not None:
        for path, count in frames.items():
            run.post.check_length(count, f"--latent_path {path}")
    output = run.options.output
    if output.file_name:
        first_path = next(iter(files))
        output.check_file_name(frames[first_path])


def _decode_file(
    run: GenerationRun, encoders: MediaEncoders, path: Path, saved: "SavedLatents", track: Track | None
) -> Path:
    """Decode one latent file and return the path of the result."""
    options = run.options
    output = options.output
    fps = options.request.fps
    default_fps = run.family.defaults.fps
    if fps in (None, default_fps):  # --fps is not given, so the file's own rate is used
        fps = read_frame_rate(saved.metadata) or default_fps
    metadata = read_decoded_metadata(saved.metadata, options.settings, options.decoding_options, fps)
    name = output_stem(datetime.now(), read_stored_seed(saved.metadata), path, start=output.name_start)
    # SUFFIXES[0] is the suffix of latents: the latent file being decoded may have this stem itself
    with reserve_stem(output.save_path, name, SUFFIXES[1:]) as stem:
        return save_pixels(
            output,
            stem,
            decode(run.family, encoders, saved.latents, _read_visible_region(run.family, path, saved)),
            fps=fps,
            metadata=None if output.no_metadata else metadata,
            post=run.post,
            track=track,
            latent=run.family.latent,
        )


def _read_visible_region(family: Family, path: Path, saved: "SavedLatents") -> Box | None:
    """Return the region to crop decoded pixels to, if the file's metadata name one; None for all pixels.

    Raises:
        CheckpointError: If the region exceeds the decoded pixels.
    """
    box = read_visible_region(saved.metadata)
    if box is None:
        return None
    *_, rows, columns = saved.latents.shape
    _, row_stride, column_stride = family.latent.stride
    fits_in_height = 0 < box.height <= rows * row_stride - box.top
    fits_in_width = 0 < box.width <= columns * column_stride - box.left
    if not fits_in_height or not fits_in_width:
        raise CheckpointError(
            f"--latent_path {path}: its metadata name a region outside the image ({box.width} x "
            f"{box.height} pixels from {box.left}, {box.top}). Make the latents again",
            path,
        )
    return box


def check_latents(family: Family, path: Path) -> "SavedLatents":
    """Load a latent file, and check that the model family can decode it.

    Raises:
        CheckpointError: If the latents are not from this family's latent space.
    """
    from blissful_tuner.video_to_video import check_latent_space  # only with --latent_path
    from checkpoints.model_files import load_latents

    saved = load_latents(path)
    _, channels, latent_frames, rows, columns = saved.latents.shape
    if channels != family.latent.channels:
        raise CheckpointError(
            f"--latent_path {path} has {channels} channels, {family.source.model_label} has "
            f"{family.latent.channels}",
            path,
        )
    check_latent_space(
        saved, family.source, path, f"--latent_path {path}", "Decode them with the script of that model"
    )
    if saved.audio is not None:
        _check_audio(family, path, saved.audio, latent_frames)
    if not latent_frames:
        logger.info("%s: sound alone", path)
        return saved
    _, row_stride, column_stride = family.latent.stride
    frames = family.latent.count_frames(latent_frames)
    logger.info(
        "%s: %d x %d (width x height), %d frame%s",
        path,
        columns * column_stride,
        rows * row_stride,
        frames,
        "" if frames == 1 else "s",
    )
    return saved


def _check_audio(family: Family, path: Path, audio: Tensor, latent_frames: int) -> None:
    """Check the audio in a latent file; warn if the family generates no audio.

    Args:
        family: The model family.
        path: Path of the file.
        audio: Audio latents, 1 C T M.
        latent_frames: Number of latent frames of the video.

    Raises:
        CheckpointError: If the audio latents are not from this family's latent space.
    """
    fps = family.defaults.fps
    spec = family.audio if trains_audio(family) else None
    if spec is None:
        logger.warning("--latent_path %s: its sound is left out because this model makes none", path)
        return
    expected_shape = list(spec.shape(latent_frames, fps))
    shape = list(audio.shape[1:])
    for axes in (shape, expected_shape):
        del axes[spec.time_axis]  # the length may differ
    if shape != expected_shape:
        raise CheckpointError(
            f"--latent_path {path}: its sound has {' x '.join(map(str, shape))} values per time step, "
            f"{family.source.model_label} has {' x '.join(map(str, expected_shape))}",
            path,
        )


@contextlib.contextmanager
def explain_lack(advice: str) -> Iterator[None]:
    """Convert an out-of-memory error in the `with` block to a UserError.

    Args:
        advice: Sentence for the message: which results are kept, and how to continue.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise too_little(error, advice) from error


@explain_lack("Finished latents are kept: --latent_path decodes them.")
def generate(family: Family, options: GenerationOptions, device: torch.device | None = None) -> None:
    """Run the mode that the options select: plan, merge, decode or generate.

    If several processes share each prompt, this call starts them.

    Args:
        family: The model family.
        options: Options of the run.
        device: Device of this process if it is one of several; None for the device in the options.

    Raises:
        UserError: If something fails. With --from_file, all other lines are generated first.
    """
    freeze_libraries()
    reject_other_splits()
    if device is None and options.speed.modes.flags:
        from generation.multi_process import generate_together  # only with several processes

        generate_together(generate, family, options)
        return
    device = device or select_device(options.device)
    if options.optimized and not options.latent_path:  # decoding runs no transformer
        options = leave_out_missing(family, options, device)
    if options.speed.fp16_accumulation:
        allow_fp16_accumulation(device)
    # LoRAs are read first, so that a wrong file is reported immediately. --save_merged_model writes only the
    # DiT and needs no changes of text encoders
    loras_by_expert = expert_loras(family, options, with_texts=options.save_merged_model is None)
    if any(lora_use.lora.embeddings for loras in loras_by_expert for lora_use in loras):
        from networks.text_loras import with_words_of  # only with words in LoRA files

        family = with_words_of(family, loras_by_expert)
    if options.textual_inversion_embeddings:
        from generation.embedding_marks import with_embeddings  # only with embeddings

        family = with_embeddings(family, options.textual_inversion_embeddings)
    if options.save_merged_model is not None:
        save_merged_model(family, loras_by_expert, options.save_merged_model, device, options.lora_rounding)
        return
    if options.speed.compilation.choice is not None:
        from runtime.compile import check_compilation  # only with --compile

        check_compilation(options.speed.compilation.choice, device)
    if options.speed.plan.is_planning:
        _print_plan(family, options, device)
        return
    run = _make_run(family, options, loras_by_expert, device)
    if options.latent_path:
        decode_files(run, options.latent_path)
        return
    check_models(run)
    _check_loras(family, loras_by_expert)
    if options.preview.preview_latent_every is not None:
        run = run.with_previews()
    if options.interactive and os.environ.get(DRIVEN):
        from generation.json_requests import serve_requests  # only from the browser

        serve_requests(run, change_strengths, Path(os.environ[DRIVEN]))
    elif options.interactive:
        from generation.conversation import converse  # only with --interactive

        converse(run, change_strengths)
    elif options.from_file is not None or options.sheet.sheet is not None:
        make_lines(run)
    else:
        make_prompt(run)


def _print_plan(family: Family, options: GenerationOptions, device: torch.device) -> None:
    """Print the memory plan of --plan for one GPU or several."""
    if options.post.tools:
        logger.warning("--plan does not count what the networks of --post take in addition to the VAE")
    cards, card_size = options.speed.plan.cards
    device_memory = device_memory_to_plan(device, card_size)
    if cards > 1:
        from generation.multi_process import plan_divisions  # only with --plan

        assert device_memory is not None, "--plan gives each of several cards a size"
        plan_divisions(family, options, device, cards=cards, device_memory=device_memory)
    else:
        from generation.memory import plan_generation  # only with --plan

        plan_generation(family, options, device, device_memory)


def _make_run(
    family: Family, options: GenerationOptions, loras_by_expert: LorasByExpert, device: torch.device
) -> GenerationRun:
    """Return the run for these options, without previews and without loading the family's networks."""
    device_memory = device_memory_to_plan(device) if device.type == "cuda" else None
    predicted = None
    if device_memory is not None or options.speed.swap.is_auto:
        from generation.memory import resolve_options  # only where memory is planned

        options, predicted = resolve_options(family, options, device, device_memory)
    session = make_session(
        family, options, dit_loader(family, loras_by_expert, device, options), options.interactive
    )
    post = make_post(options, device) if options.post.post else None
    rewriter = None
    rewriting = options.rewriting
    if rewriting.prompt_rewrite is not None and rewriting.prompt_rewrite_model is not None:
        from blissful_tuner.prompt_rewrite import PromptRewriter  # only with --prompt_rewrite

        rewriter = PromptRewriter(rewriting.prompt_rewrite_model, rewriting.prompt_rewrite)
    run = GenerationRun(family, options, session, predicted=predicted, rewriter=rewriter, post=post)
    if options.speed.modes.flags:
        # these errors may occur in a single process. They must end the run, because the other processes would
        # wait forever for this one's blocks or passes
        run = replace(run, fatal=(RuntimeError, OutputError, CheckpointError))
        shared_passes = make_passes(options.speed, device) if have_joined() else None
        if shared_passes is not None:
            processes = count_shared_passes(options.speed, launched_processes())
            run = replace(run, run_passes=shared_passes, processes=processes)
    return run


def _check_loras(family: Family, loras_by_expert: LorasByExpert) -> None:
    """Raise CheckpointError if LoRAs do not fit the transformer's files, before the transformer is loaded."""
    if family.noise.keeps_variance and any(loras_by_expert):
        from networks.predictions import compare_predictions  # only with LoRAs

        metadata_by_path = {
            lora_use.lora.path: lora_use.lora.metadata for loras in loras_by_expert for lora_use in loras
        }
        compare_predictions(metadata_by_path, family.noise.predicts_v)
    for file, loras in zip(family.dit_files, loras_by_expert, strict=False):
        if loras:
            from networks.apply import check_loras_fit  # only with LoRAs

            check_loras_fit(file, loras, family.file_beside(file), family.name)


def make_post(options: GenerationOptions, device: torch.device) -> FrameTools:
    """Return the --post tools of the options, after checking their model files."""
    from postprocessing.stages import PostTools  # only with --post

    post: FrameTools = PostTools(options.post.tools, device)
    post.check()
    if post.hides_content and options.output.output_type in LATENT_OUTPUTS:
        logger.warning(
            "The latents of --output_type %s contain the video before %s.",
            options.output.output_type,
            " and ".join(options.post.tools.labels),
        )
    return post


def change_strengths(run: GenerationRun, strengths: Mapping[str, Sequence[float]]) -> GenerationRun:
    """Return the run with new LoRA strengths; if they differ, its networks are freed and loaded again.

    Args:
        run: The run.
        strengths: Expert -> strength of each of its files, in order; "" is the only or low-noise expert.
            Missing experts keep theirs.

    Raises:
        OptionError: If a number is missing or not finite.
    """
    options = run.options
    current = {expert: [strength for _, strength in loras] for expert, loras in list_loras(options).items()}
    new = {**current, **{expert: list(numbers) for expert, numbers in strengths.items()}}
    if new == current:
        return run
    for expert, numbers in new.items():
        if len(numbers) != len(current.get(expert, ())):
            raise OptionError(f"{len(numbers)} strengths for {len(current.get(expert, ()))} LoRAs")
    lora = replace(options.lora, lora_multiplier=tuple(new[""]))  # "": the only or the low-noise expert
    experts = replace(options.experts, lora_multiplier_high_noise=tuple(new[HIGH_NOISE]))
    options = replace(options, lora=lora, experts=experts)
    loras_by_expert = expert_loras(run.family, options, with_texts=True)
    loader = dit_loader(run.family, loras_by_expert, run.session.device, options)
    run.session.free()  # callers may still have the old run
    return replace(run, options=options, session=make_session(run.family, options, loader, keep=True))


def make_session(family: Family, options: GenerationOptions, loader: DitLoader, keep: bool) -> Session:
    """Make the session of a run, which loads and moves its networks.

    Args:
        family: The model family.
        options: Options of the run.
        loader: Loads the experts.
        keep: Whether networks stay in host memory for the next prompt.
    """
    one_at_a_time = options.experts.offload_inactive_dit
    lazy = options.experts.lazy_loading
    if len(family.experts) == 1:
        ignored = {"--offload_inactive_dit": one_at_a_time, "--lazy_loading": lazy}
        for option, is_given in ignored.items():
            if is_given:
                logger.warning("%s is ignored because there is only one transformer", option)
        one_at_a_time = False
        lazy = False
    # splits the blocks of every network over the processes
    block_sharder: BlockSharder | None = None
    if options.speed.modes.hooks.make_block_sharder:
        block_sharder = make_block_sharder(options.speed, loader.device)
    dits = ExpertOffloader(
        family.experts,
        loader.device,
        loader,
        # no prefetching with split blocks, which all processes read together
        loader.load_to_host if block_sharder is None else None,
        keep=keep,
        one_at_a_time=one_at_a_time,
        lazy=lazy,
        all_stay_on_device=block_sharder is not None,
    )
    return Session(
        family,
        loader.device,
        dits,
        text_loras=_make_text_loras(loader.loras_by_expert, options.lora_rounding),
        blocks=block_sharder,
    )


def _make_text_loras(loras_by_expert: LorasByExpert, rounding: str) -> "TextLoras | None":
    """Return the LoRAs of text encoders and of networks that are loaded with them; None if there are none.

    Args:
        loras_by_expert: LoRA files by expert; the text encoders use those of the first expert.
        rounding: Value of --lora_rounding.
    """
    if not loras_by_expert or not loras_by_expert[0]:
        return None
    from networks.loading import select_network_part  # only with LoRAs

    first_loras = loras_by_expert[0]
    has_text_tensors = any(lora_use.lora.text_tensors for lora_use in first_loras)
    if not has_text_tensors and not select_network_part(first_loras, of_text_encoders=True):
        return None
    from networks.text_loras import TextLoras  # only with LoRAs of text encoders

    return TextLoras(first_loras, rounding)


def make_prompt(run: GenerationRun) -> None:
    """Generate the prompt of the command line, --num_videos times with consecutive seeds."""
    request = run.options.request
    count = run.options.num_videos
    # options of a prompt line that the user typed into the text of --prompt
    option_words = re.findall(r" --([A-Za-z_]+) \S", f" {request.prompt}")
    line_options = [f"--{word}" for word in option_words if find_option(word, run.options.line_options)]
    if line_options:
        logger.warning(
            "%s in --prompt is text that the model reads: such options are for lines of --from_file and "
            "--interactive. On the command line they have their full names",
            " ".join(line_options),
        )
    if count == 1:
        jobs = [make_job(run, "the prompt", {})]
    else:
        first_seed = None if request.seed is None else seed_of(request.seed)
        kind = "picture" if run.options.output.pictures else "video"
        jobs = []
        for index in range(count):
            overrides = {} if first_seed is None else {"seed": first_seed + index}
            jobs.append(make_job(run, f"{kind} {index + 1}", overrides))
    failures = Failures(strict=count == 1)
    make_outputs(run, jobs, failures)
    failures.raise_if_any(count)


def check_models(run: GenerationRun) -> None:
    """Raise UserError if a model file that every prompt needs is missing or of the wrong kind.

    It also raises UserError if the selected attention is not available. Nothing is loaded.
    """
    placement = Placement(run.session.device, attention=run.options.speed.attention.choice)
    check_backend(
        placement.attention, placement.device, lambda: run.family.compute_dtype(placement), training=False
    )
    if run.options.preview.preview_latent_every is not None:
        from blissful_tuner.latent_preview import check_preview  # only with previews

        check_preview(run.options.preview, run.family.latent)
    run.family.check_files(media=run.options.output.output_type not in UNDECODED)
    counts = run.family.block_counts()
    if counts:
        if run.options.speed.swap.blocks_to_swap:
            check_swap(run.family.dit, run.options.speed.swap.number, counts)
        layers = run.options.guidance.skipped_layers
        num_blocks = sum(counts[:-1] if run.family.dit.side_list else counts)  # without side blocks
        if layers and max(layers) >= num_blocks:
            raise OptionError(
                f"--slg_layers: there is no block {max(layers)}, the model has blocks 0 to {num_blocks - 1}"
            )


def save_merged_model(
    family: Family, loras_by_expert: LorasByExpert, path: Path, device: torch.device, rounding: str
) -> None:
    """Write the transformer with the LoRAs merged in, one file per expert.

    With several experts, the expert's name is appended to the file name (`_low_noise`), and an expert without
    LoRAs gets no file. All names and shapes are checked before the first file is written.

    Args:
        family: The model family.
        loras_by_expert: LoRA files by expert.
        path: Path of the file.
        device: Device of the run.
        rounding: Value of --lora_rounding.
    """
    files = family.dit_files
    experts = family.experts
    has_several_experts = len(files) > 1
    targets = [path]
    if has_several_experts:
        targets = [path.with_name(f"{path.stem}_{expert.name}{path.suffix}") for expert in experts]
    # an expert without LoRAs is left out; a model with one expert is written even without LoRAs
    merged_indices = [
        index for index in range(len(files)) if loras_by_expert[index] or not has_several_experts
    ]
    if not merged_indices:
        raise OptionError("--save_merged_model has nothing to merge: give --lora_weight or the like")
    from networks.apply import check_loras_fit  # only with --save_merged_model
    from networks.merging import merge_into_file

    for index in merged_indices:
        sources = [*files, *(lora_use.lora.path for lora_use in loras_by_expert[index])]
        reject_replacing("--save_merged_model", targets[index], sources)
        second_file = family.file_beside(files[index])
        if second_file is not None:
            raise OptionError(
                f"--save_merged_model {path}: the model is in two files, {files[index]} and {second_file}. "
                "Use merge_lora.py --dit FILE for each of them; it warns of what the other one has"
            )
        check_loras_fit(files[index], loras_by_expert[index])
    for index, expert in enumerate(experts):
        if index in merged_indices:
            merge_into_file(files[index], loras_by_expert[index], targets[index], device, rounding=rounding)
        else:
            logger.warning(f"There is no LoRA for the {expert.description}: {files[index]} is used unchanged")


def make_lines(run: GenerationRun) -> None:
    """Generate all lines of --from_file, or their sheets, phase by phase: each network is loaded once."""
    path = run.options.from_file
    failures = Failures()
    lines = lines_of(path)
    count = len(lines)
    if run.options.sheet.sheet is not None:
        from generation.sheets import make_sheets  # only with --sheet

        count = make_sheets(run, lines, failures)
    else:
        jobs = list(map_lines(run, lines, failures, make_job).values())
        if jobs:
            make_outputs(run, jobs, failures)
    failures.raise_if_any(count, "" if path is None else f"{path}: ")
