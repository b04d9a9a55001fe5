"""Every family and variant as the parametrised tests drive it: how to write it to disk, and the commands a
user would type.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from tests.ltx_2.release import write_release
from tests.sound_media import Track, write_media
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
from tests.tiny.ideogram4 import write_tiny_ideogram4
from tests.tiny.kandinsky import write_tiny_kandinsky
from tests.tiny.kandinsky_6 import write_tiny_kandinsky_6
from tests.tiny.krea2 import write_tiny_krea2
from tests.tiny.lumina import write_tiny_lumina
from tests.tiny.moss_image import write_tiny_moss_image
from tests.tiny.project import (
    write_clips,
    write_dataset,
    write_image,
    write_image_dataset,
    write_images,
    write_plain_images,
)
from tests.tiny.qwen_image import write_tiny_qwen_image
from tests.tiny.qwen_image_21 import write_tiny_qwen_image_21
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.tiny.z_image import write_tiny_z_image

Command = list[str]  # script, then arguments
WriteClips = Callable[[Path], None]
# of a training
OUTPUT = [
    *("--output_dir", "output", "--output_name", "lora", "--seed", "1", "--max_data_loader_n_workers", "0")
]
DATASET = ["--dataset_config", "dataset.toml"]
VAE, TEXTS = ["--vae", "model/vae.safetensors"], ["--text_encoder", "model/text_encoder"]
PRECISE = ["--vae_dtype", "float32"]
RATE = "1e-1"  # high: after three steps a LoRA has to show


def _network(name: str) -> Command:
    return f"--network_module networks.{name} --network_dim 4 --learning_rate {RATE}".split()


@dataclass(frozen=True)
class TinyFamily:
    """The commands of one variant; they are run in a folder laid out by `prepare`."""

    name: str
    # writes all files into a folder; also given what to write clips with: `write_clips` if it is not given
    prepare: Callable[..., None]
    cache_latents: Command
    cache_texts: Command
    train: Command
    generate: Command
    # options with which a state of `train` is not resumed; none if the model's file excludes them
    another_run: Command
    changed_habit: Command  # options that a resumed run may change, with a warning
    # the script that trains the transformer itself, with the models of `train`; "": there is none
    train_full: str
    sample_line: str = "a cat --w 32 --h 32 --f 5 --d 7 --s 2 --fs 5 --l 3"


def _wan(
    task: str,
    kind: str,
    *,
    with_clip: Command,
    media: Command,
    line: str = "",
    more: str = "",
    sentence: Command | None = None,
) -> TinyFamily:
    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_tiny_wan(folder / "model", kind)
        clips(folder / "clips")
        clips(folder / "control")
        if "references" in more:
            (folder / "references").mkdir()
            for clip in (folder / "clips").glob("*.mp4"):
                write_image(folder / "references" / f"{clip.stem}.png", 40, 24)
        write_dataset(folder, more=more.format(folder=folder.as_posix()))
        write_image(folder / "start.png", 32, 32)
        write_image(folder / "end.png", 32, 32)

    texts = ["--t5", "model/t5.safetensors"]
    models = [
        "--task",
        task,
        "--dit",
        "model/dit.safetensors",
        *VAE,
        *texts,
        *(with_clip[:2] if with_clip[:1] == CLIP[:1] else []),
    ]
    return TinyFamily(
        name=f"wan {task}",
        prepare=prepare,
        cache_latents=["wan_cache_latents.py", *DATASET, *VAE, *PRECISE, *with_clip],
        cache_texts=["wan_cache_text_encoder_outputs.py", *DATASET, *texts, *(sentence or [])],
        train=["wan_train_network.py", *models, *DATASET, *(sentence or []), "--sdpa", *_network("lora_wan")],
        generate=["wan_generate_video.py", *models, *media, *LENGTH],
        another_run=["--task", "t2v-14B"] if task == "t2v-1.3B" else [],
        changed_habit=["--rope_func", "comfy"],
        train_full="wan_train.py",
        sample_line=f"{TinyFamily.sample_line} {line}".strip(),
    )


def _hunyuan(name: str, kind: str, *, caching: Command, media: Command, line: str = "") -> TinyFamily:
    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_tiny_hunyuan(folder / "model", kind)
        clips(folder / "clips")
        write_dataset(folder)
        write_image(folder / "start.png", 32, 32)

    models = ["--dit", "model/dit.safetensors", *VAE, *PRECISE, *TWO_TEXTS]
    return TinyFamily(
        name=name,
        prepare=prepare,
        cache_latents=["cache_latents.py", *DATASET, *VAE, *PRECISE, *caching],
        cache_texts=["cache_text_encoder_outputs.py", *DATASET, *TWO_TEXTS],
        train=["hv_train_network.py", *models, *DATASET, "--sdpa", *_network("lora")],
        generate=["hv_generate_video.py", *models, *media, "--negative_prompt", "dull", *LENGTH],
        another_run=[],
        changed_habit=["--dit_dtype", "bfloat16"],
        train_full="hv_train.py",
        sample_line=f"{TinyFamily.sample_line} --n dull {line}".strip(),
    )


def _kandinsky(name: str, task: str, *, media: Command, line: str = "") -> TinyFamily:
    """Kandinsky 5 from text, from a first image, or for images."""
    is_image = "t2i" in task

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_tiny_kandinsky(folder / "model", "image" if is_image else "video")
        if is_image:
            write_plain_images(folder, side=48)
        else:
            clips(folder / "clips")
            write_dataset(folder)
        write_image(folder / "start.png", 32, 32)

    texts = ["--text_encoder_qwen", "model/text_encoder", "--text_encoder_clip", "model/text_encoder_2"]
    texts += ["--text_encoder_dtype", "float32"]
    release = ["--task", task]
    models = ["--dit", "model/dit.safetensors", *release, *VAE, *PRECISE, *texts]
    length = ["--flow_shift", "5"] if is_image else LENGTH
    sample = "a cat --w 32 --h 32 --d 7 --s 2 --fs 5 --l 3" if is_image else TinyFamily.sample_line
    return TinyFamily(
        name=name,
        prepare=prepare,
        cache_latents=["kandinsky_cache_latents.py", *DATASET, *VAE, *PRECISE, *release],
        cache_texts=["kandinsky_cache_text_encoder_outputs.py", *DATASET, *texts, *release],
        train=["kandinsky_train_network.py", *models, *DATASET, "--sdpa", *_network("lora_kandinsky")],
        generate=["kandinsky_generate_video.py", *models, *media, "--negative_prompt", "dull", *length],
        another_run=["--task", "k5-lite-t2v-10s-sd"] if task == "k5-lite-t2v-5s-sd" else [],
        changed_habit=["--dit_dtype", "bfloat16"],
        train_full="kandinsky_train.py",
        sample_line=f"{sample} --n dull {line}".strip(),
    )


def _kandinsky_6() -> TinyFamily:
    """Every second clip has sound, and half of the batches begin with an image."""

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_tiny_kandinsky_6(folder / "model")
        clips(folder / "clips")
        for index in (0, 2):
            write_media(folder / "clips" / f"clip {index}.mp4", Track(at=(0.2,)), frames=9, fps=16)
        write_dataset(folder)
        write_image(folder / "start.png", 32, 32)

    texts = ["--text_encoder_qwen", "model/text_encoder", "--text_encoder_clip", "model/text_encoder_2"]
    texts += ["--text_encoder_dtype", "float32"]
    release = ["--task", "k6-lite-5s"]
    sound = ["--audio_vae", "model/audio_vae"]
    models = ["--dit", "model/dit.safetensors", *release, *VAE, *PRECISE, *sound, *texts]
    models += ["--vocoder", "model/vocoder"]
    return TinyFamily(
        name="kandinsky_6",
        prepare=prepare,
        cache_latents=["kandinsky_cache_latents.py", *DATASET, *VAE, *PRECISE, *release, *sound],
        cache_texts=["kandinsky_cache_text_encoder_outputs.py", *DATASET, *texts, *release],
        train=["kandinsky_train_network.py", *models, *DATASET, "--sdpa", *_network("lora_kandinsky")]
        + ["--first_frame_probability", "0.5"],
        generate=["kandinsky_generate_video.py", *models, *START, "--negative_prompt", "dull", *LENGTH],
        another_run=["--first_frame_probability", "1.0"],
        changed_habit=["--audio_loss_weight", "2"],
        train_full="kandinsky_train.py",
        sample_line=f"{TinyFamily.sample_line} --n dull {FROM}".strip(),
    )


def _hunyuan_video_15(
    name: str, task: str, *, with_siglip: Command, media: Command, line: str = ""
) -> TinyFamily:
    """HunyuanVideo 1.5 from text, or from a first image, which SigLIP sees."""

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_tiny_hunyuan_video_15(folder / "model")
        clips(folder / "clips")
        write_dataset(folder)
        write_image(folder / "start.png", 32, 32)

    texts = ["--text_encoder", "model/text_encoder", "--byt5", "model/byt5.safetensors"]
    texts += ["--text_encoder_dtype", "float32"]
    models = ["--dit", "model/dit.safetensors", "--task", task, *VAE, *PRECISE, *texts, *with_siglip]
    caching = ["--i2v", *with_siglip] if with_siglip else []
    return TinyFamily(
        name=name,
        prepare=prepare,
        cache_latents=["hv_1_5_cache_latents.py", *DATASET, *VAE, *PRECISE, *caching],
        cache_texts=["hv_1_5_cache_text_encoder_outputs.py", *DATASET, *texts],
        train=["hv_1_5_train_network.py", *models, *DATASET, "--sdpa", *_network("lora_hv_1_5")],
        generate=["hv_1_5_generate_video.py", *models, *media, "--negative_prompt", "dull", *LENGTH],
        another_run=["--task", "t2v"] if with_siglip else [],
        changed_habit=["--dit_dtype", "bfloat16"],
        train_full="hv_1_5_train.py",
        sample_line=f"{TinyFamily.sample_line} --n dull {line}".strip(),
    )


def _framepack(
    name: str, *, switches: Command, media: Command, line: str = "", is_image: bool = False
) -> TinyFamily:
    """Sections are one latent frame long: clips of 5 and 9 frames have one and two."""

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_tiny_framepack(folder / "model")
        write_image(folder / "start.png", 32, 32)
        if is_image:
            write_images(folder / "clips", folder / "control")
            write_image_dataset(folder, batch_size=2)
        else:
            clips(folder / "clips")
            write_dataset(folder, frames="5, 9", batch_size=2, more="fp_latent_window_size = 1")

    image_encoder = ["--image_encoder", "model/siglip.safetensors"]
    models = ["--dit", "model/dit.safetensors", *VAE, *TWO_TEXTS, *image_encoder]
    models += ["--latent_window_size", "1"]
    shared = [] if is_image else switches  # a picture is asked for by its own options
    habits = {"": ["--f1"], "--f1": ["--one_frame"]}
    return TinyFamily(
        name=name,
        prepare=prepare,
        cache_latents=["fpack_cache_latents.py", *DATASET, *VAE, *image_encoder, *switches],
        cache_texts=["fpack_cache_text_encoder_outputs.py", *DATASET, *TWO_TEXTS],
        train=["fpack_train_network.py", *models, *switches, *DATASET, "--sdpa", *_network("lora_framepack")],
        generate=["fpack_generate_video.py", *models, *shared, *media, *START, "--negative_prompt", "dull"],
        another_run=[],
        changed_habit=habits.get(" ".join(switches), ["--guidance_scale", "5"]),
        train_full="fpack_train.py",
        sample_line=f"a cat --w 32 --h 32 --f 9 --d 7 --s 2 --l 3 --n dull --i start.png {line}".strip(),
    )


def _ltx_2(name: str, mode: str, version: str) -> TinyFamily:
    """With sound, every second clip has one; without, each has a reference."""
    has_references = mode == "v"

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_release(folder / "model", version)
        clips(folder / "clips")
        for index in (0, 2):
            write_media(folder / "clips" / f"clip {index}.mp4", Track(at=(0.2,)), frames=9, fps=16)
        (folder / "references").mkdir(exist_ok=True)
        for clip in (folder / "clips").glob("*.mp4"):
            shutil.copy(clip, folder / "references")
        references = f'reference_directory = "{(folder / "references").as_posix()}"'
        write_dataset(folder, frames="1, 9", more=references if has_references else "")
        write_image(folder / "start.png", 32, 32)

    release = ["--ltx2_checkpoint", LTX_2, "--ltx2_mode", mode]
    vaes, texts = [], ["--gemma_root", "model/gemma", "--text_encoder_dtype", "float32"]
    if version == "2.5":
        vaes = [
            *("--ltx2_video_vae", "model/video vae.safetensors"),
            *("--ltx2_audio_vae", "model/audio vae.safetensors"),
        ]
        texts[:2] = ["--ltx2_text_encoder_checkpoint", "model/text.safetensors"]
    models = [*release, *PRECISE, *vaes, *texts]
    shown = ["--reference_video", "references/clip 0.mp4"] if has_references else []
    return TinyFamily(
        name=name,
        prepare=prepare,
        cache_latents=["ltx2_cache_latents.py", *DATASET, *release, *PRECISE, *vaes],
        cache_texts=["ltx2_cache_text_encoder_outputs.py", *DATASET, *release, *texts],
        train=["ltx2_train_network.py", *models, *DATASET, "--sdpa", *_network("lora_ltx2")],
        generate=["ltx2_generate_video.py", *models, *START, *shown]
        + ["--negative_prompt", "dull", "--video_length", "9", "--flow_shift", "5"],
        another_run=["--lora_target_preset", "full"],
        changed_habit=["--audio_loss_weight", "2"],
        train_full="ltx2_train.py" if mode == "av" else "",
        sample_line="a cat --w 32 --h 32 --f 9 --d 7 --s 2 --fs 5 --l 3 --n dull --i start.png"
        + (" --v references/clip 0.mp4" if has_references else ""),
    )


def _images(
    name: str,
    scripts: str,
    lora: str,
    write: Callable[[Path], object],
    *,
    vae: Command,
    texts: Command,
    dit: str = "--dit",
    release: Sequence[str] = (),
    training: Sequence[str] = ("--sdpa",),
    making: Sequence[str] = (),
    line: str = "",
    **others: Any,
) -> TinyFamily:
    """A family of pictures, in float32. scripts: how their names begin. write: its models, and its data where
    they are more than four pictures. dit: the option of the transformer. release: options of all scripts.
    others: fields that differ.
    """

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        write_plain_images(
            folder, side=32 if name.startswith(("hidream_o1", "hunyuan_image", "qwen_image_21")) else 48
        )
        write(folder)

    vae, texts = [*vae, *PRECISE], [*texts, "--text_encoder_dtype", "float32"]
    models = ["model/dit.safetensors", *vae, *texts, *release]
    default = TinyFamily(
        name=name,
        prepare=prepare,
        cache_latents=[f"{scripts}_cache_latents.py", *DATASET, *vae, *release],
        cache_texts=[f"{scripts}_cache_text_encoder_outputs.py", *DATASET, *texts, *release],
        train=[f"{scripts}_train_network.py", dit, *models, *DATASET, *training, *_network(lora)],
        generate=[f"{scripts}_generate_image.py", dit, *models, *making, "--negative_prompt", "dull"],
        another_run=[],
        changed_habit=["--dit_dtype", "bfloat16"],
        train_full="",
        sample_line=f"a cat --w 32 --h 32 --d 7 --s 2 --l 3 --n dull {line}".strip(),
    )
    return replace(default, **others)


def _flux(name: str, kind: str) -> TinyFamily:
    clip = [] if kind == "chroma" else ["--clip_l", "model/clip_l.safetensors"]
    mask = ["--model_type", "chroma", "--apply_t5_attn_mask"] if kind == "chroma" else []
    made = _images(
        *(name, "flux", "lora_flux", lambda folder: write_tiny_flux(folder / "model", kind)),
        vae=["--ae", "model/ae.safetensors"],
        texts=[*clip, "--t5xxl", "model/t5xxl_fp16.safetensors", *mask],
        training=["--sdpa", "--model_prediction_type", "raw", "--network_train_unet_only"],
        train_full="flux_train.py",
    )
    first, _, *train = made.train
    return replace(made, train=[first, "--pretrained_model_name_or_path", *train])


def write_references(folder: Path, endings: Sequence[str] = ("",)) -> None:
    """References for each of four pictures, one for each ending of their names, and one for a generation."""
    (folder / "control").mkdir(exist_ok=True)
    for index in range(4):
        for ending in endings:
            write_image(folder / "control" / f"picture {index}{ending}.png", 48, 48)
    with (folder / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write(f'control_directory = "{folder.as_posix()}/control"\n')
    write_image(folder / "start.png", 64, 48)


def write_layers(folder: Path) -> None:
    """Two layers of each of four pictures, transparent at their left, and a picture to take apart."""
    for index in range(4):
        for number in (1, 2):
            pixels = numpy.full((48, 48, 4), 60 * index + 20 * number, numpy.uint8)
            pixels[..., 3] = 255
            pixels[:, : 12 * number, 3] = 0
            Image.fromarray(pixels).save(folder / "clips" / f"picture {index}_{number}.png")
    with (folder / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write("multiple_target = true\n")
    write_image(folder / "start.png", 64, 48)


def _kontext() -> TinyFamily:
    """FLUX.1 Kontext, which learns and makes edits of a reference; it keeps its small size."""

    def write(folder: Path) -> None:
        write_tiny_flux(folder / "model")
        write_references(folder)

    texts = ["--text_encoder1", "model/t5xxl_fp16.safetensors", "--text_encoder2", "model/clip_l.safetensors"]
    return _images(
        *("kontext", "flux_kontext", "lora_flux", write),
        vae=["--vae", "model/ae.safetensors"],
        texts=texts,
        training=["--sdpa", "--no_resize_control"],
        making=["--control_image_path", "start.png", "--no_resize_control"],
        line="--ci start.png",
        train_full="flux_kontext_train.py",
    )


def _flux_2() -> TinyFamily:
    """FLUX.2 klein-base, which learns and makes edits of two references."""

    def write(folder: Path) -> None:
        write_tiny_flux_2(folder / "model")
        write_references(folder, ("_0", "_1"))
        write_image(folder / "end.png", 32, 48)

    return _images(
        *("flux_2", "flux_2", "lora_flux_2", write),
        vae=VAE,
        texts=TEXTS,
        release=["--model_version", "klein-base-4b"],
        making=["--control_image_path", "start.png", "end.png"],
        line="--ci start.png --ci end.png",
        another_run=["--model_version", "klein-4b"],
        train_full="flux_2_train.py",
    )


def _flux_3() -> TinyFamily:
    """FLUX 3 base, which learns and makes edits of two references."""

    def write(folder: Path) -> None:
        write_tiny_flux_3(folder / "model")
        write_references(folder, ("_0", "_1"))
        write_image(folder / "end.png", 32, 48)

    return _images(
        *("flux_3", "flux_3", "lora_flux_3", write),
        vae=VAE,
        texts=TEXTS,
        making=["--control_image_path", "start.png", "end.png"],
        line="--ci start.png --ci end.png",
        train_full="flux_3_train.py",
    )


def _lumina() -> TinyFamily:
    return _images(
        *("lumina", "lumina", "lora_lumina", lambda folder: write_tiny_lumina(folder / "model")),
        dit="--pretrained_model_name_or_path",
        vae=["--ae", "model/ae.safetensors"],
        texts=["--gemma2", "model/gemma2", "--system_prompt", "Draw."],
        training=["--network_train_unet_only"],
        making=["--flow_shift", "5"],
        line="--fs 5",
        train_full="lumina_train.py",
    )


def _anima() -> TinyFamily:
    """Anima, whose scripts call the text encoder's file otherwise in training and generation."""
    texts = ["--qwen3", "model/text_encoder", "--t5_tokenizer_path", "model/t5_tokenizer"]
    return _images(
        *("anima", "anima", "lora_anima", lambda folder: write_tiny_anima(folder / "model")),
        dit="--pretrained_model_name_or_path",
        vae=VAE,
        texts=texts,
        training=["--network_train_unet_only"],
        train_full="anima_train.py",
    )


