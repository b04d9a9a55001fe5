"""Fibo 2.0's names: scripts, modules in LoRA files, and tensors that identify its files."""

from lumina.names import LUMINA_SIDES
from networks.names.layouts import FamilyNames, WeightPart, stacked_parts, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "fibo_2",
    script="fibo_2",
    cache="fibo_2_cache",
    record="Fibo2",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_VL_FILE",
    same_latents="flux_2",
    captions="captions",
)
_BLOCKS = ("noise_refiner.{n}.", "layers.{n}.")
_PERCEIVER = "perceiver.layers.{n}."
_CROSSING = tuple(f"{block}cross_attention" for block in (_BLOCKS[1], _PERCEIVER))
_ATTENTIONS = (*(f"{block}attention" for block in _BLOCKS), f"{_PERCEIVER}self_attention", *_CROSSING)
_FEEDS = (*(f"{block}feed_forward" for block in _BLOCKS), f"{_PERCEIVER}ffn")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _in_comfyui(attention: str) -> tuple[tuple[str, str], ...]:
    """Return (name in ComfyUI, our name) of the attention layers that ComfyUI does not fuse."""
    out = "to_out" if "_attention" in attention else "out"
    norms = ((f"{attention}.{x}_norm", f"{attention}.norm_{x}") for x in "qk")
    return ((f"{attention}.{out}", f"{attention}.to_out.0"), *norms)


FIBO_2 = FamilyNames(
    "fibo_2",
    "Fibo-2.0",
    aliases=tuple(pair for attention in _ATTENTIONS for pair in _in_comfyui(attention)),
    joined=(
        *(
            part
            for block in _BLOCKS
            for part in stacked_parts(f"{block}attention.to_{{x}}", f"{block}attention.qkv")
        ),
        *(
            WeightPart(f"{attention}.to_{letter}", f"{attention}.to_kv", row)
            for attention in (*_CROSSING, f"{_PERCEIVER}self_attention")
            for row, letter in enumerate("kv")
        ),
        *(
            WeightPart(f"{feed}.{name}", f"{feed}.w13", row)
            for feed in _FEEDS
            for row, name in enumerate(("w1", "w3"))
        ),
    ),
    more_modules=(
        *(path for attention in _ATTENTIONS for path in with_endings(f"{attention}.", "to_q to_k to_v")),
        *(path for feed in _FEEDS for path in with_endings(f"{feed}.", "w1 w2 w3")),
        *(
            path
            for block in _BLOCKS
            for path in with_endings(
                block, "adaLN_modulation.0 attention_norm1 attention_norm2 ffn_norm1 ffn_norm2"
            )
        ),
        *with_endings(_BLOCKS[1], "cross_attn_norm1 cross_attn_norm2"),
        *with_endings(_PERCEIVER, "cross_attn_norm self_attn_norm ffn_norm"),
        *with_endings("", "x_embedder t_embedder.mlp.0 t_embedder.mlp.2 perceiver.norm_out"),
        *with_endings("final_layer.", "linear adaLN_modulation.1"),
    ),
    stacked_in_comfyui=True,
    converted_for="ComfyUI",
    kinds_in_diffusers=("LoKr",),
    is_as_in_diffusers=True,
    version_prefixes=("fibo_2", "fibo-2", "fibo 2", "fibo2"),
    relative_sizes=(
        *((f".attention.{name}", 1, 1) for name in _ATTENTION),
        *((f".cross_attention.to_{x}", 15 / 7, 1) for x in "kv"),
        *LUMINA_SIDES,
    ),
    released_sizes=((3584, (("layers", 44),)),),
    optimizer_numbering=tuple(
        (start, " ".join(endings))
        for start, endings in (
            *((f"{attention}.", _ATTENTION) for attention in _ATTENTIONS),
            *((f"{feed}.", ("w1", "w2", "w3")) for feed in _FEEDS),
        )
    ),
    network_module="networks.lora_fibo_2",
)
LORA = (FIBO_2,)
MARKS: Marks = (("perceiver.latent_queries", "a Fibo 2.0 transformer (fibo_2_*.py, --dit)"),)
