"""The order in which known trainers number the modules of a LoRA, as states of their optimizers do.

Of each model (start, endings): all blocks of the first start, one after the other, then those of the next. It
is the order in which the trainer's network registers its layers. Source: lists of modules recorded with the
trainers (`tests/golden`), the published model code.
"""

Numbering = tuple[tuple[str, str], ...]

_STREAM_OF_FLUX = "{x}_mod.lin {x}_attn.qkv {x}_attn.proj {x}_mlp.0 {x}_mlp.2"
_STREAM_OF_HUNYUAN = "{x}_mod.linear {x}_attn_qkv {x}_attn_proj {x}_mlp.fc1 {x}_mlp.fc2"
_ATTENTION = "attn.to_q attn.to_k attn.to_v attn.add_k_proj attn.add_v_proj attn.add_q_proj attn.to_out.0"
_IN_LUMINA = "attention.qkv attention.out feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.1"
_IN_Z_IMAGE = (
    "attention.to_q attention.to_k attention.to_v attention.to_out.0 "
    "feed_forward.w1 feed_forward.w2 feed_forward.w3 adaLN_modulation.0"
)


def _both(endings: str) -> str:
    return " ".join(endings.replace("{x}", stream) for stream in ("img", "txt"))


_FLUX: Numbering = (
    ("double_blocks.{n}.", _both(_STREAM_OF_FLUX)),
    ("single_blocks.{n}.", "linear1 linear2 modulation.lin"),
)
_HUNYUAN: Numbering = (
    ("double_blocks.{n}.", _both(_STREAM_OF_HUNYUAN)),
    ("single_blocks.{n}.", "linear1 linear2 modulation.linear"),
)
_LTX_ATTENTION = "{x}.to_q {x}.to_k {x}.to_v {x}.to_gate_logits {x}.to_out.0"
_LTX_BLOCK = (
    *("attn1", "attn2", "ff", "audio_attn1", "audio_attn2", "audio_ff"),
    *("audio_to_video_attn", "video_to_audio_attn"),
)
# by `FamilyNames.name`
NUMBERED: dict[str, Numbering] = {
    "wan": (
        (
            "blocks.{n}.",
            "self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v "
            "cross_attn.o cross_attn.k_img cross_attn.v_img ffn.0 ffn.2",
        ),
    ),
    "hunyuan_video": _HUNYUAN,
    "hunyuan_image": _HUNYUAN,
    "framepack": (
        (
            "transformer_blocks.{n}.",
            f"norm1.linear norm1_context.linear {_ATTENTION} attn.to_add_out ff.net.0.proj ff.net.2 "
            "ff_context.net.0.proj ff_context.net.2",
        ),
        ("single_transformer_blocks.{n}.", "attn.to_q attn.to_k attn.to_v norm.linear proj_mlp proj_out"),
    ),
    "flux": (
        *_FLUX,
        ("", "img_in"),
        *((f"{name}.", "in_layer out_layer") for name in ("time_in", "vector_in", "guidance_in")),
        ("", "txt_in"),
    ),
    "flux_2": _FLUX,
    "ltx_2": (
        *((f"{prefix}caption_projection.", "linear_1 linear_2") for prefix in ("", "audio_")),
        (
            "transformer_blocks.{n}.",
            " ".join(
                f"{part}.net.0.proj {part}.net.2"
                if part.endswith("ff")
                else _LTX_ATTENTION.replace("{x}", part)
                for part in _LTX_BLOCK
            ),
        ),
    ),
    "lumina": (
        *((f"{name}.{{n}}.", _IN_LUMINA) for name in ("context_refiner", "noise_refiner", "layers")),
        ("final_layer.", "linear adaLN_modulation.1"),
        *(("", "x_embedder"), ("t_embedder.", "mlp.0 mlp.2"), ("cap_embedder.", "1")),
    ),
    "qwen_image": (
        (
            "transformer_blocks.{n}.",
            f"img_mod.1 {_ATTENTION} attn.to_add_out img_mlp.net.0.proj img_mlp.net.2 "
            "txt_mod.1 txt_mlp.net.0.proj txt_mlp.net.2",
        ),
    ),
    "z_image": tuple(
        (f"{name}.{{n}}.", _IN_Z_IMAGE) for name in ("noise_refiner", "context_refiner", "layers")
    ),
}
# text encoders, whose modules come before the transformer's: CLIP-L, T5, Gemma 2
TEXTS_NUMBERED: Numbering = (
    (
        "lora_te1.text_model.encoder.layers.{n}.",
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj mlp.fc1 mlp.fc2",
    ),
    (
        "lora_te3.encoder.block.{n}.",
        "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v layer.0.SelfAttention.o "
        "layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wi_1 layer.1.DenseReluDense.wo",
    ),
    (
        "lora_te.layers.{n}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
)
