"""Every family goes the whole way through its scripts: cache, train with a sample, resume, generate; whole
transformers and keys of the dataset too.

The first training of `ONE_OF_EACH` is a program of its own; all others run here, where they start in no time.
"""

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.commands import run_script, typed_there
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.run_pages import read_run_page
from tests.tiny.families import FAMILIES, LAYERED, ONE_OF_EACH, OUTPUT, TinyFamily
from tests.tiny.runs import make_project

# families whose LoRAs a tool reads only once they are converted, if they are saved without --lora_format
CONVERTED_FOR = {
    **{"hunyuan": "comfyui", "skyreels": "comfyui", "z_image": "comfyui"},
    "framepack": "diffusers",
    "qwen_image_21": "comfyui",
    "fibo_2": "comfyui",
    "ernie_image": "diffusers",
    "ideogram4": "diffusers",
    "kandinsky": "diffusers",
    "kandinsky_6": "diffusers",
    "hunyuan_video_15": "comfyui",
    "flux_3": "diffusers",
}
SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--guidance_scale", "3"]


# FramePack but for the order of sections, which tests/frame_pack has; FLUX but for its modulation, or for a
# reference, which tests/parity has; LTX-2 without audio
SLOW = {"framepack f1", "chroma", "kontext", "qwen_image edit-2511", "ltx_2"}
# more latents and conditions of the same networks: tests/wan, tests/krea2, tests/parity
SLOW |= {"wan t2v-1.3B-FC", "wan flf2v-14B", "wan i2v-14B-FC", "wan ti2v-5B", "skyreels i2v"}
SLOW |= {"kandinsky i2v", "kandinsky image", "kandinsky_6", "hunyuan_video_15 i2v"}
SLOW |= {
    "framepack one frame",
    "krea2 edit",
    "flux_3",
    "qwen_image_21 edit",
    "moss_image edit",
    "fibo_2 edit",
    "hidream_o1 edit",
    "qwen_image layered",
}
# what their scripts train and make is compared with diffusers each day: parity/test_training_steps.py and
# parity/test_pictures.py; z_image, of which the same is true, stays for samples, states and pages of pictures
SLOW |= {"anima", "ernie_image", "ideogram4", "hidream_o1", "hunyuan_image", "krea2", "lumina", "qwen_image"}
FAST = "wan t2v-1.3B"
MARKS = {FAST: pytest.mark.whole_way, **dict.fromkeys(SLOW, pytest.mark.slow)}
CASES = [pytest.param(each, id=each.name, marks=MARKS.get(each.name, ())) for each in (*FAMILIES, LAYERED)]


@pytest.fixture(scope="module", params=CASES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    """A folder in which a LoRA was trained for three steps; a state was saved after the second, and a sample
    made at the end.
    """
    family: TinyFamily = request.param
    folder = tmp_path_factory.mktemp("a family")  # the space in the name is part of the test
    make_project(family, folder)
    samples = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3"]
    saved = ["--save_every_n_steps", "2", "--save_state"]
    training = [*family.train, *OUTPUT, *samples, *saved, "--max_train_steps", "3"]
    (run_script if family in ONE_OF_EACH else succeed_here)(*training, folder=folder)
    return family, folder


def test_the_lora_has_learned(trained: tuple[TinyFamily, Path]) -> None:
    _, folder = trained
    tensors = load_file(folder / "output" / "lora.safetensors")

    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith(UP))


UP = ("lora_up.weight", "lora_B.weight")
CHECKPOINTS = (
    *("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"),
    *("--gradient_checkpointing_keep", "attention"),
)


def test_training_goes_on_from_its_state(trained: tuple[TinyFamily, Path]) -> None:
    """What checkpointed blocks keep, and where, changes nothing."""
    family, folder = trained
    output = ["--output_dir", "resumed", *OUTPUT[2:], "--max_train_steps", "3", "--overwrite"]

    for blocks in [(), CHECKPOINTS] if family in ONE_OF_EACH else [CHECKPOINTS]:
        succeed_here(*family.train, *output, *STATE, *blocks, folder=folder)

        assert_equal(folder / "resumed/lora.safetensors", folder / "output/lora.safetensors")


