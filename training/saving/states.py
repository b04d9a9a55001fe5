"""Write, find, check and read states: folders with all a run needs to continue as if it had never stopped.

A state folder contains one file of tensors and plain values, and its checksum. It is written under a
temporary name and then renamed, so an existing one is complete. Random states are not stored, because
random numbers follow from the seed and the number of the micro-batch.
"""

import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from checkpoints.containers import load_pickled
from modules.atomic_write import atomic_folder, check_space
from modules.errors import CheckpointError, OptionError, UserError
from modules.paths import explain_missing
from modules.text_files import parse_json, read_text, require_regular_file
from networks.names.layouts import LTX_FORK_PREFIX, OURS
from runtime.offload.sharding import is_sharded_weight
from training.saving.files import recover_states, state_pattern
from training.steps import Progress, check_types

logger = logging.getLogger(__name__)

FILE, CHECKSUM = "state.pt", "state.crc32"
RECORD = "state.json"  # in states of version 1
VERSION = 2  # 1: a JSON record and a safetensors file for each part, which `read_old_state` reads
SHARDED_VERSION = 3  # with files of tensors that were split over processes, see split_model.py
AVERAGE = "ema"  # key of the averaged weights among the parts of a state
MAX_COUNT = 10**9  # steps or epochs
MAX_CHECKSUM_BYTES = 100  # bytes of the file CHECKSUM
# a state may have this many times the entries of a model file: several optimizer tensors for each weight,
# and the losses of an epoch
_ENTRY_COUNT_FACTOR = 20
FRESH_START = "--network_weights FILE for a LoRA, --dit FILE for a whole model"
REMEDY = (
    "Resume from another state folder, or start a new run from what was trained: --network_weights FILE or "
    "--dit FILE"
)


@dataclass(frozen=True)
class SavedState:
    """State of a run for resuming. Tensors of a loaded state are memory-mapped until `release` is called."""

    folder: Path
    progress: Progress
    identity: dict[str, Any]  # settings that must be equal in a resumed run
    habits: dict[str, Any]  # settings that a resumed run may change, with a warning
    parts: dict[str, Mapping[str, Tensor]]  # state dicts of the trained modules, and the average
    optimizer: dict[str, Any]  # see `optimizer_state`
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None = None
    average: dict[str, Any] | None = None  # values that belong to the averaged weights, such as their steps
    settings: dict[str, Any] = field(default_factory=dict)  # a resumed run may change these without a warning
    # files of tensors that were split over processes -> checksum
    files: dict[str, int] = field(default_factory=dict)

    def release(self) -> None:
        """Free the tensors, because Windows cannot replace a folder while a file in it is memory-mapped."""
        self.parts.clear()
        self.optimizer.clear()


@dataclass(frozen=True)
class ForeignState:
    """State folder of another trainer; it records no progress, so steps are counted from 0."""

    folder: Path
    network: dict[str, Tensor]
    optimizer: dict[str, Any]  # empty if there is none
    is_ordered: bool = False  # the network's tensors are in that program's own order

    def release(self) -> None:
        """Drop the loaded tensors to free their memory."""
        self.network.clear()
        self.optimizer.clear()


def write_state(
    folder: Path, state: SavedState, add_files: Callable[[Path], dict[str, int]] | None = None
) -> None:
    """Write `state` to `folder`, completely or not at all.

    Args:
        folder: Folder to write.
        state: The state to write.
        add_files: Writes additional files, and returns their checksums.

    Raises:
        OutputError: If writing fails.
    """
    # The content of a state's file in built-in types, without `files`, which are not written yet
    version = SHARDED_VERSION if add_files else VERSION
    progress = to_builtin_types(state.progress.as_state(), "progress")
    content: dict[str, Any] = {"version": version, "progress": progress}
    for name, value in vars(state).items():
        if name == "parts":
            content[name] = {part: _as_bytes(tensors) for part, tensors in state.parts.items()}
        elif name not in {"folder", "files", "progress"}:
            content[name] = to_builtin_types(value, name)
    check_space(folder, sum(tensor.nbytes for tensors in state.parts.values() for tensor in tensors.values()))
    with atomic_folder(folder) as temporary:
        if add_files is not None:
            content["files"] = add_files(temporary)
        with (temporary / FILE).open("wb") as file:
            try:
                torch.save(content, file)  # one tensor after the other, from any device
            except RuntimeError as error:  # torch wraps the OSError of a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        (temporary / CHECKSUM).write_text(f"{file_checksum(temporary / FILE):08x}\n", encoding="utf-8")


