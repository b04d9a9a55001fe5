"""Read LoRA files of any dialect, with strength and patterns; warn of parts that a model lacks."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from pathlib import Path

from torch import Tensor

from modules.checkpoints.opening import open_checkpoint, refuse_quantised
from modules.console import count_of, count_words, list_some
from modules.errors import CheckpointError, OptionError
from networks import key_formats
from networks.alphas import read_alphas, unfold
from networks.deltas import Factors, drop_unused_alphas, find_fault, group_by_module, rank_of, ungroup
from networks.key_formats import NativeTensors
from networks.leftovers import kind_of_module, kind_of_tensor, sort_by_kind, without_numbers
from networks.metadata import (
    DORA_FORM,
    FROZEN_NORMS,
    LAYOUT_KEY,
    expert_of,
    in_words,
    is_damaged,
    is_of_frozen_norms,
    layout_hash,
    metadata_of,
)
from networks.module_names import have_same_names, on_text_side, read_family, relatives
from networks.names.layouts import FOLDED, FOR_BOTH, OURS, TRAINED_FOR, TRAINED_ON, FamilyNames
from networks.options import UNTYPED, LoraPatternOptions
from networks.parts import mend_split_alphas
from networks.patterns import describe_unfit, in_any_spelling

logger = getLogger(__name__)
# in a name of every kind of network beside a model, read here or not
# metadata that may name a LoRA's needs, in the order in which `FamilyNames.refused` reads them
_SAYING = (
    "ss_network_module",
    TRAINED_ON,
    "modelspec.architecture",
    "modelspec.title",
    "name",
    "software",
    "model_version",
)
_OF_NETWORKS = re.compile(r"lora|hada|lokr|oft|dora|vera|ia3|alpha|magnitude|diff(_[bm])?$|norm$")
A_FEW = 0.1  # up to this unused share of a file, a plain warning is enough


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, DoRA, LoHa or LoKr under our names, on the CPU, in the dtype of the file.

    Names are as `lora_unet_blocks_0_self_attn_q.lora_down.weight`. A file that holds a LoRA for each expert
    of a model has them as `parts`, and no tensors of its own: `for_expert` returns one of them.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    dialect: str
    parts: Mapping[str, "LoraFile"] = field(default_factory=dict)  # by expert
    # tensors for text encoders: `lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight`
    text_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    unknown_names: str = ""  # description of its names, if no known model has them

    @property
    def expert(self) -> str | None:
        """Return the expert it was trained for, by metadata or else name; FOR_BOTH; None if unknown."""
        return None if self.parts else expert_of(self.metadata, self.path)

    @property
    def has_frozen_norms(self) -> bool:
        """Return whether DoRA magnitudes by output refer to the norms of the frozen weights."""
        return self.metadata.get(DORA_FORM) == FROZEN_NORMS

    def for_expert(self, expert: str | None) -> "LoraFile":
        """Return the part for an expert if the file has parts, else the file itself.

        expert: empty or None if the model has no experts or its expert is unknown. Raises CheckpointError
        if the file has no part for it.
        """
        if not self.parts:
            return self
        if not expert or expert not in self.parts:
            raise _several(self.path)
        return self.parts[expert]

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Return the factors of each module: `{"lora_unet_blocks_0_self_attn_q": {"lora_down.weight": ...}}`.

        Raises CheckpointError if the file has parts and no part was chosen.
        """
        if self.parts:
            raise _several(self.path)
        return group_by_module(self.tensors)

    def families(self, hint: str | None = None) -> list[FamilyNames]:
        """Return the possible families, several if names, sizes, block numbers and metadata do not decide.
        hint: the family to prefer then; None: the one in the metadata.
        """
        one = next(iter(self.parts.values()), self)
        made = read_family(one.metadata)
        if hint is None and made is not None:
            hint = made.name
        return key_formats.families_of(one.modules(), hint) or ([] if made is None else [made])

    def family(self) -> FamilyNames | None:
        """Return the family it was trained for; None if unknown or if several are possible."""
        found = self.families()
        return found[0] if found and have_same_names(found) else None


