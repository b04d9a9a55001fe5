"""Tiny random encoders of Wan2.1 in every file layout, and a tokenizer trained on a few sentences."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from encoders.t5_network import T5Config, T5Network
from wan.clip import ClipConfig, WanClipVision
from wan.vae import WanVae
from wan.vae_blocks import VaeLayer, WanVaeConfig

VAE_FILE = "Wan2.1_VAE.pth"
VAE22_FILE = "Wan2.2_VAE.pth"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
TEXT_DIM = 32
CLIP_DIM = 160

CORPUS = (
    "a small rabbit wakes up in a green meadow and looks at the camera",
    "the rabbit runs through tall grass while the sun rises over the hills",
    "a squirrel throws nuts from a tree and laughs at the big bunny",
    "close up of a butterfly that lands on a red apple in the morning light",
    "static camera, blurred details, subtitles, low quality, worst picture, deformed hands",
    # spelled so when the numbers that tests compare with were recorded: the tokenizers are made from it
    "An old man with a grey beard reads the news by the window; rain falls outside.",
    "Two dogs & a cat play on the beach at 7:30, waves, foam, wind (slow motion)!",
)


def vae_config(width: int = 8, z: int = 16, blocks: int = 2) -> WanVaeConfig:
    """The released structure at another base width: levels of width 1, 2, 4, 4; strides 8 in space and 4 in
    time.
    """
    widths = [width, width, 2 * width, 4 * width, 4 * width]
    down, up = [], []
    for level, kind in enumerate(("spatial", "temporal", "temporal", None)):
        first, wide = widths[level], widths[level + 1]
        down += [VaeLayer("residual", first if index == 0 else wide, wide) for index in range(blocks)]
        down += [VaeLayer(kind, wide, wide)] if kind else []
    for level, kind in enumerate(("temporal", "temporal", "spatial", None)):
        wide = widths[4 - level]
        first = wide if level == 0 else widths[5 - level] // 2
        up += [VaeLayer("residual", first if index == 0 else wide, wide) for index in range(blocks + 1)]
        up += [VaeLayer(kind, wide, wide // 2)] if kind else []
    return WanVaeConfig(z, tuple(down), tuple(up))


def vae22_config(width: int = 8, decoder_width: int = 12, z: int = 48, blocks: int = 2) -> WanVaeConfig:
    """The released structure of Wan2.2 at other base widths: stages of width 1, 2, 4, 4; patches of 2."""

    def stage(first: int, wide: int, count: int, kind: str) -> VaeLayer:
        layers = [VaeLayer("residual", wide if index else first, wide) for index in range(count)]
        layers += [VaeLayer(kind, wide, wide)] if kind else []
        return VaeLayer(kind or "residual", first, wide, tuple(layers))

    downs = (1, 1, "spatial"), (1, 2, "temporal"), (2, 4, "temporal"), (4, 4, "")
    ups = (4, 4, "temporal"), (4, 4, "temporal"), (4, 2, "spatial"), (2, 1, "")
    down = [stage(first * width, wide * width, blocks, kind) for first, wide, kind in downs]
    up = [stage(first * decoder_width, wide * decoder_width, blocks + 1, kind) for first, wide, kind in ups]
    return WanVaeConfig(z, tuple(down), tuple(up), patch=2)


def t5_config(vocabulary: int = 256, dim: int = TEXT_DIM, heads: int = 4, layers: int = 2) -> T5Config:
    """An encoder whose attention is wider than the model, which the released one's is not."""
    return T5Config(vocabulary, dim, 8 * heads * 2, 48, heads, layers, 32)


