"""Convert the value of a key by its rule, or note why it is left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.control_codes import shorten
from modules.errors import UserError
from modules.option_values import format_shape
from project.foreign import contract
from project.foreign.contract import KeyRule, Program, UnsetValue, is_off
from project.foreign.project import (
    FileEpochs,
    ForeignDataset,
    ForeignFile,
    ForeignProject,
    show,
    without_numbers,
)


@dataclass(frozen=True)
class FileValue:
    """A value from another trainer's config file, with its key and the rule that applies to it."""

    rule: KeyRule
    key: str  # key as shown in messages
    value: Any
    dataset: ForeignDataset | None  # dataset whose table contains the key


def convert_value(project: ForeignProject, rule: KeyRule, key: str, value: Any) -> None:
    """Adopt a value from another trainer's project, or record why it is omitted."""
    dataset = _find_dataset(project, key, value)
    setting = FileValue(rule, show(key), value, dataset)
    if rule.target == contract.OMITTED:
        if is_off(setting.value):
            project.ineffective_keys.append(setting.key)
        else:
            project.report_omitted_key(setting.key, setting.rule.name)
        return
    try:
        _ADOPTERS[rule.target](project, setting, rule.read(value))
    except UnsetValue:
        project.ineffective_keys.append(setting.key)
    except (UserError, ValueError, TypeError, OverflowError) as error:
        project.replaces_optimizer |= rule.name == "optimizer_type"
        project.report_omitted_value(setting.key, value, shorten(str(error), 200))


def find_rule(program: Program, key: str) -> KeyRule | None:
    """Return the rule for a key: its own, or the longest matching `table.*` rule; None if there is none."""
    generic = without_numbers(key)
    if generic in program.rules:
        return program.rules[generic]
    tables = [name for name in program.rules if name.endswith("*") and generic.startswith(name[:-1])]
    return program.rules[max(tables, key=len)] if tables else None


def _find_dataset(project: ForeignProject, key: str, value: Any) -> ForeignDataset | None:
    """Return the dataset that contains a key of another trainer's file, after recording the key in it."""
    table = _find_table(project.program, key)
    if table is None:
        return None
    dataset = project.datasets.setdefault(table, ForeignDataset())
    name = key[len(table) + 1 :]
    if value in project.program.dataset_off_values.get(name, ()):
        dataset.is_unused = True
    if name in project.program.fixed_draw_settings and value == project.program.fixed_draw_settings[name]:
        dataset.draws_fixed_number = True
    return dataset


def _find_table(program: Program, key: str) -> str | None:
    """Return the list element that contains a key: `concepts[0]` for `concepts[0].path`; None for others."""
    for generic, rule in program.rules.items():
        prefix = generic.rpartition(".")[0]
        if rule.target == contract.FOLDER and prefix.endswith("[]"):
            match = re.match(re.escape(prefix).replace(r"\[\]", r"\[\d+\]") + r"(?=\.)", key)
            if match is not None:
                return match[0]
    return None


def _take_network(project: ForeignProject, setting: FileValue, module: str | None) -> None:
    """Set the network type that another trainer's project names: `module`, or the default LoRA for None."""
    if module is None:
        project.adopted_keys.append(setting.key)
        return
    project.training_options["network_module"] = module
    project.source_keys["network_module"] = setting.key
    project.report_change(setting.key, setting.value, f"network_module = {module}")


def _take_folder(project: ForeignProject, setting: FileValue, folder: Any) -> None:
    project.folder_by_key[setting.key] = folder
    if setting.dataset is not None:
        setting.dataset.path = folder
        setting.dataset.folder_key = setting.key


def _take_epochs(project: ForeignProject, setting: FileValue, number: Any) -> None:
    project.epoch_settings.append(FileEpochs(setting.key, number, setting.rule.name))


def _take_per_epoch(project: ForeignProject, setting: FileValue, number: Any) -> None:
    project.epoch_intervals[setting.rule.name] = FileEpochs(setting.key, number, setting.rule.name)


def _take_share(project: ForeignProject, setting: FileValue, percent: Any) -> None:
    project.warmup_fraction = (setting.key, percent / 100)


def _take_argument(project: ForeignProject, setting: FileValue, value: Any) -> None:
    project.optimizer_arguments[setting.rule.name] = value
    project.source_keys[setting.rule.name] = setting.key


def _take_arguments(project: ForeignProject, setting: FileValue, pairs: Mapping[str, str]) -> None:
    for name, text in pairs.items():
        project.optimizer_arguments[name] = text
        project.source_keys[name] = setting.key