def _several(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds two LoRAs, one for the high-noise and one for the low-noise expert of a model.\n"
        "  Take them apart with convert_lora.py --input FILE --output LOW --output_high_noise HIGH --target "
        "default and give one; merge_lora.py can choose one with --expert.",
        path,
    )


def read_lora(
    path: Path, by_expert: bool = False, with_texts: bool = False, family: str | None = None
) -> LoraFile:
    """Read a file (or a PEFT folder) and recognise its dialect. Keys that cannot be used are listed in a
    warning.

    with_texts: read its changes of text encoders too. by_expert: allow a file that holds a LoRA for each
    expert; the result has `parts` then. family: given by the user, else None. Raises CheckpointError if it is
    missing, damaged, not a LoRA, or of an unsupported kind.
    """
    with open_checkpoint(path) as checkpoint:
        kind = key_formats.other_kind(checkpoint.tensors)
        # whole models are recognised by names, before gigabytes are read
        if kind is None and not any(_OF_NETWORKS.search(name) for name in checkpoint.tensors):
            refuse_quantised(checkpoint)
            raise _no_lora(path, checkpoint.tensors)
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = dict(checkpoint.metadata)
    is_own = metadata.get(LAYOUT_KEY) == layout_hash(stored)
    if is_own and path.is_file() and is_damaged(path, metadata):
        raise CheckpointError(
            f"{path} is damaged: its data do not agree with the checksum written with them. Copy it again.",
            path,
        )
    if kind is not None:
        raise CheckpointError(
            f"{path} is a network of the kind {kind[0]}, which is not supported: it has {kind[1]}.\n"
            "  Supported are LoRA, DoRA, LoHa, LoKr and whole differences of weights. Give such a file.",
            path,
        )
    groups = key_formats.split_names(stored)
    if len(groups) > 1 and not by_expert:
        raise _several(path)
    parts = {
        expert: _read_part(
            path, {name: stored[name] for name in names}, metadata, expert, with_texts, is_own, family
        )
        for expert, names in groups.items()
    }
    if len(parts) == 1:
        return next(iter(parts.values()))
    dialects = sorted({part.dialect for part in parts.values()})
    named = {expert: part for expert, part in parts.items() if expert is not None}
    return LoraFile(path, {}, metadata, " + ".join(dialects), named)


