"""Read a dataset configuration, a TOML or JSON file, to frozen tables. Standard library only.

Allowed values of each key are in `dataset/table.py`. Paths are relative to the working folder. All problems
of a file are reported together.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataset import config_keys as forms
from dataset.config_keys import MODES
from dataset.forms.composing import (
    FORMAT_BY_SOURCE,
    FORMAT_KEYS,
    KEYS,
    KEYS_BY_SOURCE,
    SHARED_CACHES,
    SOURCES,
    SOURCES_WITH_ADDRESSES,
    get_source_format,
)
from dataset.forms.contract import SourceFormat
from dataset.subset_options import OTHER_NAMES, SUBSET, SUBSET_KEYS, SubsetOptions
from dataset.subsets import read_subsets, typed_options
from dataset.table import DatasetConfig, DatasetTable, Table, declared_keys, folder_id
from dataset.timestep_keys import find_unused, find_window_error
from modules.command import did_you_mean
from modules.errors import DatasetError
from modules.media.lengths import ClipLengths
from modules.run_limits import describe_outside, is_limited
from modules.text_files import real_path
from protocols.rules import ReferenceRules

if TYPE_CHECKING:  # torch is not loaded to read a file
    from protocols.family import Caches

__all__ = ["KEYS", "MODES", "DatasetConfig", "DatasetTable", "load_dataset_config"]

logger = logging.getLogger(__name__)

TOP_LEVEL = ("general", "datasets")
MAX_LISTED = 100  # maximum number of problems in a message
KNOWN_KEYS = {*KEYS, *forms.OTHER_SPELLINGS, *SUBSET_KEYS, *OTHER_NAMES}  # of both dataset file layouts
# keys that only tables with subsets have, and the end of the message if another table has the key
SUBSET_KEY_REASONS = {
    name: "is a key of tables with [[datasets.subsets]] (docs/image_datasets.md), and there are none. Omit "
    "it, or convert the file to that layout"
    for name, key in SUBSET_KEYS.items()
    if name not in KEYS and key.level != SUBSET
}

# A table of audio files is read as a table of clips with 25 black frames a second, which no network sees.
# source key of audio files -> source key of clips
VIDEO_KEY_BY_AUDIO_KEY = {"audio_directory": "video_directory", "audio_jsonl_file": "video_jsonl_file"}
# values of these tables that cannot be changed
BLACK = {"resolution": [64, 64], "enable_bucket": False, "bucket_no_upscale": False, "source_fps": "auto"}
# its defaults: 497 frames at 25 a second are the 20 seconds for which LTX-2 has positions
FULL_AUDIO = {"frame_extraction": "full", "max_frames": 497, "target_fps": 25.0}
GUIDE_PREFIXES = ("keyframe_guide", "latent_idx_guide")
GUIDE_KEYS = tuple(name for name in KEYS if name.startswith(GUIDE_PREFIXES))
# keys with a list of further guides: each guide has a value in all three
EXTRA_GUIDE_KEYS = (
    "keyframe_guide_extra_directories",
    "keyframe_guide_extra_frame_idxs",
    "keyframe_guide_extra_strengths",
)


def load_dataset_config(path: Path, typed: SubsetOptions | None = None) -> DatasetConfig:
    """Read a dataset file (.toml or .json), in our own layout or in the layout of sd-scripts with subsets.

    Media folders are not checked here but in `find_sources`, because training needs only the caches.

    Args:
        path: Path of the file.
        typed: Values from the command line, used for keys that a file with subsets lacks.

    Raises:
        DatasetError: If the file is unreadable or has invalid keys or values; the message lists all of them.
    """
    errors: list[str] = []
    content: Table = forms.without_unneeded(path, forms.parse_config(path))
    if not content.keys() <= {*TOP_LEVEL}:
        content = _move_keys_to_general(path, content, errors)
        errors += [
            forms.unknown(name, value, TOP_LEVEL) for name, value in content.items() if name not in TOP_LEVEL
        ]
    if _has_subsets(content):
        tables = read_subsets(path, content, typed, errors)
    else:
        if typed is not None:
            # subset options on the command line have no effect on a dataset file without subsets
            unused = sorted(set(typed_options(typed).values()))
            if unused:
                logger.warning(
                    "%s: ignored because the tables of %s have no subsets", ", ".join(unused), path
                )
        tables = _read_tables(path, content, errors)
    errors += _find_cache_folder_errors(tables)
    if len(tables) > 1:
        # animations in a folder of both an image and a video table belong to the video table only
        clip_folders = {
            folder_id(table.source.directory)
            for table in tables
            if table.kind == "video" and table.source.directory
        }
        assigned = []
        for table in tables:
            if (
                table.kind == "image"
                and table.source.directory
                and folder_id(table.source.directory) in clip_folders
            ):
                table = table.with_values(excludes_animations=True)
            assigned.append(table)
        tables = tuple(assigned)
    if errors:
        raise _make_config_error(path, content, errors)
    return DatasetConfig(path, tables)


def _has_subsets(content: Table) -> bool:
    """Return whether a dataset file has the layout of sd-scripts, with [[datasets.subsets]] tables."""
    datasets = content.get("datasets")
    for entry in datasets if isinstance(datasets, list) else [datasets]:
        if isinstance(entry, dict) and any(key.startswith("subset") for key in entry):
            return True
    return False


def _make_config_error(path: Path, content: Table, errors: Sequence[str]) -> DatasetError:
    """Return the error that lists all errors of a dataset file, with a hint if another trainer made it."""
    lines = [f"{path} cannot be used:", *errors[:MAX_LISTED]]
    if len(errors) > MAX_LISTED:
        lines.append(f"... and {len(errors) - MAX_LISTED} more")
    hint = forms.other_trainers().find_trainer_hint(content)
    if hint:
        lines.append(hint)
    return DatasetError("\n  ".join(lines))


def _read_tables(path: Path, content: Table, errors: list[str]) -> tuple[DatasetTable, ...]:
    """Return the tables of a file in our own layout. Errors are added to `errors`."""
    general = forms.without_nulls(content.get("general"), "[general]", errors)
    entries = content.get("datasets")
    if not isinstance(entries, list) or not entries:
        entries = _explain_missing_tables(entries, errors)
    reason = "is allowed only in a [[datasets]] table; move it there"
    misplaced_reasons = {name: reason for name, key in KEYS.items() if not key.in_general}
    general = forms.read_keys(
        KEYS,
        general,
        table_label="[general]",
        errors=errors,
        misplaced_reasons=misplaced_reasons,
        other_spellings=forms.OTHER_SPELLINGS,
        other_layout_reasons=SUBSET_KEY_REASONS,
    )
    tables = []
    for index, entry in enumerate(entries):
        table = _read_table(path, index, entry=entry, general=general, errors=errors)
        if table is not None:
            tables.append(table)
    return tuple(tables)


def _find_cache_folder_errors(tables: Sequence[DatasetTable]) -> list[str]:
    """Return an error for each cache folder that is a file, is forbidden, or belongs to another table."""
    errors = []
    first_tables: dict[str, DatasetTable] = {}  # first table of each cache directory, by its `folder_id`
    for table in tables:
        folder = table.cache_directory
        nearest_existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if nearest_existing is not None and not nearest_existing.is_dir():
            errors.append(
                f"{table.label}: cache_directory = {folder}: {nearest_existing} is a file; name a "
                "folder, which is created if it does not exist"
            )
        if table.source.download_directory is not None or is_limited():
            errors += _find_forbidden_folders(table)
        has_shared_format = table.cache_format in SHARED_CACHES  # another program's
        if has_shared_format and table.kind == "video":
            key = f'cache_format = "{table.cache_format}"'
            errors.append(f'{table.label}: {key} is for image tables; use "files" or "shards"')
        first_table = first_tables.setdefault(folder_id(folder), table)
        may_share = has_shared_format and first_table.cache_format == table.cache_format
        if first_table is not table and not may_share:
            second_number = table.label.removeprefix("[[datasets]] ")
            errors.append(
                f"{first_table.label} and {second_number} share the cache directory {folder}; "
                "give each its own cache_directory (the default is the folder of the images or videos)"
            )
    return errors


def _find_forbidden_folders(table: DatasetTable) -> list[str]:
    """Return an error line if the table's folder for caches or downloads must not be written to."""
    # A dataset file from somebody else must not make the program write files outside the cache folders.
    cache, downloads = table.cache_directory, table.source.download_directory
    error = describe_outside(cache)
    if error is not None:
        return [f"{table.label}: caches go to cache_directory = {cache}, and {error}"]
    if downloads is None or real_path(downloads).is_relative_to(real_path(cache)):
        return []
    return [
        f"{table.label}: download_directory = {downloads} is outside cache_directory = {cache}, and a "
        f"dataset file must not name another place for downloads. Remove it from the file, to use "
        f"{cache / 'downloads'}, or pass it to the caching command: --download_directory {downloads}"
    ]


