"""Convert LoRA files to another dialect (key format); join the LoRAs of two experts, or split them."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from checkpoints.opening import checkpoint_paths, open_checkpoint
from checkpoints.writing import save_tensors
from modules.console import format_size, list_some, show_box
from modules.devices import select_device
from modules.errors import CheckpointError, OptionError
from modules.options import Options, option
from modules.output_files import reject_replacing
from modules.text_files import real_path
from networks import module_names
from networks.alphas import without_alphas
from networks.baking import NON_LORA_FACTORS, Baked, Baking, bake
from networks.delta import read_delta
from networks.formats import diffusers
from networks.formats.comfyui import find_file_error
from networks.formats.effects import NOTES
from networks.fused_loras import join_parts
from networks.key_formats import can_be_for
from networks.kinds.composing import (
    MAGNITUDE_KIND_NAME,
    MAGNITUDES,
    PRODUCT_KIND_NAMES,
    find_network_kind,
    in_series,
)
from networks.kinds.factors import Factors
from networks.loading import LoraFile, read_lora, warn_about_other_expert
from networks.lora_format import TARGETS
from networks.magnitudes import convert_to_norms
from networks.metadata import PARTS_METADATA, STALE, add_hashes
from networks.module_factors import add_missing_alphas, group_by_module, ungroup
from networks.names.layouts import (
    COMFYUI,
    IN_DIFFUSERS,
    KNOWN,
    LORA_FORMAT,
    OURS,
    TRAINED_EXPERT,
    TRAINED_ON,
    FamilyNames,
)
from networks.rank_masks import read_rank_rule
from networks.tensor_names import dialect_in_words, find_networks
from networks.writing import (
    convert_to_dialect,
    convert_to_our_layout,
    rename_to_aliases,
    split_fused_layers,
    texts_to_comfyui,
    texts_to_diffusers,
)
from protocols.families import HIGH_NOISE, LOW_NOISE

logger = getLogger(__name__)
ANIMA, FLUX, HUNYUAN_IMAGE, HUNYUAN_VIDEO_15, Z_IMAGE = map(
    module_names.family_named, ("anima", "flux", "hunyuan_image", "hunyuan_video_1_5", "z_image")
)
DIALECTS = ("sd-scripts", "ai-toolkit")
# names of the kinds that --bake converts to plain LoRAs: products without the model, DoRA with it
_BAKED = (*PRODUCT_KIND_NAMES, *filter(None, (MAGNITUDE_KIND_NAME,)))
_UNJOINABLE = in_series([f"{name}s" for name in PRODUCT_KIND_NAMES], "and")  # for help texts
# arguments of the options that name a file to write
_OUTPUT_FILE: Mapping[str, Any] = {
    "place": "safetensors",
    "must_not_replace": ("input", "input_high_noise", "dit"),
}


class ConvertOptions(Options):
    """Options of `convert_lora.py`."""

    input: Path = option(
        "LoRA file of any dialect; with two experts, the one for low noise or a file with both",
        place="there",
        required=True,
        by_place=True,
    )
    input_high_noise: Path | None = option(
        "LoRA file of the high-noise expert of Wan2.2, to be written next to --input",
        place="there",
        excludes="expert",
    )
    output: Path = option("safetensors file to write", **_OUTPUT_FILE, required=True, by_place=True)
    output_high_noise: Path | None = option(
        "safetensors file for the LoRA of the high-noise expert; --output then gets the low-noise one",
        excludes="expert",
        **_OUTPUT_FILE,
    )
    expert: str | None = option(
        "use only this LoRA of a file with one for each expert", choices=("high_noise", "low_noise")
    )
    target: str = option(
        "other or comfyui: as ComfyUI and most tools read it: diffusion_model. (FramePack, FLUX: "
        "transformer.) with lora_A and lora_B, alpha folded in; HunyuanImage: lora_unet_ with ComfyUI's "
        "names; default: lora_unet_ with lora_down and lora_up; "
        "diffusers: transformer. with diffusers' module names, both experts in one file as transformer. "
        "(high noise) and transformer_2. (low noise)",
        required=True,
        choices=("other", "comfyui", "default", "diffusers"),
    )
    family: str | None = option(
        "the model that the LoRA is for, such as flux or hunyuan_video; default: from the file's metadata, "
        "names and sizes"
    )
    bake: int | None = option(
        f"make a plain LoRA of this rank of each {in_series(_BAKED, 'and')}, for "
        "tools that do not know them; says how much of the change is lost",
        minimum=1,
        hint="a rank",
    )
    dit: tuple[Path, ...] | None = option(
        "the model that a DoRA was trained for, followed by the text encoders that it changes; for --bake, "
        "and to convert exactly to --target other and back",
        nargs="+",
        place="there",
        excludes=("input_high_noise", "output_high_noise"),
        why="each expert has its own model: --expert takes one LoRA out of a file for both",
    )
    device: str | None = option(
        "device that --bake and --dit compute on; default: CUDA if available, else MPS, else the CPU",
        needs=("bake", "dit"),
    )

    def __post_init__(self) -> None:
        if self.output_high_noise is not None and real_path(self.output) == real_path(self.output_high_noise):
            raise OptionError(f"--output and --output_high_noise are both {self.output}: use two names")
        is_joined = self.input_high_noise is not None and self.output_high_noise is None
        if is_joined and self.target != "diffusers":
            raise OptionError(
                f"--target {self.target} has no form for two LoRAs in one file: use --target diffusers, or "
                "add --output_high_noise FILE"
            )


class FluxConvertOptions(Options, must_give=True):
    """Options of `networks/convert_flux_lora.py`."""

    src: str = option(f"dialect to read: {' or '.join(DIALECTS)}", default="ai-toolkit", one_of=DIALECTS)
    dst: str = option(f"dialect to write: {' or '.join(DIALECTS)}", default="sd-scripts", one_of=DIALECTS)
    src_path: Path | None = option("LoRA file to read", place="there")
    dst_path: Path | None = option(
        "safetensors file to write", place="safetensors", must_not_replace="src_path"
    )

    def __post_init__(self) -> None:
        if self.src == self.dst:
            raise OptionError(f"--src and --dst are both {self.src}: use two dialects")
        if self.src_path is None or self.dst_path is None:
            raise OptionError("--src_path and --dst_path are both needed: the LoRA and the file to write")


class ComfyConvertOptions(Options):
    """Options shared by the scripts `networks/convert_*_to_comfy.py`."""

    src_path: Path = option("LoRA file to read", positional=True, place="there")
    dst_path: Path = option(
        "safetensors file to write", positional=True, place="safetensors", must_not_replace="src_path"
    )
    reverse: bool = option("from ComfyUI's names to ours")


class JoiningConvertOptions(ComfyConvertOptions):
    """Options of the scripts that join layers for ComfyUI, such as `convert_z_image_lora_to_comfy.py`."""

    lokr_rank: int | None = option(
        f"rank of the plain LoRAs that take the place of {_UNJOINABLE} for queries, keys and values, which "
        "cannot be joined; more loses less",
        minimum=1,
        excludes="reverse",
        why="the way back leaves them as they are",
    )


@dataclass(frozen=True)
class Conversion:
    """How to convert a LoRA; `target` is "default" (our names), "other" (ComfyUI's) or "diffusers"."""

    target: str
    family: str | None = None  # the LoRA's family, if the user or a family's own script names it
    baking: Baking | None = None  # how to convert other kinds to plain LoRAs, or magnitudes, first


def convert(options: ConvertOptions) -> None:
    """Convert the files of `--input` and `--input_high_noise`; write one or two files.

    Raises:
        CheckpointError: If a file is not a LoRA, or cannot be converted to the target.
        OptionError: If the files do not fit the options, or the output would replace an input.
    """
    # How to convert. Raises OptionError if the family of `--family` is unknown.
    baking = None
    if options.bake is not None or options.dit:
        baking = Baking(options.bake, select_device(options.device), options.dit or ())
    names = [family.name for family in module_names.FAMILIES]
    if options.family is not None and options.family not in names:
        raise OptionError(f"--family {options.family}: unknown model; known ones are {', '.join(names)}")
    target = "other" if options.target == "comfyui" else options.target  # the code's name for it
    conversion = Conversion(target, options.family, baking)
    if options.input_high_noise or options.output_high_noise or options.expert:
        # Write the LoRA of `--expert`, two files with one expert's LoRA each, or one file with both
        # The LoRAs of both experts, from one or two files
        low = read_lora(options.input, by_expert=True, family=options.family)
        high = low  # one file contains both, unless a second file is given
        if options.input_high_noise is not None:
            high = read_lora(options.input_high_noise, by_expert=True, family=options.family)
        elif not low.loras_by_expert:
            option = "--expert" if options.expert is not None else "--output_high_noise"
            raise OptionError(
                f"{option} needs a file with a LoRA for each expert, but --input {options.input} contains a "
                f"single LoRA. Omit {option}"
            )
        warn_about_other_expert(low.for_expert(LOW_NOISE), LOW_NOISE)
        warn_about_other_expert(high.for_expert(HIGH_NOISE), HIGH_NOISE)
        lora_by_expert = {HIGH_NOISE: high.for_expert(HIGH_NOISE), LOW_NOISE: low.for_expert(LOW_NOISE)}
        if options.expert is not None:
            _convert_one(lora_by_expert[options.expert], options.output, conversion)
        elif options.output_high_noise is not None:
            _convert_one(lora_by_expert[LOW_NOISE], options.output, conversion)
            _convert_one(lora_by_expert[HIGH_NOISE], options.output_high_noise, conversion)
        else:
            _convert_both_experts(lora_by_expert, options.output, conversion)
    else:
        convert_file(
            options.input,
            options.output,
            target=conversion.target,
            family=conversion.family,
            baking=conversion.baking,
        )


def convert_flux(options: FluxConvertOptions) -> None:
    """Convert a FLUX.1 or Chroma LoRA to diffusers' names, or back.

    Raises:
        CheckpointError: If the file is not a LoRA for these models, or if no module can be converted.
        OptionError: If the output would replace the source.
    """
    assert options.src_path is not None
    assert options.dst_path is not None
    target = "diffusers" if options.dst == "ai-toolkit" else "default"
    convert_file(options.src_path, options.dst_path, target, FLUX.name)


def convert_anima(options: ComfyConvertOptions) -> None:
    """Convert an Anima LoRA to ComfyUI's names, or back.

    Raises:
        CheckpointError: If the file is not an Anima LoRA, or if none of its modules can be converted.
        OptionError: If the output would replace the source.
    """
    target = "default" if options.reverse else "other"
    convert_file(options.src_path, options.dst_path, target, ANIMA.name)


def convert_hunyuan_image(options: ComfyConvertOptions) -> None:
    """Convert a HunyuanImage-2.1 LoRA to ComfyUI's module names, or back.

    Values and metadata are unchanged, except that hashes in the metadata are recomputed.

    Raises:
        CheckpointError: If nothing in the file has a name to change.
    """
    source = options.src_path
    output = options.dst_path
    with open_checkpoint(source) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = {key: text for key, text in checkpoint.metadata.items() if not key.startswith(STALE)}
    if LORA_FORMAT in metadata:
        metadata[LORA_FORMAT] = KNOWN if options.reverse else COMFYUI
    if not options.reverse:
        _reject_for_comfyui(source, stored)
    renamed = _rename_hunyuan_image(source, stored, options.reverse)
    save_tensors(output, renamed, add_hashes(renamed, metadata) if metadata else {})
    num_changed = len(renamed.keys() - stored.keys())
    rows = [
        ("from", str(source)),
        ("to", f"{output} ({format_size(output.stat().st_size)})"),
        ("tensors", f"{len(renamed)}, {num_changed} with another name"),
    ]
    show_box("The LoRA is converted", rows)


def _rename_hunyuan_image(source: Path, stored: Mapping[str, Tensor], to_ours: bool) -> dict[str, Tensor]:
    """Rename tensors of a HunyuanImage-2.1 LoRA from ComfyUI's names to ours, or from ours to ComfyUI's."""
    rename = module_names.from_alias if to_ours else module_names.to_alias
    renamed = rename_to_aliases(stored, HUNYUAN_IMAGE, rename)
    if renamed.keys() != stored.keys():
        return renamed
    direction = "ComfyUI's names to ours" if to_ours else "our names to ComfyUI's"
    example = next(iter(stored), "none")
    raise CheckpointError(
        f"{source} has no module to rename from {direction}, such as {example}.\n"
        f"  Pass a LoRA for {HUNYUAN_IMAGE.name}; --reverse converts back.",
        source,
    )


class _JoinableTensors(NamedTuple):
    """Tensors whose modules can be joined as in ComfyUI, and a note on what was lost for that."""

    tensors: Mapping[str, Tensor]
    loss_note: str  # "" if nothing was converted


def _replace_unjoinable(
    lora: LoraFile, tensors: Mapping[str, Tensor], rank: int | None, family: FamilyNames
) -> _JoinableTensors:
    """Replace modules that cannot be joined, such as LoKrs, with plain LoRAs of a rank."""
    # Modules (with factors) that ComfyUI fuses but whose kind, such as LoKr, cannot be joined
    unjoinable: dict[str, Factors] = {}
    for name, factors in group_by_module(tensors).items():
        is_other_kind = bool(factors.keys() & (NON_LORA_FACTORS - {MAGNITUDES}))
        if is_other_kind and module_names.is_fused_elsewhere(name.removeprefix(OURS), family):
            unjoinable[name] = factors
    if not unjoinable:
        return _JoinableTensors(tensors, "")
    if rank is None:
        raise OptionError(
            f"{lora.path} is a {in_series(PRODUCT_KIND_NAMES)} for queries, keys and values "
            f"({next(iter(unjoinable))}), which are one module in ComfyUI, and only plain "
            "LoRAs can be joined. Add --lokr_rank RANK, such as 64, to replace each by the best LoRA of "
            "that rank"
        )
    replaced = ungroup(unjoinable)
    plain = bake(replace(lora, tensors=replaced), family, Baking(rank, select_device(None)))
    unchanged = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    return _JoinableTensors({**unchanged, **plain.lora.tensors}, plain.loss_note)


def convert_z_image(options: JoiningConvertOptions) -> None:
    """Convert a Z-Image LoRA to ComfyUI's layout, or back; see `_convert_joined`."""
    _convert_joined(options, Z_IMAGE)


def convert_hunyuan_video_15(options: JoiningConvertOptions) -> None:
    """Convert a HunyuanVideo 1.5 LoRA to ComfyUI's layout, or back; see `_convert_joined`."""
    _convert_joined(options, HUNYUAN_VIDEO_15)


def _convert_joined(options: JoiningConvertOptions, family: FamilyNames) -> None:
    """Convert a LoRA to ComfyUI's layout, which fuses queries, keys and values, or back.

    A joined LoRA has the sum of the three ranks, and its alpha grows by the same factor, so the change stays
    the same. Metadata is kept; hashes are recomputed.

    Raises:
        CheckpointError: If the file is not a LoRA for this model.
        OptionError: If modules of another kind, such as LoKr, must be joined and --lokr_rank is missing.
    """
    source = options.src_path
    lora = read_lora(source, family=family.name)
    _find_family(lora, family.name)
    if not options.reverse:
        _reject_for_comfyui(source, lora.tensors)
    metadata = {key: value for key, value in lora.metadata.items() if key != LORA_FORMAT}
    # separate modules for queries, keys and values, as in our layout
    tensors: Mapping[str, Tensor] = add_missing_alphas(split_fused_layers(lora.tensors, family))
    if options.reverse:
        _save(options.dst_path, ConvertedLora(tensors, metadata), sources=[lora], family=family)
        return
    joinable = _replace_unjoinable(lora, tensors, options.lokr_rank, family)
    joined = rename_to_aliases(join_parts(joinable.tensors, family=family), family)
    _save(
        options.dst_path,
        ConvertedLora(joined, metadata),
        sources=[lora],
        family=family,
        loss_note=joinable.loss_note,
    )


def _reject_for_comfyui(source: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if ComfyUI cannot read this kind of adapter."""
    error = find_file_error(names)
    if error:
        raise CheckpointError(f"{source} {error}", source)


def convert_file(
    source: Path, output: Path, target: str, family: str | None = None, baking: Baking | None = None
) -> None:
    """Read a LoRA under any program's names, and write it under the names of `target`.

    Metadata is copied, with new hashes; the family is added if tensor names alone no longer reveal it. A
    warning lists modules that the target cannot express. LoRAs for parts of a fused module are joined. Only
    diffusers' format can store the LoRAs of both experts in one file.

    Args:
        source: File of the LoRA.
        output: File to write.
        target: "default" (ours), "other" (ComfyUI) or "diffusers".
        family: Family of the LoRA, if the user or a family's own script names it.
        baking: How to convert other kinds to plain LoRAs, or DoRA magnitudes, before writing.

    Raises:
        CheckpointError: If the file is not a LoRA, if no module can be converted, or if its model is
            ambiguous or not `family`.
        OptionError: If the output would replace the source.
    """
    reject_replacing("--output", output, checkpoint_paths(source))
    conversion = Conversion(target, family, baking)
    lora = read_lora(source, by_expert=True, with_texts=True, family=family)
    if not lora.loras_by_expert:  # a single LoRA, not one for each expert
        _convert_one(lora, output, conversion)
    elif baking is not None and baking.models:
        raise OptionError(
            f"--input {source} contains two LoRAs, one for each expert, but --dit is the model of only one.\n"
            "  Choose one with --expert high_noise or low_noise."
        )
    elif target == "diffusers":
        _convert_both_experts(lora.loras_by_expert, output, conversion)
    else:
        raise OptionError(
            f"--input {source} contains two LoRAs, one for each expert, which --target {target} cannot store "
            "in one file.\n  Add --output_high_noise FILE to write two files, or --expert high_noise or "
            "low_noise to write one."
        )


def _convert_one(lora: LoraFile, output: Path, conversion: Conversion) -> None:
    """Convert a LoRA to the names of another program, and write it."""
    family = _find_family(lora, conversion.family)
    prepared = _bake_or_convert_magnitudes(lora, family, conversion)
    result = convert_lora(prepared.lora, conversion.target, family)
    _save(output, result, sources=[prepared.lora], family=family, loss_note=prepared.loss_note)


def _convert_both_experts(
    lora_by_expert: Mapping[str, LoraFile], output: Path, conversion: Conversion
) -> None:
    """Write one file in diffusers' format with a LoRA for each expert."""
    if conversion.baking is None:
        _reject_for_two_experts(lora_by_expert.values())
    families = {expert: _find_family(lora, conversion.family) for expert, lora in lora_by_expert.items()}
    prepared: dict[str, Baked] = {}
    for expert, lora in lora_by_expert.items():
        prepared[expert] = _bake_or_convert_magnitudes(lora, families[expert], conversion)
    # expert -> prefix of its network in diffusers' pipeline, such as `transformer_2.`
    prefixes = {expert: prefix for prefix, expert in find_networks().items()}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    for expert, baked in prepared.items():
        converted = convert_lora(baked.lora, "diffusers", families[expert], prefixes[expert])
        tensors |= converted.tensors
        metadata[expert] = converted.metadata
    _save(
        output,
        ConvertedLora(tensors, _join_metadata(metadata)),
        sources=[baked.lora for baked in prepared.values()],
        family=next(iter(families.values())),
        loss_note="\n".join(baked.loss_note for baked in prepared.values() if baked.loss_note),
    )


def _reject_for_two_experts(loras: Iterable[LoraFile]) -> None:
    """Raise OptionError if a LoRA is of a kind that one file cannot contain for two experts."""
    for lora in loras:
        for kind, rules in diffusers.BY_KIND.items():
            if rules.two_experts_error and find_network_kind(lora.tensors, [kind]) is not None:
                raise OptionError(rules.two_experts_error)


def _join_metadata(metadata_by_expert: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Join the metadata of two experts' LoRAs; values that differ are stored as JSON under one extra key."""
    entries_by_expert = {
        expert: {
            key: value
            for key, value in metadata.items()
            if key != TRAINED_EXPERT and not key.startswith(STALE)
        }
        for expert, metadata in metadata_by_expert.items()
    }
    common: dict[str, str] = {}
    for key, value in next(iter(entries_by_expert.values())).items():
        if all(entries.get(key) == value for entries in entries_by_expert.values()):
            common[key] = value
    distinct: dict[str, dict[str, str]] = {}
    for expert, entries in entries_by_expert.items():
        distinct[expert] = {key: value for key, value in entries.items() if key not in common}
    if any(distinct.values()):
        common[PARTS_METADATA] = json.dumps(distinct, ensure_ascii=False, sort_keys=True)
    return common


def _bake_or_convert_magnitudes(lora: LoraFile, family: FamilyNames | None, conversion: Conversion) -> Baked:
    """Return the LoRA with plain factors (--bake), or with DoRA magnitudes for the norms the target expects.

    Args:
        lora: The LoRA file.
        family: Family of the LoRA; None if unknown.
        conversion: How to convert.
    """
    baking = conversion.baking
    if baking is not None and baking.rank is not None:
        return bake(lora, family, baking)
    # FramePack's own layout is diffusers', so ComfyUI's kind of norms does not apply to it
    has_diffusers_layout = (
        family is not None and family.is_as_in_diffusers and family.path_prefix == IN_DIFFUSERS
    )
    is_for_comfyui = conversion.target == "other" and not has_diffusers_layout
    if MAGNITUDES:  # "": no kind has magnitudes
        lora = convert_to_norms(
            lora, family, baking=baking, are_frozen=is_for_comfyui, target=conversion.target
        )
    return Baked(lora, "")


class ConvertedLora(NamedTuple):
    """The tensors of a LoRA under another program's names, and their metadata."""

    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]


def convert_lora(
    lora: LoraFile, target: str, family: FamilyNames | None, start: str = IN_DIFFUSERS
) -> ConvertedLora:
    """Convert a LoRA to another program's names; warn of modules that cannot be converted.

    Args:
        lora: The LoRA file.
        target: "default" (ours), "other" (ComfyUI) or "diffusers".
        family: Family of the LoRA.
        start: Prefix of the names in diffusers' format.

    Raises:
        CheckpointError: If no module can be converted.
    """
    native = lora.tensors if family is None else convert_to_our_layout(lora.tensors, family)
    dit_part = convert_to_dialect(native, family, target, start)
    text_tensors: Mapping[str, Tensor] = add_missing_alphas(lora.text_tensors)
    left_out_texts: Mapping[str, str] = {}
    if target == "diffusers":
        text_tensors, left_out_texts = texts_to_diffusers(lora.text_tensors)
    elif target == "other":
        text_tensors = texts_to_comfyui(lora.text_tensors, family)
    advice = _advise_on_left_out(native, dit_part.left_out)
    left_out = {**dit_part.left_out, **left_out_texts}
    if left_out and not dit_part.tensors and not text_tensors:
        reasons = [f"{module} ({reason})" for module, reason in left_out.items()]
        raise CheckpointError(f"{lora.path} cannot be converted: {list_some(reasons, 3)}.{advice}", lora.path)
    _warn_of_left_out_modules(lora.path, dit_part.left_out, advice)
    _warn_of_left_out_modules(lora.path, left_out_texts)
    # The metadata for a LoRA after its conversion to another program's names
    # the converted tensors include all alphas
    metadata = without_alphas(lora.metadata)
    if LORA_FORMAT in metadata:
        metadata[LORA_FORMAT] = next(name for name, dialect in TARGETS.items() if dialect == target)
    if family is not None and module_names.read_family(lora.metadata) is None:
        families = lora.families()
        if len(families) < 2 or not module_names.have_same_names(families):
            # the names alone may no longer show the family
            metadata[TRAINED_ON] = family.written_base_model or family.name
    return ConvertedLora({**dit_part.tensors, **text_tensors}, metadata)


def _advise_on_left_out(native: Mapping[str, Tensor], left_out: Collection[str]) -> str:
    """Return how to convert modules that the other format cannot express; "" if they cannot be converted."""
    modules = group_by_module(native)
    if any(read_delta(modules[name]).rotation is not None for name in left_out):
        return "\n  --bake RANK --dit MODEL makes plain LoRAs of them, with some loss."
    if any(NON_LORA_FACTORS & modules[name].keys() for name in left_out):
        return "\n  --bake RANK makes plain LoRAs of them."
    return ""


def _warn_of_left_out_modules(path: Path, left_out: Mapping[str, str], advice: str = "") -> None:
    """Warn which modules are left out of the converted file, and why."""
    if left_out:
        reasons = [f"{module} ({reason})" for module, reason in left_out.items()]
        logger.warning(f"{path}: {len(reasons)} modules are left out: {list_some(reasons)}{advice}")


def _find_family(lora: LoraFile, name: str | None) -> FamilyNames | None:
    """Return the family of a LoRA by its module names; None if no family has them."""
    likely_families = lora.families()  # by the names and sizes of modules
    likely_names = " or ".join(family.name for family in likely_families) or "no known model"
    if name is None:
        if not likely_families:
            return None
        # the result is the same for all families with these module names, so take the first
        if module_names.have_same_names(likely_families):
            return likely_families[0]
        raise CheckpointError(
            f"{lora.path} can be for {likely_names}: all of them have layers of these names and sizes.\n"
            f"  Say which one it was trained for, such as --family {likely_families[0].name}.",
            lora.path,
        )
    named_families = lora.families(name)
    evidence = _find_evidence_against(name, lora, named_families, likely_families)
    if evidence:
        raise CheckpointError(
            f"{lora.path} is a LoRA for {likely_names} according to its {evidence}, not for {name}.\n"
            "  Convert it with convert_lora.py without --family, which knows all models.",
            lora.path,
        )
    return named_families[0]


def _find_evidence_against(
    name: str, lora: LoraFile, named_families: Sequence[FamilyNames], likely: Sequence[FamilyNames]
) -> str:
    """Return what shows that a file is not for the named family: "names", "metadata" or "sizes"; else ""."""
    if [family.name for family in named_families] != [name]:
        return "names"
    trained_family = module_names.read_family(lora.metadata)
    if trained_family is not None and trained_family.name != name:
        return "metadata"
    family = named_families[0]
    # with different sizes, fused rows would be cut in the wrong places
    if family not in likely and not can_be_for(family, lora.modules()):
        return "sizes"
    return ""


def _save(
    output: Path,
    result: ConvertedLora,
    sources: list[LoraFile],
    family: FamilyNames | None,
    loss_note: str = "",
) -> None:
    """Write a converted LoRA, and show a summary."""
    save_tensors(output, result.tensors, add_hashes(result.tensors, result.metadata))
    rows = [
        ("from", "\n".join(f"{lora.path}, {dialect_in_words(lora.dialect)}" for lora in sources)),
        ("model", "not known" if family is None else family.name),
        ("to", f"{output} ({format_size(output.stat().st_size)})"),
        ("tensors", f"{len(result.tensors)} written"),
        ("made plain", loss_note),
    ]
    rank_rule = read_rank_rule(result.metadata)  # of a T-LoRA: its ranks are masked by noise level
    if rank_rule is not None:
        rows.append((rank_rule.kind.name, NOTES.get(rank_rule.kind, "")))
    show_box("The LoRA is converted", rows)
