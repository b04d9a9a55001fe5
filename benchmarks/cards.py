"""Print the tables of docs/cards.md: which options fit which card, as `--plan` predicts; nothing is measured.

    python benchmarks/cards.py

The models are headers of the released files followed by holes (tests/manifests.py), which take no space on
disk. Each cell is one run of a script with `--plan N`: the options that it asks for until the run fits.
"""

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402  # found from here on

import hidream_o1_generate_image  # noqa: E402
import hidream_o1_train_network  # noqa: E402
import hv_1_5_generate_video  # noqa: E402
import hv_1_5_train_network  # noqa: E402
import hv_generate_video  # noqa: E402
import hv_train_network  # noqa: E402
import kandinsky_generate_video  # noqa: E402
import kandinsky_train_network  # noqa: E402
import wan_generate_video  # noqa: E402
import wan_train_network  # noqa: E402
from checkpoints.writing import save_tensors  # noqa: E402
from modules.parser import Parser  # noqa: E402
from tests.manifests import tensor_list, write_hollow  # noqa: E402
from tests.tiny.hidream_o1 import write_tokenizer  # noqa: E402
from tests.tiny.hunyuan_encoders import write_clip_tokenizer, write_llama_tokenizer  # noqa: E402
from tests.tiny.language_models import write_qwen_tokenizer  # noqa: E402
from tests.tiny.project import write_image  # noqa: E402

CARDS = (8, 12, 16, 24)  # GiB
FILES = {
    "wan_small": "wan2.1-t2v-1.3b",
    "wan_t2v": "wan2.1-t2v-14b",
    "wan_i2v": "wan2.1-i2v-14b",
    "hunyuan": "hunyuanvideo-t2v-dit",
    "wan_vae": "wan2.1-vae",
    "umt5": "umt5-xxl-comfy",
    "clip_h": "clip-vision-h",
    "hunyuan_vae": "hunyuanvideo-vae",
    "llava": "llava-llama3-single",
    "clip_l": "clip-l-text",
    "kandinsky_lite": "kandinsky5-lite-dit",
    "kandinsky_pro": "kandinsky5-pro-dit",
    "kandinsky_image": "kandinsky5-lite-t2i-dit",
    "flux_vae": "flux1-ae",
    "qwen": "qwen2.5-vl-7b",
    "hidream_o1": "hidream-o1-comfy",
    "hunyuan_15": "hunyuanvideo1.5-dit",
    "hunyuan_15_vae": "hunyuanvideo1.5-vae",
    "byt5": "byt5-small-glyphxl",
}
IN_BF16 = ("wan_small", "wan_t2v", "wan_i2v")
WAN = "--vae {wan_vae} --t5 {umt5} --t5_tokenizer {pocket} --prompt cat --save_path {out}"
HUNYUAN = (
    "--vae {hunyuan_vae} --text_encoder1 {llava} --text_encoder2 {clip_l} --text_encoder1_tokenizer {llama}"
    " --text_encoder2_tokenizer {clip} --prompt cat --save_path {out}"
)
KANDINSKY = (
    "--text_encoder_qwen {qwen} --text_encoder_clip {clip_l} --text_encoder_qwen_tokenizer {qwen_tokens}"
    " --text_encoder_clip_tokenizer {clip} --prompt cat --save_path {out}"
)
KANDINSKY_CLIP = f"--video_size 512 768 --vae {{hunyuan_vae}} --vae_tiling {KANDINSKY}"
HUNYUAN_15 = "--task t2v --dit {hunyuan_15} --dit_dtype bf16"
HIDREAM_O1 = "--dit {hidream_o1} --tokenizer {o1_tokens}"
TRAIN = (
    "--sdpa --mixed_precision bf16 --gradient_checkpointing --network_dim 32 --optimizer_type adamw8bit"
    " --learning_rate 2e-4 --max_train_steps 100 --output_dir {out} --output_name x"
)