def with_downloads(config: DatasetConfig, folder: Path) -> DatasetConfig:
    """Return a copy of the configuration in which all tables store downloads in `folder`."""
    if not any(get_source_format(table).source in SOURCES_WITH_ADDRESSES for table in config.datasets):
        logger.warning(
            "--download_directory %s is ignored because no table of the dataset has %s, whose rows may name "
            "addresses: nothing is downloaded",
            folder,
            ", ".join(SOURCES_WITH_ADDRESSES),
        )
    tables = tuple(table.with_values(download_directory=folder) for table in config.datasets)
    return replace(config, datasets=tables)


def _move_keys_to_general(path: Path, content: Table, errors: list[str]) -> Table:
    """Return the content of a dataset file with the keys above all tables moved into [general]."""
    # Some guides omit the heading [general]. Keys that only [[datasets]] may have become errors in `errors`.
    only_in_datasets = {name for name, key in KEYS.items() if not key.in_general}
    # all keys that [general] may have in one of the two layouts, in all spellings
    names = {name for name, key in SUBSET_KEYS.items() if key.level != SUBSET}
    names |= {name for name, key in KEYS.items() if key.in_general}
    names |= {*OTHER_NAMES, *forms.OTHER_SPELLINGS}
    movable = names - only_in_datasets
    errors += [
        f"{name} is above all tables: write it below [[datasets]]"
        for name in content
        if name in only_in_datasets
    ]
    content = {name: value for name, value in content.items() if name not in only_in_datasets}
    moved = {name: value for name, value in content.items() if name in movable}
    general = content.get("general", {})
    # if [general] is not a table, nothing can be added to it; its reader reports the error
    if not moved or not isinstance(general, dict):
        return content
    duplicates = [name for name in moved if name in general]
    if duplicates:
        errors.append(f"above all tables and in [general]: {', '.join(duplicates)}; omit one")
    logger.info("%s: read as if in [general]: %s, which are above all tables", path, ", ".join(moved))
    remaining = {name: value for name, value in content.items() if name not in moved}
    return {**remaining, "general": {**general, **moved}}


