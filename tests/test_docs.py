"""The commands in README.md and docs/ run as they stand there, on tiny models and short clips: those of a few
pages daily, of the others with --all. Daily the options of all pages are looked for in the scripts.
"""

import argparse
import functools
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.commands import ROOT, run_python
from tests.data_tools.captions.making import run_server
from tests.data_tools.masks.making import write_clipseg
from tests.data_tools.tags.making import first_pixel_weights, write_tagger
from tests.dataset.serving import serve
from tests.faults.messages import succeed_here
from tests.pages import Brought, Command, Shown, outputs_of, parse_command, read_page, sources_of
from tests.project.test_foreign_project import AI_TOOLKIT
from tests.run_pages import wait_for_run_pages
from tests.test_command_line import parser_of
from tests.test_imports import SCRIPTS, TOOLS
from tests.tiny import picture_project
from tests.tiny.picture_project import H3_FRAMES, SIDE, lay_out_flux, lay_out_images, lay_out_sdxl
from tests.tiny.project import (
    lay_out_models,
    write_clips,
    write_image,
    write_image_dataset,
    write_images,
    write_lora,
)
from tests.tiny.published import (
    lay_out_material,
    lay_out_published,
    lay_out_tools,
    lay_out_vision_model,
    write_chat_model,
)
from tests.tiny.wan_encoders import write_encoders
from tests.training.scoring.making import CIRCLE, draw, write_clip
from tests.training.scoring.making import write_dataset as write_scored_dataset

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# files that commands name (of datasets, prompts, code): blocks that begin with their name
NAMED = re.compile(
    r"^```(?:toml|text|python)\n# ([\w/]+\.(?:toml|txt|py))\n(.*?)^```", re.MULTILINE | re.DOTALL
)
# they have tests of their own, or are running this one; RAY is slow
RAY = "tools/cache_on_ray.py"
PYTHON = re.compile(r"^```python\n(import ray\n.*?)^```", re.MULTILINE | re.DOTALL)
AGAIN = {"python reelsmith.py run clips"}  # starts a program for each step, as README's with --download does
# how scripts begin
OF_IMAGES = (
    "anima",
    "ernie_image",
    "ideogram4",
    "fibo_2",
    "flux",
    "flux_2",
    "flux_3",
    "hidream_o1",
    "hunyuan_image",
    "krea2",
    "lumina",
    "moss_image",
    "qwen_image",
    "qwen_image_21",
    "zimage",
)
FULL_MODELS = (*OF_IMAGES, "hv", "hv_1_5", "kandinsky", "ltx2", "wan")
EXEMPT = tomllib.loads((ROOT / "tests" / "data" / "page_blocks.toml").read_text(encoding="utf-8"))
NOT_HERE = tuple(row["command"] for row in EXEMPT["not_run"])
# appended to a script's words, so that the last value of an option wins
GENERATION = "--video_size 32 32 --video_length 5 --infer_steps 2"
# --overwrite: other commands of a page read what was laid out under the same name
TRAINING = "--max_train_epochs 1 --max_data_loader_n_workers 0 --overwrite"
LORA = f"{TRAINING} --network_dim 2"
IMAGE = "--image_size 64 64 --infer_steps 2"
QUICK_VAE = "--vae_dtype float32"  # a CPU takes long in float16
# training reads them too: a latent of the tiny video VAE has 8 pixels, of the released one 16
H3_VAES = "--video_vae models/minimax_h3_video_vae_fp16.safetensors"
H3_VAES += " --audio_vae models/minimax_h3_audio_vae_fp32.safetensors"
SHORT_H3 = "--allow_experimental_duration"  # clips of a second
SMALLER = {
    "benchmarks/evening.py": "--max_train_steps 1 --items 2 --size 32 --frames 5 --infer_steps 1 --memory 0",
    "tools/compare.py": GENERATION,
    "tools/judge_loras.py": "--video_size 32 32 --video_length 1 --infer_steps 2",
    "tools/profile_blocks.py": GENERATION,
    "tools/prepare_dataset.py": "--height_buckets 32 --width_buckets 32 --frame_buckets 5",
    "wan_generate_video.py": GENERATION,
    "hv_generate_video.py": f"{GENERATION} {QUICK_VAE}",
    "hv_1_5_cache_latents.py": QUICK_VAE,
    "hv_1_5_generate_video.py": f"--video_size 32 32 --infer_steps 2 {QUICK_VAE}",
    "kandinsky_cache_latents.py": QUICK_VAE,
    "kandinsky_generate_video.py": f"--video_size 32 32 --infer_steps 2 {QUICK_VAE}",
    "sample_video.py": "--video-size 32 --video-length 5 --infer-steps 2 --vae-precision fp32",
    "fpack_cache_latents.py": QUICK_VAE,
    "fpack_generate_video.py": f"--video_size 32 32 --infer_steps 2 --video_sections 2 {QUICK_VAE}",
    "ltx2_generate_video.py": "--video_size 32 32 --video_length 9 --infer_steps 2",
    "minimax_h3_cache_latents.py": SHORT_H3,
    "minimax_h3_generate_video.py": f"{SHORT_H3} --video_size 32 32 --video_length {H3_FRAMES} "
    "--infer_steps 2",
    # a reference at a trained size has a million pixels
    "flux_kontext_train_network.py": f"{LORA} --no_resize_control",
    "flux_kontext_generate_image.py": f"{IMAGE} --no_resize_control",
    "gen_img.py": "--W 64 --H 64 --steps 2",
    **dict.fromkeys(("sd_generate_image.py", "sdxl_generate_image.py"), IMAGE),
    "lumina_minimal_inference.py": "--image_width 64 --image_height 64 --steps 2",
    "hunyuan_image_minimal_inference.py": f"{IMAGE} {QUICK_VAE}",
    "fpack_train.py": f"{TRAINING} --latent_window_size 1",
    "fpack_train_network.py": f"{LORA} --latent_window_size 1 --sample_every_n_epochs 1",
    **{f"{name}_train.py": TRAINING for name in FULL_MODELS},
    **dict.fromkeys(("sdxl_train.py", "train_db.py", "fine_tune.py"), TRAINING),
    "train_leco.py": f"{LORA} --max_denoising_steps 2",
    **dict.fromkeys(
        (
            *("sdxl_train_control_net_lllite.py", "sdxl_train_control_net.py", "train_control_net.py"),
            "anima_train_control_net_lllite.py",
            *("sdxl_train_textual_inversion.py", "train_textual_inversion.py"),
        ),
        TRAINING,
    ),
    "flux_kontext_train.py": f"{TRAINING} --no_resize_control",
    "flux_train_control_net.py": f"{TRAINING} --num_double_layers 1",  # the tiny one has two such blocks
    **{f"{name}_train_network.py": LORA for name in ("sdxl", *FULL_MODELS)},
    "train_network.py": LORA,
    "minimax_h3_train_network.py": f"{LORA} {H3_VAES}",
    "minimax_h3_train.py": f"{TRAINING} {H3_VAES}",
    **{f"{name}_generate_image.py": IMAGE for name in OF_IMAGES if name != "hunyuan_image"},
    "krea2_generate_image.py": f"{IMAGE} --width 64 --height 64",
}
# left out: a CPU takes long in float16
NOT_ON_CPU = {name: {"--fp16"} for name in ("gen_img.py", "sd_generate_image.py", "sdxl_generate_image.py")}
LIGHTER = {  # what a page gives an option -> what runs on tiny models; appended too
    # they have few blocks
    **{f"--blocks_to_swap {count}": "--blocks_to_swap 1" for count in (20, 30, 40)},
    "--lora_blocks 0-9=0.5": "--lora_blocks 0-9=0.5",
    "--dataset_config clips/dataset.toml": "--dataset_config dataset.toml",  # of pictures that are alike
    "--blocks_to_swap=18": "--blocks_to_swap 0",
    "--optimizer_type=AdamW8bit": "--optimizer_type adamw",  # needs a GPU
    "--resolution 1024,1024": "--resolution 64 --min_bucket_reso 32 --bucket_reso_steps 32",
    "--max_train_steps 1600": "--validation_split 0.5",  # of two pictures
    "--i2i_path start.png": "--video_length 1",
    # they make two steps
    "--cfg_schedule 1-": "--cfg_schedule '1:3, e~2, !2'",
    "--highres_fix_scale 0.5": "--highres_fix_steps 2",
    # latents that grow from 8 x 8 to 16 x 16
    "--gradual_latent_timesteps 750": "--W 128 --H 128 --steps 5 --gradual_latent_timesteps 900 "
    "--gradual_latent_every_n_steps 1 --gradual_latent_ratio_step 0.5",
    "reelsmith.py new": "--max_train_steps 1 --memory 0",
    **dict.fromkeys(("--sample_two_stage", "--reference_video"), "--video_size 64 64"),
    "--post gimmvfi": "--video_size 128 128",  # it takes no smaller frames
    "gpu.py --dry": "--rows wan14b-bf16",
    # inductor is slow, and has its own tests
    "--compile_args inductor": "--compile_args eager default auto False",
}
# for each training the scripts of its caches, and what names their models
WAN_CACHES = {
    "wan_cache_latents.py": "--vae Wan2.1_VAE.pth",
    "wan_cache_text_encoder_outputs.py": "--t5 models_t5_umt5-xxl-enc-bf16.pth",
}
HUNYUAN_VAE = "--vae hunyuan-video-t2v-720p/vae/pytorch_model.pt"
HUNYUAN_TEXTS = "--text_encoder1 llava_llama3_fp16.safetensors --text_encoder2 clip_l.safetensors"
HUNYUAN_CACHES = {"cache_latents.py": HUNYUAN_VAE, "cache_text_encoder_outputs.py": HUNYUAN_TEXTS}
FRAMEPACK_CACHES = {
    "fpack_cache_latents.py": f"{HUNYUAN_VAE} --image_encoder sigclip_vision_patch14_384.safetensors",
    "fpack_cache_text_encoder_outputs.py": HUNYUAN_TEXTS,
}
CACHES = {
    f"{name}{ending}": caches
    for name, caches in {"wan": WAN_CACHES, "hv": HUNYUAN_CACHES, "fpack": FRAMEPACK_CACHES}.items()
    for ending in ("_train_network.py", "_train.py")
}
DATASET = """[general]
resolution = [32, 32]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 5]
"""
# what a page says, as an expression -> what fits tiny clips
TINY = {
    r"^resolution = \[.*": "resolution = [32, 32]",
    r"^target_frames = \[1, .*": "target_frames = [1, 5]",
    r"^target_frames = \[[2-9].*": "target_frames = [5]",
    r"^target_frames = \[1[0-9].*": "target_frames = [5]",
    r"--w \d+ --h \d+ --f \d+": "--w 32 --h 32 --f 5",
}
SERVER = "http://localhost:8000/v1"  # as the pages name it
# short ones for short clips
SECTIONS = {"target_frames = [1, 5]": "target_frames = [5]\nfp_latent_window_size = 1"}
SAMPLES = {
    "samples.txt": "a cat --i start.png --w 32 --h 32 --f 5 --d 1 --s 1\n",
    "pictures.txt": "a cat --i start.png --ci start.png --w 32 --h 32 --d 1 --s 1 --of no_post\n",
}
# these change what a process computes with; other commands run in this process, which saves their start
OWN_PROCESS = {
    *("--reproduce", "--compile", "--optimized", "--fp16_accumulation", "--allow_tf32", "--num_processes"),
    *("--torch_compile", "--dynamo_backend", "benchmarks/gpu.py", "benchmarks/evening.py"),
}


