"""MiniMax-H3's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, RowsByHead, WeightPart, renamed_parts, stacked_parts
from protocols.families import CLIPS, FamilyEntry, Marks

LICENSE = (
    "MiniMax H3 Community License: without an authorization by MiniMax, which is free, it gives no rights in "
    "the USA, the EU, the UK and South Korea, also to what the model makes."
)
ENTRY = FamilyEntry(
    "minimax_h3",
    script="minimax_h3",
    cache="minimax_h3_cache",
    makes="video",
    record="H3",
    encoders=(("vae", "--video_vae", CLIPS), ("audio_vae", "--audio_vae", "it encodes their audio")),
    texts="--text_encoder QWEN3_VL_FILE --tokenizer TOKENIZER_FOLDER",
    notice=LICENSE,
)
HEAD_WIDTH = 128  # head width of both released transformers
# prefixes of blocks: in diffusers, and as released
_BLOCKS = (
    ("transformer_blocks.{n}.", "blocks.{n}."),
    ("token_refiner.refiner_blocks.{n}.", "token_refiner.blocks.{n}."),
)
_LAYERS = (("attn.to_out.0", "attn.out_proj"), ("ff.net.2", "mlp.fc2"))
_OUTSIDE = (
    ("proj_in", "video_patch_proj"),
    ("audio_proj_in", "audio_patch_proj"),
    ("context_embedder", "condition_proj"),
    ("time_embedder.linear_1", "time_embedder.proj_in"),
    ("time_embedder.linear_2", "time_embedder.proj_out"),
    ("norm_out.linear", "final_layer.adaln_proj.linear"),
    ("proj_out", "final_layer.video_out"),
    ("audio_proj_out", "final_layer.audio_out"),
)
_NORMS = (
    *((f"attn.norm_{letter}.weight", f"attn.{letter}_norm.weight") for letter in "qk"),
    *((f"norm{number}.weight",) * 2 for number in (1, 2)),
)
_ORDER = "attn.qkv_proj attn.out_proj mlp.fc1 mlp.fc2"  # order in which the layers are registered


def _make_block_parts(theirs: str, ours: str) -> tuple[WeightPart, ...]:
    return (
        *stacked_parts(f"{theirs}attn.to_{{x}}", f"{ours}attn.qkv_proj"),
        WeightPart(f"{theirs}ff.net.0.proj", f"{ours}mlp.fc1", layouts.SWAPPED),
        *renamed_parts(theirs, ours, _LAYERS),
    )


MINIMAX_H3 = FamilyNames(
    "minimax_h3",
    "MiniMax-H3",
    parts=(
        *(part for block in _BLOCKS for part in _make_block_parts(*block)),
        WeightPart("transformer_blocks.{n}.adaln_proj.linear", "blocks.{n}.adaln_proj.linear"),
        *renamed_parts("", "", _OUTSIDE),
    ),
    parameters=(
        *((theirs + one, ours + other) for theirs, ours in _BLOCKS for one, other in _NORMS),
        ("norm_out.norm.weight", "final_layer.norm.weight"),
        ("token_refiner.final_norm.weight",) * 2,
        ("adaln_t_table",) * 2,
    ),
    optional_paths=("time_embedder.proj_in", "time_embedder.proj_out", "adaln_t_table"),
    optional_description="how times are embedded: computed, or the table of a pruned file",
    version_prefixes=("minimax_h3", "minimax-h3", "minimaxh3"),
    # for the blocks over all tokens, in which all heads together have 4/3 of the token width
    relative_sizes=(
        (".attn.qkv_proj", 4, 1),
        (".attn.out_proj", 1, 4 / 3),
        (".mlp.fc1", 16 / 3, 1),
        (".mlp.fc2", 1, 8 / 3),
    ),
    released_sizes=((5376, (("blocks", 50),)),),
    optimizer_numbering=(("token_refiner.blocks.{n}.", _ORDER), ("blocks.{n}.", _ORDER)),
    network_module="networks.lora_minimax_h3",
    more_diffusers_prefixes=("transformer_ref.",),
    # DiffSynth-Studio trains the release's shards unchanged. Source: diffusers' loader of H3's LoRAs
    rows_by_head=RowsByHead(r"\.lora_[AB]\.default\.", ".attn.qkv_proj", ".attn.q_norm", HEAD_WIDTH),
    rejects_unknown_names=True,
)
LORA = (MINIMAX_H3,)
MARKS: Marks = (
    ("adaln_t_table", "a pruned MiniMax-H3 transformer (--dit)"),
    ("video_patch_proj.weight", "a MiniMax-H3 transformer (--dit)"),
    ("audio_proj_in.weight", "a MiniMax-H3 transformer in diffusers layout (--dit)"),
    ("decoder.proj_out.weight", "MiniMax-H3's video VAE (--video_vae)"),
    ("encoder.block.0.weight_g", "MiniMax-H3's audio VAE (--audio_vae)"),
)
