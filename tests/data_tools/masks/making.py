"""Pictures with a red rectangle at a known place, and tiny networks that find something in them."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    Sam3Config,
    Sam3Model,
    ViTImageProcessor,
)

from data_tools.masks.run import MaskOptions, make_masks
from modules.media.writing import write_video
from modules.script_options import parse_options
from tests.tiny.onnx_files import _node, write_onnx
from tests.tiny.stable_diffusion import vocabulary, write_tokenizer

RED, BLUE = (250, 20, 20), (10, 20, 90)
BOX = (12, 10, 30, 26)  # left, top, right, bottom of the red rectangle
SIZE = (60, 40)


def draw(box: tuple[int, int, int, int] | None = BOX, size: tuple[int, int] = SIZE) -> Image.Image:
    image = Image.new("RGB", size, BLUE)
    if box is not None:
        image.paste(RED, box)
    return image


def write_images(folder: Path) -> Path:
    """cat.png and dog.webp with a rectangle, plain.png without, and a caption."""
    folder.mkdir(parents=True)
    draw().save(folder / "cat.png")
    draw().save(folder / "dog.webp", lossless=True)
    draw(None).save(folder / "plain.png")
    (folder / "cat.txt").write_text("a caption", encoding="utf-8")
    return folder


def write_clip(path: Path, boxes: list[tuple[int, int, int, int] | None]) -> Path:
    write_video(path, [np.asarray(draw(box)) for box in boxes], 8.0, crf=1)
    return path


def rectangle(
    left: int, top: int, right: int, bottom: int, size: tuple[int, int] = SIZE
) -> NDArray[np.uint8]:
    """A mask, H W, that is white inside the box, as far as it lies in the picture."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 255
    return mask


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def make(folder: Path, *words: object) -> None:
    """Do what tools/mask.py does with these words."""
    make_masks(parse_options("", [str(folder), *map(str, words)], MaskOptions)[0])


def write_clipseg(folder: Path) -> Path:
    """A CLIPSeg of random weights that looks at 32 x 32 pixels."""
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config={
            **layers,
            "vocab_size": vocabulary(),
            "bos_token_id": vocabulary() - 2,
            "eos_token_id": vocabulary() - 1,
        },
        vision_config={**layers, "image_size": 32, "patch_size": 16},
        projection_dim=16,
        reduce_dim=16,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        use_complex_transposed_convolution=True,
    )
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    write_tokenizer(folder)
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    CLIPSegProcessor(image_processor, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


def write_background(path: Path, side: int = 32, factor: float = 1.0) -> Path:
    """A network whose value is a number for each pixel: red - blue, times a factor, through a sigmoid."""
    weights = {"w": np.array([factor, 0, -factor], np.float32).reshape(1, 3, 1, 1)}
    nodes = [
        _node("Conv", ["image", "w"], ["c"], kernel_shape=[1, 1]),
        _node("Sigmoid", ["c"], ["mask"]),
    ]
    return write_onnx(path, nodes, weights, {"image": [1, 3, side, side]}, {"mask": [1, 1, side, side]}, {})


def make_sam3() -> Sam3Model:
    """A SAM 3 of random weights that looks at 56 x 56 pixels and proposes five things."""
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = {
        **layers,
        "model_type": "sam3_vit_model",
        "num_hidden_layers": 2,
        "image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    text = {
        **layers,
        "model_type": "clip_text_model",
        "num_hidden_layers": 2,
        "vocab_size": vocabulary(),
        "max_position_embeddings": 32,
        "projection_dim": 16,
        "bos_token_id": vocabulary() - 2,
        "eos_token_id": vocabulary() - 1,
    }
    config = Sam3Config(
        vision_config={
            "fpn_hidden_size": 32,
            "backbone_config": backbone,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "scale_factors": [4.0, 2.0, 1.0, 0.5],
        },
        text_config=text,
        geometry_encoder_config={**layers, "num_layers": 1},
        detr_encoder_config={**layers, "num_layers": 1},
        detr_decoder_config={**layers, "num_layers": 2, "num_queries": 5},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    return Sam3Model(config).eval()