def lay_out_control(models: Path) -> None:
    """Write the models of the page about control pictures."""
    picture_project.lay_out_stable_diffusion(models)
    lay_out_flux(models)


# pages about one model, most about one of pictures, and the models that they use
IMAGE_MODELS = {
    **{name: getattr(picture_project, f"lay_out_{name}") for name in ("flux", "flux_2", "flux_3")},
    **{
        name: getattr(picture_project, f"lay_out_{name}")
        for name in (
            "anima",
            "ernie_image",
            "fibo_2",
            "hidream_o1",
            "hunyuan_image",
            "hunyuan_video_15",
            "ideogram4",
            "kandinsky",
            "krea2",
            "lumina",
            "moss_image",
            "qwen_image",
            "qwen_image_21",
            "z_image",
        )
    },
    "flux_kontext": picture_project.lay_out_kontext,
    "moss_image": picture_project.lay_out_moss_image,
    **dict.fromkeys(
        ("gen_img", "sdxl", "stable_diffusion", "textual_inversion"),
        picture_project.lay_out_stable_diffusion,
    ),
    "control": lay_out_control,
    "image_datasets": lay_out_flux,
    "ltx2": picture_project.lay_out_ltx_2,
    "minimax_h3": picture_project.lay_out_minimax_h3,
}
SMALL = {  # what their dataset files say -> what fits tiny pictures
    r"^resolution = 1024": f"resolution = {SIDE}\nmin_bucket_reso = 32\nbucket_reso_steps = 32",
    r"^resolution = \[.*": f"resolution = [{SIDE}, {SIDE}]",
    r"^target_frames = \[1, 33\]": "target_frames = [1, 5]",
    r"^target_frames = \[1, 49\]": "target_frames = [1, 9]",
    r"^target_frames = \[49\]": "target_frames = [9]",
    r"^target_frames = \[124\]": f"target_frames = [{H3_FRAMES}]",
    r"^num_repeats = 4": "num_repeats = 1",
    r"--w 832 --h 1216": "--w 64 --h 96",
}
PRECISION = "--mixed_precision"
USE_CPU = {"ACCELERATE_USE_CPU": "true"}  # as a launcher tells a training
PROMPTS = "a cat walks on the grass --d 1\na dog --d 2 --s 2 --g 6\n"