def clip_config(dim: int = CLIP_DIM, layers: int = 3, image_size: int = 224) -> ClipConfig:
    """A tower without its last block; `clip_tensors` adds one."""
    return ClipConfig(dim, 2 * dim, dim // 80, layers - 1, image_size, 14)


def random_tensors(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights that keep a signal at its size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in network.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.1
        elif name.endswith("gamma") or tensor.ndim <= 1:
            values = 1 + 0.1 * values
        else:
            values /= tensor[0].numel() ** 0.5
        tensors[name] = values
    return tensors


def vae_tensors(width: int = 8, seed: int = 0, colors: int = 3) -> dict[str, Tensor]:
    """A VAE with the names of the official file."""
    with torch.device("meta"):
        network = WanVae(replace(vae_config(width), colors=colors))
    return random_tensors(network, seed)


def vae22_tensors(width: int = 8, decoder_width: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """A VAE of Wan2.2 with the names of the official file."""
    with torch.device("meta"):
        network = WanVae(vae22_config(width, decoder_width))
    return random_tensors(network, seed)


def vae_diffusers_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same VAE, of Wan2.1 or Wan2.2, with the names of a diffusers folder."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in (
            (r"^conv1\.", "quant_conv."),
            (r"^conv2\.", "post_quant_conv."),
            (r"^(\w+)\.conv1\.", r"\1.conv_in."),
            (r"\.head\.0\.", ".norm_out."),
            (r"\.head\.2\.", ".conv_out."),
            (r"\.middle\.0\.", ".mid_block.resnets.0."),
            (r"\.middle\.1\.", ".mid_block.attentions.0."),
            (r"\.middle\.2\.", ".mid_block.resnets.1."),
            (r"\.downsamples\.", ".down_blocks."),
            (r"\.residual\.0\.", ".norm1."),
            (r"\.residual\.2\.", ".conv1."),
            (r"\.residual\.3\.", ".norm2."),
            (r"\.residual\.6\.", ".conv2."),
            (r"\.shortcut\.", ".conv_shortcut."),
        ):
            name = re.sub(ours, theirs, name)
        found = re.fullmatch(
            r"(..coder)\.(down|up)(?:samples|_blocks)\.(\d+)\.(?:down_block|upsample)s\.(\d)\.(.+)", name
        )
        if found:  # of Wan2.2: residual blocks and a resampler per stage
            is_last = ".resample." in name or ".time_conv." in name
            part = f"{found[2]}sampler" if is_last else f"resnets.{found[4]}"
            renamed[f"{found[1]}.{found[2]}_blocks.{found[3]}.{part}.{found[5]}"] = tensor
            continue
        found = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name)
        if found:  # three residual blocks and an upsampler per level
            level, index = divmod(int(found[1]), 4)
            part = "upsamplers.0" if index == 3 else f"resnets.{index}"
            name = f"decoder.up_blocks.{level}.{part}.{found[2]}"
        renamed[name] = tensor
    return renamed


def t5_tensors(seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An umT5 encoder with the names of the official file."""
    with torch.device("meta"):
        network = T5Network(t5_config())
    return {name: tensor.to(dtype) for name, tensor in random_tensors(network, seed).items()}


def t5_hf_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same encoder with Hugging Face's names (transformers folders, ComfyUI files)."""
    parts = {
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
        **{f"attn.{character}": f"layer.0.SelfAttention.{character}" for character in "qkvo"},
    }
    renamed = {
        "shared.weight": tensors["token_embedding.weight"],
        "encoder.final_layer_norm.weight": tensors["norm.weight"],
    }
    for name, tensor in tensors.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
        if found:
            renamed[f"encoder.block.{found[1]}.{parts[found[2]]}.weight"] = tensor
    return renamed


def t5_comfy_fp8_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ComfyUI's scaled fp8 file of the encoder, and the weights (official names) that it stands for."""
    stored, meant = {}, dict(tensors)
    for name, tensor in t5_hf_tensors(tensors).items():
        if "SelfAttention." in name and "bias" not in name or "DenseReluDense" in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix(".weight") + ".scale_weight"] = scale
            ours = next(key for key, value in tensors.items() if value is tensor)
            meant[ours] = stored[name].float() * scale
        else:
            stored[name] = tensor.to(torch.float16)
    stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return stored, meant


def clip_tensors(
    seed: int = 2, dtype: torch.dtype = torch.float32, image_size: int = 224
) -> dict[str, Tensor]:
    """A CLIP image tower, all blocks, with the names of the official file's `visual.` half (prefix left
    out).
    """
    config = clip_config(image_size=image_size)
    full = ClipConfig(
        config.dim,
        config.ffn_dim,
        config.num_heads,
        config.num_layers + 1,
        config.image_size,
        config.patch_size,
    )
    with torch.device("meta"):
        network = WanClipVision(full)
    tensors = random_tensors(network, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors |= {"post_norm.weight": torch.ones(config.dim), "post_norm.bias": torch.zeros(config.dim)}
    tensors["head"] = torch.randn(config.dim, 16, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def clip_official_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official file: the image tower beside (a little of) the text tower."""
    others = {
        "log_scale": torch.tensor(2.0),
        "textual.norm.weight": torch.ones(8),
        "textual.blocks.0.attn.q.weight": torch.ones(8, 8),
    }
    return {**{f"visual.{name}": tensor for name, tensor in tensors.items()}, **others}


def clip_hf_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tower with Hugging Face's names, as in ComfyUI's clip_vision_h."""
    renamed = {"visual_projection.weight": tensors["head"].T.contiguous()}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", name)
        if block:
            start = f"vision_model.encoder.layers.{block[1]}."
            if block[2] == "attn.to_qkv":
                for character, rows in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{start}self_attn.{character}_proj.{block[3]}"] = rows.contiguous()
                continue
            part = {
                "attn.proj": "self_attn.out_proj",
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "mlp.0": "mlp.fc1",
                "mlp.2": "mlp.fc2",
            }[block[2]]
            renamed[f"{start}{part}.{block[3]}"] = tensor
    vision = {
        "embeddings.class_embedding": tensors["cls_embedding"].reshape(-1),
        "embeddings.position_embedding.weight": tensors["pos_embedding"][0],
        "embeddings.patch_embedding.weight": tensors["patch_embedding.weight"],
        **{f"pre_layrnorm.{leaf}": tensors[f"pre_norm.{leaf}"] for leaf in ("weight", "bias")},
        **{f"post_layernorm.{leaf}": tensors[f"post_norm.{leaf}"] for leaf in ("weight", "bias")},
    }
    return renamed | {f"vision_model.{name}": tensor for name, tensor in vision.items()}


def sentencepiece_model() -> bytes:
    """A unigram model; padding is 0 and the end token 1, as in umT5's."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=stream,
        vocab_size=200,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    return stream.getvalue()


def write_tokenizer(folder: Path) -> None:
    """`folder` as google/umt5-xxl of the release: tokenizer.json, spiece.model and their configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sentencepiece_model()
    (folder / "spiece.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [
        (pieces.id_to_piece(index), pieces.get_score(index)) for index in range(pieces.get_piece_size())
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", pieces.eos_id())]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_encoders(folder: Path, t5_dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """VAE, T5 with its tokenizer, and CLIP in the official layout.

    Returns their paths as vae, t5, t5_tokenizer, clip.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "vae": folder / VAE_FILE,
        "t5": folder / T5_FILE,
        "clip": folder / CLIP_FILE,
        "t5_tokenizer": folder / TOKENIZER_FOLDER,
    }
    torch.save(vae_tensors(), paths["vae"])
    torch.save(t5_tensors(dtype=t5_dtype), paths["t5"])
    torch.save(clip_official_tensors(clip_tensors()), paths["clip"])
    write_tokenizer(paths["t5_tokenizer"])
    return paths