STATE = ["--resume", "output/lora-step00000002-state"]


def assert_equal(one: Path, other: Path) -> None:
    """Two files hold equal tensors."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow_cases(
    "framepack",
    "ltx_2 with sound",
    "qwen_image_21",
    "wan i2v-14B",
    "wan vace-1.3B",
)
def test_a_state_is_not_resumed_with_other_options_of_the_family_in_silence(
    trained: tuple[TinyFamily, Path],
) -> None:
    family, folder = trained
    output = ["--output_dir", "output", "--output_name", "other", *OUTPUT[4:], "--max_train_steps", "3"]
    resume = [*family.train, *output, *STATE]

    if family.another_run:
        option, value = family.another_run
        code, said = run_here(*resume, *family.another_run, folder=folder)
        assert_one_message(code, said, "--resume", option, f"{value} now")
    said = succeed_here(*resume, *family.changed_habit, folder=folder)
    assert f"{family.changed_habit[0]} was" in said


def test_a_sample_is_what_the_generation_script_makes(trained: tuple[TinyFamily, Path]) -> None:
    """Same LoRA, seed and settings, float32: videos differ by their encoders' settings alone, without the
    LoRA by far more.
    """
    family, folder = trained
    generate = [*family.generate, *SIZE, "--prompt", "a cat", "--seed", "7"]

    lora = ["--lora_weight", "output/lora.safetensors"]
    succeed_here(*generate, *lora, "--save_path", "videos", folder=folder)
    succeed_here(*generate, "--save_path", "without", folder=folder)

    ours, theirs, without = (shown(folder / name).float() for name in ("output/sample", "videos", "without"))
    assert ours.shape == theirs.shape
    # mean levels of 255: 0 to 3.4 where all is the same (the latents are compared in tests/training), 22 to
    # 54 without the LoRA
    maximum, minimum = (
        (6, 12) if family.name not in {"qwen_image_21 edit", "ernie_image"} else (0.6, 2)
    )  # PNG; a megapixel is seen too, and the tiny VAE hides most of what ERNIE-Image draws
    assert (ours - theirs).abs().mean() < maximum
    assert (ours - without).abs().mean() > minimum


@pytest.mark.slow_cases(
    "flux",
    "flux_2",
    "framepack",
    "hunyuan_video",
    "ltx_2 with sound",
    "qwen_image_21",
    "skyreels i2v",
    "wan i2v-14B",
    "wan ti2v-5B",
    "wan vace-1.3B",
)
def test_the_commands_on_the_page_run(trained: tuple[TinyFamily, Path], tmp_path: Path) -> None:
    """They go on with the training, generate the first sample again, and convert the LoRA."""
    family, original = trained
    page = read_run_page(original / "output", "lora")
    folder = shutil.copytree(original, tmp_path / "a copy")
    texts = re.findall(r"(?s)</h3>.*?<pre>(.*?)</pre>", page)  # of each the first, for bash
    commands = [shlex.split(html.unescape(re.sub("<[^>]*>", "", text))) for text in texts]
    scripts = [Path(words[1]).name for words in commands]
    tool = next((tool for name, tool in CONVERTED_FOR.items() if family.name.startswith(name)), None)
    converts = ["convert_lora.py"] if tool else []
    started = family.train[0]  # the page ends with the command that the run was started with
    assert scripts == [family.train[0], family.generate[0], *converts, started]
    goes_on, *others, starts = commands
    if family.name in TRAIN_AGAIN:
        others += [starts, goes_on]

    shutil.move(folder / "output" / "sample", folder / "output" / "sample first")
    for words in others:
        succeed_here(Path(words[1]).name, *words[2:], folder=folder)

    if family.name in TRAIN_AGAIN:
        assert " of 6" in read_run_page(folder / "output", "lora")
    made = {path.name for path in (folder / "output").glob("lora_*.safetensors")}
    assert made == ({f"lora_{tool}.safetensors"} if tool else set())
    theirs, ours = (shown(folder / name).float() for name in ("output/generated", "output/sample first"))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 6


TRAIN_AGAIN = {each.name for each in ONE_OF_EACH}  # the words of a training are those that were typed


def shown(folder: Path) -> torch.Tensor:
    """The frames of the only video or picture in a folder."""
    from modules.media.reading import read_image, video_frames

    files = [path for path in folder.iterdir() if path.suffix in {".mp4", ".png"}]
    files = [path for path in files if not re.search(r"_layer\d+$", path.stem)]  # their composite stays
    (path,) = (path for path in files if not path.stem.endswith("_sheet"))
    frames = [read_image(path)] if path.suffix == ".png" else list(video_frames(path))
    return torch.stack([torch.from_numpy(frame) for frame in frames])


@pytest.mark.slow
def test_compiled_training_goes_on_from_its_state(trained: tuple[TinyFamily, Path]) -> None:
    family, folder = trained
    compiled = [*CHECKPOINTS, "--dynamo_backend", "eager", "--dynamo_fullgraph"]
    train = [*family.train, *compiled, *OUTPUT[4:], "--output_dir", "compiled", "--output_name"]

    succeed_here(*train, "part", "--max_train_steps", "2", "--save_state", folder=folder)
    succeed_here(
        *train, "resumed", "--max_train_steps", "4", "--resume", "compiled/part-state", folder=folder
    )
    succeed_here(*train, "whole", "--max_train_steps", "4", folder=folder)

    assert_equal(folder / "compiled/resumed.safetensors", folder / "compiled/whole.safetensors")
    full = load_file(folder / "compiled/whole.safetensors")
    assert any(tensor.any() for name, tensor in full.items() if name.endswith(UP))


@pytest.mark.slow
def test_compiled_generation_makes_the_same_latents(trained: tuple[TinyFamily, Path]) -> None:
    """Float32 weights; rotary turns are multiplied out in another order."""
    family, folder = trained
    options = [*SIZE, "--prompt", "a cat", "--seed", "7", "--output_type", "latent", "--save_path"]

    compiled = ["--compile", "--compile_args", "eager", "default", "auto", "true"]
    succeed_here(*family.generate, *options, "plain", folder=folder)
    succeed_here(*family.generate, *options, "fast", *compiled, folder=folder)

    found = [load_file(next((folder / name).glob("*.safetensors")))["latent"] for name in ("plain", "fast")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_comparison_makes_what_the_generation_script_makes(trained: tuple[TinyFamily, Path]) -> None:
    """The LoRA says which family it is for; its clip and the one without it are equal to the bit."""
    family, folder = trained
    options = [*SIZE, "--prompt", "a cat", "--seed", "7"]
    weights = ["--lora_weight", "output/lora.safetensors", "--lora_multiplier", "0.5"]
    form = "latent_images" if family.generate[0].endswith("image.py") else "both"

    made = ["--output_type", form, "--save_path", "compared", "--lora", *weights[1:]]
    succeed_here("tools/compare.py", *family.generate[1:], *options, *made, folder=folder)
    for column, more in {"without": [], "lora": weights}.items():
        more += ["--output_type", "latent", "--save_path", f"as {column}"]
        succeed_here(*family.generate, *options, *more, folder=folder)
        (theirs,) = (folder / f"as {column}").glob("*_latent.safetensors")
        (ours,) = (folder / "compared").glob(f"001_7_{column}*_latent.safetensors")
        assert torch.equal(load_file(ours)["latent"], load_file(theirs)["latent"])
    assert list((folder / "compared").glob("compare_*.html"))


@pytest.mark.slow
def test_each_block_of_the_lora_is_measured(trained: tuple[TinyFamily, Path]) -> None:
    family, folder = trained
    options = [*SIZE, "--prompt", "a cat", "--seed", "7", "--device", "cpu", "--json", "profile.json"]
    lora = ["--lora", "output/lora.safetensors"]
    succeed_here("tools/profile_blocks.py", *family.generate[1:], *options, *lora, folder=folder)
    content = json.loads((folder / "profile.json").read_text("utf-8"))
    assert all(change > 0 for change in content["changes"])
    assert len(content["blocks"]) > 1
    for row in content["blocks"]:
        assert row["norm"] > 0, row["block"]  # the blocks of the network are those of the file
        assert any(share > 0 for share in row["shares"]), row["block"]


OF_IMAGES = (
    *("flux", "chroma", "lumina", "hunyuan_image"),
    *("flux_2", "flux_3", "qwen_image_21 edit", "moss_image edit", "fibo_2 edit", "kontext", "krea2 edit"),
    "anima",
    "ernie_image",
    *("hidream_o1", "hidream_o1 edit"),
    "ideogram4",
)
# qwen_image stays for pictures
FULL_SLOW = ("wan i2v-14B-FC", "framepack one frame", "qwen_image edit-2511", "krea2", *OF_IMAGES)
CHOSEN = ("wan t2v-1.3B", "hunyuan_video", "framepack", "qwen_image", *FULL_SLOW)
FULL_CASES = [
    pytest.param(each, id=each.name, marks=pytest.mark.slow if each.name in FULL_SLOW else ())
    for each in FAMILIES
    if each.name in CHOSEN
]


@pytest.fixture(scope="module", params=FULL_CASES)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    """A folder with models and caches."""
    family: TinyFamily = request.param
    folder = tmp_path_factory.mktemp("whole")
    make_project(family, folder)
    return family, folder


@pytest.mark.slow_cases("framepack")
def test_the_trained_file_is_a_checkpoint_that_generation_loads(project: tuple[TinyFamily, Path]) -> None:
    """The sample made while training is what the script makes of the file, and not of the one before."""
    family, folder = project
    samples = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3"]
    rate = ["--learning_rate", "1e-2", "--optimizer_type", "adamw"]

    models = family.train[1 : family.train.index("--network_module")]
    steps = [*OUTPUT, "--max_train_steps", "3"]
    succeed_here(family.train_full, *models, *steps, *rate, *samples, folder=folder)

    before, after = (
        load_file(folder / name) for name in ("model/dit.safetensors", "output/lora.safetensors")
    )
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert sum(not torch.equal(after[name], tensor) for name, tensor in before.items()) > 0.9 * len(before)
    with safe_open(folder / "output" / "lora.safetensors", "pt") as file:
        assert "lora" not in file.metadata()["modelspec.architecture"]
    page = read_run_page(folder / "output", "lora")
    page = typed_there(html.unescape(re.sub("<!--.*?-->", "", page)))
    assert f"python {family.train_full}" in page
    assert f"python {family.generate[0]}" in page
    generate = [*family.generate, *SIZE, "--prompt", "a cat", "--seed", "7"]
    succeed_here(*generate, "--dit", "output/lora.safetensors", "--save_path", "videos", folder=folder)
    succeed_here(*generate, "--save_path", "untrained", folder=folder)
    ours, theirs, untrained = (
        shown(folder / name).float() for name in ("output/sample", "videos", "untrained")
    )
    # mean levels of 255, as in test_families; the sample's video differs by its encoder's settings
    assert (ours - theirs).abs().mean() < 6
    assert (ours - untrained).abs().mean() > 12


WITHOUT_AUDIO = [each for each in FAMILIES if "sound" not in each.name]  # masks are of pictures alone


@pytest.mark.slow
@pytest.mark.parametrize("family", WITHOUT_AUDIO, ids=lambda family: family.name)
def test_nothing_is_learned_of_black_masks(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)
    config = tmp_path / "dataset.toml"
    (tmp_path / "masks").mkdir()
    for caption in (tmp_path / "clips").glob("*.txt"):
        Image.new("RGB", (64, 64)).save(tmp_path / "masks" / f"{caption.stem}.png")
    keys = f'mask_directory = "{tmp_path.as_posix()}/masks"\ntrigger_word = "ohwx"\n'
    keys += "multi_caption = true\ncaption_dropout_rate = 0.5\n"
    config.write_text(config.read_text(encoding="utf-8") + keys, encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)

    succeed_here(*family.train, *OUTPUT, "--max_train_steps", "3", folder=tmp_path)

    tensors = load_file(tmp_path / "output" / "lora.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    with safe_open(tmp_path / "output" / "lora.safetensors", "pt") as file:
        (table,) = json.loads(file.metadata()["ss_datasets"])
    assert {name: table[name] for name in ("mask_directory", "multi_caption", "trigger_word")} == {
        "mask_directory": "masks",
        "multi_caption": True,
        "trigger_word": "ohwx",
    }