def _qwen_image(version: str = "") -> TinyFamily:
    """Qwen-Image, or a release that edits pictures."""

    def write(folder: Path) -> None:
        write_tiny_qwen_image(folder / "model", edits=bool(version))
        if version:
            write_references(folder)

    return _images(
        *(f"qwen_image {version}".rstrip(), "qwen_image", "lora_qwen_image", write),
        vae=VAE,
        texts=TEXTS,
        release=["--model_version", version] if version else [],
        making=["--control_image_path", "start.png", "--resize_control_to_official_size"] if version else [],
        line="--ci start.png" * bool(version),
        train_full="qwen_image_train.py",
    )


def _qwen_image_layered() -> TinyFamily:
    """Qwen-Image-Layered, which takes pictures apart into two layers."""

    def write(folder: Path) -> None:
        write_tiny_qwen_image(folder / "model", layered=True)
        write_layers(folder)

    return _images(
        *("qwen_image layered", "qwen_image", "lora_qwen_image", write),
        vae=VAE,
        texts=TEXTS,
        release=["--model_version", "layered"],
        making=["--control_image_path", "start.png", "--output_layers", "2"],
        line="--ci start.png --f 2",
        train_full="qwen_image_train.py",
    )


def _z_image() -> TinyFamily:
    return _images(
        *("z_image", "zimage", "lora_zimage", lambda folder: write_tiny_z_image(folder / "model")),
        vae=VAE,
        texts=TEXTS,
        making=["--flow_shift", "5"],
        line="--fs 5",
        train_full="zimage_train.py",
    )


