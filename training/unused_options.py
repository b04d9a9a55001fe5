"""Name options that were given but have no effect, so that none is ignored silently."""

from collections.abc import Iterator

from modules.attention.options import TRAINING_FLAGS, TrainingAttentionOptions
from training.data.options import MIXTURES, SIZE_SHIFTS, WEIGHTS_OF_LOSS
from training.loss_options import L2, NOTHING, LossOptions
from training.optimizers.lr_schedule_options import LrScheduleOptions
from training.options import TrainingOptions
from training.reports.options import LogOptions
from training.saving.options import HubOptions, SavingOptions

Given = tuple[str, object, str]  # an option, whether it was given, why it has no effect


def list_unused_options(options: TrainingOptions, takes_guidance: bool, shifts_table: bool) -> list[str]:
    """Return one line for each of them.

    takes_guidance: the model has an input for embedded guidance. shifts_table: see
    `NoiseSpec.table_is_shifted`.
    """
    loop, network = options.loop, options.network
    found: list[Given] = [
        *_of_timesteps(options, shifts_table),
        *_of_loss(options.loss),
        *_of_schedule(options.lr_schedule),
        *_of_saving(options.saving),
        *_of_logs(options.logs),
        *_of_hub(options.hub),
        *_of_attention(options.speed.attention),
    ]
    samples = options.samples
    no_samples = samples.sample_prompts is None or not (samples.is_timed or samples.sample_now)
    found.append(("--sample_lora", samples.sample_lora and no_samples, "no samples are made"))
    shows = samples.preview.preview_latent_every is not None
    found.append(("--preview_latent_every", shows and no_samples, "no samples are made"))
    found.append(("--sample_ema", options.average.sample_ema and no_samples, "no samples are made"))
    no_average = options.average.ema_decay is None
    found.append(
        (
            "--ema_update_every",
            options.average.ema_update_every != 1 and no_average,
            "there is no --ema_decay",
        )
    )
    fp8 = options.speed.fp8
    found.append(
        (
            "--upcast_quantization",
            fp8.upcast_quantization and not fp8.fp8_scaled,
            "it needs --fp8_base --fp8_scaled",
        )
    )
    if not loop.max_data_loader_n_workers:
        reason = "there are none with --max_data_loader_n_workers 0"
        found.append(("--persistent_data_loader_workers", loop.persistent_data_loader_workers, reason))
    if not takes_guidance and not options.is_for_images:  # whose defaults have one
        found.append(
            ("--guidance_scale", loop.embedded_guidance != 1, "this model has no input for embedded guidance")
        )
    if network is not None and network.dim_from_weights:
        found.append(("--network_dim", network.network_dim, "--dim_from_weights takes ranks from the file"))
    return [f"{option} has no effect: {reason}." for option, is_given, reason in found if is_given]


def _of_timesteps(training: TrainingOptions, shifts_table: bool) -> Iterator[Given]:
    options = training.timesteps
    sampler, weighting = options.timestep_sampling, options.weighting_scheme
    weights = weighting in WEIGHTS_OF_LOSS and training.weighted_by == NOTHING
    reason = "it weights the loss only with --model_prediction_type sigma_scaled"
    yield f"--weighting_scheme {weighting}", weights, reason
    has_shift = sampler == "shift" or (sampler == "sigma" and shifts_table)
    if not has_shift and not training.is_for_images:  # whose defaults have one
        yield "--discrete_flow_shift", options.flow_shift != 1, "only --timestep_sampling shift uses it"
    if sampler not in {"sigmoid", "shift", *SIZE_SHIFTS, *MIXTURES}:
        yield (
            "--sigmoid_scale",
            options.sigmoid_scale != 1,
            "only --timestep_sampling sigmoid and shift use it",
        )
    if sampler != "sigma":
        shapes = weighting in {"logit_normal", "mode"}
        yield (
            f"--weighting_scheme {weighting}",
            shapes,
            "it shapes the draws of --timestep_sampling sigma only",
        )
    if sampler not in {"logsnr", "qinglong_flux"} and (sampler, weighting) != ("sigma", "logit_normal"):
        reason = "only --weighting_scheme logit_normal and --timestep_sampling logsnr use it"
        yield "--logit_mean", options.logit_mean != 0, reason
        yield "--logit_std", options.logit_std != 1, reason
    if options.min_timestep is None and options.max_timestep is None:
        reason = "there is neither --min_timestep nor --max_timestep"
        yield "--preserve_distribution_shape", options.preserve_distribution_shape, reason


