"""Run tools/dataset_report.py after its options are read: measure the dataset, then write page and JSON."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.report.files import list_files
from data_tools.report.findings import TableFindings, balance_regularization, check_captions, find_table
from data_tools.report.looks import Inspection, Measures, inspect_and_measure, inspect_header
from data_tools.report.numbers import CANNOT_BE_READ, JsonObject, collect_statistics
from data_tools.report.page import ReportOptions, write_report_page
from dataset.caching.prefetch import SIZE_CHANGES, Failure, read_ahead
from dataset.config import DatasetConfig, DatasetTable, with_lengths, with_references
from dataset.forms.composing import get_source_format
from dataset.sources.clock import find_other_lengths
from dataset.sources.colors import find_colors, find_reordered
from dataset.sources.decoding import check_resolution
from dataset.sources.left_out import TableFolders
from dataset.sources.media_source import Fault, MediaSource, Remote, list_errors
from modules.atomic_write import write_text
from modules.bars import Bar
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Fit
from modules.media.measures import NEAR
from modules.paths import hide_secrets
from protocols.data import LatentSpec
from protocols.rules import ReferenceRules

logger = logging.getLogger(__name__)

MAX_NAMED = 10  # errors of one kind that are logged
# latent channels and strides of models of images, Wan2.2 TI2V-5B and LTX-2, by (--pixel_step, --frame_step);
# all other models have DEFAULT. Of models of images with sides in steps of 32 it is Qwen-Image-2.1
LATENTS: Mapping[tuple[int, int], tuple[int, tuple[int, int, int]]] = {
    (16, 1): (16, (1, 8, 8)),
    (32, 1): (64, (1, 16, 16)),
    (8, 1): (4, (1, 8, 8)),
    (32, 4): (48, (4, 16, 16)),
    (32, 8): (128, (8, 32, 32)),
}
# by --frame_step 17
LATENT_H3 = LatentSpec(24, (4, 16, 16), pixel_step=32, frame_step=4, clip_frames=17, tail_frames=5)
DEFAULT = (16, (4, 8, 8))


def run_report(config: DatasetConfig, options: ReportOptions) -> None:
    """Check and measure a dataset, then write the report page and the JSON file that the options request.

    Raises:
        DatasetError: If there is nothing to report on.
        OutputError: If a file cannot be written.
    """
    # one core is left for this process
    workers = options.num_workers or max(1, (os.cpu_count() or 2) - 1)
    latent = select_latents(options)
    config = _apply_options(config, options, latent)
    tables = measure_tables(config, options, latent, workers)
    errors = [error for findings in tables for error in findings.errors]
    if not any(findings.sources for findings in tables):
        lines = (error.text for error in errors)
        raise DatasetError("\n  ".join([f"{config.path}: there is nothing to report on", *lines]))
    statistics = _collect_results(config, tables, options=options, latent=latent, workers=workers)
    if errors:
        text = "\n  ".join(list_errors(errors, MAX_NAMED))
        logger.warning("Faults were found:\n  %s", escape_control_codes(text))
    if options.output is not None:
        path = options.output
        write_report_page(path, config, tables, statistics, options=options, latent=latent, workers=workers)
    if options.json is not None:
        _write_json(options.json, statistics, prints=options.prints)


def measure_tables(
    config: DatasetConfig, options: ReportOptions, latent: LatentSpec, workers: int
) -> list[TableFindings]:
    """Read all media files of a dataset and return what was found, by table."""
    folders = TableFolders(config)
    return [
        _measure_table(config, table, folders=folders, options=options, latent=latent, workers=workers)
        for table in config.datasets
    ]


def _apply_options(config: DatasetConfig, options: ReportOptions, latent: LatentSpec) -> DatasetConfig:
    """Return the dataset with the clip lengths and reference rules of the model that the options describe."""
    config = with_lengths(config, latent.lengths)
    if options.references:
        config = with_references(config, ReferenceRules(options.references, options.pixel_step))
    if options.no_download:
        for table in config.datasets:
            for address in get_source_format(table).list_addresses(table):
                text = f"{hide_secrets(address)} is downloaded to be listed: omit --no_download"
                raise DatasetError(text)
    return config


def _collect_results(
    config: DatasetConfig,
    tables: Sequence[TableFindings],
    options: ReportOptions,
    latent: LatentSpec,
    workers: int,
) -> JsonObject:
    """Compare the measured tables with each other, and return all results as JSON values."""
    balance_regularization(tables)
    statistics = collect_statistics(
        config,
        tables,
        find_copies(tables),
        fps=options.fps,
        pixel_step=options.pixel_step,
        decodes=not options.no_decode,
    )
    if options.files:
        statistics["files"] = list_files(tables, options.fps, latent, workers)
    return statistics


def find_copies(tables: Sequence[TableFindings]) -> list[list[Path]]:
    """Return groups of near duplicates among the images, and among the clips; add a warning to each file."""
    copies: list[list[Path]] = []
    for kind in ("image", "video"):
        same_kind_tables = [findings for findings in tables if findings.table.kind == kind]
        groups = _group_files(same_kind_tables)
        copies_by_path = {path.absolute(): group for group in groups for path in group}
        for findings in same_kind_tables:
            for source in findings.sources:
                path = source.path.absolute()
                others = [copy for copy in copies_by_path.get(path, ()) if copy.absolute() != path]
                if others:
                    and_others = f" and {len(others) - 1} more" if len(others) > 1 else ""
                    text = f"nearly the same as {others[0].name}{and_others}"
                    findings.warnings.append(Fault("are nearly the same as another", text, source.stem))
        copies += groups
    return copies


def select_latents(options: ReportOptions) -> LatentSpec:
    """Return the latent format of models that have the given --pixel_step and --frame_step."""
    if options.frame_step == LATENT_H3.clip_frames:
        return replace(LATENT_H3, pixel_step=options.pixel_step)
    channels, stride = LATENTS.get((options.pixel_step, options.frame_step), DEFAULT)
    return LatentSpec(channels, stride, options.pixel_step, options.frame_step)


def _write_json(path: Path, statistics: JsonObject, prints: bool) -> None:
    """Write the report as JSON into a file, or print it."""
    # ASCII, so that no text from outside reaches a terminal unescaped
    text = json.dumps(statistics, indent=2) + "\n"
    if prints:
        sys.stdout.write(text)
    else:
        write_text(path, text)
        logger.info("wrote %s", path)


def _measure_table(
    config: DatasetConfig,
    table: DatasetTable,
    folders: TableFolders,
    options: ReportOptions,
    latent: LatentSpec,
    workers: int,
) -> TableFindings:
    """Read all media files of a table, and return what was found; --no_decode reads headers only."""
    findings = find_table(config, table, folders)
    if not findings.sources:
        return findings
    check_captions(findings)
    # from file headers and folder listings alone
    remarks = find_other_lengths(findings.sources, options.fps) + find_reordered(findings.sources)
    for remark in find_colors(findings.sources):
        # the page shows only the text of a warning, so the kind is added to it
        remarks.append(replace(remark, text=f"{remark.text} ({remark.kind})"))
    findings.warnings += remarks
    try:
        check_resolution(table, latent.pixel_step)
    except DatasetError as error:
        findings.add_table_error(error)
        return findings
    results = read_ahead(
        findings.sources,
        get_source=lambda source: source,
        work=partial(_inspect, options=options, latent=latent),
        workers=workers,
        bar=Bar(len(findings.sources), "Reading headers" if options.no_decode else "Measuring", "file"),
        decodes=not options.no_decode,
    )
    shared_fits: dict[Fit | None, Fit | None] = {}  # equal fits become one object, to save memory
    for source, result in results:
        inspection = Inspection(read_error=str(result)) if isinstance(result, Failure) else result
        shared_fit = shared_fits.setdefault(inspection.fit, inspection.fit)
        _add_inspection(findings, source, replace(inspection, fit=shared_fit))
    return findings


def _inspect(source: MediaSource, options: ReportOptions, latent: LatentSpec) -> Inspection:
    """Decode and measure a media file; with --no_decode, read only its header."""
    remote_paths = [path for path, origin in source.latent_inputs if isinstance(origin, Remote)]
    if options.no_download and not all(path.exists() for path in remote_paths):
        raise MediaError("not downloaded yet; caching does that")
    # precomputed tensors are always measured, because only their header is read
    if options.no_decode and source.precomputed is None:
        return inspect_header(source, options.fps, latent)
    return inspect_and_measure(source, options.fps, latent)


def _add_inspection(findings: TableFindings, source: MediaSource, inspection: Inspection) -> None:
    """Add the inspection of a media file to the findings: its items and warnings, or its error."""
    findings.inspections.append(inspection)
    if inspection.read_error is not None:
        text = inspection.read_error
        if str(source.path) not in text:
            text = f"{source.path}: {text}"
        findings.errors.append(Fault(CANNOT_BE_READ, text, source.stem))
        return
    assert inspection.fit is not None  # readable sources have a size
    is_image = findings.table.kind == "image"
    for length, count in inspection.items_by_length:
        # only buckets of clips have a number of frames
        bucket = inspection.fit.bucket if is_image else (*inspection.fit.bucket, length)
        findings.num_items_by_bucket[bucket] += count
    for kind, warning in _list_warnings(inspection).items():
        if warning is not None:
            findings.warnings.append(Fault(kind, warning, source.stem))


def _list_warnings(inspection: Inspection) -> dict[str, str | None]:
    """Return warnings about a media file, keyed by the end of the sentence "N files ..."; None means none."""
    warnings = {
        "give no item": inspection.no_item_reason,
        "give no item of some lengths": inspection.too_short_for,
        SIZE_CHANGES: inspection.size_change,
    }
    measures = inspection.measures
    if measures is not None:
        if measures.is_black:
            warnings["are black"] = "black"
        if measures.is_static:
            warnings["do not move"] = "nothing moves"
        if measures.is_blurred:
            warnings["are blurred"] = f"blurred: sharpness {measures.sharpness:g}"
    return warnings


def _group_files(tables: Sequence[TableFindings]) -> list[list[Path]]:
    """Return groups of near duplicates among measured files, sorted by the first path of a group."""
    # `tables` are all tables of images, or all tables of clips. A file in several tables, by absolute or
    # relative paths, counts once.
    measures_by_path: dict[Path, Measures] = {}
    absolute_paths: set[Path] = set()
    for findings in tables:
        # there are no inspections if files were not read
        for source, inspection in zip(findings.sources, findings.inspections, strict=False):
            absolute_path = source.path.absolute()
            if inspection.measures is not None and absolute_path not in absolute_paths:
                absolute_paths.add(absolute_path)
                measures_by_path[source.path] = inspection.measures
    # only files with the same number of hashes, such as clips of several frames, are compared
    paths_by_num_hashes: dict[int, list[Path]] = {}
    # sorted, so that the groups do not depend on the order of the tables
    for path in sorted(measures_by_path, key=str):
        num_hashes = len(measures_by_path[path].hashes)
        paths_by_num_hashes.setdefault(num_hashes, []).append(path)
    groups = []
    for _, paths in sorted(paths_by_num_hashes.items()):
        for indices in group_copies([measures_by_path[path] for path in paths]):
            groups.append([paths[index] for index in indices])
    return sorted(groups, key=lambda group: str(group[0]))


# --- copies
# ------------------------------------------------------------------------------------------------------------

# Hashes compare shapes; colors tell more for images with few shapes. Copies differ in brightness,
# contrast, and little else: of twenty photographs (JPEG 20, a quarter of the size, 30 brighter or darker,
# times 0.7, gamma 0.8) by at most 0.2 of the range, a factor of 0.65, and 0.06 in the worst cell of 4 x 4.
SAME_COLORS, MAX_SHIFT, MIN_GAIN = 0.06, 0.25, 0.6
SAME_FLAT = 0.02  # for images of one color, in which every difference counts
MIN_DEVIATION = 0.03  # deviation of the cells, below which rounding errors decide the factor
BITS = 64  # bits of a hash
PRODUCTS = 1 << 23  # products of hashes that are computed at once: 32 MiB

Indices = NDArray[np.int64]


def group_copies(measures: Sequence[Measures]) -> list[list[int]]:
    """Return groups of two or more indices of `measures` that are near duplicates, in order.

    All measures have hashes of the same number of frames. Two match if their hashes differ in at most NEAR
    bits on average and their colors agree; groups join chains of matches. Black frames are left out, because
    they look alike without being copies.
    """
    by_key: dict[object, list[int]] = {}  # exact copies are compared once
    for index, file_measures in enumerate(measures):
        if not file_measures.is_black:
            key = (file_measures.hashes, file_measures.colors, file_measures.is_flat)
            by_key.setdefault(key, []).append(index)
    exact_copies = list(by_key.values())
    if not exact_copies:
        return []
    # one measure stands for all its exact copies
    labels = _label_matches([measures[indices[0]] for indices in exact_copies])
    groups: dict[int, list[int]] = {}
    for label, indices in zip(labels, exact_copies, strict=True):
        groups.setdefault(int(label), []).extend(indices)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _label_matches(measures: Sequence[Measures]) -> Indices:
    """Label N measures; two measures get the same label if a chain of matches connects them."""
    # tiny frames, for comparing files with similar hashes: N K C, the C color values of K frames
    color_values = np.frombuffer(b"".join(measured.colors for measured in measures), np.uint8)
    colors = color_values.reshape(len(measures), len(measures[0].hashes), -1)
    is_flat = np.array([measured.is_flat for measured in measures])
    labels = np.arange(len(measures))
    for index, similar in _find_similar_hashes(measures):
        candidates = similar[labels[similar] != labels[index]]
        if not len(candidates):
            continue
        one_is_flat = is_flat[index] | is_flat[candidates]
        both_are_flat = is_flat[index] & is_flat[candidates]
        is_match = _have_same_colors(colors[[index]], colors[candidates], one_is_flat, both_are_flat)
        for match in candidates[is_match]:
            labels[labels == labels[match]] = labels[index]
    return labels


def _find_similar_hashes(measures: Sequence[Measures]) -> Iterator[tuple[int, Indices]]:
    """Yield each file's index, and all later indices of files whose hashes differ from its by few bits."""
    # the bits of N perceptual hashes as -1 or 1
    hashes = np.array([measured.hashes for measured in measures], np.uint64)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    # the dot product of signs is the number of equal bits minus the number of different bits
    min_product = (BITS - 2 * NEAR) * len(measures[0].hashes)
    batch_size = max(1, PRODUCTS // len(measures))
    for start in range(0, len(measures), batch_size):
        products = signs[start : start + batch_size] @ signs[start:].T
        for index, products_of_file in enumerate(products, start):
            similar = np.flatnonzero(products_of_file >= min_product) + start
            yield index, similar[similar > index]


def _have_same_colors(
    image: NDArray[np.uint8],
    candidates: NDArray[np.uint8],
    one_is_flat: NDArray[np.bool_],
    both_are_flat: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return which candidates, N K C, have the colors of an image, 1 K C, up to brightness and contrast."""
    first = image.astype(np.float32) / np.float32(255)
    second = candidates.astype(np.float32) / np.float32(255)
    is_same_color = np.abs(first - second).mean(axis=1).max(axis=1) <= SAME_FLAT
    return np.where(one_is_flat, both_are_flat & is_same_color, _match_contrast(first, second))


class _Centered(NamedTuple):
    """Thumbnails of N files with their mean brightness subtracted."""

    values: NDArray[np.float32]  # N K C
    mean: NDArray[np.float32]  # N
    variance: NDArray[np.float32]  # N


def _center(thumbnails: NDArray[np.float32]) -> _Centered:
    """Return thumbnails minus their mean brightness, so that only their structure is compared."""
    mean = thumbnails.mean(axis=(1, 2))
    centered = thumbnails - mean[:, None, None]
    return _Centered(centered, mean, variance=np.square(centered).mean(axis=(1, 2)))


def _match_contrast(image: NDArray[np.float32], candidates: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which candidates, N K C, differ from an image, 1 K C, in brightness and contrast only."""
    # Least squares: the thumbnail of less contrast is fitted by `gain` times the other one.
    centered_image = _center(image)
    centered_candidates = _center(candidates)
    max_variance = np.maximum(centered_image.variance, centered_candidates.variance)
    covariance = (centered_image.values * centered_candidates.values).mean(axis=(1, 2))
    gain = covariance / np.maximum(max_variance, 1e-9)
    candidates_are_stronger = (centered_image.variance < centered_candidates.variance)[:, None, None]
    strong = np.where(candidates_are_stronger, centered_candidates.values, centered_image.values)
    weak = np.where(candidates_are_stronger, centered_image.values, centered_candidates.values)
    residual = np.abs(weak - gain[:, None, None] * strong)
    worst_residual = residual.mean(axis=1).max(axis=1)  # mean over frames, maximum over color values
    has_same_shapes = worst_residual <= SAME_COLORS
    has_near_brightness = np.abs(centered_image.mean - centered_candidates.mean) <= MAX_SHIFT
    has_near_contrast = (gain >= MIN_GAIN) | (max_variance < MIN_DEVIATION**2)
    return has_same_shapes & has_near_brightness & has_near_contrast