def _krea2(edits: bool = False) -> TinyFamily:
    """Krea 2, or its edits with references that attend to each other alone."""

    def write(folder: Path) -> None:
        write_tiny_krea2(folder / "model")
        if edits:
            write_references(folder)

    made = _images(
        *("krea2 edit" if edits else "krea2", "krea2", "lora_krea2", write),
        vae=VAE,
        texts=TEXTS,
        training=["--sdpa", *["--edit", "--kv_cache"] * edits],
        making=["--control_image_path", "start.png", "--kv_cache"] * edits,
        line="--ci start.png" * edits,
        train_full="krea2_train.py",
    )
    edit = ["--edit"] * edits
    return replace(made, cache_latents=[*made.cache_latents, *edit], cache_texts=[*made.cache_texts, *edit])


def _qwen_image_21(edits: bool = False) -> TinyFamily:
    """Qwen-Image-2.1, or its edits of two references."""

    def write(folder: Path) -> None:
        write_tiny_qwen_image_21(folder / "model")
        if edits:
            write_references(folder, ("_0", "_1"))

    return _images(
        *("qwen_image_21 edit" if edits else "qwen_image_21", "qwen_image_21", "lora_qwen_image_21", write),
        vae=VAE,
        texts=TEXTS,
        making=["--control_image_path", "start.png"] * edits,
        line="--ci start.png" * edits,
        train_full="qwen_image_21_train.py",
    )


