"""Sample prompts that are edited during a training: each round of samples reads the file again.

If the file has not changed, nothing else is done.
"""

import logging
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from generation.loaded_networks import select_prompts
from generation.sample_lines import read_sample_file
from modules.console import format_count
from modules.control_codes import shorten
from modules.errors import OptionError, UserError
from training.samples import (
    Sample,
    Sampler,
    encode_samples,
    list_prompts,
    list_strengths,
    parse_requests,
    warn_about_unused_keys,
)

logger = logging.getLogger(__name__)

MAX_BYTES = 4 << 20  # bytes of a prompt file; a larger file is a mistake
MAX_ERROR_CHARACTERS = 600  # characters of an error in the warning


def take_edited_prompts(sampler: Sampler, num_processes: int, log_activity: Callable[[str], None]) -> Sampler:
    """Return a sampler with the file's current prompts, or the same sampler if nothing has changed.

    New prompts are encoded with encoders that are loaded and freed for this. If the file cannot be used, the
    samples do not change, and a warning gives the reason.

    Args:
        sampler: The current sampler.
        num_processes: Processes of the run, which all have to call this; the first one reads the file.
        log_activity: Called with a description of work that takes a while.
    """
    source = sampler.source
    text, error = source.text, source.read_error
    if source.process_index == 0:
        text, error = _read_prompts(source.path, text)
    if num_processes > 1:
        text, error = broadcast_object_list([text, error])
    if (text, error) == (source.text, source.read_error):
        return sampler
    sampler = replace(sampler, source=replace(source, text=text, read_error=error))
    if text == source.text and not error:
        return sampler  # only an earlier reading error has disappeared
    edited_sampler = sampler
    if not error:
        edited_sampler, error = _try_to_encode(sampler, log_activity)
    # if one process fails, all processes keep the earlier prompts, and the first one logs the reason
    errors = [error] if num_processes == 1 else gather_object([error])
    error = next(filter(None, errors), "")
    # the first process says which prompts are used from now on
    if source.process_index == 0:
        if error:
            reason = shorten(" ".join(error.split()), MAX_ERROR_CHARACTERS)
            logger.warning("The edited sample prompts are not used; the earlier ones are kept: %s", reason)
        else:
            num_prompts = format_count(len(edited_sampler.prompts), "prompt")
            logger.info(
                "Samples are generated from the edited %s: %s.", edited_sampler.source.path, num_prompts
            )
    return sampler if error else edited_sampler


def _try_to_encode(sampler: Sampler, log_activity: Callable[[str], None]) -> tuple[Sampler, str]:
    """Return a sampler for the edited prompts and ""; if encoding fails, the old sampler and the reason."""
    try:
        # A sampler for the edited prompt file; unchanged entries keep their encoded prompts
        source, session = sampler.source, sampler.session
        entries, requests = parse_requests(session.family, source.text, source.path, source.expansions)
        unchanged_samples = _find_unchanged(sampler, entries)
        edited_requests = {
            index: requests[index]
            for index in source.prompt_indices(len(entries))
            if index not in unchanged_samples
        }
        has_new_texts = session.count_new(map(select_prompts, edited_requests.values())) > 0
        if has_new_texts and session.blocks is not None:
            # a process that fails alone would leave the others waiting
            raise OptionError(
                f"new texts cannot be encoded while the model is split over processes "
                f"({session.blocks.option_name}). End the training and continue it to take them"
            )
        if source.process_index == 0:
            warn_about_unused_keys(entries, session.family, source.path, source.trains_lora)
        if has_new_texts:
            log_activity("encoding edited prompts")
        encoded_samples = encode_samples(session, entries, edited_requests, decodes=sampler.writes_files)
        samples = unchanged_samples | {sample.index: sample for sample in encoded_samples}
        return replace(
            sampler,
            samples=[samples[index] for index in sorted(samples)],
            prompts=list_prompts(entries),
            strengths=list_strengths(entries) if source.trains_lora else {},
        ), ""
    except torch.OutOfMemoryError:
        return sampler, (
            "there is no memory for the text encoders next to the training. End the training and "
            "continue it to take them"
        )
    except (UserError, OSError, MemoryError) as failure:
        return sampler, str(failure)


def _read_prompts(path: Path, previous_text: str) -> tuple[str, str]:
    """Return the text of a prompt file and ""; if it cannot be read, the previous text and the reason."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            return previous_text, f"{path} is not a file"
        if status.st_size > MAX_BYTES:
            return (
                previous_text,
                f"{path} has {status.st_size:,} bytes, which is too much for a list of prompts",
            )
        return read_sample_file(path), ""
    except (OptionError, OSError) as error:
        return previous_text, str(error)


def _find_unchanged(sampler: Sampler, entries: Sequence[Mapping[str, Any]]) -> dict[int, Sample]:
    """Return the earlier sample of each entry that has one with equal settings, by the entry's index."""
    # Only entries that this process generates are looked at. Entries may have been moved within the file.
    unchanged: dict[int, Sample] = {}
    for index in sampler.source.prompt_indices(len(entries)):
        earlier = next((sample for sample in sampler.samples if sample.settings == entries[index]), None)
        if earlier is not None:
            unchanged[index] = replace(earlier, index=index)
    return unchanged
