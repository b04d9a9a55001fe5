"""Find the state that a run continues from, and compare the settings of both runs."""

import ast
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from checkpoints.opening import fingerprint
from dataset.batches.order import BatchOrder
from modules.console import format_count
from modules.errors import OptionError
from modules.option_values import read_literals, to_path
from modules.options import get_option_info, option_values, options_with, replace_synonyms
from networks.kinds.composing import get_module_kind
from networks.options import NOTHING_FROZEN
from protocols.family import Family
from training.experts import TRAINING_ADAPTER, get_network_module
from training.features import FEATURES
from training.optimizers.optimizer import PATHS
from training.options import TrainingOptions
from training.reports.logs import public_config
from training.saving import states
from training.saving.files import find_moved_states, is_saved_folder
from training.saving.options import LATEST, LATEST_ONLY, SavingOptions
from training.steps import Progress, StepPlan

logger = logging.getLogger(__name__)

# names in `SavedState.identity`
TRANSFORMERS, PER_EXPERT = "trained transformers and their lowest timesteps", "--lora_per_expert"
GROUP_SIZE = "micro-batches per step (processes x --gradient_accumulation_steps)"
BATCHES = "batches of an epoch (--dataset_config and its caches)"
# options whose files are recorded in states by name
NAMED_FILES = options_with(TrainingOptions, "resume", "names")
# options that any resumed run may change; they are recorded so that --resume_changed can list changes
# fmt: off
FREELY_CHANGEABLE = (
    "max_train_steps", "max_train_epochs", "validate_every_n_steps",
    "sample_every_n_steps", "sample_every_n_epochs",
    "save_every_n_steps", "save_every_n_epochs", "save_every_n_minutes",
)
# fmt: on


def find_state(
    options: TrainingOptions, resume: str, is_main_process: bool
) -> states.SavedState | states.ForeignState | None:
    """Read the state that --resume names; None if `latest` finds none. All processes must call this.

    Args:
        options: Options of the run.
        resume: Value of --resume.
        is_main_process: Whether this is the main process.

    Raises:
        OptionError: If no state with this name exists.
        CheckpointError: If the state cannot be used.
    """
    output_folder, name = options.saving.folder_and_name
    state_folder: Path | None = None
    if options.features.storage is not None:  # may download the state that --resume names
        state_folder = options.features.storage.fetch_state(resume, output_folder / "resumed")
    if state_folder is None and resume in {LATEST, LATEST_ONLY}:
        # one process searches, and also cleans up after a kill
        latest = states.find_latest(output_folder, name) if is_main_process else None
        (state_folder,) = broadcast_object_list([latest])
        if state_folder is None:
            _report_missing_state(resume, output_folder, name)
            return None
    if state_folder is None:
        state_folder = to_path("--resume", resume)
    logger.info("Resuming from %s", state_folder)
    return states.read_state(state_folder)


def _report_missing_state(resume: str, folder: Path, name: str) -> None:
    """Log that no state was found and a new run begins; raise OptionError for `--resume latest-or-fail`."""
    earlier_states = find_moved_states(folder, name)
    has_trained_file = (folder / f"{name}.safetensors").is_file() or is_saved_folder(folder / name)
    hint = f" An earlier run saved {earlier_states[-1]}: pass it to --resume." if earlier_states else ""
    if resume == LATEST_ONLY:
        raise OptionError(
            f"--resume {resume}: there is no state of {name} in {folder}: none was saved yet, or it is "
            f"elsewhere.{hint} Omit --resume to start over, or begin with the trained weights: "
            f"{states.FRESH_START}"
        )
    if has_trained_file and not earlier_states:
        hint = f" A run saved its result without --save_state: to begin with that, pass {states.FRESH_START}."
    logger.log(
        logging.WARNING if earlier_states or has_trained_file else logging.INFO,
        "--resume %s: no state of %s in %s yet; starting a new run.%s",
        resume,
        name,
        folder,
        hint,
    )