def _as_bytes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]:
    """Return views of the weights as bytes, with the dtype and shape of each."""
    # Swapped weights share one storage, which `torch.save` accepts only if all have one dtype.
    flat = {}
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        flat[name] = (data, tensor.dtype, tuple(tensor.shape))
    return flat


def read_state(folder: Path) -> SavedState | ForeignState:
    """Read a state folder that this program or another trainer saved.

    Raises:
        CheckpointError: If the state is damaged, or if the folder contains no state.
        OptionError: If `folder` is not a folder.
    """
    if not folder.is_dir():
        error = "no such folder"
        similar_names = ""
        advice = ""
        if folder.is_file():
            error = "it is a file, but a state is a folder"
            advice = f" To begin with the trained weights, pass {FRESH_START}."
        else:
            similar_names = explain_missing(folder)
        raise OptionError(
            f"--resume {folder}: {error}.{similar_names} Pass a ...-state folder, or the word latest.{advice}"
        )
    if not _is_readable_state(folder):
        return _read_foreign(folder)
    with errors_name_the_state(folder):
        content = _read_content(folder, verify_checksum=True)
        if "files" in content:  # a sharded transformer's tensors, in separate files
            _check_files(folder, content["files"])
        state = SavedState(folder, Progress.from_state(content.pop("progress")), **content)
        check_types(state)
        check_types(state.progress)
        progress = state.progress
        # the step plan can only have changed at an epoch and step that the run has passed
        has_epochs = 0 <= progress.plan_epoch <= progress.epoch <= MAX_COUNT
        has_steps = 0 <= progress.plan_step <= progress.step <= MAX_COUNT
        if not (has_epochs and has_steps):
            raise ValueError("its counts of steps and epochs are inconsistent")
        return state


def _check_files(folder: Path, checksums: Mapping[str, int]) -> None:
    """Raise ValueError if a file of sharded tensors is missing or has changed."""
    # Each process checks some of the files, and all processes raise the error.
    shares = gather_object([(path.name, file_checksum(path)) for path in select_files_to_check(folder)])
    present = dict(shares)
    for name in checksums.keys() | present:
        if present.get(name) != checksums.get(name):
            raise ValueError(f"{name} is missing, or its checksum is not the one in {FILE}")


@contextlib.contextmanager
def errors_name_the_state(folder: Path) -> Iterator[None]:
    """Convert errors that a damaged state causes in the block to a CheckpointError that names the folder."""
    try:
        yield
    except CheckpointError as error:
        if str(folder) in str(error):
            raise
        raise CheckpointError(f"{folder}: {error}", folder) from None
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a harmful file may lead to any
        reason = shorten_value(error) or type(error).__name__
        raise CheckpointError(f"{folder} is damaged: {reason}.\n  {REMEDY}", folder) from error


