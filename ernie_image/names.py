"""ERNIE-Image's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

# Latents are FLUX.2's with another number added to the variances, so caches are not shared (`same_latents`).
ENTRY = FamilyEntry(
    "ernie_image",
    script="ernie_image",
    cache="ernie_image_cache",
    record="ErnieImage",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder MINISTRAL3_FILE",
)
_BLOCK = "layers.{n}."
# in the order of registration
_LAYERS = (
    *("self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
)
# our names are the released ones, which are those of diffusers and ComfyUI too
ERNIE_IMAGE = FamilyNames(
    "ernie_image",
    "ERNIE-Image",
    more_modules=(
        *(f"{_BLOCK}{layer}" for layer in _LAYERS),
        *with_endings(_BLOCK, "self_attention.norm_q self_attention.norm_k adaLN_sa_ln adaLN_mlp_ln"),
        *with_endings("", "x_embedder.proj text_proj time_embedding.linear_1 time_embedding.linear_2"),
        *with_endings("", "adaLN_modulation.1 final_norm.linear final_linear"),
    ),
    is_as_in_diffusers=True,
    # diffusers' converter knows no names with underscores, and stops at an alpha
    converted_for="diffusers",
    version_prefixes=("ernie_image", "ernie-image", "ernie image", "ernieimage", "ernie"),
    relative_sizes=(
        *((f".self_attention.to_{name}", 1, 1) for name in ("q", "k", "v", "out.0")),
        *((f".mlp.{name}", 3, 1) for name in ("gate_proj", "up_proj")),
        (".mlp.linear_fc2", 1, 3),
    ),
    released_sizes=((4096, (("layers", 36),)),),
    optimizer_numbering=((_BLOCK, " ".join(_LAYERS)),),
    network_module="networks.lora_ernie_image",
)
LORA = (ERNIE_IMAGE,)
MARKS: Marks = (("layers.0.adaLN_sa_ln.weight", "an ERNIE-Image transformer (ernie_image_*.py, --dit)"),)
