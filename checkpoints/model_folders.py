"""Check the folder of a model before it is loaded: its settings say nothing that its weights do not show.

Libraries believe what a settings file says: a size of 100,000 pixels takes gigabytes, a million layers have
no end. Here texts are bounded, numbers are compared with the headers of the weights, and the network is
built without memory first.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modules.errors import CheckpointError
from modules.limits import MAX_BLOCKS, MAX_SHARDS, MAX_TENSORS, MAX_TOKENIZER_BYTES
from modules.text_files import parse_json, read_tensor_header, read_text

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MAX_SIDE = 2048  # pixels of the images that a network is given; Depth Pro looks at 1536
MAX_PIXELS = 1 << 24  # of an image for a language model; Qwen's processors say 12,845,056
MAX_HEADS = 64  # of an attention, each with a map of all places; the networks have up to 16
DEFAULT_NUMBER = 4096  # up to which a setting is no size that the weights have to show
NO_SIZES = ("theta", "token_id")  # in keys of a base of frequencies, and of words
SPARE_ELEMENTS = 1 << 20  # of a network, that are not in its weights: places, masks

Shape = tuple[int, ...]


def check_settings(folder: Path, option: str, max_side: int = MAX_SIDE) -> list[Shape]:
    """Check the settings of a model's folder; return the shapes of the tensors in its weights.

    Args:
        folder: Folder of the model.
        option: Option that names the folder, for messages.
        max_side: Largest side of images that the network accepts, in pixels.

    Raises:
        CheckpointError: If a JSON file is too large, nested too deeply or invalid, or if it has numbers that
            are impossible for a network with these weights.
    """
    shapes = read_shapes(folder, option)
    largest = max((max(shape, default=1) for shape in shapes), default=0)
    for path, content in _read_settings(folder):
        if path.name in PROCESSORS:
            _check_numbers(path, content, max_side, "the pictures of a network have at most")
        elif path.name == CONFIG:
            max_number = max(DEFAULT_NUMBER, largest)
            _check_numbers(path, content, max_number, "the largest size of a tensor in its weights is")
            _check_counts(path, content, min(len(shapes), MAX_BLOCKS), MAX_HEADS)
    return shapes


def check_language_settings(folder: Path, option: str) -> list[Shape]:
    """Check the settings of a language model with vision; return the shapes of the tensors in its weights.

    Some settings cannot be compared with weights, such as the maximum length of a text. `require_shown`
    therefore compares the network that the settings describe.

    Args:
        folder: Folder of the model.
        option: Option that names the folder, for messages.

    Raises:
        CheckpointError: If a JSON file is too large, nested too deeply or invalid, or if it asks for more
            layers, or larger images, than any such model has.
    """
    shapes = read_shapes(folder, option)
    for path, content in _read_settings(folder):
        if path.name in PROCESSORS:
            _check_numbers(path, content, MAX_PIXELS, "the pictures of a language model have at most")
            _check_sides(path, content)
        elif path.name == CONFIG:
            # not compared with the weights: transformers' defaults may name layers that a model lacks
            _check_counts(path, content, MAX_BLOCKS)
    return shapes


def _read_settings(folder: Path) -> Iterator[tuple[Path, Any]]:
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, parse_json(read_text(path, MAX_TOKENIZER_BYTES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", path) from None


def read_shapes(folder: Path, option: str) -> list[Shape]:
    """Return the shapes of all tensors in the safetensors files of a folder.

    Raises CheckpointError if a file is damaged.
    """
    shapes: list[Shape] = []
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{option} {folder}: it has no weights, as a file .safetensors", folder)
    for path in paths[:MAX_SHARDS]:
        try:
            with path.open("rb") as file:
                header = read_tensor_header(file.read, path.stat().st_size)
            num_bytes = path.stat().st_size - header.start
            for entry in header.entries.values():
                shape = tuple(map(int, entry["shape"]))
                # an element has at least 4 bits
                if min(shape, default=0) < 0 or math.prod(shape) > 2 * num_bytes:
                    raise ValueError(f"it claims a tensor of shape {list(shape[:8])}")
                shapes.append(shape)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged: {error}", path) from None
        if len(shapes) > MAX_TENSORS:
            raise CheckpointError(f"{path} has more than {MAX_TENSORS:,} tensors", path)
    return shapes


def require_shown(folder: Path, option: str, network: Any, shapes: Sequence[Shape], is_exact: bool) -> None:
    """Raise CheckpointError if a network built from settings does not match the weights.

    Args:
        folder: Folder of the model.
        option: Option that names the folder, for messages.
        network: The network, on the device "meta".
        shapes: Shapes of the tensors in the weights.
        is_exact: Whether each parameter is a tensor of the file; otherwise tensors may be split or joined
            when they are loaded, and only the number of elements is compared.
    """
    parameters = dict(network.named_parameters())
    # a fourth more is allowed, because a file stores tied weights once and leaves buffers out
    num_described = sum(tensor.numel() for tensor in (*parameters.values(), *network.buffers()))
    num_stored = sum(map(math.prod, shapes))
    if num_described > num_stored + num_stored // 4 + SPARE_ELEMENTS:
        raise CheckpointError(
            f"{option} {folder}: {CONFIG} describes a network of {num_described:,} numbers, its weights have "
            f"{num_stored:,}. Take both from one release",
            folder,
        )
    known = set(shapes)
    for name, tensor in parameters.items():
        if is_exact and tuple(tensor.shape) not in known:
            raise CheckpointError(
                f"{option} {folder}: by {CONFIG} {name} has the shape {list(tensor.shape)}, which none of "
                "the tensors in its weights has. Take both from one release",
                folder,
            )


def build_without_memory(build: Callable[[Any], Any], config: Any) -> Any:
    """Build the network of a transformers configuration on the device "meta"."""
    with torch.device("meta"):
        return build(config)


def _check_numbers(path: Path, content: Any, maximum: int, reason: str) -> None:
    for name, number in _list_numbers(content):
        is_size = not any(word in name for word in NO_SIZES)
        if is_size and not abs(number) <= maximum:  # NaN too
            raise CheckpointError(f"{path}: {name} is {number:,}, and {reason} {maximum:,}", path)


def _check_sides(path: Path, content: Any) -> None:
    """Raise CheckpointError if images would have longer sides than any network accepts.

    A table with both `shortest_edge` and `longest_edge` means numbers of pixels (Qwen); one of the two alone
    is the length of a side.
    """
    tables = [content]
    while tables:
        table = tables.pop()
        if isinstance(table, list):
            tables += table
        if not isinstance(table, Mapping):
            continue
        tables += table.values()
        counts_pixels = {"shortest_edge", "longest_edge"} <= set(table)
        sides = ("height", "width") if counts_pixels else ("height", "width", "shortest_edge", "longest_edge")
        for name, number in _list_numbers({name: table[name] for name in sides if name in table}):
            if not abs(number) <= DEFAULT_NUMBER:
                raise CheckpointError(
                    f"{path}: {name} is {number:,}, and a side of a picture has at most {DEFAULT_NUMBER:,}",
                    path,
                )


def _check_counts(path: Path, content: Any, max_layers: int, max_heads: int = MAX_BLOCKS) -> None:
    """Raise CheckpointError for more layers or heads than a network can have."""
    for name, number in _list_numbers(content):
        if "heads" in name and number > max_heads:
            raise CheckpointError(f"{path}: {name} is {number:,}, and at most {max_heads} are taken", path)
        is_count = any(word in name for word in ("layers", "depth", "blocks", "stages"))
        if is_count and number > max_layers:
            raise CheckpointError(f"{path}: {name} is {number:,}, and at most {max_layers:,} go here", path)


def _list_numbers(content: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield all numbers of a JSON value, each with its key, or the key of the list that holds it."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _list_numbers(value, str(key)[:100])
    elif isinstance(content, list):
        for value in content:
            yield from _list_numbers(value, name)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, content
