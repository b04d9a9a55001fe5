"""Inspect a model file and rewrite it: the work of model_utility.py."""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from checkpoints import changing
from checkpoints.kinds import describe_file_kind
from checkpoints.opening import SUFFIXES, Checkpoint
from checkpoints.shard_options import INDEX, read_shard_size
from checkpoints.shards import split
from checkpoints.writing import stream_tensors
from modules.bars import BYTES, Bar
from modules.command import did_you_mean
from modules.console import format_count, format_size
from modules.control_codes import escape_control_codes, shorten
from modules.devices import dtype_name, parse_dtype
from modules.errors import CheckpointError, OptionError
from modules.options import Options, option
from modules.output_files import Answer, ask_to_overwrite, ask_to_replace, check_output_file, reject_replacing
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)


MAX_VALUE_LENGTH = 200  # characters of a value of the metadata; metaview.py shows all
MAX_VALUES = 40
MAX_DESCRIPTION_LENGTH = (
    1000  # characters of the description of a file's kind; unknown tensor names may be long
)
PIECE_BYTES = 1 << 20  # bytes that are read at once
# AUTOMATIC1111's first checksum of models: offset and length of the bytes that it covers
AUTOV1_START, AUTOV1_BYTES = 0x100000, 0x10000
# values of --dtype; 8-bit quantization happens while loading, where the layers to quantize are known
DTYPES = ("fp32", "float32", "float", "fp16", "float16", "bf16", "bfloat16")
_NO_CODE = "files that contain program code are never opened here, because opening them would run that code"
_SHOWN = "what is shown; without any of these options: the kind of file, its dtypes and sizes"
_WRITTEN, _NAMES, _SAFETY = "what is written", "names of tensors", "safety"
_TEXTS = "one of these texts in their names"
_TO_SAY_WHICH = "--full_target_keys and --full_exclude_keys omit tensors"