@dataclass(frozen=True)
class PlannedRun:
    """A row: what runs, and the option that keeps the text encoder in 8 bits on cards below 16 GiB."""

    about: str
    main: Callable[[list[str]], None]
    words: str
    encoder: str = ""


RUNS = {
    "Generation": (
        PlannedRun(
            "Wan2.1 T2V 1.3B, 832x480, 81 frames",
            wan_generate_video.main,
            f"--task t2v-1.3B --dit {{wan_small}} --video_size 480 832 {WAN}",
            "--fp8_t5",
        ),
        PlannedRun(
            "Wan2.1 T2V 14B, 832x480, 81 frames",
            wan_generate_video.main,
            f"--task t2v-14B --dit {{wan_t2v}} --video_size 480 832 {WAN}",
            "--fp8_t5",
        ),
        PlannedRun(
            "Wan2.1 I2V 14B, 1280x720, 81 frames",
            wan_generate_video.main,
            "--task i2v-14B --dit {wan_i2v} --clip {clip_h} --image_path {image} --video_size 720 1280 "
            + WAN,
            "--fp8_t5",
        ),
        PlannedRun(
            "HunyuanVideo, 960x544, 129 frames",
            hv_generate_video.main,
            f"--dit {{hunyuan}} --video_size 544 960 --vae_spatial_tile_sample_min_size 128 {HUNYUAN}",
            "--fp8_llm",
        ),
        PlannedRun(
            "HunyuanVideo 1.5, 848x480, 121 frames",
            hv_1_5_generate_video.main,
            f"{HUNYUAN_15} --video_size 480 848 --vae {{hunyuan_15_vae}} --vae_tiling --byt5 {{byt5}} "
            "--text_encoder {qwen} --text_encoder_tokenizer {qwen_tokens} --prompt cat --save_path {out}",
            "--fp8_vl",
        ),
        PlannedRun(
            "Kandinsky 5 Lite, 768x512, 121 frames",
            kandinsky_generate_video.main,
            f"--task k5-lite-t2v-5s-sd --dit {{kandinsky_lite}} {KANDINSKY_CLIP}",
            "--fp8_vl",
        ),
        PlannedRun(
            "Kandinsky 5 Pro, 768x512, 121 frames",
            kandinsky_generate_video.main,
            f"--task k5-pro-t2v-5s-sd --dit {{kandinsky_pro}} {KANDINSKY_CLIP}",
            "--fp8_vl",
        ),
        PlannedRun(
            "Kandinsky 5 Image Lite, 1024x1024",
            kandinsky_generate_video.main,
            "--task k5-lite-t2i-hd --dit {kandinsky_image} --video_size 1024 1024 --vae {flux_vae} "
            + KANDINSKY,
            "--fp8_vl",
        ),
        PlannedRun(
            "HiDream-O1-Image, 2048x2048",
            hidream_o1_generate_image.main,
            f"{HIDREAM_O1} --image_size 2048 2048 --prompt cat --save_path {{out}}",
        ),
    ),
    "Training of a LoRA of rank 32": (
        PlannedRun(
            "Wan2.1 T2V 1.3B, clips of 832x480, 81 frames",
            wan_train_network.main,
            f"--task t2v-1.3B --dit {{wan_small}} --dataset_config {{wan_clips}} {TRAIN}",
        ),
        PlannedRun(
            "Wan2.1 T2V 14B, images of 832x480",
            wan_train_network.main,
            f"--task t2v-14B --dit {{wan_t2v}} --dataset_config {{wan_pictures}} {TRAIN}",
        ),
        PlannedRun(
            "Wan2.1 T2V 14B, clips of 832x480, 33 frames",
            wan_train_network.main,
            f"--task t2v-14B --dit {{wan_t2v}} --dataset_config {{wan_short}} {TRAIN}",
        ),
        PlannedRun(
            "HunyuanVideo, images of 960x544",
            hv_train_network.main,
            f"--dit {{hunyuan}} --dataset_config {{hunyuan_pictures}} {TRAIN}",
        ),
        PlannedRun(
            "HunyuanVideo, clips of 960x544, 33 frames",
            hv_train_network.main,
            f"--dit {{hunyuan}} --dataset_config {{hunyuan_short}} {TRAIN}",
        ),
        *(
            PlannedRun(
                f"HunyuanVideo 1.5, clips of 848x480, {frames} frames",
                hv_1_5_train_network.main,
                f"{HUNYUAN_15} --dataset_config {{hunyuan_15_{frames}}} {TRAIN}",
            )
            for frames in (33, 121)
        ),
        PlannedRun(
            "Kandinsky 5 Lite, clips of 768x512, 33 frames",
            kandinsky_train_network.main,
            f"--task k5-lite-t2v-5s-sd --dit {{kandinsky_lite}} --dataset_config {{kandinsky_short}} {TRAIN}",
        ),
        PlannedRun(
            "Kandinsky 5 Lite, clips of 768x512, 121 frames",
            kandinsky_train_network.main,
            f"--task k5-lite-t2v-5s-sd --dit {{kandinsky_lite}} --dataset_config {{kandinsky_clips}} {TRAIN}",
        ),
        PlannedRun(
            "Kandinsky 5 Pro, clips of 768x512, 33 frames",
            kandinsky_train_network.main,
            f"--task k5-pro-t2v-5s-sd --dit {{kandinsky_pro}} --dataset_config {{kandinsky_short}} {TRAIN}",
        ),
        PlannedRun(
            "Kandinsky 5 Image Lite, images of 1024x1024",
            kandinsky_train_network.main,
            "--task k5-lite-t2i-hd --dit {kandinsky_image} --dataset_config {kandinsky_pictures} " + TRAIN,
        ),
        *(
            PlannedRun(
                f"HiDream-O1-Image, images of {side}x{side}",
                hidream_o1_train_network.main,
                f"{HIDREAM_O1} --dataset_config {{o1_{side}}} {TRAIN}",
            )
            for side in (1024, 2048)
        ),
    ),
}