def _take_network_argument(project: ForeignProject, setting: FileValue, value: Any) -> None:
    project.network_arguments[setting.rule.name] = value
    project.source_keys[setting.rule.name] = setting.key


def _take_new_option(project: ForeignProject, setting: FileValue, value: Any) -> None:
    _set_once(project, project.new_options, project.source_keys, setting, value)


def _take_training_option(project: ForeignProject, setting: FileValue, value: Any) -> None:
    _set_once(project, project.training_options, project.source_keys, setting, value)


def _take_dataset_key(project: ForeignProject, setting: FileValue, value: Any) -> None:
    _set_dataset_key(project, setting, value, str(value))


def _set_dataset_key(project: ForeignProject, setting: FileValue, value: Any, shown: str) -> None:
    """Set a key of the dataset that has the setting, or of all datasets."""
    if setting.dataset is None:
        _set_once(project, project.general_keys, project.source_keys, setting, value, shown)
    else:
        _set_once(project, setting.dataset.table_keys, setting.dataset.source_keys, setting, value, shown)


def _take_sizes(project: ForeignProject, setting: FileValue, sizes: Sequence[tuple[int, int]]) -> None:
    """Set the sizes at which files are trained; each becomes a table of dataset.toml."""
    shown = ", ".join(map(format_shape, sizes))
    if len(sizes) > 1:
        shown = f"{shown}, a table for each"
    _set_dataset_key(project, setting, sizes, shown)


def _take_clip_frames(project: ForeignProject, setting: FileValue, lengths: Sequence[int]) -> None:
    _set_dataset_key(project, setting, lengths, str([*lengths]))


def _take_adapter(project: ForeignProject, setting: FileValue, value: str) -> None:
    project.adapters.append((setting.key, value))


def _take_sample(project: ForeignProject, setting: FileValue, value: Any) -> None:
    project.sample_keys.append(setting.key)


def _take_kept_files(project: ForeignProject, setting: FileValue, count: int) -> None:
    if not count:
        raise UnsetValue
    project.kept_files = (setting.key, count)


def _take_own_file(project: ForeignProject, setting: FileValue, value: str) -> None:
    project.own_files.append(ForeignFile(setting.key, value, tuple(setting.rule.name.split())))


_ADOPTERS: Mapping[str, Callable[[ForeignProject, FileValue, Any], None]] = {
    contract.NEW: _take_new_option,
    contract.TRAINING: _take_training_option,
    contract.DATA: _take_dataset_key,
    contract.SIZES: _take_sizes,
    contract.FRAMES: _take_clip_frames,
    contract.NETWORK: _take_network,
    contract.FOLDER: _take_folder,
    contract.EPOCHS: _take_epochs,
    contract.PER_EPOCH: _take_per_epoch,
    contract.SHARE: _take_share,
    contract.ARGUMENT: _take_argument,
    contract.ARGUMENTS: _take_arguments,
    contract.NETWORK_ARGUMENT: _take_network_argument,
    contract.OWN_FILE: _take_own_file,
    contract.ADAPTER: _take_adapter,
    contract.SAMPLE: _take_sample,
    contract.KEPT: _take_kept_files,
}


def _set_once(
    project: ForeignProject,
    our_values: dict[str, Any],
    keys: dict[str, str],
    setting: FileValue,
    value: Any,
    shown: str = "",
) -> None:
    """Set an option or dataset key, unless another key of the file has set another value.

    `shown` is the value as reports show it, if not its text.
    """
    name = setting.rule.name
    # the file may not have the key: then the value is a default of the other program
    is_default = setting.key in project.assumed_defaults
    earlier_key = keys.setdefault(name, setting.key)
    earlier_is_default = earlier_key in project.assumed_defaults
    if earlier_is_default and not is_default:  # a value in the file replaces a default
        our_values.pop(name, None)
        keys[name] = setting.key
    if our_values.setdefault(name, value) != value:
        reason = f"{name} is {our_values[name]} already, from another key"
        project.report_omitted_value(setting.key, setting.value, reason)
    elif is_default:
        return  # it is not reported as a key of the file
    elif _is_same(value, setting.value):
        project.adopted_keys.append(setting.key)
    else:
        project.report_change(setting.key, setting.value, f"{name} = {shown or value}")


def _is_same(read: Any, value: Any) -> bool:
    """Return whether a converted value equals the original, which may be the same number as a string."""
    if isinstance(read, int | float) and isinstance(value, str):
        try:
            return bool(read == float(value))
        except ValueError:  # `10 STEP`
            return False
    return read == value or str(read) == str(value)
