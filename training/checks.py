"""Check a run's options and file headers before gigabytes are loaded; name given options without effect."""

from collections.abc import Mapping
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from blissful_tuner.latent_preview import check_preview
from modules.atomic_write import check_space
from modules.contract.family import Family
from modules.contract.rules import Expert
from modules.errors import OptionError
from modules.offload.swap_plan import check_swap
from modules.options import is_given, option_name
from modules.planning.dry_run import quiet
from modules.speed_options import TRAINING_FLAGS
from networks.adapter import check_network
from networks.added import refuse_dora
from networks.apply import check_loras_fit
from networks.loading import LoraUse, read_lora
from networks.lora_settings import DEFAULT_RANK
from networks.own_modules import OWN_MODULES, smallest_lora_bytes
from training.experts import check_experts, network_for, read_lora_for
from training.learning_options import LrScheduleOptions
from training.noise_options import MIXTURES, NOTHING, SIZE_SHIFTS, WEIGHTS_OF_LOSS
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import make_optimizer
from training.options import RANKED_NETWORKS, TrainingOptions
from training.samples import read_requests
from training.saving.options import SavingOptions


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
    _check_networks(family, options)
    _check_samples(sampling or family, options)
    _check_room(family, options)


def _check_networks(family: Family, options: TrainingOptions) -> None:
    """Check the module, its settings, and the LoRAs that the networks start from."""
    counts = family.block_counts()
    depths = dict(zip(family.dit.block_lists, counts, strict=True)) if counts else {}
    for expert, file in zip_longest(family.experts, family.dit_files):
        network = network_for(options, expert)
        if network is None:
            return
        module = network.network_module or family.lora_module
        own = OWN_MODULES.get(module)
        if own is not None and own.rules is not None and module != family.lora_module:
            # its rules name layers of another model: only those that happen to be called the same would learn
            raise OptionError(
                f"--network_module {module} is for another model than this script trains. Give "
                f"{family.lora_module}, or leave the option out"
            )
        files = zip(network.base_weights or (), network.base_multipliers(), strict=True)
        with quiet():  # all warnings come again when it is made
            check_network(network, module, depths)
            uses = [_use(path, expert, multiplier) for path, multiplier in files]
            if network.network_weights is not None and own is not None:
                uses.append(LoraUse(read_lora(network.network_weights, with_texts=True)))
            if file is not None:
                check_loras_fit(file, uses)


def _use(path: Path, expert: Expert, multiplier: float) -> LoraUse:
    """Read a LoRA, of a file for several experts that for this one."""
    return LoraUse(read_lora_for(path, expert), multiplier)


def _check_samples(family: Family, options: TrainingOptions) -> None:
    """Check the prompts of samples, the LoRAs that only they have, and the needs of their previews."""
    samples = options.samples
    check_preview(samples.preview, family.latent)
    with quiet():
        if samples.sample_prompts is not None and (samples.is_timed or samples.sample_now):
            read_requests(family, samples.sample_prompts)
        for expert, file in zip_longest(family.experts, family.dit_files):
            uses = [_use(path, expert, multiplier) for path, multiplier in samples.loras()]
            for use in uses:
                refuse_dora(use.lora)
            if file is not None:
                check_loras_fit(file, uses)


def _check_room(family: Family, options: TrainingOptions) -> None:
    """Raise OutputError if the disk has no room for one trained file."""
    folder, name = options.saving.output_dir, options.saving.output_name
    if folder is None or name is None or not folder.is_dir():
        return
    size = 0
    if options.whole_dit is not None:
        # half: a file in float32 may be saved in 16 bits
        size = sum(file.stat().st_size for file in family.dit_files if file.is_file()) // 2
    elif options.network is not None:
        network, rank = options.network, options.network.network_dim or DEFAULT_RANK
        files = family.dit_files if options.by_expert.lora_per_expert else family.dit_files[:1]
        is_ranked = (network.network_module or family.lora_module).startswith(RANKED_NETWORKS)
        if is_ranked and not network.arguments() and not network.dim_from_weights:  # in every module
            size = sum(smallest_lora_bytes(file, rank) for file in files)
    check_space(Path(folder) / f"{name}.safetensors", size)


Rule = tuple[bool, Any, str, str]  # whether they do nothing, their record, public names, and why
NO_SAMPLES = "no samples are made"
NOT_UPLOADED = "nothing is uploaded without --huggingface_repo_id"
WITH_CYCLES = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")


def list_unused_options(options: TrainingOptions, takes_guidance: bool, shifts_table: bool) -> list[str]:
    """Return one line for each of them.

    takes_guidance: the model has an input for embedded guidance. shifts_table: see
    `NoiseSpec.table_is_shifted`.
    """
    rules = [
        *_of_timesteps(options, shifts_table),
        *_of_run(options, takes_guidance),
        *_of_schedule(options.lr_schedule),
        *_of_saving(options.saving),
        *_of_reports(options),
    ]
    lines = _of_weighting(options)
    for is_idle, record, names, why in rules:
        if is_idle:
            given = {option_name(field) for field in fields(record) if is_given(record, field)}
            lines += [f"--{name} has no effect: {why}." for name in names.split() if name in given]
    attention = options.speed.attention
    for flag in attention.ignored:
        lines.append(f"{flag} has no effect: {TRAINING_FLAGS[attention.choice.mode]} comes first.")
    return lines


def _of_weighting(training: TrainingOptions) -> list[str]:
    sampler, weighting = training.timesteps.timestep_sampling, training.timesteps.weighting_scheme
    found = f"--weighting_scheme {weighting} has no effect: it "
    if weighting in WEIGHTS_OF_LOSS and training.weighted_by == NOTHING:
        return [f"{found}weights the loss only with --model_prediction_type sigma_scaled."]
    if weighting in {"logit_normal", "mode"} and sampler != "sigma":
        return [f"{found}shapes the draws of --timestep_sampling sigma only."]
    return []