class ModelUtilityOptions(Options):
    """Command-line options of the model utility: the file to examine and the file to write."""

    input: Path = option(
        "a model (.safetensors, .sft, .pt, .pth, .bin, .ckpt), one of its shards, an index.json, or a folder "
        "with all files of a model",
        required=True,
        by_place=True,
        metavar="FILE",
    )
    inspect: bool = option("list the tensors too: name: shape (dtype)", title=_SHOWN)
    hash: bool = option(
        "show SHA-256 of each file, and the checksums that model browsers look LoRAs up by", title=_SHOWN
    )
    json: bool = option("print JSON; values as they are stored", title=_SHOWN)
    convert: Path | None = option(
        "write the model to this safetensors file (.pt, .pth, .bin in its name become .safetensors)",
        title=_WRITTEN,
        flags=("--convert", "--output_path"),
        metavar="FILE",
    )
    yes: bool = option("replace a file that exists without asking", title=_WRITTEN, flags=("-y",))
    dtype: str | None = option(
        "cast to fp32, fp16 or bf16; whole numbers stay", title=_WRITTEN, needs="convert"
    )
    shard_size: str | None = option(
        "cut the model into files of at most this size, such as 5GB, with an index as on Hugging Face",
        title=_WRITTEN,
        needs="convert",
        metavar="SIZE",
        flags=("--shard_size", "--max_shard_size"),
    )
    target_keys: tuple[str, ...] | None = option(
        f"cast and list only tensors with {_TEXTS}",
        title=_NAMES,
        flags=("--target_keys", "--dtype_target_keys"),
        needs=("dtype", "inspect"),
        hint=_TO_SAY_WHICH,
    )
    exclude_keys: tuple[str, ...] | None = option(
        f"do not cast or list tensors with {_TEXTS}",
        title=_NAMES,
        flags=("--exclude_keys", "--dtype_exclude_keys"),
        needs=("dtype", "inspect"),
        hint=_TO_SAY_WHICH,
    )
    full_target_keys: tuple[str, ...] | None = option(
        f"write only tensors with {_TEXTS}", title=_NAMES, needs="convert"
    )
    full_exclude_keys: tuple[str, ...] | None = option(
        f"do not write tensors with {_TEXTS}", title=_NAMES, needs="convert"
    )
    strip_prefix: tuple[str, ...] | None = option(
        "cut these off the beginnings of names, one after the other: model.diffusion_model.",
        title=_NAMES,
        needs="convert",
    )
    add_prefix: str | None = option("put this before all names", title=_NAMES, needs="convert")
    weights_only: str = option(
        "only true: .pt files are read without running code in them", title=_SAFETY, default="true"
    )
    disable_weights_only: bool = option("rejected: code in a file is never run", title=_SAFETY)

    def __post_init__(self) -> None:
        weights_only = self.weights_only.strip().lower()
        if self.disable_weights_only or weights_only in {"false", "no", "0"}:
            flag = "--disable_weights_only" if self.disable_weights_only else "--weights_only false"
            raise OptionError(f"{flag}: {_NO_CODE}. Ask for a safetensors version of the file")
        if weights_only not in {"true", "yes", "1"}:
            raise OptionError(f"--weights_only {self.weights_only}: only true can be used: {_NO_CODE}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise _make_dtype_error(self.dtype)
        for name in ("target_keys", "exclude_keys", "full_target_keys", "full_exclude_keys"):
            if "" in (getattr(self, name) or ()):
                raise OptionError(f"--{name}: an empty text is in every name. Omit it")
        if self.shard_size is not None:
            read_shard_size("--shard_size", self.shard_size)

    @property
    def shard_bytes(self) -> int:
        """Return the maximum file size in bytes; 0 if the model is not split into shards."""
        return 0 if self.shard_size is None else read_shard_size("--shard_size", self.shard_size)


def _make_dtype_error(name: str) -> OptionError:
    """Return the error for an unknown dtype."""
    if "8" in name:
        return OptionError(
            f"--dtype {name}: weights in 8 bits are not written. Load the file with --fp8_scaled, or use "
            "fp16 or bf16"
        )
    guess = did_you_mean(name, DTYPES)
    return OptionError(f"--dtype {name} is not a dtype. Use fp32, fp16 or bf16.{guess}")


@dataclass(frozen=True)
class ModelSummary:
    """Facts about a model, found without reading its weights."""

    path: Path
    description: str  # the kind of model in words, such as "a Wan transformer (--dit) for --task t2v-14B"
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    unread_items: tuple[str, ...]  # contents of a torch file other than tensors, which are not read

    @property
    def container(self) -> str:
        """Return the file format, such as "safetensors"."""
        kinds = {"safetensors" if is_safetensors(file) else "torch (pickle)" for file in self.files}
        return " and ".join(sorted(kinds))

    @property
    def file_bytes(self) -> int:
        """Return the total size of the files in bytes."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def num_parameters(self) -> int:
        """Return the total number of elements in all tensors."""
        return sum(prod(info.shape) for info in self.tensors.values())


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors: it has a JSON header at byte 8, or else the suffix."""
    with path.open("rb") as file:
        return file.read(9)[8:9] == b"{" or path.suffix.lower() in SAFETENSORS


def count_dtypes(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, int, int]]:
    """Return (dtype, number of tensors, bytes) for each dtype, by descending size."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        counts[dtype_name(info.dtype)] += 1
        sizes[dtype_name(info.dtype)] += info.size_bytes
    return [(name, counts[name], size) for name, size in sizes.most_common()]


def format_info(model: ModelSummary, listed_tensors: Mapping[str, TensorInfo] | None) -> Iterator[str]:
    """Yield lines of text that describe a model: kind, files, dtypes, metadata and listed tensors.

    Args:
        model: The model's summary.
        listed_tensors: Tensors to list by name; None lists none.
    """
    yield f"{model.path}: {shorten(_join_lines(model.description), MAX_DESCRIPTION_LENGTH)}"
    files = f", {len(model.files)} files" if len(model.files) > 1 else ""
    yield f"container: {model.container}{files}, {format_size(model.file_bytes)}"
    numbers = "1 number" if model.num_parameters == 1 else f"{model.num_parameters:,} numbers"
    yield f"tensors: {len(model.tensors)}, with {numbers}"
    for name, count, size_bytes in count_dtypes(model.tensors):
        yield f"  {name}: {format_count(count, 'tensor')}, {format_size(size_bytes)} ({size_bytes:,} bytes)"
    if model.unread_items:
        yield f"in addition to the tensors, not read: {_shorten_line(', '.join(model.unread_items))}"
    if model.metadata:
        yield "metadata:"
        # Yield a line for each of the first MAX_VALUES entries, and one that counts the others
        for key, text in list(model.metadata.items())[:MAX_VALUES]:
            yield f"  {_shorten_line(key)}: {_shorten_line(text)}"
        if len(model.metadata) > MAX_VALUES:
            yield f"  and {len(model.metadata) - MAX_VALUES} more, which metaview.py shows"
    for name, info in (listed_tensors or {}).items():
        yield f"{_join_lines(name)}: {list(info.shape)} ({dtype_name(info.dtype)})"


def format_json(
    model: ModelSummary,
    listed_tensors: Mapping[str, TensorInfo] | None,
    hashes: Sequence[dict[str, str]],
    lora_hashes: Mapping[str, str],
) -> str:
    """Return a model file's description, tensors and checksums as JSON.

    Args:
        model: The model's summary.
        listed_tensors: Tensors to list; None lists none.
        hashes: Checksums of each file; empty if not requested.
        lora_hashes: Checksums by their keys in a LoRA's metadata.
    """
    content: dict[str, Any] = {
        "input": str(model.path),
        "what": model.description,
        "container": model.container,
        "files": [str(file) for file in model.files],
        "bytes": model.file_bytes,
        "tensors": len(model.tensors),
        "numbers": model.num_parameters,
        "dtypes": {
            name: {"tensors": count, "bytes": size_bytes}
            for name, count, size_bytes in count_dtypes(model.tensors)
        },
        "left_out": model.unread_items,
        "metadata": dict(model.metadata),
    }
    if hashes:
        content["hashes"] = hashes
        content["lora_hashes"] = dict(lora_hashes)
    if listed_tensors is not None:
        content["listed"] = {
            name: {"shape": list(info.shape), "dtype": dtype_name(info.dtype)}
            for name, info in listed_tensors.items()
        }
    return json.dumps(content, indent=2)


def file_hashes(path: Path) -> dict[str, str]:
    """Return the checksums of a file, read once: `sha256`, `data_sha256` and `old`.

    `data_sha256`, for safetensors only, covers the bytes after the header and does not change with the
    metadata. Model browsers call its first 12 digits AutoV3, the first 10 digits of `sha256` AutoV2, and
    `old` AutoV1: 8 digits of the SHA-256 of 64 KiB at offset 1 MiB, if the file is large enough.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    try:
        has_data = is_safetensors(path)
        size = path.stat().st_size
        with path.open("rb") as file, Bar(size, f"Reading {path.name}", BYTES) as bar:
            # a safetensors file begins with 8 bytes for the length of its header, then the header
            data_start = 8 + int.from_bytes(file.read(8), "little") if has_data else 0
            file.seek(0)
            ranges = {
                "sha256": range(sys.maxsize),
                "data_sha256": range(data_start, sys.maxsize),
                "old": range(AUTOV1_START, AUTOV1_START + AUTOV1_BYTES),
            }
            hashes = _hash_ranges(file, ranges, bar)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error
    texts = {"file": str(path), "sha256": hashes["sha256"]}
    if has_data:
        texts["data_sha256"] = hashes["data_sha256"]
    if size > AUTOV1_START:
        texts["old"] = hashes["old"][:8]
    return texts


