"""Dataclasses for a family's module names, and patterns that rename the tensors of a checkpoint.

"Our" layout is the layout of our networks. In paths, `{n}` is replaced by the index of a block. LoRA files
under our names have paths with "_" instead of "."; the dataclasses restore the path.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from protocols.families import HIGH_NOISE, LOW_NOISE

# special values of `WeightPart.index`
REST = -1
SWAPPED = -2
BEFORE_REST = -3
# prefixes of module names in LoRA files
OURS = "lora_unet_"  # used by us and most trainers
LTX_FORK_PREFIX = "lora_unet_model_"  # musubi-tuner's fork for LTX-2
IN_COMFYUI = "diffusion_model."
IN_DIFFUSERS = "transformer."
UNET_IN_DIFFUSERS = "unet."
# values of --lora_format: names of the established trainers, of ComfyUI, of diffusers
KNOWN, COMFYUI, DIFFUSERS = "known", "comfyui", "diffusers"
# first layers, whose number of input channels differs between models of a family
FIRST_LAYERS = (
    "patch_embedding.weight",
    "img_in.proj.weight",
    "x_embedder.proj.weight",
    # U-Nets, with more channels for inpainting
    "conv_in.weight",
    "input_blocks.0.0.weight",
)
# --- metadata keys of LoRA files
TRAINED_ON = "ss_base_model_version"  # the family
TRAINED_EXPERT = "ss_wan_expert"  # the expert: a key of EXPERT_VALUES, or FOR_BOTH
EXPERT_VALUES = {"high": HIGH_NOISE, "low": LOW_NOISE}
FOR_BOTH = "both"  # value of TRAINED_EXPERT for one LoRA that was trained in both experts
# a phrase that says which use of the model was trained (key trained_for of `Family.metadata`)
TRAINED_FOR = "reelsmith_trained_for"
# name and hash of the distilled transformer that a training adapter is for
MADE_FOR = "ss_training_adapter_for"
LORA_FORMAT = "ss_lora_format"  # format of the names, a value of --lora_format
# JSON in our files without alphas: rank -> alpha / rank, which was multiplied into factors of this rank
FOLDED = "reelsmith_folded"
LAYOUT_KEY = "reelsmith_layout"  # hash of names and shapes in our files
# file of the settings of a PEFT adapter
PEFT_FILE = "adapter_config.json"
# prefixes of the names of layers in text encoders
CLIP_LAYER_PREFIX, T5_LAYER_PREFIX, LANGUAGE_MODEL_LAYER_PREFIX = "text_model_", "encoder_block_", "layers_"


@dataclass(frozen=True)
class WeightPart:
    """A module in one layout whose weight is all or some rows of a weight in another layout."""

    part_path: str
    # path of the module with all rows; of the same module under another name if index is None
    fused_path: str
    # Which rows of our weight a part with h rows is. None: all rows; n: rows n * h to (n + 1) * h; REST: the
    # last h rows; BEFORE_REST: the h rows before the last h; SWAPPED: all rows, with the two halves swapped
    index: int | None = None
    relative_rows: int = 1  # number of rows as a multiple of the smallest part's, in all published models


# Order of a LoRA's modules in other trainers, by which their optimizer states number parameters: (prefix,
# endings), all blocks of the first prefix, then all blocks of the next.
# Source: lists of modules recorded with the trainers (`tests/golden`), the published model code
Numbering = tuple[tuple[str, str], ...]
Sides = tuple[tuple[str, float, float], ...]  # see `FamilyNames.relative_sizes`
# published models: (width of a block, (list of blocks in our layout, number of blocks) for each list)
Released = tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
# `relative_sizes` of blocks with two streams in diffusers' layout
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
    """The --network_args that only one family has, and the modules that they select.

    Paths are module paths in the network.
    """

    # Arguments that set the rank of some modules: (argument, types of modules). A type is a tuple of words,
    # all of which occur in a module's path. The first argument that is set and matches a module sets its
    # rank
    rank_arguments: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    # value of the argument train_blocks -> prefixes of the modules that it selects, such as "double_blocks."
    train_blocks_choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # argument that lists indices of trained blocks -> the list of blocks
    block_lists_by_argument: Mapping[str, str] = field(default_factory=dict)
    outside_ranks_argument: str = ""  # argument with the ranks of `outside_paths`, in this order
    outside_paths: tuple[str, ...] = ()  # modules that are not in a block
    # ending of a fused layer's path -> number of parts, see `networks.lora_products.count_fused_part_rows`
    num_fused_parts: Mapping[str, int] = field(default_factory=dict)
    # argument -> text encoder that it enables
    encoder_switches: Mapping[str, str] = field(default_factory=dict)
    # argument -> pattern of `DitSpec.lora_exclude` whose modules it enables
    module_switches: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsByHead:
    """Fused layers whose rows another program orders by head: [q0 k0 v0, q1 k1 v1, ...] for our [q; k; v]."""

    file_pattern: str  # regular expression that matches names only in files of that program
    ending: str  # ending of our paths of the layers
    norm_ending: str  # ending of our paths of norms that are as wide as a head, in model files
    head_width: int  # width of a head in released models; LoRAs do not reveal it


@dataclass(frozen=True)
class DepthVariants:
    """Variants of a model with different depths: deeper variants repeat some blocks of the shallowest one.

    Copies of a block directly follow it.
    """

    blocks: str  # name of the list in our layout
    other_list_names: tuple[str, ...]  # names of the list in other layouts
    depths: tuple[int, ...]  # number of blocks of each variant; each has one more copy of the copied blocks
    repeated_blocks: frozenset[int]  # blocks of the first variant that deeper variants repeat
    keys: tuple[str, ...]  # metadata keys for the number of blocks of a LoRA's model, ours first
    maximum: int = 1000  # largest valid number of blocks in metadata

    def list_originals(self, depth: int) -> list[int]:
        """Return the block of the shortest variant that each block of the `depth`-block variant copies."""
        num_copies = self.depths.index(depth)
        originals = []
        for block in range(self.depths[0]):
            originals.append(block)
            if block in self.repeated_blocks:
                originals += [block] * num_copies
        return originals

    def map_to_deeper(self, depth: int, deeper: int) -> list[list[int]]:
        """Return, for each block of a variant, the indices of its copies in a deeper variant.

        With depths 2, 3 and 4 and block 0 repeated, `map_to_deeper(2, 4)` is [[0, 1, 2], [3]]. If the variant
        itself has several copies of a block, the additional copies belong to the last one:
        `map_to_deeper(3, 4)` is [[0], [1, 2], [3]].

        Args:
            depth: Number of blocks of the variant.
            deeper: Number of blocks of the deeper variant.
        """
        indices: list[list[int]] = []
        next_index = 0  # in the deeper variant
        originals = self.list_originals(depth)
        num_copies = Counter(originals)  # original block -> number of its copies, including itself
        num_copies_in_deeper = Counter(self.list_originals(deeper))
        for index, original in enumerate(originals):
            is_last_copy = index + 1 == len(originals) or originals[index + 1] != original
            num_blocks = 1
            if is_last_copy:
                num_blocks += num_copies_in_deeper[original] - num_copies[original]
            indices.append([*range(next_index, next_index + num_blocks)])
            next_index += num_blocks
        return indices


@dataclass(frozen=True, eq=False)  # eq=False: compared and hashed by identity, because the lists are long
class FamilyNames:
    """All module paths of a model family, in our layout and in other programs' layouts."""

    name: str  # value of `ss_base_model_version`
    architecture: str  # value of `modelspec.architecture`, without its "/lora"
    aliases: tuple[tuple[str, str], ...] = ()  # (path in another layout, our path)
    parts: tuple[WeightPart, ...] = ()  # parts of our modules in a layout that splits some of them
    # parts of another layout's fused modules: here `part_path` is our module
    joined: tuple[WeightPart, ...] = ()
    # whether ComfyUI reads LoRAs only under the names of the layout of `joined` and `aliases`
    stacked_in_comfyui: bool = False
    network_module: str = ""  # value of --network_module that trains its LoRAs
    rules: LoraRules | None = None  # arguments that only `network_module` has
    compatible_families: tuple[str, ...] = ()  # other families whose LoRAs are useful for this model too
    path_prefix: str = IN_COMFYUI  # prefix of module paths in LoRA files for other tools
    # tools that cannot read LoRAs under our names without conversion, for messages; "": all tools can
    converted_for: str = ""
    default_format: str = KNOWN  # default of --lora_format
    not_in_comfyui: str = ""  # why ComfyUI cannot read its LoRAs; "": it can
    not_in_diffusers: tuple[tuple[str, str], ...] = ()  # (kind of network, why diffusers cannot read it)
    # prefixes of the text encoders for which diffusers' pipelines load LoRAs
    texts_in_diffusers: tuple[str, ...] = ()
    # (our prefix of a text encoder, prefix of its paths in ComfyUI); ComfyUI reads others under our names
    texts_in_comfyui: tuple[tuple[str, str], ...] = ()
    # whether ComfyUI reads LoRAs only under names with underscores (ours or `aliases`), because its dotted
    # paths differ from ours
    underscored_in_comfyui: bool = False
    # kinds of networks besides LoRA that diffusers reads under ComfyUI's names
    kinds_in_diffusers: tuple[str, ...] = ()
    # whether our paths equal diffusers'; `aliases` then belong to another layout
    is_as_in_diffusers: bool = False
    # which names with underscores all tools except diffusers use for its LoRAs: "ours" or "aliases"; "":
    # tools differ
    underscored_names: str = ""
    # with `underscored_names`: whether ComfyUI reads dotted paths all the same
    dotted_in_comfyui: bool = False
    # (path in another layout, our path) of parameters that are not the weight or bias of a module; in LoRA
    # files `{path}.diff`
    parameters: tuple[tuple[str, str], ...] = ()
    optional_paths: tuple[str, ...] = ()  # our paths of modules and parameters that only some models have
    optional_description: str = ""  # description of `optional_paths`, for messages
    # `ss_base_model_version` to write, as other trainers do, if it is not `name`; `ss_network_module` is then
    # written as in other trainers too
    written_base_model: str = ""
    version_prefixes: tuple[str, ...] = ()  # other prefixes of `ss_base_model_version`, in lower case
    # (regular expression for the metadata of a LoRA that cannot be used, reason); see networks/loading.py
    unsupported_loras: tuple[tuple[str, str], ...] = ()
    # For families whose releases have LoRAs with the same names: a regular expression that finds the release
    # in the metadata, and (newest release, parameter that only this release has)
    release_pattern: str = ""
    newest_release: tuple[str, str] = ("", "")
    # text encoders that LoRAs change: (prefix in LoRA files, prefix of the names of their layers). Encoders
    # of the same kind are listed in the order of their numbers
    encoders: tuple[tuple[str, str], ...] = (("lora_te1", CLIP_LAYER_PREFIX), ("lora_te3", T5_LAYER_PREFIX))
    # Sizes that distinguish families with equal names: (ending of "." + our path, rows of the weight,
    # columns), as multiples of a block's width; 0 means any size
    relative_sizes: Sides = ()
    released_sizes: Released = ()  # published models; a U-Net's width is the width of its text states
    # (name of an expert's network in diffusers' pipelines, the expert), if there are several experts
    experts: tuple[tuple[str, str], ...] = ()
    more_experts: tuple[tuple[str, str], ...] = ()  # the same, with other names in files with several experts
    more_modules: tuple[str, ...] = ()  # our paths that `aliases` and `parts` do not have
    optimizer_numbering: Numbering = ()
    # prefixes of our paths of modules that are loaded with the text encoder, and their description
    text_module_prefixes: tuple[str, ...] = ()
    text_module_description: str = ""
    # prefixes other than "transformer." in diffusers' names, for networks with the same modules
    more_diffusers_prefixes: tuple[str, ...] = ()
    rows_by_head: RowsByHead | None = None
    # whether a file is rejected if an underscored name belongs to no module; otherwise the name is ignored
    rejects_unknown_names: bool = False
    # prefixes of paths, in any layout, to which files do not add the prefix of the transformer
    unprefixed_paths: tuple[str, ...] = ()
    depth_variants: DepthVariants | None = (
        None  # deeper variants that LoRAs are converted for, see `networks.depth_variants`
    )

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """All module paths of the network in our layout, without duplicates."""
        named = (
            *(ours for _, ours in self.aliases),
            *(part.fused_path for part in self.parts),
            *self.more_modules,
        )
        return tuple(dict.fromkeys(named))