def _moss_image(edits: bool = False) -> TinyFamily:
    """MOSS-Image, or its edits of two references."""

    def write(folder: Path) -> None:
        write_tiny_moss_image(folder / "model")
        if edits:
            write_references(folder, ("_0", "_1"))

    return _images(
        *("moss_image edit" if edits else "moss_image", "moss_image", "lora_moss_image", write),
        vae=VAE,
        texts=TEXTS,
        making=["--control_image_path", "start.png"] * edits,
        line="--ci start.png" * edits,
        train_full="moss_image_train.py",
    )


def _fibo_2(edits: bool = False) -> TinyFamily:
    """Fibo 2.0, or its edits of two references."""

    def write(folder: Path) -> None:
        write_tiny_fibo_2(folder / "model")
        if edits:
            write_references(folder, ("_0", "_1"))

    return _images(
        *("fibo_2 edit" if edits else "fibo_2", "fibo_2", "lora_fibo_2", write),
        vae=VAE,
        texts=TEXTS,
        making=["--control_image_path", "start.png"] * edits,
        line="--ci start.png" * edits,
        train_full="fibo_2_train.py",
    )


def _ernie_image() -> TinyFamily:
    return _images(
        *("ernie_image", "ernie_image", "lora_ernie_image"),
        lambda folder: write_tiny_ernie_image(folder / "model"),
        vae=VAE,
        texts=TEXTS,
        train_full="ernie_image_train.py",
    )


