"""Names of the modules inside each family's network, as data: what a LoRA may change, and what other layouts call it.

`{n}` stands for a block number. LoRA files of our dialect write a path with "_" for "."; these lists give the way back.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class FamilyNames:
    """Module paths of one network."""

    name: str  # as in `ss_base_model_version`
    modules: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()  # (path in another layout, our path)


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
    (*_WAN_BLOCK, *_WAN_REST, *_each("text_embedding.", "0 2"), *_each("time_embedding.", "0 2")),
    # diffusers layout
    (
        *((f"blocks.{{n}}.attn1.{theirs}", f"blocks.{{n}}.self_attn.{ours}") for theirs, ours in _DIFFUSERS_ATTENTION),
        *((f"blocks.{{n}}.attn2.{theirs}", f"blocks.{{n}}.cross_attn.{ours}") for theirs, ours in _DIFFUSERS_ATTENTION),
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

HUNYUAN_VIDEO = FamilyNames(
    "hunyuan_video",
    (
        *_each("double_blocks.{n}.img_", "attn_qkv attn_proj mlp.fc1 mlp.fc2 mod.linear attn_q_norm attn_k_norm"),
        *_each("double_blocks.{n}.txt_", "attn_qkv attn_proj mlp.fc1 mlp.fc2 mod.linear attn_q_norm attn_k_norm"),
        *_each("single_blocks.{n}.", "linear1 linear2 modulation.linear q_norm k_norm"),
        *_each("txt_in.individual_token_refiner.blocks.{n}.", "self_attn_qkv self_attn_proj mlp.fc1 mlp.fc2 adaLN_modulation.1"),
        *_each("txt_in.", "input_embedder t_embedder.mlp.0 t_embedder.mlp.2 c_embedder.linear_1 c_embedder.linear_2"),
        *_each(
            "", "img_in.proj time_in.mlp.0 time_in.mlp.2 guidance_in.mlp.0 guidance_in.mlp.2 vector_in.in_layer vector_in.out_layer"
        ),
        *_each("final_layer.", "linear adaLN_modulation.1"),
    ),
    # ComfyUI's names where they differ in more than "." for "_"
    tuple(
        (f"{block}.{{n}}.{theirs}", f"{block}.{{n}}.{ours}")
        for block, theirs, ours in (
            ("double_blocks", "img_mlp.0", "img_mlp.fc1"),
            ("double_blocks", "img_mlp.2", "img_mlp.fc2"),
            ("double_blocks", "txt_mlp.0", "txt_mlp.fc1"),
            ("double_blocks", "txt_mlp.2", "txt_mlp.fc2"),
            ("double_blocks", "img_mod.lin", "img_mod.linear"),
            ("double_blocks", "txt_mod.lin", "txt_mod.linear"),
            ("single_blocks", "modulation.lin", "modulation.linear"),
        )
    ),
)

FRAMEPACK = FamilyNames(
    "framepack",
    (
        *_each("transformer_blocks.{n}.attn.", "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out"),
        *_each(
            "transformer_blocks.{n}.",
            "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 norm1.linear norm1_context.linear",
        ),
        *_each("single_transformer_blocks.{n}.", "attn.to_q attn.to_k attn.to_v proj_mlp proj_out norm.linear"),
    ),
)

FAMILIES = (WAN, HUNYUAN_VIDEO, FRAMEPACK)


def underscored(path: str) -> str:
    """`blocks.0.self_attn.q` -> `blocks_0_self_attn_q`."""
    return path.replace(".", "_")


def choose_family(names: Iterable[str], hint: str | None = None) -> FamilyNames | None:
    """The family whose lists know most of these underscored names; of equals the one named `hint`. None where no list knows any."""
    names = list(names)

    def score(family: FamilyNames) -> tuple[int, bool]:
        known, _ = _patterns(family)
        return sum(known.fullmatch(name) is not None or alias(name, family) != name for name in names), family.name == hint

    best = max(FAMILIES, key=score)
    return best if score(best)[0] else None


def module_path(name: str, family: FamilyNames) -> str | None:
    """`blocks_0_self_attn_q` -> `blocks.0.self_attn.q`; None where the family has no such module."""
    known, _ = _patterns(family)
    found = known.fullmatch(name)
    return None if found is None else _filled(family.modules, found)


def alias(name: str, family: FamilyNames) -> str:
    """The underscored name of our layout for one of another layout; any other name unchanged."""
    _, foreign = _patterns(family)
    found = foreign.fullmatch(name)
    return name if found is None else underscored(_filled([ours for _, ours in family.aliases], found))


def _filled(templates: Iterable[str], found: re.Match[str]) -> str:
    """The template whose group matched, with its block number."""
    index, number = next((int(key[1:]), value) for key, value in found.groupdict().items() if value is not None)
    return list(templates)[index].replace("{n}", number)


@cache
def _patterns(family: FamilyNames) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the underscored modules and aliases; group t<i> holds the block number (or nothing) of template i."""
    return _pattern(family.modules), _pattern([theirs for theirs, _ in family.aliases])


def _pattern(templates: Iterable[str]) -> re.Pattern[str]:
    parts = []
    for index, template in enumerate(templates):
        before, _, after = underscored(template).partition("{n}")
        number = rf"(?P<t{index}>\d+)" if "{n}" in template else rf"(?P<t{index}>)"
        parts.append(re.escape(before) + number + re.escape(after))
    return re.compile("|".join(parts) or r"(?!)")