def _read_part(
    path: Path,
    stored: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    expert: str | None,
    with_texts: bool,
    is_own: bool,
    family: str | None,
) -> LoraFile:
    """Rename the tensors of a file, or of one expert's part, to ours.

    expert: None if names in the file do not show it. is_own: the file was written by us. family: see
    `read_lora`.
    """
    if expert is not None:
        try:
            metadata = metadata_of(metadata, expert)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: what its metadata say of its parts cannot be read: {error}. Copy it again.", path
            ) from error
    made = read_family(metadata)
    native = key_formats.to_native(stored, family or (None if made is None else made.name), with_texts)
    if made is None and native.family_name is not None:
        metadata = {**metadata, TRAINED_ON: native.family_name}
    if native.dialect == "other" and is_of_frozen_norms(native.tensors, metadata):
        metadata = {**metadata, DORA_FORM: FROZEN_NORMS}
        logger.info(f"{path}: its DoRA magnitudes are in ComfyUI's form, as its writer has them there")
    if not native.tensors and not native.texts:
        raise _no_lora(path, stored)
    if twice := native.clash or _named_twice(native):
        remedy = "They are of two programs. Take the tensors of one of them out of the file."
        names = f"{twice[0]} and {twice[1]}"
        raise CheckpointError(f"{path} changes one layer under two names: {names}.\n  {remedy}", path)
    if native.text_encoder or native.repeated or native.unknown:
        _warn_of_unused(path, native, made or native.family, len(stored))
    tensors, texts = drop_unused_alphas(native.tensors), drop_unused_alphas(native.texts)
    if is_own:
        tensors, texts = unfold(tensors, metadata), unfold(texts, metadata)
    metadata = {key: value for key, value in metadata.items() if key != FOLDED}
    native = replace(native, tensors=tensors, texts=texts)
    modules, in_texts = group_by_module(native.tensors), group_by_module(native.texts)
    _refuse_faulty(path, modules | in_texts, native.unknown)
    found, said = dict[str, Tensor](), ""
    if any("alpha" not in one and rank_of(one) is not None for one in (modules | in_texts).values()):
        found, said = read_alphas(path, metadata, native, expert, is_own)
    beside = f" and {len(in_texts)} of text encoders" if in_texts else ""
    words = [
        f"{count_of(len(modules), 'module')}{beside}",
        key_formats.dialect_in_words(native.dialect),
        *([said] if said else []),
        *([f"trained for {metadata[TRAINED_FOR]}"] if TRAINED_FOR in metadata else []),
        *([f"for the {in_words(expert)}"] if expert is not None else []),
    ]
    logger.info(f"{path}: {', '.join(words)}")
    tensors = {**native.tensors, **{name: one for name, one in found.items() if name.startswith(OURS)}}
    if '"split_qkv": "true"' in metadata.get("ss_network_args", "").lower():
        tensors = mend_split_alphas(path, tensors, metadata)
    texts = {**native.texts, **{name: one for name, one in found.items() if name not in tensors}}
    return LoraFile(path, tensors, metadata, native.dialect, {}, texts, native.unknown_names)


def _refuse_faulty(path: Path, modules: Mapping[str, Factors], unknown: Sequence[str]) -> None:
    """Raise CheckpointError for factors that define no change. unknown: keys that are not read."""
    for module, factors in modules.items():
        reason = find_fault(factors)
        if reason is None:
            continue
        if unknown and not factors.keys() - {"alpha"}:
            raise CheckpointError(
                f"{path} cannot be used: its factors have names that are not known, such as "
                f"{list_some(unknown, 2)}.\n  Give a LoRA, LoHa or LoKr as its program wrote it.",
                path,
            )
        raise CheckpointError(
            f"{path} cannot be used: {module}: {reason}. Download or copy it again, or give another LoRA.",
            path,
        )


def _named_twice(native: key_formats.NativeTensors) -> tuple[str, str] | None:
    """Return two names in a file for one weight, or for a weight and a part of it; None if there are none."""
    if native.family is None:
        return None
    for name, path in native.paths.items():
        for other in relatives(name.removeprefix(OURS), native.family):
            if other.is_part and (found := native.paths.get(OURS + other.name)) is not None:
                return path, found
    return None


def _warn_of_unused(path: Path, native: NativeTensors, family: FamilyNames | None, whole: int) -> None:
    """Warn of keys of a file that are not read. whole: number of all keys."""
    rest = (
        (native.text_encoder, "tensors of a text encoder are ignored"),
        (list(native.repeated), "tensors of parts named once more are ignored"),
    )
    for keys, what in rest:
        if keys:
            logger.warning(f"{path}: {count_words(len(keys), what)}: {list_some(keys)}")
    for (words, loss), names in sort_by_kind(native.unknown, partial(kind_of_tensor, family)).items():
        warn_of_rest(path, names, whole, f"tensors {words}", loss)


def _no_lora(path: Path, names: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is no LoRA for a video or image model: it has tensors such as "
        f"{list_some(sorted(names), 3)}. Give a LoRA file.",
        path,
    )


def refuse_unknown(lora: LoraFile, option: str = "") -> None:
    """Raise CheckpointError if no known model has modules of a LoRA's names.

    Call if no module of it has found a place. option: the option with the file.
    """
    if lora.unknown_names:
        raise CheckpointError(
            f"{option} {lora.path} cannot be used: its names {lora.unknown_names}, which is not known, and "
            "no known model has modules of these names.\n"
            "  Give the file as its program wrote it, or take that off its names.".lstrip(),
            lora.path,
        )