def _hidream_o1(edits: bool = False) -> TinyFamily:
    """HiDream-O1-Image, which has neither a VAE nor a text encoder, or its edits of two references."""

    def write(folder: Path) -> None:
        write_tiny_hidream_o1(folder / "model", edits=edits)
        if edits:
            write_references(folder, ("_0", "_1"))

    made = _images(
        *("hidream_o1 edit" if edits else "hidream_o1", "hidream_o1", "lora_hidream_o1", write),
        vae=[],
        texts=[],
        line="--ci start.png" * edits,
    )
    task, shown = ["--task", "i2i"] * edits, ["--control_image_path", "start.png"] * edits
    model = ["--dit", "model/dit.safetensors", "--tokenizer", "model/hidream_o1"]
    return replace(
        made,
        cache_latents=["hidream_o1_cache_latents.py", *DATASET, *task],
        cache_texts=["hidream_o1_cache_text_encoder_outputs.py", *DATASET, *model, *task],
        train=[
            *("hidream_o1_train_network.py", *model, *DATASET, *task, "--sdpa"),
            *_network("lora_hidream_o1"),
        ],
        generate=["hidream_o1_generate_image.py", *model, *shown, "--negative_prompt", "dull"],
        train_full="hidream_o1_train.py",
    )


def _ideogram4() -> TinyFamily:
    return _images(
        *("ideogram4", "ideogram4", "lora_ideogram4"),
        lambda folder: write_tiny_ideogram4(folder / "model"),
        vae=VAE,
        texts=TEXTS,
        line="--fs 5",
        train_full="ideogram4_train.py",
    )


