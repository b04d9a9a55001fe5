"""What a user has on disk before training a picture model: models under the names of the pages, pictures."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from tests.tiny import flux, hunyuan_image, lumina
from tests.tiny.hunyuan_encoders import CLIP_DIM, save
from tests.tiny.picture_encoders import T5_DIM, write_autoencoder, write_clip_l, write_t5xxl
from tests.tiny.project import CAPTIONS, moving_square, write_image

SIDE = 64  # pixels of the pictures
# captions with parts, for pictures whose captions are shuffled
TAGS = "ohwx cat ||| sitting, {red|blue} chair, window"


def lay_out_flux(folder: Path) -> None:
    """FLUX.1 dev, Chroma and what they need; beside the folder a fine-tuned model."""
    kinds = {"flux1-dev": ("dev", {"pooled_dim": CLIP_DIM}), "Chroma1-HD": ("chroma", {})}
    for seed, (name, (kind, sizes)) in enumerate(kinds.items()):
        state = flux.tiny_state(kind, seed, torch.bfloat16, text_dim=T5_DIM, **sizes)
        flux.write_dit(folder, state, name=name)
    tuned = flux.tiny_state("dev", 5, torch.bfloat16, text_dim=T5_DIM, pooled_dim=CLIP_DIM)
    flux.write_dit(folder.parent, tuned, name="flux1-dev-tuned")
    write_autoencoder(folder / "ae.safetensors")
    write_clip_l(folder).rename(folder / "flux_clip_l.safetensors")
    write_t5xxl(folder)


def lay_out_hunyuan_image(folder: Path) -> None:
    """HunyuanImage-2.1 and what it needs."""
    hunyuan_image.write_dit(folder, hunyuan_image.tiny_state(dtype=torch.bfloat16))
    hunyuan_image.write_vae(folder / "hunyuan_image_2.1_vae_fp16.safetensors")
    qwen = hunyuan_image.write_qwen(folder / "qwen_2.5_vl")
    (qwen / "model.safetensors").rename(folder / "qwen_2.5_vl_7b.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    save(folder / "byt5_small_glyphxl_fp16.safetensors", hunyuan_image.byt5_state())


def lay_out_lumina(folder: Path) -> None:
    """Lumina-Image-2.0 and what it needs."""
    lumina.write_dit(folder, lumina.tiny_state(dtype=torch.bfloat16), name="lumina_2_model_bf16")
    write_autoencoder(folder / "ae.safetensors")
    gemma = lumina.write_gemma(folder / "tokenizer")
    (gemma / "model.safetensors").rename(folder / "gemma_2_2b_fp16.safetensors")
    (gemma / "config.json").rename(folder / "config.json")


def lay_out_pictures(folder: Path) -> None:
    """Pictures with captions, others to regularise with, masks, and the same in the forms of the guides."""
    for name in ("pictures", "regularisation", "masks", "train/2_ohwx cat", "reg/1_cat"):
        (folder / name).mkdir(parents=True)
    for index in range(2):
        picture = folder / "pictures" / f"{index}.png"
        Image.fromarray(moving_square(1, SIDE + 16 * index, SIDE, index)[0]).save(picture)
        picture.with_suffix(".txt").write_text(CAPTIONS[index], encoding="utf-8")
        for other in ("masks", "train/2_ohwx cat"):
            shutil.copy(picture, folder / other / picture.name)
    (folder / "train/2_ohwx cat/0.txt").write_text(TAGS, encoding="utf-8")
    for other in ("regularisation", "reg/1_cat"):
        write_image(folder / other / "cat.png", SIDE, SIDE)
    metadata = {"0": {"caption": "a cat", "tags": "red, chair"}, "1.png": {"caption": "a dog"}}
    (folder / "captions.json").write_text(json.dumps(metadata), encoding="utf-8")
    write_image(folder / "start.png", SIDE, SIDE)
