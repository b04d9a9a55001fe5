"""Write to a folder all that a run needs to continue as if it had never stopped; find, check and read it.

A state folder holds `state.json` and one safetensors file per named part (`network`, `optimizer`, ...). It is
built beside its final place and renamed, so an existing one is complete. Nothing random is stored: all of it
follows from the seed and the micro-batch.
"""

import json
import logging
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.atomic_write import atomic_folder, recover_folder
from modules.checkpoints.containers import SafetensorsFile, load_pickled
from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json, read_text
from training.progress import Progress
from training.saving.state_record import REMEDY, check_record

logger = logging.getLogger(__name__)

RECORD = "state.json"

FORMAT = "reelsmith training state"

VERSION = 1

FRESH_START = "--network_weights FILE for a LoRA, --dit FILE for a whole model"


@dataclass(frozen=True)
class SavedState:
    """Hold a state folder as read.

    `identity`: settings that a resumed run must share. `habits`: those it may change.
    """

    folder: Path
    progress: Progress
    identity: Mapping[str, Any]
    habits: Mapping[str, Any]
    described: Mapping[str, Any]  # schedule, optimizer, scaler: as JSON
    parts: Mapping[str, Mapping[str, Tensor]]  # a part that was read is a `StoredPart`


class StoredPart(Mapping[str, Tensor]):
    """Map names to tensors on disk, read when accessed: a whole model is not held a second time."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises CheckpointError if it is damaged."""
        # not mapped: the folder may be replaced or removed later in the run
        self._file = SafetensorsFile(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor without reading it."""
        return self._file.tensors[name]

    def close(self) -> None:
        """Close the file: Windows cannot replace or remove a folder while a file in it is open."""
        self._file.close()


@dataclass(frozen=True)
class ForeignState:
    """Hold a state folder of another tuner: it records no progress, so counting starts at 0."""

    folder: Path
    network: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None


def write_state(folder: Path, state: SavedState) -> None:
    """Write `state` as `folder`, completely or not at all. Raises OutputError if writing fails."""
    with atomic_folder(folder) as temporary:
        files = {}
        for part, tensors in state.parts.items():
            path = temporary / f"{part}.safetensors"
            infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            stream_tensors(path, infos, tensors.__getitem__, {"format": "pt"})
            files[part] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "progress": asdict(state.progress),
            "identity": dict(state.identity),
            "habits": dict(state.habits),
            "described": dict(state.described),
            "parts": files,
        }
        record = _sort_as_json(record)
        record["crc32"] = _record_checksum(record)
        (temporary / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def read_state(folder: Path) -> SavedState | ForeignState:
    """Read a state folder of ours or of another tuner.

    Raises CheckpointError if it is missing, damaged, or holds no state; OptionError if it is not a folder.
    """
    if not folder.is_dir():
        problem = "a file, and a state is a folder" if folder.is_file() else "no such folder"
        anew = f" To begin with what was trained, give {FRESH_START}." if folder.is_file() else ""
        raise OptionError(f"--resume {folder}: {problem}. Give a ...-state folder, or the word latest.{anew}")
    if not (folder / RECORD).exists():
        return _read_foreign(folder)
    record = _read_record(folder)
    parts = {part: _read_part(folder, part, size) for part, size in record["parts"].items()}
    return SavedState(
        folder,
        Progress(**record["progress"]),
        record["identity"],
        record["habits"],
        record["described"],
        parts,
    )


def state_pattern(name: str) -> re.Pattern[str]:
    """Return what the names of all state folders of run `name` match, and no others."""
    return re.compile(rf"{re.escape(name)}(-\d{{6,}}|-step\d{{8,}})?-state")


def recover_states(output_dir: Path, name: str) -> None:
    """Restore the states of a run that was killed between the two renames that replace one."""
    pattern = state_pattern(name)
    for entry in list(output_dir.iterdir()):
        if entry.name.endswith(".old") and pattern.fullmatch(entry.name[1:].removesuffix(".old")):
            recover_folder(entry.with_name(entry.name[1:].removesuffix(".old")))


def find_latest(output_dir: Path, name: str) -> Path | None:
    """Return the complete state of run `name` with the most steps, or None.

    Repairs what a killed run left half done.
    """
    if not output_dir.is_dir():
        return None
    recover_states(output_dir, name)
    pattern, found = state_pattern(name), []
    for folder in output_dir.iterdir():
        if folder.is_dir() and pattern.fullmatch(folder.name) and (folder / RECORD).exists():
            try:
                record = _read_record(folder)
            except CheckpointError as error:
                logger.warning("%s is ignored in the search for the latest state: %s", folder, error)
                continue
            found.append((record["progress"]["step"], folder.name, folder))
    return max(found)[2] if found else None


def check_identity(
    saved: Mapping[str, Any],
    here: Mapping[str, Any],
    folder: Path,
    changeable: Collection[str] = (),
    may_change: bool = False,
) -> None:
    """Raise OptionError if a setting that decides the numbers differs from the saved run's. Keys name the
    options.

    What the saved run did not record is not compared. may_change: nor is what is `changeable`
    (--resume_changed).
    """
    changed = {name: value for name, value in here.items() if name in saved and saved[name] != value}
    if may_change:
        changed = {name: value for name, value in changed.items() if name not in changeable}
    lines = [
        f"  {name}: {short_text(saved.get(name))} in the state, {short_text(value)} now"
        for name, value in changed.items()
    ]
    if not lines:
        return
    also = ", add --resume_changed to go on with those of now" if changed.keys() <= {*changeable} else ""
    which = (
        "not even --resume_changed can change this"
        if may_change
        else "this run is not the one that was saved"
    )
    raise OptionError(
        f"--resume {folder}: {which}.\n" + "\n".join(lines) + "\n"
        f"  Use the saved values{also}, or start a new run from what was trained: {FRESH_START}"
    )


def warn_of_changes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn of the settings that may change between the runs and did."""
    for name, value in here.items():
        if name in saved and saved[name] != value:
            logger.warning(
                "%s was %s when the state was saved; it is %s from here on.",
                name,
                short_text(saved[name]),
                short_text(value),
            )


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy saved weights into a learning module, all of them.

    Raises CheckpointError if names, shapes or dtypes differ, or if a value is NaN or infinite.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misshaped = [
        name for name in own.keys() & tensors.keys() if tuple(own[name].shape) != info_of(tensors, name).shape
    ]
    if missing or unexpected or misshaped:
        raise CheckpointError(
            f"{folder} holds another network: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(unexpected)} unexpected "
            f"{unexpected[:2]}, {len(misshaped)} of another shape {sorted(misshaped)[:2]}.\n"
            "  Use --network_module, --network_dim and --network_args, or the --dit, of the run that saved "
            "it.",
            path=folder,
        )
    for name, tensor in own.items():
        kind = info_of(tensors, name).dtype
        are_floats = kind.is_floating_point and tensor.dtype.is_floating_point and kind.itemsize > 1
        if kind != tensor.dtype and not are_floats:
            raise CheckpointError(
                f"{folder}: {name} is {kind}, the run has {tensor.dtype}.\n  {REMEDY}", path=folder
            )
    if not _is_plain(module, own):
        module.load_state_dict({name: require_finite(tensors[name], name, folder) for name in own})
        return
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(require_finite(tensors[name], name, folder))  # one at a time


def require_finite(tensor: Tensor, name: str, folder: Path) -> Tensor:
    """Return `tensor`, or raise CheckpointError if a value of it is NaN or infinite."""
    if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{folder}: {name} holds values that are NaN or infinite.\n  {REMEDY}", path=folder
        )
    return tensor