def all_commands_of(page: Path) -> list[str]:
    """The command lines of a page's bash blocks, in order."""
    text = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(("python ", "accelerate launch "))]


def commands_of(page: Path) -> list[str]:
    """Those that are run here."""
    commands = [command for command in all_commands_of(page) if command not in AGAIN]
    return [command for command in commands if not any(name in command for name in NOT_HERE)]


def test_links_between_pages_lead_somewhere_and_the_index_names_every_page() -> None:
    pages = [*PAGES, *(ROOT / "benchmarks").glob("*.md")]
    heads = {page: re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE) for page in pages}
    anchors = {page: [_anchor(head) for head in of_page] for page, of_page in heads.items()}
    broken, linked = [], set()
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = link.partition("#")
            if ":" in name:
                continue
            target = (page.parent / name).resolve() if name else page
            if page == ROOT / "docs" / "README.md":
                linked.add(target)
            if not target.exists() or (anchor and anchor not in anchors[target]):
                broken.append(f"{page.name}: {link}")

    assert broken == []
    assert {page for page in PAGES if page.name != "README.md"} - linked == set()


def test_pages_that_messages_name_exist() -> None:
    named = set()
    for path in ROOT.rglob("*.py"):
        first = path.relative_to(ROOT).parts[0]
        if first in {"tests", "build", "dist"} or first.startswith("."):
            continue
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines() if re.search(r"docs/\w+\.md", text) else ():
            is_message = '"' in line.partition("#")[0] and not line.lstrip().startswith('"""')
            named |= {*re.findall(r"docs/\w+\.md", line.partition("#")[0])} if is_message else set()

    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


