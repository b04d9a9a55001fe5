"""Records of the module names of a family, and patterns that rename the tensors of a checkpoint.

`{n}` stands for a block number. LoRA files of our dialect write a path with "_" for "."; these lists restore
the path.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from protocols.families import HIGH_NOISE, LOW_NOISE

REST, SWAPPED, BEFORE_REST = -1, -2, -3  # special values of `WeightPart.index`
OURS, OF_LTX_FORK = "lora_unet_", "lora_unet_model_"  # prefixes of names in our LoRA files; of musubi's fork
IN_COMFYUI, IN_DIFFUSERS = "diffusion_model.", "transformer."  # prefixes of module paths in LoRA files
UNET_IN_DIFFUSERS = "unet."
# values of --lora_format: names of the established trainers, of ComfyUI, of diffusers
KNOWN, COMFYUI, DIFFUSERS = "known", "comfyui", "diffusers"
# first layers, whose number of input channels differs between models of a family
FIRST_LAYERS = (
    "patch_embedding.weight",
    "img_in.proj.weight",
    "x_embedder.proj.weight",
    "conv_in.weight",  # this one and the next: U-Nets, with more channels for inpainting
    "input_blocks.0.0.weight",
)
# --- metadata keys of LoRA files
TRAINED_ON = "ss_base_model_version"  # the family
TRAINED_EXPERT = "ss_wan_expert"  # the expert: a key of EXPERT_VALUES, or FOR_BOTH
# which use of the model was trained, in words (key trained_for of `Family.metadata`)
TRAINED_FOR = "reelsmith_trained_for"
# of a training adapter: name and hash of the distilled transformer that it is for
MADE_FOR = "ss_training_adapter_for"
LORA_FORMAT = "ss_lora_format"  # format of the names, a value of --lora_format
# of our files without alphas, JSON: rank -> alpha / rank that was folded into factors of this rank
FOLDED = "reelsmith_folded"
EXPERT_VALUES = {"high": HIGH_NOISE, "low": LOW_NOISE}
# prefixes of the layers' names in text encoders
OF_CLIP, OF_T5, OF_LANGUAGE_MODEL = "text_model_", "encoder_block_", "layers_"
FOR_BOTH = "both"  # value of TRAINED_EXPERT for one LoRA that was trained in both experts


@dataclass(frozen=True)
class WeightPart:
    """A module of another layout whose weight is some or all rows of one of our weights."""

    theirs: str  # path in the other layout
    ours: str
    # None: all rows; n: rows n * h to (n + 1) * h for a part of h rows; REST: the last h rows; BEFORE_REST:
    # the h rows before the last h; SWAPPED: all rows, with the two halves swapped
    index: int | None = None
    default_height: int = 1  # height as a multiple of the lowest part's, in every published model


# Order of a LoRA's modules in other trainers, which their optimizer states rely on, as (prefix, endings): all
# blocks of the first prefix, then those of the next. Networks there register their layers in this order.
# Source: lists of modules recorded with the trainers (`tests/golden`), the published model code
Numbering = tuple[tuple[str, str], ...]
Sides = tuple[tuple[str, float, float], ...]  # see `FamilyNames.sides`
# published models: (width of a block, (list of blocks in our layout, number of blocks) for each list)
Released = tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
# `sides` of blocks with two streams in diffusers' layout
IN_TWO_STREAMS: Sides = (
    *((f".to_{x}", 1, 1) for x in ("q", "k", "v", "out.0", "add_out")),
    *((f".add_{x}_proj", 1, 1) for x in "qkv"),
    (".net.0.proj", 4, 1),
    (".net.2", 1, 4),
)
# endings for `Numbering`, in blocks with two streams in diffusers' layout
NUMBERED_ATTENTION = (
    "attn.to_q attn.to_k attn.to_v attn.add_k_proj attn.add_v_proj attn.add_q_proj attn.to_out.0"
)


@dataclass(frozen=True)
class LoraRules:
    """Arguments of --network_args that only one family has; they select among the modules of its `DitSpec`.

    Paths are module paths in the network; the values of `choices` are prefixes of such paths.
    """

    # (argument with a rank, types of modules that it is for). A type is a tuple of words, all of which occur
    # in the module's path. The first given argument that matches a module is used
    types: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # train_blocks -> "double_blocks."
    indices: Mapping[str, str] = field(default_factory=dict)  # argument -> list of blocks
    outside: str = ""  # argument with the ranks of `outside_paths`, in order
    outside_paths: tuple[str, ...] = ()  # modules that are not in a block
    # ending of a fused layer's path -> number of parts, see `networks.lora_products.fused_sizes`
    fused: Mapping[str, int] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)  # argument -> the encoder that it switches on
    # argument -> the part of `DitSpec.lora_exclude` that it switches on
    switches: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsByHead:
    """Layers whose rows another program orders by head, [q0 k0 v0, q1 k1 v1, ...]; ours are [q; k; v]."""

    mark: str  # regular expression that matches a name only in that program's files
    ending: str  # ending of our paths of the layers
    norm_ending: str  # ending of our paths of norms with the width of a head, in model files
    head_width: int  # width of a head in released models, because LoRAs do not show it


@dataclass(frozen=True)
class GrownBlocks:
    """A list of blocks that is longer in deeper variants of a model, which repeat some of the blocks.

    The copies of a block follow it directly.
    """

    blocks: str  # name of the list in our layout
    also_called: tuple[str, ...]  # names of the list in other layouts
    depths: tuple[int, ...]  # number of blocks of each variant; each adds one more copy of the copied blocks
    copied: frozenset[int]  # blocks of the first variant that deeper variants repeat
    keys: tuple[str, ...]  # metadata keys with the number of blocks that a LoRA is for, ours first
    maximum: int = 1000  # largest valid number of blocks in metadata

    def originals(self, depth: int) -> list[int]:
        """Return, for each block of a variant, the index of the block that it copies in the shortest one."""
        copies = self.depths.index(depth)
        order = []
        for block in range(self.depths[0]):
            order += [block] * (1 + copies * (block in self.copied))
        return order

    def places(self, source: int, depth: int) -> list[list[int]]:
        """Return, for each block of a variant, the indices of its copies in a deeper variant.

        If the variant itself has several copies of a block, the deeper variant's additional copies belong to
        the last of them.

        Args:
            source: Number of blocks of the variant.
            depth: Number of blocks of the deeper variant.
        """
        copies: list[list[int]] = []
        next_index = 0  # in the deeper variant
        originals = self.originals(source)
        counts = Counter(self.originals(depth))
        for index, original in enumerate(originals):
            is_last_copy = index + 1 == len(originals) or originals[index + 1] != original
            num_copies = 1
            if is_last_copy:
                num_copies += counts[original] - originals.count(original)
            copies.append([*range(next_index, next_index + num_copies)])
            next_index += num_copies
        return copies


@dataclass(frozen=True, eq=False)  # compared and hashed as objects: the lists are long
class FamilyNames:
    """Module paths of one network."""

    name: str  # value of `ss_base_model_version`
    architecture: str  # value of `modelspec.architecture`, without its "/lora"
    aliases: tuple[tuple[str, str], ...] = ()  # (path in another layout, our path)
    parts: tuple[WeightPart, ...] = ()  # parts in a layout that splits some of our modules
    # parts in a layout that fuses some of our modules: here `theirs` is our module, and `ours` the fused one
    joined: tuple[WeightPart, ...] = ()
    # whether ComfyUI reads LoRAs only under the names of that layout (fused modules, and `aliases`)
    stacked_in_comfyui: bool = False
    network_module: str = ""  # our --network_module that trains its LoRAs
    rules: LoraRules | None = None  # arguments that only `network_module` has
    takes: tuple[str, ...] = ()  # other families whose LoRAs are useful for this model too
    start: str = IN_COMFYUI  # prefix in LoRA files for other tools
    # tools that read LoRAs under our names only after conversion; "": all tools read them unconverted
    converted_for: str = ""
    default_format: str = KNOWN  # format of saved files without --lora_format
    not_in_comfyui: str = ""  # why ComfyUI cannot read its LoRAs; "": it can
    not_in_diffusers: tuple[tuple[str, str], ...] = ()  # (kind of network, why diffusers cannot read it)
    # prefixes of the text encoders for which diffusers' pipelines load LoRAs
    texts_in_diffusers: tuple[str, ...] = ()
    # (our prefix of a text encoder, prefix of its paths in ComfyUI); others are read under our names
    texts_in_comfyui: tuple[tuple[str, str], ...] = ()
    # whether ComfyUI reads LoRAs only by underscored names, including `aliases`, because its dotted paths
    # differ from ours
    underscored: bool = False
    # kinds of networks besides LoRA that diffusers reads under ComfyUI's names
    kinds_in_diffusers: tuple[str, ...] = ()
    # whether our paths are those of diffusers; `aliases` then belong to another layout
    is_as_in_diffusers: bool = False
    # underscored names that all tools except diffusers use for its LoRAs: "ours" or "aliases"; "": tools
    # differ
    always_underscored: str = ""
    # parameters that are not a module's weight or bias, like `aliases`; `{path}.diff` in LoRA files
    parameters: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()  # our paths (also of parameters) that only some models have
    optional_words: str = ""  # description of `optional`, for messages
    # `ss_base_model_version` in files of other trainers, if it is not `name`; `ss_network_module` then
    # follows them too
    written_version: str = ""
    versions: tuple[str, ...] = ()  # other prefixes of `ss_base_model_version`, in lower case
    # (regular expression for metadata of a LoRA that cannot be used, reason): see networks/loading.py
    refused: tuple[tuple[str, str], ...] = ()
    # for releases whose LoRAs have the same names: a regular expression that finds the release in these
    # metadata, and (newest release, parameter that only this release has)
    release_pattern: str = ""
    newest: tuple[str, str] = ("", "")
    # text encoders that LoRAs change: (prefix in LoRA files, prefix of their layers' names). Encoders with
    # equal layers are listed in the order of their numbers
    encoders: tuple[tuple[str, str], ...] = (("lora_te1", OF_CLIP), ("lora_te3", OF_T5))
    # sizes that distinguish families with equal names: (ending of "." + our path, rows and columns of the
    # weight in widths of a block; 0: any), and the published models. For U-Nets, the width is that of texts
    sides: Sides = ()
    released: Released = ()
    # (name of an expert's network in diffusers' pipelines, the expert), if there are several experts
    experts: tuple[tuple[str, str], ...] = ()
    more_experts: tuple[tuple[str, str], ...] = ()  # the same with other names in files with several experts
    further: tuple[str, ...] = ()  # our paths that have no counterpart in another layout
    numbered: Numbering = ()
    # prefixes of our paths of modules that are loaded with the text encoder, and their description
    text_side: tuple[str, ...] = ()
    text_side_words: str = ""
    # other prefixes than "transformer." in diffusers' dialect, for networks with the same modules
    more_starts: tuple[str, ...] = ()
    rows_by_head: RowsByHead | None = None
    # whether a file is rejected if an underscored name belongs to no module; otherwise it is used in part
    rejects_strangers: bool = False
    # prefixes of paths, in any layout, that files write without the prefix of the transformer
    unprefixed: tuple[str, ...] = ()
    grown: GrownBlocks | None = None  # deeper variants for the same LoRAs: `networks.depth_variants`

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """All module paths of the network in our layout, each once."""
        named = (*(ours for _, ours in self.aliases), *(part.ours for part in self.parts), *self.further)
        return tuple(dict.fromkeys(named))


def with_endings(start: str, endings: str) -> tuple[str, ...]:
    """Return `start` + ending for each word of `endings`."""
    return tuple(start + ending for ending in endings.split())


def in_both_streams(endings: str) -> str:
    """Return the endings with `{x}` replaced by img, then by txt."""
    return " ".join(endings.replace("{x}", stream) for stream in ("img", "txt"))


def stacked_parts(theirs: str, ours: str) -> tuple[WeightPart, ...]:
    """Return the parts q, k and v ({x} in `theirs`) of a weight of ours that stacks them in this order."""
    return tuple(
        WeightPart(theirs.replace("{x}", character), ours, row) for row, character in enumerate("qkv")
    )


def renamed_parts(theirs: str, ours: str, endings: Iterable[tuple[str, str]]) -> tuple[WeightPart, ...]:
    """Return renamed full modules: `theirs` + their ending is `ours` + our ending, for each of `endings`."""
    return tuple(WeightPart(theirs + their_ending, ours + our_ending) for their_ending, our_ending in endings)


def swapped_tensors(names: FamilyNames) -> tuple[str, ...]:
    """Return our tensors whose two halves are swapped in the family's other layout.

    `tensor_patterns` only renames them: the reader of the file swaps the halves.
    """
    modules = [part.ours for part in names.parts if part.index == SWAPPED]
    return tuple(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))


def joined_tensors(names: FamilyNames) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (pattern, our names in the order of the rows) for each weight that a checkpoint fuses."""
    replacements: dict[str, list[str]] = {}
    for part in names.joined:
        pattern = _pattern(part.ours) + r"\.weight"
        replacements.setdefault(pattern, []).append(f"{_replacement(part.theirs)}.weight")
    return tuple((pattern, tuple(ours)) for pattern, ours in replacements.items())


