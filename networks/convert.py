"""Rewrite LoRA files in another dialect; put the LoRAs of two experts into one file, and take them apart."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path

from torch import Tensor

from modules.checkpoints.opening import checkpoint_paths, open_checkpoint
from modules.checkpoints.writing import save_tensors
from modules.console import as_size, show_box
from modules.contract.rules import HIGH_NOISE, LOW_NOISE
from modules.devices import choose_device
from modules.errors import CheckpointError, OptionError
from modules.output_files import refuse_replacing
from networks.alphas import without_alphas
from networks.baking import OTHER_KINDS, Baking, bake
from networks.deltas import (
    DORA,
    LORA,
    add_missing_alphas,
    group_by_module,
)
from networks.key_formats import NETWORKS, OURS, dialect_in_words, name_by_ratios
from networks.loading import LoraFile, list_some, read_lora, warn_of_other_expert
from networks.metadata import PARTS_METADATA, STALE, add_hashes
from networks.module_names import FAMILIES, alias, choose_family, joined_path, read_family, to_alias
from networks.names.image import HUNYUAN_IMAGE, Z_IMAGE
from networks.names.layouts import IN_DIFFUSERS, TRAINED_EXPERT, TRAINED_ON, FamilyNames
from networks.names.video import FRAMEPACK
from networks.parts import fuse
from networks.tool_options import (
    ComfyConvertOptions,
    ConvertOptions,
    FluxConvertOptions,
    ZImageConvertOptions,
)
from networks.writing import in_dialect, in_own_form, rename_to_aliases, take_apart, texts_to_diffusers

logger = getLogger(__name__)
# HunyuanVideo's names in diffusers' layout are FramePack's own; whose a file is that does not say so
LIKELY_FAMILY = dict.fromkeys(("diffusers", "PEFT", "OneTrainer", "without prefix"), "hunyuan_video")


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
    low, high = low.for_expert(LOW_NOISE), high.for_expert(HIGH_NOISE)
    if options.expert is not None:
        one = high if options.expert == HIGH_NOISE else low
        _convert_one(one, options.output, options.target, baking=baking)
    elif options.output_high_noise is not None:
        _convert_one(low, options.output, options.target, baking=baking)
        _convert_one(high, options.output_high_noise, options.target, baking=baking)
    else:
        _convert_parts({HIGH_NOISE: high, LOW_NOISE: low}, options.output, baking)


def convert_flux(options: FluxConvertOptions) -> None:
    """Convert a LoRA of FLUX.1 or Chroma to the names of diffusers, or back. Raises as `convert_file`."""
    assert options.src_path is not None
    assert options.dst_path is not None
    target = "diffusers" if options.dst == "ai-toolkit" else "default"
    convert_file(options.src_path, options.dst_path, target, "flux")


def convert_hunyuan_image(options: ComfyConvertOptions) -> None:
    """Write a LoRA of HunyuanImage-2.1 with ComfyUI's module names, or the other way round.

    Tensors and metadata stay; hashes are made anew if there are metadata. Raises CheckpointError if nothing
    in the file has a name to change.
    """
    source = options.src_path
    with open_checkpoint(source) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = {k: v for k, v in checkpoint.metadata.items() if not k.startswith(STALE)}
    renamed = rename_to_aliases(stored, HUNYUAN_IMAGE, alias if options.reverse else to_alias)
    if renamed.keys() == stored.keys():
        direction = "ComfyUI's names to ours" if options.reverse else "our names to ComfyUI's"
        raise CheckpointError(
            f"{source} has no module to rename from {direction}, such as {next(iter(stored), 'none')}.\n"
            f"  Give a LoRA for {HUNYUAN_IMAGE.name}; --reverse is the way back.",
            source,
        )
    save_tensors(options.dst_path, renamed, add_hashes(renamed, metadata) if metadata else {})
    rows = [
        ("from", str(source)),
        ("to", f"{options.dst_path} ({as_size(options.dst_path.stat().st_size)})"),
        ("tensors", f"{len(renamed)}, {len(renamed.keys() - stored.keys())} with another name"),
    ]
    show_box("The LoRA is converted", rows)


def convert_z_image(options: ZImageConvertOptions) -> None:
    """Write a LoRA of Z-Image for ComfyUI, whose queries, keys and values are one module, or the way back.

    A joined LoRA has the sum of the three ranks, and as many times the alpha. Metadata stay; hashes are made
    anew. Raises CheckpointError if nothing in the file is of the model, OptionError if a LoKr is to be joined
    without --lokr_rank.
    """
    source = options.src_path
    lora = read_lora(source)
    tensors: Mapping[str, Tensor] = add_missing_alphas(take_apart(lora.tensors, Z_IMAGE))
    modules = group_by_module(tensors)
    if choose_family((name.removeprefix(OURS) for name in modules), Z_IMAGE.name) is not Z_IMAGE:
        raise CheckpointError(
            f"{source} has no module of {Z_IMAGE.name}, only such as {list_some(sorted(modules), 3)}.\n"
            "  Give a LoRA for Z-Image.",
            source,
        )
    if options.reverse:
        _save(options.dst_path, tensors, lora.metadata, [lora])
        return
    # LoHas and LoKrs for modules that are joined: plain LoRAs take their places
    stacked = {
        name: factors
        for name, factors in modules.items()
        if factors.keys() & (OTHER_KINDS - {DORA}) and joined_path(name.removeprefix(OURS), Z_IMAGE) is None
    }
    words = ""
    if stacked:
        if options.lokr_rank is None:
            raise OptionError(
                f"{source} is a LoHa or LoKr for queries, keys and values ({next(iter(stacked))}), which are "
                "one module in ComfyUI, and only plain LoRAs can be joined. Add --lokr_rank RANK, such as "
                "64: the best LoRA of that rank takes the place of each"
            )
        own = {f"{name}.{part}": one for name, factors in stacked.items() for part, one in factors.items()}
        baking = Baking(options.lokr_rank, choose_device(None))
        baked, words = bake(replace(lora, tensors=own), Z_IMAGE, baking)
        tensors = {**{name: one for name, one in tensors.items() if name not in own}, **baked.tensors}
    tensors = rename_to_aliases(fuse(tensors, family=Z_IMAGE), Z_IMAGE)
    _save(options.dst_path, tensors, lora.metadata, [lora], words)


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
    name, says = (name_by_ratios(lora.modules()), "sizes") if made is None else (made.name, "metadata")
    if family_name is not None and name not in (None, family_name):
        # layers of the same names have other sizes there: they would be cut in the wrong places
        raise CheckpointError(
            f"{source} is a LoRA for {name}, as its {says} say, not for {family_name}.\n"
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


def _convert_one(
    lora: LoraFile, output: Path, target: str, family_name: str | None = None, baking: Baking | None = None
) -> None:
    lora, words = _baked(lora, baking, family_name)
    _save(output, *converted(lora, target, family_name=family_name), [lora], words)


def _convert_parts(parts: Mapping[str, LoraFile], output: Path, baking: Baking | None) -> None:
    """Write one file of diffusers' dialect with a LoRA for each expert. parts: by expert."""
    found = {expert: _baked(lora, baking) for expert, lora in parts.items()}
    starts = {expert: start for start, expert in NETWORKS.items()}
    each = {expert: converted(lora, "diffusers", starts[expert]) for expert, (lora, _) in found.items()}
    tensors = {name: tensor for one, _ in each.values() for name, tensor in one.items()}
    # without the hashes of the files that they are from; `metadata_of` takes what is joined apart again
    own = {
        expert: {
            key: value for key, value in one.items() if key != TRAINED_EXPERT and not key.startswith(STALE)
        }
        for expert, (_, one) in each.items()
    }
    first, *others = own.values()
    metadata = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    own = {
        expert: {key: value for key, value in one.items() if key not in metadata}
        for expert, one in own.items()
    }
    if any(own.values()):
        metadata[PARTS_METADATA] = json.dumps(own, ensure_ascii=False, sort_keys=True)
    words = "\n".join(words for _, words in found.values() if words)
    _save(output, tensors, metadata, [lora for lora, _ in found.values()], words)