def for_family(config: DatasetConfig, family: "Caches", for_texts: bool = False) -> DatasetConfig:
    """Adapt a dataset configuration to a model family: clip lengths, frame rate, audio and references.

    1. Warn about keys that the family ignores, and round clip lengths to those that it accepts.
    2. Set the fields of each table that the family decides.
    3. Check layers, guides and references, and add the family's rules for references.

    Section keys of a table that the family ignores are logged as a warning, unless `for_texts` says that only
    texts are encoded.

    Raises:
        DatasetError: If a table has layers, guides or references that the family does not use.
    """
    latent, abilities = family.latent, family.abilities
    for table in config.datasets:
        section_keys = table.non_default_values(forms.SECTIONS)
        if section_keys and not (latent.in_sections or for_texts):
            logger.warning(
                "%s: %s: ignored, because only FramePack, and Wan and MiniMax-H3 with --one_frame, use them",
                table.name,
                " and ".join(section_keys),
            )
    config = with_lengths(config, latent.lengths)
    tables = []
    for table in config.datasets:
        if table.kind == "video" and abilities.match_audio_schedule and table.buckets.source_fps is None:
            table = table.with_values(source_fps=forms.AUTO)  # each file has its own frame rate
        finds_audio = latent.caches_audio and table.kind == "video"
        reads_references = abilities.takes_row_references
        tables.append(
            table.with_values(finds_audio_by_name=finds_audio, reads_row_references=reads_references)
        )
    config = replace(config, datasets=tuple(tables))
    if latent.has_layers or any(table.source.multiple_target for table in tables):
        from dataset.sources.layers import check_layers  # few models learn layers

        check_layers(config, latent.has_layers, family.name)
    guided = [table.name for table in tables if table.references.has_guides]
    if guided and not abilities.trains_with_guides:
        raise DatasetError(
            f"{guided[0]}: this model is not trained with guides (keyframe_guide_directory, "
            "latent_idx_guide_directory). Omit these keys"
        )
    config = with_references(config, family.references, abilities.references)
    has_audio_references = any(table.references.reference_audio_directory is not None for table in tables)
    return _with_audio_references(config, family) if has_audio_references and not for_texts else config