def _hash_ranges(file: BinaryIO, ranges: Mapping[str, range], bar: Bar) -> dict[str, str]:
    """Read a file once, and return the SHA-256 of each range of its bytes, by the range's name."""
    hashes = {name: hashlib.sha256() for name in ranges}
    position = 0
    while piece := file.read(PIECE_BYTES):
        for name, byte_range in ranges.items():
            # the part of this piece that falls into the range
            begin = max(0, byte_range.start - position)
            end = max(0, byte_range.stop - position)
            hashes[name].update(piece[begin:end])
        position += len(piece)
        bar.update(len(piece))
    return {name: sha256.hexdigest() for name, sha256 in hashes.items()}


def _shorten_line(text: str) -> str:
    """Return a text as one line, shortened to at most MAX_VALUE_LENGTH characters."""
    return shorten(_join_lines(text), MAX_VALUE_LENGTH)


def _join_lines(text: str) -> str:
    """Return a text as a single line in which the line breaks stay visible."""
    return text.replace("\n", "\\n")


OPTION = "--convert"
SAFETENSORS = (".safetensors", ".sft")


@dataclass(frozen=True)
class ModelFunctions:
    """Functions for model files, passed in because this package must not import theirs."""

    identify: Callable[[Path], str | None]  # returns text such as "it is a Wan transformer ..."
    describe_lora: Callable[[Checkpoint], str | None]  # returns None if the file is not a LoRA
    compute_lora_hashes: Callable[[Checkpoint], Mapping[str, str]]  # by their keys in a LoRA's metadata
    # prefixes of metadata that become wrong if a LoRA's tensors change
    stale_metadata_prefixes: tuple[str, ...]


