"""Names of Kandinsky 5 and 6: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames, with_endings
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "kandinsky",
    script="kandinsky",
    cache="kandinsky_cache",
    makes="video",
    record="Kandinsky",
    texts="--text_encoder_qwen QWEN_FILE --text_encoder_clip CLIP_FILE",
    further_models=("kandinsky_6",),
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
# Kandinsky 6: our names are the maker's and ComfyUI's; diffusers has other ones
_STREAMS = (("video", "videoT", "video_dec_block"), ("audio", "audioT", "audio_dec_block"))
_FEED_6 = (
    ("feed_forward.net.0.proj", "feed_forward.in_layer"),
    ("feed_forward.net.2", "feed_forward.out_layer"),
)
_NORMS = ("query_norm", "key_norm")
_TIMES = (("timestep_embedder.linear_1", "in_layer"), ("timestep_embedder.linear_2", "out_layer"))


def _list_text_layers(stream: str) -> tuple[tuple[str, str], ...]:
    """Return (diffusers' path, our path) of the layers of a stream's text blocks."""
    start = f"{stream}_text_transformer_blocks.{{n}}."
    return (
        *((f"{start}attn.{name}", f"{start}self_attention.{name}") for name in (*_ATTENTION, *_NORMS)),
        *((start + theirs, start + ours) for theirs, ours in _FEED_6),
        (f"{start}text_modulation.out_layer",) * 2,
    )


def _list_block_layers() -> tuple[tuple[str, str], ...]:
    """Return (diffusers' path, our path) of the layers of the blocks of both streams."""
    paths: list[tuple[str, str]] = []
    for _, ours, theirs in _STREAMS:
        for attention in ("self_attention", "cross_attention"):
            for name in (*_ATTENTION, *_NORMS):
                paths.append((f"{theirs}.{attention}.{name}", f"{ours}.{attention}.{name}"))
        paths += [(f"{theirs}.{one}", f"{ours}.{two}") for one, two in _FEED_6]
        paths.append((f"{theirs}.visual_modulation.out_layer", f"{ours}.visual_modulation.out_layer"))
    for between in ("va", "av"):
        paths += [(f"{between}_cross_attention.{name}",) * 2 for name in (*_ATTENTION, *_NORMS)]
        paths.append((f"{between}_modulation.out_layer",) * 2)
    return tuple(
        (f"visual_transformer_blocks.{{n}}.{one}", f"visual_blocks.{{n}}.{two}") for one, two in paths
    )


KANDINSKY_6 = FamilyNames(
    "kandinsky_6",
    "Kandinsky-6",
    aliases=(
        *_list_block_layers(),
        *_list_text_layers("video"),
        *_list_text_layers("audio"),
        *(
            (f"{stream}_time_embeddings.{theirs}", f"{stream}_time_embeddings.{ours}")
            for stream, *_ in _STREAMS
            for theirs, ours in _TIMES
        ),
        *(
            (f"{stream}_{layer}",) * 2
            for stream, *_ in _STREAMS
            for layer in with_endings("", "text_embeddings.in_layer text_embeddings.norm")
            + with_endings("", "pooled_text_embeddings.in_layer pooled_text_embeddings.norm")
        ),
        *(
            (layer, layer)
            for layer in with_endings(
                "", "visual_embeddings.in_layer audio_embeddings.in_layer audio_embeddings.norm"
            )
            + with_endings("out_layer.", "modulation.out_layer out_layer")
        ),
        *(
            (f"audio_out_layer.{layer}", f"audio_outLayer.{layer}")
            for layer in ("modulation.out_layer", "out_layer")
        ),
        ("visual_token_type_embeddings",) * 2,
    ),
    optional_paths=("visual_token_type_embeddings",),
    optional_description="the types of tokens, which a file for clips from text alone lacks",
    converted_for="diffusers",
    version_prefixes=("kandinsky6", "k6-", "k6_"),
    released_sizes=(
        *((1792, (("visual_blocks", 32), ("video_text_transformer_blocks", 2))),),
        *((4096, (("visual_blocks", 60), ("video_text_transformer_blocks", 4))),),
    ),
    optimizer_numbering=tuple(
        (start, " ".join(path.removeprefix(start) for path in paths))
        for start, paths in (
            *(
                (
                    f"{stream}_text_transformer_blocks.{{n}}.",
                    [
                        ours
                        for _, ours in _list_text_layers(stream)
                        if not ours.endswith(("_norm", "modulation.out_layer"))
                    ],
                )
                for stream, *_ in _STREAMS
            ),
            (
                "visual_blocks.{n}.",
                [
                    ours
                    for _, ours in _list_block_layers()
                    if not ours.endswith(("_norm", "modulation.out_layer"))
                ],
            ),
        )
    ),
    network_module="networks.lora_kandinsky",
)
LORA = (KANDINSKY, KANDINSKY_6)
MARKS: Marks = (
    (
        "audio_pooled_text_embeddings.in_layer.weight",
        "a Kandinsky 6 transformer (kandinsky_*.py, --dit)",
    ),
    (
        "visual_transformer_blocks.0.cross_attention.to_query.weight",
        "a Kandinsky 5 transformer (kandinsky_*.py, --dit)",
    ),
)
