"""Check a run's options and file headers before gigabytes are loaded; name given options without effect."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch.nn import Parameter

from modules.atomic_write import check_space
from modules.contract.family import Family
from modules.errors import OptionError
from modules.installation import import_own
from modules.offload.swap_plan import check_swap
from modules.options import is_given, option_name
from modules.planning.dry_run import quiet
from modules.speed_options import TRAINING_FLAGS
from networks.adapter import check_network
from networks.added import refuse_dora
from networks.apply import check_loras_fit
from networks.loading import LoraUse, read_lora
from networks.lora_settings import DEFAULT_RANK
from networks.own_kinds import OWN_MODULES
from networks.own_modules import smallest_lora_bytes
from training.data.live import LiveTexts
from training.experts import (
    TRAINING_ADAPTER,
    check_experts,
    network_for,
    read_adapter,
    read_lora_for,
)
from training.noise_options import MIXTURES, NOTHING, SIZE_SHIFTS, WEIGHTS_OF_LOSS
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import make_optimizer
from training.options import RANKED_NETWORKS, TrainingOptions


def check_before_loading(
    family: Family, options: TrainingOptions, total_steps: int, sampling: Family | None = None
) -> None:
    """Raise UserError for a run that is impossible.

    The optimizer and its schedule are made once for a stand-in of a weight. total_steps: of the whole run.
    sampling: the model of samples, if it is another one.
    """
    family.check_given_files()
    if sampling is not None:
        sampling.check_given_files()
    check_experts(family, options)
    if sampling is not None and options.speed.sharding.shard_base:
        raise OptionError(
            "--shard_base: samples by further transformers need networks that take turns, which are not "
            "split over processes. Leave --sample_dit_other or --turbo_dit out"
        )
    counts = family.block_counts()
    swap = options.speed.swap
    if counts and isinstance(swap.blocks_to_swap, int):
        check_swap(family.dit, swap.number, counts)
    with quiet():
        stand_in: Mapping[str, object] = {
            "params": [Parameter(torch.zeros(2, 2))],
            "lr": options.optimizer.learning_rate,
        }
        optimizer, _ = make_optimizer(options.optimizer, [stand_in])
        make_lr_schedule(options.lr_schedule, optimizer, total_steps)
    check_networks(family, options)
    samples, of_samples = options.samples, sampling or family
    if samples.preview.preview_latent_every is not None:
        import_own("blissful_tuner.latent_preview").check_preview(samples.preview, of_samples.latent)
    with quiet():
        if samples.are_made and samples.sample_prompts is not None:
            import_own("training.samples").read_requests(of_samples, samples.sample_prompts)
        for expert, file in zip_longest(of_samples.experts, of_samples.dit_files):
            uses = [LoraUse(read_lora_for(path, expert), strength) for path, strength in samples.loras()]
            for use in uses:
                refuse_dora(use.lora, "--sample_lora")
            if file is not None:
                check_loras_fit(file, uses)
    folder, name = options.saving.output_dir, options.saving.output_name
    if folder is not None and name is not None and folder.is_dir():
        check_space(folder / f"{name}.safetensors", _smallest_file(family, options))


def check_networks(family: Family, options: TrainingOptions) -> None:
    """Check the module, its settings, and the LoRAs that the networks start from."""
    counts = family.block_counts()
    depths = dict(zip(family.dit.block_lists, counts, strict=True)) if counts else {}
    for expert, file in zip_longest(family.experts, family.dit_files):
        network = network_for(options, expert)
        if network is None:
            return
        module = network.network_module or family.lora_module
        own = OWN_MODULES.get(module)
        if own is None and options.speed.sharding.shard_base:
            raise OptionError(
                f"--shard_base with --network_module {module}: modules of other packages may read whole "
                f"weights, and each process has parts of them. Use one of {', '.join(OWN_MODULES)}"
            )
        if own is not None and own.rules is not None and module != family.lora_module:
            # its rules name layers of another model: only those that happen to be called the same would learn
            raise OptionError(
                f"--network_module {module} is for another model than this script trains. Give "
                f"{family.lora_module}, or leave the option out"
            )
        files = zip(network.base_weights or (), network.base_multipliers(), strict=True)
        with quiet():  # all warnings come again when it is made
            check_network(network, module, depths)
            uses = [LoraUse(read_lora_for(path, expert), multiplier) for path, multiplier in files]
            if network.network_weights is not None and own is not None:
                uses.append(LoraUse(read_lora(network.network_weights, with_texts=True)))
            adapter = read_adapter(options, expert, family.experts)
            if adapter is not None:
                refuse_dora(adapter.lora, TRAINING_ADAPTER)
                uses.append(adapter)
            if file is not None:
                check_loras_fit(file, uses)


def check_teacher(family: Family, options: TrainingOptions, texts: LiveTexts) -> None:
    """Raise OptionError if --teacher is given and nothing can be told to it, or not from caches."""
    asked = options.frozen.teacher
    if asked is None:
        return
    if not family.fuller:
        raise OptionError(
            f"--teacher {asked}: there is nothing that the model {family.name} can be told besides, so that "
            "the teacher would know no more than the network. Leave it out"
        )
    if texts.encoders:
        names = " and ".join(encoder.name for encoder in texts.encoders)
        raise OptionError(
            f"--teacher {asked}: captions are encoded while training here, by {names}, and the teacher's "
            "come from caches. Cache them (--cache_text_encoder_outputs), train the transformer alone "
            "(--network_train_unet_only), or leave --teacher out"
        )


def _smallest_file(family: Family, options: TrainingOptions) -> int:
    """Return the bytes that one trained file has at least, as far as that is known."""
    network = options.network
    if network is None:  # half: a file in float32 may be saved in 16 bits
        return sum(file.stat().st_size for file in family.dit_files if file.is_file()) // 2
    files = family.dit_files if options.by_expert.lora_per_expert else family.dit_files[:1]
    is_ranked = (network.network_module or family.lora_module).startswith(RANKED_NETWORKS)
    if not is_ranked or network.arguments() or network.dim_from_weights:  # not in every module
        return 0
    return sum(smallest_lora_bytes(file, network.network_dim or DEFAULT_RANK) for file in files)


WITH_CYCLES = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
CURVES_OF = {  # options that some curves alone use
    "lr_decay_steps": WITH_CYCLES[2:],
    "lr_scheduler_num_cycles": WITH_CYCLES,
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": WITH_CYCLES[1:],
}


def list_unused_options(options: TrainingOptions, takes_guidance: bool, shifts_table: bool) -> list[str]:
    """Return one line for each given option that has no effect beside the others.

    takes_guidance: the model has an input for embedded guidance. shifts_table: see
    `NoiseSpec.table_is_shifted`.
    """
    times, saving, logs, hub = options.timesteps, options.saving, options.logs, options.hub
    loss, network, own_defaults = options.loss, options.network, options.is_for_images
    sampler, weighting = times.timestep_sampling, times.weighting_scheme
    shifts = sampler == "shift" or (sampler == "sigma" and shifts_table)
    draws = sampler in {"logsnr", "qinglong_flux"} or (sampler, weighting) == ("sigma", "logit_normal")
    class_is_given, curve = bool(options.lr_schedule.lr_scheduler_type), options.lr_schedule.lr_scheduler
    by_epoch = saving.save_every_n_epochs is not None or saving.save_n_epoch_ratio is not None
    by_step = saving.save_every_n_steps is not None or saving.save_every_n_minutes is not None
    uses_wandb, uploads = "wandb" in logs.trackers, hub.huggingface_repo_id is not None
    without_samples = not options.samples.are_made, "no samples are made"
    without_tracker = not logs.trackers, "nothing is logged without --logging_dir or --log_with"
    without_wandb = not uses_wandb, "wandb is not used without --log_with wandb"
    not_uploaded = "nothing is uploaded without --huggingface_repo_id"
    kept_alpha = network is not None and network.network_weights is not None
    parts = options.parts
    trains = (parts is None or parts.trains_dit), (parts is not None and parts.trains_texts)
    rates = (None, None) if parts is None else (parts.unet_lr, parts.text_encoder_lr)
    replaced = all(rate is not None for rate, learns in zip(rates, trains, strict=True) if learns)
    no_guidance = not takes_guidance and not own_defaults  # image families' defaults have one, and a shift
    # names of options -> whether they do nothing, and why
    rules: list[tuple[str, bool, str]] = [
        ("discrete_flow_shift", not (shifts or own_defaults), "only --timestep_sampling shift uses it"),
        (
            "sigmoid_scale",
            sampler not in {"sigmoid", "shift", *SIZE_SHIFTS, *MIXTURES},
            "only --timestep_sampling sigmoid and shift use it",
        ),
        (
            "logit_mean logit_std",
            not draws,
            "only --weighting_scheme logit_normal and --timestep_sampling logsnr use it",
        ),
        (
            "preserve_distribution_shape",
            times.min_timestep is None and times.max_timestep is None,
            "there is neither --min_timestep nor --max_timestep",
        ),
        ("guidance_scale", no_guidance, "this model has no input for embedded guidance"),
        (
            "huber_schedule huber_c huber_scale",
            not loss.has_threshold,
            "only --loss_type huber and smooth_l1 use it",
        ),
        (
            "huber_scale",
            loss.has_threshold and loss.huber_schedule == "snr",
            "--huber_schedule snr does not use it",
        ),
        ("upcast_quantization", not options.speed.fp8.fp8_scaled, "it needs --fp8_base --fp8_scaled"),
        (
            "network_dim",
            network is not None and network.dim_from_weights,
            "--dim_from_weights takes ranks from the file",
        ),
        ("network_alpha", kept_alpha, "the alphas in the file of --network_weights count"),
        ("learning_rate", replaced, "--unet_lr and --text_encoder_lr replace it"),
        ("unet_lr", not trains[0], "the transformer does not learn"),
        ("text_encoder_lr", not trains[1], "the text encoders do not learn"),
        ("mode_scale", (sampler, weighting) != ("sigma", "mode"), "only --weighting_scheme mode uses it"),
        ("training_comment", options.metadata.no_metadata, "--no_metadata leaves it out"),
        ("lr_scheduler lr_warmup_steps", class_is_given, "--lr_scheduler_type replaces it"),
        (
            "lr_warmup_steps",
            curve == "piecewise_constant" and not class_is_given,
            "piecewise_constant has no warm-up",
        ),
        *(
            (name, class_is_given or curve not in by, f"only --lr_scheduler {', '.join(by)} uses it")
            for name, by in CURVES_OF.items()
        ),
        ("resume_changed", saving.resume is None, "there is no --resume"),
        ("sample_lora preview_latent_every sample_ema", *without_samples),
        ("ema_update_every", options.average.ema_decay is None, "there is no --ema_decay"),
        ("log_prefix", logs.logging_dir is None, "there is no --logging_dir"),
        ("log_tracker_name log_tracker_config log_config", *without_tracker),
        ("wandb_run_name wandb_api_key", *without_wandb),
        (
            "wandb_run_name",
            uses_wandb and logs.log_tracker_config is not None,
            "--log_tracker_config replaces it",
        ),
        (
            "huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility",
            not uploads,
            not_uploaded,
        ),
        ("huggingface_token", not (uploads or hub.resume_from_huggingface), not_uploaded),
    ]
    for kind, is_saved in (("epochs", by_epoch), ("steps", by_step)):
        needed = f"--save_every_n_{kind}"
        has_states = is_saved and saving.save_state
        rules.append((f"save_last_n_{kind}", not is_saved, f"there is no {needed}"))
        rules.append((f"save_last_n_{kind}_state", not has_states, f"it needs --save_state and {needed}"))
    shown = f"weighting_scheme {weighting}"
    is_of_loss, is_of_sigma = weighting in WEIGHTS_OF_LOSS, weighting in {"logit_normal", "mode"}
    lines = []
    if is_of_loss and options.weighted_by == NOTHING:
        lines = [
            f"--{shown} has no effect: it weights the loss only with --model_prediction_type sigma_scaled."
        ]
    elif is_of_sigma and sampler != "sigma":
        lines = [f"--{shown} has no effect: it shapes the draws of --timestep_sampling sigma only."]
    given = set(_given_names(options))
    for names, is_idle, why in rules:
        lines += [f"--{name} has no effect: {why}." for name in names.split() if is_idle and name in given]
    attention = options.speed.attention
    for flag in attention.ignored:
        lines.append(f"{flag} has no effect: {TRAINING_FLAGS[attention.choice.mode]} comes first.")
    return lines


def _given_names(record: Any) -> Iterator[str]:
    """Yield the public names of the options that have another value than their default."""
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from _given_names(value)
        elif is_given(record, field):
            yield option_name(field)
