"""What a user has on disk before typing a command: models under their usual names, clips with captions, a
dataset file.
"""

from pathlib import Path

import numpy
import torch
from PIL import Image

from checkpoints.writing import save_tensors
from modules.media.writing import write_png, write_video
from tests.tiny import framepack, hunyuan
from tests.tiny.taehv import CONFIG_5B, write_taehv
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.tiny.wan_encoders import CLIP_DIM, VAE22_FILE, vae22_tensors, write_encoders

CAPTIONS = (
    "a red square moves right",
    "a blue circle moves left",
    "a green dot falls",
    "two dogs play on the beach",
)
IMAGES = """[general]
resolution = [32, 32]
caption_extension = ".txt"
batch_size = {batch_size}

[[datasets]]
image_directory = "{folder}/{pictures}"
control_directory = "{folder}/control"
cache_directory = "{folder}/{cache}"
fp_latent_window_size = 1
fp_1f_clean_indices = [0, 3]
fp_1f_target_index = 1
"""
DATASET = """[general]
resolution = [{size}, {size}]
caption_extension = ".txt"
enable_bucket = true
batch_size = {batch_size}

[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
target_frames = [{frames}]
frame_extraction = "head"
{more}
"""


def moving_square(frames: int, width: int, height: int, seed: int) -> list[numpy.ndarray]:
    """A colored square that moves over a plain ground: F of H W 3 uint8."""
    random = numpy.random.default_rng(seed)
    ground, color = random.integers(0, 256, (2, 3))
    step = random.integers(1, 4)
    clip = []
    for index in range(frames):
        frame = numpy.full((height, width, 3), ground, dtype=numpy.uint8)
        left = int(index * step) % max(width - 12, 1)
        frame[height // 3 : height // 3 + 12, left : left + 12] = color
        clip.append(frame)
    return clip


def write_clips(folder: Path, count: int = 4, frames: int = 9, width: int = 48, height: int = 48) -> None:
    """Short real video files, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        write_video(folder / f"clip {index}.mp4", moving_square(frames, width, height, index), fps=16)
        (folder / f"clip {index}.txt").write_text(CAPTIONS[index % len(CAPTIONS)], encoding="utf-8")


def write_animations(folder: Path, count: int = 4, frames: int = 9, size: int = 48) -> None:
    """The same clips as lossless WebP files, which need no FFmpeg."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        images = [Image.fromarray(frame) for frame in moving_square(frames, size, size, index)]
        path = folder / f"clip {index}.webp"
        images[0].save(path, save_all=True, append_images=images[1:], duration=62, lossless=True)
        path.with_suffix(".txt").write_text(CAPTIONS[index % len(CAPTIONS)], encoding="utf-8")


def write_dataset(
    folder: Path, size: int = 32, frames: str = "1, 5", batch_size: int = 1, more: str = ""
) -> Path:
    """dataset.toml for the clips in `folder`/clips."""
    path = folder / "dataset.toml"
    text = DATASET.format(
        folder=folder.as_posix(), size=size, frames=frames, batch_size=batch_size, more=more
    )
    path.write_text(text, encoding="utf-8")
    return path


def write_image_dataset(
    folder: Path, path: Path | None = None, batch_size: int = 1, pictures: str = "clips", cache: str = "cache"
) -> Path:
    """dataset.toml, or `path`, for the pictures in `folder`/`pictures`, made from those in
    `folder`/control.
    """
    path = path or folder / "dataset.toml"
    text = IMAGES.format(folder=folder.as_posix(), batch_size=batch_size, pictures=pictures, cache=cache)
    path.write_text(text, encoding="utf-8")
    return path


def write_plain_images(
    folder: Path, batch_size: int = 1, side: int = 48, count: int = 4, stem: str = "picture"
) -> Path:
    """Pictures with captions in `folder`/clips, and the dataset.toml of a model that makes pictures.

    side: of what is trained, in pixels.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        write_image(folder / "clips" / f"{stem} {index}.png", 48, 48)
        caption = CAPTIONS[index % len(CAPTIONS)]
        (folder / "clips" / f"{stem} {index}.txt").write_text(caption, encoding="utf-8")
    path = folder / "dataset.toml"
    table = f'image_directory = "{folder.as_posix()}/clips"\ncache_directory = "{folder.as_posix()}/cache"'
    general = f'resolution = [{side}, {side}]\ncaption_extension = ".txt"\nbatch_size = {batch_size}'
    path.write_text(f"[general]\n{general}\n\n[[datasets]]\n{table}\n", encoding="utf-8")
    return path


def write_image(path: Path, width: int, height: int) -> None:
    """A small picture."""
    write_png(path, moving_square(1, width, height, 5)[0])


def write_images(folder: Path, controls: Path, count: int = 4, size: int = 48, stem: str = "picture") -> None:
    """Pictures with captions, and for each two control images, of which the second is transparent at its
    left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    controls.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        first, opaque, after = moving_square(3, size, size, index)
        write_png(folder / f"{stem} {index}.png", after)
        (folder / f"{stem} {index}.txt").write_text(CAPTIONS[index % len(CAPTIONS)], encoding="utf-8")
        alpha = numpy.full((size, size, 1), 255, dtype=numpy.uint8)
        alpha[:, : size // 3] = 0
        write_png(controls / f"{stem} {index}_0.png", first)
        Image.fromarray(numpy.concatenate([opaque, alpha], axis=2)).save(controls / f"{stem} {index}_1.png")


def write_lora(path: Path, dit: Path, rank: int = 2, kind: str = "LoRA") -> None:
    """A LoRA, LoKr or DoRA with effect for the attention of the first block of a tiny transformer."""
    generator = torch.Generator().manual_seed(len(path.name))
    tensors = {}
    for module in ("self_attn_q", "cross_attn_v", "ffn_0"):
        rows = 256 if module == "ffn_0" else 128
        if kind == "LoKr":
            tensors[f"lora_unet_blocks_0_{module}.lokr_w1"] = torch.randn(2, 2, generator=generator) * 0.1
            tensors[f"lora_unet_blocks_0_{module}.lokr_w2"] = torch.randn(rows // 2, 64, generator=generator)
            continue
        if kind == "DoRA":
            tensors[f"lora_unet_blocks_0_{module}.dora_scale"] = torch.ones(rows, 1)
        tensors[f"lora_unet_blocks_0_{module}.lora_down.weight"] = (
            torch.randn(rank, 128, generator=generator) * 0.1
        )
        tensors[f"lora_unet_blocks_0_{module}.lora_up.weight"] = (
            torch.randn(rows, rank, generator=generator) * 0.1
        )
        tensors[f"lora_unet_blocks_0_{module}.alpha"] = torch.tensor(float(rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)


def lay_out_models(folder: Path) -> None:
    """Tiny models under the names that the documents use."""
    hunyuan.lay_out_models(folder)
    framepack.lay_out_models(folder)
    write_encoders(folder)
    write_taehv(folder / "taew2_2.pth", CONFIG_5B)
    for name in ("taew2_1", "taehv"):
        write_taehv(folder / f"{name}.pth")
    for size in ("1.3B", "14B"):
        write_dit(folder, tiny_state("t2v", dtype=torch.bfloat16), name=f"wan2.1_t2v_{size}_bf16")
    write_dit(
        folder, tiny_state("i2v", dtype=torch.bfloat16, image_dim=CLIP_DIM), name="wan2.1_i2v_480p_14B_bf16"
    )
    write_dit(folder, tiny_state("vace", dtype=torch.float16), name="wan2.1_vace_1.3B_fp16")
    write_experts(folder)


def write_experts(folder: Path) -> None:
    """Tiny models of Wan2.2, and LoRAs for its two experts."""
    for noise, seed in (("low", 0), ("high", 1)):
        for kind, name in (("t2v", "t2v"), ("i2v-2.2", "i2v")):
            state = tiny_state(kind, seed, torch.float16)
            dit = write_dit(folder, state, name=f"wan2.2_{name}_{noise}_noise_14B_fp16")
            version = "v1.1" if name == "t2v" else "v1"
            write_lora(
                folder / f"wan2.2_{name}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors", dit
            )
        bernini = tiny_state("t2v", seed, torch.float16)
        write_dit(folder, bernini, name=f"wan2.2_bernini_r_{noise}_noise_fp16")
        state = tiny_state("fun-control-2.2", seed, torch.bfloat16)
        write_dit(folder, state, name=f"Wan2.2-Fun-A14B-Control_{noise}_noise")
    write_dit(folder, tiny_state("ti2v", dtype=torch.float16), name="wan2.2_ti2v_5B_fp16")
    torch.save(vae22_tensors(), folder / VAE22_FILE)