def initial_progress(
    options: TrainingOptions, saved: states.SavedState | states.ForeignState | None
) -> Progress:
    """Return the progress at which the run starts.

    A resumed run keeps its seed. Without --seed, all processes share a random one.
    """
    if isinstance(saved, states.SavedState):
        with states.errors_name_the_state(saved.folder):
            # saved values of inactive features are passed on unchanged and not checked
            for state_class in options.features.progress_records:
                # restores the feature's values; TypeError for a wrong type
                saved.progress.feature_state(state_class)
        return saved.progress
    seed, session_id, started_at = broadcast_object_list(
        [secrets.randbelow(1 << 32), secrets.randbelow(1 << 32), time.time()]
    )
    if options.loop.seed is not None:
        seed = options.loop.seed
    else:
        logger.info("Using a random seed: --seed %d.", seed)
    progress = Progress(seed=seed, session_id=session_id, started_at=started_at)
    for state_class in options.features.progress_records:
        progress.feature_state(state_class)  # creates the default values of an active feature
    return progress


def recorded_values(options: Any, *kinds: str) -> dict[str, Any]:
    """Return the values of all options in `options` that have one of these kinds: identity or habit.

    Files and folders are given by name; None for an option without a value.
    """
    names = [name for kind in kinds for name in options_with(type(options), "resume", kind)]
    paths = {name: value.name for name, value in option_values(options).items() if isinstance(value, Path)}
    values = public_config(options) | paths
    return {name: values.get(name) for name in names}


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run, recorded in its states so that a resumed run can be compared with them."""

    # must be equal in a resumed run; states record them as `identity`
    fixed: dict[str, Any]
    # may change, with a warning; models are given by file name. States record them as `habits`
    adjustable: dict[str, Any]
    record: type  # class of the family's own options


def collect_run_settings(
    family: Family,
    options: TrainingOptions,
    *,
    seed: int,
    order: BatchOrder,
    plan: StepPlan,
    adapter: str | None,
) -> RunSettings:
    """Return the settings that a state records, so that a resumed run can be compared with them.

    Args:
        family: The model family.
        options: Options of the run.
        seed: Seed of the run.
        order: Order of the items in each epoch; its digest is recorded.
        plan: Numbers of steps, epochs and micro-batches.
        adapter: The training adapter with a hash of its file (`describe_adapter`); None without
            --training_adapter.
    """
    config = public_config(options) | {"network_module": get_network_module(family, options)}
    fixed: dict[str, Any] = {"--seed": seed if options.loop.seed is None else options.loop.seed}
    fixed |= _values_by_flag(config, "identity")
    fixed |= {f"--{name}": value for name, value in recorded_values(family.options, "identity").items()}
    fixed[GROUP_SIZE] = plan.batches_per_step
    fixed[BATCHES] = ", ".join([f"{plan.num_batches}, {epoch_digest(order)}", *order.learning_keys])
    experts = [f"{expert.name or 'one'} from {expert.min_timestep:g}" for expert in family.experts]
    fixed[TRANSFORMERS] = ", ".join(experts)
    fixed[TRAINING_ADAPTER] = adapter
    # The settings whose change in a resumed run only causes a warning
    adjustable = _values_by_flag(config, "habit")
    adjustable |= {f"--{name}": value for name, value in recorded_values(family.options, "habit").items()}
    models = [value for name, value in family.metadata.items() if name.startswith("sd_model_name")]
    adjustable["the model's file"] = ", ".join(models) or None
    return RunSettings(fixed, (adjustable | list_file_names(options)), type(family.options))


def _values_by_flag(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the values of all options of a kind, by flag (`--name`)."""
    # `kind` says what happens if the value differs when a run is resumed: `identity` is an error, `habit` a
    # warning.
    return {f"--{name}": config.get(name) for name in options_with(TrainingOptions, "resume", kind)}


def list_file_names(options: TrainingOptions) -> dict[str, str | None]:
    """Return the file name in each option of `NAMED_FILES` by its flag; None for an unset option."""
    files = {name: value for name, value in option_values(options).items() if name in NAMED_FILES}
    lists = {name: (value,) if isinstance(value, Path) else value or () for name, value in files.items()}
    return {f"--{name}": ", ".join(path.name for path in paths) or None for name, paths in lists.items()}


def describe_adapter(path: Path, strength: float, with_content: bool = False) -> str:
    """Return the file name and strength of --training_adapter as text, to compare runs.

    Args:
        path: File of the LoRA.
        strength: Its strength.
        with_content: Whether to add a hash of the file's content.
    """
    content = f", {fingerprint(path)[:12]}" if with_content else ""
    return f"{path.name}:{strength:g}{content}"


