"""Qwen-Image-2.1's names: scripts, modules in LoRA files, and tensors that identify its files."""

from networks.names.layouts import FamilyNames, WeightPart, with_endings
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "qwen_image_21",
    script="qwen_image_21",
    cache="qwen_image_21_cache",
    record="QwenImage21",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder QWEN3_VL_FILE",
)
_BLOCK = "transformer_blocks.{n}."
QWEN_IMAGE_21 = FamilyNames(
    "qwen_image_21",
    "Qwen-Image-2.1",
    # ComfyUI's files stack them
    joined=tuple(
        WeightPart(f"{_BLOCK}img_mlp.{part}", f"{_BLOCK}img_mlp.gate_up", index)
        for index, part in enumerate(("gate_layer", "proj"))
    ),
    more_modules=(
        *with_endings(f"{_BLOCK}attn.", "to_q to_k to_v to_out.0 norm_q norm_k"),
        *with_endings(f"{_BLOCK}img_mlp.", "proj gate_layer out"),
        *with_endings("", "img_in txt_in.text_norm txt_in.in_layer txt_in.out_layer modulation.1"),
        *with_endings("", "norm_out.linear proj_out"),
        *with_endings("time_text_embed.timestep_embedder.", "linear_1 linear_2"),
    ),
    is_as_in_diffusers=True,
    converted_for="ComfyUI",  # diffusers' pipelines too take "gate_layer" in our names for "gate.layer"
    version_prefixes=("qwen_image_21", "qwen-image-2.1", "qwen_image_2.1", "qwenimage21", "qwen_image_2_1"),
    relative_sizes=(
        *((f".to_{x}", 1, 1) for x in ("q", "k", "v", "out.0")),
        *((f".img_mlp.{part}", 3, 1) for part in ("proj", "gate_layer")),
        (".img_mlp.out", 1, 3),
    ),
    released_sizes=((4096, (("transformer_blocks", 32),)),),
    optimizer_numbering=(
        (
            _BLOCK,
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 img_mlp.proj img_mlp.out img_mlp.gate_layer",
        ),
    ),
    network_module="networks.lora_qwen_image_21",
)
LORA = (QWEN_IMAGE_21,)
MARKS: Marks = (
    ("control_blocks.0.before_proj.weight", "a ControlNet of Qwen-Image-2.1, which is not supported yet"),
    ("txt_in.text_norm.weight", "a Qwen-Image-2.1 transformer (qwen_image_21_*.py, --dit)"),
    ("decoder.up_blocks.2.upsampler.time_conv.weight", "the VAE of Qwen-Image-2.1 (--vae)"),
)
