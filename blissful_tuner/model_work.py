"""What model_utility.py does: look at a model file, and write it anew."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blissful_tuner.model_facts import Facts, as_json, as_lines, dtypes_of, facts_of, file_hashes
from blissful_tuner.model_utility_options import ModelUtilityOptions
from modules.asking import Answer, ask_to_replace, ask_yes_or_no
from modules.checkpoints.changing import CheckpointChange, NewFile, Selection, plan_change
from modules.checkpoints.gathering import INDEX, gather
from modules.checkpoints.kinds import kind_of
from modules.checkpoints.opening import SUFFIXES, Checkpoint
from modules.checkpoints.sharding import existing_shards, split, write_shards
from modules.checkpoints.writing import stream_tensors
from modules.console import as_size, count_of
from modules.contract.loading import TensorInfo
from modules.control_codes import escape_control_codes
from modules.devices import dtype_named
from modules.errors import OptionError
from modules.output_files import check_output_file, refuse_replacing

logger = logging.getLogger(__name__)

OPTION = "--convert"
SAFETENSORS = (".safetensors", ".sft")


@dataclass(frozen=True)
class Knowledge:
    """What rooms above this one know of model files."""

    identify: Callable[[Path], str | None]  # "it is a Wan transformer ..."
    describe_lora: Callable[[Checkpoint], str | None]
    lora_hashes: Callable[[Checkpoint], Mapping[str, str]]
    stale: tuple[str, ...]  # how metadata begin that are true of a LoRA's own tensors only


def work(
    options: ModelUtilityOptions,
    knowledge: Knowledge,
    ask: Callable[[str], Answer | None] = ask_yes_or_no,
) -> None:
    """Show what a file is, and write it anew if that is asked for.

    ask: answers whether files that exist are replaced. Raises UserError.
    """
    output = None if options.convert is None else output_name(options.convert, options.shard_size is not None)
    with gather(options.input) as checkpoint:
        plan, replaced = None, []
        if output is not None:
            replaced = [output] if options.shard_size is None else [output, *existing_shards(output)]
            indexes = list(options.input.glob(f"*{INDEX}")) if options.input.is_dir() else []
            for path in replaced:
                refuse_replacing(OPTION, path, [*checkpoint.parts, options.input, *indexes])
            plan = plan_change(checkpoint, change_of(options), knowledge.stale)
            ask_to_replace(replaced, options.yes, ask)
        _show(options, knowledge, checkpoint)
        if output is not None and plan is not None:
            written = _write(output, plan, options.shard_bytes)
            for path in replaced:  # what would be taken for the new model, too
                if path not in written:
                    path.unlink(missing_ok=True)


def output_name(path: Path, in_shards: bool) -> Path:
    """Return the name of the safetensors file to write. in_shards: a folder may be given too.

    Raises OptionError if it cannot be one.
    """
    if in_shards and (path.is_dir() or not path.suffix):
        path = path / "model.safetensors"
    if path.suffix.lower() in SUFFIXES and path.suffix.lower() not in SAFETENSORS:
        logger.info("%s: a safetensors file is written, so its name ends in .safetensors", path.name)
        path = path.with_suffix(".safetensors")
    if path.suffix.lower() not in SAFETENSORS and not path.is_dir():
        raise OptionError(f"{OPTION} {path}: give a name that ends in .safetensors")
    check_output_file(OPTION, path)
    return path


def change_of(options: ModelUtilityOptions) -> CheckpointChange:
    """Return what the options change."""
    return CheckpointChange(
        None if options.dtype is None else dtype_named(options.dtype, "--dtype"),
        _selection(options),
        Selection(options.full_target_keys or (), options.full_exclude_keys or ()),
        options.strip_prefix or (),
        options.add_prefix or "",
    )


def say_what(checkpoint: Checkpoint, knowledge: Knowledge) -> str:
    """Return in words what an open file is."""
    lora = knowledge.describe_lora(checkpoint)
    if lora is not None:
        return lora
    found = knowledge.identify(checkpoint.path) or kind_of(checkpoint.tensors)
    if found is None:
        return f"an unknown model with tensors such as {', '.join(sorted(checkpoint.tensors)[:3])}"
    return found.removeprefix("it is ").removeprefix("it looks like ")


def _selection(options: ModelUtilityOptions) -> Selection:
    return Selection(options.target_keys or (), options.exclude_keys or ())


def _show(options: ModelUtilityOptions, knowledge: Knowledge, checkpoint: Checkpoint) -> None:
    """Print what the file is."""
    facts = facts_of(checkpoint, say_what(checkpoint, knowledge))
    listed = _listed(options, facts)
    hashes = [file_hashes(file) for file in facts.files] if options.hash else []
    known = dict(knowledge.lora_hashes(checkpoint)) if options.hash else {}
    if options.json:
        lines = [as_json(facts, listed, hashes, known)]
    else:
        plain = [*as_lines(facts, listed), *_hash_lines(hashes, known, facts.metadata)]
        lines = [escape_control_codes(line) for line in plain]  # names of files and tensors may hold some
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _listed(options: ModelUtilityOptions, facts: Facts) -> dict[str, TensorInfo] | None:
    if not options.inspect:
        return None
    selection = _selection(options)
    found = {name: info for name, info in facts.tensors.items() if selection.takes(name)}
    if not found:
        raise OptionError("--target_keys and --exclude_keys leave no tensor to list: give other names")
    return found


def _hash_lines(
    hashes: Sequence[Mapping[str, str]], known: Mapping[str, str], metadata: Mapping[str, str]
) -> list[str]:
    lines = []
    for one in hashes:
        lines.append(f"SHA-256 of {Path(one['file']).name}: {one['sha256']} (AutoV2 {one['sha256'][:10]})")
        if "data_sha256" in one:
            lines.append(f"  of its data: {one['data_sha256']} (AutoV3 {one['data_sha256'][:12]})")
        if "old" in one:
            lines.append(f"  of 64 KiB at 1 MiB: {one['old']} (AutoV1)")
    for key, value in known.items():
        stored = metadata.get(key)
        word = "not in the metadata" if stored is None else "as the metadata say"
        if stored is not None and stored != value:
            word = f"the metadata say {stored}: the tensors were changed since, or are in another order"
        lines.append(f"{key}: {value} ({word})")
    return lines


def _write(output: Path, plan: NewFile, shard_bytes: int) -> list[Path]:
    """Write the file, or its shards, say what was written, and return it."""
    for note in plan.notes:
        logger.info("%s", note)
    if shard_bytes and len(split(plan.tensors, shard_bytes)) > 1:
        paths = write_shards(output, plan.tensors, plan.read, plan.metadata, shard_bytes)
        what = f"{paths[-1]} and {len(paths) - 1} files"
    else:
        if shard_bytes:
            logger.info("All of it fits into one file of that size, which needs no index")
        stream_tensors(output, plan.tensors, plan.read, plan.metadata)
        paths, what = [output], str(output)
    kinds = ", ".join(f"{name} {as_size(size)}" for name, _, size in dtypes_of(plan.tensors))
    logger.info("Written: %s (%s: %s)", what, count_of(len(plan.tensors), "tensor"), kinds)
    return paths
