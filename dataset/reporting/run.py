"""Run tools/dataset_report.py after its options are read."""

import json
import logging
import os
import sys
from dataclasses import dataclass

from dataset.config import FRAME_STEP, DatasetConfig
from dataset.reporting.numbers import Numbers, collect_numbers
from dataset.reporting.options import ReportOptions
from dataset.reporting.page import write_report_page
from dataset.reporting.tables import TableReport, read_tables
from dataset.sources.faults import list_faults
from modules.atomic_write import write_text
from modules.control_codes import escape_control_codes

logger = logging.getLogger(__name__)

NAMED = 10  # faults of one kind in the log


# channels of the latents and the pixels of each, by --pixel_step: those of Wan2.2 TI2V-5B, and of all others
LATENTS = {32: (48, (4, 16, 16))}
USUAL = (16, (4, 8, 8))


@dataclass(frozen=True)
class ModelSteps:
    """Sizes, lengths and latents that the model takes."""

    pixel_step: int
    channels: int
    stride: tuple[int, int, int]
    frame_step: int = FRAME_STEP  # of all families


def run_report(config: DatasetConfig, options: ReportOptions) -> None:
    """Read the dataset, then write the page and the JSON as asked for. Faults go to the log.

    Raises DatasetError if there is nothing to report on, OutputError if a file cannot be written.
    """
    workers = options.num_workers or max(1, (os.cpu_count() or 2) - 1)
    steps = ModelSteps(options.pixel_step, *LATENTS.get(options.pixel_step, USUAL))
    decodes = not options.no_decode
    reports, copies = read_tables(config, options.fps, steps, decodes, workers)
    numbers = collect_numbers(config, reports, copies, options.fps, options.pixel_step, decodes)
    _tell_faults(reports)
    if options.output is not None:
        write_report_page(options.output, config, reports, numbers, options, steps, workers)
    if options.json is not None:
        _write_json(numbers, options)


def _write_json(numbers: Numbers, options: ReportOptions) -> None:
    # ASCII, so that no text from outside reaches a terminal as it is
    text = json.dumps(numbers, indent=2) + "\n"
    if options.prints:
        sys.stdout.write(text)
    elif options.json is not None:
        write_text(options.json, text)
        logger.info("wrote %s", options.json)


def _tell_faults(reports: list[TableReport]) -> None:
    faults = [fault for report in reports for fault in report.found.faults]
    if faults:
        lines = list_faults(faults, NAMED)
        logger.warning("Faults were found:\n  %s", escape_control_codes("\n  ".join(lines)))