def epoch_digest(order: BatchOrder) -> str:
    """Return a 12-digit hexadecimal hash of the first epoch's item order, which depends on the dataset."""
    digest = hashlib.sha256()
    for number, batch in enumerate(order.planned_epoch(0)):
        digest.update(("\n" * bool(number) + ",".join(item.key for item in batch)).encode())
    return digest.hexdigest()[:12]


def check_resumable(
    saved: states.SavedState | states.ForeignState,
    settings: RunSettings,
    options: TrainingOptions,
    saving: SavingOptions,
) -> dict[str, str]:
    """Raise OptionError if the saved run is a different one; warn about changed settings.

    1. Warn about settings that the state, of an older version, did not record.
    2. Reject differences in settings that must stay the same, unless --resume_changed allows them.
    3. Warn about other changed settings, or return all changes with --resume_changed.

    Settings that the saved run did not record are not compared. Call this before anything large is loaded.

    Args:
        saved: The saved state.
        settings: Settings of this run.
        options: Options of the run.
        saving: Options of saving, as the plan of this run has them.

    Returns:
        With --resume_changed, a description of each changed setting by its name; otherwise empty.
    """
    if isinstance(saved, states.ForeignState) and options.by_expert.lora_per_expert:
        raise OptionError(
            f"--resume {saved.folder}: the state of another program is of one network, and --lora_per_expert "
            "trains two. Omit one of them; --network_weights and --network_weights_high_noise start "
            "from files"
        )
    if not isinstance(saved, states.SavedState):
        return {}
    fixed, saved_fixed = _comparable_fixed_settings(saved, settings)
    adjustable, saved_adjustable = settings.adjustable, _list_saved_adjustable(saved, settings.adjustable)
    unrecorded = (fixed.keys() - saved_fixed.keys()) | (adjustable.keys() - saved_adjustable.keys())
    if unrecorded:  # the state is of an older version
        logger.warning(
            "%s does not say what the run that saved it had for %s: its version did not record that. Pass "
            "the same values as then.",
            saved.folder,
            ", ".join(sorted(unrecorded)),
        )
    may_change = options.saving.resume_changed
    fixed_changes = _differences(saved_fixed, fixed)
    _reject_differences(saved, fixed_changes, may_change)
    adjustable_changes = _differences(saved_adjustable, adjustable)
    if not may_change:
        for name, (then, now) in adjustable_changes.items():
            logger.warning("%s was %s when the state was saved; it is %s from here on.", name, then, now)
        return {}
    free_changes = _differences(saved.settings, freely_changeable_settings(options, saving))
    changes = fixed_changes | adjustable_changes | free_changes
    return {name: f"{name}: {then} -> {now}" for name, (then, now) in changes.items()}


