"""The list of released files, the pages and the commands say the same."""

import functools
import importlib
import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from PIL import Image

from data_tools.controls.run import ControlImageOptions
from data_tools.masks.run import MaskOptions
from data_tools.tags.run import TaggingOptions
from dataset.options import CachingOptions, read_latent_caching
from docs.model_tables import FIRST, family_table, models_tables, renew_family_tables
from downloads.catalogue import (
    ModelSet,
    ReleasedFile,
    download_hint,
    families,
    family_page,
    known_components,
    model_sets,
)
from downloads.listing import describe_set
from downloads.naming import DownloadOptions
from flux.configs import RELEASES
from flux.kontext.family import KONTEXT_DEV
from flux_2.versions import VERSIONS
from frame_pack.configs import FRAMEPACK, FRAMEPACK_F1
from generation.options import read_generation
from hunyuan_image.configs import HUNYUAN_IMAGE
from hunyuan_model.configs import HUNYUAN_VIDEO, SKYREELS_I2V
from lumina.configs import LUMINA_2
from modules.errors import UserError
from modules.script_options import parse_options
from postprocessing.chain_options import TOOLS as TOOLS_ON_VIDEOS
from postprocessing.chain_options import read_chain
from protocols.families import FOLDERS, identify, with_scripts
from stable_diffusion.options import read_gen_img
from tests.commands import ROOT
from tests.faults.messages import run_here
from tests.manifests import WIDTHS, tensor_list
from tests.test_docs import PAGES
from training.image_options import ImageTrainerDefaults, read_image_training
from training.noise_options import SAMPLERS, SHIFTED_LOGIT, TRUNCATED_LOGIT
from training.options import TrainerChanges, read_training
from training.scoring.run import ScoreOptions
from wan.configs import TASKS
from wan.family import Wan
from wan.files import WanFiles

SETS = [*model_sets(), *model_sets(fp8_encoders=True)]
FILES = [file for component in known_components().values() for file in component.files]


LTX_PARTS = ("audio-vae", "connectors", "dit", "video-vae", "vocoder")
ALL_SAMPLERS = {"timestep_sampling": {"choices": (*SAMPLERS, SHIFTED_LOGIT, TRUNCATED_LOGIT)}}


def _read_texts(record: type[Any], argv: list[str]) -> Any:
    return parse_options("", argv, CachingOptions, record)


def _read_tool(record: type[Any], argv: list[str]) -> Any:
    return parse_options("", argv, record)


def _readers() -> dict[str, Callable[[list[str]], Any]]:
    """Return for each script what reads its options."""
    found: dict[str, Callable[[list[str]], Any]] = {"gen_img.py": lambda argv: read_gen_img("", argv)}
    for tool in TOOLS_ON_VIDEOS:
        found[f"blissful_tuner/{tool.name}.py"] = functools.partial(read_chain, tool.name, "")
    for tool, options in (
        ("tag", TaggingOptions),
        ("mask", MaskOptions),
        ("score", ScoreOptions),
        ("control_pictures", ControlImageOptions),
    ):
        found[f"tools/{tool}.py"] = functools.partial(_read_tool, options)
    for entry in with_scripts().values():
        latents, texts = entry.options_record("LatentCaching"), entry.options_record("TextCaching")
        found[f"{entry.cache}_latents.py"] = functools.partial(read_latent_caching, "", latents)
        found[f"{entry.cache}_text_encoder_outputs.py"] = functools.partial(_read_texts, texts)
        training = entry.training_script
        record, module = entry.options_record("Training"), importlib.import_module(training)
        # those that follow the image guides: of a family's options, or of its script
        trainer = vars(entry.options).get("TRAINER")
        images = hasattr(module, "DEFAULTS") or trainer is not None
        defaults: tuple[Any, ...] = ()
        if images:
            defaults = (ImageTrainerDefaults(**trainer) if trainer else module.DEFAULTS,)
        read = (
            read_image_training
            if images
            else functools.partial(read_training, changes=TrainerChanges(settings=ALL_SAMPLERS))
        )
        found[f"{training}.py"] = functools.partial(read, "", record, *defaults)
        of_script = importlib.import_module(entry.generation_script).DEFAULTS
        record = entry.options_record("Generation")
        found[f"{entry.generation_script}.py"] = functools.partial(read_generation, "", of_script, record)
    return found


READERS = _readers()


def _split(command: str) -> list[str]:
    words = shlex.split(command, posix=os.name != "nt")
    return [word.strip('"') for word in words]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.repository}/{file.file}")
