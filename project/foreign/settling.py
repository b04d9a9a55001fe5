"""Fit another trainer's values to a model, a kind of run and its training script."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dataset.config import KEYS
from dataset.subset_options import SUBSET_KEYS
from downloads.catalogue import ModelSet
from modules.integers import round_up
from modules.option_values import format_shape
from project.foreign.contract import FULL_RANK
from project.foreign.learning import remove_unsuitable_rates, resolve_trained_networks
from project.foreign.named import adopt_by_name
from project.foreign.optimizing import resolve_optimizer
from project.foreign.project import ForeignProject
from project.kinds.composing import LORA
from project.kinds.contract import RunKind
from project.new_options import NewOptions
from project.script_facts import ScriptOptions

_LORA_OPTIONS = ("network_module", "network_dim", "network_alpha", "network_dropout", "network_args")
_EMBEDDING_OPTIONS = ("init_word", "num_vectors_per_token")
# network arguments in other programs that only LoRAs have
_LORA_ONLY_ARGUMENTS = ("dora_wd", "rank_dropout", "module_dropout")
# keys of dataset.toml that vary captions at each use
VARYING_TEXTS = frozenset(
    {"shuffle_caption", "caption_tag_dropout_rate", "caption_dropout_every_n_epochs", "token_warmup_step"}
    | {"enable_wildcard"}
)
_BUCKET_LIMITS = ("min_bucket_reso", "max_bucket_reso")
_BUCKET_STEP = "bucket_reso_steps"
_SHUFFLING_KEYS = ("keep_tokens", "keep_tokens_separator", "caption_separator", "secondary_separator")


class DatasetLayout(NamedTuple):
    """Facts about the new dataset.toml that decide which keys its tables may have."""

    side_multiple: int  # sides are multiples of this
    supports_subsets: bool  # the model supports [[datasets.subsets]]
    uses_subsets: bool  # dataset.toml always has [[datasets.subsets]] in this run
    target_size: tuple[int, int]  # width, height, unless the project sets sizes
    # frame counts that the model accepts and some clip of the folder has; [] if there are no clips
    clip_lengths: Sequence[int]
    has_regularization: bool = False  # the folder has regularization images


def complete_options(project: ForeignProject, options: NewOptions) -> NewOptions:
    """Return the options of `new` with values of the other trainer's project where the user typed none."""
    default = NewOptions(folder=options.folder)  # an option with this value is treated as not set by the user
    completed = {}
    # the options that the project sets; not its task if --family names another family
    project_options = dict(project.new_options)
    if project.run.kind not in {LORA.name, ""} and options.trains is None:
        project_options["train"] = project.run.kind
    if options.family not in {None, project.new_options.get("family")}:
        # the project's task is of the project's family, and another family was typed
        task = project_options.pop("task", None)
        if task is not None and options.task is None:
            project.report_omitted_value("task", task, "--family sets another value")
    project_options.pop("max_train_steps", None)  # `select_length` compares it with the epochs
    for name, value in project_options.items():
        typed_value = getattr(options, name)
        if typed_value == getattr(default, name):
            completed[name] = value
        elif typed_value != value:
            project.report_omitted_value(name, value, f"--{name} sets another value")
    return dataclasses.replace(options, **completed)


def resolve_project(
    project: ForeignProject,
    model: ModelSet,
    kind: RunKind,
    script: ScriptOptions,
    memory: float,
    dataset_layout: DatasetLayout,
) -> None:
    """Reduce another trainer's settings, in place, to those that this run accepts.

    The project records why each other setting is omitted. `memory` is the GPU memory in GiB; 0 means a CPU.
    `dataset_layout` says which keys dataset.toml can have.
    """
    remove_unsuitable_rates(project, kind)
    resolve_trained_networks(project, model, kind, script)
    # options that `new` itself sets for the model
    words = f"{model.commands['train']} {model.properties.get('train', '')}".split()
    set_by_new = {word.removeprefix("--") for word in words if word.startswith("--")}
    adopt_by_name(project, script, set_by_new)
    resolve_optimizer(project, memory)
    _resolve_network(project, model, kind)
    if kind.saves_large_files:  # large networks, for which `new` sets Adafactor
        _adapt_adafactor_defaults(project, script)
    project.keeps_only_latest = kind.saves_large_files
    if "min_snr_gamma" in script.accepted and "min_snr_gamma" not in project.training_options:
        project.training_options["min_snr_gamma"] = None  # `new` sets it for models that predict noise
        project.change_lines.append(
            f"min_snr_gamma is left out: {project.title} uses it only if its file sets it"
        )
    _omit_unused_noise_levels(project, model, script)
    _remove_rejected_options(project, script)
    _resolve_dataset_keys(project, dataset_layout)


def _remove_rejected_options(project: ForeignProject, script: ScriptOptions) -> None:
    for name in list(project.training_options):
        if name not in script.accepted:
            project.remove_option(name, script.rejected.get(name, f"{script.name} has no such option"))


