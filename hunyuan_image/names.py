"""HunyuanImage-2.1's names: scripts, modules in LoRA files, and tensors that identify its files."""

from hunyuan_model.names import BLOCK_ALIASES, BLOCK_DEPTHS, BLOCK_NUMBERS, BLOCK_PARTS, BLOCK_SIDES
from networks.names.layouts import FamilyNames, LoraRules, renamed_parts
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "hunyuan_image",
    script="hunyuan_image",
    cache="hunyuan_image_cache",
    record="HunyuanImage",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN_FILE --byt5 BYT5_FILE",
    training=("--network_train_unet_only",),
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
    underscored_in_comfyui=True,
    converted_for="ComfyUI",
    version_prefixes=("hunyuan-image", "hunyuan_image", "hunyuanimage"),
    relative_sizes=BLOCK_SIDES,
    released_sizes=((3584, BLOCK_DEPTHS),),
    optimizer_numbering=BLOCK_NUMBERS,
    network_module="networks.lora_hunyuan_image",
    rules=LoraRules(num_fused_parts={"attn_qkv": 3, "linear1": 4}),
)

LORA = (HUNYUAN_IMAGE,)
MARKS: Marks = (
    ("encoder.down.4.downsample.conv.weight", "the VAE of HunyuanImage-2.1 (--vae)"),
    ("byt5_in.fc1.weight", "a HunyuanImage 2.1 transformer"),
)