def warn_of_rest(path: Path, rest: Sequence[str], whole: int, what: str, loss: str = "") -> None:
    """Warn of unused names, with a second, louder line if they are more than a few of `whole`.

    what: as in "4 of 24 {what}: a, b, c". loss: the consequence if many are unused; "": none.
    """
    logger.warning(f"{path}: {len(rest)} of {whole} {what}: {list_some(rest)}")
    if loss and len(rest) > A_FEW * whole:
        logger.warning(f"{path} IS USED ONLY IN PART: {loss}")


@dataclass(frozen=True)
class LoraUse:
    """One LoRA file and how it is used.

    Patterns are regular expressions searched in its tensor names (ours). If the model names a module
    otherwise, as FramePack does HunyuanVideo's, that name is searched too, so patterns may be written for
    either, and may choose a part of a fused module.
    """

    lora: LoraFile
    multiplier: float = 1.0
    include: str | None = None
    exclude: str | None = None

    def for_expert(self, expert: str | None) -> "LoraUse":
        """Return the use of an expert's part; warn if it is another's. Raises as `LoraFile.for_expert`."""
        lora = self.lora.for_expert(expert)
        warn_of_other_expert(lora, expert)
        return replace(self, lora=lora)

    def keeps(self, factors: Iterable[str], *names: str) -> bool:
        """Return whether the patterns keep any factor of a module. names: its names in the file and in the
        model.
        """
        for factor in factors:
            tensor = [f"{name}.{factor}" for name in names]
            included = self.include is None or any(re.search(self.include, name) for name in tensor)
            if included and not (
                self.exclude is not None and any(re.search(self.exclude, name) for name in tensor)
            ):
                return True
        return False


def lora_uses(
    files: Collection[tuple[Path, float]],
    patterns: LoraPatternOptions | None = None,
    with_texts: bool = False,
) -> list[LoraUse]:
    """Read LoRA files, given with their multipliers; return each with its patterns.

    with_texts: with their changes of text encoders.
    """
    both: list[list[str | None]] = []  # to include, to exclude: one per file
    for option in ("include_patterns", "exclude_patterns"):
        given = list(getattr(patterns, option, None) or ())
        if len(given) > len(files):
            raise OptionError(
                f"--{option} has {len(given)} patterns for {len(files)} LoRA files: give one per file, in "
                "the same order"
            )
        both.append([*given, *[None] * (len(files) - len(given))])
    uses = []
    for (path, multiplier), *found in zip(files, *both, strict=True):
        lora = read_lora(path, by_expert=True, with_texts=with_texts)
        if any(found):
            names = _names_for_patterns(lora)
            found = [fit_pattern(pattern, names, str(path)) for pattern in found]
        uses.append(LoraUse(lora, multiplier, *found))
    return uses


def _names_for_patterns(lora: LoraFile) -> set[str]:
    """Return the names of a file's tensors, also with the module names of other layouts."""
    names = set()
    files = (lora, *lora.parts.values())
    for tensor in (name for one in files for name in (*one.tensors, *one.text_tensors)):
        module, _, factor = tensor.partition(".")
        others = (OURS + one.name for one in relatives(module.removeprefix(OURS)))
        names |= {f"{name}.{factor}" for name in (module, *others)}
    return names


def fit_pattern(pattern: str | None, names: Collection[str], where: str) -> str | None:
    """Return a pattern in the spelling that fits some of the names; warn if neither spelling does.

    The mark of patterns that other options have added is removed.
    """
    typed, untyped, rest = (pattern or "").partition(UNTYPED)
    bar = "|" if typed.endswith("|") and untyped else ""
    typed = typed.removesuffix(bar)
    if not typed or any(re.search(typed, name) for name in names):
        return f"{typed}{bar}{rest}" or pattern
    loose = in_any_spelling(typed)
    if not any(re.search(loose, name) for name in names):
        logger.warning(
            "%s: the pattern %s.", where, describe_unfit(typed, (n.partition(".")[0] for n in names))
        )
    return f"{loose}{bar}{rest}"


