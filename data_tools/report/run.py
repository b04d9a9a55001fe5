"""Run tools/dataset_report.py after its options are read: measure the dataset, then write page and JSON."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.report.files import list_files
from data_tools.report.findings import TableFindings, balance, check_captions, find_table
from data_tools.report.looks import Look, Measures, measure, read_header
from data_tools.report.numbers import CANNOT_BE_READ, collect_numbers
from data_tools.report.options import ReportOptions
from data_tools.report.page import write_report_page
from dataset.caching.prefetch import SIZE_CHANGES, Failure, read_ahead
from dataset.config import DatasetConfig, DatasetTable, with_lengths, with_references
from dataset.sources.clock import find_other_lengths
from dataset.sources.colours import find_colours, find_reordered
from dataset.sources.decoding import check_resolution
from dataset.sources.media_source import Fault, MediaSource, Remote, list_faults
from modules.atomic_write import write_text
from modules.bars import Bar
from modules.contract.data import LatentSpec
from modules.contract.rules import ReferenceRules
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError, MediaError
from modules.media.buckets import Fit
from modules.media.measures import NEAR
from modules.paths import hide_secrets, is_address

logger = logging.getLogger(__name__)

NAMED = 10  # faults of one kind in the log
# latent channels and strides by (--pixel_step, --frame_step): Wan2.2 TI2V-5B and LTX-2; USUAL for all
# others
LATENTS: Mapping[tuple[int, int], tuple[int, tuple[int, int, int]]] = {
    (32, 4): (48, (4, 16, 16)),
    (32, 8): (128, (8, 32, 32)),
}
USUAL = (16, (4, 8, 8))


def run_report(config: DatasetConfig, options: ReportOptions) -> None:
    """Read the dataset, then write the page and the JSON as asked for. Faults go to the log.

    Raises DatasetError if there is nothing to report on, OutputError if a file cannot be written.
    """
    workers = options.num_workers or max(1, (os.cpu_count() or 2) - 1)
    steps = options.pixel_step, options.frame_step
    latent = LatentSpec(*LATENTS.get(steps, USUAL), *steps)
    decodes = not options.no_decode
    config = with_lengths(config, options.frame_step)
    if options.references:
        config = with_references(config, ReferenceRules(options.references, options.pixel_step))
    tars = [tar for table in config.datasets for tar in table.tars or () if is_address(tar)]
    if options.no_download and tars:
        raise DatasetError(f"{hide_secrets(tars[0])} is downloaded to be listed: leave out --no_download")
    tables = [_measure_table(config, table, options, latent, workers) for table in config.datasets]
    faults = [fault for found in tables for fault in found.faults]
    if not any(found.sources for found in tables):
        lines = (fault.text for fault in faults)
        raise DatasetError("\n  ".join([f"{config.path}: there is nothing to report on", *lines]))
    balance(tables)
    copies = [group for kind in ("image", "video") for group in _find_copies(tables, kind)]
    numbers = collect_numbers(config, tables, copies, options.fps, options.pixel_step, decodes)
    if options.files:
        numbers["files"] = list_files(tables, options.fps, latent, workers)
    if faults:
        text = "\n  ".join(list_faults(faults, NAMED))
        logger.warning("Faults were found:\n  %s", escape_control_codes(text))
    if options.output is not None:
        write_report_page(options.output, config, tables, numbers, options, latent, workers)
    if options.json is not None:
        # ASCII, so that no text from outside reaches a terminal as it is
        text = json.dumps(numbers, indent=2) + "\n"
        if options.prints:
            sys.stdout.write(text)
        else:
            write_text(options.json, text)
            logger.info("wrote %s", options.json)


def _find_remarks(sources: Sequence[MediaSource], fps: float) -> list[Fault]:
    """Return remarks that headers and listings tell. fps: of the model."""
    remarks = find_other_lengths(sources, fps) + find_reordered(sources)
    # a card shows only the text
    return remarks + [replace(one, text=f"{one.text} ({one.kind})") for one in find_colours(sources)]


def _measure_table(
    config: DatasetConfig, table: DatasetTable, options: ReportOptions, latent: LatentSpec, workers: int
) -> TableFindings:
    """Read all sources of a table once; with --no_decode headers only, and nothing is measured."""
    decodes = not options.no_decode
    found = find_table(config, table)
    if not found.sources:
        return found
    check_captions(found)
    found.remarks += _find_remarks(found.sources, options.fps)
    try:
        check_resolution(table, latent.pixel_step)
    except DatasetError as error:
        found.unusable(error)
        return found

    def work(source: MediaSource) -> Look:
        remote = (path for path, origin in source.parts if isinstance(origin, Remote))
        if options.no_download and not all(path.exists() for path in remote):
            raise MediaError("not downloaded yet; caching does that")
        # for given tensors only the header is read
        read = measure if decodes or source.tensors is not None else read_header
        return read(source, options.fps, latent)

    fits: dict[Fit | None, Fit | None] = {}  # each once: there are few
    bar = Bar(len(found.sources), "Measuring" if decodes else "Reading headers", "file")
    for source, result in read_ahead(found.sources, lambda one: one, work, workers, bar, decodes):
        look = Look(problem=str(result)) if isinstance(result, Failure) else result
        look = replace(look, fit=fits.setdefault(look.fit, look.fit))
        found.looks.append(look)
        if look.problem is not None:
            line = look.problem if str(source.path) in look.problem else f"{source.path}: {look.problem}"
            found.faults.append(Fault(CANNOT_BE_READ, line, source.stem))
            continue
        assert look.fit is not None  # readable sources have a size
        for length, count in look.lengths:
            key = look.fit.bucket if table.kind == "image" else (*look.fit.bucket, length)
            found.buckets[key] += count
        told = {"give no item": look.none, "give no item of some lengths": look.short}
        told[SIZE_CHANGES] = look.size_change
        if look.measures is not None:
            told["are black"] = "black" if look.measures.is_black else None
            told["do not move"] = "nothing moves" if look.measures.is_static else None
            sharpness = f"blurred: sharpness {look.measures.sharpness:g}"
            told["are blurred"] = sharpness if look.measures.is_blurred else None
        found.remarks += [Fault(kind, text, source.stem) for kind, text in told.items() if text is not None]
    return found


def _find_copies(tables: Sequence[TableFindings], kind: str) -> list[list[Path]]:
    """Return groups of near duplicates among files of a kind, and add a remark to each file of a group.

    A file that several tables name, by absolute or relative paths, counts once.
    """
    places: dict[Path, tuple[Path, Measures]] = {}
    own = [found for found in tables if found.table.kind == kind]
    for found in own:
        for source, look in zip(found.sources, found.looks, strict=False):
            if look.measures is not None:
                places.setdefault(source.path.absolute(), (source.path, look.measures))
    by_length: dict[int, list[tuple[Path, Measures]]] = {}  # clips of a single frame have one hash
    for path, measures in sorted(places.values(), key=lambda one: str(one[0])):
        by_length.setdefault(len(measures.hashes), []).append((path, measures))
    groups = [
        [files[place][0] for place in group]
        for _, files in sorted(by_length.items())
        for group in group_copies([measures for _, measures in files])
    ]
    group_of = {path.absolute(): group for group in groups for path in group}
    for found in own:
        for source in found.sources:
            path = source.path.absolute()
            group = group_of.get(path, [])
            other = next((one for one in group if one.absolute() != path), None)
            if other is not None:
                more = f" and {len(group) - 2} more" if len(group) > 2 else ""
                text = f"nearly the same as {other.name}{more}"
                found.remarks.append(Fault("are nearly the same as another", text, source.stem))
    return sorted(groups, key=lambda group: str(group[0]))


# --- copies
# ------------------------------------------------------------------------------------------------------------

# Hashes compare shapes; colours tell more for pictures with few shapes. Copies differ in brightness,
# contrast, and little else: of twenty photographs (JPEG 20, a quarter of the size, 30 brighter or darker,
# times 0.7, gamma 0.8) by at most 0.2 of the range, a factor of 0.65, and 0.06 in the worst cell of 4 x 4.
SAME_COLOURS, MOST_SHIFT, LEAST_GAIN = 0.06, 0.25, 0.6
SAME_FLAT = 0.02  # of one colour, all counts
LEAST_DEVIATION = 0.03  # of the cells, below which rounding decides the factor
BITS = 64  # that a hash takes
PRODUCTS = 1 << 23  # of hashes at once: 32 MiB

Colours = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # N K C: small pictures; N: whether they are flat
Indices = NDArray[np.int64]


def group_copies(measures: Sequence[Measures]) -> list[list[int]]:
    """Return groups of two or more indices of `measures` that are near duplicates, in order.

    All have hashes of equally many frames. Two match if the hashes differ in at most NEAR bits on average and
    the colours fit; groups join chains of matches. Black ones are left out: they look the same without being
    copies.
    """
    by_key: dict[object, list[int]] = {}  # exact copies are compared once
    for place, one in enumerate(measures):
        if not one.is_black:
            by_key.setdefault((one.hashes, one.colours, one.is_flat), []).append(place)
    alike = list(by_key.values())
    if not alike:
        return []
    first = [measures[places[0]] for places in alike]
    small = np.frombuffer(b"".join(one.colours for one in first), np.uint8)
    is_flat = np.array([one.is_flat for one in first])
    colours = small.reshape(len(first), len(first[0].hashes), -1), is_flat
    # bits become -1 or 1: a product of two rows is the number of equal bits minus that of different ones
    bits = np.unpackbits(np.array([one.hashes for one in first], np.uint64).view(np.uint8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    least = (BITS - 2 * NEAR) * len(first[0].hashes)
    labels = np.arange(len(first))  # equal ones belong together
    at_once = max(1, PRODUCTS // len(first))
    for start in range(0, len(first), at_once):
        rows, others = np.nonzero(signs[start : start + at_once] @ signs[start:].T >= least)
        is_later = others > rows
        rows, others = rows[is_later] + start, others[is_later] + start
        for row in np.unique(rows):
            near = others[slice(*np.searchsorted(rows, (row, row + 1)))]
            near = near[labels[near] != labels[row]]
            for other in near[_have_same_colours(colours, row, near)] if len(near) else ():
                labels[labels == labels[other]] = labels[row]
    groups: dict[int, list[int]] = {}
    for label, places in zip(labels, alike, strict=True):
        groups.setdefault(int(label), []).extend(places)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _have_same_colours(colours: Colours, one: int, others: Indices) -> NDArray[np.bool_]:
    """Return for each of `others` whether its colours equal those of `one` up to brightness and contrast."""
    small, is_flat = colours
    first, second = (small[places].astype(np.float32) / np.float32(255) for places in ([one], others))
    means = first.mean(axis=(1, 2)), second.mean(axis=(1, 2))
    centred = first - means[0][:, None, None], second - means[1][:, None, None]
    powers = np.square(centred[0]).mean(axis=(1, 2)), np.square(centred[1]).mean(axis=(1, 2))
    # least squares: the one of less contrast is `gain` times the other, and a rest
    power = np.maximum(*powers)
    gain = (centred[0] * centred[1]).mean(axis=(1, 2)) / np.maximum(power, 1e-9)
    swaps = (powers[0] < powers[1])[:, None, None]
    strong, weak = np.where(swaps, centred[1], centred[0]), np.where(swaps, centred[0], centred[1])
    rest = np.abs(weak - gain[:, None, None] * strong).mean(axis=1).max(axis=1)  # over frames, then cells
    is_same = (rest <= SAME_COLOURS) & (np.abs(means[0] - means[1]) <= MOST_SHIFT)
    is_same &= (gain >= LEAST_GAIN) | (power < LEAST_DEVIATION**2)
    is_same_flat = np.abs(first - second).mean(axis=1).max(axis=1) <= SAME_FLAT
    return np.where(is_flat[one] | is_flat[others], is_flat[one] & is_flat[others] & is_same_flat, is_same)
