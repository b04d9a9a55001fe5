"""FLUX 3's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names import layouts
from networks.names.layouts import FamilyNames, WeightPart, renamed_parts
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "flux_3",
    script="flux_3",
    cache="flux_3_cache",
    record="Flux3",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_VL_FILE",
    same_latents="flux_2",
)
# beginnings of blocks, diffusers' and the released
_BLOCKS = (
    ("mode_blocks.image.{n}.", "content_mode_blocks.image.{n}."),
    ("mode_blocks.image_cond.{n}.", "content_mode_blocks.image_cond.{n}."),
    ("txt_mode_blocks.{n}.", "txt_mode_blocks.{n}."),
    ("single_transformer_blocks.{n}.", "single_blocks.{n}."),
)
_LAYERS = (
    *((f"attn.to_{letter}", f"{letter}_proj") for letter in "qkv"),
    ("attn.to_out.0", "attn_out"),
    ("ff.linear_in", "mlp_in"),
    ("ff.linear_out", "mlp_out"),
)
_NORMS = (("attn.norm_q.weight", "norm.query_norm.scale"), ("attn.norm_k.weight", "norm.key_norm.scale"))
_OUTSIDE = (
    *((f"x_embedders.{mode}", f"emb_in.{mode}") for mode in ("image", "image_cond")),
    ("context_embedder", "txt_in"),
    ("proj_out", "final_layer.image.linear"),
    *(
        (f"{kind}_stream_modulations.{mode}.linear", f"{kind}_stream_modulations.{mode}.lin")
        for kind in ("early", "single")
        for mode in ("image", "image_cond", "txt")
    ),
    *(
        (f"{theirs}_embedder.linear_{number}", f"{ours}.{layer}")
        for theirs, ours in (("timestep", "time_in"), ("target_timestep", "ref_time_in"))
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    ),
)
_ORDER = "q_proj k_proj v_proj attn_out mlp_in mlp_out"  # order in which the layers are registered

FLUX_3 = FamilyNames(
    "flux_3",
    "Flux.3-klein",
    parts=(
        *(part for theirs, ours in _BLOCKS for part in renamed_parts(theirs, ours, _LAYERS)),
        *renamed_parts("", "", _OUTSIDE),
        WeightPart("norm_out.linear", "final_layer.image.adaLN_modulation.1", layouts.SWAPPED),
    ),
    parameters=tuple((theirs + one, ours + other) for theirs, ours in _BLOCKS for one, other in _NORMS),
    optional_paths=("ref_time_in.in_layer", "ref_time_in.out_layer"),
    optional_description="the time that a step of the distilled model jumps to",
    version_prefixes=("flux_3", "flux-3", "flux3", "flux.3"),
    relative_sizes=(
        *((f".{name}", 1, 1) for name in ("q_proj", "k_proj", "v_proj", "attn_out")),
        (".mlp_in", 6, 1),
        (".mlp_out", 1, 3),
    ),
    released_sizes=((3072, (("single_blocks", 28), ("txt_mode_blocks", 5))),),
    optimizer_numbering=(
        ("content_mode_blocks.image.{n}.", _ORDER),
        ("content_mode_blocks.image_cond.{n}.", _ORDER),
        ("txt_mode_blocks.{n}.", _ORDER),
        ("single_blocks.{n}.", _ORDER),
    ),
    network_module="networks.lora_flux_3",
    converted_for="diffusers",  # which loads nothing of files with our names, without a word
)
LORA = (FLUX_3,)
MARKS: Marks = (
    ("early_stream_modulations.image.lin.weight", "a FLUX 3 transformer (--dit)"),
    ("early_stream_modulations.image.linear.weight", "a FLUX 3 transformer in diffusers layout (--dit)"),
)