WITH_COMMANDS = [page for page in PAGES if commands_of(page)]
ABOUT_DATA = [page for page in WITH_COMMANDS if page.stem.startswith("dataset")]
ABOUT_IMAGES = [page for page in WITH_COMMANDS if page.stem in IMAGE_MODELS]
OTHERS = [page for page in WITH_COMMANDS if page not in [*ABOUT_DATA, *ABOUT_IMAGES]]
# to the script that generates, what they do not know themselves
PASSES_ON = {"tools/compare.py", "tools/judge_loras.py", "tools/profile_blocks.py"}
# each kind of command is on one of these
DAILY = {"first_lora", "new_and_run", "training", "recipes", "fp8", "install", "z_image"}


def of_each(pages: Sequence[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "page",
        [
            pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem not in DAILY))
            for page in pages
        ],
    )


@functools.cache
def script_parser(script: str) -> argparse.ArgumentParser:
    with pytest.MonkeyPatch.context() as patch:
        return parser_of(script, patch)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_the_scripts_have_the_options_that_a_page_gives_them(page: Path) -> None:
    for command in commands_of(page):
        words = shlex.split(command)
        script = next((word for word in words if word.endswith(".py")), "")
        if script in {*SCRIPTS, *TOOLS} - PASSES_ON:
            given = {word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
            assert given <= script_parser(script)._option_string_actions.keys(), command


@of_each(OTHERS)
def test_commands_of_the_page_run(page: Path, tmp_path: Path) -> None:
    lay_out_models(tmp_path / "models")
    write_clips(tmp_path / "clips", count=2)
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    in_sections = "framepack" in page.stem or "one_frame" in page.stem
    lay_out_datasets(tmp_path, in_sections)
    lay_out_inputs(tmp_path)
    if not in_sections:  # files of sections have sizes and places of their own
        text = page.read_text(encoding="utf-8")
        lay_out_named(tmp_path, [*reversed(all_sources_of(text)), page], TINY)
    if page.stem == "README":
        lay_out_flux(tmp_path / "models")
        lay_out_sdxl(tmp_path / "models")
        lay_out_images(tmp_path)
    if page.stem == "new_and_run":
        write_images(tmp_path / "pairs", tmp_path / "pairs" / "control", count=2)
        write_images(tmp_path / "edges", tmp_path / "edges" / "conditioning", count=2)
        for name in ("photos", "fluffy"):
            write_captioned_image(tmp_path / name)
        (tmp_path / "config.yaml").write_text(AI_TOOLKIT, encoding="utf-8")
    if page.stem == "diagnose":  # the folder of the page about the first LoRA
        new = "python reelsmith.py new clips --family wan --task t2v-1.3B --trigger_word mrsfluff"
        run_in(tmp_path, f"{new} --output_name mrsfluff", makes_caches=True, apart=False)
        write_scored_dataset(tmp_path, {f"{number}.png": draw(CIRCLE, 96, number) for number in range(6)})
        write_clip(tmp_path / "models" / "score_clip")
    if page.stem == "recipes":
        for name in ("people/img/10_ohwx man", "people/reg/1_man", "drawings"):
            write_captioned_image(tmp_path / name)
    if page.stem == "post":
        lay_out_tools(tmp_path)
    if page.stem in ("vace", "bernini"):
        write_clips(tmp_path / "control", count=2)
        for clip in (tmp_path / "clips").glob("*.mp4"):
            for folder in ("control_masks", "references"):
                (tmp_path / folder).mkdir(exist_ok=True)
                write_image(tmp_path / folder / f"{clip.stem}.png", 48, 48)
    commands = commands_of(page)
    if page.stem == "targets":
        lay_out_targets(tmp_path)
        run_for_z_image([command for command in commands if "zimage_" in command], tmp_path / "z image", page)
        commands = [command for command in commands if "zimage_" not in command]
    if any("models/chat" in command for command in commands):
        write_chat_model(tmp_path / "models" / "chat")
    makes_caches = any("cache_latents.py" in command for command in commands)
    for command in commands:
        if "recipe.py save" in command:  # of a training that is over
            run_in(tmp_path, "python reelsmith.py run clips", makes_caches, apart=False)
        if "reelsmith.py unpack" in command:  # on another machine, where its folder is not yet
            (tmp_path / "clips").rename(tmp_path / "packed clips")
        is_about_images = "flux_" in command or "sdxl_generate" in command  # their own pages run them too
        # those of the first page are all programs of their own, as a reader starts them
        run_in(tmp_path, command, makes_caches, apart=page.stem == "README" and not is_about_images)
        if "pocket.concepts" in command:
            thin_out(tmp_path / "trial")


@of_each(ABOUT_DATA)
def test_commands_of_the_page_about_data_run(page: Path, tmp_path: Path) -> None:
    write_encoders(tmp_path / "models")
    write_clips(tmp_path / "clips", count=2)
    lay_out_datasets(tmp_path, in_sections=False)
    lay_out_material(tmp_path)
    lay_out_named(tmp_path, ABOUT_DATA, TINY)
    commands = commands_of(page)
    if any("models/vision" in command for command in commands):
        lay_out_vision_model(tmp_path)
    if any("tools/tag.py" in command for command in commands):
        write_tagger(tmp_path / "models" / "wd_tagger", first_pixel_weights(red=(0, 0, 1)))
        write_captioned_image(tmp_path / "pictures")
    if any("tools/mask.py" in command for command in commands):
        write_clipseg(tmp_path / "models" / "clipseg")
    with serve(tmp_path / "clips") as site, run_server(lambda *_: "a caption") as describer:
        lay_out_published(tmp_path, site.url)
        for command in commands:
            run_in(tmp_path, command.replace(SERVER, describer.address), makes_caches=True, apart=False)


@of_each(ABOUT_IMAGES)
def test_commands_of_the_page_about_pictures_run(page: Path, tmp_path: Path) -> None:
    IMAGE_MODELS[page.stem](tmp_path / "models")
    lay_out_images(tmp_path)
    lay_out_named(tmp_path, [ROOT / "docs" / "image_datasets.md", page], SMALL)
    (tmp_path / "samples.txt").write_text("a cat --w 64 --h 64 --d 1 --s 1\n", encoding="utf-8")

    for command in commands_of(page):
        run_in(tmp_path, command, makes_caches=True, apart=False)

    made = {
        "gen_img": "pictures_made/*.png",
        "minimax_h3": "output/my_lora.safetensors",
        **dict.fromkeys(("control", "textual_inversion"), "generated/*.png"),
    }.get(page.stem, "output/my_*_lora*.safetensors")
    assert [*tmp_path.glob(made)] or page.stem == "image_datasets"


READ = {"--dataset_config", "--from_file", "--sample_prompts", "--config_file"}  # options of small text files


def unshown_files(text: str, elsewhere: Sequence[str]) -> list[str]:
    """The text files that a page's commands read, and that neither it nor, of a dataset, another page shows.

    text: of the page. elsewhere: of the pages whose files it says that it uses.
    """
    by_name = {step.path: step for step in read_page(text) if isinstance(step, Shown | Brought)}
    datasets = {step.path for other in elsewhere for step in read_page(other) if isinstance(step, Shown)}
    missing = []
    for step in read_page(text):
        words = step.words if isinstance(step, Command) else ()
        for option, value in pairwise(words):
            is_there = value in by_name or (option == "--dataset_config" and value in datasets)
            if option in READ and not is_there and "/" not in value:
                missing.append(f"{option} {value}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_the_text_files_that_its_commands_read(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    missing = unshown_files(text, [other.read_text(encoding="utf-8") for other in all_sources_of(text)])

    assert missing == []


def all_sources_of(text: str) -> list[Path]:
    """The pages whose files a page says that it uses, and theirs."""
    pages = [ROOT / "docs" / f"{name}.md" for name in sources_of(text)]
    return [*pages, *(other for page in pages for other in all_sources_of(page.read_text(encoding="utf-8")))]


def test_a_file_that_no_page_shows_is_found() -> None:
    text = "```bash\npython train_network.py --sample_prompts=samples.txt --dataset_config data.toml\n```\n"

    assert unshown_files(text, ["```toml\n# data.toml\n[general]\n```\n"]) == ["--sample_prompts samples.txt"]
    assert unshown_files(text, ["```text\n# samples.txt\na cat\n```\n"]) != []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["command", "pipeline"])
def test_the_recipes_for_ray_run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, part: str) -> None:
    pytest.importorskip("ray.data")
    write_encoders(tmp_path / "models")
    write_clips(tmp_path / "clips", count=2)
    lay_out_datasets(tmp_path, in_sections=False)
    sockets = tmp_path_factory.getbasetemp().parent / f"ray{part[0]}"  # a short path

    if part == "command":
        (command,) = [one for page in PAGES for one in all_commands_of(page) if RAY in one]
        _, script, *words = shlex.split(command)
        run_python(ROOT / script, "--gpus_per_actor", "0", "--temp_dir", sockets, *words, folder=tmp_path)
    else:
        (code,) = PYTHON.findall((ROOT / "docs" / "dataset_large.md").read_text(encoding="utf-8"))
        start = f"import ray\nray.init(num_cpus=2, include_dashboard=False, _temp_dir={str(sockets)!r})\n"
        code = start + code.replace("num_gpus=1", "num_gpus=0").replace("concurrency=4", "concurrency=2")
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        run_python("-c", code, folder=tmp_path, environment={"PYTHONPATH": os.pathsep.join(path)})

    assert len([*(tmp_path / "cache").glob("*.safetensors")]) == 4


