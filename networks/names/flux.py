"""Module names of FLUX.1 and Chroma, as Black Forest Labs publish them, and in diffusers' layout.

ComfyUI and sd-scripts use the published ones. Chroma has no modulation layers and no embedding of time,
pooled text and guidance, but `distilled_guidance_layer`; its other names are FLUX's.
"""

from networks.names.layouts import (
    IN_DIFFUSERS,
    REST,
    SWAPPED,
    FamilyNames,
    WeightPart,
    each,
    renamed_parts,
    stacked_parts,
)

_STREAMS = (("img", "norm1", "ff", "to_out.0"), ("txt", "norm1_context", "ff_context", "to_add_out"))
_DIFFUSERS_DOUBLE = tuple(
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
_DIFFUSERS_REST = (
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

FLUX = FamilyNames(
    "flux",
    "flux-1-dev",
    (
        *each("double_blocks.{n}.img_", "mod.lin attn.qkv attn.proj mlp.0 mlp.2"),
        *each("double_blocks.{n}.txt_", "mod.lin attn.qkv attn.proj mlp.0 mlp.2"),
        *each("single_blocks.{n}.", "linear1 linear2 modulation.lin"),
        *each("", "img_in txt_in"),
        *(f"{name}.{layer}" for _, name in _VECTORS for layer in ("in_layer", "out_layer")),
        *each("distilled_guidance_layer.", "in_proj out_proj layers.{n}.in_layer layers.{n}.out_layer"),
        *each("final_layer.", "linear adaLN_modulation.1"),
    ),
    parts=(
        *stacked_parts("transformer_blocks.{n}.attn.to_{x}", "double_blocks.{n}.img_attn.qkv"),
        *stacked_parts("transformer_blocks.{n}.attn.add_{x}_proj", "double_blocks.{n}.txt_attn.qkv"),
        *renamed_parts("transformer_blocks.{n}.", "double_blocks.{n}.", _DIFFUSERS_DOUBLE),
        *stacked_parts("single_transformer_blocks.{n}.attn.to_{x}", "single_blocks.{n}.linear1"),
        WeightPart(
            "single_transformer_blocks.{n}.proj_mlp", "single_blocks.{n}.linear1", REST, usual_height=4
        ),
        *renamed_parts(
            "single_transformer_blocks.{n}.",
            "single_blocks.{n}.",
            (("proj_out", "linear2"), ("norm.linear", "modulation.lin")),
        ),
        *renamed_parts("", "", _DIFFUSERS_REST),
        WeightPart("norm_out.linear", "final_layer.adaLN_modulation.1", SWAPPED),
    ),
    start=IN_DIFFUSERS,
    # of norms, whose only tensor is called `scale`
    parameters=(
        *(
            (
                f"transformer_blocks.{{n}}.attn.norm_{added}{x}.weight",
                f"double_blocks.{{n}}.{ours}_norm.scale",
            )
            for added, stream in (("", "img"), ("added_", "txt"))
            for x, ours in (("q", f"{stream}_attn.norm.query"), ("k", f"{stream}_attn.norm.key"))
        ),
        (
            "single_transformer_blocks.{n}.attn.norm_q.weight",
            "single_blocks.{n}.norm.query_norm.scale",
        ),
        ("single_transformer_blocks.{n}.attn.norm_k.weight", "single_blocks.{n}.norm.key_norm.scale"),
        ("distilled_guidance_layer.norms.{n}.weight", "distilled_guidance_layer.norms.{n}.scale"),
    ),
    versions=("flux", "chroma"),
    depths=(("transformer_blocks", 19), ("single_transformer_blocks", 38)),
    width=3072,
)
