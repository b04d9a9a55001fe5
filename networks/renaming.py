"""Rename the modules of a LoRA file by a family's aliases, without touching its values."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from modules.atomic_write import save_tensors
from modules.checkpoints.opening import open_checkpoint
from modules.console import as_size, show_box
from modules.errors import CheckpointError
from networks.key_formats import OURS
from networks.metadata import STALE, add_hashes
from networks.module_names import alias, to_alias
from networks.names.layouts import FamilyNames


def rename_to_aliases(tensors: Mapping[str, Tensor], family: FamilyNames) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of ours under the family's aliases, those modules that have one."""
    return _rename(tensors, family, to_alias)


def _rename(
    tensors: Mapping[str, Tensor], family: FamilyNames, change: Callable[[str, FamilyNames], str]
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        module, dot, part = name.removeprefix(OURS).partition(".")
        own = name.startswith(OURS)
        renamed[f"{OURS}{change(module, family)}{dot}{part}" if own else name] = tensor
    return renamed


def rename_file(source: Path, output: Path, family: FamilyNames, reverse: bool) -> None:
    """Write a LoRA of ours with ComfyUI's module names, or the other way round (`reverse`).

    Tensors and metadata stay; hashes are made anew if there are metadata. Raises CheckpointError if nothing
    in the file has a name to change.
    """
    with open_checkpoint(source) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = {k: v for k, v in checkpoint.metadata.items() if not k.startswith(STALE)}
    renamed = _rename(stored, family, alias if reverse else to_alias)
    if renamed.keys() == stored.keys():
        direction = "ComfyUI's names to ours" if reverse else "our names to ComfyUI's"
        raise CheckpointError(
            f"{source} has no module to rename from {direction}, such as "
            f"{next(iter(stored), 'none')}.\n  Give a LoRA for {family.name}; --reverse is the way back.",
            source,
        )
    save_tensors(output, renamed, add_hashes(renamed, metadata) if metadata else {})
    changed = len(renamed.keys() - stored.keys())
    rows = [
        ("from", str(source)),
        ("to", f"{output} ({as_size(output.stat().st_size)})"),
        ("tensors", f"{len(renamed)}, {changed} with another name"),
    ]
    show_box("The LoRA is converted", rows)