def _baked(lora: LoraFile, baking: Baking | None, family_name: str | None = None) -> tuple[LoraFile, str]:
    """Return a LoRA with plain factors alone if the options ask for it, and in words the loss."""
    return (lora, "") if baking is None else bake(lora, _family_of(lora, family_name), baking)


def converted(
    lora: LoraFile, target: str, start: str = IN_DIFFUSERS, family_name: str | None = None
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return a LoRA's tensors in another dialect, and their metadata; warn of parts without a form in it.

    start: of the names in diffusers' dialect. family_name: whose LoRA it is, if the caller knows; metadata
    say it better. Raises CheckpointError if no part of it can be written.
    """
    family = _family_of(lora, family_name)
    native = lora.tensors if family is None else in_own_form(lora.tensors, family)
    if family is not None and family.joined and target == "other":
        native = fuse(native, family=family)
    names = "" if family is None or target == "diffusers" else family.always_underscored
    if target == "other" and family is not None and family.underscored:
        names = "aliases"
    if names or target == "default":
        tensors = add_missing_alphas(native)
        if names == "aliases" and family is not None:
            tensors = rename_to_aliases(tensors, family)
    else:
        tensors, left_out = in_dialect(native, family, target, start)
        modules = group_by_module(native)
        is_other_kind = any(OTHER_KINDS & modules[name].keys() for name in left_out)
        remedy = "\n  --bake RANK makes plain LoRAs of them." if is_other_kind else ""
        if not tensors and not lora.text_tensors:
            reasons = list_some([f"{module} ({reason})" for module, reason in left_out.items()], 3)
            raise CheckpointError(f"{lora.path} cannot be converted: {reasons}.{remedy}", lora.path)
        _warn_of_left_out(lora.path, left_out, remedy)
    # only diffusers has other names for text encoders
    texts, left_out = add_missing_alphas(lora.text_tensors), {}
    if target == "diffusers":
        texts, left_out = texts_to_diffusers(lora.text_tensors)
    _warn_of_left_out(lora.path, left_out)
    # its alphas are in the tensors now
    metadata = without_alphas(lora.metadata)
    if family is FRAMEPACK and read_family(lora.metadata) is None:
        metadata[TRAINED_ON] = family.name  # HunyuanVideo's names in diffusers' layout are the same
    return {**tensors, **texts}, metadata


def _warn_of_left_out(path: Path, left_out: Mapping[str, str], remedy: str = "") -> None:
    if left_out:
        reasons = [f"{module} ({reason})" for module, reason in left_out.items()]
        logger.warning(f"{path}: {len(reasons)} modules are left out: {list_some(reasons)}{remedy}")


def _family_of(lora: LoraFile, name: str | None) -> FamilyNames | None:
    """Return whose names a LoRA's modules have. name: of the family that the caller expects."""
    made = read_family(lora.metadata)
    hint = (name_by_ratios(lora.modules()) or name or _likely_family(lora)) if made is None else made.name
    return choose_family((name.removeprefix(OURS) for name in lora.modules()), hint)


def _likely_family(lora: LoraFile) -> str | None:
    """Return the family that a file without metadata is probably for, if several have its names.

    It is the one whose published models have as many blocks as the file's modules, and as wide ones.
    """
    numbers: dict[str, int] = {}
    widths: set[int] = set()
    for module, factors in lora.modules().items():
        if LORA[0] not in factors:
            continue
        name = module.removeprefix(OURS)
        found = re.match(r"((?:single_)?transformer_blocks|layers)_(\d+)_", name)
        if found is not None:
            numbers[found[1]] = max(numbers.get(found[1], 0), int(found[2]) + 1)
        if name.endswith(("attn_to_q", "attn_add_q_proj", "attention_qkv", "attention_to_q")):
            widths.add(factors[LORA[0]].shape[1])
    fitting = [
        family
        for family in FAMILIES
        if {family.width} == widths and any(numbers.get(name) == depth for name, depth in family.depths)
    ]
    return fitting[0].name if fitting else LIKELY_FAMILY.get(lora.dialect)


def _save(
    output: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    sources: list[LoraFile],
    baked: str = "",
) -> None:
    save_tensors(output, tensors, add_hashes(tensors, metadata))
    rows = [
        ("from", "\n".join(f"{lora.path}, {dialect_in_words(lora.dialect)}" for lora in sources)),
        ("to", f"{output} ({as_size(output.stat().st_size)})"),
        ("tensors", f"{len(tensors)} written"),
        ("made plain", baked),
    ]
    show_box("The LoRA is converted", rows)
