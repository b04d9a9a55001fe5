"""Module names of HunyuanImage-2.1, in ComfyUI's and in diffusers' layout; its blocks are HunyuanVideo's."""

from networks.names.hunyuan import BLOCK_ALIASES, BLOCK_MODULES, BLOCK_PARTS
from networks.names.layouts import FamilyNames, each, renamed_parts

_DIFFUSERS_REST = (
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
    (*BLOCK_MODULES, *each("byt5_in.", "layernorm fc1 fc2 fc3"), *each("time_r_in.mlp.", "0 2")),
    (*BLOCK_ALIASES, ("time_r_in.in_layer", "time_r_in.mlp.0"), ("time_r_in.out_layer", "time_r_in.mlp.2")),
    (
        *BLOCK_PARTS,
        *renamed_parts(
            "context_embedder.token_refiner.refiner_blocks.{n}.",
            "txt_in.individual_token_refiner.blocks.{n}.",
            (("norm1", "norm1"), ("norm2", "norm2")),
        ),
        *renamed_parts("", "", _DIFFUSERS_REST),
    ),
    underscored=True,
    converted_for="ComfyUI",
    versions=("hunyuan-image", "hunyuan_image", "hunyuanimage"),
    depths=(("transformer_blocks", 20), ("single_transformer_blocks", 40)),
    width=3584,
)
