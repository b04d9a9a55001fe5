"""Rewrite LoRA files in another dialect; put the LoRAs of two experts into one file, and take them apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from torch import Tensor

from modules.atomic_write import save_tensors
from modules.checkpoints.opening import checkpoint_paths
from modules.console import as_size, show_box
from modules.contract.rules import HIGH_NOISE, LOW_NOISE
from modules.devices import choose_device
from modules.errors import CheckpointError, OptionError
from modules.output_files import refuse_replacing
from networks.baking import OTHER_KINDS, Baking, bake
from networks.deltas import LORA, group_by_module
from networks.key_formats import OURS, dialect_in_words
from networks.loading import PEFT_SETTINGS, LoraFile, list_some, read_lora
from networks.metadata import NETWORKS, STALE, add_hashes, join_metadata
from networks.module_names import choose_family, likely_family, read_family
from networks.names.framepack import FRAMEPACK
from networks.names.layouts import IN_DIFFUSERS, TRAINED_ON, UNET_IN_DIFFUSERS, FamilyNames
from networks.options import ConvertOptions
from networks.parts import fuse
from networks.uses import warn_of_other_expert
from networks.writing import (
    add_missing_alphas,
    rename_to_aliases,
    texts_to_diffusers,
    to_diffusers,
    to_diffusers_parts,
    to_other,
    to_other_parts,
)

logger = getLogger(__name__)
# HunyuanVideo's names in diffusers' layout are FramePack's own; whose a file is that does not say so
LIKELY_FAMILY = dict.fromkeys(("diffusers", "PEFT", "OneTrainer", "without prefix"), "hunyuan_video")


@dataclass(frozen=True)
class ConvertedLora:
    """A LoRA in another dialect, with its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def convert(options: ConvertOptions) -> None:
    """Convert the files of `--input` and `--input_high_noise` to one file or two.

    Raises as `convert_file`, and OptionError if the files and the options do not go together.
    """
    baking = None
    if options.bake is not None:
        baking = Baking(options.bake, choose_device(options.device), options.dit or ())
    if options.input_high_noise is None and options.output_high_noise is None and options.expert is None:
        convert_file(options.input, options.output, options.target, baking=baking)
        return
    low, high = _read_pair(options)
    if options.expert is not None:
        one = high if options.expert == HIGH_NOISE else low
        _convert_one(one, options.output, options.target, baking=baking)
    elif options.output_high_noise is not None:
        _convert_one(low, options.output, options.target, baking=baking)
        _convert_one(high, options.output_high_noise, options.target, baking=baking)
    else:
        _convert_parts({HIGH_NOISE: high, LOW_NOISE: low}, options.output, baking)


def convert_file(
    source: Path,
    output: Path,
    target: str,
    family_name: str | None = None,
    baking: Baking | None = None,
) -> None:
    """Write the LoRA of `source`, of any dialect, in ours (target "default"), in that of ComfyUI ("other") or
    in that of diffusers ("diffusers").

    Metadata are copied, the hashes among them made anew; they name the family where the names alone no longer
    would. Modules without a form in the other dialect are listed in a warning. LoRAs for parts of a fused
    module are put together. A file with a LoRA for each expert stays one in diffusers' dialect, the others
    have no form for it. baking: make plain LoRAs of other kinds before. Raises CheckpointError where the file
    is no LoRA or nothing of it can be written, or where it is for another model than `family_name`,
    OptionError where the result would replace it.
    """
    refuse_replacing("--output", output, checkpoint_paths(source))
    lora = read_lora(source, by_expert=True, with_texts=True)
    made = read_family(lora.metadata)
    if family_name is not None and made is not None and made.name != family_name:
        # layers of the same names have other sizes there: they would be cut in the wrong places
        raise CheckpointError(
            f"{source} is a LoRA for {made.name}, as its metadata say, not for {family_name}.\n"
            "  Convert it with convert_lora.py, which knows all models.",
            source,
        )
    if not lora.parts:
        _convert_one(lora, output, target, family_name, baking)
    elif baking is not None and baking.models:
        raise OptionError(
            f"--input {source} holds two LoRAs, one for each expert, and --dit is the model of one.\n"
            "  Take one with --expert high_noise or low_noise."
        )
    elif target == "diffusers":
        _convert_parts(lora.parts, output, baking)
    else:
        raise OptionError(
            f"--input {source} holds two LoRAs, one for each expert, and --target {target} has no form for "
            "that.\n  Add --output_high_noise FILE to write two files, or --expert high_noise or low_noise "
            "to take one."
        )


def _read_pair(options: ConvertOptions) -> tuple[LoraFile, LoraFile]:
    """Return the LoRAs of the low-noise and the high-noise expert."""
    first = read_lora(options.input, by_expert=True)
    if options.input_high_noise is not None:
        low, high = first, read_lora(options.input_high_noise, by_expert=True)
    elif first.parts:
        low = high = first
    else:
        option = "--expert" if options.expert is not None else "--output_high_noise"
        raise OptionError(
            f"{option} takes a file apart that holds a LoRA for each expert, but --input {options.input} "
            f"holds a single one. Leave {option} out"
        )
    for one, expert in ((low, LOW_NOISE), (high, HIGH_NOISE)):
        warn_of_other_expert(one.for_expert(expert), expert)
    return low.for_expert(LOW_NOISE), high.for_expert(HIGH_NOISE)


def _convert_one(
    lora: LoraFile, output: Path, target: str, family_name: str | None = None, baking: Baking | None = None
) -> None:
    lora, words = _baked(lora, baking, family_name)
    _save(output, converted(lora, target, family_name=family_name), [lora], words)


