"""Check the settings in a model's folder against its weights before the model is loaded.

Libraries trust a settings file: an image size of 100,000 pixels takes gigabytes, and building a million
layers takes forever. Therefore JSON files are limited in size, their values are compared with the headers of
the weight files, and the network is built on the meta device first.
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
MAX_SIDE = 2048  # largest height or width of images for a network, in pixels; Depth Pro takes 1536
MAX_PIXELS = 1 << 24  # largest image for a language model; Qwen's processors allow 12,845,056
MAX_HEADS = 64  # attention heads, each with scores for all pairs of tokens; the networks have up to 16
MAX_UNCHECKED = 4096  # settings up to this number are not compared with the weights
NOT_SIZES = ("theta", "token_id")  # parts of keys whose numbers are not sizes: rotary base, token ids
SPARE_ELEMENTS = 1 << 20  # elements that a network has in addition to its weights: position tables, masks

Shape = tuple[int, ...]


def check_settings(folder: Path, option: str, max_side: int = MAX_SIDE) -> list[Shape]:
    """Check the settings in a model's folder; return the shapes of the tensors in its weight files.

    Args:
        folder: The folder.
        option: Option that sets the folder, for messages.
        max_side: Longest image side that the network accepts, in pixels.

    Raises:
        CheckpointError: If a JSON file is too large, nested too deeply or invalid, or if it has numbers that
            are impossible for a network with these weights.
    """
    shapes = read_shapes(folder, option)
    largest = max((max(shape, default=1) for shape in shapes), default=0)
    for path, content in _read_settings(folder):
        if path.name in PROCESSORS:
            _check_numbers(path, content, max_side, "the longest side of an image is")
        elif path.name == CONFIG:
            max_number = max(MAX_UNCHECKED, largest)
            _check_numbers(path, content, max_number, "the longest axis of a tensor in the weights is")
            max_layers = min(len(shapes), MAX_BLOCKS)  # each layer has at least one tensor
            _check_counts(path, content, max_layers, MAX_HEADS)
    return shapes


def check_vision_language_settings(folder: Path, option: str) -> list[Shape]:
    """Check the settings of a vision language model; return the shapes of the tensors in its weights.

    Some settings, such as the maximum length of a text, are legitimately larger than any tensor. The caller
    therefore also calls `require_matching_shapes` with the network that the settings describe.

    Args:
        folder: The model's folder.
        option: Option that sets the folder, for messages.

    Raises:
        CheckpointError: If a JSON file is too large, nested too deeply or invalid, or if it specifies more
            layers, or larger images, than any such model has.
    """
    shapes = read_shapes(folder, option)
    for path, content in _read_settings(folder):
        if path.name in PROCESSORS:
            _check_numbers(path, content, MAX_PIXELS, "the maximum number of pixels is")
            _check_sides(path, content)
        elif path.name == CONFIG:
            # not compared with the number of tensors: default values may count layers that a model lacks
            _check_counts(path, content, MAX_BLOCKS)
    return shapes


def _read_settings(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Yield (path, parsed content) of each JSON file in a folder."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, parse_json(read_text(path, MAX_TOKENIZER_BYTES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", path) from None


def read_shapes(folder: Path, option: str) -> list[Shape]:
    """Return the shapes of all tensors in a folder's safetensors files, reading only the headers.

    Raises CheckpointError if a file is damaged or if there is none.
    """
    shapes: list[Shape] = []
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{option} {folder}: it contains no weights (*.safetensors)", folder)
    for path in paths[:MAX_SHARDS]:
        try:
            with path.open("rb") as file:
                header = read_tensor_header(file.read, path.stat().st_size)
            num_bytes = path.stat().st_size - header.start
            for entry in header.entries.values():
                shape = tuple(map(int, entry["shape"]))
                # an element has at least 4 bits, so a file cannot have more than two per byte
                if min(shape, default=0) < 0 or math.prod(shape) > 2 * num_bytes:
                    raise ValueError(f"it claims a tensor of shape {list(shape[:8])}")
                shapes.append(shape)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged: {error}", path) from None
        if len(shapes) > MAX_TENSORS:
            raise CheckpointError(f"{path} has more than {MAX_TENSORS:,} tensors", path)
    return shapes


def require_matching_shapes(
    folder: Path, option: str, network: Any, shapes: Sequence[Shape], is_exact: bool
) -> None:
    """Raise CheckpointError if a network built from settings does not match the weights.

    Args:
        folder: The model's folder.
        option: Option that sets the folder, for messages.
        network: The network, on the meta device.
        shapes: Shapes of the tensors in the weights.
        is_exact: Whether each parameter is a tensor of the file. Otherwise tensors may be split or joined
            when they are loaded, and only the number of elements is compared.
    """
    parameters = dict(network.named_parameters())
    # a quarter more is allowed, because a file stores tied weights once and omits buffers
    num_described = sum(tensor.numel() for tensor in (*parameters.values(), *network.buffers()))
    num_stored = sum(map(math.prod, shapes))
    if num_described > num_stored + num_stored // 4 + SPARE_ELEMENTS:
        raise CheckpointError(
            f"{option} {folder}: {CONFIG} describes a network of {num_described:,} parameters, but its "
            f"weights have {num_stored:,}. Take both from the same release",
            folder,
        )
    stored_shapes = set(shapes)
    for name, tensor in parameters.items():
        if is_exact and tuple(tensor.shape) not in stored_shapes:
            raise CheckpointError(
                f"{option} {folder}: according to {CONFIG}, {name} has the shape {list(tensor.shape)}, which "
                "none of the tensors in its weights has. Take both from the same release",
                folder,
            )


def build_on_meta(build: Callable[[Any], Any], config: Any) -> Any:
    """Call `build` with a transformers configuration on the meta device, which allocates no weights."""
    with torch.device("meta"):
        return build(config)


def _check_numbers(path: Path, content: Any, maximum: int, maximum_description: str) -> None:
    """Raise CheckpointError if a size in a settings file exceeds `maximum`."""
    # The message ends with `maximum_description` and the maximum.
    for name, number in _list_numbers(content):
        is_size = not any(word in name for word in NOT_SIZES)
        if is_size and not abs(number) <= maximum:  # written with `not`, so that NaN is rejected too
            raise CheckpointError(
                f"{path}: {name} is {number:,}, but {maximum_description} {maximum:,}", path
            )


def _check_sides(path: Path, content: Any) -> None:
    """Raise CheckpointError if a processor's settings allow longer image sides than any network accepts."""
    # If an object has both `shortest_edge` and `longest_edge`, they are pixel counts, as in Qwen's
    # processors. If it has only one of them, that is the length of a side.
    unvisited = [content]
    while unvisited:
        value = unvisited.pop()
        if isinstance(value, list):
            unvisited += value
        if not isinstance(value, Mapping):
            continue
        unvisited += value.values()
        keys = ["height", "width"]
        if not {"shortest_edge", "longest_edge"} <= set(value):
            keys += ["shortest_edge", "longest_edge"]
        sides = {key: value[key] for key in keys if key in value}
        for name, number in _list_numbers(sides):
            if not abs(number) <= MAX_UNCHECKED:  # written with `not`, so that NaN is rejected too
                raise CheckpointError(
                    f"{path}: {name} is {number:,}, but the longest side of an image is {MAX_UNCHECKED:,}",
                    path,
                )


def _check_counts(path: Path, content: Any, max_layers: int, max_heads: int = MAX_BLOCKS) -> None:
    """Raise CheckpointError if settings specify more layers or attention heads than allowed."""
    for name, number in _list_numbers(content):
        if "heads" in name and number > max_heads:
            raise CheckpointError(f"{path}: {name} is {number:,}, but at most {max_heads} are allowed", path)
        is_count = any(word in name for word in ("layers", "depth", "blocks", "stages"))
        if is_count and number > max_layers:
            raise CheckpointError(
                f"{path}: {name} is {number:,}, but at most {max_layers:,} are allowed", path
            )


def _list_numbers(content: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield (key, number) for all numbers in a JSON value; numbers in a list get the key of the list."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _list_numbers(value, str(key)[:100])
    elif isinstance(content, list):
        for value in content:
            yield from _list_numbers(value, name)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, content