def _omit_unused_noise_levels(project: ForeignProject, model: ModelSet, script: ScriptOptions) -> None:
    """Drop the uniform noise levels of models that predict noise, and a shift that the sampling ignores."""
    training = project.training_options
    if "timestep_sampling" not in script.accepted and training.get("timestep_sampling") == "uniform":
        project.ineffective_keys.append(project.get_file_key("timestep_sampling"))
        project.remove_from_report(project.get_file_key("timestep_sampling"))
        training.pop("timestep_sampling")
    command = model.commands["train"].split()
    on_page = (
        command[command.index("--timestep_sampling") + 1] if "--timestep_sampling" in command else "shift"
    )
    sampling = training.get("timestep_sampling", on_page)
    if "discrete_flow_shift" in training and sampling not in {"shift", "sigma"}:
        reason = f"timestep_sampling = {sampling} has no such shift"
        project.remove_option("discrete_flow_shift", reason)


def _resolve_network(project: ForeignProject, model: ModelSet, kind: RunKind) -> None:
    """Set rank, alpha and network arguments of a LoRA; for other kinds, omit them and report the reason."""
    if not model.properties.get("convolutions"):
        # networks without convolutions have no rank of them
        for argument in ("conv_dim", "conv_alpha"):
            if argument in project.network_arguments:
                project.network_arguments.pop(argument)
                project.ineffective_keys.append(project.source_keys[argument])
    if kind is LORA:
        _omit_lora_only_settings(project)
        _write_network_arguments(project)
        # without an alpha, that of the other trainer
        rank = project.training_options.get("network_dim")
        if not (rank is None or "network_alpha" in project.training_options):
            alpha = project.program.default_alpha
            if alpha is None or rank >= FULL_RANK:  # full matrices are not scaled
                alpha = rank
            project.training_options["network_alpha"] = alpha
            project.change_lines.append(f"no alpha is set: network_alpha = {alpha}, as in {project.title}")
    reason = f"{kind.title} is trained"
    if kind is not LORA:
        for name in project.network_arguments:
            project.report_omitted_key(project.source_keys[name], reason)
        _remove_options(project, _LORA_OPTIONS, reason)
    if not kind.trains_embedding:
        _remove_options(project, _EMBEDDING_OPTIONS, reason)


def _remove_options(project: ForeignProject, names: Iterable[str], reason: str) -> None:
    for name in names:
        if name in project.training_options:
            project.remove_option(name, reason)


def _omit_lora_only_settings(project: ForeignProject) -> None:
    """Remove settings that only a LoRA has from a project that trains something else."""
    module = project.training_options.get("network_module")
    if module is None:
        return
    reason = f"only a LoRA has it, and {module} is trained"
    for name in _LORA_ONLY_ARGUMENTS:
        value = project.network_arguments.pop(name, 0)
        if value:
            project.report_omitted_value(project.source_keys[name], value, reason)
        elif name in project.source_keys:
            project.ineffective_keys.append(project.source_keys[name])
    if "network_dropout" in project.training_options:
        project.remove_option("network_dropout", reason)


def _write_network_arguments(project: ForeignProject) -> None:
    """Write the network's arguments to `network_args`; report those with an empty value as ineffective."""
    arguments: dict[str, Any] = {}
    for name, value in project.network_arguments.items():
        if value:
            arguments[name] = value
        else:
            project.ineffective_keys.append(project.source_keys[name])
    if not arguments:
        return
    assignments = [f"{name}={_as_text(value)}" for name, value in arguments.items()]
    project.training_options["network_args"] = assignments
    project.source_keys["network_args"] = "arguments of the network"
    project.adopted_keys += [project.source_keys[name] for name in arguments]
    project.change_lines.append(f"arguments of the network: network_args = {assignments}")


def _as_text(value: Any) -> str:
    return str(value) if isinstance(value, bool | str) else f"{value:g}"


def _adapt_adafactor_defaults(project: ForeignProject, script: ScriptOptions) -> None:
    """Replace defaults of `new` for full training that conflict with the project's optimizer and schedule."""
    # `new` sets Adafactor with fused_backward_pass, its arguments, no gradient clipping, and a warm-up.
    training = project.training_options
    optimizer = training.get("optimizer_type", "adafactor")
    accumulates_gradients = training.get("gradient_accumulation_steps", 1) > 1
    can_fuse = optimizer == "adafactor" and not accumulates_gradients
    if "fused_backward_pass" in script.accepted and not can_fuse:
        training["fused_backward_pass"] = False
        # without fused_backward_pass, swapped blocks cannot be updated on the GPU
        if "blocks_to_swap" in script.accepted:
            training["blocks_to_swap"] = None
            project.change_lines.append(
                "blocks_to_swap is left out: trained blocks are swapped only with fused_backward_pass, "
                "which needs Adafactor without accumulation"
            )
    if optimizer != "adafactor":
        training.setdefault("optimizer_args", [])
        training.setdefault("max_grad_norm", 1.0)
    has_warmup = "lr_warmup_steps" in training or project.warmup_fraction is not None
    if "lr_scheduler" in training and not has_warmup:
        training["lr_warmup_steps"] = 0


