"""Names of the modules inside each family's network: those that a LoRA may change, in ours and other layouts.

`{n}` stands for a block number. LoRA files of our dialect write a path with "_" for "."; these lists restore
the path.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

REST, SWAPPED = -1, -2
IN_COMFYUI, IN_DIFFUSERS = "diffusion_model.", "transformer."  # before module paths in LoRA files for either
TRAINED_ON = "ss_base_model_version"  # the metadata of a LoRA file that name its family


@dataclass(frozen=True)
class WeightPart:
    """A module of another layout whose weight is rows of one of ours."""

    theirs: str  # path in the other layout
    ours: str
    # None: all rows; n: the nth group of as many rows as the part has; REST: the last rows; SWAPPED: all
    # rows, with the two halves swapped
    index: int | None = None
    usual_height: int = 1  # REST: how many times as high as the others, in every published model


@dataclass(frozen=True)
class FamilyNames:
    """Module paths of one network."""

    name: str  # as in `ss_base_model_version`
    architecture: str  # as in `modelspec.architecture`, before its "/lora"
    modules: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()  # (path in another layout, our path)
    parts: tuple[WeightPart, ...] = ()  # of a layout that cuts some of our modules up
    takes: tuple[str, ...] = ()  # families whose LoRAs are of use here too
    start: str = IN_COMFYUI  # of the LoRA files that other tools read


def _each(start: str, endings: str) -> tuple[str, ...]:
    return tuple(start + ending for ending in endings.split())


_WAN_BLOCK = (
    *_each("blocks.{n}.self_attn.", "q k v o norm_q norm_k"),
    *_each("blocks.{n}.cross_attn.", "q k v o k_img v_img norm_q norm_k norm_k_img"),
    *_each("blocks.{n}.", "ffn.0 ffn.2 norm3"),
)
_WAN_REST = (
    "patch_embedding",
    "time_projection.1",
    "head.head",
    "ref_conv",
    "img_emb.proj.0",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "img_emb.proj.4",
)

_DIFFUSERS_ATTENTION = (
    *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
    *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
)

WAN = FamilyNames(
    "wan",
    "wan2.1",
    (*_WAN_BLOCK, *_WAN_REST, *_each("text_embedding.", "0 2"), *_each("time_embedding.", "0 2")),
    # diffusers layout
    (
        *(
            (f"blocks.{{n}}.attn1.{theirs}", f"blocks.{{n}}.self_attn.{ours}")
            for theirs, ours in _DIFFUSERS_ATTENTION
        ),
        *(
            (f"blocks.{{n}}.attn2.{theirs}", f"blocks.{{n}}.cross_attn.{ours}")
            for theirs, ours in _DIFFUSERS_ATTENTION
        ),
        ("blocks.{n}.attn2.add_k_proj", "blocks.{n}.cross_attn.k_img"),
        ("blocks.{n}.attn2.add_v_proj", "blocks.{n}.cross_attn.v_img"),
        ("blocks.{n}.attn2.norm_added_k", "blocks.{n}.cross_attn.norm_k_img"),
        ("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0"),
        ("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2"),
        ("blocks.{n}.norm2", "blocks.{n}.norm3"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("proj_out", "head.head"),
    ),
)


def _qkv_parts(theirs: str, ours: str) -> tuple[WeightPart, ...]:
    """Return the parts for q, k and v ({x} in `theirs`), stacked in this order in the rows of ours."""
    return tuple(WeightPart(theirs.replace("{x}", letter), ours, index) for index, letter in enumerate("qkv"))


def _same(theirs: str, ours: str, endings: tuple[tuple[str, str], ...]) -> tuple[WeightPart, ...]:
    return tuple(WeightPart(theirs + ending, ours + own) for ending, own in endings)


_MLPS = tuple(
    (stream, theirs, ours) for stream in ("img", "txt") for theirs, ours in (("0", "fc1"), ("2", "fc2"))
)
_DIFFUSERS_DOUBLE = (
    *(("norm1.linear", "img_mod.linear"), ("norm1_context.linear", "txt_mod.linear")),
    *(("attn.to_out.0", "img_attn_proj"), ("attn.to_add_out", "txt_attn_proj")),
    *(("attn.norm_q", "img_attn_q_norm"), ("attn.norm_k", "img_attn_k_norm")),
    *(("attn.norm_added_q", "txt_attn_q_norm"), ("attn.norm_added_k", "txt_attn_k_norm")),
    *(("ff.net.0.proj", "img_mlp.fc1"), ("ff.net.2", "img_mlp.fc2")),
    *(("ff_context.net.0.proj", "txt_mlp.fc1"), ("ff_context.net.2", "txt_mlp.fc2")),
)
_DIFFUSERS_SINGLE = (
    *(("proj_out", "linear2"), ("norm.linear", "modulation.linear")),
    *(("attn.norm_q", "q_norm"), ("attn.norm_k", "k_norm")),
)
_DIFFUSERS_REFINER = (
    *(("attn.to_out.0", "self_attn_proj"), ("norm_out.linear", "adaLN_modulation.1")),
    *(("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2")),
)
_DIFFUSERS_REST = (
    ("x_embedder.proj", "img_in.proj"),
    ("proj_out", "final_layer.linear"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.linear_1"),
    ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.linear_2"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
)

HUNYUAN_VIDEO = FamilyNames(
    "hunyuan_video",
    "hunyuan-video",
    (
        *_each(
            "double_blocks.{n}.img_", "attn_qkv attn_proj mlp.fc1 mlp.fc2 mod.linear attn_q_norm attn_k_norm"
        ),
        *_each(
            "double_blocks.{n}.txt_", "attn_qkv attn_proj mlp.fc1 mlp.fc2 mod.linear attn_q_norm attn_k_norm"
        ),
        *_each("single_blocks.{n}.", "linear1 linear2 modulation.linear q_norm k_norm"),
        *_each(
            "txt_in.individual_token_refiner.blocks.{n}.",
            "self_attn_qkv self_attn_proj mlp.fc1 mlp.fc2 adaLN_modulation.1",
        ),
        *_each(
            "txt_in.",
            "input_embedder t_embedder.mlp.0 t_embedder.mlp.2 c_embedder.linear_1 c_embedder.linear_2",
        ),
        *_each(
            "",
            "img_in.proj time_in.mlp.0 time_in.mlp.2 guidance_in.mlp.0 guidance_in.mlp.2 vector_in.in_layer "
            "vector_in.out_layer",
        ),
        *_each("final_layer.", "linear adaLN_modulation.1"),
    ),
    # ComfyUI's names where they differ in more than "." for "_"
    (
        *(
            (f"double_blocks.{{n}}.{stream}_mlp.{theirs}", f"double_blocks.{{n}}.{stream}_mlp.{ours}")
            for stream, theirs, ours in _MLPS
        ),
        *(
            (f"double_blocks.{{n}}.{stream}_mod.lin", f"double_blocks.{{n}}.{stream}_mod.linear")
            for stream in ("img", "txt")
        ),
        ("single_blocks.{n}.modulation.lin", "single_blocks.{n}.modulation.linear"),
        (
            "txt_in.individual_token_refiner.blocks.{n}.mlp.0",
            "txt_in.individual_token_refiner.blocks.{n}.mlp.fc1",
        ),
        (
            "txt_in.individual_token_refiner.blocks.{n}.mlp.2",
            "txt_in.individual_token_refiner.blocks.{n}.mlp.fc2",
        ),
        ("txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"),
        ("txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
        *((f"{name}.in_layer", f"{name}.mlp.0") for name in ("txt_in.t_embedder", "time_in", "guidance_in")),
        *((f"{name}.out_layer", f"{name}.mlp.2") for name in ("txt_in.t_embedder", "time_in", "guidance_in")),
    ),
    # diffusers layout, which FramePack has too
    (
        *_qkv_parts("transformer_blocks.{n}.attn.to_{x}", "double_blocks.{n}.img_attn_qkv"),
        *_qkv_parts("transformer_blocks.{n}.attn.add_{x}_proj", "double_blocks.{n}.txt_attn_qkv"),
        *_same("transformer_blocks.{n}.", "double_blocks.{n}.", _DIFFUSERS_DOUBLE),
        *_qkv_parts("single_transformer_blocks.{n}.attn.to_{x}", "single_blocks.{n}.linear1"),
        WeightPart(
            "single_transformer_blocks.{n}.proj_mlp", "single_blocks.{n}.linear1", REST, usual_height=4
        ),
        *_same("single_transformer_blocks.{n}.", "single_blocks.{n}.", _DIFFUSERS_SINGLE),
        *_qkv_parts(
            "context_embedder.token_refiner.refiner_blocks.{n}.attn.to_{x}",
            "txt_in.individual_token_refiner.blocks.{n}.self_attn_qkv",
        ),
        *_same(
            "context_embedder.token_refiner.refiner_blocks.{n}.",
            "txt_in.individual_token_refiner.blocks.{n}.",
            _DIFFUSERS_REFINER,
        ),
        *_same("", "", _DIFFUSERS_REST),
        WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", SWAPPED),
    ),
)

FRAMEPACK = FamilyNames(
    "framepack",
    "framepack",
    (
        *_each(
            "transformer_blocks.{n}.attn.",
            "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out",
        ),
        *_each("transformer_blocks.{n}.attn.", "norm_q norm_k norm_added_q norm_added_k"),
        *_each(
            "transformer_blocks.{n}.",
            "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 norm1.linear norm1_context.linear",
        ),
        *_each(
            "single_transformer_blocks.{n}.",
            "attn.to_q attn.to_k attn.to_v proj_mlp proj_out norm.linear attn.norm_q attn.norm_k",
        ),
        *_each(
            "context_embedder.token_refiner.refiner_blocks.{n}.",
            "attn.to_q attn.to_k attn.to_v attn.to_out.0",
        ),
        *_each(
            "context_embedder.token_refiner.refiner_blocks.{n}.", "ff.net.0.proj ff.net.2 norm_out.linear"
        ),
        "context_embedder.proj_in",
        *_each("context_embedder.time_text_embed.timestep_embedder.", "linear_1 linear_2"),
        *_each("context_embedder.time_text_embed.text_embedder.", "linear_1 linear_2"),
        *(
            f"time_text_embed.{vector}_embedder.{layer}"
            for vector in ("timestep", "guidance", "text")
            for layer in ("linear_1", "linear_2")
        ),
        *_each("clean_x_embedder.", "proj proj_2x proj_4x"),
        *_each("", "x_embedder.proj image_projection.up image_projection.down norm_out.linear proj_out"),
    ),
    takes=("hunyuan_video",),
    # as diffusers' HunyuanVideoFramepackPipeline needs it; with another start it loads no layer
    start=IN_DIFFUSERS,
)

FAMILIES = (WAN, HUNYUAN_VIDEO, FRAMEPACK)


def replace_dots(path: str) -> str:
    """`blocks.0.self_attn.q` -> `blocks_0_self_attn_q`."""
    return path.replace(".", "_")


def choose_family(names: Iterable[str], hint: str | None = None) -> FamilyNames | None:
    """Return the family whose lists have most of these underscored names; None if no list has any.

    Ties go to the family named `hint`, then to the one that has modules of these names, not only aliases.
    """
    names = list(names)

    def score(family: FamilyNames) -> tuple[int, bool, int]:
        own, foreign, cut = _patterns(family)
        known = sum(any(pattern.fullmatch(name) for pattern in (own, foreign, cut)) for name in names)
        return known, family.name == hint, sum(own.fullmatch(name) is not None for name in names)

    best = max(FAMILIES, key=score)
    return best if score(best)[0] else None


def read_family(metadata: Mapping[str, str]) -> FamilyNames | None:
    """Return the family that a LoRA file's metadata name; None if they name none, or an unknown one."""
    version, architecture = (
        metadata.get(TRAINED_ON),
        metadata.get("modelspec.architecture", "").removesuffix("/lora"),
    )
    return next(
        (family for family in FAMILIES if version == family.name or architecture == family.architecture), None
    )