def thin_out(folder: Path) -> None:
    """Keep two clips of each folder: what a reader caches in a minute."""
    for clips in folder.glob("*/*clips"):
        for path in sorted(clips.glob("*.mp4"))[2:]:
            path.unlink()


def lay_out_datasets(folder: Path, in_sections: bool) -> None:
    """dataset.toml of clips, one_frame.toml of pictures made from others, and prompts for samples of both."""
    text = DATASET
    for old, new in SECTIONS.items() if in_sections else ():
        text = text.replace(old, new)
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    if in_sections:
        write_images(folder / "pictures", folder / "control", count=2)
        write_image_dataset(folder, folder / "one_frame.toml", pictures="pictures", cache="cache_one_frame")
    for name, lines in SAMPLES.items():
        (folder / name).write_text(lines, encoding="utf-8")


def lay_out_named(folder: Path, pages: Sequence[Path], instead: Mapping[str, str]) -> None:
    """The files that pages show with their names, for tiny clips and pictures.

    instead: expressions, and what replaces them. The last page that shows a file counts.
    """
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name, block in NAMED.findall(text):
        for old, new in instead.items():
            block = re.sub(old, new, block, flags=re.MULTILINE)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(block, encoding="utf-8")


def lay_out_targets(folder: Path) -> None:
    """What the page about targets brings for Wan2.1: clips and pictures of two kinds."""
    write_clips(folder / "dances", count=1)
    write_captioned_image(folder / "portraits")


