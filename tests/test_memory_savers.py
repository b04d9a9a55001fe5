"""What saves memory saves it: the most bytes that scripts hold at once beside files, against their models."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.media.writing import write_video
from tests.commands import ROOT, run_in_processes, run_python
from tests.tiny import wan_encoders
from tests.tiny.families import FAMILIES, OUTPUT, TinyFamily, family_called
from tests.tiny.onnx_files import write_yolo
from tests.tiny.post_interpolation import write_gimm_r
from tests.tiny.post_upscaling import write_rrdb
from tests.tiny.project import write_clips, write_dataset
from tests.tiny.published import write_chat_model
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what no file has")

LAYERS = 12
SIZES = {"dim": 256, "ffn_dim": 1024, "num_heads": 2}
WIDE, ROWS = 24, 320_000  # of the VAE, and of the text encoder's embedding
SLACK = 12_000_000  # bytes: activations, and the interpreter's objects

T2V = "--task t2v-1.3B --dit M/dit.safetensors"
ENCODERS = "--vae M/vae.safetensors --t5 M/t5.safetensors"
MAKES = "--video_size 32 32 --video_length 5 --infer_steps 4 --flow_shift 5 --seed 1 --save_path out"
ONE = f"wan_generate_video.py {T2V} {ENCODERS} {MAKES} --prompt cat"
LATENT = f"{ONE} --output_type latent".replace("M/t5", "small/t5")
PAIR = f"{LATENT} --dit_high_noise M/dit_high.safetensors --task t2v-A14B"
TRAIN = (
    f"wan_train_network.py {T2V} {ENCODERS} --dataset_config dataset.toml --sdpa {' '.join(OUTPUT)} "
    "--network_module networks.lora_wan --network_dim 2 --learning_rate 1e-3 --max_train_steps 1"
)
LORA = "--lora_weight M/lora.safetensors"
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is not kept in the heap
CARD_PROCESS = {"EMULATED_CARD": "1", "ACCELERATE_USE_CPU": "false", **GIVEN_BACK}


@dataclass(frozen=True)
class Saver:
    """A command line, and the files that it may hold at once, in float32, as shares."""

    words: str
    dit: float = 0
    t5: float = 0
    vae: float = 0
    ckpt: float = 0
    processes: int = 1
    typed: str = ""
    slack: int = SLACK


# of two processes: their part, and on a CPU a block gathered, its copy and its part (docs/speed.md)
SHARED = 0.5 + 2.5 / LAYERS
FP8 = 0.25 + 0.05  # the weights of the blocks' linear layers, and the rest
SAVERS = {
    "lazy": Saver(f"{PAIR} --lazy_loading", dit=1),
    "shards": Saver(f"{LATENT} --shard_base", dit=SHARED, processes=2),
    "texts and VAE beside no transformer": Saver(ONE, dit=1),
    "fp8": Saver(f"{LATENT} --fp8_scaled", dit=FP8),
    "fp8 with a LoRA": Saver(f"{LATENT} --fp8_scaled {LORA}", dit=FP8),
    "fp8 without scales": Saver(f"{LATENT} --fp8", dit=FP8),
    "lines of a file": Saver(f"{ONE} --from_file prompts.txt", dit=1),
    "lazy lines": Saver(f"{PAIR} --lazy_loading --from_file prompts.txt", dit=1),
    "16 bits": Saver(f"{LATENT} --dit_dtype bfloat16", dit=0.5),
    "16 bits with a LoRA": Saver(f"{LATENT} --dit_dtype bfloat16 {LORA}", dit=0.5),
    "several files": Saver(LATENT.replace("M/dit.", "M/dit-00001-of-00003."), dit=1),
    "file of torch": Saver(LATENT.replace("M/dit.safetensors", "M/dit.pt"), dit=1),
    "source of a video": Saver(f"{ONE} --video_path clips/a.mp4", dit=1),
    "passes of two processes": Saver(f"{ONE} --cfg_parallel", dit=1, processes=2),
    "tokens of two processes": Saver(f"{LATENT} --context_parallel 2", dit=1, processes=2),
    "strengths": Saver(f"{LATENT} {LORA} --interactive", dit=1, typed="cat\ncat --m 0.5\ncat --m 0.2\n"),
    "training": Saver(f"{TRAIN} --sample_prompts pictures.txt --sample_at_first", dit=1, vae=1),
    "training in fp8": Saver(
        f"{TRAIN} --fp8_base --fp8_scaled --mixed_precision bf16", dit=FP8, slack=2 * SLACK
    ),
    "latents": Saver("wan_cache_latents.py --dataset_config dataset.toml --vae M/vae.safetensors", vae=1),
    "texts": Saver(
        "wan_cache_text_encoder_outputs.py --dataset_config dataset.toml --t5 M/t5.safetensors", t5=1
    ),
    "images in 16 bits": Saver(
        "gen_img.py --ckpt M/sd1.safetensors --prompt cat --W 64 --H 64 --steps 2 --bf16 --outdir out "
        "--tokenizer_cache_dir tokenizers",
        ckpt=0.5,
        slack=2 * SLACK,
    ),
}
DAILY = {"fp8"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small and large models, prompts, clips and their caches."""
    folder = tmp_path_factory.mktemp("savers")
    (folder / "prompts.txt").write_text("cat --w 32 --h 32 --f 5 --s 2\n" * 2, encoding="utf-8")
    (folder / "pictures.txt").write_text("cat --w 32 --h 32 --f 1 --s 2\n", encoding="utf-8")
    for name in ("small", "large"):
        write_tiny_wan(folder / name, experts=2)
        for seed, file in enumerate(("dit", "dit_high")):
            layers = 1 if name == "small" else LAYERS
            write_dit(folder / name, tiny_state("t2v", seed=seed, num_layers=layers, **SIZES), name=file)
    large = folder / "large"
    texts = wan_encoders.t5_tensors()
    texts["token_embedding.weight"] = torch.randn(ROWS, wan_encoders.TEXT_DIM)
    save_file(texts, large / "t5.safetensors")
    save_file(wan_encoders.vae_tensors(WIDE), large / "vae.safetensors")
    return folder


