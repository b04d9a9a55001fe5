"""Read LoRA files in the key formats of all programs; warn of modules that a model lacks."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from checkpoints.opening import open_checkpoint, reject_quantized
from modules.console import format_count, list_some, pluralize
from modules.errors import CheckpointError, OptionError
from networks import key_formats
from networks.alphas import read_alphas, restore_folded_alphas
from networks.block_strengths import scale_blocks
from networks.delta import Delta, read_deltas
from networks.formats import diffusers, kohya
from networks.formats.comfyui import FROZEN_NORMS, NORMS_FORM, has_unstated_norms
from networks.fused_loras import correct_split_alphas, stack_rows
from networks.key_formats import NativeTensors
from networks.kinds import KINDS
from networks.kinds.composing import MAGNITUDE_KIND_NAME, list_additive
from networks.kinds.factors import Factors
from networks.metadata import (
    find_lora_expert,
    in_words,
    is_damaged,
    layout_hash,
    select_expert_metadata,
)
from networks.module_factors import (
    SET_WEIGHT,
    drop_replaced,
    drop_unused_alphas,
    get_lora_rank,
    group_by_module,
    ungroup,
)
from networks.module_names import (
    describe_text_module,
    have_same_names,
    module_path,
    read_family,
    related_modules,
)
from networks.names.layouts import (
    FOLDED,
    FOR_BOTH,
    LAYOUT_KEY,
    OURS,
    TRAINED_FOR,
    TRAINED_ON,
    DepthVariants,
    FamilyNames,
)
from networks.patterns import describe_unfit, in_any_spelling
from networks.rank_masks import read_rank_rule
from networks.tensor_names import dialect_in_words
from networks.unused_tensors import (
    explain_absent_module,
    explain_absent_text_module,
    explain_unused_tensor,
    group_by_reason,
    is_projection,
    without_numbers,
)
from networks.use_options import ADDED_PATTERN, LoraPatternOptions
from protocols.bundled_embeddings import BUNDLE, BundledWords, find_words, without_words

logger = getLogger(__name__)
# metadata keys that may reveal which model or program a LoRA is for. The patterns of
# `FamilyNames.unsupported_loras` are searched in their values, joined in this order
_ORIGIN_KEYS = (
    "ss_network_module",
    TRAINED_ON,
    "modelspec.architecture",
    "modelspec.title",
    "name",
    "software",
    "model_version",
)
# matches a tensor name of every kind of adapter, supported or not
_ADAPTER_NAME = re.compile(
    "|".join(
        ["lora|vera|ia3|alpha|magnitude|diff(_[bm])?$|set_weight$|norm$"]
        + [kind.word for kind in KINDS if kind.parts]
    )
)
MAX_UNUSED = 0.1  # fraction of a file's tensors; if more are unused, a second warning states the consequence


@dataclass(frozen=True)
class LoraFile:
    """An adapter (LoRA, LoHa, ...) under our tensor names, on the CPU, in the file's dtype.

    Names look like `lora_unet_blocks_0_self_attn_q.lora_down.weight`. If a file contains one LoRA for each
    expert of a model, `tensors` is empty, and `for_expert` returns one of `loras_by_expert`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    dialect: str
    loras_by_expert: Mapping[str, "LoraFile"] = field(default_factory=dict)  # by expert
    # tensors for text encoders: `lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight`
    text_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    unknown_names: str = (
        ""  # for messages: what is unknown about the tensor names; "" if a known model has them
    )
    # prefix of the text encoder that `tensors` change, after they were renamed to `lora_unet_`; "" if they
    # change the transformer
    encoder: str = ""
    is_family_by_names: bool = False  # the family was inferred from tensor names, not read from metadata
    trusted_family: FamilyNames | None = None  # family of a file written by us; None for other programs
    changes_other_networks: bool = False  # if `encoder` is set: whether the file changes other networks too
    embeddings: BundledWords = field(default_factory=dict)  # trained words (embeddings) bundled for prompts

    @property
    def expert(self) -> str | None:
        """Return the expert that the LoRA was trained for, according to its metadata or file name.

        Returns:
            FOR_BOTH for a LoRA for both experts; None if unknown or if the file has a LoRA for each expert.
        """
        return None if self.loras_by_expert else find_lora_expert(self.metadata, self.path)

    @property
    def evidence(self) -> str:
        """Return where the family was found, for messages: "its metadata" or "its names"."""
        return "its names" if self.is_family_by_names else "its metadata"

    def may_lack(self, names: Iterable[str]) -> bool:
        """Return whether a network may lack all of these modules without an error.

        True for projections of a text encoder, which some checkpoints lack, if the file also changes other
        networks.

        Args:
            names: Names of all modules that the file changes in the network.
        """
        return bool(self.encoder) and self.changes_other_networks and is_projection(names)

    @property
    def has_frozen_norms(self) -> bool:
        """Return whether DoRA's row magnitudes refer to the norms of the frozen weight, as in ComfyUI."""
        return self.metadata.get(NORMS_FORM) == FROZEN_NORMS

    def for_expert(self, expert: str | None) -> "LoraFile":
        """Return the LoRA for an expert if the file has one for each expert, otherwise the file itself.

        Args:
            expert: Name of the expert; "" or None if the model has no experts or the expert is unknown.

        Raises:
            CheckpointError: If the file has LoRAs for experts, but none for this one.
        """
        if not self.loras_by_expert:
            return self
        if not expert or expert not in self.loras_by_expert:
            raise _make_several_error(self.path)
        return self.loras_by_expert[expert]

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Return the factors of each module: `{"lora_unet_blocks_0_self_attn_q": {"lora_down.weight": ...}}`.

        Raises:
            CheckpointError: If the file has a LoRA for each expert and no expert was chosen.
        """
        if self.loras_by_expert:
            raise _make_several_error(self.path)
        return group_by_module(self.tensors)

    def families(self, hint: str | None = None) -> list[FamilyNames]:
        """Return the families that the file may be for.

        There are several if names, sizes, block indices and metadata do not decide.

        Args:
            hint: Family to prefer if several are possible; None for the family in the metadata.
        """
        if hint is None and self.trusted_family is not None:
            return [self.trusted_family]
        # a file with a LoRA for each expert has no tensors of its own: the first LoRA shows the family
        lora = next(iter(self.loras_by_expert.values()), self)
        trained_family = read_family(lora.metadata)
        if hint is None and trained_family is not None:
            hint = trained_family.name
        families = key_formats.find_lora_families(lora.modules(), hint)
        # names of no known family: trust the metadata
        if not families and trained_family is not None:
            return [trained_family]
        return families

    @property
    def depth_variants(self) -> DepthVariants | None:
        """Return how deeper variants of the LoRA's base model repeat blocks.

        None if the model is unknown or has no deeper variants.
        """
        if self.trusted_family is not None:
            return self.trusted_family.depth_variants
        families = [] if self.loras_by_expert else self.families()
        return next((family.depth_variants for family in families if family.depth_variants is not None), None)

    def family(self) -> FamilyNames | None:
        """Return the family that the file was trained for; None if unknown or ambiguous."""
        families = self.families()
        return families[0] if families and have_same_names(families) else None


def _make_several_error(path: Path) -> CheckpointError:
    """Return the error for a file with a LoRA for each expert where a single LoRA is required."""
    return CheckpointError(
        f"{path} contains two LoRAs, one for the high-noise and one for the low-noise expert of a model.\n"
        "  Take them apart with convert_lora.py --input FILE --output LOW --output_high_noise HIGH --target "
        "default and pass one; merge_lora.py can choose one with --expert.",
        path,
    )


def read_lora(
    path: Path,
    by_expert: bool = False,
    with_texts: bool = False,
    family: str | None = None,
    with_embeddings: bool = False,
) -> LoraFile:
    """Read a LoRA file (or a PEFT folder) with any program's names; warn of keys that cannot be used.

    Args:
        path: The file or folder.
        by_expert: Whether to accept a file that contains a LoRA for each expert; the result then has
            `loras_by_expert`.
        with_texts: Whether to read changes of text encoders too.
        family: Family named by the user; None if none was named.
        with_embeddings: Whether to read trained words (embeddings) too.

    Raises:
        CheckpointError: If the file is missing, damaged, not a LoRA, or of an unsupported kind.
    """
    stored = _read_stored_lora(path)
    embeddings: BundledWords = {}
    if with_embeddings and any(name.startswith(BUNDLE) for name in stored.tensors):
        embeddings = find_words(stored.tensors)
        stored = stored._replace(tensors=without_words(stored.tensors))
    # a file that we wrote and that has only our names: no other program's names are tried
    trained_family = read_family(stored.metadata) if stored.is_written_here else None
    if trained_family is not None and family in (None, trained_family.name):
        native = key_formats.read_own_names(stored.tensors, trained_family)
        if native is not None:
            lora = _build_lora(stored, native, expert=None)
            return replace(lora, embeddings=embeddings, trusted_family=trained_family)
    lora = _recognize_loras(stored, by_expert, with_texts, family)
    return _add_embeddings(lora, embeddings) if embeddings else lora


class _StoredLora(NamedTuple):
    """A LoRA file, or one expert's LoRA in it, with the names and metadata that the file has."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    is_written_here: bool  # whether we wrote the file, and no other tool has changed it


