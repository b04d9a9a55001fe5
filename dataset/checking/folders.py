"""Look at files of a table's folder that are not used: media of the other kind, captions without media."""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from dataset.checking.findings import TableFindings
from dataset.shard_names import is_of_shards
from dataset.sources.faults import Fault
from dataset.sources.folders import folder_id, is_file
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes

USUAL = frozenset(
    {".json", ".jsonl", ".toml", ".bak", ".npz", ".safetensors", ".ini", ".db"}
)  # are left alone
PROMPTS = "prompts.txt"  # of samples, as `new` writes it


def check_unused(found: TableFindings, folders_in_use: Collection[str]) -> None:
    """Add remarks about files beside the sources that look as if they were meant to be used.

    folders_in_use: `folder_id` of the folders of other tables, whose files are used there.
    """
    table = found.table
    if table.directory is None or folder_id(table.directory) in folders_in_use:
        return
    used = {str(source.path) for source in found.sources}
    used |= {str(source.caption_path) for source in found.sources}
    before = str(table.directory / "x")[:-1]
    other = "video" if table.kind == "image" else "image"
    others = VIDEO_SUFFIXES if other == "video" else image_suffixes()
    names: Counter[str] = Counter()
    with os.scandir(table.directory) as entries:
        for entry in entries:
            if before + entry.name in used or entry.name[0] == "." or is_of_shards(entry.name):
                continue
            suffix = Path(entry.name).suffix.lower()
            if entry.name != PROMPTS and suffix not in USUAL and is_file(entry):
                names[suffix] += 1
    for suffix, count in sorted(names.items()):
        if suffix in others:
            why = f"{other}s: give them a table with {other}_directory"
        elif suffix == table.caption_extension:
            why = f"captions without {'an image' if table.kind == 'image' else 'a clip'} of the same name"
        else:
            why = f"neither {table.kind}s nor captions"
        line = f"{table.directory}: {count} of {suffix or 'no suffix'}, {why}"
        found.remarks.append(Fault("kinds of files are not used", line))