def _is_plain(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether the state dict holds exactly the parameters and buffers themselves.

    Foreign networks may compute what they store.
    """
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return all(
        name in named and named[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items()
    )


def info_of(tensors: Mapping[str, Tensor], name: str) -> TensorInfo:
    """Return dtype and shape of a tensor of a state; one on disk is not read."""
    if isinstance(tensors, StoredPart):
        return tensors.info(name)
    return TensorInfo(tensors[name].dtype, tuple(tensors[name].shape))


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = parse_json(read_text(folder / RECORD))
        if record["format"] != FORMAT:
            raise _damage_error(folder / RECORD, f"its format is not {FORMAT!r}")
        if record["version"] != VERSION:
            raise CheckpointError(
                f"{folder} was saved by a newer version. Update, or resume from another state.", path=folder
            )
        if record.pop("crc32", None) != _record_checksum(record):
            raise _damage_error(folder / RECORD, "its checksum is not the recorded one")
        check_record(record, folder / RECORD)
        for part, file in record["parts"].items():
            path = folder / f"{part}.safetensors"
            size_bytes = path.stat().st_size if path.exists() else 0
            if size_bytes != file["bytes"]:
                raise _damage_error(path, f"{size_bytes} bytes, {file['bytes']} were written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damage_error(folder / RECORD, str(error)) from error
    return record


def _read_part(folder: Path, part: str, file: Mapping[str, int]) -> StoredPart:
    path = folder / f"{part}.safetensors"
    try:
        if _checksum(path) != file["crc32"]:
            raise _damage_error(path, "its checksum is not the recorded one")
        return StoredPart(path)
    except OSError as error:
        raise _damage_error(path, str(error)) from error


def _read_foreign(folder: Path) -> ForeignState:
    """Read a folder of accelerate: model.safetensors and optimizer.bin.

    Its schedule and random states need a step count that it does not hold.
    """
    weights, optimizer = folder / "model.safetensors", folder / "optimizer.bin"
    if weights.exists():
        try:
            network = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise _damage_error(weights, str(error)) from error
    elif (folder / "pytorch_model.bin").exists():
        network = load_pickled(folder / "pytorch_model.bin")
    else:
        raise CheckpointError(
            f"{folder} is not a state folder: it has neither {RECORD} nor model.safetensors. Give a "
            "...-state folder.",
            path=folder,
        )
    return ForeignState(folder, network, load_pickled(optimizer) if optimizer.exists() else None)


def _sort_as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as JSON would: keys become text, tuples become lists."""
    return dict(json.loads(json.dumps(record)))


def _record_checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _damage_error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}.\n  Resume from another state folder.", path=path)


def short_text(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