def _comparable_fixed_settings(
    saved: states.SavedState, settings: RunSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of this run and of the saved run that must be equal, with normalized values."""
    # settings that older versions, without several transformers or adapters, did not record
    defaults = {
        TRANSFORMERS: "one from 0",
        # not compared if this run does not record it either
        PER_EXPERT: None if settings.fixed.get(PER_EXPERT) is None else False,
        TRAINING_ADAPTER: None,
    }
    saved_fixed = _normalize_fixed_settings({**defaults, **saved.identity}, settings.record)
    return _normalize_fixed_settings(settings.fixed, settings.record), saved_fixed


def _list_saved_adjustable(saved: states.SavedState, adjustable: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved settings that may change with a warning; options unknown to the state get defaults."""
    defaults: dict[str, Any] = {}
    for record in (NOTHING_FROZEN, *(feature.options.from_defaults() for feature in FEATURES)):
        defaults |= {f"--{name}": value for name, value in public_config(record).items()}
    defaults |= {f"--{name}": None for name in NAMED_FILES}
    saved_adjustable: dict[str, Any] = {}
    for name, default in defaults.items():
        current = adjustable.get(name)
        # an option that is off now counts as unchanged, however its default is written
        saved_adjustable[name] = default if current else current
    return saved_adjustable | saved.habits  # `habits` is their name in the state


def _reject_differences(
    saved: states.SavedState, differences: Mapping[str, tuple[str, str]], may_change: bool
) -> None:
    """Raise OptionError for settings that must be the same in a resumed run."""
    changeable = {f"--{name}" for name in options_with(TrainingOptions, "resume_changed", True)}
    changeable |= {GROUP_SIZE, BATCHES}  # these are not options, so no option class declares them
    allowed = changeable if may_change else set()
    rejected = {name: pair for name, pair in differences.items() if name not in allowed}
    if not rejected:
        return
    lines = "\n".join(f"  {name}: {then} in the state, {now} now" for name, (then, now) in rejected.items())
    remedy = ""
    if rejected.keys() <= changeable:
        remedy = ", add --resume_changed to continue with the current ones"
    error = "this run is not the one that was saved"
    if may_change:
        error = "not even --resume_changed can change this"
    raise OptionError(
        f"--resume {saved.folder}: {error}.\n{lines}\n"
        f"  Use the saved values{remedy}, or start a new run from what was trained: {states.FRESH_START}"
    )


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Map each setting that differs to its saved and its current value, as text."""
    return {
        name: (states.shorten_value(saved[name]), states.shorten_value(value))
        for name, value in here.items()
        if name in saved and saved[name] != value
    }


def freely_changeable_settings(options: TrainingOptions, saving: SavingOptions) -> dict[str, Any]:
    """Return by flag the settings that a resumed run may change without a warning."""
    config = public_config(options, saving)
    return {f"--{name}": config[name] for name in FREELY_CHANGEABLE}


def apply_changes(changes: Mapping[str, str], progress: Progress, saved: states.SavedState) -> None:
    """Apply the changes to the run's progress, and start a new plan of steps if necessary.

    If the clips changed, the current epoch starts again in their order; if only the size of a step changed,
    it continues with the remaining clips.
    """
    logger.info("--resume_changed: %s changed since the saved run:", format_count(len(changes), "setting"))
    for change in changes.values():
        logger.info("  %s", change)
    progress.changes += [f"step {progress.step}: {change}" for change in changes.values()]
    if not changes.keys() & {GROUP_SIZE, BATCHES}:
        return
    with states.errors_name_the_state(saved.folder):
        # the text begins with the number of batches of an epoch
        num_batches = int(str(saved.identity[BATCHES]).partition(",")[0])
    if progress.position >= num_batches:  # the state was saved at the very end of an epoch
        progress.epoch += 1
        progress.position = 0
    if BATCHES in changes:
        progress.position = 0
        logger.info("  Epoch %d begins again, with the current clips.", progress.epoch + 1)
    # the plan of steps starts again from here
    progress.plan_epoch, progress.plan_position = progress.epoch, progress.position
    progress.plan_step = progress.step


def _normalize_fixed_settings(fixed: Mapping[str, Any], record: type) -> dict[str, Any]:
    """Normalize the settings that identify a run: settings of equal meaning get equal values."""
    by_name = {name.removeprefix("--"): value for name, value in fixed.items() if name.startswith("--")}
    resolved = {
        **fixed,
        **{f"--{name}": value for name, value in replace_synonyms(get_option_info(record), by_name).items()},
    }
    if "--optimizer_type" in resolved:
        name = str(resolved["--optimizer_type"])
        resolved["--optimizer_type"] = PATHS.get(name.lower(), name)
    for option in ("--optimizer_args", "--network_args"):
        if option in resolved:
            resolved[option] = _normalize_arguments(option, str(resolved[option]))
    if resolved.get("--network_dim") == str(None):  # recorded as text: the option was left out
        kind = get_module_kind(resolved.get("--network_module"))
        resolved["--network_dim"] = kind.size.default
    if resolved.get("--network_alpha") == 0:  # 0 means the same value as the rank
        resolved["--network_alpha"] = resolved.get("--network_dim")
    return resolved


def _normalize_arguments(option: str, text: str) -> str:
    """Return the KEY=VALUE arguments of an option sorted by key, with normalized values."""
    try:
        pairs = read_literals(option, ast.literal_eval(text) or ())
    except (ValueError, SyntaxError, TypeError, AttributeError, OptionError):
        return text  # the state was edited
    return ", ".join(f"{key}={pairs[key]!r}" for key in sorted(pairs))