def work(
    options: ModelUtilityOptions,
    model_functions: ModelFunctions,
    ask: Callable[[str], Answer | None] = ask_to_overwrite,
) -> None:
    """Print a description of a model file, and write a converted copy if --convert names one.

    Args:
        options: Options of the command.
        model_functions: Functions that recognize the models of each family.
        ask: Returns whether to replace existing files.

    Raises:
        UserError: If the file cannot be read or written.
    """
    in_shards = options.shard_size is not None
    output = None if options.convert is None else select_output_path(options.convert, in_shards)
    with changing.gather(options.input) as checkpoint:
        if output is None:
            _print_description(options, model_functions, checkpoint)
            return
        replaced_paths = [output]
        if in_shards:
            replaced_paths += changing.existing_shards(output)
        _reject_replacing_inputs(replaced_paths, options.input, checkpoint)
        # plan and ask before anything is printed or written
        # The requested changes to a checkpoint: dtypes, selected tensors and name prefixes
        dtype = None if options.dtype is None else parse_dtype(options.dtype, "--dtype")
        cast = _make_selection(options)
        selected = changing.Selection(options.full_target_keys or (), options.full_exclude_keys or ())
        plan = changing.plan_change(
            checkpoint,
            changing.CheckpointChange(
                dtype,
                cast,
                selected,
                strip_prefixes=options.strip_prefix or (),
                add_prefix=options.add_prefix or "",
            ),
            model_functions.stale_metadata_prefixes,
        )
        ask_to_replace(replaced_paths, options.yes, ask)
        _print_description(options, model_functions, checkpoint)
        written_paths = _write(output, plan, options.shard_bytes)
        # leftover shards of the old model would be read as parts of the new one
        for path in replaced_paths:
            if path not in written_paths:
                path.unlink(missing_ok=True)


def _reject_replacing_inputs(paths: Sequence[Path], model_input: Path, checkpoint: Checkpoint) -> None:
    """Raise an error if an output file would overwrite an input: a file of the model, or its shard index."""
    inputs = [*checkpoint.metadata_by_file, model_input]
    if model_input.is_dir():
        inputs += model_input.glob(f"*{INDEX}")
    for path in paths:
        reject_replacing(OPTION, path, inputs)


def select_output_path(path: Path, in_shards: bool) -> Path:
    """Return the path of the safetensors file to write.

    Args:
        path: Path that the user gave.
        in_shards: Whether the model is written in shards; the path may then be a folder.

    Raises:
        OptionError: If the path cannot name a safetensors file.
    """
    if in_shards and (path.is_dir() or not path.suffix):
        path = path / "model.safetensors"
    # another format's suffix would be wrong for the written file
    if path.suffix.lower() in SUFFIXES and path.suffix.lower() not in SAFETENSORS:
        logger.info("%s: the written file is safetensors, so its name will end in .safetensors", path.name)
        path = path.with_suffix(".safetensors")
    # an existing folder is reported by the last check
    if path.suffix.lower() not in SAFETENSORS and not path.is_dir():
        raise OptionError(f"{OPTION} {path}: pass a name that ends in .safetensors")
    check_output_file(OPTION, path)
    return path


def _make_selection(options: ModelUtilityOptions) -> changing.Selection:
    """Return the patterns that select the tensors to cast and to list."""
    return changing.Selection(options.target_keys or (), options.exclude_keys or ())