def _with_audio_references(config: DatasetConfig, family: "Caches") -> DatasetConfig:
    """Return the configuration with the family's dropout rate for tables with reference audio."""
    from protocols.family import get_audio_spec  # loads torch, which the family has loaded

    audio = get_audio_spec(family)
    tables = []
    for table in config.datasets:
        if table.references.reference_audio_directory is not None:
            if audio is None:
                raise DatasetError(
                    f"{table.name}: reference_audio_directory: this run does not train audio. Choose a mode "
                    "of the model with audio, or omit the key"
                )
            if not audio.takes_references:
                raise DatasetError(
                    f"{table.name}: reference_audio_directory: this run takes no audio as reference. Omit "
                    "it, or change the option that selects the references to learn"
                )
            table = table.with_values(reference_dropout_rate=audio.reference_dropout_rate)
        tables.append(table)
    return replace(config, datasets=tuple(tables))


def with_empty_prompts(config: DatasetConfig) -> DatasetConfig:
    """Return a copy of the configuration in which the empty prompt is cached, too."""
    tables = [table.with_values(uses_empty_prompt=True) for table in config.datasets]
    return replace(config, datasets=tuple(tables))


def with_audio_files(config: DatasetConfig, option: str, folder: Path | None) -> DatasetConfig:
    """Return the configuration with audio from files that have the names of the clips in video folders.

    Tables with an audio_directory do not change.

    Args:
        config: The dataset file.
        option: Option that the user set, for the warning that a list's rows already name audio files.
        folder: Folder of the audio files; None if they are next to the clips.
    """
    tables = []
    for table in config.datasets:
        if table.kind == "video" and table.source.audio_directory is None and table.source.directory is None:
            logger.warning("%s: %s is ignored: audio_path in each row names its audio", table.name, option)
        elif (
            table.kind == "video" and table.source.audio_directory is None and not table.source.is_audio_only
        ):
            table = table.with_values(
                audio_directory=folder or table.source.directory, audio_from_option=True
            )
        tables.append(table)
    return replace(config, datasets=tuple(tables))


def with_lengths(config: DatasetConfig, lengths: ClipLengths) -> DatasetConfig:
    """Round target_frames down to clip lengths that the family accepts, with a warning."""
    tables = []
    for table in config.datasets:
        targets = table.buckets.target_frames
        rounded = tuple(sorted({lengths.fit(target) for target in targets}))
        if not set(targets) <= set(rounded):
            logger.warning(
                "%s: target_frames %s become %s, because clips of this model have %s frames",
                table.name,
                list(targets),
                list(rounded),
                lengths,
            )
        tables.append(table.with_values(target_frames=rounded))
    return replace(config, datasets=tuple(tables))