def warn_of_absent(
    path: Path,
    absent: Sequence[str],
    whole: int,
    what: str,
    model: FamilyNames | None,
    modules: Iterable[str] = (),
) -> None:
    """Warn of parts of a LoRA that a model does not have, each kind with `warn_of_rest`.

    absent: under our names, with our prefix, `lora_unet_x.weight` or `lora_unet_x`. modules: of the model,
    without the prefix.
    """
    modules = list(modules)
    holds_side, alike = any(map(on_text_side, modules)), {*map(without_numbers, modules)}
    kinds = sort_by_kind(absent, partial(kind_of_module, model, holds_side, alike))
    for (words, loss), names in kinds.items():
        warn_of_rest(path, names, whole, what + words, loss)


def on_side(uses: Iterable[LoraUse], is_text: bool) -> list[LoraUse]:
    """Return the parts of LoRAs for the transformer, or those for modules loaded with the text encoder.

    Leaves out LoRAs without such parts, and parts of which patterns keep nothing while they keep some of the
    other side.
    """
    parts = []
    for use in uses:
        sides: dict[bool, dict[str, Mapping[str, Tensor]]] = {True: {}, False: {}}
        for name, factors in use.lora.modules().items():
            sides[bool(on_text_side(name.removeprefix(OURS)))][name] = factors
        kept = {
            side: any(use.keeps(one, name) for name, one in found.items()) for side, found in sides.items()
        }
        if kept[is_text] or (sides[is_text] and not is_text and not kept[True]):
            own = ungroup(sides[is_text]) if sides[not is_text] else use.lora.tensors
            parts.append(replace(use, lora=replace(use.lora, tensors=own)))
    return parts


def warn_of_other_family(lora: LoraFile, model: FamilyNames | None, modules: Collection[str] = ()) -> None:
    """Warn if a LoRA fits by its names but its metadata say that it was trained for another model.

    modules: of the model; they show its release. Raises CheckpointError if the metadata name a need that this
    program does not support.
    """
    told = " ".join(f"{key}={lora.metadata.get(key, '')}" for key in _SAYING)
    for pattern, why in () if model is None else model.refused:
        if re.search(pattern, told, re.IGNORECASE):
            raise CheckpointError(f"{lora.path}: {why}", lora.path)
    if model is not None and model.told_release:
        release, mark = model.newest
        said = re.search(model.told_release, told, re.IGNORECASE)
        if said is not None and mark in modules and said[1] != release:
            logger.info(
                f"{lora.path} was trained for {said[1]}, as its metadata say, and is used on {release}: most "
                "of what it has learned carries over, what it adds may be weaker or stronger"
            )
    made = read_family(lora.metadata)
    if made is None or model is None or made is model or made.name in model.takes:
        return
    logger.warning(
        f"{lora.path} was trained for {made.name}, as its metadata say, and is used on a {model.name} model. "
        "The names are the same, what it has learned is not: do not expect much of it."
    )


def warn_of_other_expert(lora: LoraFile, expert: str | None) -> None:
    """Warn if a LoRA was trained for another expert than the one it is added to.

    expert: the one it is added to; empty or None if the model has no experts or its expert is unknown.
    """
    if not expert or lora.expert in (None, FOR_BOTH, expert):
        return
    says = "name says" if expert_of(lora.metadata, Path()) is None else "metadata say"
    logger.warning(
        f"{lora.path} was trained for the {in_words(lora.expert)}, as its {says}, and is loaded into the "
        f"{in_words(expert)}: what it has learned is about other noise levels. Give the file for the "
        f"{in_words(expert)}, if there is one."
    )