def test_a_file_is_named_and_measured_plausibly(file: ReleasedFile) -> None:
    name = PurePosixPath(file.name)
    assert not name.is_absolute()
    assert ".." not in name.parts
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.repository)
    assert re.fullmatch(r"[\w./-]+", file.file)
    assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.size_bytes is None or file.sha256 is not None  # both come from the same list


def test_no_two_files_have_the_same_place_and_each_is_where_its_option_says() -> None:
    assert len({file.name.lower() for file in FILES}) == len(FILES)
    for component in known_components().values():
        for file in component.files:
            assert PurePosixPath(file.name).is_relative_to(component.path)


@pytest.mark.parametrize(
    ("component", "manifest", "width"),
    [
        ("wan_t2v_small", "wan2.1-t2v-1.3b", 2),
        ("wan_fun", "wan2.1-fun-14b-control", None),
        ("wan22_ti2v", "wan2.2-ti2v-5b", 2),
        ("wan22_vae", "wan2.2-vae", None),
        ("umt5", "umt5-xxl-enc-wan", None),
        ("hunyuan_t2v", "hunyuanvideo-t2v-dit", None),
        ("llava_llama3", "llava-llama3-single", None),
        ("framepack_f1", "framepack-dit", None),
        ("hunyuan_image", "hunyuanimage2.1-dit", None),
        ("lumina", "lumina2-dit", None),
        ("ltx23", " ".join(f"ltx2.3-{part}" for part in LTX_PARTS), None),
        ("ltx25", "ltx2.5-dit ltx2.5-connectors", None),
        ("ltx25_gemma4", "ltx2.5-text-encoder", None),
        ("ltx25_vae", "ltx2.3-video-vae", None),
        ("ltx25_audio_vae", "ltx2.3-audio-vae ltx2.3-vocoder", None),
        ("qwen_image", "qwen-image-dit", None),
        ("kandinsky_6_lite", "kandinsky6-lite-dit", None),
        ("z_image", "z-image-dit-comfy", None),
        ("krea2_raw", "krea2-dit", None),
        ("qwen3_vl_4b", "qwen3-vl-4b", None),
        ("anima_base", "anima-dit", None),
        ("qwen3_06b", "qwen3-0.6b", None),
        ("qwen_image_21", "qwen-image-2.1-dit", None),
        ("qwen_image_21_turbo", "qwen-image-2.1-dit-diffusers", None),
        ("qwen_image_21_vae", "qwen-image-2.1-vae-diffusers", None),
        ("qwen3_4b", "qwen3-4b", None),
        ("flux_dev", "flux1-dev-dit", None),
        ("flux_2_dev", "flux2-dev-dit", None),
        ("flux_2_klein_base_9b", "flux2-klein-9b-dit", None),
        ("qwen3_8b", "qwen3-8b", None),
        ("gimmvfi_f", "gimmvfi-f flowformer-sintel", None),
        ("gfpgan", "gfpgan-v1.4", None),
    ],
)
def test_sizes_are_those_of_the_tensors(component: str, manifest: str, width: int | None) -> None:
    found = known_components()[component]
    tensors = [entry for name in manifest.split() for entry in tensor_list(name).values()]
    total = sum(math.prod(shape) * (width or WIDTHS[dtype]) for dtype, shape in tensors)

    if found.tensor_bytes is not None:
        assert found.tensor_bytes == total
    else:  # the exact size of the file: a header or the structure of a pickle more, for Llama a tokenizer too
        assert found.size_bytes is not None
        assert total < found.size_bytes < total + (10_000_000 if component == "llava_llama3" else 400_000)


def test_the_pages_have_the_tables_of_the_files() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")

    assert page[page.index(FIRST) :] == models_tables()
    for family in families():
        text = (ROOT / "docs" / family_page(family)).read_text(encoding="utf-8")
        assert "\n".join(family_table(family)) in text
        of_page = [one for one in families() if family_page(one) == family_page(family)]
        assert renew_family_tables(text, of_page) == text