def module_path(name: str, family: FamilyNames) -> str | None:
    """Return `blocks.0.self_attn.q` for `blocks_0_self_attn_q`; None if the family has no such module."""
    known, _, _ = _patterns(family)
    found = known.fullmatch(name)
    return None if found is None else _fill(family.modules, found)


def alias(name: str, family: FamilyNames) -> str:
    """Return our underscored name for one of another layout; return any other name unchanged."""
    _, foreign, _ = _patterns(family)
    found = foreign.fullmatch(name)
    return name if found is None else replace_dots(_fill([ours for _, ours in family.aliases], found))


@dataclass(frozen=True)
class Relative:
    """A module whose weight has all or some rows of another module's weight, or the reverse."""

    name: str  # underscored
    part: WeightPart
    is_part: bool  # of the module that was asked for; otherwise that one is part of this


@cache
def relatives(name: str) -> tuple[Relative, ...]:
    """Return the modules of other layouts, in any family, that are part of this one or contain it."""
    found = []
    for family in FAMILIES:
        for part in family.parts:
            for own, other, is_part in ((part.ours, part.theirs, True), (part.theirs, part.ours, False)):
                match = _template(own).fullmatch(name)
                if match is not None:
                    found.append(Relative(replace_dots(other.replace("{n}", match["n"])), part, is_part))
    return tuple(found)


