"""Names of FLUX.1 and Chroma: scripts, modules in LoRA files, and tensors that identify files."""

from hunyuan_model.names import LINEAR1_PARTS
from networks.names import layouts
from networks.names.layouts import (
    FamilyNames,
    LoraRules,
    Numbering,
    WeightPart,
    in_both_streams,
    renamed_parts,
    stacked_parts,
)
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "flux",
    script="flux",
    cache="flux_cache",
    record="Flux",
    encoders=(("vae", "--ae", IMAGES),),
    texts="--t5xxl T5_FILE --clip_l CLIP_FILE",
    further_models=("chroma",),
)

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
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("proj_out", "final_layer.linear"),
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
FLUX_NORMS = tuple(
    (f"{theirs}{x}.weight", f"{ours}.norm.{word}_norm.scale")
    for theirs, ours in (
        ("transformer_blocks.{n}.attn.norm_", "double_blocks.{n}.img_attn"),
        ("transformer_blocks.{n}.attn.norm_added_", "double_blocks.{n}.txt_attn"),
        ("single_transformer_blocks.{n}.attn.norm_", "single_blocks.{n}"),
    )
    for x, word in (("q", "query"), ("k", "key"))
)
FLUX_QKV = (
    *stacked_parts("transformer_blocks.{n}.attn.to_{x}", "double_blocks.{n}.img_attn.qkv"),
    *stacked_parts("transformer_blocks.{n}.attn.add_{x}_proj", "double_blocks.{n}.txt_attn.qkv"),
)
FLUX_NUMBERS: Numbering = (
    ("double_blocks.{n}.", in_both_streams("{x}_mod.lin {x}_attn.qkv {x}_attn.proj {x}_mlp.0 {x}_mlp.2")),
    ("single_blocks.{n}.", "linear1 linear2 modulation.lin"),
)

_IN_BLOCKS = ("double_blocks.", "single_blocks.")
_RULES = LoraRules(
    rank_arguments=(
        *(
            (f"{stream}_{kind}_dim", ((f"{stream}_{kind}",),))
            for kind in ("attn", "mlp", "mod")
            for stream in ("img", "txt")
        ),
        ("single_dim", (("single_blocks", "linear"),)),
        ("single_mod_dim", (("single_blocks", "modulation"),)),
    ),
    train_blocks_choices={"all": _IN_BLOCKS, "double": _IN_BLOCKS[:1], "single": _IN_BLOCKS[1:]},
    block_lists_by_argument={
        "train_double_block_indices": "double_blocks",
        "train_single_block_indices": "single_blocks",
    },
    outside_ranks_argument="in_dims",
    outside_paths=("img_in", "time_in", "vector_in", "guidance_in", "txt_in"),
    num_fused_parts={"attn.qkv": 3, "linear1": 4},
    encoder_switches={"train_t5xxl": "lora_te3"},
)

FLUX = FamilyNames(
    "flux",
    "flux-1-dev",
    parts=(
        *FLUX_QKV,
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
    path_prefix=layouts.IN_DIFFUSERS,
    parameters=(
        *FLUX_NORMS,
        ("distilled_guidance_layer.norms.{n}.weight", "distilled_guidance_layer.norms.{n}.scale"),
    ),
    version_prefixes=("flux", "chroma"),
    texts_in_diffusers=("lora_te1",),
    relative_sizes=(
        ("_attn.qkv", 3, 1),
        ("_attn.proj", 1, 1),
        ("_mlp.0", 4, 1),
        ("_mlp.2", 1, 4),
        ("_mod.lin", 6, 1),
        (".modulation.lin", 3, 1),
        (".linear1", 7, 1),
        (".linear2", 1, 5),
    ),
    released_sizes=((3072, (("double_blocks", 19), ("single_blocks", 38))),),
    optimizer_numbering=(
        *FLUX_NUMBERS,
        ("", "img_in"),
        *((f"{name}.", "in_layer out_layer") for name in ("time_in", "vector_in", "guidance_in")),
        ("", "txt_in"),
    ),
    network_module="networks.lora_flux",
    rules=_RULES,
)

LORA = (FLUX,)
MARKS: Marks = (
    ("distilled_guidance_layer.in_proj.weight", "a Chroma transformer"),
    (
        "controlnet_x_embedder.weight",
        "a ControlNet in diffusers layout; one of FLUX.1 is for flux_train_network.py",
    ),
)
SHARED_MARKS: Marks = (("double_blocks.0.img_attn.qkv.weight", "a FLUX transformer"),)