def run_for_z_image(commands: Sequence[str], folder: Path, page: Path) -> None:
    """Run the commands of a page for Z-Image with its own data set; first a LoRA of its base."""
    picture_project.lay_out_z_image(folder / "models")
    lay_out_images(folder)
    for name in ("better", "worse"):
        write_captioned_image(folder / name)
    z_image = ROOT / "docs" / "z_image.md"
    lay_out_named(folder, [z_image, page], SMALL)
    before = [one for one in commands_of(z_image) if "_cache_" in one or "my_z_lora" in one]
    for command in [*(one.replace("my_z_lora", "base_lora") for one in before), *commands]:
        run_in(folder, command, makes_caches=True, apart=False)


def write_captioned_image(folder: Path) -> None:
    """Write a picture with its caption."""
    folder.mkdir(parents=True)
    write_image(folder / "a.png", SIDE, SIDE)
    (folder / "a.txt").write_text("a drawing of a house", encoding="utf-8")


def lay_out_inputs(folder: Path) -> None:
    """Images, a video and LoRAs, as the pages name them."""
    for name in ("start", "sofa", "end", "person", "person_mask", "dress", "dress_mask"):
        write_image(folder / f"{name}.png", 32, 32)
    shutil.copy(folder / "clips" / "clip 0.mp4", folder / "cat.mp4")
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "pocket", folder / "pocket", ignore=ignored)
    for name in ("my_wan22_low_noise", "my_wan22_high_noise"):
        expert = "low" if "low" in name else "high"
        dit = folder / "models" / f"wan2.2_t2v_{expert}_noise_14B_fp16.safetensors"
        write_lora(folder / "output" / f"{name}.safetensors", dit)
    dit = folder / "models" / "wan2.1_t2v_1.3B_bf16.safetensors"
    for name in ("my_lora", "style", "my_lora-step00000200", "my_lora-step00000400"):
        write_lora(folder / "output" / f"{name}.safetensors", dit)
    for kind in ("LoKr", "DoRA"):
        write_lora(folder / "output" / f"my_{kind.lower()}.safetensors", dit, kind=kind)