def to_builtin_types(value: Any, name: str) -> Any:
    """Return a copy of a value in built-in types and tensors, which can be unpickled without running code.

    Args:
        value: The value.
        name: Name of the value in the message.

    Raises:
        OptionError: If the value contains any other object.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {
            to_builtin_types(key, name): to_builtin_types(item, f"{name}/{key}")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [to_builtin_types(item, f"{name}/{index}") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    # A number or text in its built-in type; raise OptionError for any other object
    # subclasses, such as numpy's float, become the plain type; bool comes first because it is an int
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a numpy number
        return value.item()
    raise OptionError(
        f"the optimizer keeps a {type(value).__name__} in {name}, which cannot be saved.\n"
        "  Omit --save_state, or use a different --optimizer_type."
    )


def find_latest(output_dir: Path, name: str) -> Path | None:
    """Return the complete state of run `name` with the most steps, or None.

    Folders that a killed run left half replaced are repaired first.
    """
    recover_states(output_dir, name)
    # of two states with equal steps, the one whose name sorts last
    latest = max(list_states(output_dir, name), key=lambda state: (state.step, state.folder), default=None)
    return None if latest is None else latest.folder


class ListedState(NamedTuple):
    """A state on disk: its step, the run that saved it, and its folder."""

    step: int
    session_id: int
    folder: Path


def list_states(output_dir: Path, name: str) -> list[ListedState]:
    """Return the complete states of runs with this name. A damaged one is left out, with a warning."""
    pattern = state_pattern(name)
    states: list[ListedState] = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if folder.is_dir() and pattern.fullmatch(folder.name) and _is_readable_state(folder):
            try:
                with errors_name_the_state(folder):
                    progress = _read_content(folder)["progress"]
                    states.append(ListedState(int(progress["step"]), int(progress["session_id"]), folder))
            except CheckpointError as error:
                logger.warning("%s is ignored in the search for the latest state: %s", folder, error)
    return states


def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy all saved weights into a trained module.

    Raises:
        CheckpointError: If names or shapes differ, or if a value is NaN or infinite.
    """
    weights = module.state_dict()
    missing = sorted(weights.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - weights.keys())
    common = weights.keys() & tensors.keys()
    misshaped = [name for name in common if weights[name].shape != tensors[name].shape]
    if missing or unexpected or misshaped:
        raise CheckpointError(
            f"it contains another network: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(unexpected)} unexpected "
            f"{unexpected[:2]}, {len(misshaped)} of another shape {sorted(misshaped)[:2]}.\n"
            "  Use --network_module, --network_dim and --network_args, or the --dit, of the run that saved "
            "it."
        )
    # sharded tensors were filled in place while the state was read (`load_sharded_tensors`)
    unsplit = {name: tensor for name, tensor in tensors.items() if not is_sharded_weight(tensor)}
    _require_finite(unsplit)
    module.load_state_dict(unsplit, strict=len(unsplit) == len(tensors))


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a value is NaN or infinite. 8-bit tensors are not checked."""
    for name, tensor in tensors.items():
        is_wide = tensor.is_floating_point() and tensor.element_size() > 1
        if is_wide and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} contains values that are NaN or infinite.\n  {REMEDY}")


def shorten_value(value: Any) -> str:
    """Return a value as text, shortened to at most 60 characters for messages."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_readable_state(folder: Path) -> bool:
    return (folder / FILE).exists() or (folder / RECORD).exists()


def _read_content(folder: Path, verify_checksum: bool = False) -> dict[str, Any]:
    """Return the fields of `SavedState` except its folder. Tensors are memory-mapped."""
    if not (folder / FILE).exists():
        return read_old_state(folder, verify_checksum)
    if not (folder / CHECKSUM).is_file():
        raise ValueError(f"{CHECKSUM} is missing")
    if verify_checksum:
        checksum = file_checksum(folder / FILE)
        if checksum != int(read_text(folder / CHECKSUM, MAX_CHECKSUM_BYTES), 16):
            raise ValueError(f"the checksum of {FILE} is not the one in {CHECKSUM}")
    content: dict[str, Any] = load_pickled(folder / FILE, _ENTRY_COUNT_FACTOR)
    if content.pop("version") not in {VERSION, SHARDED_VERSION}:
        raise CheckpointError(
            f"{folder} was saved by a newer version. Update, or resume from another state.", path=folder
        )
    # tensors are stored as flat data with dtype and shape
    content["parts"] = {
        part: {name: data.view(dtype).view(shape) for name, (data, dtype, shape) in tensors.items()}
        for part, tensors in content["parts"].items()
    }
    return content


