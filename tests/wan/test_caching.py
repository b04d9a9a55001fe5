"""wan_cache_latents.py --i2v makes what I2V-A14B is trained on; a cache made with --clip serves it too."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_train_network
from modules.errors import CacheError, CheckpointError, DatasetError, OptionError
from modules.media.reading import read_image
from protocols.requests import Request
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.project import write_clips, write_dataset
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.tiny.wan_encoders import vae22_tensors, vae_tensors
from wan.configs import TASKS
from wan.family import Wan
from wan.files import WanFiles
from wan.vae import load_vae


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, each with a control clip, and a tiny I2V-A14B; texts are cached."""
    folder = tmp_path_factory.mktemp("i2v-A14B")
    write_tiny_wan(folder / "model", "i2v-2.2", experts=2)
    write_clips(folder / "clips", count=2)
    write_clips(folder / "control", count=2)
    for name in ("clip", "i2v", "flf2v"):
        dataset = write_dataset(folder, frames="5", more=f'control_directory = "{folder.as_posix()}/control"')
        text = dataset.read_text(encoding="utf-8").replace("/cache", f"/cache_{name}")
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        words = [
            "--dataset_config",
            str(folder / f"{name}.toml"),
            "--t5",
            str(folder / "model/t5.safetensors"),
        ]
        wan_cache_text_encoder_outputs.main(words)
    return folder


def cache(project: Path, name: str, *switches: str) -> dict[str, dict[str, Tensor]]:
    """Cache latents with these switches; the tensors of each cache file."""
    vae = ["--vae", str(project / "model/vae.safetensors"), "--vae_dtype", "float32"]
    wan_cache_latents.main(["--dataset_config", str(project / f"{name}.toml"), *vae, *switches])
    files = sorted((project / f"cache_{name}").glob("*_wan.safetensors"))
    return {file.name: load_file(file) for file in files}


def test_the_condition_equals_that_of_a_cache_with_image_features(project: Path) -> None:
    with_features = cache(project, "clip", "--clip", str(project / "model/clip.safetensors"))
    without = cache(project, "i2v", "--i2v")

    assert len(without) == 2
    assert without.keys() == with_features.keys()
    for file, tensors in without.items():
        assert {re.sub(r"_\d.*|_float.*", "", key) for key in tensors} == {
            *("latents", "latents_control", "latents_image")
        }
        (image,) = (key for key in tensors if key.startswith("latents_image"))
        assert tensors[image].shape[0] == 20
        for key, tensor in tensors.items():
            assert torch.equal(tensor, with_features[file][key]), key


def test_two_frames_are_known_with_flf2v(project: Path) -> None:
    for tensors in cache(project, "flf2v", "--i2v", "--flf2v").values():
        (image,) = (tensor for key, tensor in tensors.items() if key.startswith("latents_image"))
        mask = image[:4].amax(dim=(2, 3))
        assert mask.tolist() == [[1, 0], [1, 0], [1, 0], [1, 1]], "the first frame and the last"
        assert not any(key.startswith("clip") for key in tensors)


def test_a_cache_of_another_kind_is_noticed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(project, "i2v", "--i2v")
    for switches, found in (
        (["--i2v"], "2 files are valid, 0 items need"),
        ([], "0 files are valid, 2 items"),
    ):
        with pytest.raises(SystemExit):
            cache(project, "i2v", *switches, "--check")
        assert found in capsys.readouterr().out


