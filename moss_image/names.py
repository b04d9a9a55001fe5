"""MOSS-Image's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, LoraRules, WeightPart, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "moss_image",
    script="moss_image",
    cache="moss_image_cache",
    record="MossImage",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_5_FILE",
    same_latents="flux_2",
)
_BLOCK = "layers.{n}."
_PROJECTIONS = "proj.q proj.k proj.v proj.o proj.ffn_up_gate proj.ffn_down"  # in the order of registration
_REFINER = "text_embedder.blocks.{n}."
_NORMS = "norm1 norm2 q_norm k_norm"
MOSS_IMAGE = FamilyNames(
    "moss_image",
    "MOSS-Image",
    # Comfy-Org's files stack them
    joined=tuple(
        WeightPart(f"{_BLOCK}proj.{letter}", f"{_BLOCK}proj.qkv", index) for index, letter in enumerate("qkv")
    ),
    more_modules=(
        *with_endings(_BLOCK, f"{_PROJECTIONS} {_NORMS}"),
        *with_endings(_REFINER, f"qkv proj ffn_gate ffn_up ffn_down {_NORMS}"),
        *with_endings("", "video_embedder text_embedder.proj time_embedding.0 time_embedding.2"),
        *with_endings("", "shared_block_modulation final_norm_video final_linear_video"),
        "video_head_modulation",
    ),
    is_as_in_diffusers=True,
    default_format=layouts.COMFYUI,  # published LoRAs have these names
    version_prefixes=("moss_image", "moss-image", "moss image", "mossimage"),
    relative_sizes=(
        *((f".layers.{{n}}.proj.{letter}", 1, 1) for letter in "qkvo"),
        (".layers.{n}.proj.ffn_up_gate", 16 / 3, 1),
        (".layers.{n}.proj.ffn_down", 1, 8 / 3),
    ),
    released_sizes=((3072, (("layers", 42),)),),
    rules=LoraRules(),
    optimizer_numbering=((_BLOCK, _PROJECTIONS),),
    network_module="networks.lora_moss_image",
)
LORA = (MOSS_IMAGE,)
MARKS: Marks = (("shared_block_modulation.weight", "a MOSS-Image transformer (moss_image_*.py, --dit)"),)
