"""Families that come with pieces of their own, as `tests/test_every_option_acts.py` drives them."""

import shutil
from pathlib import Path

from modules.media.writing import write_video
from tests.minimax_h3.test_caching import tone
from tests.tiny.families import DATASET, LAYERED, PRECISE, Command, TinyFamily, WriteClips
from tests.tiny.minimax_h3 import write_tiny_h3
from tests.tiny.project import moving_square, write_clips, write_image, write_plain_images
from tests.tiny.stable_diffusion import WRITERS, tokenizer_folder

H3_FRAMES = 22


def _stable_diffusion(kind: str, scripts: str, training: str) -> TinyFamily:
    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        (folder / "model").mkdir(parents=True)
        WRITERS[kind](folder / "model", name="dit.safetensors")
        tokenizer_folder(folder / "tokenizers")
        write_plain_images(folder, side=32)
        write_image(folder / "start.png", 32, 32)

    texts = ["--tokenizer_cache_dir", "tokenizers"]
    models = ["--ckpt", "model/dit.safetensors", *texts]
    given = ["--pretrained_model_name_or_path", *models[1:]]
    return TinyFamily(
        name=kind,
        prepare=prepare,
        cache_latents=[f"{scripts}_cache_latents.py", *DATASET, *models[:2]],
        cache_texts=[f"{scripts}_cache_text_encoder_outputs.py", *DATASET, *models],
        train=[training, *given, *DATASET, "--network_dim", "4", "--learning_rate", "1e-2"]
        + ["--network_train_unet_only"],
        generate=[f"{scripts}_generate_image.py", *models, "--negative_prompt", "dull"],
        another_run=[],
        changed_habit=[],
        train_full="",
        sample_line="a cat --w 32 --h 32 --d 7 --s 2 --l 3 --n dull",
    )


def _minimax_h3() -> TinyFamily:
    """MiniMax-H3 from texts, whose guidance is built in."""

    def prepare(folder: Path, clips: WriteClips = write_clips) -> None:
        files = write_tiny_h3(folder / "model")
        shutil.copy(files.dit, files.dit.with_name("minimax_h3_ref2va_bf16.safetensors"))
        (folder / "clips").mkdir()
        for number in range(4):
            path = folder / "clips" / f"clip {number}.mkv"
            frames = moving_square(H3_FRAMES + 2, 32, 32, seed=number)
            track = None if number % 2 else tone()
            write_video(path, frames, 24, crf=1, preset="ultrafast", track=track)
            path.with_suffix(".txt").write_text(f"square {number} moves", encoding="utf-8")
        lines = ["[[datasets]]", 'video_directory = "clips"', 'cache_directory = "cache"']
        lines += ['caption_extension = ".txt"', "resolution = [32, 32]", f"target_frames = [{H3_FRAMES}]"]
        (folder / "dataset.toml").write_text("\n".join(lines), encoding="utf-8")
        write_image(folder / "start.png", 32, 32)

    vaes = ["--video_vae", "model/minimax_h3_video_vae.safetensors"]
    vaes += ["--audio_vae", "model/minimax_h3_audio_vae.safetensors", *PRECISE]
    texts = ["--text_encoder", "model/text/qwen3vl.safetensors", "--tokenizer", "model/tokenizer"]
    texts += ["--text_encoder_dtype", "float32"]
    models: Command = ["--dit", "model/minimax_h3_fl2va_bf16.safetensors", *vaes, *texts]
    short = ["--allow_experimental_duration"]
    return TinyFamily(
        name="minimax_h3",
        prepare=prepare,
        cache_latents=["minimax_h3_cache_latents.py", *DATASET, *vaes, *short, "--task", "fl2va"],
        cache_texts=["minimax_h3_cache_text_encoder_outputs.py", *DATASET, *texts]
        + ["--teacher_conditions", "first,last"],
        train=["minimax_h3_train_network.py", *models, *DATASET, "--mixed_precision", "no"]
        + ["--h3_allow_experimental_sample_duration", "--network_dim", "4", "--learning_rate", "1e-2"],
        generate=["minimax_h3_generate_video.py", *models, *short, "--guidance_scale", "1"]
        + ["--video_length", str(H3_FRAMES)],
        another_run=[],
        changed_habit=[],
        train_full="minimax_h3_train.py",
        sample_line=f"a cat --w 32 --h 32 --f {H3_FRAMES} --d 7 --s 2",
    )


FURTHER = (
    _stable_diffusion("sd1", "sd", "train_network.py"),
    _stable_diffusion("sdxl", "sdxl", "sdxl_train_network.py"),
    _minimax_h3(),
    LAYERED,
)