@cache
def _template(path: str) -> re.Pattern[str]:
    before, _, after = replace_dots(path).partition("{n}")
    return re.compile(re.escape(before) + (r"(?P<n>\d+)" if "{n}" in path else "(?P<n>)") + re.escape(after))


def _fill(templates: Iterable[str], found: re.Match[str]) -> str:
    """Return the template whose group matched, with its block number filled in."""
    index, number = next(
        (int(key[1:]), value) for key, value in found.groupdict().items() if value is not None
    )
    return list(templates)[index].replace("{n}", number)


@cache
def _patterns(family: FamilyNames) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Compile patterns of the underscored modules, aliases and parts.

    Group t<i> holds the block number of template i, or nothing.
    """
    aliases, parts = (theirs for theirs, _ in family.aliases), (part.theirs for part in family.parts)
    return _pattern(family.modules), _pattern(aliases), _pattern(parts)


def _pattern(templates: Iterable[str]) -> re.Pattern[str]:
    parts = []
    for index, template in enumerate(templates):
        before, _, after = replace_dots(template).partition("{n}")
        number = rf"(?P<t{index}>\d+)" if "{n}" in template else rf"(?P<t{index}>)"
        parts.append(re.escape(before) + number + re.escape(after))
    return re.compile("|".join(parts) or r"(?!)")
