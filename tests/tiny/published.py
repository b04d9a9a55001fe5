"""Data, tools and a chat model as they are published, tiny: tables, tars, folders, footage."""

import csv
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from modules.media.writing import write_video
from tests.data_tools.cogvideox.making import write_data, write_wan_pipeline
from tests.data_tools.cutting import films
from tests.tiny.onnx_files import write_yolo, write_yunet
from tests.tiny.post_faces import write_red_detector
from tests.tiny.post_interpolation import write_flowformer, write_gimm_f, write_gimm_r
from tests.tiny.post_restorers import codeformer_weights, gfpgan_weights, parsenet_weights, write_model
from tests.tiny.post_upscaling import write_rrdb, write_swinir
from tests.tiny.project import CAPTIONS
from tests.tiny.vision_model import write_llava


def lay_out_published(folder: Path, site: str) -> None:
    """The clips of `folder`/clips in the forms of docs/dataset_large.md. site: where they are served."""
    clips = sorted((folder / "clips").glob("*.mp4"))
    rows = [{"file": f"clips/{clip.name}", "description": CAPTIONS[0]} for clip in clips]
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "description"])
        writer.writeheader()
        writer.writerows(rows)
    named = [{"path": row["file"], "caption": row["description"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(named), folder / "clips.parquet")
    for number, clip in enumerate(clips):
        with tarfile.open(folder / f"clips-{number:03d}.tar", "w") as tar:
            tar.add(clip, f"{number}.mp4")
            tar.add(clip.with_suffix(".txt"), f"{number}.txt")
    lines = [
        json.dumps({"video_path": f"{site}/{clip.name.replace(' ', '%20')}", "caption": CAPTIONS[0]})
        for clip in clips
    ]
    (folder / "addresses.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def lay_out_material(folder: Path) -> None:
    """Footage of two scenes, a folder in CogVideoX form, a pipeline of Wan."""
    (folder / "footage").mkdir()
    film = [*films.scene(1, 50), *films.scene(2, 50)]
    films.write_film(folder / "footage" / "film.mp4", film, Fraction(24))
    write_data(folder / "cogvideox")
    write_wan_pipeline(folder / "models" / "wan_pipeline")


def lay_out_vision_model(folder: Path) -> None:
    """A model that describes pictures. Needs transformers."""
    write_llava(folder / "models" / "vision")


SIDE, FRAMES = 128, 3  # of the video: interpolation takes no smaller one


def lay_out_tools(folder: Path) -> None:
    """Models of all tools in `folder`/models, yolo_face.onnx and video.mp4, in which a red dot is a face."""
    models = folder / "models"
    for name in ("upscalers", "gimmvfi", "facefix"):
        (models / name).mkdir(parents=True, exist_ok=True)
    write_swinir(models / "upscalers" / "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN.pth")
    write_rrdb(models / "upscalers" / "RealESRGAN_x4plus.pth")
    write_rrdb(models / "upscalers" / "RealESRGAN_x2plus.pth", unshuffle=2)
    write_flowformer(write_gimm_f(write_gimm_r(models / "gimmvfi")) / "flowformer_sintel_fp32.safetensors")
    faces = models / "facefix"
    write_model(faces / "GFPGANv1.4.pth", gfpgan_weights(), "params_ema")
    write_model(faces / "codeformer.pth", codeformer_weights(), "params_ema")
    write_model(faces / "parsing_parsenet.pth", parsenet_weights())
    write_red_detector(faces / "detection_Resnet50_Final.pth", face=48)
    write_yunet(faces / "face_detection_yunet_2023mar.onnx")
    write_yolo(folder / "yolo_face.onnx")
    write_video(folder / "video.mp4", [_with_dot(index) for index in range(FRAMES)], 12)


def _with_dot(index: int) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    gray = (90 + 50 * np.sin((x - 3 * index) / 9) * np.cos(y / 14)).astype(np.uint8)
    pixels = gray[..., None].repeat(3, axis=2)
    pixels[56:72, 56:72] = (255, 0, 0)
    return pixels


TEMPLATE = "{% for turn in messages %}<user> {{ turn['content'] }} <model> {% endfor %}"


def write_chat_model(folder: Path) -> Path:
    """Write a Llama with random weights that knows fourteen words, and return the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<unk>",
        "<end>",
        "<user>",
        "<model>",
        *["a", "cat", "dog", "walks", "runs", "on", "the", "grass", "in", "light"],
    ]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=2048,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