def with_endings(start: str, endings: str) -> tuple[str, ...]:
    """Return `start` + ending for each whitespace-separated word of `endings`."""
    return tuple(start + ending for ending in endings.split())


def in_both_streams(endings: str) -> str:
    """Return the endings twice, with {x} replaced by img and then by txt."""
    return " ".join(endings.replace("{x}", stream) for stream in ("img", "txt"))


def stacked_parts(theirs: str, ours: str) -> tuple[WeightPart, ...]:
    """Return the parts of our fused weight [q; k; v]; q, k and v replace {x} in the other layout's path."""
    return tuple(WeightPart(theirs.replace("{x}", letter), ours, index) for index, letter in enumerate("qkv"))


def renamed_parts(theirs: str, ours: str, endings: Iterable[tuple[str, str]]) -> tuple[WeightPart, ...]:
    """Return WeightPart(theirs + ending, ours + ending) for each pair of endings of renamed modules."""
    return tuple(WeightPart(theirs + their_ending, ours + our_ending) for their_ending, our_ending in endings)


def swapped_tensors(names: FamilyNames) -> tuple[str, ...]:
    """Return our names of the tensors whose two halves are swapped in the family's other layout.

    `tensor_patterns` only renames them; the code that reads the file swaps the halves.
    """
    modules = [part.fused_path for part in names.parts if part.index == SWAPPED]
    return tuple(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))