def _print_description(
    options: ModelUtilityOptions, model_functions: ModelFunctions, checkpoint: Checkpoint
) -> None:
    """Print a model file's description as text or JSON, with tensors and checksums on request."""
    info = ModelSummary(
        path=checkpoint.path,
        description=_describe_kind(model_functions, checkpoint),
        files=tuple(checkpoint.metadata_by_file),
        tensors=dict(checkpoint.tensors),
        metadata=dict(checkpoint.metadata),
        unread_items=checkpoint.left_out,
    )
    listed_tensors = _list_tensors(options, info.tensors) if options.inspect else None
    hashes: list[dict[str, str]] = []
    lora_hashes: Mapping[str, str] = {}
    if options.hash:
        hashes = [file_hashes(file) for file in info.files]
        lora_hashes = model_functions.compute_lora_hashes(checkpoint)
    if options.json:
        lines = [format_json(info, listed_tensors, hashes, lora_hashes)]
    else:
        text_lines = [*format_info(info, listed_tensors), *_format_hashes(hashes, lora_hashes, info.metadata)]
        # names of files and tensors may contain control codes
        lines = [escape_control_codes(line) for line in text_lines]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _describe_kind(model_functions: ModelFunctions, checkpoint: Checkpoint) -> str:
    """Describe, for users, which model a file contains."""
    description = model_functions.describe_lora(checkpoint)
    if description is not None:
        return description
    description = model_functions.identify(checkpoint.path) or describe_file_kind(checkpoint.tensors)
    if description is not None:
        return description.removeprefix("it is ").removeprefix("it looks like ")
    names = sorted(checkpoint.tensors)[:3]
    return f"an unknown model with tensors such as {', '.join(names)}"


def _list_tensors(options: ModelUtilityOptions, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors that the options select for listing; raise OptionError if no tensor is left."""
    selection = _make_selection(options)
    listed_tensors = {name: info for name, info in tensors.items() if selection.selects(name)}
    if not listed_tensors:
        raise OptionError("--target_keys and --exclude_keys leave no tensor to list: pass other names")
    return listed_tensors


def _format_hashes(
    hashes: Sequence[Mapping[str, str]], lora_hashes: Mapping[str, str], metadata: Mapping[str, str]
) -> list[str]:
    """Return lines with the files' hashes, and whether the hashes in the metadata still match."""
    lines = []
    for record in hashes:
        lines.append(
            f"SHA-256 of {Path(record['file']).name}: {record['sha256']} (AutoV2 {record['sha256'][:10]})"
        )
        if "data_sha256" in record:
            lines.append(f"  of its data: {record['data_sha256']} (AutoV3 {record['data_sha256'][:12]})")
        if "old" in record:
            lines.append(f"  of 64 KiB at 1 MiB: {record['old']} (AutoV1)")
    for key, value in lora_hashes.items():
        stored = metadata.get(key)
        if stored is None:
            note = "not in the metadata"
        elif stored == value:
            note = "as the metadata says"
        else:
            note = f"the metadata says {stored}: the tensors have changed since, or are in a different order"
        lines.append(f"{key}: {value} ({note})")
    return lines


def _write(output: Path, plan: changing.NewFile, shard_bytes: int) -> list[Path]:
    """Write the file or its shards, log and return their paths; `shard_bytes` 0 writes one file."""
    for note in plan.notes:
        logger.info("%s", note)
    if shard_bytes and len(split(plan.tensors, shard_bytes)) > 1:
        paths = changing.write_shards(
            output, plan.tensors, plan.read, metadata=plan.metadata, max_bytes=shard_bytes
        )
        written = f"{paths[-1]} and {len(paths) - 1} files"  # the index and its shards
    else:
        if shard_bytes:
            logger.info("Everything fits into one file of that size, so there is no index")
        stream_tensors(output, plan.tensors, plan.read, plan.metadata)
        paths = [output]
        written = str(output)
    dtypes = ", ".join(f"{name} {format_size(size)}" for name, _, size in count_dtypes(plan.tensors))
    logger.info("Written: %s (%s: %s)", written, format_count(len(plan.tensors), "tensor"), dtypes)
    return paths