def _of_timesteps(training: TrainingOptions, shifts_table: bool) -> list[Rule]:
    options = training.timesteps
    sampler, weighting = options.timestep_sampling, options.weighting_scheme
    shifts = sampler == "shift" or (sampler == "sigma" and shifts_table)
    scales = sampler in {"sigmoid", "shift", *SIZE_SHIFTS, *MIXTURES}
    draws = sampler in {"logsnr", "qinglong_flux"} or (sampler, weighting) == ("sigma", "logit_normal")
    is_whole = options.min_timestep is None and options.max_timestep is None
    by_shift = "only --timestep_sampling shift uses it"
    by_sigmoid = "only --timestep_sampling sigmoid and shift use it"
    by_normal = "only --weighting_scheme logit_normal and --timestep_sampling logsnr use it"
    return [
        # image families' defaults have a shift
        (not shifts and not training.is_for_images, options, "discrete_flow_shift", by_shift),
        (not scales, options, "sigmoid_scale", by_sigmoid),
        (not draws, options, "logit_mean logit_std", by_normal),
        (
            is_whole,
            options,
            "preserve_distribution_shape",
            "there is neither --min_timestep nor --max_timestep",
        ),
    ]


def _of_run(options: TrainingOptions, takes_guidance: bool) -> list[Rule]:
    loop, loss, fp8, network = options.loop, options.loss, options.speed.fp8, options.network
    no_guidance = not takes_guidance and not options.is_for_images  # whose defaults have one
    no_readers = "there are none with --max_data_loader_n_workers 0"
    from_file = network is not None and network.dim_from_weights
    takes_snr = loss.has_threshold and loss.huber_schedule == "snr"
    huber = "huber_schedule huber_c huber_scale"
    return [
        (no_guidance, loop, "guidance_scale", "this model has no input for embedded guidance"),
        (not loop.max_data_loader_n_workers, loop, "persistent_data_loader_workers", no_readers),
        (not loss.has_threshold, loss, huber, "only --loss_type huber and smooth_l1 use it"),
        (takes_snr, loss, "huber_scale", "--huber_schedule snr does not use it"),
        (not fp8.fp8_scaled, fp8, "upcast_quantization", "it needs --fp8_base --fp8_scaled"),
        (from_file, network, "network_dim", "--dim_from_weights takes ranks from the file"),
    ]


def _of_schedule(options: LrScheduleOptions) -> list[Rule]:
    """Schedule-free optimizers and Adafactor need no schedule; `make_lr_schedule` reports that."""
    is_replaced = bool(options.lr_scheduler_type)
    name = "" if is_replaced else options.lr_scheduler
    users = {
        "lr_decay_steps": WITH_CYCLES[2:],
        "lr_scheduler_num_cycles": WITH_CYCLES,
        "lr_scheduler_power": ("polynomial",),
        "lr_scheduler_timescale": ("inverse_sqrt",),
        "lr_scheduler_min_lr_ratio": WITH_CYCLES[1:],
    }
    pieces = name == "piecewise_constant"
    return [
        (is_replaced, options, "lr_scheduler lr_warmup_steps", "--lr_scheduler_type replaces it"),
        (pieces, options, "lr_warmup_steps", "piecewise_constant has no warm-up"),
        *(
            (name not in by, options, one, f"only --lr_scheduler {', '.join(by)} uses it")
            for one, by in users.items()
        ),
    ]


def _of_saving(options: SavingOptions) -> list[Rule]:
    by_epoch = options.save_every_n_epochs is not None or options.save_n_epoch_ratio is not None
    by_step = options.save_every_n_steps is not None or options.save_every_n_minutes is not None
    rules: list[Rule] = [(options.resume is None, options, "resume_changed", "there is no --resume")]
    for kind, is_saved in (("epochs", by_epoch), ("steps", by_step)):
        needed = f"--save_every_n_{kind}"
        has_states = is_saved and options.save_state
        rules.append((not is_saved, options, f"save_last_n_{kind}", f"there is no {needed}"))
        states = f"save_last_n_{kind}_state"
        rules.append((not has_states, options, states, f"it needs --save_state and {needed}"))
    return rules


def _of_reports(options: TrainingOptions) -> list[Rule]:
    samples, average, logs, hub = options.samples, options.average, options.logs, options.hub
    makes_none = samples.sample_prompts is None or not (samples.is_timed or samples.sample_now)
    no_tracker = "nothing is logged without --logging_dir or --log_with"
    uses_wandb, uploads = "wandb" in logs.trackers, hub.huggingface_repo_id is not None
    of_hub = "huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility"
    is_replaced = uses_wandb and logs.log_tracker_config is not None
    needs_no_token = not uploads and not hub.resume_from_huggingface
    not_wandb = "wandb is not used without --log_with wandb"
    return [
        (makes_none, samples, "sample_lora", NO_SAMPLES),
        (makes_none, samples.preview, "preview_latent_every", NO_SAMPLES),
        (makes_none, average, "sample_ema", NO_SAMPLES),
        (average.ema_decay is None, average, "ema_update_every", "there is no --ema_decay"),
        (logs.logging_dir is None, logs, "log_prefix", "there is no --logging_dir"),
        (not logs.trackers, logs, "log_tracker_name log_tracker_config log_config", no_tracker),
        (not uses_wandb, logs, "wandb_run_name wandb_api_key", not_wandb),
        (is_replaced, logs, "wandb_run_name", "--log_tracker_config replaces it"),
        (not uploads, hub, of_hub, NOT_UPLOADED),
        (needs_no_token, hub, "huggingface_token", NOT_UPLOADED),
    ]