def _of_loss(options: LossOptions) -> Iterator[Given]:
    is_given = {
        name: getattr(options, name) != getattr(L2, name)
        for name in ("huber_schedule", "huber_c", "huber_scale")
    }
    if not options.has_threshold:
        for name, is_it in is_given.items():
            yield f"--{name}", is_it, "only --loss_type huber and smooth_l1 use it"
    elif options.huber_schedule == "snr":
        yield "--huber_scale", is_given["huber_scale"], "--huber_schedule snr does not use it"


def _of_schedule(options: LrScheduleOptions) -> Iterator[Given]:
    """Schedule-free optimizers and Adafactor need no schedule; `make_lr_schedule` reports that."""
    name = options.lr_scheduler
    if options.lr_scheduler_type:
        name, reason = "", "--lr_scheduler_type replaces it"
        yield "--lr_scheduler", options.lr_scheduler != "constant", reason
        yield "--lr_warmup_steps", options.lr_warmup_steps, reason
    elif name == "piecewise_constant":
        yield "--lr_warmup_steps", options.lr_warmup_steps, "piecewise_constant has no warm-up"
    with_cycles = ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay")
    for option, is_given, users in (
        ("--lr_decay_steps", options.lr_decay_steps, with_cycles[2:]),
        ("--lr_scheduler_num_cycles", options.lr_scheduler_num_cycles != 1, with_cycles),
        ("--lr_scheduler_power", options.lr_scheduler_power != 1, ("polynomial",)),
        ("--lr_scheduler_timescale", options.lr_scheduler_timescale, ("inverse_sqrt",)),
        ("--lr_scheduler_min_lr_ratio", options.lr_scheduler_min_lr_ratio, with_cycles[1:]),
    ):
        if name not in users:
            yield option, is_given, f"only --lr_scheduler {', '.join(users)} uses it"


def _of_saving(options: SavingOptions) -> Iterator[Given]:
    yield "--resume_changed", options.resume_changed and options.resume is None, "there is no --resume"
    saves_by_step = options.save_every_n_steps is not None or options.save_every_n_minutes is not None
    for kind, is_saved, files, states in (
        (
            "epochs",
            options.save_every_n_epochs is not None or options.save_n_epoch_ratio is not None,
            options.save_last_n_epochs,
            options.save_last_n_epochs_state,
        ),
        ("steps", saves_by_step, options.save_last_n_steps, options.save_last_n_steps_state),
    ):
        if not is_saved:
            yield f"--save_last_n_{kind}", files is not None, f"there is no --save_every_n_{kind}"
        if not (is_saved and options.save_state):
            reason = f"it needs --save_state and --save_every_n_{kind}"
            yield f"--save_last_n_{kind}_state", states is not None, reason


def _of_logs(options: LogOptions) -> Iterator[Given]:
    if options.logging_dir is None:
        yield "--log_prefix", options.log_prefix, "there is no --logging_dir"
    if not options.trackers:
        for name in ("log_tracker_name", "log_tracker_config", "log_config"):
            yield f"--{name}", getattr(options, name), "nothing is logged without --logging_dir or --log_with"
    if "wandb" not in options.trackers:
        for name in ("wandb_run_name", "wandb_api_key"):
            yield f"--{name}", getattr(options, name), "wandb is not used without --log_with wandb"
    elif options.log_tracker_config is not None:
        yield "--wandb_run_name", options.wandb_run_name, "--log_tracker_config replaces it"


def _of_hub(options: HubOptions) -> Iterator[Given]:
    if options.huggingface_repo_id is not None:
        return
    names = ["huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility"]
    for name in names if options.resume_from_huggingface else [*names, "huggingface_token"]:
        yield f"--{name}", getattr(options, name), "nothing is uploaded without --huggingface_repo_id"


def _of_attention(options: TrainingAttentionOptions) -> Iterator[Given]:
    for flag in options.ignored:
        yield flag, True, f"{TRAINING_FLAGS[options.choice.mode]} comes first"