def main() -> None:
    """Print a table for each kind of run."""
    Parser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as made:
        places = lay_out(Path(made))
        for title, runs in RUNS.items():
            print(f"\n## {title}\n")
            print(f"| | {' | '.join(f'{card} GB' for card in CARDS)} |\n|---|{'---|' * len(CARDS)}")
            for run in runs:
                cells = [plan_for(run, card, places) for card in CARDS]
                print(f"| {run.about} | {' | '.join(cells)} |", flush=True)


def lay_out(folder: Path) -> dict[str, str]:
    """Write headers, tokenizers, an image and caches; return the path of each by its name."""
    places = {"out": str(folder / "out"), "pocket": str(ROOT / "pocket" / "tokenizer")}
    for name, manifest in FILES.items():
        tensors = tensor_list(manifest)
        if name in IN_BF16:
            tensors = {key: ("BF16", shape) for key, (_, shape) in tensors.items()}
        places[name] = str(write_hollow(folder / f"{name}.safetensors", tensors))
    write_llama_tokenizer(folder / "llama")
    write_clip_tokenizer(folder / "clip")
    write_qwen_tokenizer(folder / "qwen_tokens")
    write_tokenizer(folder / "o1_tokens")
    write_image(folder / "image.png", 1280, 720)
    places |= {
        "llama": str(folder / "llama"),
        "clip": str(folder / "clip"),
        "qwen_tokens": str(folder / "qwen_tokens"),
        "o1_tokens": str(folder / "o1_tokens"),
        "image": str(folder / "image.png"),
    }
    for name, tag, frames, height, width in (
        ("wan_clips", "wan", 81, 480, 832),
        ("wan_short", "wan", 33, 480, 832),
        ("wan_pictures", "wan", 1, 480, 832),
        ("hunyuan_short", "hv", 33, 544, 960),
        ("hunyuan_pictures", "hv", 1, 544, 960),
        ("hunyuan_15_33", "hv15", 33, 480, 848),
        ("hunyuan_15_121", "hv15", 121, 480, 848),
        ("kandinsky_short", "k5", 33, 512, 768),
        ("kandinsky_clips", "k5", 121, 512, 768),
        ("kandinsky_pictures", "k5", 1, 1024, 1024),
        ("o1_1024", "ho1", 1, 1024, 1024),
        ("o1_2048", "ho1", 1, 2048, 2048),
    ):
        places[name] = str(write_cache(folder / name, tag, frames, height, width))
    return places