def test_a_cache_with_features_trains_the_model_too(project: Path) -> None:
    """That of --i2v is trained on in tests/parity, for Fun-Control too."""
    cache(project, "clip", "--clip", str(project / "model/clip.safetensors"))
    words = ["--task", "i2v-A14B", "--dit", "model/dit.safetensors", "--dataset_config", "clip.toml"]
    words += ["--network_module", "networks.lora_wan", "--network_dim", "2", "--max_train_steps", "1"]
    words += ["--output_dir", "out", "--output_name", "lora", "--learning_rate", "1e-2", "--seed", "1"]
    words += ["--sdpa", "--max_data_loader_n_workers", "0"]

    succeed_here("wan_train_network.py", *words, folder=project)

    weights = load_file(project / "out" / "lora.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_up" in key)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vaes")
    paths = {version: folder / f"{version}.safetensors" for version in ("2.1", "2.2")}
    save_file(vae_tensors(), paths["2.1"])
    save_file(vae22_tensors(), paths["2.2"])
    return paths


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A dataset of one clip, of 80 x 80 pixels in steps of 16 and of 64 x 96 in steps of 32."""
    write_clips(tmp_path / "clips", count=1, frames=9, width=96, height=96)
    return write_dataset(tmp_path, size=80, frames="5")


def cache_of(dataset: Path, vae: Path, *more: str) -> None:
    words = ["--dataset_config", str(dataset), "--vae", str(vae), "--device", "cpu", *more]
    wan_cache_latents.main([*words, "--vae_dtype", "float32"])


def cached(dataset: Path) -> list[Path]:
    return sorted((dataset.parent / "cache").glob("*_wan.safetensors"))


def test_the_5b_vae_caches_its_own_latents_in_steps_of_32_pixels(clips: Path, vaes: dict[str, Path]) -> None:
    cache_of(clips, vaes["2.2"])

    (path,) = cached(clips)
    assert path.name == "clip 0_00000-005_0064x0096_wan.safetensors"
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latents_2x6x4_float32"]
        latents = file.get_tensor("latents_2x6x4_float32")
    assert latents.shape == (48, 2, 6, 4)
    pixels = torch.cat(list(load_vae(vaes["2.2"], CPU, torch.float32).decode(latents[None])), dim=2)
    assert pixels.shape == (1, 3, 5, 96, 64)


def test_the_other_vae_makes_the_caches_again(clips: Path, vaes: dict[str, Path]) -> None:
    cache_of(clips, vaes["2.2"])
    cache_of(clips, vaes["2.1"])

    (path,) = cached(clips)
    assert path.name == "clip 0_00000-005_0080x0080_wan.safetensors"
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latents_2x10x10_float32"]


def test_a_check_shows_the_sizes_of_the_given_vae(
    clips: Path, vaes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for vae, size in ((["--vae", str(vaes["2.2"])], "64x96"), ([], "80x80")):
        with pytest.raises(SystemExit):
            wan_cache_latents.main(["--dataset_config", str(clips), "--check", *vae])
        assert size in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--i2v"], ["--clip", "clip.safetensors"]])
def test_image_conditions_are_refused_for_the_5b_vae(
    clips: Path, vaes: dict[str, Path], words: list[str]
) -> None:
    with pytest.raises(OptionError, match=rf"{words[0]}: --vae .*TI2V-5B.*Omit {words[0]}\."):
        cache_of(clips, vaes["2.2"], *words)


def test_control_videos_are_refused_for_the_5b_vae(clips: Path, vaes: dict[str, Path]) -> None:
    (clips.parent / "control").mkdir()
    write_clips(clips.parent / "control", count=1, frames=9, width=96, height=96)
    dataset = write_dataset(
        clips.parent, size=80, frames="5", more=f'control_directory = "{clips.parent.as_posix()}/control"'
    )
    with pytest.raises(DatasetError, match="TI2V-5B does not use control videos"):
        cache_of(dataset, vaes["2.2"])
    assert not cached(dataset)


@pytest.mark.parametrize(
    ("task", "kind", "version", "given", "wanted"),
    [
        ("t2v-14B", "t2v", "2.2", "Wan2.2 TI2V-5B", "Wan2.1_VAE.pth"),
        ("ti2v-5B", "ti2v", "2.1", "Wan2.1 and Wan2.2 A14B", "Wan2.2_VAE.pth"),
    ],
)
def test_a_task_refuses_the_vae_of_other_latents(
    tmp_path: Path, vaes: dict[str, Path], task: str, kind: str, version: str, given: str, wanted: str
) -> None:
    dit = write_dit(tmp_path, tiny_state(kind))
    family = Wan(WanFiles(dit=dit, vae=vaes[version], task=TASKS[task]))
    named = rf"is the Wan{version} VAE \(of {given}: .*--task {task} needs (.|\n)*Pass {wanted}.* to --vae"
    for check in (family.check_named_files, lambda: family.prepare(Request("cat", seed=1))):
        with pytest.raises(CheckpointError, match=named):
            check()
    (right,) = set(vaes) - {version}
    Wan(WanFiles(dit=dit, vae=vaes[right], task=TASKS[task])).check_named_files()


def train_on(dataset: Path, task: str, kind: str, *more: str) -> None:
    dit = write_dit(dataset.parent, tiny_state(kind))
    words = ["--task", task, "--dit", str(dit), "--dataset_config", str(dataset), "--sdpa"]
    words += ["--output_dir", str(dataset.parent / "out"), "--output_name", "x", "--network_dim", "2"]
    wan_train_network.main([*words, *more])


@pytest.mark.parametrize("more", [[], ["--plan"], ["--check"]], ids=["train", "plan", "check"])
def test_a_training_refuses_caches_of_the_other_vae_before_anything_loads(
    clips: Path, vaes: dict[str, Path], capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    cache_of(clips, vaes["2.2"])
    (clips.parent / "cache" / "clip 0_wan_te.safetensors").touch()  # not opened before latents are
    found = r"its latents have 48 channels, this model's have 16"
    if more == ["--check"]:
        with pytest.raises(SystemExit):
            train_on(clips, "t2v-A14B", "t2v", *more)
        assert re.search(found, capsys.readouterr().out)
        return
    again = r"(.|\n)*python wan_cache_latents.py --dataset_config .*--vae WAN_2.1_VAE_FILE\n"
    with pytest.raises(CacheError, match=found + again):
        train_on(clips, "t2v-A14B", "t2v", *more)
    with pytest.raises(CheckpointError, match="--task t2v-A14B needs the Wan2.1 VAE"):  # the reason for it
        train_on(clips, "t2v-A14B", "t2v", "--vae", str(vaes["2.2"]), *more)


def test_caches_of_both_vaes_in_one_folder_are_found(clips: Path, vaes: dict[str, Path]) -> None:
    cache_of(clips, vaes["2.1"])
    cache_of(clips, vaes["2.2"], "--keep_cache")
    assert len(cached(clips)) == 2
    (clips.parent / "cache" / "clip 0_wan_te.safetensors").touch()
    for task, kind, channels in (("t2v-A14B", "t2v", 48), ("ti2v-5B", "ti2v", 16)):
        with pytest.raises(CacheError, match=rf"have {channels} channels(.|\n)*each its own cache_directory"):
            train_on(clips, task, kind)


LOW, HIGH = ["--dit", "model/dit.safetensors"], ["--dit_high_noise", "model/dit_high.safetensors"]
ENCODERS = ["--vae", "model/vae.safetensors", "--t5", "model/t5.safetensors"]
TASK = ["--task", "t2v-A14B", "--timestep_boundary", "0.8"]
TRAIN = [
    *("wan_train_network.py", *TASK, *ENCODERS, "--dataset_config", "dataset.toml", "--sdpa"),
    *("--network_dim", "4", "--learning_rate", "1e-1", "--output_dir", "output", "--output_name", "lora"),
    *("--seed", "1", "--max_data_loader_n_workers", "0", "--max_train_steps", "4"),
    *("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "4", "--sample_at_first"),
]
GENERATE = [
    *("wan_generate_video.py", *TASK, *LOW, *HIGH, *ENCODERS, "--video_size", "32", "32", "--video_length"),
    *("1", "--infer_steps", "4", "--flow_shift", "5", "--prompt", "a cat", "--seed", "7"),
    *("--guidance_scale", "3", "--guidance_scale_high_noise", "3"),
]


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two experts")
    write_tiny_wan(folder / "model", experts=2)
    write_clips(folder / "clips")
    write_dataset(folder)
    (folder / "prompts.txt").write_text(
        "a cat --w 32 --h 32 --f 1 --d 7 --s 4 --fs 5 --l 3\n", encoding="utf-8"
    )
    caching = ["--dataset_config", "dataset.toml"]
    succeed_here("wan_cache_latents.py", *caching, *ENCODERS[:2], "--vae_dtype", "float32", folder=folder)
    succeed_here("wan_cache_text_encoder_outputs.py", *caching, *ENCODERS[2:], folder=folder)
    return folder


def samples(folder: Path) -> list[Tensor]:
    """The pictures before the first step and after the last."""
    found = [
        [*(folder / "output" / "sample").glob(f"lora_{mark}_00_*.png")] for mark in ("e000000", "000004")
    ]
    return [picture(path) for (path,) in found]


def picture(path: Path) -> Tensor:
    return torch.as_tensor(read_image(path)).int()


def generated(folder: Path, name: str, *arguments: str) -> Tensor:
    succeed_here(*GENERATE, *arguments, "--save_path", name, folder=folder)
    (path,) = (folder / name).rglob("*.png")
    return picture(path)


def generated_as_told(folder: Path, name: str, said: str) -> Tensor:
    """The picture that the command of the last box makes."""
    lines = said.splitlines()
    (line,) = (lines[index + 1] for index, each in enumerate(lines) if each.startswith("Generate with it"))
    succeed_here(*shlex.split(line)[1:], folder=folder)
    (path,) = (folder / name / "output" / "generated").rglob("*.png")
    return picture(path)


CASES = {
    "shared": ([*LOW, *HIGH], ["lora"] * 2),
    "apart": (
        [*LOW, *HIGH, "--lora_per_expert", "--offload_inactive_dit"],
        ["lora_low_noise", "lora_high_noise"],
    ),
    "low": ([*LOW, "--sample_dit_other", HIGH[1]], ["lora", None]),
    "high": ([*HIGH, "--sample_dit_other", LOW[1]], [None, "lora"]),
}


@pytest.mark.slow_cases("apart", "low", "shared")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "high")) for name in CASES]
)
def test_a_sample_is_what_the_generation_script_makes(two_experts: Path, name: str) -> None:
    options, files = CASES[name]
    said = succeed_here(*TRAIN, *options, "--output_dir", f"{name}/output", folder=two_experts)
    first, last = samples(two_experts / name)

    words = []
    for option, file in zip(("--lora_weight", "--lora_weight_high_noise"), files, strict=True):
        words += [] if file is None else [option, f"{name}/output/{file}.safetensors"]
    assert torch.equal(first, generated(two_experts, f"{name}/before"))
    # float32 sums in another order: the LoRA is merged there and added here
    assert (last - generated(two_experts, f"{name}/after", *words)).abs().max() <= 1
    assert (last - first).abs().float().mean() > 3
    assert (last - generated_as_told(two_experts, name, said)).abs().max() <= 1
    for file in {file for file in files if file is not None}:
        with safe_open(two_experts / name / "output" / f"{file}.safetensors", "pt") as opened:
            expert = opened.metadata().get("ss_wan_expert")
        assert expert == {"shared": "both", "apart": file[5:].removesuffix("_noise"), "low": None}.get(
            name, name
        )
    assert ("--min_timestep 200 --preserve_distribution_shape" in said) == (name == "low")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*LOW, *HIGH, "--sample_dit_other", LOW[1]], ["--sample_dit_other", "Omit it"]),
        ([*LOW, "--sample_dit_other", LOW[1]], ["this one is trained"]),
        ([*LOW, "--task", "t2v-14B", "--sample_dit_other", HIGH[1]], ["--task t2v-14B has one transformer"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(two_experts: Path, arguments: list[str], words: list[str]) -> None:
    code, said = run_here(*TRAIN, *arguments, "--output_dir", "refused", folder=two_experts)
    assert code in {1, 2}
    assert_one_message(code, said, *words)