def run_in(folder: Path, command: str, makes_caches: bool, apart: bool) -> None:
    """Run a command of a page, and see that it writes what it says. apart: each in a process of its own."""
    words = shlex.split(command)
    start_command(folder, words, makes_caches, apart)
    if words[1] != "-m":
        written = outputs_of(parse_command(command), folder)
        if any(path.endswith(".html") for path in written):
            wait_for_run_pages(folder)
        missing = [path for path in written if not (folder / path).exists()]
        assert not missing, f"{command} does not write {missing}"


def start_command(folder: Path, words: list[str], makes_caches: bool, apart: bool) -> None:
    if words[1] == "-m":  # a tool of the checkout
        run_python(*words[1:], folder=folder, environment={"PYTHONPATH": str(ROOT)})
        return
    start, launch = 1, []
    if words[0] == "accelerate":
        start = next(index for index, word in enumerate(words) if word.endswith(".py"))
        launch = words[2:start]
    script = words[start]
    if script in CACHES and "--check" not in words and not (makes_caches and (folder / "cache").exists()):
        cache(folder, CACHES[script])
    lighter = [instead for given, instead in LIGHTER.items() if given in " ".join(words)]
    kept = [word for word in words[start + 1 :] if word not in NOT_ON_CPU.get(script, ())]
    arguments = [*kept, *shlex.split(" ".join([SMALLER.get(script, ""), *lighter]))]
    if apart or OWN_PROCESS & {*words}:
        launcher = ["-m", "accelerate.commands.launch", "--cpu", *launch] if launch else []
        run_python(*launcher, ROOT / script, *arguments, folder=folder)
        return
    told = {**USE_CPU}
    if PRECISION in launch:
        told["ACCELERATE_MIXED_PRECISION"] = launch[launch.index(PRECISION) + 1]
    with patch.dict("os.environ", told):
        succeed_here(script, *arguments, folder=folder)


def cache(folder: Path, scripts: Mapping[str, str]) -> None:
    """The caches that training needs, where the page does not make them itself, or not yet."""
    for script, models in scripts.items():
        files = [word if word.startswith("--") else folder / "models" / word for word in models.split()]
        succeed_here(script, "--dataset_config", "dataset.toml", *files, folder=folder)