def _read_stored_lora(path: Path) -> _StoredLora:
    """Read a LoRA file as it is stored. Raises CheckpointError for other files; see `read_lora`."""
    with open_checkpoint(path) as checkpoint:
        # the hash of names, dtypes and shapes differs if another tool has changed our file
        is_written_here = checkpoint.metadata.get(LAYOUT_KEY) == layout_hash(checkpoint.tensors)
        unsupported = None if is_written_here else key_formats.other_kind(checkpoint.tensors)
        # complete models are rejected by their names, before gigabytes are read
        if unsupported is None and not any(_ADAPTER_NAME.search(name) for name in checkpoint.tensors):
            reject_quantized(checkpoint)
            raise _make_no_lora_error(path, checkpoint.tensors)
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = dict(checkpoint.metadata)
    if is_written_here and path.is_file() and is_damaged(path, metadata):
        raise CheckpointError(
            f"{path} is damaged: its data do not match the checksum stored with them. Copy it again.",
            path,
        )
    if unsupported is not None:
        raise _make_unsupported_error(path, *unsupported)
    read_rank_rule(metadata, path)  # raises if the file's rank masks (T-LoRA) cannot be read
    return _StoredLora(path, tensors, metadata, is_written_here)


def _recognize_loras(stored: _StoredLora, by_expert: bool, with_texts: bool, family: str | None) -> LoraFile:
    """Recognize the LoRA in a file of any program, or the LoRA for each expert; see `read_lora`."""
    names_by_expert = key_formats.split_names(stored.tensors)
    if len(names_by_expert) > 1 and not by_expert:
        raise _make_several_error(stored.path)
    loras: dict[str | None, LoraFile] = {}
    for expert, names in names_by_expert.items():
        expert_tensors = {name: stored.tensors[name] for name in names}
        loras[expert] = _recognize_lora(
            stored._replace(tensors=expert_tensors), expert, with_texts=with_texts, family=family
        )
    if len(loras) == 1:
        return next(iter(loras.values()))
    dialects = sorted({lora.dialect for lora in loras.values()})
    loras_by_expert = {expert: lora for expert, lora in loras.items() if expert is not None}
    return LoraFile(
        stored.path, {}, stored.metadata, dialect=" + ".join(dialects), loras_by_expert=loras_by_expert
    )