def _read_foreign(folder: Path) -> ForeignState:
    """Read a folder written by accelerate: model.safetensors and optimizer.bin."""
    # Its schedule and random states are not read, because the folder does not say at which step it was saved.
    weights, optimizer = folder / "model.safetensors", folder / "optimizer.bin"
    is_ordered = not weights.exists()  # safetensors sorts tensors by name, torch keeps the program's order
    if not is_ordered:
        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{weights} is damaged: {error}.\n  Resume from another state folder.", path=weights
            ) from error
    elif (folder / "pytorch_model.bin").exists():
        tensors = load_pickled(folder / "pytorch_model.bin")
    else:
        raise CheckpointError(
            f"{folder} is not a state folder: it has neither {FILE} nor model.safetensors. Pass a "
            "...-state folder.",
            path=folder,
        )
    network: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "." not in name:  # a setting of the network, such as `lokr_factor`, and not a tensor of a layer
            continue
        if name.startswith(LTX_FORK_PREFIX):  # a fork of LTX names the same layers with a different prefix
            name = name.replace(LTX_FORK_PREFIX, OURS, 1)
        network[name] = tensor
    optimizer_state = load_pickled(optimizer, _ENTRY_COUNT_FACTOR) if optimizer.exists() else {}
    return ForeignState(folder, network, optimizer_state, is_ordered)


def read_old_state(folder: Path, verify_checksum: bool) -> dict[str, Any]:
    """Read a state saved by an older version; return the fields of `SavedState` except its folder.

    Args:
        folder: Folder of the state.
        verify_checksum: Whether to read the tensors too, and to compare their checksums.

    Raises:
        Exception: Of any type, if the folder is damaged.
    """
    record = parse_json(read_text(folder / RECORD))
    checksum = record.pop("crc32")
    if checksum != zlib.crc32(json.dumps(record, sort_keys=True).encode()):
        raise ValueError(f"the checksum of {RECORD} is not the recorded one")
    # Check the tensor files of an older version's state, and read their tensors if checksums are verified
    files = record["parts"]
    parts: dict[str, dict[str, Tensor]] = {}
    for part, file in files.items():
        path = folder / f"{part}.safetensors"
        if path.stat().st_size != file["bytes"]:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, {file['bytes']} were written")
        if verify_checksum:
            if file_checksum(path) != file["crc32"]:
                raise ValueError(f"the checksum of {path.name} is not the recorded one")
            parts[part] = load_file(path)
    content = {name: record[name] for name in ("progress", "identity", "habits")}
    if not verify_checksum:  # the caller only compares the progress of several states
        return content
    described = record["described"]
    tensors = parts.pop("optimizer")
    return content | {
        "parts": parts,
        "optimizer": _decode_optimizer(described["optimizer"], tensors),
        "schedule": {name: _decode(value, {}) for name, value in described["schedule"].items()},
        "scaler": described.get("scaler"),
        "average": described.get(AVERAGE),
        "settings": described.get("settings", {}),
    }


def _decode_optimizer(optimizer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Decode an optimizer state from a state folder that an older version saved."""
    groups = [{**_decode(group["rest"], tensors), "params": group["params"]} for group in optimizer["groups"]]
    on_host = set()  # the names of tensors that were in host memory
    for state in optimizer["states"].values():
        for key, item in state["mapping"]:
            if isinstance(item, dict) and item.get("on_cpu"):
                on_host.add(key)
    states = {name: _decode(state, tensors) for name, state in optimizer["states"].items()}
    return {"groups": groups, "states": states, "on_host": sorted(on_host)}


def select_files_to_check(folder: Path) -> list[Path]:
    """Return the weight files of a state that this process checks: every nth file with n processes."""
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if not distributed.is_initialized():
        return paths
    return paths[distributed.get_rank() :: distributed.get_world_size()]


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content, read in pieces of 4 MiB."""
    require_regular_file(path)
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Decode a JSON value of a state; tensors are looked up in `tensors` by name."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "mapping" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["mapping"]}
    items = [_decode(item, tensors) for item in value["tuple" if "tuple" in value else "list"]]
    return tuple(items) if "tuple" in value else items