def joined_tensors(names: FamilyNames) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (pattern, our names in row order) for each weight and bias that a checkpoint fuses."""
    our_names: dict[str, list[str]] = {}
    for part in names.joined:  # here the parts are our modules
        our_path = part.part_path.replace("{n}", _MATCHED_NUMBER)
        for leaf in ("weight", "bias"):
            pattern = rf"{_pattern(part.fused_path)}\.{leaf}"
            our_names.setdefault(pattern, []).append(f"{our_path}.{leaf}")
    return tuple((pattern, tuple(ours)) for pattern, ours in our_names.items())


_MATCHED_NUMBER = r"\1"  # replaces `{n}` in the replacement for `_pattern`


def _pattern(path: str) -> str:
    """Return a regular expression for a path in which `{n}` matches any number."""
    return re.escape(path).replace(re.escape("{n}"), r"(\d+)")


def tensor_patterns(names: FamilyNames) -> tuple[tuple[str, str], ...]:
    """Return (pattern, replacement) pairs that rename a checkpoint's tensors from the family's other layout.

    If that layout splits our tensor by rows, the replacement for the n-th part ends in #n.
    """
    parts = names.parts or tuple(WeightPart(theirs, ours) for theirs, ours in names.aliases)
    counts: Counter[str] = Counter()  # our module -> parts so far
    patterns = []
    for part in parts:
        suffix = ""
        if part.index is not None and part.index != SWAPPED:
            suffix = f"#{counts[part.fused_path]}"
            counts[part.fused_path] += 1
        leaf = r".\2" if "{n}" in part.part_path else r".\1"  # the group after the block index
        pattern = _pattern(part.part_path) + r"\.(\w+)"
        patterns.append((pattern, part.fused_path.replace("{n}", _MATCHED_NUMBER) + leaf + suffix))
    for theirs, ours in names.parameters:
        patterns.append((_pattern(theirs), ours.replace("{n}", _MATCHED_NUMBER)))
    return tuple(patterns)
