"""Tiny models of all families that `new` describes a folder for, by the options that name their files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.ltx_2.release import write_release
from tests.tiny.anima import write_tiny_anima
from tests.tiny.ernie_image import write_tiny_ernie_image
from tests.tiny.fibo_2 import write_tiny_fibo_2
from tests.tiny.flux import write_tiny_flux
from tests.tiny.flux_2 import write_tiny_flux_2
from tests.tiny.flux_3 import write_tiny_flux_3
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hidream_o1 import write_tiny_hidream_o1
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.hunyuan_image import write_tiny_hunyuan_image
from tests.tiny.hunyuan_video_15 import write_tiny_hunyuan_video_15
from tests.tiny.ideogram4 import SECOND_NAME, write_tiny_ideogram4
from tests.tiny.kandinsky import write_tiny_kandinsky
from tests.tiny.kandinsky_6 import write_tiny_kandinsky_6
from tests.tiny.krea2 import write_tiny_krea2
from tests.tiny.lumina import write_tiny_lumina
from tests.tiny.minimax_h3 import write_tiny_h3
from tests.tiny.moss_image import write_tiny_moss_image
from tests.tiny.qwen_image import write_tiny_qwen_image
from tests.tiny.qwen_image_21 import write_tiny_qwen_image_21
from tests.tiny.stable_diffusion import write_tiny_stable_diffusion
from tests.tiny.wan import write_tiny_wan
from tests.tiny.z_image import write_tiny_z_image

Writer = Callable[[Path], object]
WAN = {"dit": "dit.safetensors", "vae": "vae.safetensors", "t5": "t5.safetensors"}
IMAGES = {"dit": "dit.safetensors", "vae": "vae.safetensors", "text_encoder": "text_encoder"}
O1 = {"dit": "dit.safetensors", "tokenizer": "hidream_o1"}
ANIMA = {"dit": "dit.safetensors", "vae": "vae.safetensors", "qwen3": "text_encoder"}
TWO_TEXTS = {"text_encoder1": "text_encoder", "text_encoder2": "text_encoder_2"}
HUNYUAN = {"dit": "dit.safetensors", "vae": "vae.safetensors", **TWO_TEXTS}
HUNYUAN_15 = IMAGES | {"byt5": "byt5.safetensors"}
KANDINSKY = {
    "dit": "dit.safetensors",
    "vae": "vae.safetensors",
    "text_encoder_qwen": "text_encoder",
    "text_encoder_clip": "text_encoder_2",
}
FLUX = {"dit": "dit.safetensors", "ae": "ae.safetensors", "t5xxl": "t5xxl_fp16.safetensors"}
SD = {"ckpt": "ckpt.safetensors", "vae": "vae.safetensors"}
CLIP = {"clip": "clip.safetensors"}
LTX_25 = {
    "ltx2_checkpoint": "ltx 2.3.safetensors",
    "ltx2_text_encoder_checkpoint": "text.safetensors",
    "ltx2_video_vae": "video vae.safetensors",
}
H3 = {
    "dit": "minimax_h3_fl2va_bf16.safetensors",
    "video_vae": "minimax_h3_video_vae.safetensors",
    "audio_vae": "minimax_h3_audio_vae.safetensors",
    "text_encoder": "text/qwen3vl.safetensors",
    "tokenizer": "tokenizer",
}
# family and task -> what writes its files into a folder, and the files by option
MODELS: dict[str, tuple[Writer, dict[str, str]]] = {
    "wan t2v-1.3B": (write_tiny_wan, WAN),
    "wan t2i-14B": (write_tiny_wan, WAN),
    "wan i2v-14B-480p": (partial(write_tiny_wan, kind="i2v"), WAN | CLIP),
    "wan flf2v-14B": (partial(write_tiny_wan, kind="flf2v"), WAN | CLIP),
    "wan22 t2v-A14B": (partial(write_tiny_wan, experts=2), WAN | {"dit_high_noise": "dit_high.safetensors"}),
    "wan22 ti2v-5B": (partial(write_tiny_wan, kind="ti2v"), WAN),
    "hunyuan_video t2v": (write_tiny_hunyuan, HUNYUAN),
    "skyreels i2v": (partial(write_tiny_hunyuan, kind="i2v"), HUNYUAN),
    "framepack i2v": (write_tiny_framepack, HUNYUAN | {"image_encoder": "siglip.safetensors"}),
    **{
        f"hunyuan_video_1_5 {task}-{size}": (
            write_tiny_hunyuan_video_15,
            HUNYUAN_15 | ({"image_encoder": "siglip.safetensors"} if task == "i2v" else {}),
        )
        for task in ("t2v", "i2v")
        for size in ("480p", "720p")
    },
    "kandinsky k5-lite-t2v-5s-sd": (write_tiny_kandinsky, KANDINSKY),
    "kandinsky k5-lite-i2v-5s-sd": (write_tiny_kandinsky, KANDINSKY),
    "kandinsky k5-lite-t2i-hd": (partial(write_tiny_kandinsky, kind="image"), KANDINSKY),
    **dict.fromkeys(
        ("kandinsky k6-lite-5s", "kandinsky k6-lite-5s-pretrain", "kandinsky k6-pro-5s"),
        (write_tiny_kandinsky_6, KANDINSKY | {"audio_vae": "audio_vae", "vocoder": "vocoder"}),
    ),
    "hunyuan_image 2.1": (write_tiny_hunyuan_image, IMAGES | {"byt5": "byt5.safetensors"}),
    "qwen_image original": (write_tiny_qwen_image, IMAGES),
    "qwen_image edit-2511": (partial(write_tiny_qwen_image, edits=True), IMAGES),
    "qwen_image_21 base": (write_tiny_qwen_image_21, IMAGES),
    "qwen_image_21 turbo": (write_tiny_qwen_image_21, IMAGES),
    "qwen_image_21 edit": (write_tiny_qwen_image_21, IMAGES),
    "moss_image base": (write_tiny_moss_image, IMAGES),
    "moss_image edit": (write_tiny_moss_image, IMAGES),
    "fibo_2 dev": (write_tiny_fibo_2, IMAGES),
    "fibo_2 edit": (write_tiny_fibo_2, IMAGES),
    "ideogram4 both": (write_tiny_ideogram4, IMAGES | {"unconditional_dit": SECOND_NAME}),
    "ideogram4 one": (write_tiny_ideogram4, IMAGES),
    "ernie_image base": (write_tiny_ernie_image, IMAGES),
    "ernie_image turbo": (write_tiny_ernie_image, IMAGES),
    "hidream_o1 full": (write_tiny_hidream_o1, O1),
    "hidream_o1 edit": (partial(write_tiny_hidream_o1, edits=True), O1),
    "hidream_o1 dev": (
        partial(write_tiny_hidream_o1, name="dit_dev"),
        O1 | {"dit": "dit_dev.safetensors"},
    ),
    "z_image turbo": (write_tiny_z_image, IMAGES),
    "krea2 raw": (write_tiny_krea2, IMAGES),
    "krea2 turbo": (write_tiny_krea2, IMAGES),
    "anima base": (write_tiny_anima, ANIMA),
    "krea2 edit": (write_tiny_krea2, IMAGES),
    "ltx_2 av": (write_release, {"ltx2_checkpoint": "ltx 2.3.safetensors", "gemma_root": "gemma"}),
    "ltx_25 v": (partial(write_release, version="2.5"), LTX_25),
    "minimax_h3 t2va": (write_tiny_h3, H3),
    "minimax_h3 fl2va": (write_tiny_h3, H3),
    "flux dev": (write_tiny_flux, FLUX | {"clip_l": "clip_l.safetensors"}),
    "flux schnell": (partial(write_tiny_flux, kind="schnell"), FLUX | {"clip_l": "clip_l.safetensors"}),
    "flux_kontext dev": (
        write_tiny_flux,
        {
            "dit": "dit.safetensors",
            "vae": "ae.safetensors",
            "text_encoder1": "t5xxl_fp16.safetensors",
            "text_encoder2": "clip_l.safetensors",
        },
    ),
    "flux_2 klein-base-4b": (write_tiny_flux_2, IMAGES),
    "flux_2 klein-4b": (write_tiny_flux_2, IMAGES),
    "flux_3 klein-base": (write_tiny_flux_3, IMAGES),
    "chroma hd": (partial(write_tiny_flux, kind="chroma"), FLUX),
    "stable_diffusion 1.5": (partial(write_tiny_stable_diffusion, kind="sd1"), SD),
    "stable_diffusion 2.1": (partial(write_tiny_stable_diffusion, kind="sd2"), {"ckpt": SD["ckpt"]}),
    "stable_diffusion xl": (partial(write_tiny_stable_diffusion, kind="sdxl"), SD),
    "lumina 2.0": (write_tiny_lumina, {"dit": "dit.safetensors", "ae": "ae.safetensors", "gemma2": "gemma2"}),
}


def write_new_model(name: str, folder: Path) -> list[str]:
    """Write the files of a model, `wan t2v-1.3B`, into a folder. Returns the options of `new` for it."""
    write, files = MODELS[name]
    if not folder.exists():
        write(folder)
    family, task = name.split()
    words = ["--family", family, "--task", task, "--memory", "0"]
    for option, file in files.items():
        words += ["--model_file", f"{option}={folder / file}"]
    return words