def _resolve_dataset_keys(project: ForeignProject, dataset_layout: DatasetLayout) -> None:
    """Drop [general] keys that the new dataset.toml cannot have or that have no effect, and report them."""
    # the step of buckets is a multiple of what the model needs
    general_keys = project.general_keys
    steps = general_keys.get("bucket_reso_steps", dataset_layout.side_multiple)
    if steps % dataset_layout.side_multiple:
        general_keys.pop("bucket_reso_steps")
        project.remove_from_report("bucket_reso_steps")
        reason = f"this model needs a multiple of {dataset_layout.side_multiple}"
        project.report_omitted_value("bucket_reso_steps", steps, reason)
    _omit_subset_keys(project, dataset_layout)
    _fit_bucket_limits(project, dataset_layout.target_size)
    _fit_clip_lengths(project, project.general_keys, project.source_keys, dataset_layout)
    for dataset in project.datasets.values():
        _fit_clip_lengths(project, dataset.table_keys, dataset.source_keys, dataset_layout)
    ineffective_names: list[str] = []
    if project.general_keys.get("enable_bucket") is False:
        ineffective_names += [*_BUCKET_LIMITS, _BUCKET_STEP, "bucket_no_upscale"]
    elif project.general_keys.get("bucket_no_upscale"):
        ineffective_names += _BUCKET_LIMITS
    if not VARYING_TEXTS & project.general_keys.keys():
        ineffective_names += _SHUFFLING_KEYS
    if not dataset_layout.has_regularization:
        ineffective_names.append("prior_loss_weight")
    for name in ineffective_names:
        if name in project.general_keys:
            project.general_keys.pop(name)
            project.remove_from_report(project.get_file_key(name))
            project.ineffective_keys.append(project.get_file_key(name))


def _fit_bucket_limits(project: ForeignProject, target_size: tuple[int, int]) -> None:
    """Move the limits of bucket sides so that they include each size at which files are trained."""
    general_keys = project.general_keys
    sizes = general_keys.get("resolution", (target_size,))
    step = general_keys.get(_BUCKET_STEP, SUBSET_KEYS[_BUCKET_STEP].default)
    shortest = max(min(map(min, sizes)) // step * step, step)
    longest = round_up(max(map(max, sizes)), step)
    for name, side in zip(_BUCKET_LIMITS, (shortest, longest), strict=True):
        limit = general_keys.get(name, side)
        is_excluding = limit > side if name == "min_bucket_reso" else limit < side
        if is_excluding:
            general_keys[name] = side
            key = project.get_file_key(name)
            project.remove_from_report(key)
            shown = ", ".join(map(format_shape, sizes))
            project.report_change(key, limit, f"{name} = {side}, because files are trained at {shown}")


def _fit_clip_lengths(
    project: ForeignProject, table: dict[str, Any], source_keys: Mapping[str, str], layout: DatasetLayout
) -> None:
    """Round lengths of clips down to those that the model accepts and the folder has."""
    lengths = table.pop("target_frames", None)
    if lengths is None:
        return
    key = source_keys["target_frames"]
    if not layout.clip_lengths:  # only images are learned
        project.remove_from_report(key)
        project.ineffective_keys.append(key)
        return
    shortest, *_ = layout.clip_lengths
    fitted = set()
    for length in lengths:
        fitted.add(max(known for known in layout.clip_lengths if known <= max(length, shortest)))
    table["target_frames"] = sorted(fitted)
    if table["target_frames"] != [*lengths]:
        project.remove_from_report(key)
        result = f"target_frames = {table['target_frames']}, as the model and the clips here allow"
        project.report_change(key, [*lengths], result)


def _omit_subset_keys(project: ForeignProject, dataset_layout: DatasetLayout) -> None:
    """Drop keys that only [[datasets.subsets]] have: defaults, or all if the script has no subsets."""
    general_keys = project.general_keys
    may_use_subsets = dataset_layout.supports_subsets or dataset_layout.uses_subsets
    for name in list(general_keys):
        key = project.get_file_key(name)
        needs_subsets = name not in KEYS
        is_default = name in SUBSET_KEYS and general_keys[name] == SUBSET_KEYS[name].default
        # of buckets, `new` chooses other values than these defaults
        if is_default and name not in (*_BUCKET_LIMITS, _BUCKET_STEP, "enable_bucket"):
            general_keys.pop(name)
        elif needs_subsets and not may_use_subsets:
            general_keys.pop(name)
            project.remove_from_report(key)
            project.omission_lines.append(
                f"{key}: {name} is of [[datasets.subsets]], which this model's script does not take"
            )
