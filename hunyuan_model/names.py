"""HunyuanVideo's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import (
    FamilyNames,
    Numbering,
    Sides,
    WeightPart,
    in_both_streams,
    renamed_parts,
    stacked_parts,
    with_endings,
)
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "hunyuan_model",
    script="hv",
    cache="cache",
    makes="video",
    record="Hunyuan",
    texts="--text_encoder1 TEXT_ENCODER1_FILE --text_encoder2 TEXT_ENCODER2_FILE",
)

# HunyuanVideo and SkyReels V1. `BLOCK_...`: of its blocks and its text refiner, which HunyuanImage has too
DIFFUSERS_DOUBLE = (
    ("norm1.linear", "img_mod.linear"),
    ("norm1_context.linear", "txt_mod.linear"),
    ("attn.to_out.0", "img_attn_proj"),
    ("attn.to_add_out", "txt_attn_proj"),
    ("attn.norm_q", "img_attn_q_norm"),
    ("attn.norm_k", "img_attn_k_norm"),
    ("attn.norm_added_q", "txt_attn_q_norm"),
    ("attn.norm_added_k", "txt_attn_k_norm"),
    ("ff.net.0.proj", "img_mlp.fc1"),
    ("ff.net.2", "img_mlp.fc2"),
    ("ff_context.net.0.proj", "txt_mlp.fc1"),
    ("ff_context.net.2", "txt_mlp.fc2"),
)
_DIFFUSERS_SINGLE = (
    ("proj_out", "linear2"),
    ("norm.linear", "modulation.linear"),
    ("attn.norm_q", "q_norm"),
    ("attn.norm_k", "k_norm"),
)
DIFFUSERS_REFINER = (
    ("attn.to_out.0", "self_attn_proj"),
    ("norm_out.linear", "adaLN_modulation.1"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
)
DIFFUSERS_TEXT = (
    ("proj_in", "input_embedder"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "c_embedder.linear_1"),
    ("time_text_embed.text_embedder.linear_2", "c_embedder.linear_2"),
)
_VECTORS = (
    ("timestep", "time_in.mlp.0", "time_in.mlp.2"),
    ("guidance", "guidance_in.mlp.0", "guidance_in.mlp.2"),
)
_DIFFUSERS_REST = (
    ("x_embedder.proj", "img_in.proj"),
    ("proj_out", "final_layer.linear"),
    *(
        (f"time_text_embed.{vector}_embedder.linear_{number}", ours)
        for vector, *both in (*_VECTORS, ("text", "vector_in.in_layer", "vector_in.out_layer"))
        for number, ours in enumerate(both, 1)
    ),
)

# ComfyUI's names where they differ in more than "." for "_"
_REFINER = "txt_in.individual_token_refiner.blocks.{n}"
BLOCK_ALIASES = (
    *(
        (f"{mlp}.{theirs}", f"{mlp}.{ours}")
        for mlp in ("double_blocks.{n}.img_mlp", "double_blocks.{n}.txt_mlp", f"{_REFINER}.mlp")
        for theirs, ours in (("0", "fc1"), ("2", "fc2"))
    ),
    *(
        (f"{name}.lin", f"{name}.linear")
        for name in ("double_blocks.{n}.img_mod", "double_blocks.{n}.txt_mod", "single_blocks.{n}.modulation")
    ),
    ("txt_in.c_embedder.in_layer", "txt_in.c_embedder.linear_1"),
    ("txt_in.c_embedder.out_layer", "txt_in.c_embedder.linear_2"),
    *((f"{name}.in_layer", f"{name}.mlp.0") for name in ("txt_in.t_embedder", "time_in", "guidance_in")),
    *((f"{name}.out_layer", f"{name}.mlp.2") for name in ("txt_in.t_embedder", "time_in", "guidance_in")),
)
# diffusers layout; FLUX.1's single blocks have the first of them too
_LINEAR1 = "single_blocks.{n}.linear1"
LINEAR1_PARTS = (
    *stacked_parts("single_transformer_blocks.{n}.attn.to_{x}", _LINEAR1),
    WeightPart("single_transformer_blocks.{n}.proj_mlp", _LINEAR1, layouts.REST, relative_rows=4),
)
BLOCK_PARTS = (
    *stacked_parts("transformer_blocks.{n}.attn.to_{x}", "double_blocks.{n}.img_attn_qkv"),
    *stacked_parts("transformer_blocks.{n}.attn.add_{x}_proj", "double_blocks.{n}.txt_attn_qkv"),
    *renamed_parts("transformer_blocks.{n}.", "double_blocks.{n}.", DIFFUSERS_DOUBLE),
    *LINEAR1_PARTS,
    *renamed_parts("single_transformer_blocks.{n}.", "single_blocks.{n}.", _DIFFUSERS_SINGLE),
    *stacked_parts(
        "context_embedder.token_refiner.refiner_blocks.{n}.attn.to_{x}",
        "txt_in.individual_token_refiner.blocks.{n}.self_attn_qkv",
    ),
    *renamed_parts(
        "context_embedder.token_refiner.refiner_blocks.{n}.",
        "txt_in.individual_token_refiner.blocks.{n}.",
        DIFFUSERS_REFINER,
    ),
    *renamed_parts("context_embedder.", "txt_in.", DIFFUSERS_TEXT),
    WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", layouts.SWAPPED),
)
BLOCK_SIDES: Sides = (
    ("_attn_qkv", 3, 1),
    ("_attn_proj", 1, 1),
    ("mlp.fc1", 4, 1),
    ("mlp.fc2", 1, 4),
    ("_mod.linear", 6, 1),
    (".modulation.linear", 3, 1),
    (".linear1", 7, 1),
    (".linear2", 1, 5),
)
BLOCK_DEPTHS = (("double_blocks", 20), ("single_blocks", 40))
# tensors of a whole model as ComfyUI repackages it -> the published ones. Source: files of Comfy-Org.
COMFYUI_TENSORS = (
    (r"(time_in|guidance_in|txt_in\.t_embedder)\.in_layer\.(\w+)", r"\1.mlp.0.\2"),
    (r"(time_in|guidance_in|txt_in\.t_embedder)\.out_layer\.(\w+)", r"\1.mlp.2.\2"),
    (r"txt_in\.c_embedder\.in_layer\.(\w+)", r"txt_in.c_embedder.linear_1.\1"),
    (r"txt_in\.c_embedder\.out_layer\.(\w+)", r"txt_in.c_embedder.linear_2.\1"),
    (r"(.+\.(?:img|txt|self)_attn)\.(qkv|proj)\.(\w+)", r"\1_\2.\3"),
    (r"(.+\.(?:img|txt)_attn)\.norm\.query_norm\.(?:scale|weight)", r"\1_q_norm.weight"),
    (r"(.+\.(?:img|txt)_attn)\.norm\.key_norm\.(?:scale|weight)", r"\1_k_norm.weight"),
    (r"(single_blocks\.\d+)\.norm\.query_norm\.(?:scale|weight)", r"\1.q_norm.weight"),
    (r"(single_blocks\.\d+)\.norm\.key_norm\.(?:scale|weight)", r"\1.k_norm.weight"),
    (r"(.+\.(?:img_|txt_|)mlp)\.0\.(\w+)", r"\1.fc1.\2"),
    (r"(.+\.(?:img_|txt_|)mlp)\.2\.(\w+)", r"\1.fc2.\2"),
    (r"(.+\.(?:img_mod|txt_mod|modulation))\.lin\.(\w+)", r"\1.linear.\2"),
)
BLOCK_NUMBERS: Numbering = (
    (
        "double_blocks.{n}.",
        in_both_streams("{x}_mod.linear {x}_attn_qkv {x}_attn_proj {x}_mlp.fc1 {x}_mlp.fc2"),
    ),
    ("single_blocks.{n}.", "linear1 linear2 modulation.linear"),
)

HUNYUAN_VIDEO = FamilyNames(
    "hunyuan_video",
    "hunyuan-video",
    BLOCK_ALIASES,
    (*BLOCK_PARTS, *renamed_parts("", "", _DIFFUSERS_REST)),
    more_modules=with_endings("txt_in.individual_token_refiner.blocks.{n}.", "norm1 norm2"),
    converted_for="ComfyUI",
    relative_sizes=BLOCK_SIDES,
    released_sizes=((3072, BLOCK_DEPTHS),),
    optimizer_numbering=BLOCK_NUMBERS,
    network_module="networks.lora_hunyuan",
)

LORA = (HUNYUAN_VIDEO,)
MARKS: Marks = ()
SHARED_MARKS: Marks = (
    ("encoder.conv_in.conv.weight", "the HunyuanVideo VAE"),
    ("double_blocks.0.img_attn_qkv.weight", "a HunyuanVideo transformer"),
    ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "a HunyuanVideo transformer"),
)