def _hunyuan_image() -> TinyFamily:
    return _images(
        *("hunyuan_image", "hunyuan_image", "lora_hunyuan_image"),
        lambda folder: write_tiny_hunyuan_image(folder / "model"),
        dit="--pretrained_model_name_or_path",
        vae=VAE,
        texts=[*TEXTS, "--byt5", "model/byt5.safetensors"],
        training=["--sdpa", "--network_train_unet_only"],
        line="--fs 5",
        train_full="hunyuan_image_train.py",
    )


TWO_TEXTS = ["--text_encoder1", "model/text_encoder", "--text_encoder2", "model/text_encoder_2"]
LENGTH = ["--video_length", "5", "--flow_shift", "5"]
LTX_2 = "model/ltx 2.3.safetensors"
CLIP = ["--clip", "model/clip.safetensors"]
CONTROL = 'control_directory = "{folder}/control"'
CONTROLS = ["control/picture 0_0.png", "control/picture 0_1.png"]
START, END, FOLLOW = (
    ["--image_path", "start.png"],
    ["--end_image_path", "end.png"],
    ["--control_path", "control/clip 0.mp4"],
)
FROM, TO, ALONG = "--i start.png", "--ei end.png", "--cn control/clip 0.mp4"  # in a line of prompts
SIGLIP = ["--image_encoder", "model/siglip.safetensors"]
ONE_FRAME = ["--one_frame_inference", "target_index=1,control_index=0;3", "--control_image_path", *CONTROLS]