def with_references(config: DatasetConfig, rules: ReferenceRules | None, hint: str = "") -> DatasetConfig:
    """Check the keys about references; return the configuration with a family's rules for them.

    `hint` names the variant of the model that uses clip references; error messages end with it.

    Raises:
        DatasetError: If a table has a key that the family does not use.
    """
    if rules is not None and rules.seen_by_text:
        for table in config.datasets:
            if table.buckets.augmentation.flip:
                raise DatasetError(
                    f"{table.name}: flip_aug mirrors reference images, but the text encoder would still see "
                    "the original ones. Omit it"
                )
    errors: list[str] = []
    for table in config.datasets:
        if (
            table.references.reference_directory is not None
            or table.references.control_mask_directory is not None
        ):
            errors += _find_clip_reference_errors(table, rules, hint)
        if table.kind == "image" and (rules is None or rules.clips):
            if table.references.reference_dropout_rate:
                errors.append(
                    f"{table.name}: reference_dropout_rate: this model takes no reference images that could "
                    "be dropped. Omit it"
                )
            changed_keys = table.non_default_values(forms.REFERENCES)
            if changed_keys:
                errors.append(
                    f"{table.name}: {' and '.join(changed_keys)}: this model resizes control images to the "
                    "size of their image; the keys are for models that take reference images. Omit them"
                )
    if errors:
        raise DatasetError("\n".join(errors))
    if rules is None:
        return config
    tables = []
    for table in config.datasets:
        if rules.clips:  # the model takes references of clips; other models take reference images
            table = table.with_values(clip_rules=rules, reference_dropout_rate=rules.dropout_probability)
        elif table.kind == "image":
            table = table.with_values(rules=rules)
        tables.append(table)
    return replace(config, datasets=tuple(tables))


def _find_clip_reference_errors(table: DatasetTable, rules: ReferenceRules | None, hint: str) -> list[str]:
    """Return an error line for each key about clip references that the model does not use."""
    takes_clips = rules is not None and rules.clips
    takes_masks = rules is not None and rules.clips and rules.control_masks
    remedy = f"Omit it. {hint}" if hint else "Omit it"
    errors = []
    if table.references.reference_directory is not None and not takes_clips:
        accepted = "none" if rules is None else "them from control_directory"
        errors.append(
            f"{table.name}: reference_directory has clips and images as references; this model takes "
            f"{accepted}. {remedy}"
        )
    if table.references.control_mask_directory is not None and not takes_masks:
        errors.append(
            f"{table.name}: control_mask_directory: this model takes no masks of control clips; loss masks "
            f"are in mask_directory. {remedy}"
        )
    return errors


def _explain_missing_tables(entry: Any, errors: list[str]) -> list[Any]:
    """Add an error, because there is no list of [[datasets]] tables; return the tables to read anyway."""
    # `entry` is the value of `datasets`. A single table is returned, so that errors in its keys are reported,
    # too.
    if isinstance(entry, dict):
        errors.append("[datasets] needs double brackets: write [[datasets]], once for each folder or list")
        return [entry]
    # an unknown top-level key such as [[dataset]] has been reported with a hint; one error is enough
    is_misspelt = entry is None and any("Did you mean datasets?" in error for error in errors)
    if not is_misspelt:
        errors.append("there is no [[datasets]] table; each folder or list of images or videos needs one")
    return []