def _pattern(path: str) -> str:
    """Return the regular expression for a path in which `{n}` stands for the block index."""
    return re.escape(path).replace(re.escape("{n}"), r"(\d+)")


def _replacement(path: str) -> str:
    """Return the replacement text for a path with `{n}`, filled with the number that `_pattern` matched."""
    return path.replace("{n}", r"\1")


def tensor_patterns(names: FamilyNames) -> tuple[tuple[str, str], ...]:
    """Return (pattern, replacement) for the tensors of a checkpoint in the family's other layout.

    A replacement with the suffix #n is the nth of the parts that form the rows of our tensor.
    """
    parts = names.parts or tuple(WeightPart(theirs, ours) for theirs, ours in names.aliases)
    counts: dict[str, int] = {}
    patterns = []
    for part in parts:
        suffix = ""
        if part.index is not None and part.index != SWAPPED:
            index = counts.get(part.ours, 0)
            suffix = f"#{index}"
            counts[part.ours] = index + 1
        leaf = r".\2" if "{n}" in part.theirs else r".\1"
        pattern = _pattern(part.theirs) + r"\.(\w+)"
        patterns.append((pattern, _replacement(part.ours) + leaf + suffix))
    for theirs, ours in names.parameters:
        patterns.append((_pattern(theirs), _replacement(ours)))
    return tuple(patterns)