FAMILIES = (
    _wan("t2v-1.3B", "t2v", with_clip=[], media=[]),
    _wan("i2v-14B", "i2v", with_clip=CLIP, media=START, line=FROM),
    _wan("flf2v-14B", "flf2v", with_clip=[*CLIP, "--flf2v"], media=[*START, *END], line=f"{FROM} {TO}"),
    _wan("t2v-1.3B-FC", "fun-control", with_clip=[], media=FOLLOW, line=ALONG, more=CONTROL),
    _wan(
        *("i2v-14B-FC", "fun-control-v1.1"),
        with_clip=CLIP,
        media=[*START, *FOLLOW],
        line=f"{FROM} {ALONG}",
        more=CONTROL,
    ),
    _wan(
        *("vace-1.3B", "vace"),
        with_clip=["--vace"],
        media=["--src_video", "control/clip 0.mp4", "--src_ref_images", "start.png"],
        line=f"{ALONG} --ci start.png",
        more=CONTROL,
    ),
    _wan(
        *("bernini-1.3B", "t2v"),
        with_clip=["--bernini"],
        media=["--src_video", "control/clip 0.mp4", "--src_ref_images", "start.png"],
        line=f"{ALONG} --ci start.png",
        more=f'{CONTROL}\nreference_directory = "{{folder}}/references"',
        sentence=["--bernini_prompt", "rv2v"],
    ),
    _wan("ti2v-5B", "ti2v", with_clip=[], media=START, line=FROM),
    _hunyuan("hunyuan_video", "t2v", caching=[], media=[]),
    _hunyuan("skyreels i2v", "i2v", caching=["--i2v"], media=START, line=FROM),
    _kandinsky("kandinsky", "k5-lite-t2v-5s-sd", media=[]),
    _kandinsky("kandinsky i2v", "k5-lite-i2v-5s-sd", media=START, line=FROM),
    _kandinsky("kandinsky image", "k5-lite-t2i-hd", media=[]),
    _kandinsky_6(),
    _hunyuan_video_15("hunyuan_video_15", "t2v", with_siglip=[], media=[]),
    _hunyuan_video_15("hunyuan_video_15 i2v", "i2v", with_siglip=SIGLIP, media=START, line=FROM),
    _framepack("framepack", switches=[], media=["--video_sections", "2"]),
    _framepack("framepack f1", switches=["--f1"], media=["--video_sections", "2"]),
    _framepack(
        "framepack one frame",
        switches=["--one_frame"],
        media=ONE_FRAME,
        line=f"--of {ONE_FRAME[1]} --ci {CONTROLS[0]} --ci {CONTROLS[1]}",
        is_image=True,
    ),
    _flux("flux", "dev"),
    _flux("chroma", "chroma"),
    _kontext(),
    _flux_2(),
    _flux_3(),
    _lumina(),
    _hunyuan_image(),
    _qwen_image(),
    _qwen_image("edit-2511"),
    _z_image(),
    _krea2(),
    _krea2(edits=True),
    _qwen_image_21(),
    _qwen_image_21(edits=True),
    _moss_image(),
    _moss_image(edits=True),
    _fibo_2(),
    _fibo_2(edits=True),
    _ernie_image(),
    _hidream_o1(),
    _hidream_o1(edits=True),
    _ideogram4(),
    _anima(),
    _ltx_2("ltx_2", "v", "2.5"),
    _ltx_2("ltx_2 with sound", "av", "2.3"),
)
# one of FURTHER: it makes several files of a request, so rooms that look at one result are not for it. Its
# whole way is tests/qwen_image/test_layered_way.py
LAYERED = _qwen_image_layered()
TWO_LISTS = {"hunyuan_video", "framepack", "hunyuan_image", "flux", "kontext", "flux_2"}  # of blocks
ONE_OF_EACH = tuple(one for one in FAMILIES if one.name in {"wan t2v-1.3B", "hunyuan_video", "framepack"})