def write_more(folder: Path) -> None:
    """Write what the cases beside the daily ones need."""
    write_clips(folder / "clips", count=2)
    (folder / "clips" / "clip 0.mp4").rename(folder / "clips" / "a.mp4")
    (folder / "clips" / "clip 0.txt").rename(folder / "clips" / "a.txt")
    write_dataset(folder)
    for script, files in (("latents", "--vae small/vae"), ("text_encoder_outputs", "--t5 small/t5")):
        command = [
            f"wan_cache_{script}.py",
            "--dataset_config",
            "dataset.toml",
            *f"{files}.safetensors".split(),
        ]
        run_python(ROOT / command[0], *command[1:], folder=folder)
    for size in ("small", "large"):
        place = folder / size
        state = load_file(place / "dit.safetensors")
        name, width = "lora_unet_blocks_0_cross_attn_v", state["blocks.0.cross_attn.v.weight"].shape[0]
        factors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.alpha": torch.tensor(2.0)}
        save_file({**factors, f"{name}.lora_up.weight": torch.ones(width, 2)}, place / "lora.safetensors")
        torch.save(state, place / "dit.pt")
        for number in range(3):
            part = {name: state[name] for name in sorted(state)[number::3]}
            save_file(part, place / f"dit-{number + 1:05d}-of-00003.safetensors")
    tokenizer_folder(folder / "tokenizers")
    write_sd1(folder / "small")
    write_sd1(folder / "large", block_out_channels=(160, 320))


