"""Module names of HunyuanVideo and SkyReels V1, in ComfyUI's and in diffusers' layout."""

from networks.names.layouts import REST, SWAPPED, FamilyNames, WeightPart, each


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
        *each(
            "double_blocks.{n}.img_", "attn_qkv attn_proj mlp.fc1 mlp.fc2 mod.linear attn_q_norm attn_k_norm"
        ),
        *each(
            "double_blocks.{n}.txt_", "attn_qkv attn_proj mlp.fc1 mlp.fc2 mod.linear attn_q_norm attn_k_norm"
        ),
        *each("single_blocks.{n}.", "linear1 linear2 modulation.linear q_norm k_norm"),
        *each(
            "txt_in.individual_token_refiner.blocks.{n}.",
            "self_attn_qkv self_attn_proj mlp.fc1 mlp.fc2 adaLN_modulation.1",
        ),
        *each(
            "txt_in.",
            "input_embedder t_embedder.mlp.0 t_embedder.mlp.2 c_embedder.linear_1 c_embedder.linear_2",
        ),
        *each(
            "",
            "img_in.proj time_in.mlp.0 time_in.mlp.2 guidance_in.mlp.0 guidance_in.mlp.2 vector_in.in_layer "
            "vector_in.out_layer",
        ),
        *each("final_layer.", "linear adaLN_modulation.1"),
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
