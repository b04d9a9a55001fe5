"""FLUX.2's names: scripts, modules in LoRA files, and tensors that identify its files."""

from flux.names import FLUX_NORMS, FLUX_NUMBERS, FLUX_QKV
from networks.names import layouts
from networks.names.layouts import FamilyNames, WeightPart, renamed_parts
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "flux_2",
    script="flux_2",
    cache="flux_2_cache",
    record="Flux2",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder TEXT_ENCODER_FILE",
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
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("proj_out", "final_layer.linear"),
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
        *FLUX_QKV,
        *renamed_parts("transformer_blocks.{n}.", "double_blocks.{n}.", _FLUX_2_DOUBLE),
        *renamed_parts(
            "single_transformer_blocks.{n}.attn.",
            "single_blocks.{n}.",
            (("to_qkv_mlp_proj", "linear1"), ("to_out", "linear2")),
        ),
        *renamed_parts("", "", _FLUX_2_REST),
        WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", layouts.SWAPPED),
    ),
    parameters=FLUX_NORMS,
    version_prefixes=("flux_2", "flux-2", "flux2", "flux.2"),
    kinds_in_diffusers=("LoKr",),
    relative_sizes=(
        ("_attn.qkv", 3, 1),
        ("_attn.proj", 1, 1),
        ("_mlp.0", 6, 1),
        ("_mlp.2", 1, 3),
        (".linear1", 9, 1),
        (".linear2", 1, 4),
    ),
    released_sizes=tuple(  # dev, klein 9B, klein 4B
        (width, (("double_blocks", double), ("single_blocks", single)))
        for width, double, single in ((6144, 8, 48), (4096, 8, 24), (3072, 5, 20))
    ),
    optimizer_numbering=FLUX_NUMBERS,
    network_module="networks.lora_flux_2",
)

LORA = (FLUX_2,)
MARKS: Marks = (
    ("bn.running_mean", "the autoencoder of FLUX.2 (--vae)"),
    ("double_stream_modulation_img.lin.weight", "a FLUX.2 transformer (--dit)"),
    ("double_stream_modulation_img.linear.weight", "a FLUX.2 transformer in diffusers layout (--dit)"),
)