def _add_embeddings(lora: LoraFile, embeddings: BundledWords) -> LoraFile:
    """Return a LoRA, or the LoRA of each expert, together with the trained words in its file."""
    if not lora.loras_by_expert:
        return replace(lora, embeddings=embeddings)
    loras_by_expert: dict[str, LoraFile] = {}
    for expert, lora_of_expert in lora.loras_by_expert.items():
        loras_by_expert[expert] = replace(lora_of_expert, embeddings=embeddings)
    return replace(lora, loras_by_expert=loras_by_expert)


def _make_unsupported_error(path: Path, kind: str, key: str) -> CheckpointError:
    """Return the error for a file of an unsupported network kind, which the tensor name `key` shows."""
    read_kinds: list[str] = []
    for supported in KINDS:
        form = kohya.BY_KIND[supported].read_form if supported in kohya.BY_KIND else ""
        if supported.parts:
            read_kinds.append(f"{supported.name} ({form})" if form else supported.name)
    return CheckpointError(
        f"{path} is a network of the kind {kind}, which is not supported: it has {key}.\n"
        f"  Supported are {', '.join(read_kinds)} and whole differences of weights. Pass such a file.",
        path,
    )


def _recognize_lora(
    stored: _StoredLora, expert: str | None, with_texts: bool, family: str | None
) -> LoraFile:
    """Rename the tensors of a file, or of one expert in it, from any program's names to ours."""
    if expert is not None:
        stored = stored._replace(metadata=_read_expert_metadata(stored.path, stored.metadata, expert))
    trained_family = read_family(stored.metadata)
    hint = family or (None if trained_family is None else trained_family.name)
    native = key_formats.to_native(stored.tensors, hint, with_texts)
    stored = stored._replace(metadata=_add_recognized_facts(stored, native, trained_family))
    # Raise CheckpointError if a file is not a LoRA, or has unknown modules or a layer under two names
    if not native.tensors and not native.text_tensors:
        raise _make_no_lora_error(stored.path, stored.tensors)
    if native.family is not None and native.family.rejects_unknown_names:
        # Raise CheckpointError if a file has our names for modules that the family does not have
        modules = dict.fromkeys(name.partition(".")[0] for name in stored.tensors if name.startswith(OURS))
        unknown = [
            module for module in modules if module_path(module.removeprefix(OURS), native.family) is None
        ]
        if unknown:
            raise CheckpointError(
                f"{stored.path} cannot be used: {native.family.architecture} has no module called "
                f"{list_some(unknown, 2)}.\n  "
                "Pass a LoRA that was trained for this model, or remove the tensors of these names from the "
                "file.",
                stored.path,
            )
    # Raise CheckpointError if a LoRA file changes the same layer under two names
    clash = native.conflicting_keys or _named_twice(native)
    if clash:
        first, second = clash
        raise CheckpointError(
            f"{stored.path} changes one layer under two names: {first} and {second}.\n"
            "  They come from two programs, or are for two networks. Remove the tensors of one of them from "
            "the file.",
            stored.path,
        )
    if native.family is not None and native.family.rows_by_head is not None:
        # some programs order the rows of fused weights by head
        tensors = stack_rows(stored.path, native.tensors, native.family.rows_by_head, stored.tensors)
        native = replace(native, tensors=tensors)
    if native.unnamed_text_keys or native.duplicate_keys or native.unknown_keys:
        _warn_of_unused_keys(stored.path, native, trained_family or native.family, len(stored.tensors))
    lora = _build_lora(stored, native, expert)
    is_family_by_names = trained_family is None and native.family_name is not None
    return replace(lora, is_family_by_names=is_family_by_names)