def family_called(name: str) -> TinyFamily:
    """One of FAMILIES, or LAYERED."""
    return next(each for each in (*FAMILIES, LAYERED) if each.name == name)


def write_deep(family: TinyFamily, folder: Path, clips: WriteClips = write_clips) -> None:
    """Write the project of a family with blocks enough to swap and to skip."""
    family.prepare(folder, clips)
    writers: dict[str, Callable[..., object]] = {
        "hunyuan_video": write_tiny_hunyuan,
        "framepack": write_tiny_framepack,
        **dict.fromkeys(("kandinsky", "kandinsky i2v"), write_tiny_kandinsky),
        "kandinsky image": partial(write_tiny_kandinsky, kind="image"),
        "kandinsky_6": write_tiny_kandinsky_6,
        "hunyuan_image": write_tiny_hunyuan_image,
        "flux": write_tiny_flux,
        "kontext": write_tiny_flux,
        "flux_2": write_tiny_flux_2,
        "flux_3": write_tiny_flux_3,
        "lumina": write_tiny_lumina,
        "z_image": write_tiny_z_image,
        "anima": write_tiny_anima,
        **dict.fromkeys(("krea2", "krea2 edit"), write_tiny_krea2),
        **dict.fromkeys(("qwen_image_21", "qwen_image_21 edit"), write_tiny_qwen_image_21),
        **dict.fromkeys(("moss_image", "moss_image edit"), write_tiny_moss_image),
        **dict.fromkeys(("fibo_2", "fibo_2 edit"), write_tiny_fibo_2),
        "ernie_image": write_tiny_ernie_image,
        "hidream_o1": write_tiny_hidream_o1,
        "hidream_o1 edit": partial(write_tiny_hidream_o1, edits=True),
        "ideogram4": write_tiny_ideogram4,
        "qwen_image": write_tiny_qwen_image,
        "qwen_image edit-2511": partial(write_tiny_qwen_image, edits=True),
        "ltx_2": partial(write_release, version="2.5"),
        "ltx_2 with sound": write_release,
    }
    if family.name in TWO_LISTS:
        writers[family.name](folder / "model", double_blocks=3, single_blocks=6)
    elif family.name == "flux_3":
        write_tiny_flux_3(folder / "model", mode_blocks=2, joint_blocks=6)
    elif family.name in {"hunyuan_video_15", "hunyuan_video_15 i2v"}:
        write_tiny_hunyuan_video_15(folder / "model", double_blocks=4)
    elif family.name in writers:
        writers[family.name](folder / "model", num_layers=4)
    elif family.name.startswith("wan"):
        kind = "vace" if "vace" in family.name else "t2v"
        write_dit(folder / "model", tiny_state(kind, num_layers=4), name="dit")
