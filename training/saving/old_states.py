"""Read states of before version 2: a JSON record and a safetensors file for each part."""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from modules.text_files import parse_json, read_text, require_regular_file

RECORD = "state.json"


def read_old_state(folder: Path, is_checked: bool) -> dict[str, Any]:
    """Return the fields of `SavedState` but its folder, of a state of before.

    is_checked: read the tensors too, and compare their checksums. Raises an error of any kind if the folder
    is damaged.
    """
    record = parse_json(read_text(folder / RECORD))
    checksum = record.pop("crc32")
    if checksum != zlib.crc32(json.dumps(record, sort_keys=True).encode()):
        raise ValueError(f"the checksum of {RECORD} is not the recorded one")
    parts: dict[str, dict[str, Tensor]] = {}
    for part, file in record["parts"].items():
        path = folder / f"{part}.safetensors"
        if path.stat().st_size != file["bytes"]:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, {file['bytes']} were written")
        if is_checked:
            if file_checksum(path) != file["crc32"]:
                raise ValueError(f"the checksum of {path.name} is not the recorded one")
            parts[part] = load_file(path)
    content = {name: record[name] for name in ("progress", "identity", "habits")}
    if not is_checked:
        return content
    described, tensors = record["described"], parts.pop("optimizer")
    optimizer = described["optimizer"]
    states = optimizer["states"].items()
    return content | {
        "parts": parts,
        "optimizer": {
            "groups": [
                {**_decode(group["rest"], tensors), "params": group["params"]}
                for group in optimizer["groups"]
            ],
            "states": {name: _decode(state, tensors) for name, state in states},
            "on_host": sorted({key for _, state in states for key in _keys_on_host(state)}),
        },
        "schedule": {name: _decode(value, {}) for name, value in described["schedule"].items()},
        "scaler": described.get("scaler"),
        "average": described.get("ema"),
        "settings": described.get("settings", {}),
    }


def file_checksum(path: Path) -> int:
    """Return the CRC-32 of a regular file."""
    require_regular_file(path)
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value encoded as JSON, with tensors by their names."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "mapping" in value:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["mapping"]}
    items = [_decode(item, tensors) for item in value["tuple" if "tuple" in value else "list"]]
    return tuple(items) if "tuple" in value else items


def _keys_on_host(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of tensors that were in host memory."""
    for key, item in state["mapping"]:
        if isinstance(item, dict) and item.get("on_cpu"):
            yield key