def _add_recognized_facts(
    stored: _StoredLora, native: NativeTensors, trained_family: FamilyNames | None
) -> Mapping[str, str]:
    """Return the metadata plus what the tensors reveal: the family, and the form of DoRA magnitudes."""
    # The family is stored under `TRAINED_ON`; that magnitudes refer to frozen norms, as in ComfyUI, is stored
    # under `NORMS_FORM`.
    metadata = stored.metadata
    if trained_family is None and native.family_name is not None:
        metadata = {**metadata, TRAINED_ON: native.family_name}
    is_in_comfyui_names = native.dialect == "other"
    if is_in_comfyui_names and has_unstated_norms(native.tensors, metadata):
        metadata = {**metadata, NORMS_FORM: FROZEN_NORMS}
        logger.info(
            f"{stored.path}: its {MAGNITUDE_KIND_NAME} magnitudes are in ComfyUI's form, as its program "
            "writes them"
        )
    return metadata


def _build_lora(stored: _StoredLora, native: NativeTensors, expert: str | None) -> LoraFile:
    """Build a `LoraFile` from a file or one expert's part of it."""
    # Add missing alphas, reject invalid factors.
    path = stored.path
    metadata = {key: value for key, value in stored.metadata.items() if key != FOLDED}
    if not stored.is_written_here:  # other programs also write tensors without effect
        native = _drop_tensors_without_effect(path, native)
    elif FOLDED in stored.metadata:  # alpha / rank is in the factors: restore the alphas
        native = replace(
            native,
            tensors=restore_folded_alphas(native.tensors, stored.metadata),
            text_tensors=restore_folded_alphas(native.text_tensors, stored.metadata),
        )
    modules = group_by_module(native.tensors) | group_by_module(native.text_tensors)
    # Raise CheckpointError for factors that define no change, or that belong to an unsupported kind
    for module, delta in read_deltas(modules).items():
        reason = delta.find_error()
        if reason is not None:
            raise _make_faulty_error(path, module, delta, reason, native.unknown_keys)
    for kind, rules in diffusers.BY_KIND.items():
        if rules.check_file is None:
            continue
        if any(not factors.keys().isdisjoint(kind.marks) for factors in modules.values()):
            rules.check_file(path)
    alphas_clause = ""
    if any("alpha" not in factors and get_lora_rank(factors) is not None for factors in modules.values()):
        alphas = read_alphas(
            path, metadata, native=native, expert=expert, is_written_here=stored.is_written_here
        )
        native = _add_alphas(native, alphas.tensors)
        alphas_clause = alphas.description
    logger.info(f"{path}: {_describe_lora(native, metadata, alphas_clause, expert)}")
    tensors = native.tensors
    # sd-scripts with the argument split_qkv saves the alpha of a single part for joined factors
    if '"split_qkv": "true"' in metadata.get("ss_network_args", "").lower():
        tensors = correct_split_alphas(path, tensors, metadata)
    return LoraFile(
        path,
        tensors,
        metadata,
        dialect=native.dialect,
        text_tensors=native.text_tensors,
        unknown_names=native.unknown_names,
    )


def _drop_tensors_without_effect(path: Path, native: NativeTensors) -> NativeTensors:
    """Drop unused alphas, and (with a warning) changes of weights that the file itself replaces."""
    tensors, replaced = drop_replaced(drop_unused_alphas(native.tensors))
    text_tensors, replaced_in_texts = drop_replaced(drop_unused_alphas(native.text_tensors))
    names = [*replaced, *replaced_in_texts]
    if names:
        logger.warning(
            f"{path}: {SET_WEIGHT} replaces the other changes of "
            f"{format_count(len(names), 'weight')}, as in ComfyUI: {list_some(names, 2)}"
        )
    return replace(native, tensors=tensors, text_tensors=text_tensors)


