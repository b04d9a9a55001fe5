"""Read a dataset configuration, a TOML or JSON file, to frozen tables. Standard library only.

Allowed values of each key are in `dataset/config_keys.py`. Paths are relative to the working folder. All
problems of a file are reported together.
"""

import difflib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataset.config_keys import (
    CAPTION_DEFAULTS,
    FRAME_KEYS,
    KEYS,
    LEARNING_DEFAULTS,
    MODES,
    ONLY_WITH,
    SECTION_DEFAULTS,
    SOURCES,
    Unfit,
)
from modules.addresses import hide_secrets
from modules.errors import DatasetError
from modules.text_encodings import guess_encoding
from modules.text_files import explain_toml, parse_json, parse_toml, read_text

logger = logging.getLogger(__name__)

FRAME_STEP = 4  # target_frames are 4n + 1 for every family
Table = Mapping[str, Any]


@dataclass(frozen=True)
class DatasetTable:
    """One `[[datasets]]` entry with all defaults filled in, also of keys for the other kind of table."""

    config_path: Path
    index: int  # place in the file, from 0
    kind: Literal["image", "video"]
    # exactly one of these five is set
    directory: Path | None  # image_directory or video_directory
    jsonl_file: Path | None  # image_jsonl_file or video_jsonl_file
    table_file: Path | None  # image_table_file or video_table_file
    tars: tuple[str, ...] | None  # image_tars or video_tars: paths, globs or addresses
    cogvideox_root: Path | None
    control_directory: Path | None
    cache_directory: Path
    cache_format: Literal["files", "shards"]
    resolution: tuple[int, int]  # width, height
    caption_extension: str | None
    trigger_word: str  # these three: "" for none
    caption_prefix: str
    caption_suffix: str
    multi_caption: bool  # each line of a caption file is a caption
    caption_dropout_rate: float
    batch_size: int
    num_repeats: int
    enable_bucket: bool
    bucket_no_upscale: bool  # always False if enable_bucket is False
    mask_directory: Path | None
    alpha_mask: bool  # transparent parts are not learned
    validation: bool  # not trained on
    prior_loss_weight: float  # factor on the loss of its items in training
    target_frames: tuple[int, ...]  # ascending, each 4n + 1
    frame_extraction: str
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | str | None  # AUTO: by the times in each file
    dataset_file: Path | None  # of cogvideox_root
    path_column: str | None  # of table_file; None: the usual names
    caption_column: str | None  # of table_file and cogvideox_root; None: the usual names
    video_column: str | None  # of cogvideox_root
    id_token: str  # of cogvideox_root; "" for none
    load_tensors: bool  # of cogvideox_root: latents are computed already
    allow_urls: bool  # sources may lie elsewhere
    download_directory: Path | None  # where these are kept; None: in the cache directory
    fp_latent_window_size: int
    fp_1f_clean_indices: tuple[int, ...] | None
    fp_1f_target_index: int | None
    fp_1f_no_post: bool

    @property
    def name(self) -> str:
        """Return the table's name for messages: `data.toml, [[datasets]] 2 (clips)`."""
        return f"{self.config_path}, [[datasets]] {self.index + 1} ({self.source})"

    @property
    def source(self) -> Path:
        """Return the folder or list that the items come from; of tars the first name, without passwords."""
        source = self.directory or self.jsonl_file or self.table_file or self.cogvideox_root
        if source is None:
            assert self.tars is not None
            source = Path(hide_secrets(self.tars[0]))
        return source

    @property
    def source_key(self) -> str:
        """Return which key of SOURCES the table has."""
        if self.cogvideox_root is not None:
            return "cogvideox_root"
        ends = ("directory", "jsonl_file", "table_file", "tars")
        return f"{self.kind}_{next(end for end in ends if getattr(self, end) is not None)}"

    @property
    def control_count(self) -> int:
        """Return how many control images an image has, if it has any."""
        return len(self.fp_1f_clean_indices) if self.fp_1f_clean_indices else 1

    @property
    def stated_fps(self) -> float | None:
        """Return source_fps if it is a number."""
        return None if isinstance(self.source_fps, str) else self.source_fps

    @property
    def section_keys(self) -> dict[str, Any]:
        """Return the keys of SECTION_DEFAULTS that are set to another value, as JSON values."""
        given = self._changed(SECTION_DEFAULTS)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def caption_settings(self) -> dict[str, Any]:
        """Return the keys of CAPTION_DEFAULTS that are set to another value."""
        return self._changed(CAPTION_DEFAULTS)

    @property
    def learning_keys(self) -> dict[str, Any]:
        """Return the keys of LEARNING_DEFAULTS that are set to another value, as JSON values."""
        masks = {} if self.mask_directory is None else {"mask_directory": self.mask_directory.name}
        return self._changed(LEARNING_DEFAULTS) | masks

    def _changed(self, defaults: Table) -> dict[str, Any]:
        return {name: getattr(self, name) for name, usual in defaults.items() if getattr(self, name) != usual}

    def describe(self, has_control: bool | None = None) -> dict[str, Any]:
        """Return the table's entry of the metadata list `ss_datasets`.

        has_control: None takes it from control_directory.
        """
        entry: dict[str, Any] = {
            "resolution": list(self.resolution),
            "caption_extension": self.caption_extension,
            "batch_size_per_device": self.batch_size,
            "num_repeats": self.num_repeats,
            "enable_bucket": self.enable_bucket,
            "bucket_no_upscale": self.bucket_no_upscale,
            self.source_key: self.source.name,
        }
        if self.control_directory is not None:
            entry["control_directory"] = self.control_directory.name
        entry["has_control"] = self.control_directory is not None if has_control is None else has_control
        if self.kind == "video":
            entry["target_frames"] = list(self.target_frames)
            names = ("frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
            entry |= {name: getattr(self, name) for name in names}
        return entry | self.section_keys | self.learning_keys


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset file that has been read and checked."""

    path: Path
    datasets: tuple[DatasetTable, ...]


def load_dataset_config(path: Path) -> DatasetConfig:
    """Read `path` (.toml or .json).

    Source folders are not checked, because training needs only the caches; `find_sources` checks them.
    Raises DatasetError, with file, table, key, the value found and the values allowed.
    """
    problems: list[str] = []
    content = _parse(path)
    problems += [
        _unknown(name, value, ("general", "datasets"))
        for name, value in content.items()
        if name not in _TOP_LEVEL
    ]
    general = _without_nulls(content.get("general"), "[general]", problems)
    entries = content.get("datasets")
    is_misspelt = entries is None and any("Did you mean datasets?" in problem for problem in problems)
    if isinstance(entries, dict):
        problems.append(
            "[datasets] needs two pairs of brackets: write [[datasets]], once for each folder or list"
        )
        entries = [entries]
    elif not isinstance(entries, list) or not entries:
        if not is_misspelt:
            problems.append(
                "there is no [[datasets]] table; each folder or list of images or videos needs one"
            )
        entries = []
    _check_general(general, problems)
    tables = [_read_table(path, index, entry, general, problems) for index, entry in enumerate(entries)]
    datasets = tuple(table for table in tables if table is not None)
    _check_cache_directories(datasets, problems)
    if problems:
        raise DatasetError("\n  ".join([f"{path} cannot be used:", *problems]))
    return DatasetConfig(path, datasets)


_TOP_LEVEL = frozenset({"general", "datasets"})


# --- reading ---


def _parse(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in {".toml", ".json"}:
        raise DatasetError(
            f"{path}: a dataset configuration ends in .toml or .json, this ends in {path.suffix or 'nothing'}"
        )
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        guess = guess_encoding(error.object)
        seems = "" if guess is None else f"; it looks like {guess.name}"
        raise DatasetError(
            f"{path} is not UTF-8 text (byte {error.start}{seems}). Save it as UTF-8 in your editor."
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read: {error.strerror}. Give --dataset_config the file's path."
        ) from error
    try:
        content = parse_toml(text) if path.suffix.lower() == ".toml" else parse_json(text, _no_repeats)
    except ValueError as error:  # both parsers' errors are ValueErrors with line and column
        hint = explain_toml(text, str(error)) if path.suffix.lower() == ".toml" else ""
        raise DatasetError(f"{path} is not valid {path.suffix[1:].upper()}: {error}{hint}") from None
    if not isinstance(content, dict):
        raise DatasetError(f'{path}: the top level must be an object with "datasets"')
    return content


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object"
        )
    return content


def _without_nulls(table: Any, name: str, problems: list[str]) -> dict[str, Any]:
    if table is None:
        return {}
    if not isinstance(table, dict):
        is_doubled = name == "[general]" and isinstance(table, list)
        problems.append(
            "[[general]] needs one pair of brackets: write [general]"
            if is_doubled
            else f"{name} = {_show(table)} is not a table of keys"
        )
        return {}
    return {key: value for key, value in table.items() if value is not None}


def _check_general(general: Table, problems: list[str]) -> None:
    allowed = [name for name, key in KEYS.items() if key.in_general]
    for name, value in general.items():
        if name in allowed:
            _read_value(name, value, "[general]", problems)
        elif name in KEYS:
            problems.append(
                f"[general]: {name} = {_show(value)} is allowed only in a [[datasets]] table; move it there"
            )
        else:
            problems.append(f"[general]: {_unknown(name, value, allowed)}")


def _read_table(
    path: Path, index: int, entry: Any, general: Table, problems: list[str]
) -> DatasetTable | None:
    where = f"[[datasets]] {index + 1}"
    before = len(problems)
    entry = _without_nulls(entry, where, problems)
    source_key = _source_key(entry, where, problems)
    if source_key is None:
        return None
    kind: Literal["image", "video"] = "image" if source_key.startswith("image") else "video"
    _check_names(entry, kind, source_key, where, problems)
    values = {name: key.default for name, key in KEYS.items()}
    for name, value in {**general, **entry}.items():
        if name in KEYS:
            place = where if name in entry else "[general]"
            values[name] = _read_value(name, value, place, problems if name in entry else [])
    if len(problems) > before or any(values[name] is _BAD for name in values):
        return None
    return _finish_table(path, index, kind, source_key, values, problems)


def _source_key(entry: Table, where: str, problems: list[str]) -> str | None:
    given = [name for name in SOURCES if name in entry]
    if len(given) == 1:
        return given[0]
    if given:
        problems.append(
            f"{where}: {' and '.join(given)} exclude each other; make a [[datasets]] table for each"
        )
    else:
        near = [
            name for key in entry if key not in KEYS for name in difflib.get_close_matches(key, SOURCES, 1)
        ]
        hint = f" Did you mean {near[0]}?" if near else ""
        problems.append(
            f"{where}: the source of its items is missing; it needs one of {', '.join(SOURCES)}.{hint}"
        )
    return None


def _check_names(entry: Table, kind: str, source_key: str, where: str, problems: list[str]) -> None:
    allowed = [name for name, key in KEYS.items() if kind in key.kinds]
    for name, value in entry.items():
        if name not in KEYS:
            problems.append(f"{where}: {_unknown(name, value, allowed)}")
        elif name not in allowed:
            other = "video" if kind == "image" else "image"
            problems.append(
                f"{where}: {name} = {_show(value)} is for {other} tables; {source_key} makes this one {kind}s"
            )
        elif not source_key.endswith(ONLY_WITH.get(name, source_key)):
            sources = [one for one in SOURCES if kind in KEYS[one].kinds and one.endswith(ONLY_WITH[name])]
            theirs = f"is for tables with {' or '.join(sources)}, not {source_key}"
            problems.append(f"{where}: {name} = {_show(value)} {theirs}")


_BAD = object()  # marks a value that has been reported


def _read_value(name: str, value: Any, where: str, problems: list[str]) -> Any:
    key = KEYS[name]
    try:
        return key.read(value)
    except Unfit:
        near = (
            difflib.get_close_matches(value, MODES, 1)
            if name == "frame_extraction" and isinstance(value, str)
            else []
        )
        hint = f'. Did you mean "{near[0]}"?' if near else ""
        problems.append(f"{where}: {name} = {_show(value)} ({_kind_of(value)}); allowed: {key.allowed}{hint}")
        return _BAD


def _finish_table(
    path: Path,
    index: int,
    kind: Literal["image", "video"],
    source_key: str,
    values: dict[str, Any],
    problems: list[str],
) -> DatasetTable | None:
    where = f"[[datasets]] {index + 1}"
    ends = ("directory", "jsonl_file", "table_file", "tars")
    given = {end: values[f"{kind}_{end}"] for end in ends} | {"cogvideox_root": values["cogvideox_root"]}
    directory, jsonl_file = given["directory"], given["jsonl_file"]
    fields = given | {name: value for name, value in values.items() if name not in SOURCES}
    if jsonl_file and fields["control_directory"]:
        logger.warning(
            "%s, %s: control_directory is ignored because a list itself names control files (control_path)",
            path,
            where,
        )
        fields["control_directory"] = None
    folder = directory or given["cogvideox_root"]
    if fields["cache_directory"] is None and not folder:
        problems.append(f"{where}: cache_directory is required with {source_key}")
        return None
    if fields["mask_directory"] and (jsonl_file or fields["alpha_mask"]):
        other = "give mask_path in the lines of the list" if jsonl_file else "leave out it or alpha_mask"
        problems.append(f"{where}: mask_directory cannot be used here; {other}")
        return None
    if fields["load_tensors"] and fields["alpha_mask"]:
        problems.append(
            f"{where}: alpha_mask cannot be used with load_tensors, which reads no frames; leave out one"
        )
        return None
    unused = [name for name in FRAME_KEYS if fields["load_tensors"] and fields[name] != KEYS[name].default]
    if unused:
        logger.warning(
            "%s, %s: %s is ignored because with load_tensors each clip is what was prepared, whole",
            path,
            where,
            " and ".join(unused),
        )
    fields["cache_directory"] = fields["cache_directory"] or folder
    fields["bucket_no_upscale"] = fields["bucket_no_upscale"] and fields["enable_bucket"]
    fields["target_frames"] = _round_targets(fields["target_frames"], f"{path}, {where}")
    if fields["frame_extraction"] == "uniform" and fields["frame_sample"] == 1:
        logger.warning(
            '%s, %s: frame_extraction = "uniform" with frame_sample = 1 is the same as "head"', path, where
        )
        fields["frame_extraction"] = "head"
    return DatasetTable(path, index, kind, **fields)


def _round_targets(targets: tuple[int, ...], where: str) -> tuple[int, ...]:
    rounded = tuple(sorted({(target - 1) // FRAME_STEP * FRAME_STEP + 1 for target in targets}))
    if not set(targets) <= set(rounded):
        logger.warning(
            "%s: target_frames %s become %s, because clips have 4n + 1 frames",
            where,
            list(targets),
            list(rounded),
        )
    return rounded


def _check_cache_directories(datasets: tuple[DatasetTable, ...], problems: list[str]) -> None:
    users: dict[str, DatasetTable] = {}
    for table in datasets:
        folder = table.cache_directory
        there = next((place for place in (folder, *folder.parents) if place.exists()), None)
        if there is not None and not there.is_dir():
            problems.append(
                f"[[datasets]] {table.index + 1}: cache_directory = {folder}: {there} is a file; name a "
                "folder, which is made if it is not there"
            )
        first = users.setdefault(os.path.normcase(table.cache_directory.resolve()), table)
        if first is not table:
            problems.append(
                f"[[datasets]] {first.index + 1} and {table.index + 1} share the cache directory "
                f"{table.cache_directory}; "
                "give each its own cache_directory (the default is the folder of the images or videos)"
            )


# --- messages ---


def _unknown(name: str, value: Any, allowed: tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown key {name} = {_show(value)}.{hint} Allowed: {', '.join(allowed)}"


def _show(value: Any) -> str:
    text = hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."


def _kind_of(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), type(value).__name__)
