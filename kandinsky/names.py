"""Kandinsky's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames, with_endings
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "kandinsky",
    script="kandinsky",
    cache="kandinsky_cache",
    makes="video",
    record="Kandinsky",
    texts="--text_encoder_qwen QWEN_FILE --text_encoder_clip CLIP_FILE",
)
_TEXT, _VISUAL = "text_transformer_blocks.{n}.", "visual_transformer_blocks.{n}."
_ATTENTION = ("to_query", "to_key", "to_value", "out_layer")
_FEED = "feed_forward.in_layer feed_forward.out_layer"
# in the order of registration
_TEXT_LAYERS = f"{' '.join(f'self_attention.{name}' for name in _ATTENTION)} {_FEED}"
_VISUAL_LAYERS = " ".join(
    (
        *(f"self_attention.{name}" for name in _ATTENTION),
        *(f"cross_attention.{name}" for name in _ATTENTION),
        _FEED,
    )
)
# our names are the released ones, which are those of diffusers and ComfyUI too
KANDINSKY = FamilyNames(
    "kandinsky",
    "Kandinsky-5",
    more_modules=(
        *with_endings(_VISUAL, _VISUAL_LAYERS),
        *with_endings(_TEXT, _TEXT_LAYERS),
        *with_endings(_VISUAL, "visual_modulation.out_layer"),
        *with_endings(_TEXT, "text_modulation.out_layer"),
        *with_endings(_VISUAL, "self_attention.query_norm self_attention.key_norm"),
        *with_endings(_VISUAL, "cross_attention.query_norm cross_attention.key_norm"),
        *with_endings(_TEXT, "self_attention.query_norm self_attention.key_norm"),
        *with_endings("", "time_embeddings.in_layer time_embeddings.out_layer"),
        *with_endings("", "text_embeddings.in_layer text_embeddings.norm"),
        *with_endings("", "pooled_text_embeddings.in_layer pooled_text_embeddings.norm"),
        *with_endings("", "visual_embeddings.in_layer out_layer.modulation.out_layer out_layer.out_layer"),
    ),
    is_as_in_diffusers=True,
    # diffusers knows no names with underscores
    converted_for="diffusers",
    version_prefixes=("kandinsky5", "k5-", "k5_"),
    relative_sizes=(
        *((f"attention.{name}", 1, 1) for name in _ATTENTION),
        (".feed_forward.in_layer", 4, 1),
        (".feed_forward.out_layer", 1, 4),
    ),
    released_sizes=(
        (1792, (("visual_transformer_blocks", 32), ("text_transformer_blocks", 2))),
        (4096, (("visual_transformer_blocks", 60), ("text_transformer_blocks", 4))),
        (2560, (("visual_transformer_blocks", 50), ("text_transformer_blocks", 2))),
    ),
    optimizer_numbering=((_TEXT, _TEXT_LAYERS), (_VISUAL, _VISUAL_LAYERS)),
    network_module="networks.lora_kandinsky",
)
LORA = (KANDINSKY,)
MARKS: Marks = (
    (
        "visual_transformer_blocks.0.cross_attention.to_query.weight",
        "a Kandinsky 5 transformer (kandinsky_*.py, --dit)",
    ),
)