def _add_alphas(native: NativeTensors, alphas: Mapping[str, Tensor]) -> NativeTensors:
    """Return tensors under our names plus alphas that the file does not store as tensors."""
    # names without the transformer's prefix belong to text encoders
    dit_alphas = {name: alpha for name, alpha in alphas.items() if name.startswith(OURS)}
    text_alphas = {name: alpha for name, alpha in alphas.items() if name not in dit_alphas}
    return replace(
        native,
        tensors={**native.tensors, **dit_alphas},
        text_tensors={**native.text_tensors, **text_alphas},
    )


def _read_expert_metadata(path: Path, metadata: Mapping[str, str], expert: str) -> dict[str, str]:
    """Return the metadata of one expert's LoRA in a file. Raises CheckpointError if it is invalid."""
    try:
        return select_expert_metadata(metadata, expert)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the metadata of its LoRAs for experts cannot be read: {error}. Copy it again.", path
        ) from error


def _describe_lora(
    native: NativeTensors, metadata: Mapping[str, str], alphas: str, expert: str | None
) -> str:
    """Describe a LoRA that was read from a file, for the log."""
    modules = format_count(len(group_by_module(native.tensors)), "module")
    num_text_modules = len(group_by_module(native.text_tensors))
    if num_text_modules:
        modules = f"{modules} and {num_text_modules} of text encoders"
    clauses = [modules, dialect_in_words(native.dialect)]
    if alphas:
        clauses.append(alphas)
    if TRAINED_FOR in metadata:
        clauses.append(f"trained for {metadata[TRAINED_FOR]}")
    if expert is not None:
        clauses.append(f"for the {in_words(expert)}")
    return ", ".join(clauses)


def _make_faulty_error(
    path: Path, module: str, delta: Delta, reason: str, unknown: Sequence[str]
) -> CheckpointError:
    """Return the error for a module whose factors define no change; `unknown` are keys that are not used."""
    # only the alpha was read: the module's factors are among the unknown keys
    if unknown and not delta.factors.keys() - {"alpha"}:
        return CheckpointError(
            f"{path} cannot be used: its factors have names that are not known, such as "
            f"{list_some(unknown, 2)}.\n  Pass a {list_additive()} as its program wrote it.",
            path,
        )
    return CheckpointError(
        f"{path} cannot be used: {module}: {reason}. Download or copy it again, or pass another LoRA.",
        path,
    )


def _named_twice(native: key_formats.NativeTensors) -> tuple[str, str] | None:
    """Return two paths in a file that clash because one is a fused weight and the other a part of it."""
    pairs: list[tuple[str, str]] = []
    for family in native.families:
        pair = next(_find_pairs(family, native.paths_in_file), None)
        if pair is None:
            return None
        pairs.append(pair)
    return pairs[0] if pairs else None