def _read_table(
    path: Path, index: int, entry: Any, general: dict[str, Any], errors: list[str]
) -> DatasetTable | None:
    """Read a table of a dataset file. If it is invalid, return None and add errors to `errors`."""
    # 1. Find the key that names the source; a table of audio is read as a table of clips.
    # 2. Read and check the keys.
    # 3. Set the fields that depend on others.
    # The value of a key comes from the table itself, otherwise from [general] (`general`), otherwise it is
    # the default.
    table_label = f"[[datasets]] {index + 1}"
    num_errors_before = len(errors)
    entry = forms.without_nulls(entry, table_label, errors)
    source_key = _find_source(entry, table_label, errors)
    if source_key is None:
        return None
    # the key that names images or clips; audio is read as clips, whose frames are black
    media_key = VIDEO_KEY_BY_AUDIO_KEY.get(source_key, source_key)
    if media_key != source_key:
        entry = _audio_to_clips(entry, source_key, general)
    kind: Literal["image", "video"] = "image" if media_key.startswith("image") else "video"
    declared = forms.read_keys(
        KEYS,
        entry,
        table_label=table_label,
        errors=errors,
        misplaced_reasons=_find_misplaced_keys(media_key, kind),
        other_spellings=forms.OTHER_SPELLINGS,
        other_layout_reasons=SUBSET_KEY_REASONS,
    )
    validation_error = find_unused(entry) if entry.get("validation") else None
    if validation_error is not None:
        errors.append(f"{table_label}: {validation_error}")
    values = {name: key.default for name, key in KEYS.items()} | general | declared
    # invalid values of [general] have been reported before
    if len(errors) > num_errors_before or forms.INVALID in values.values():
        return None
    fields = _make_fields(values, source_key, media_key)
    conflict = _find_conflict(fields, source_key, FORMAT_BY_SOURCE[media_key])
    if conflict is not None:
        errors.append(f"{table_label}: {conflict}")
        return None
    _complete_fields(fields, FORMAT_BY_SOURCE[media_key], f"{path}, {table_label}")
    return DatasetTable(path, index, kind).with_values(**fields)


def _make_fields(values: dict[str, Any], source_key: str, media_key: str) -> dict[str, Any]:
    """Return the fields of a `DatasetTable` by name, from the values of all keys."""
    source_format = FORMAT_BY_SOURCE[media_key]
    fields = {name: value for name, value in values.items() if name not in {*SOURCES, *FORMAT_KEYS}}
    fields |= {"directory": None, "is_audio_only": source_key != media_key, "format_keys": None}
    if source_format.keys is None:  # the source is a field, such as `directory`
        fields[source_format.source] = values[media_key]
        source_folder = fields["directory"]
    else:  # the format has keys of its own, kept together in one field
        # the keys that only this source format has, as its dataclass
        assert source_format.keys is not None
        own = {name: values[name] for name in declared_keys(source_format.keys)}
        fields["format_keys"] = source_format.keys(**{**own, source_format.source: values[media_key]})
        source_folder = fields["format_keys"].folder
    fields["cache_directory"] = fields["cache_directory"] or source_folder
    return fields


def _find_source(entry: dict[str, Any], table_label: str, errors: list[str]) -> str | None:
    """Return the key that names where a table's items come from, such as `image_directory`."""
    # If there is not exactly one, returns None and adds an error to `errors`.
    sources = [name for name in SOURCES if name in entry]
    if not sources:
        sources = [name for name in VIDEO_KEY_BY_AUDIO_KEY if name in entry]
    if len(sources) == 1:
        return sources[0]
    if sources:
        names = " and ".join(sources)
        errors.append(f"{table_label}: {names} exclude each other; make a [[datasets]] table for each")
        return None
    # keys of other trainers without a counterpart explain more than the missing source
    unsupported = [forms.unknown(key, value, ()) for key, value in entry.items() if key in forms.NO_KEYS]
    if unsupported:
        errors += [f"{table_label}: {line}" for line in unsupported]
        return None
    hints = [did_you_mean(key, SOURCES) for key in entry if key not in KEYS]
    hint = next(filter(None, hints), "")
    names = ", ".join(SOURCES)
    errors.append(f"{table_label}: the source of its items is missing; it needs one of {names}.{hint}")
    return None


def _find_misplaced_keys(source_key: str, kind: str) -> dict[str, str]:
    """Return the keys that are not allowed in a table with this source key, each with the reason."""
    # `kind` is "image" or "video".
    misplaced_reasons = {}
    for name in KEYS.keys() - KEYS_BY_SOURCE[source_key]:
        if name in SOURCES and kind in KEYS[name].kinds:
            continue  # two sources: reported by _find_source
        fitting_sources = []
        for source, keys in KEYS_BY_SOURCE.items():
            if name in keys and kind in KEYS[source].kinds:
                fitting_sources.append(source)
        if fitting_sources:
            misplaced_reasons[name] = f"is for tables with {' or '.join(fitting_sources)}, not {source_key}"
        else:
            misplaced_reasons[name] = (
                f"is for {KEYS[name].kinds[0]} tables; {source_key} makes this one {kind}s"
            )
    return misplaced_reasons