def run_watched(
    folder: Path,
    commands: Sequence[Sequence[str]],
    processes: int,
    typed: str,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run command lines; return what each process tells of those behind the first."""
    file = folder / "commands.json"
    file.write_text(json.dumps([*commands, typed]), encoding="utf-8")
    if processes == 1:
        script = ROOT / "tests" / "anonymous_memory.py"
        run_python(script, file, folder=folder, environment=environment)
    else:
        run_in_processes(processes, "tests/anonymous_memory.py", file, folder=folder)
    return [json.loads(Path(f"{file}.{rank}").read_text(encoding="utf-8")) for rank in range(processes)]


def daily(names: Sequence[str], chosen: set[str]) -> list[Any]:
    """Parameters of which those that are not chosen are slow."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.slow_cases("lazy", "texts and VAE beside no transformer")
@pytest.mark.parametrize("name", daily([*SAVERS], DAILY))
def test_no_process_holds_more_than_it_has_to(project: Path, name: str) -> None:
    saver, large = SAVERS[name], project / "large"
    if name not in DAILY and not (large / "dit.pt").exists():
        write_more(project)
    commands = [saver.words.replace("M/", f"{size}/").split() for size in ("small", "large")]
    files = {"dit": "dit", "t5": "t5", "vae": "vae", "ckpt": "sd1"}
    allowed = sum(
        getattr(saver, part) * (large / f"{file}.safetensors").stat().st_size
        for part, file in files.items()
        if getattr(saver, part)
    )

    maximum = max(one["most"] for one in run_watched(project, commands, saver.processes, saver.typed))

    assert maximum < allowed + saver.slack


@dataclass(frozen=True)
class CardSaver:
    """A command line for a card: what large models get beside it, and what both memories may hold at once.

    card, host: in files of the transformer. embedding: that of the text encoder passes through the host,
    by a buffer for the largest tensor. vae: it waits there, and works beside the transformer.
    """

    words: str
    only: str = ""
    card: float = 1
    host: float = 0
    embedding: bool = False
    vae: bool = False
    activations: int = 4_000_000  # less than a block


SWAP = "--blocks_to_swap 8"
# two of the four blocks' room are places that blocks take turns in; the rest is outside of blocks
ON_CARD, ON_HOST = 4 / LAYERS + 0.05, 10 / LAYERS
LEARNS = 30_000_000  # clips of 5 frames, and gradients
CARD = {
    "swap": CardSaver(LATENT, SWAP, ON_CARD, ON_HOST),
    "swap in fp8": CardSaver(LATENT, f"--fp8_scaled {SWAP}", FP8 / 3 + 0.05, 0.25 * ON_HOST),
    "swap with a LoRA": CardSaver(f"{LATENT} {LORA}", SWAP, ON_CARD, ON_HOST),
    "three places": CardSaver(LATENT, f"{SWAP} --block_swap_ring_size 3", ON_CARD, 11 / LAYERS),
    "fp8": CardSaver(LATENT, "--fp8_scaled", FP8),
    "texts and VAE beside no transformer": CardSaver(ONE, embedding=True),
    "lazy": CardSaver(PAIR, "--lazy_loading"),
    "offload": CardSaver(PAIR, "--offload_inactive_dit", host=1),
    "offload of lines": CardSaver(PAIR, "--offload_inactive_dit --num_videos 2", host=2),
    "offload and swap": CardSaver(PAIR, f"--offload_inactive_dit {SWAP}", ON_CARD, ON_HOST + 1),
    "training": CardSaver(TRAIN, SWAP, ON_CARD, ON_HOST, activations=LEARNS),
    "training of a pair": CardSaver(
        f"{TRAIN} --dit_high_noise M/dit_high.safetensors --task t2v-A14B --lora_per_expert",
        "--offload_inactive_dit",
        host=2,
        activations=LEARNS,
    ),
    "samples": CardSaver(
        f"{TRAIN} --sample_prompts pictures.txt --sample_at_first",
        SWAP,
        ON_CARD,
        ON_HOST,
        embedding=True,
        vae=True,
    ),
}


@pytest.mark.parametrize("name", daily([*CARD], set()))
def test_neither_card_nor_host_holds_more_than_it_has_to(project: Path, name: str) -> None:
    saver, large = CARD[name], project / "large"
    if name != "swap" and not (large / "dit.pt").exists():
        write_more(project)
    commands = [
        f"{saver.words}{more}".replace("M/", f"{size}/").split()
        for size, more in (("small", ""), ("large", f" {saver.only}"))
    ]
    full = (large / "dit.safetensors").stat().st_size
    vae = (large / "vae.safetensors").stat().st_size if saver.vae else 0
    beside = vae + (ROWS * wan_encoders.TEXT_DIM * 4 if saver.embedding else 0)

    (told,) = run_watched(project, commands, 1, "", environment=CARD_PROCESS)

    assert told["card"] < saver.card * full + vae + saver.activations
    assert told["most"] < saver.host * full + beside + saver.activations + SLACK
    assert told["left"] == 0


TRAINED = "--max_train_steps 1 --sample_every_n_steps 1 --optimizer_type adamw --sample_prompts samples.txt"


@pytest.mark.slow_cases("wan i2v-14B")
@pytest.mark.parametrize("name", daily([one.name for one in FAMILIES], {"wan i2v-14B"}))
def test_encoders_are_gone_when_the_transformer_comes(name: str, tmp_path: Path) -> None:
    family = family_called(name)
    family.prepare(tmp_path)
    size = "--image_size 32 32" if "image" in family.generate[0] else "--video_size 32 32"
    making = [*family.generate, *f"{size} --prompt cat --infer_steps 1 --seed 1 --save_path out".split()]

    (made,) = run_watched(tmp_path, [making, [*making, "--num_videos", "2"]], 1, "")

    events = made["beside"]
    assert events[-1] == ["end", []]
    at_work = [beside for what, beside in events if what == "denoise"]
    (dit,) = at_work[0]
    assert len(at_work) >= 2
    assert all(beside == [dit] for beside in at_work)
    assert [beside for what, beside in events if what == dit] == [[]]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_samples_keep_no_encoder_beside_what_is_trained(family: TinyFamily, tmp_path: Path) -> None:
    """On a CPU no VAE waits for the next sample either."""
    family.prepare(tmp_path)
    (tmp_path / "samples.txt").write_text(f"{family.sample_line}\n", encoding="utf-8")
    for script, *words in (family.cache_latents, family.cache_texts):
        run_python(ROOT / script, *words, folder=tmp_path)
    training = [*family.train, *OUTPUT, *TRAINED.split()]

    (made,) = run_watched(tmp_path, [training, training], 1, "")

    events = made["beside"]
    assert events[-1] == ["end", []]
    at_work = [beside for what, beside in events if what == "denoise"]
    (dit,) = at_work[0]
    assert all(beside == [dit] for beside in at_work)
    assert [beside for what, beside in events if what == dit] == [[]]


@pytest.mark.slow
def test_a_prompt_rewriter_is_gone_when_encoders_come(tmp_path: Path) -> None:
    family = family_called("wan t2v-1.3B")
    family.prepare(tmp_path)
    chat = write_chat_model(tmp_path / "chat")
    making = [*family.generate, "--video_size", "32", "32", "--infer_steps", "1", "--save_path", "out"]
    making += ["--prompt", "a cat", "--prompt_rewrite", "normal", "--prompt_rewrite_model", str(chat)]

    (made,) = run_watched(tmp_path, [making, making], 1, "")

    rewriter, encoder, *_ = made["beside"]
    assert rewriter == ["LlamaForCausalLM", []]
    assert encoder[1] == []
    assert made["beside"][-1] == ["end", []]


@pytest.mark.slow
def test_caching_frees_the_vae_of_pictures_before_that_of_sound(tmp_path: Path) -> None:
    family = family_called("ltx_2 with sound")
    family.prepare(tmp_path)
    again = (tmp_path / "dataset.toml").read_text(encoding="utf-8").replace("/cache", "/other")
    (tmp_path / "again.toml").write_text(again, encoding="utf-8")
    caching = [*family.cache_latents]

    (made,) = run_watched(tmp_path, [caching, [*caching, "--dataset_config", "again.toml"]], 1, "")

    (_, first), (_, second), end = made["beside"]
    assert (first, second, end) == ([], [], ["end", []])


def upscaled(folder: Path) -> str:
    write_rrdb(folder / "r.pth")
    return "upscaler.py --model r.pth --mode esrgan --scale 2"


def interpolated(folder: Path) -> str:
    write_gimm_r(folder / "gimm")
    return "GIMMVFI.py --model gimm --mode gimmvfi_r"


def blurred(folder: Path) -> str:
    write_yolo(folder / "d.onnx")
    return "yolo_blur.py --model d.onnx"


TOOLS = {"upscaler": upscaled, "interpolation": interpolated, "blur": blurred}
SHORT, LONG, SIDES = 24, 72, (320, 192)  # frames, and their size


@pytest.mark.parametrize("name", daily([*TOOLS], set()))
def test_a_tool_for_videos_holds_no_more_of_a_long_one(name: str, tmp_path: Path) -> None:
    words = TOOLS[name](tmp_path)
    for count in (SHORT, LONG):
        frames = np.full((count, SIDES[1], SIDES[0], 3), 128, np.uint8)
        frames[:, :, : SIDES[0] // 2] = (255, 0, 0)  # which the detector finds
        write_video(tmp_path / f"{count}.mp4", frames, fps=16)
    common = "--codec prores --container mkv --device cpu --yes --input"  # x264 looks ahead at 60 frames
    commands = [f"blissful_tuner/{words} {common} {count}.mp4".split() for count in (SHORT, SHORT, LONG)]

    (made,) = run_watched(tmp_path, commands, 1, "", environment=GIVEN_BACK)

    short, long = made["peaks"]
    assert long < short + (LONG - SHORT) * SIDES[0] * SIDES[1] * 3 / 2  # half of the frames that are more
