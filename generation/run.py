"""Modes of a generation script: one prompt, a prompt file, interactive, decode only, save a merged model."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from generation.experts import ExpertOffloader
from generation.loaded_networks import Session
from generation.making import make_outputs
from generation.network_setup import (
    DitLoader,
    LorasByExpert,
    dit_loader,
    expert_loras,
    leave_out_missing,
    list_loras,
    with_blocks,
)
from generation.options import GenerationOptions
from generation.outputs import FrameTools
from generation.prompt_lines import find_option, read_prompt_lines
from generation.request import GenerationRun, make_job, map_lines, parse_seed
from generation.script_options import LATENT_OUTPUTS, UNDECODED
from modules.attention.attend import check_backend
from modules.devices import Failures, allow_fp16_accumulation, freeze_libraries, select_device
from modules.errors import CheckpointError, OptionError, OutputError
from modules.installation import DRIVEN
from protocols.families import HIGH_NOISE
from protocols.family import Family
from protocols.loading import BlockSharder, Placement
from runtime.offload.joining import have_joined, launched_processes
from runtime.offload.swap_plan import check_swap
from runtime.planning.device_memory import device_memory_to_plan, too_little
from runtime.ways.composing import (
    count_shared_passes,
    make_block_sharder,
    make_passes,
    reject_other_splits,
)

if TYPE_CHECKING:  # loaded only with LoRAs of text encoders
    from networks.text_loras import TextLoras

logger = logging.getLogger(__name__)


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
    has_lora_words = any(lora_use.lora.embeddings for loras in loras_by_expert for lora_use in loras)
    if has_lora_words or options.textual_inversion_embeddings:
        family = _with_trained_words(
            family, loras_by_expert if has_lora_words else (), options.textual_inversion_embeddings or ()
        )
    if options.save_merged_model is not None:
        from generation.merged_models import save_merged_model  # only with --save_merged_model

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
        from generation.saved_latents import decode_files  # only with --latent_path

        decode_files(run, options.latent_path)
    else:
        _generate_prompts(run, loras_by_expert)


def _with_trained_words(family: Family, loras_by_expert: LorasByExpert, files: Sequence[Path]) -> Family:
    """Add the words that LoRA files and files of embeddings have trained to the family's text encoders."""
    if loras_by_expert:
        from networks.text_loras import add_lora_words  # only with words in LoRA files

        family = add_lora_words(family, loras_by_expert)
    if files:
        from generation.embedding_marks import with_embeddings  # only with embeddings

        family = with_embeddings(family, files)
    return family


def _generate_prompts(run: GenerationRun, loras_by_expert: LorasByExpert) -> None:
    """Generate the prompts of the browser, a conversation, a prompt file or the command line."""
    options = run.options
    check_models(run)
    check_loras(run.family, loras_by_expert)
    if options.preview.preview_latent_every is not None:
        run = run.with_previews()
    if options.interactive and os.environ.get(DRIVEN):
        from generation.json_requests import serve_requests  # only from the browser

        serve_requests(run, change_loras, Path(os.environ[DRIVEN]))
    elif options.interactive:
        from generation.conversation import converse  # only with --interactive

        converse(run, change_loras)
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


def check_loras(family: Family, loras_by_expert: LorasByExpert) -> None:
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


def change_loras(
    run: GenerationRun, strengths: Mapping[str, Sequence[float]], blocks: Sequence[str] | None
) -> GenerationRun:
    """Return the run with new LoRA strengths; if they differ, its networks are freed and loaded again.

    Args:
        run: The run.
        strengths: Expert -> strength of each of its files, in order; "" is the only or low-noise expert.
            Missing experts keep theirs.
        blocks: Strengths of blocks, a text for each LoRA file; None for none.

    Raises:
        OptionError: If a number is missing or not finite, or if strengths of blocks do not fit the files.
    """
    options = run.options
    current = {expert: [strength for _, strength in loras] for expert, loras in list_loras(options).items()}
    new = {**current, **{expert: list(numbers) for expert, numbers in strengths.items()}}
    if new == current and tuple(blocks or ()) == (options.lora_patterns.lora_blocks or ()):
        return run
    for expert, numbers in new.items():
        if len(numbers) != len(current.get(expert, ())):
            raise OptionError(f"{len(numbers)} strengths for {len(current.get(expert, ()))} LoRAs")
    options = with_blocks(options, blocks)
    if new[""]:  # the only or the low-noise expert
        options = replace(options, lora=replace(options.lora, lora_multiplier=tuple(new[""])))
    if new[HIGH_NOISE]:
        experts = replace(options.experts, lora_multiplier_high_noise=tuple(new[HIGH_NOISE]))
        options = replace(options, experts=experts)
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
    """Return the LoRAs of text encoders and of networks that are loaded with them; None if there are none."""
    if not loras_by_expert or not loras_by_expert[0]:
        return None
    from networks.loading import select_network_part  # only with LoRAs

    first_loras = loras_by_expert[0]
    has_text_tensors = any(lora_use.lora.text_tensors for lora_use in first_loras)
    if not has_text_tensors and not select_network_part(first_loras, selects_text_encoders=True):
        return None
    from networks.text_loras import TextLoras  # only with LoRAs of text encoders

    return TextLoras(first_loras, rounding)


def make_prompt(run: GenerationRun) -> None:
    """Generate the prompt of the command line, --num_videos times with consecutive seeds."""
    # options of a prompt line that the user typed into the text of --prompt
    option_words = re.findall(r" --([A-Za-z_]+) \S", f" {run.options.request.prompt}")
    line_options = [f"--{word}" for word in option_words if find_option(word, run.options.line_options)]
    if line_options:
        logger.warning(
            "%s in --prompt is text that the model reads: such options are for lines of --from_file and "
            "--interactive. On the command line they have their full names",
            " ".join(line_options),
        )
    if run.options.num_videos > 1:
        # --num_videos times; an error in one of the videos does not stop the others
        request = run.options.request
        count = run.options.num_videos
        first_seed = None if request.seed is None else parse_seed(request.seed)
        kind = "image" if run.options.output.pictures else "video"
        jobs = []
        for index in range(count):
            overrides = {} if first_seed is None else {"seed": first_seed + index}
            jobs.append(make_job(run, f"{kind} {index + 1}", overrides))
        failures = Failures()
        make_outputs(run, jobs, failures)
        failures.raise_if_any(count)
    else:
        make_outputs(run, [make_job(run, "the prompt", {})], Failures(strict=True))


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


def make_lines(run: GenerationRun) -> None:
    """Generate all lines of --from_file, or their sheets, phase by phase: each network is loaded once."""
    path = run.options.from_file
    failures = Failures()
    lines = read_prompt_lines(path)
    count = len(lines)
    if run.options.sheet.sheet is not None:
        from generation.sheets import make_sheets  # only with --sheet

        count = make_sheets(run, lines, failures)
    else:
        jobs = list(map_lines(run, lines, failures, make_job).values())
        if jobs:
            make_outputs(run, jobs, failures)
    failures.raise_if_any(count, "" if path is None else f"{path}: ")