def _audio_to_clips(entry: dict[str, Any], source_key: str, general: dict[str, Any]) -> dict[str, Any]:
    """Convert the keys of an audio table to keys for a table of clips with black frames."""
    for key in forms.LENGTHS:
        if key in entry:
            logger.info("%s: not needed: audio is never padded, its last few frames are cut off", key)
    for key in BLACK:
        if key in entry:
            logger.info("%s: ignored, because audio files have no images", key)
    defaults = {key: value for key, value in FULL_AUDIO.items() if key not in general}
    if "target_frames" in entry:  # the clips have these lengths, not the length of the file
        defaults.pop("frame_extraction", None)
    declared = {key: value for key, value in entry.items() if key != source_key and key not in forms.LENGTHS}
    return {**defaults, **declared, **BLACK, VIDEO_KEY_BY_AUDIO_KEY[source_key]: entry[source_key]}


def _complete_fields(fields: dict[str, Any], source_format: SourceFormat, table_label: str) -> None:
    """Set the fields of a table that depend on others."""
    if source_format.has_dependent_keys:
        source_format.complete(fields, table_label)
    if fields["target_fps"] is not None and fields["source_fps"] is None:
        fields["source_fps"] = forms.AUTO  # frames are dropped or repeated by their times
    fields["bucket_no_upscale"] = fields["bucket_no_upscale"] and fields["enable_bucket"]  # no effect alone
    fields["has_guides"] = bool(fields["keyframe_guide_directory"] or fields["latent_idx_guide_directory"])
    fields["target_frames"] = tuple(sorted(set(fields["target_frames"])))
    if fields["frame_extraction"] == "uniform" and fields["frame_sample"] == 1:
        logger.warning(
            '%s: frame_extraction = "uniform" with frame_sample = 1 is the same as "head"', table_label
        )
        fields["frame_extraction"] = "head"


def _find_conflict(fields: Mapping[str, Any], source_key: str, source_format: SourceFormat) -> str | None:
    """Return the first conflict between the keys of a table, as text; None if there is none."""
    # `source_key` names the table's source, whose format may have conflicts of its own.
    if not fields["cache_directory"]:
        return f"cache_directory is required with {source_key}"
    conflict = source_format.find_conflict(fields) if source_format.has_dependent_keys else None
    if conflict is not None:
        return conflict
    if fields["mask_directory"] and fields["alpha_mask"]:
        return "mask_directory cannot be used here; omit it or alpha_mask"
    for key in ("alpha_mask", "worse_directory"):
        if fields["multiple_target"] and fields[key]:
            return f"{key} cannot be used with multiple_target, whose layers are learned with their alpha"
    if fields["is_audio_only"] and fields["worse_directory"]:
        return "worse_directory is for images and clips, not for audio alone; omit it"
    if fields["is_audio_only"] and fields["audio"] == forms.IGNORE:
        return 'audio = "ignore" leaves nothing to learn of audio files; omit it'
    guide_keys = [key for key in GUIDE_KEYS if fields[key] != KEYS[key].default]
    if guide_keys:
        conflict = _find_guide_conflict(fields, guide_keys)
    if conflict is None and None not in (fields["min_timestep"], fields["max_timestep"]):
        conflict = find_window_error(fields)
    return conflict


def _find_guide_conflict(fields: Mapping[str, Any], changed_keys: Sequence[str]) -> str | None:
    """Return a conflict between a table's keys for guides, as text; None if there is none."""
    # `changed_keys` are the keys for guides that are not at their defaults.
    for prefix in GUIDE_PREFIXES:
        folder_key = f"{prefix}_directory"
        prefixed_keys = [key for key in changed_keys if key.startswith(prefix)]
        if prefixed_keys and not fields[folder_key]:
            return f"{prefixed_keys[0]} needs {folder_key}"
    counts = {key: len(fields[key] or ()) for key in EXTRA_GUIDE_KEYS}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} in {key}" for key, count in counts.items())
        return f"each guide needs a folder, a frame and a strength: {text}"
    return None