def _convert_parts(parts: Mapping[str, LoraFile], output: Path, baking: Baking | None) -> None:
    """Write one file of diffusers' dialect with a LoRA for each expert. parts: by expert."""
    found = {expert: _baked(lora, baking) for expert, lora in parts.items()}
    parts, words = {expert: lora for expert, (lora, _) in found.items()}, [each for _, each in found.values()]
    starts = {expert: start for start, expert in NETWORKS.items()}
    each = {expert: converted(lora, "diffusers", starts[expert]) for expert, lora in parts.items()}
    tensors = {name: tensor for one in each.values() for name, tensor in one.tensors.items()}
    metadata = join_metadata({expert: _lasting(one.metadata) for expert, one in each.items()})
    _save(output, ConvertedLora(tensors, metadata), list(parts.values()), "\n".join(filter(None, words)))


def _baked(lora: LoraFile, baking: Baking | None, family_name: str | None = None) -> tuple[LoraFile, str]:
    """Return a LoRA with plain factors alone if the options ask for it, and in words the loss."""
    if baking is None:
        return lora, ""
    baked = bake(lora, _family_of(lora, family_name)[0], baking)
    return baked.lora, baked.words


def converted(
    lora: LoraFile, target: str, start: str = IN_DIFFUSERS, family_name: str | None = None
) -> ConvertedLora:
    """Return a LoRA in another dialect; warn of parts without a form in it.

    start: of the names in diffusers' dialect. family_name: whose LoRA it is, if the caller knows; metadata
    say it better. Raises CheckpointError if no part of it can be written.
    """
    source = lora.path
    family, hint = _family_of(lora, family_name)
    native = fuse(lora.tensors, family=family) if family is not None and family.parts else lora.tensors
    if target != "diffusers" and family is not None and family.always_underscored:
        ours = add_missing_alphas(native)
        tensors = ours if family.always_underscored == "ours" else rename_to_aliases(ours, family)
    elif target == "default":
        tensors = add_missing_alphas(native)
    elif target == "other" and family is not None and family.underscored:
        tensors = rename_to_aliases(add_missing_alphas(native), family)
    else:
        if family is not None and family.parts and target == "diffusers":
            other = to_diffusers_parts(native, family, start)
        elif family is not None and family.parts and family.start == IN_DIFFUSERS:
            other = to_other_parts(native, family)
        else:
            begin = UNET_IN_DIFFUSERS if family is not None and family.start == UNET_IN_DIFFUSERS else start
            other = to_diffusers(native, hint, begin) if target == "diffusers" else to_other(native, hint)
        reasons = [f"{module} ({reason})" for module, reason in other.left_out.items()]
        modules = group_by_module(native)
        is_other_kind = any(OTHER_KINDS & modules[name].keys() for name in other.left_out)
        help_ = "\n  --bake RANK makes plain LoRAs of them." if is_other_kind else ""
        if not other.tensors and not lora.text_tensors:
            raise CheckpointError(f"{source} cannot be converted: {list_some(reasons, 3)}.{help_}", source)
        if reasons:
            logger.warning(f"{source}: {len(reasons)} modules are left out: {list_some(reasons)}{help_}")
        tensors = other.tensors
    tensors = {**tensors, **_texts_in(lora, target)}
    # its alphas are in the tensors now
    metadata = {key: value for key, value in lora.metadata.items() if key != PEFT_SETTINGS}
    if family is FRAMEPACK and read_family(lora.metadata) is None:
        metadata[TRAINED_ON] = family.name  # HunyuanVideo's names in diffusers' layout are the same
    return ConvertedLora(tensors, metadata)


def _texts_in(lora: LoraFile, target: str) -> Mapping[str, Tensor]:
    """Return a LoRA's tensors for text encoders, in another dialect; only diffusers has other names."""
    if target != "diffusers":
        return add_missing_alphas(lora.text_tensors)
    other = texts_to_diffusers(lora.text_tensors)
    if other.left_out:
        reasons = [f"{module} ({reason})" for module, reason in other.left_out.items()]
        logger.warning(f"{lora.path}: {len(reasons)} modules are left out: {list_some(reasons)}")
    return other.tensors


def _family_of(lora: LoraFile, name: str | None) -> tuple[FamilyNames | None, str | None]:
    """Return whose names a LoRA's modules have, and the name of the family that it is probably for."""
    made = read_family(lora.metadata)
    hint = (name or _likely_family(lora)) if made is None else made.name
    return choose_family((name.removeprefix(OURS) for name in lora.modules()), hint), hint


def _likely_family(lora: LoraFile) -> str | None:
    """Return the family that a file without metadata is probably for, if several have its names."""
    if lora.dialect not in LIKELY_FAMILY:
        return None
    inputs = {
        name.removeprefix(OURS): factors[LORA[0]].shape[1]
        for name, factors in lora.modules().items()
        if LORA[0] in factors
    }
    found = likely_family(inputs)
    return LIKELY_FAMILY[lora.dialect] if found is None else found.name


def _lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without hashes of the file that they are from."""
    return {key: value for key, value in metadata.items() if not key.startswith(STALE)}


def _save(output: Path, result: ConvertedLora, sources: list[LoraFile], baked: str = "") -> None:
    save_tensors(output, result.tensors, add_hashes(result.tensors, result.metadata))
    rows = [
        ("from", "\n".join(f"{lora.path}, {dialect_in_words(lora.dialect)}" for lora in sources)),
        ("to", f"{output} ({as_size(output.stat().st_size)})"),
        ("tensors", f"{len(result.tensors)} written"),
        ("made plain", baked),
    ]
    show_box("The LoRA is converted", rows)
