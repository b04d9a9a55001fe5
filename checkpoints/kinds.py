"""Recognize a model file by its tensor names, for messages about files of the wrong kind."""

import re
from collections.abc import Iterable
from pathlib import Path

from protocols.families import Marks, family_marks

# prefixes that trainers and exporters add to the tensor names of a network
_PREFIXES = ("model.diffusion_model.", "control_model.", "model.model.", "module.", "netG.", "net_g.", "net.")

_NOT_YET = "which is not supported yet"
_LTX_VAE = "a VAE of LTX-Video or LTX-2; LTX-Video is not supported yet"
_VOCODER = "the vocoder of LTX-2, a part of its --audio_vae"

# Current models that no script supports yet, by one of their tensors. When a family is added, its rows are
# removed here. Sources: the tensor lists of released files, under their own names and ComfyUI's
NOT_YET: Marks = ()
# Unsupported models with the same tensors as a supported one, by a part of their file names (in lower case,
# letters and digits only)
NOT_YET_BY_NAME: Marks = (
    (
        "h3image",
        "MiniMax-H3-Image, whose heads are for fixed noise levels: a different model than MiniMax-H3, "
        f"{_NOT_YET}",
    ),
)

# All models that no script supports. They are compared before the supported families, because some have all
# tensors of one. Sources: the classes of diffusers 0.42, the keys in its `single_file_utils`, and the tensor
# lists of released files
UNSUPPORTED_MODELS: Marks = (
    (
        "time_embeddings.timestep_embedder.linear_1.weight",
        f"the upscaling transformer of Kandinsky 6, {_NOT_YET}",
    ),
    *NOT_YET,
    (
        "post_upsample_res_blocks.0.conv1.weight",
        "a latent upscaler of LTX-Video or LTX-2 (of LTX-2: --spatial_upsampler_path)",
    ),
    ("latents_mean", _LTX_VAE),
    ("vae.per_channel_statistics.mean-of-means", _LTX_VAE),
    ("audio_vae.per_channel_statistics.mean-of-means", _LTX_VAE),
    ("per_channel_statistics.mean-of-means", _LTX_VAE),
    ("vocoder.conv_pre.weight", _VOCODER),
    ("vocoder.vocoder.conv_pre.weight", _VOCODER),
    ("mel_stft.mel_basis", _VOCODER),
    ("norm_moe_gen.weight", f"the transformer of Cosmos 3, {_NOT_YET}"),
    ("double_stream_blocks.0.block.adaLN_modulation.1.bias", f"a transformer of HiDream-I1, {_NOT_YET}"),
    ("transformer_blocks.0.encoder_proj.weight", f"the transformer of Nucleus-Image, {_NOT_YET}"),
    ("glyph_projector.net.0.proj.weight", f"the transformer of GLM-Image, {_NOT_YET}"),
    ("siglip_embedder.0.weight", f"the transformer of Z-Image-Omni, {_NOT_YET}"),
    (
        "patch_embedding_pose.weight",
        f"the transformer of SCAIL-2, a different network than Wan2.1's, {_NOT_YET}",
    ),
    (
        "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",
        f"the transformer of Boogu-Image, {_NOT_YET}",
    ),
    ("blocks.0.pre_crs_attn_norm.weight", f"the transformer of LongCat-Video, {_NOT_YET}"),
)
# networks and layouts that several families share; compared after the tensors that only one family has
SHARED_PART_MARKS: Marks = (
    # in the layout of diffusers; HunyuanVideo 1.5 has it too
    ("time_embed.timestep_embedder.linear_1.weight", f"the transformer of LongCat-Image, {_NOT_YET}"),
    ("quant_conv.weight", "a VAE of another model"),
    ("encoder.down.0.block.0.conv1.weight", "a VAE for images"),
    ("transformer_blocks.0.attn.to_q.weight", "a transformer in diffusers layout"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 encoder (--t5, --t5xxl)"),
    ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder (--text_encoder2)"),
    ("model.layers.0.self_attn.q_proj.bias", "a Qwen2.5 language model (HunyuanImage's --text_encoder)"),
    (
        "model.language_model.layers.0.self_attn.q_proj.bias",
        "a Qwen2.5-VL model (HunyuanImage's --text_encoder)",
    ),
    *(
        (
            f"{start}layers.0.pre_feedforward_layernorm.weight",
            "a Gemma language model (--gemma2, --gemma_root)",
        )
        for start in ("model.", "", "language_model.model.", "model.language_model.")
    ),
    *(
        (f"{start}layers.0.linear_attn.in_proj_qkv.weight", "a Qwen3.5 model (MOSS-Image's --text_encoder)")
        for start in ("model.language_model.", "language_model.", "model.", "")
    ),
    *((f"{start}visual.pos_embed.weight", "a Qwen3-VL model (--text_encoder)") for start in ("model.", "")),
    ("model.layers.0.self_attn.q_norm.weight", "a Qwen3 language model (--text_encoder)"),
    ("model.embed_tokens.weight", "a language model (--text_encoder1)"),
    ("embed_tokens.weight", "a language model (--text_encoder1)"),
    ("language_model.model.embed_tokens.weight", "a language model (--text_encoder1)"),
    ("vision_model.embeddings.class_embedding", "a CLIP image encoder (--clip)"),
)

# networks that process finished videos, and preview decoders; the first row whose tensor is in the file
# counts
TOOL_MARKS: Marks = (
    (
        "layers.0.residual_group.overlap_attn.relative_position_bias_table",
        "a HAT upscaler, which is not supported",
    ),
    ("layers.0.residual_group.blocks.0.attn.logit_scale", "a Swin2SR upscaler, which is not supported"),
    ("layers.0.blocks.0.attn.attns.0.rpe_biases", "a DAT upscaler, which is not supported"),
    ("block_1.c1_r.eval_conv.weight", "a SPAN upscaler, which is not supported"),
    ("body.0.weight", "a compact Real-ESRGAN upscaler (upscaler.py --model)"),
    (
        "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
        "a SwinIR upscaler (upscaler.py --model)",
    ),
    ("body.0.rdb1.conv1.weight", "a Real-ESRGAN upscaler (upscaler.py --model)"),
    ("RRDB_trunk.0.RDB1.conv1.weight", "an ESRGAN or BSRGAN upscaler (upscaler.py --model)"),
    ("model.1.sub.0.RDB1.conv1.0.weight", "an ESRGAN upscaler with old names (upscaler.py --model)"),
    ("amt_fproj.weight", "GIMM-VFI R, which interpolates with RAFT (GIMMVFI.py --mode gimmvfi_r)"),
    ("amt_comb_block.0.weight", "GIMM-VFI F, which interpolates with FlowFormer (GIMMVFI.py)"),
    ("update_block.flow_head.conv1.weight", "RAFT, the optical flow of GIMM-VFI R (GIMMVFI.py)"),
    (
        "memory_encoder.feat_encoder.svt.patch_embeds.0.proj.weight",
        "FlowFormer, the optical flow of GIMM-VFI F (GIMMVFI.py)",
    ),
    ("conv_body_first.weight", "a GFPGAN face restorer (facefix.py --model)"),
    ("conv_body_first.0.weight", "the first GFPGAN, which is not supported: use v1.3 or v1.4"),
    ("idx_pred_layer.1.weight", "a CodeFormer face restorer (facefix.py --mode codeformer)"),
    ("BboxHead.0.conv1x1.weight", "a RetinaFace face detector (yolo_blur.py --model, or next to GFPGAN)"),
    ("out_mask_conv.conv2d.weight", "a ParseNet, which finds the parts of a face (next to GFPGAN)"),
    ("decoder.3.conv.0.weight", "a TAEHV, a tiny decoder for previews (--preview_vae)"),
)


# a tensor of a LoRA, LoHa, LoKr or OFT of any program
_LORA_TENSOR_NAME = re.compile(
    r"[._](?:lora_(?:down|up|A|B|a|b)|lora\.(?:down|up)|hada_w1_a|lokr_w[12](?:_a)?|oft_R)(?:[._]|$)"
    r"|\.(?:diff|diff_b|set_weight)$"  # of whole weights
)


def is_lora(names: Iterable[str]) -> bool:
    """Return whether any of these tensor names belongs to a LoRA, LoHa, LoKr or OFT."""
    return any(_LORA_TENSOR_NAME.search(name) for name in names)


def kind_by_name(path: Path, is_sharded: bool) -> str | None:
    """Return the name of an unsupported transformer that the file name reveals; None if it reveals none.

    For sharded files, the names of the two enclosing folders are checked too, because shards have generic
    names such as diffusion_pytorch_model.
    """
    parts = path.parts[-3:] if is_sharded else path.parts[-1:]
    letters = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in parts]
    for mark, what in NOT_YET_BY_NAME:
        if any(mark in part for part in letters):
            return what
    return None


def describe_file_kind(names: Iterable[str], marks: Marks | None = None) -> str | None:
    """Describe a file by its tensor names, for example as "a RetinaFace face detector"; None if unknown.

    Args:
        names: Names of the tensors.
        marks: Pairs of a tensor name and a description of files that contain it; the first match wins.
            None: all known files.
    """
    if marks is None:
        marks = (*UNSUPPORTED_MODELS, *family_marks(), *SHARED_PART_MARKS, *TOOL_MARKS)
    bare_names = set()
    for name in names:
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        bare_names.add(name)
    return next((description for mark, description in marks if mark in bare_names), None)