ELSEWHERE = {
    # any ControlNet; any chat model; any vision-language model
    *("FLUX.1-dev-Controlnet-Canny", "chat", "chat/config.json", "vision"),
    "loras",  # of ComfyUI
    "Ideogram-4-bf16-Diffusers",  # a copy by somebody else, whose files were not seen
    *("wan_pipeline", "wan_pipeline/vae", "wan_pipeline/text_encoder"),  # a diffusers folder
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_model_that_a_page_names_is_in_the_list(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = {component.path.as_posix() for component in known_components().values()}
    repositories = {file.repository for file in FILES} | {one.released_by for one in SETS}

    named = {path.rstrip(".") for path in re.findall(r"\bmodels/([\w./-]+)", text)} - {""}
    assert named - known - ELSEWHERE == set()
    owners = {name.split("/")[0] for name in repositories}
    mentioned = {name for name in re.findall(r"`([\w.-]+/[\w.-]+)`", text) if name.split("/")[0] in owners}
    assert mentioned - repositories == set()


@pytest.mark.parametrize("model_set", SETS, ids=lambda one: f"{one.family} {one.task}")
def test_commands_after_a_download_are_valid(
    model_set: ModelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my models"
    for component in model_set.components:
        for file in component.files:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).touch()
    for name in ("start.png", "end.png", "control.mp4", "dataset.toml", "video.mp4"):
        (tmp_path / name).touch()
    for name in ("pictures", "output"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    used = set()
    for command in model_set.typed_commands(folder):
        words = _split(command)
        start = next(index for index, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[start]).is_file()
        READERS[words[start]](words[start + 1 :])
        assert "{" not in command
        used |= set(words)

    named = {str(folder / component.path) for component in model_set.components if component.option}
    assert named <= used


def downloads_of(page: Path) -> list[str]:
    """The options of each download that a page shows."""
    return re.findall(r"^python tools/download\.py (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


WITH_DOWNLOADS = [page for page in PAGES if downloads_of(page)]


@pytest.mark.parametrize("page", WITH_DOWNLOADS, ids=lambda page: page.stem)
def test_downloads_that_a_page_shows_are_valid(page: Path) -> None:
    for command in downloads_of(page):
        parse_options("", shlex.split(command, comments=True), DownloadOptions)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("my models/wan2.1_t2v_1.3B_bf16.safetensors", "--family wan --task t2v-1.3B --to 'my models'"),
        (
            "m/hunyuan-video-t2v-720p/vae/pytorch_model.pt",
            "--family kandinsky --task k5-lite-t2v-5s-sd --to m",
        ),
        ("llava_llama3_fp8_scaled.safetensors", "--family hunyuan_video --task t2v --fp8_encoders --to ."),
    ],
)
def test_a_missing_file_is_answered_with_its_download(path: str, command: str) -> None:
    assert download_hint(Path(path)) == f"python tools/download.py {command} downloads it".replace(
        "'", '"' if os.name == "nt" else "'"
    )
    assert download_hint(Path("m/pytorch_model.pt")) is None


def option_of(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


SCRIPTS_OF_FAMILIES = {name: entry.main_scripts for name, entry in with_scripts().items()}


def is_of_script(hint: str, scripts: set[str]) -> bool:
    """Whether the download that a hint names is of a model that one of the scripts runs."""
    words = hint.split()
    named = option_of(words, "--family"), option_of(words, "--task")
    (model,) = [one for one in model_sets() if (one.family, one.task) == named]
    return any(command.split()[1] in scripts for command in model.commands.values())


@pytest.mark.parametrize("family", [None, *SCRIPTS_OF_FAMILIES])
def test_every_missing_file_is_answered_with_the_least_download_of_the_script_that_asks(
    family: str | None, tmp_path: Path
) -> None:
    """A VAE of Anima with 0.3 GB was answered with Qwen-Image, which has 57.7 GB."""
    scripts = set(SCRIPTS_OF_FAMILIES.get(family or "", ()))
    for in_fp8 in (False, True):
        for part in {part.path for model in model_sets(in_fp8) for part in model.components if part.option}:
            having: dict[tuple[str, str], tuple[int, bool]] = {}  # set -> its bytes, whether a script runs it
            for model in model_sets(in_fp8):
                if any(part == other.path for other in model.components if other.option):
                    size = sum(other.size_bytes or 0 for other in model.components)
                    runs = any(command.split()[1] in scripts for command in model.commands.values())
                    having[model.family, model.task] = size, runs
            hint = identify(tmp_path / part, family)
            assert hint is not None
            of_family = {name: size for name, (size, runs) in having.items() if runs}
            if scripts and not of_family:
                assert f"{part.name} belongs to " in hint
                assert is_of_script(hint, scripts), (family, part)
                continue
            words = shlex.split(hint.removesuffix(" downloads it"))
            chosen = option_of(words, "--family"), option_of(words, "--task")
            if in_fp8 and "--fp8_encoders" not in words:
                continue  # a file of the usual sets too
            sizes = of_family or {name: size for name, (size, _) in having.items()}
            assert sizes[chosen] == min(sizes.values()), (family, part)


def test_files_that_are_there_are_not_counted(tmp_path: Path) -> None:
    wan = next(model for model in model_sets() if (model.family, model.task) == ("wan22", "t2v-A14B"))
    (vae,) = [part for part in wan.components if part.option == "--vae"]
    for part in wan.components:
        if part is not vae:
            (tmp_path / part.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part.path).touch()

    hint = identify(tmp_path / vae.path, "wan")

    assert hint is not None
    assert "--family wan22 --task t2v-A14B " in hint


def test_a_script_says_which_download_of_its_family_brings_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text('[[datasets]]\nimage_directory = "."\n', encoding="utf-8")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8")
    (anima,) = [model for model in model_sets() if model.family == "anima"]
    (vae,) = [part for part in anima.components if part.option == "--vae"]
    words = ["--dataset_config", "d.toml", "--vae", Path("models") / vae.path]

    code, said = run_here("anima_cache_latents.py", *words, folder=tmp_path)

    assert code != 0
    assert "--family anima --task base" in said


def test_a_missing_file_of_another_family_is_answered_with_a_download_of_the_own_one(tmp_path: Path) -> None:
    hint = identify(tmp_path / "qwen_image_vae.safetensors", "fibo_2")

    assert hint is not None
    assert "qwen_image_vae.safetensors belongs to " in hint
    assert "--family fibo_2 --task " in hint


def test_the_list_of_a_task_names_files_sizes_sources_and_licences() -> None:
    text = "\n".join(describe_set(SETS[0], Path("models")))

    for word in ("--dit", "Wan2.1_VAE.pth", "11.4 GB", "Wan-AI/Wan2.1-T2V-1.3B", "Apache-2.0", "14.7 GB"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--family is missing"),
        ("--task t2v-1.3B", "--family is missing"),
        ("--family wan", "--task is missing: t2v-1.3B"),
        ("--family wan --task t2v", "Did you mean t2v-"),
        ("--family wan --task t2v-1.3B --to {file}", "it is a file"),
    ],
)
def test_what_cannot_be_downloaded_is_refused_at_once(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match=message):
        parse_options("", [word.format(file=tmp_path / "file") for word in words.split()], DownloadOptions)


def test_families_name_the_releases_and_licences_of_the_list() -> None:
    known = {one.released_by: one.components[0].licence for one in SETS}
    releases = [Wan(WanFiles(task=task)).release for task in TASKS.values()]
    releases += [*RELEASES.values(), *(version.release for version in VERSIONS.values())]
    releases += [KONTEXT_DEV, HUNYUAN_IMAGE, LUMINA_2, HUNYUAN_VIDEO, SKYREELS_I2V, FRAMEPACK, FRAMEPACK_F1]
    for release in releases:
        declared = release.licence, release.license_key, release.license_url
        for licence in (known[repository] for repository in release.repositories):
            assert declared == (licence.name, licence.key, licence.url)


def test_trainings_ask_for_the_names_of_comfyui_where_it_reads_no_others() -> None:
    asking, needing = set(), set()
    for model in model_sets():
        words = shlex.split(model.commands.get("train", ""))
        if "--lora_format" in words:
            assert words[words.index("--lora_format") + 1] == "comfyui"
            asking.add(model.family)
        scripts = {entry.training_script: name for name, entry in with_scripts().items()}
        script = next((word.removesuffix(".py") for word in words if word.endswith(".py")), "")
        names = importlib.import_module(f"{FOLDERS[scripts[script]]}.names").LORA if script else ()
        if any(name.converted_for == "ComfyUI" for name in names):
            needing.add(model.family)
    assert "qwen_image_21" in asking
    assert asking == needing


def test_a_family_with_one_task_needs_no_task() -> None:
    assert parse_options("", ["--family", "hunyuan_video"], DownloadOptions)[0].task is None


def test_a_download_without_some_files_lists_loads_and_types_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = parse_options(
        "", ["--family", "wan", "--task", "t2v-1.3B", "--without", "dit", "--t5"[2:]], DownloadOptions
    )[0]

    (model,) = options.sets()

    assert [part.option for part in model.components if part.option] == ["--vae"]
    training = next(text for text in model.typed_commands(Path("m")) if "train_network" in text)
    assert "--dit DIT_FILE" in training
    with pytest.raises(UserError, match=r"--without vea: wan t2v-1.3B has dit, vae, t5\. Did you mean vae\?"):
        parse_options("", ["--family", "wan", "--task", "t2v-1.3B", "--without", "vea"], DownloadOptions)[
            0
        ].sets()