def _find_pairs(family: FamilyNames, paths: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of paths in a file: a fused weight of the family, and a part of the same weight."""
    for name, path in paths.items():
        for relative in related_modules(name.removeprefix(OURS), family):
            if not relative.is_part:
                continue
            # a part of one layout may have another name in a third
            renamed = (part.name for part in related_modules(relative.name, family) if part.is_part)
            for part_name in (relative.name, *renamed):
                part_path = paths.get(OURS + part_name)
                if part_path is not None:
                    yield path, part_path


def _warn_of_unused_keys(path: Path, native: NativeTensors, family: FamilyNames | None, total: int) -> None:
    """Warn of keys in a file that are not used."""
    ignored = (
        (native.unnamed_text_keys, "tensors of a text encoder are ignored"),
        (list(native.duplicate_keys), "tensors of parts that occur under two names are ignored"),
    )
    for keys, description in ignored:
        if keys:
            logger.warning(f"{path}: {pluralize(len(keys), description)}: {list_some(keys)}")
    names_by_reason = group_by_reason(native.unknown_keys, partial(explain_unused_tensor, family))
    for reason, names in names_by_reason.items():
        warn_about_unused_parts(
            path,
            names,
            total=total,
            statement=f"tensors {reason.description}",
            consequence=reason.consequence,
        )


def _make_no_lora_error(path: Path, names: Iterable[str]) -> CheckpointError:
    """Return the error for a file that is not a LoRA; `names` are its tensor names."""
    return CheckpointError(
        f"{path} is not a LoRA for a video or image model: it has tensors such as "
        f"{list_some(sorted(names), 3)}. Pass a LoRA file.",
        path,
    )


def reject_unknown(lora: LoraFile, option: str = "") -> None:
    """Raise CheckpointError if no known model has modules with a LoRA's names.

    Call it if the model has none of the LoRA's modules.

    Args:
        lora: The LoRA file.
        option: Option that sets the path, for messages.
    """
    if lora.unknown_names:
        file = f"{option} {lora.path}" if option else str(lora.path)
        raise CheckpointError(
            f"{file} cannot be used: its names {lora.unknown_names}, which is not known, and no known model "
            "has modules of these names.\n"
            "  Pass the file as its program wrote it, or remove that from its names.",
            lora.path,
        )


def warn_about_unused_parts(
    path: Path, unused: Sequence[str], total: int, statement: str, consequence: str = ""
) -> None:
    """Warn of unused names; if their fraction exceeds MAX_UNUSED, a second line states the consequence.

    Args:
        path: LoRA file.
        unused: Unused names.
        total: Number of all names.
        statement: Plural noun and verb for the message, as in "4 of 24 {statement}: a, b, c".
        consequence: Sentence for the second line; "" for no second line.
    """
    logger.warning(f"{path}: {len(unused)} of {total} {statement}: {list_some(unused)}")
    if consequence and len(unused) > MAX_UNUSED * total:
        logger.warning(f"{path} IS USED ONLY IN PART: {consequence}")


@dataclass(frozen=True)
class WeightedLora:
    """One LoRA file with its multiplier and two regular expressions that include or exclude tensors by name.

    A pattern may match the name in the LoRA file or the name in the model (they differ for FramePack and
    HunyuanVideo), and may select a part of a fused module.
    """

    lora: LoraFile
    multiplier: float = 1.0
    include: str | None = None
    exclude: str | None = None

    def for_expert(self, expert: str | None) -> "WeightedLora":
        """Return a copy with only the LoRA for an expert; warn if it was trained for another expert."""
        lora = self.lora.for_expert(expert)
        warn_about_other_expert(lora, expert)
        return replace(self, lora=lora)

    def selects(self, factors: Iterable[str], *names: str) -> bool:
        """Return whether the include and exclude patterns select any factor of a module.

        Args:
            factors: Names of the factors.
            names: Names of the module in the file and in the model.
        """
        for factor in factors:
            tensors = [f"{name}.{factor}" for name in names]
            if self.include is not None and not any(re.search(self.include, name) for name in tensors):
                continue
            if self.exclude is None or not any(re.search(self.exclude, name) for name in tensors):
                return True
        return False


def read_weighted_loras(
    files: Collection[tuple[Path, float]],
    patterns: LoraPatternOptions | None = None,
    with_texts: bool = False,
    with_embeddings: bool = False,
) -> list[WeightedLora]:
    """Read LoRA files; return each with its multiplier and its include and exclude patterns.

    Args:
        files: Files with their multipliers.
        patterns: One include and one exclude pattern per file in the same order; None for no patterns.
        with_texts: Whether to read changes of text encoders.
        with_embeddings: Whether to read the trained words (embeddings) in the files.
    """
    include_patterns: Sequence[str] = ()
    exclude_patterns: Sequence[str] = ()
    block_strengths: Sequence[str] = ()
    if patterns is not None:
        include_patterns = patterns.include_patterns or ()
        exclude_patterns = patterns.exclude_patterns or ()
        block_strengths = patterns.lora_blocks or ()
    for option, values, what in (
        ("include_patterns", include_patterns, "patterns"),
        ("exclude_patterns", exclude_patterns, "patterns"),
        ("lora_blocks", block_strengths, "texts"),
    ):
        if values and not files:
            raise OptionError(f"--{option} is about LoRA files, and none is given: pass --lora_weight FILE")
        if len(values) > len(files):
            raise OptionError(
                f"--{option} has {len(values)} {what} for {format_count(len(files), 'LoRA file')}: pass one "
                "per file, in the same order"
            )
        if values and len(values) < len(files):
            whole = ", ".join(path.name for path, _ in list(files)[len(values) :])
            logger.info("--%s is about the first of the LoRA files; used whole: %s", option, whole)
    weighted_loras = []
    # the last files may have no pattern or strengths: theirs are None
    for (path, multiplier), include, exclude, blocks in zip_longest(
        files, include_patterns, exclude_patterns, block_strengths
    ):
        lora = read_lora(path, by_expert=True, with_texts=with_texts, with_embeddings=with_embeddings)
        if blocks:
            lora = replace(
                lora,
                tensors=scale_blocks(lora.tensors, blocks, path) if lora.tensors else lora.tensors,
                loras_by_expert={
                    expert: replace(part, tensors=scale_blocks(part.tensors, blocks, path))
                    for expert, part in lora.loras_by_expert.items()
                },
            )
        weighted_lora = WeightedLora(lora, multiplier, include, exclude)
        if include or exclude:
            weighted_lora = _fit_separators(weighted_lora)
        weighted_loras.append(weighted_lora)
    return weighted_loras


def _fit_separators(weighted_lora: WeightedLora) -> WeightedLora:
    """Let patterns that match no name as typed match dots and underscores alike; see `fit_pattern`."""
    # All names that include and exclude patterns may match: the file's and other layouts'
    names: set[str] = set()
    for part in (weighted_lora.lora, *weighted_lora.lora.loras_by_expert.values()):
        for tensor in (*part.tensors, *part.text_tensors):
            module, _, factor = tensor.partition(".")
            names.add(f"{module}.{factor}")
            for relative in related_modules(module.removeprefix(OURS)):
                names.add(f"{OURS}{relative.name}.{factor}")
    path = str(weighted_lora.lora.path)
    return replace(
        weighted_lora,
        include=fit_pattern(weighted_lora.include, names, path),
        exclude=fit_pattern(weighted_lora.exclude, names, path),
    )


def fit_pattern(pattern: str | None, names: Collection[str], where: str) -> str | None:
    """Return the typed pattern, rewritten if names match it only with other separators (dots, underscores).

    Another option may have added an alternative: `typed|ADDED_PATTERN added`, or `ADDED_PATTERN added` if
    nothing was typed. The added pattern may match nothing, so only the typed pattern is rewritten.

    Args:
        pattern: The pattern; None if there is none.
        names: Names that the pattern is searched in.
        where: Path of the file, for the warning.
    """
    if not pattern:
        return pattern
    typed, has_added, added = pattern.partition(ADDED_PATTERN)
    if not has_added:
        return _fit_typed_pattern(typed, names, where)
    if not typed:
        return added
    return f"{_fit_typed_pattern(typed.removesuffix('|'), names, where)}|{added}"


def _fit_typed_pattern(typed: str, names: Collection[str], where: str) -> str:
    """Let dots and underscores match each other in a pattern without a match; warn if that fails too."""
    if any(re.search(typed, name) for name in names):
        return typed
    any_spelling = in_any_spelling(typed)
    if not any(re.search(any_spelling, name) for name in names):
        modules = (name.partition(".")[0] for name in names)
        logger.warning("%s: the pattern %s.", where, describe_unfit(typed, modules))
    return any_spelling


def warn_about_absent_modules(
    path: Path,
    absent: Sequence[str],
    total: int,
    statement: str,
    model: FamilyNames | None,
    modules: Iterable[str] = (),
    encoder: str = "",
) -> None:
    """Warn of LoRA changes to modules that a model lacks, once for each reason.

    Args:
        path: LoRA file.
        absent: Names of the absent modules or weights, `lora_unet_x` or `lora_unet_x.weight`.
        total: Number of all modules or weights that the LoRA changes.
        statement: Plural noun and verb for the message, such as "weights are not in this model".
        model: Family of the model; None if unknown.
        modules: Names of the model's modules, without our prefix.
        encoder: Prefix of the text encoder that contains them; "" for the transformer.
    """
    modules = list(modules)
    if encoder:
        names_in_file = [f"{encoder}_{name.removeprefix(OURS)}" for name in absent]
        for reason, names in group_by_reason(names_in_file, explain_absent_text_module).items():
            warn_about_unused_parts(path, names, total=total, statement=statement + reason.description)
        return
    has_text_modules = any(describe_text_module(module) for module in modules)
    names_without_numbers = {without_numbers(module) for module in modules}
    explain = partial(explain_absent_module, model, has_text_modules, names_without_numbers)
    names_by_reason = group_by_reason(absent, explain)
    for reason, names in names_by_reason.items():
        warn_about_unused_parts(
            path,
            names,
            total=total,
            statement=statement + reason.description,
            consequence=reason.consequence,
        )


def select_network_part(
    weighted_loras: Iterable[WeightedLora], selects_text_encoders: bool
) -> list[WeightedLora]:
    """Return the LoRAs reduced to the transformer's modules, or to modules loaded with the text encoders.

    A LoRA is left out if it has no modules on that side, or if its patterns select none of them. If the
    patterns select nothing on either side, the LoRA stays on the transformer's side, so that the merge
    reports it once.

    Args:
        weighted_loras: LoRA files with their patterns.
        selects_text_encoders: Whether to return the text encoders' side.
    """
    loras_on_side = []
    for weighted_lora in weighted_loras:
        family = weighted_lora.lora.trusted_family
        has_only_dit_modules = family is not None and not family.text_module_prefixes
        if not has_only_dit_modules:
            reduced = _reduce_to_network(weighted_lora, selects_text_encoders)
            if reduced is not None:
                loras_on_side.append(reduced)
        elif weighted_lora.lora.tensors and not selects_text_encoders:
            loras_on_side.append(weighted_lora)
    return loras_on_side


def _reduce_to_network(weighted_lora: WeightedLora, selects_text_encoders: bool) -> WeightedLora | None:
    """Return a LoRA with only one side's modules, or None; see `select_network_part`."""
    lora = weighted_lora.lora
    # the modules that are loaded with the text encoders, and the transformer's other modules
    text_modules: dict[str, Factors] = {}
    dit_modules: dict[str, Factors] = {}
    for name, factors in lora.modules().items():
        is_text_module = describe_text_module(name.removeprefix(OURS), lora.trusted_family) != ""
        (text_modules if is_text_module else dit_modules)[name] = factors
    if selects_text_encoders:
        modules = text_modules
        is_used = _keeps_any(weighted_lora, text_modules)
    else:
        modules = dit_modules
        # if the patterns select nothing at all, the merge into the transformer reports it
        is_for_report = bool(dit_modules) and not _keeps_any(weighted_lora, text_modules)
        is_used = is_for_report or _keeps_any(weighted_lora, dit_modules)
    if not is_used:
        return None
    has_both_sides = bool(text_modules) and bool(dit_modules)
    if not has_both_sides:
        return weighted_lora
    return replace(weighted_lora, lora=replace(weighted_lora.lora, tensors=ungroup(modules)))


def _keeps_any(weighted_lora: WeightedLora, modules: Mapping[str, Factors]) -> bool:
    """Return whether the LoRA's include and exclude patterns select any of these modules."""
    return any(weighted_lora.selects(factors, name) for name, factors in modules.items())


def warn_about_other_family(lora: LoraFile, model: FamilyNames | None, modules: Collection[str] = ()) -> None:
    """Warn if a LoRA's module names fit but it was trained for a different model family.

    Args:
        lora: The LoRA file.
        model: Family of the model; None if unknown.
        modules: Names of the model's modules, which show its release.

    Raises:
        CheckpointError: If the metadata shows that the LoRA needs an unsupported feature.
    """
    if model is None:
        return
    origin = " ".join(f"{key}={lora.metadata.get(key, '')}" for key in _ORIGIN_KEYS)
    # features of some LoRAs that are not supported
    for pattern, reason in model.unsupported_loras:
        if re.search(pattern, origin, re.IGNORECASE):
            raise CheckpointError(f"{lora.path}: {reason}", lora.path)
    _, parameter_of_newest = model.newest_release  # only the newest release has the parameter
    if model.release_pattern and parameter_of_newest in modules:
        # Log that a LoRA is for an older release, named in its metadata, and is used on the newest one
        newest_release, _ = model.newest_release
        match = re.search(model.release_pattern, origin, re.IGNORECASE)
        if match is not None and match[1] != newest_release:
            logger.info(
                f"{lora.path} was trained for {match[1]} according to its metadata, and is used on "
                f"{newest_release}: most of what it has learned carries over, but its effect may be weaker "
                "or stronger"
            )
    trained_family = read_family(lora.metadata)
    if trained_family is None or trained_family is model or trained_family.name in model.compatible_families:
        return
    logger.warning(
        f"{lora.path} was trained for {trained_family.name} according to {lora.evidence}, and is used on a "
        f"{model.name} model. Its module names match, but it has learned changes of other weights: expect "
        "little effect or poor results."
    )


def read_weighted_lora(path: Path, expert: str, multiplier: float) -> WeightedLora:
    """Read one expert's LoRA from a file; warn if the file was trained for another expert."""
    lora = read_lora(path, by_expert=True).for_expert(expert)
    warn_about_other_expert(lora, expert)
    return WeightedLora(lora, multiplier)


def warn_about_other_expert(lora: LoraFile, expert: str | None) -> None:
    """Warn if a LoRA was trained for a different expert than the one it is loaded into.

    Args:
        lora: The LoRA file.
        expert: Expert that the LoRA is loaded into; "" or None if the model has no experts or its expert
            is unknown.
    """
    if not expert or lora.expert in (None, FOR_BOTH, expert):
        return
    # without a path, `find_lora_expert` reads only the metadata
    evidence = "name" if find_lora_expert(lora.metadata, Path()) is None else "metadata"
    logger.warning(
        f"{lora.path} was trained for the {in_words(lora.expert)} according to its {evidence}, but is loaded "
        f"into the {in_words(expert)}: what it has learned is for other noise levels. Pass the file for the "
        f"{in_words(expert)} if it exists."
    )