def write_cache(folder: Path, tag: str, frames: int, height: int, width: int) -> Path:
    """Write the caches of one item with a text of 256 tokens, and the dataset file."""
    shape = ((frames - 1) // 4 + 1, height // 8, width // 8)
    name = (
        f"x_00000-{frames:03d}_{width:04d}x{height:04d}_{tag}"
        if frames > 1
        else f"x_{width:04d}x{height:04d}_{tag}"
    )
    if tag == "hv15":
        shape = (shape[0], height // 16, width // 16)
    latents = torch.zeros(32 if tag == "hv15" else 16, *shape)
    if tag == "ho1":  # pixels
        shape = (height, width)
        latents = torch.zeros(3, *shape)
    save_tensors(folder / f"{name}.safetensors", {f"latents_{'x'.join(map(str, shape))}_float32": latents})
    if tag == "wan":
        texts = {"varlen_t5_bfloat16": torch.zeros(256, 4096, dtype=torch.bfloat16)}
    elif tag == "hv15":
        texts = {
            "varlen_vl_embed_bfloat16": torch.zeros(256, 3584, dtype=torch.bfloat16),
            "varlen_byt5_embed_float16": torch.zeros(0, 1472, dtype=torch.float16),
        }
    elif tag == "k5":
        texts = {
            "varlen_text_embeds_bfloat16": torch.zeros(256, 3584, dtype=torch.bfloat16),
            "pooled_embed_bfloat16": torch.zeros(768, dtype=torch.bfloat16),
        }
    elif tag == "ho1":
        texts = {"varlen_hidream_o1_ids_int64": torch.zeros(256, dtype=torch.int64)}
    else:
        texts = {
            "llm_float16": torch.zeros(256, 4096, dtype=torch.float16),
            "llm_mask": torch.ones(256, dtype=torch.bool),
            "clipL_float16": torch.zeros(768, dtype=torch.float16),
            "clipL_mask": torch.ones(77, dtype=torch.bool),
        }
    save_tensors(folder / f"x_{tag}_te.safetensors", texts)
    kind = "video" if frames > 1 else "image"
    more = f"target_frames = [{frames}]\n" if frames > 1 else ""
    text = (
        f'[[datasets]]\n{kind}_directory = "{folder.as_posix()}"\ncache_directory = "{folder.as_posix()}"\n'
        f"resolution = [{width}, {height}]\n{more}"
    )
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def plan_for(run: PlannedRun, card: int, places: dict[str, str]) -> str:
    """Return the options that make a run fit a card, as its plan asks for them."""
    encoder = run.encoder if card < 16 else ""
    argv = [*run.words.format(**places).split(), *encoder.split(), "--plan", str(card)]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run.main(argv)
    text = shown.getvalue()
    if "\nFits:" in text:
        return f"`{encoder}`" if encoder else "no option"
    advice = re.findall(
        r"^  (.+?)(?:: ([\d.]+) GiB.*)?$", text.partition("the cheapest first:\n")[2], re.MULTILINE
    )
    options = [option for option, _ in advice if option.startswith("--")]
    fits = text.rstrip().endswith("fits") and "by itself" not in text
    if not fits:
        return "does not fit"
    return "`" + " ".join(filter(None, [encoder, *options])) + "`"


if __name__ == "__main__":
    main()
