"""Module names of the image models, as published, and in diffusers' layout."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, Sides, WeightPart, each, renamed_parts, stacked_parts
from networks.names.video import BLOCK_ALIASES, BLOCK_DEPTHS, BLOCK_PARTS, BLOCK_SIDES, LINEAR1_PARTS

# FLUX.1 and Chroma as Black Forest Labs publish them; ComfyUI and sd-scripts use these names. Chroma has no
# modulation layers and no embedding of time, pooled text and guidance, but `distilled_guidance_layer`; its
# other names are FLUX's.
_STREAMS = (("img", "norm1", "ff", "to_out.0"), ("txt", "norm1_context", "ff_context", "to_add_out"))
_FLUX_DOUBLE = tuple(
    pair
    for ours, modulation, mlp, out in _STREAMS
    for pair in (
        (f"{modulation}.linear", f"{ours}_mod.lin"),
        (f"attn.{out}", f"{ours}_attn.proj"),
        (f"{mlp}.net.0.proj", f"{ours}_mlp.0"),
        (f"{mlp}.net.2", f"{ours}_mlp.2"),
    )
)
_VECTORS = (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in"))
_FLUX_REST = (
    *(("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("proj_out", "final_layer.linear")),
    *(
        (f"time_text_embed.{theirs}_embedder.linear_{number}", f"{ours}.{layer}")
        for theirs, ours in _VECTORS
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    ),
    *((f"distilled_guidance_layer.{name}",) * 2 for name in ("in_proj", "out_proj")),
    ("distilled_guidance_layer.layers.{n}.linear_1", "distilled_guidance_layer.layers.{n}.in_layer"),
    ("distilled_guidance_layer.layers.{n}.linear_2", "distilled_guidance_layer.layers.{n}.out_layer"),
)
# what FLUX.2 has too; of norms the only tensor is called `scale`
_FLUX_NORMS = tuple(
    (f"{theirs}{x}.weight", f"{ours}.norm.{word}_norm.scale")
    for theirs, ours in (
        ("transformer_blocks.{n}.attn.norm_", "double_blocks.{n}.img_attn"),
        ("transformer_blocks.{n}.attn.norm_added_", "double_blocks.{n}.txt_attn"),
        ("single_transformer_blocks.{n}.attn.norm_", "single_blocks.{n}"),
    )
    for x, word in (("q", "query"), ("k", "key"))
)
_FLUX_QKV = (
    *stacked_parts("transformer_blocks.{n}.attn.to_{x}", "double_blocks.{n}.img_attn.qkv"),
    *stacked_parts("transformer_blocks.{n}.attn.add_{x}_proj", "double_blocks.{n}.txt_attn.qkv"),
)

FLUX = FamilyNames(
    "flux",
    "flux-1-dev",
    parts=(
        *_FLUX_QKV,
        *renamed_parts("transformer_blocks.{n}.", "double_blocks.{n}.", _FLUX_DOUBLE),
        *LINEAR1_PARTS,
        *renamed_parts(
            "single_transformer_blocks.{n}.",
            "single_blocks.{n}.",
            (("proj_out", "linear2"), ("norm.linear", "modulation.lin")),
        ),
        *renamed_parts("", "", _FLUX_REST),
        WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", layouts.SWAPPED),
    ),
    start=layouts.IN_DIFFUSERS,
    parameters=(
        *_FLUX_NORMS,
        ("distilled_guidance_layer.norms.{n}.weight", "distilled_guidance_layer.norms.{n}.scale"),
    ),
    versions=("flux", "chroma"),
    sides=(
        *(("_attn.qkv", 3, 1), ("_attn.proj", 1, 1), ("_mlp.0", 4, 1), ("_mlp.2", 1, 4)),
        *(("_mod.lin", 6, 1), (".modulation.lin", 3, 1), (".linear1", 7, 1), (".linear2", 1, 5)),
    ),
    released=((3072, (("double_blocks", 19), ("single_blocks", 38))),),
)

# FLUX.2 as Black Forest Labs publish it, which ComfyUI has too
_FLUX_2_DOUBLE = tuple(
    pair
    for ours, mlp, out in (("img", "ff", "to_out.0"), ("txt", "ff_context", "to_add_out"))
    for pair in (
        (f"attn.{out}", f"{ours}_attn.proj"),
        (f"{mlp}.linear_in", f"{ours}_mlp.0"),
        (f"{mlp}.linear_out", f"{ours}_mlp.2"),
    )
)
_FLUX_2_REST = (
    *(("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("proj_out", "final_layer.linear")),
    *(
        (f"{name}_modulation{end}.linear", f"{name}_modulation{end}.lin")
        for name, end in (("double_stream", "_img"), ("double_stream", "_txt"), ("single_stream", ""))
    ),
    *(
        (f"time_guidance_embed.{theirs}_embedder.linear_{number}", f"{ours}.{layer}")
        for theirs, ours in (("timestep", "time_in"), ("guidance", "guidance_in"))
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    ),
)

FLUX_2 = FamilyNames(
    "flux_2",
    "flux-2",
    parts=(
        *_FLUX_QKV,
        *renamed_parts("transformer_blocks.{n}.", "double_blocks.{n}.", _FLUX_2_DOUBLE),
        *renamed_parts(
            "single_transformer_blocks.{n}.attn.",
            "single_blocks.{n}.",
            (("to_qkv_mlp_proj", "linear1"), ("to_out", "linear2")),
        ),
        *renamed_parts("", "", _FLUX_2_REST),
        WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", layouts.SWAPPED),
    ),
    parameters=_FLUX_NORMS,
    versions=("flux_2", "flux-2", "flux2", "flux.2"),
    lokr_in_diffusers=True,
    sides=(
        *(("_attn.qkv", 3, 1), ("_attn.proj", 1, 1), ("_mlp.0", 6, 1), ("_mlp.2", 1, 3)),
        *((".linear1", 9, 1), (".linear2", 1, 4)),
    ),
    released=tuple(  # dev, klein 9B, klein 4B
        (width, (("double_blocks", double), ("single_blocks", single)))
        for width, double, single in ((6144, 8, 48), (4096, 8, 24), (3072, 5, 20))
    ),
)

# HunyuanImage-2.1, whose blocks are HunyuanVideo's
_HUNYUAN_REST = (
    ("x_embedder.proj", "img_in.proj"),
    ("proj_out", "final_layer.linear"),
    ("context_embedder_2.norm", "byt5_in.layernorm"),
    *((f"context_embedder_2.linear_{number}", f"byt5_in.fc{number}") for number in (1, 2, 3)),
    *(
        (f"time_guidance_embed.{theirs}.linear_{number}", f"{ours}.mlp.{layer}")
        for theirs, ours in (
            ("timestep_embedder", "time_in"),
            ("timestep_embedder_r", "time_r_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for number, layer in ((1, 0), (2, 2))
    ),
)

HUNYUAN_IMAGE = FamilyNames(
    "hunyuan_image",
    "hunyuan-image-2.1",
    (*BLOCK_ALIASES, ("time_r_in.in_layer", "time_r_in.mlp.0"), ("time_r_in.out_layer", "time_r_in.mlp.2")),
    (
        *BLOCK_PARTS,
        *renamed_parts(
            "context_embedder.token_refiner.refiner_blocks.{n}.",
            "txt_in.individual_token_refiner.blocks.{n}.",
            (("norm1", "norm1"), ("norm2", "norm2")),
        ),
        *renamed_parts("", "", _HUNYUAN_REST),
    ),
    underscored=True,
    converted_for="ComfyUI",
    versions=("hunyuan-image", "hunyuan_image", "hunyuanimage"),
    sides=BLOCK_SIDES,
    released=((3584, BLOCK_DEPTHS),),
)

# Lumina-Image-2.0 (NextDiT)
_LUMINA_BLOCKS = ("noise_refiner.{n}.", "context_refiner.{n}.", "layers.{n}.")
_LUMINA_BLOCK = (
    ("attn.to_out.0", "attention.out"),
    *((f"attn.norm_{x}", f"attention.{x}_norm") for x in "qk"),
    *((f"feed_forward.linear_{number}", f"feed_forward.w{number}") for number in (1, 2, 3)),
    ("norm2", "attention_norm2"),
    *(("ffn_norm1", "ffn_norm1"), ("ffn_norm2", "ffn_norm2")),
)
_LUMINA_MODULATED = (("norm1.linear", "adaLN_modulation.1"), ("norm1.norm", "attention_norm1"))
_LUMINA_SIDES: Sides = ((".w1", 0, 1), (".w2", 1, 0), (".w3", 0, 1))
_LUMINA_REST = (
    ("x_embedder", "x_embedder"),
    *(
        (f"time_caption_embed.timestep_embedder.linear_{number}", f"t_embedder.mlp.{layer}")
        for number, layer in ((1, 0), (2, 2))
    ),
    *((f"time_caption_embed.caption_embedder.{layer}", f"cap_embedder.{layer}") for layer in (0, 1)),
    *(("norm_out.linear_1", "final_layer.adaLN_modulation.1"), ("norm_out.linear_2", "final_layer.linear")),
)

LUMINA = FamilyNames(
    "lumina",
    "lumina-2",
    parts=(
        # several queries share one key and value: k and v are the last rows, q all before them
        *(
            WeightPart(f"{block}attn.to_{x}", f"{block}attention.qkv", index, usual_height)
            for block in _LUMINA_BLOCKS
            for x, index, usual_height in (("q", 0, 3), ("k", layouts.BEFORE_REST, 1), ("v", layouts.REST, 1))
        ),
        *(part for block in _LUMINA_BLOCKS for part in renamed_parts(block, block, _LUMINA_BLOCK)),
        *renamed_parts(_LUMINA_BLOCKS[0], _LUMINA_BLOCKS[0], _LUMINA_MODULATED),
        WeightPart(f"{_LUMINA_BLOCKS[1]}norm1", f"{_LUMINA_BLOCKS[1]}attention_norm1"),
        *renamed_parts(_LUMINA_BLOCKS[2], _LUMINA_BLOCKS[2], _LUMINA_MODULATED),
        *renamed_parts("", "", _LUMINA_REST),
    ),
    versions=("lumina2", "lumina-2", "lumina-image-2"),
    encoders=(("lora_te", layouts.OF_LANGUAGE_MODEL),),
    sides=((".qkv", 5 / 3, 1), (".out", 1, 1), *_LUMINA_SIDES),
    released=((2304, (("layers", 26),)),),
)

# Qwen-Image, whose own layout is that of diffusers
QWEN_IMAGE = FamilyNames(
    "qwen_image",
    "Qwen-Image",
    further=(
        *each(
            "transformer_blocks.{n}.attn.",
            "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out",
        ),
        *each("transformer_blocks.{n}.attn.", "norm_q norm_k norm_added_q norm_added_k"),
        *each(
            "transformer_blocks.{n}.",
            "img_mod.1 txt_mod.1 img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2",
        ),
        *each("", "img_in txt_in txt_norm norm_out.linear proj_out"),
        *each("time_text_embed.timestep_embedder.", "linear_1 linear_2"),
    ),
    is_as_in_diffusers=True,
    versions=("qwen_image", "qwen-image", "qwenimage"),
    sides=(*layouts.IN_TWO_STREAMS, ("_mod.1", 6, 1)),
    released=((3072, (("transformer_blocks", 60),)),),
)

# Z-Image, whose own layout is that of diffusers; ComfyUI has queries, keys and values in one
Z_IMAGE = FamilyNames(
    "z_image",
    "Z-Image",
    (
        *(
            (f"{block}attention.{theirs}", f"{block}attention.{ours}")
            for block in _LUMINA_BLOCKS
            for theirs, ours in (("out", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))
        ),
        ("x_embedder", "all_x_embedder.2-1"),
        *(
            (f"final_layer.{part}", f"all_final_layer.2-1.{part}")
            for part in ("linear", "adaLN_modulation.1")
        ),
    ),
    joined=tuple(
        part
        for block in _LUMINA_BLOCKS
        for part in stacked_parts(f"{block}attention.to_{{x}}", f"{block}attention.qkv")
    ),
    further=(
        *(
            path
            for block in _LUMINA_BLOCKS
            for path in each(
                block,
                "attention.to_q attention.to_k attention.to_v feed_forward.w1 feed_forward.w2 "
                "feed_forward.w3 attention_norm1 attention_norm2 ffn_norm1 ffn_norm2",
            )
        ),
        *(f"{block}adaLN_modulation.0" for block in (_LUMINA_BLOCKS[0], _LUMINA_BLOCKS[2])),
        *each("", "t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1"),
    ),
    converted_for="ComfyUI",
    lokr_in_diffusers=True,
    is_as_in_diffusers=True,
    versions=("z_image", "z-image", "zimage"),
    sides=((".qkv", 3, 1), *((f".to_{x}", 1, 1) for x in ("q", "k", "v", "out.0")), *_LUMINA_SIDES),
    released=((3840, (("layers", 30),)),),
)
