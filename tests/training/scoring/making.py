"""A run with samples and its training pictures, drawn by a script, and tiny models that know them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from modules.media.reading import Frame
from tests.tiny.hunyuan_encoders import CLIP_VOCABULARY, write_clip_tokenizer
from training.reports.history import History, Start

SIDE = 28  # of the pictures that the models see
CIRCLE, SQUARE = "a red circle", "a blue square"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": SIDE, "patch_size": 7}
# eos_token_id 2: the text's vector is that of the token with the highest number, which ends it
TEXT = {**SIZES, "vocab_size": CLIP_VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2}
NAME = "my_lora"


def draw(what: str, size: int = 96, shift: int = 0) -> Frame:
    """A shape on gray, H W 3. shift: pixels to the right."""
    image = Image.new("RGB", (size, size), (128, 128, 128))
    box = (size // 5 + shift, size // 5, size - size // 5 + shift, size - size // 5)
    if what == CIRCLE:
        ImageDraw.Draw(image).ellipse(box, fill=(220, 20, 20))
    else:
        ImageDraw.Draw(image).rectangle(box, fill=(20, 20, 220))
    return np.asarray(image)


def write_clip(folder: Path, knows: bool = False) -> Any:
    """A CLIP in a folder as transformers saves it. knows: it was taught which shape has which prompt."""
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()
    write_clip_tokenizer(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    processor.save_pretrained(folder)
    if knows:
        _teach(model, processor, folder)
    model.save_pretrained(folder)
    return model


def write_siglip(folder: Path) -> Any:
    """A SigLIP, with CLIP's tokenizer."""
    torch.manual_seed(4)
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
    write_clip_tokenizer(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def write_dino(folder: Path) -> Any:
    """A DINOv2, which sees images alone."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=SIDE, patch_size=7)).eval()
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def _teach(model: Any, processor: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)([CIRCLE, SQUARE], padding=True, return_tensors="pt")
    pixels = processor(images=[draw(CIRCLE), draw(SQUARE)], return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = model(**tokens, pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_dataset(folder: Path, pictures: Mapping[str, Frame]) -> Path:
    """A dataset.toml and its pictures, by name."""
    (folder / "pictures").mkdir(parents=True)
    for name, frame in pictures.items():
        Image.fromarray(frame).save(folder / "pictures" / name)
    path = folder / "dataset.toml"
    path.write_text(
        '[[datasets]]\nimage_directory = "pictures"\ncache_directory = "cache"\nresolution = [64, 64]\n'
        'caption_extension = ".txt"\n',
        encoding="utf-8",
    )
    return path


def write_run(
    folder: Path,
    samples: Mapping[int, Sequence[Frame]],
    losses: Mapping[int, float] | None = None,
    prompts: Sequence[str] = (CIRCLE, SQUARE),
    ending: str = "finished",
) -> Path:
    """A run of which a file was saved, and samples were made, at each of these steps; returns its history."""
    output = folder / "output"
    (output / "sample").mkdir(parents=True)
    history = History(output / f"{NAME}-history.jsonl", session=5)
    start = Start("toy", max(samples), changed=[("dataset_config", "dataset.toml")])
    history.add(0, started={**vars(start), "working_folder": str(folder)})
    for step, frames in samples.items():
        history.add(step, loss=1 / step)
        names = {}
        for index, frame in enumerate(frames):
            names[str(index)] = f"{NAME}_{step:06d}_{index:02d}_20260101000000.png"
            Image.fromarray(frame).save(output / "sample" / names[str(index)])
        texts = {str(index): text for index, text in enumerate(prompts)}
        history.add(step, samples=f"{step:06d}", files=names, prompts=texts)
        history.add(step, saved=f"{NAME}-step{step:08d}.safetensors")
        (output / f"{NAME}-step{step:08d}.safetensors").write_bytes(b"x")
        if losses is not None and step in losses:
            history.add(step, validation={"validation/loss": losses[step]})
    if ending:
        history.add(max(samples), ended=ending, kind="good")
    history.flush()
    return history.path
