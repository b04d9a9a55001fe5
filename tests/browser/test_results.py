"""Results of all days: settings in their files, commands that make them again, and what is refused."""

import html
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from safetensors.numpy import save_file

from browser.core.bin_folder import FOLDER as BIN
from browser.core.bin_folder import BinFolder
from browser.folders.captions import compute_checksum
from browser.folders.described_folder import ChangedMeanwhileError
from browser.jobs.render_queue import RenderJob
from browser.pages.generate.result_pages import add_line, name_day
from browser.pages.generate.result_settings import (
    ResultSettings,
    find_family,
    format_sample_line,
    parse_settings,
    read_settings,
    regenerate,
)
from browser.pages.generate.results import DERIVED_NAME, ResultFolders
from browser.runs.recipes import ModelRecipe, find_model_set, make_model_recipe
from browser.runs.runs import Runs
from modules.errors import OptionError
from modules.media.reading import read_image, read_tags, video_frames
from modules.media.writing import write_png, write_video
from pocket.measure import POCKET
from protocols.families import with_scripts
from tests.browser.serving import Answer, Served, python_of, serve_runs, write_run
from tests.commands import run_script
from tests.waiting import wait_for
from training.reports.history import History, history_path

TAGS = {
    "bt_model_type": "wan",
    "bt_task": "t2v-1.3B",
    "bt_tunerver": "reelsmith 0.1.0",
    "bt_seeds": "7",
    "bt_prompt": 'a "red" square\\nmoving <b>left</b>',
    "bt_negative_prompt": "dull",
    "bt_infer_steps": "2",
    "bt_guidance_scale": "3.5",
    "bt_cfg_schedule": "N/A",
    "bt_flow_shift": "5.0",
    "bt_height": "64",
    "bt_width": "96",
    "bt_video_length": "5",
    "bt_fps": "16",
    "bt_device": "cpu",
    "bt_creation_timestamp": "2026-11-26T20:26:02+00:00",
    "bt_lora_0": "own-step00000002.safetensors: 0.75",
    "bt_sample_solver": "unipc",
    "bt_guidance_rescale": "0.0",
    "bt_dit": "dit.safetensors",
    "bt_vae": "vae.safetensors",
    "bt_t5": "t5.safetensors",
}
IMAGE = np.zeros((64, 96, 3), np.uint8)
MODEL = ["--task", "t2v-1.3B"]
for _name in ("dit", "vae", "t5"):
    MODEL += [f"--{_name}", str(POCKET / f"{_name}.safetensors")]
MADE = ["--prompt", "a red square", "--video_size", "64", "64", "--video_length", "5", "--infer_steps", "2"]
MADE += ["--seed", "11"]


def write_maker(folder: Path, name: str = "own", *more: str) -> Path:
    """A run whose history names the command that generates with the pocket model, and a LoRA of it."""
    write_run(folder, name)
    history = History(history_path(folder, name), 1, 6)
    words = ["python", "wan_generate_video.py", *MODEL, *MADE]
    words += ["--save_path", str(folder / "generated"), *more]
    history.add(6, commands=[["Generate with it", shlex.join(words), shlex.join(words), ""]])
    history.flush()
    return write_lora(folder / "own-step00000002.safetensors")


def write_lora(path: Path) -> Path:
    """A LoRA for one layer of the pocket model, which it changes much."""
    random = np.random.default_rng(3)
    name = "lora_unet_blocks_0_self_attn_q"
    tensors = {
        f"{name}.lora_down.weight": random.normal(size=(4, 128)).astype(np.float32),
        f"{name}.lora_up.weight": random.normal(size=(128, 4)).astype(np.float32),
        f"{name}.alpha": np.full((), 4, np.float32),
    }
    save_file(tensors, path, {"ss_network_module": "networks.lora_wan"})
    return path


def write_result(path: Path, tags: Mapping[str, str] | None = None, age: float = 10.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, IMAGE, TAGS if tags is None else tags)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "roots"
    write_maker(root / "set" / "output")
    write_result(root / "generated" / "a.png")
    return root


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serve_runs(root, models=root / "models") as served:
        yield served


def send(served: Served, id: str, what: str, **fields: str) -> Answer:
    headers = {"Origin": served.url, "Content_Type": "application/x-www-form-urlencoded"}
    return served.ask(f"/results/{id}/{what}", "POST", urlencode(fields) or "x=", **headers)


def id_of(served: Served, name: str) -> str:
    [result] = [result for result in ResultFolders(served.runs).list_all() if result.path.name == name]
    return result.id


# --- what files say


def test_settings_are_read_from_the_texts_of_a_file() -> None:
    settings = parse_settings({**TAGS, "post_1": "upscaler model=x.pth", "major_brand": "isom"})
    assert settings is not None
    assert settings.get("prompt") == 'a "red" square\nmoving <b>left</b>'
    assert settings.loras == [("own-step00000002.safetensors", "0.75", "")]
    assert settings.summary == "96 x 64 · 5 frames · 2 steps · guidance 3.5 · seed 7"
    assert (settings.model, settings.family) == ("wan t2v-1.3B", "wan")
    rows = dict(settings.rows())
    assert rows["size"] == "96 x 64"
    assert rows["LoRA"] == "own-step00000002.safetensors, strength 0.75"
    assert rows["afterwards"] == "upscaler model=x.pth"
    assert "cfg_schedule" not in rows, "it was not set"


def test_a_file_of_another_program_has_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write_png(path, IMAGE, {"prompt": "{}", "parameters": "a cat\nSteps: 20"})
    assert read_settings(path) is None
    write_png(path, IMAGE, {name: text for name, text in TAGS.items() if name != "bt_seeds"})
    assert read_settings(path) is None


@pytest.mark.parametrize("name", list(with_scripts()))
def test_families_are_found_by_the_names_in_files(name: str) -> None:
    assert find_family(name) == name
    for other in with_scripts()[name].further_models:
        assert find_family(other) == name


def test_families_of_older_and_longer_names() -> None:
    names = {"hunyuan": "hunyuan_video", "flux_2_klein_4b": "flux_2", "framepack": "framepack", "odd": ""}
    assert {name: find_family(name) for name in names} == names


def recipe_of(**changes: Any) -> ModelRecipe:
    model = find_model_set("wan", "t2v-1.3B")
    assert model is not None
    recipe = make_model_recipe(model, Path("models"), Path.cwd())
    fixed = {"--task": ["t2v-1.3B"]}
    for name in ("dit", "vae", "t5"):
        fixed[f"--{name}"] = [f"some where/{name}.safetensors"]
    return ModelRecipe(
        title="own",
        family=recipe.family,
        fixed_options={**fixed, **changes},
        initial_texts={},
        folder=Path.cwd(),
    )


def remade_of(tags: Mapping[str, str], recipe: ModelRecipe, seed: str = "7") -> RenderJob:
    settings = parse_settings(tags)
    assert settings is not None
    return regenerate(
        settings,
        recipe,
        seed=seed,
        save_path="made",
        find_weights=lambda name, _: f"output/{name}",
        find_media=lambda name: f"pictures/{name}",
    )


def test_settings_become_the_command_that_makes_the_same() -> None:
    remade = remade_of(TAGS, recipe_of())
    words = remade.command
    assert words[:2] == ["python", "wan_generate_video.py"]
    names = [place for place, word in enumerate(words) if word.startswith("--")]
    pairs = {words[place]: words[place + 1] for place in names}
    assert pairs == {
        "--task": "t2v-1.3B",
        "--dit": "some where/dit.safetensors",
        "--vae": "some where/vae.safetensors",
        "--t5": "some where/t5.safetensors",
        "--lora_weight": "output/own-step00000002.safetensors",
        "--lora_multiplier": "0.75",
        "--prompt": 'a "red" square\nmoving <b>left</b>',
        "--negative_prompt": "dull",
        "--infer_steps": "2",
        "--guidance_scale": "3.5",
        "--flow_shift": "5.0",
        "--video_size": "64",
        "--video_length": "5",
        "--seed": "7",
        "--save_path": "made",
    }
    assert words[words.index("--video_size") + 2] == "96"
    assert "--interactive" in remade.session
    assert "--seed" not in remade.session
    assert remade.request["prompt"] == pairs["--prompt"]
    assert remade.request["options"]["seed"] == "7"


def test_another_seed_changes_nothing_else() -> None:
    first, second = (remade_of(TAGS, recipe_of(), seed) for seed in ("7", "8"))
    assert first.session == second.session
    differing = [pair for pair in zip(first.command, second.command, strict=True) if pair[0] != pair[1]]
    assert differing == [("7", "8")]


def test_options_of_the_model_follow_the_file_and_not_the_run() -> None:
    asked: dict[str, Any] = {"--fp8_scaled": [], "--guidance_rescale": ["0.3"]}
    asked |= {"--blocks_to_swap": ["4"], "--sample_solver": ["dpm++"]}
    remade = remade_of({**TAGS, "bt_slg_layers": "9,10", "bt_slg_mode": "original"}, recipe_of(**asked))
    words = " ".join(remade.command)
    assert "--fp8_scaled" not in words, "it was made without"
    assert "--guidance_rescale 0.0" in words
    assert "--sample_solver unipc" in words
    assert "--blocks_to_swap 4" in words, "it changes no pixel"
    assert "--slg_layers 9,10" in words
    with_fp8 = remade_of({**TAGS, "bt_fp8_scaled": "True"}, recipe_of())
    assert "--fp8_scaled" in with_fp8.session


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"bt_dit": "other.safetensors"}, "other.safetensors"),
        ({"bt_task": "t2v-14B"}, "Wan2.1 t2v-14B"),
        ({"bt_model_type": "flux"}, "FLUX.1"),
        ({"bt_clip": "clip.pth"}, "clip.pth"),
        ({"bt_prompt": "x" * 70_000}, "too long"),
    ],
)
def test_no_other_model_stands_in(changes: dict[str, str], word: str) -> None:
    with pytest.raises(OptionError, match=re.escape(word)):
        remade_of({**TAGS, **changes}, recipe_of())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("save_path", "/tmp/elsewhere"),
        ("console_log_file", "log"),
        ("config_file", "x"),
        ("from_file", "x"),
        ("interactive", "True"),
        ("lora_weight", "x"),
        ("prompt_rewrite", "x"),
    ],
)
def test_a_hostile_file_sets_nothing_that_reaches_out(name: str, text: str) -> None:
    plain, changed = (remade_of({**TAGS, **more}, recipe_of()) for more in ({}, {f"bt_{name}": text}))
    assert changed.command == plain.command
    assert changed.session == plain.session
    assert changed.request == plain.request


@pytest.mark.parametrize("name", ["t5", "slg_layers", "attn_mode"])
def test_a_hostile_file_names_no_folder(name: str) -> None:
    with pytest.raises(OptionError, match="It was generated with"):
        remade_of({**TAGS, f"bt_{name}": "/etc/passwd"}, recipe_of())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bt_exclude_patterns", "x --from_file prompts"),
        ("bt_include_patterns", "x '--prompt_rewrite=y'"),
        ("bt_teacache_coefficients", "1 -2.5 -h"),
        ("bt_attn_mode", "--compile"),
        ("bt_exclude_patterns", "x 'y"),
        ("bt_lora_high_noise_0", "h.safetensors: --from_file"),
        ("bt_lora_0", "h.safetensors: --from_file"),
    ],
)
def test_a_hostile_file_adds_no_option(name: str, text: str) -> None:
    with pytest.raises(OptionError, match="It was generated with"):
        remade_of({**TAGS, name: text}, recipe_of())


def test_numbers_below_zero_of_a_file_are_kept() -> None:
    remade = remade_of({**TAGS, "bt_teacache_coefficients": "1 -2.5 -.5"}, recipe_of())
    place = remade.session.index("--teacache_coefficients")
    assert remade.session[place + 1 : place + 4] == ["1", "-2.5", "-.5"]


def test_pictures_that_it_began_from_and_loras_of_experts_are_named() -> None:
    tags = {**TAGS, "bt_image_path": "first.png", "bt_lora_high_noise_0": "h.safetensors: 0.5"}
    remade = remade_of(tags, recipe_of())
    assert remade.request["options"]["image_path"] == "pictures/first.png"
    words = remade.command
    assert words[words.index("--image_path") + 1] == "pictures/first.png"
    assert words[words.index("--lora_weight_high_noise") + 1] == "output/h.safetensors"
    assert words[words.index("--lora_multiplier_high_noise") + 1] == "0.5"


def test_the_line_of_a_prompt_file() -> None:
    settings = parse_settings(TAGS)
    assert settings is not None
    line = 'a "red" square moving <b>left</b> --w 96 --h 64 --f 5 --s 2 --g 3.5 --fs 5.0 --n dull --d 7'
    assert format_sample_line(settings) == line


@pytest.mark.parametrize("prompt", ["a cat --w 9", "--w 9", "# no prompt", "  "])
def test_prompts_that_no_line_can_hold_are_refused(prompt: str) -> None:
    with pytest.raises(OptionError):
        format_sample_line(ResultSettings({"prompt": prompt, "seeds": "1"}, [], []))


def test_a_line_is_added_once_and_every_other_byte_stays(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    before = "\ufeff# mine\r\na dög --d 1".encode()
    path.write_bytes(before)
    assert add_line(path, "a cat --d 7", compute_checksum(before))
    after = path.read_bytes()
    assert after == before + b"\r\na cat --d 7\r\n"
    assert not add_line(path, "a cat --d 7", compute_checksum(after))
    assert path.read_bytes() == after
    with pytest.raises(ChangedMeanwhileError):
        add_line(path, "a bird", compute_checksum(before))
    assert path.read_bytes() == after


# --- the list


def test_results_are_listed_newest_first_and_the_larger_one_beside_its_original(tmp_path: Path) -> None:
    folder = tmp_path / "output" / "generated"
    for name, age in (("old", 900), ("new", 5), ("old_larger", 1), ("old_last", 2), ("x_larger", 300)):
        write_result(folder / f"{name}.png", age=age)
    for name in ("latent_preview_1.png", "x_progress.mp4", "notes.txt", ".hidden.png"):
        (folder / name).write_bytes(b"x")
    write_result(tmp_path / "compare" / "generated" / "c.png")
    write_result(tmp_path / "sample" / "s.png")
    names = [result.path.stem for result in ResultFolders(Runs((tmp_path,))).list_all()]
    assert names == ["new", "x_larger", "old", "old_larger", "old_last"]
    assert DERIVED_NAME.fullmatch("a_larger-2") is not None


def test_days_have_names() -> None:
    noon = time.mktime((2026, 3, 7, 12, 0, 0, 0, 0, -1))
    from datetime import date

    days = [name_day(noon, date(2026, 3, day)) for day in (7, 8, 20)]
    assert days == ["Today", "Yesterday", "7 March 2026"]


def test_a_new_file_and_a_removed_one_are_noticed(root: Path) -> None:
    folders = ResultFolders(Runs((root,)))
    [first] = folders.list_all()
    write_result(root / "generated" / "b.png", age=0)
    assert [result.path.name for result in folders.list_all()] == ["b.png", "a.png"]
    first.path.unlink()
    assert folders.find(first.id) is None
    assert [result.path.name for result in folders.list_all()] == ["b.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_lead_nowhere(root: Path, tmp_path: Path) -> None:
    write_result(tmp_path / "outside" / "generated" / "secret.png")
    (root / "generated" / "link.png").symlink_to(tmp_path / "outside" / "generated" / "secret.png")
    (root / "linked").symlink_to(tmp_path / "outside")
    folders = ResultFolders(Runs((root,)))
    [result] = folders.list_all()
    assert result.path.name == "a.png"
    result.path.unlink()
    result.path.symlink_to(tmp_path / "outside" / "generated" / "secret.png")
    assert folders.find(result.id) is None


def test_two_thousand_results_are_paged_quickly(tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    first = write_result(folder / "0000.png").read_bytes()
    for number in range(1, 2000):
        (folder / f"{number:04d}.png").write_bytes(first)
        os.utime(folder / f"{number:04d}.png", (time.time() - 40_000 * (number % 3) - 10,) * 2)
    with serve_runs(tmp_path) as served:
        unread = 2000
        while unread:
            begin = time.process_time()
            layout = served.ask("/results").json()
            assert time.process_time() - begin < 4, "no answer waits for all to be read"
            unread = layout["unread"]
        assert layout["all"] == sum(count for _, count in layout["days"]) == 2000
        assert layout["models"] == [["Wan2.1 t2v-1.3B", "Wan2.1 t2v-1.3B"]]
        begin = time.process_time()
        assert served.ask(f"/results?have={layout['mark']}").status == 204
        part = served.ask("/results/part?from=1200&count=24").text
        assert time.process_time() - begin < 2
        assert part.count('class="plate"') == 24
        assert len(part) < 100_000
        assert served.ask("/results?find=1234").json()["chosen"] == 1
        assert served.ask("/results?find=RED+square").json()["chosen"] == 2000
        assert served.ask("/results?model=Wan2.1+t2v-1.3B").json()["chosen"] == 2000
        assert served.ask("/results?model=wan+t2v-1.3B").json()["chosen"] == 2000
        assert served.ask("/results?kind=clip").json()["chosen"] == 0
        many = served.ask("/results/part?from=0&count=100000").text
        assert many.count('class="plate"') == 48


def test_results_of_a_run_are_those_in_its_folder_and_with_its_files(served: Served, root: Path) -> None:
    without = {name: text for name, text in TAGS.items() if name != "bt_lora_0"}
    write_result(root / "generated" / "b.png", without)
    write_result(root / "set" / "output" / "generated" / "c.png", without)
    write_run(root / "second", "other")
    ids = {run.name: run.id for run in served.runs.list_all()}
    chosen = {}
    for name, id in ids.items():
        part = served.ask(f"/results/part?from=0&count=9&of={id}").text
        chosen[name] = sorted(re.findall(r'data-name="([^"]*)"', part))
    assert chosen == {"own": ["a.png", "c.png"], "other": []}


@pytest.mark.parametrize("query", ["from=-1&count=2", "from=x&count=2", "from=0", "from=0&count=99999999999"])
def test_wrong_numbers_are_refused(served: Served, query: str) -> None:
    assert served.ask(f"/results/part?{query}").status == 400


# --- what buttons do


def test_again_waits_with_the_settings_of_the_file(served: Served, root: Path) -> None:
    id = id_of(served, "a.png")
    commands = served.ask(f"/results/{id}/commands").json()
    lora = root / "set" / "output" / "own-step00000002.safetensors"
    assert f"--lora_weight {lora} --lora_multiplier 0.75" in commands["again"]
    assert "--seed 7 " in commands["again"]
    assert "--seed SEED " in commands["other"]
    (root / "set" / "output" / "own-step00000002.safetensors").unlink()
    answer = send(served, id, "again")
    assert answer.status == 422
    assert "own-step00000002.safetensors: no run here has this file" in answer.text


def test_again_finds_embeddings_by_their_names(served: Served, root: Path) -> None:
    files = [root / "set" / "output" / name for name in ("zork.safetensors", "a b.pt")]
    for file in files:
        file.write_bytes(b"vectors")
    names = shlex.join(file.name for file in files)
    write_result(root / "generated" / "b.png", {**TAGS, "bt_textual_inversion_embeddings": names})
    id = id_of(served, "b.png")

    again = shlex.split(served.ask(f"/results/{id}/commands").json()["again"])
    place = again.index("--textual_inversion_embeddings")
    assert again[place + 1 : place + 3] == [str(file) for file in files]
    files[1].unlink()
    answer = send(served, id, "again")
    assert answer.status == 422
    assert "a b.pt: no run here has this file" in answer.text
    write_result(root / "generated" / "b.png", {**TAGS, "bt_textual_inversion_embeddings": "'a b.pt"}, 5.0)
    assert "No closing quotation" in send(served, id_of(served, "b.png"), "again").text


def test_a_file_without_settings_is_made_again_by_nothing(served: Served, root: Path) -> None:
    write_result(root / "generated" / "b.png", {})
    id = id_of(served, "b.png")
    part = served.ask("/results/part?from=0&count=2").text
    assert part.count("It does not contain its settings") == 1
    assert part.count('data-do="again"') == 1
    for what in ("again", "other", "sample"):
        answer = send(served, id, what)
        assert (answer.status, "does not contain its settings" in answer.text) == (422, True)
    assert "does not contain its settings" in served.ask(f"/results/{id}/settings").text


def describe(folder: Path) -> None:
    """The files that the page reads of a described folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / "p.png", IMAGE)
    commands = json.dumps([["download", "--family", "wan", "--task", "t2v-1.3B"]])
    text = '[training]\noutput_name = "own"\nmax_train_steps = 9\n'
    text += f"[reelsmith]\nfiles = []\ncommands = {commands}\n"
    (folder / "run.toml").write_text(text)
    (folder / "dataset.toml").write_text("[general]\n")
    (folder / "prompts.txt").write_text("# mine\na dog --d 1\n")


def test_a_sample_prompt_is_added_to_the_chosen_folder_alone(served: Served, root: Path) -> None:
    for name in ("one", "two"):
        describe(root / name)
    id = id_of(served, "a.png")
    sheet = served.ask(f"/results/{id}/sample").text
    values = re.findall(r'name="file" value="([^"]*)"', sheet)
    assert [value.rpartition("/")[0] for value in values] == [str(root / name) for name in ("one", "two")]
    answer = send(served, id, "sample", file=values[1])
    assert answer.status == 200
    lines = (root / "two" / "prompts.txt").read_text().splitlines()
    assert lines[:2] == ["# mine", "a dog --d 1"]
    assert lines[2].endswith("--fs 5.0 --n dull --d 7")
    assert (root / "one" / "prompts.txt").read_text() == "# mine\na dog --d 1\n"
    again = send(served, id, "sample", file=values[1])
    assert again.status == 422, "the file is not what the page was made from"
    fresh = re.findall(r'name="file" value="([^"]*)"', again.text)[1]
    assert "has this line already" in send(served, id, "sample", file=fresh).text
    assert len((root / "two" / "prompts.txt").read_text().splitlines()) == 3
    outside = f"{root.parent}/prompts.txt {fresh.rpartition(' ')[2]}"
    assert send(served, id, "sample", file=outside).status == 422
    assert not (root.parent / "prompts.txt").exists()


def test_removed_files_lie_in_the_bin(served: Served, root: Path) -> None:
    id = id_of(served, "a.png")
    content = (root / "generated" / "a.png").read_bytes()
    assert "reelsmith-bin" in served.ask(f"/results/{id}/remove").text
    assert (root / "generated" / "a.png").exists(), "looking removes nothing"
    assert send(served, id, "remove").status == 200
    [binned] = [path for path in (root / "reelsmith-bin").rglob("*.png") if path.is_file()]
    assert binned.relative_to(root / "reelsmith-bin").parts[1:] == ("generated", "a.png")
    assert binned.read_bytes() == content
    assert served.ask("/results").json()["all"] == 0
    assert send(served, id, "remove").status == 422


def test_two_files_of_a_name_do_not_meet_in_the_bin(tmp_path: Path) -> None:
    folders = []
    for _ in range(2):
        image = write_result(tmp_path / "generated" / "a.png")
        folders.append(BinFolder(tmp_path / BIN).move_in(title="a.png", base=tmp_path, paths=[image]))
    assert folders[0] != folders[1]
    assert len([*(tmp_path / "reelsmith-bin").rglob("generated/a.png")]) == 2


def test_the_last_frame_of_a_clip_becomes_a_picture_beside_it(served: Served, root: Path) -> None:
    frames = [np.full((64, 64, 3), level, np.uint8) for level in (20, 120, 220)]
    write_video(root / "generated" / "clip.mp4", iter(frames), 16)
    answer = send(served, id_of(served, "clip.mp4"), "start").json()
    assert answer["path"] == str(root / "generated" / "clip_last.png")
    assert abs(int(read_image(Path(answer["path"])).mean()) - 220) < 4
    image = send(served, id_of(served, "a.png"), "start").json()
    assert image["path"] == str(root / "generated" / "a.png")


def test_larger_says_what_to_load_if_there_is_no_file(served: Served, root: Path) -> None:
    id = id_of(served, "a.png")
    sheet = served.ask(f"/results/{id}/larger").text
    program = python_of("reelsmith.py")
    command = f"{program} download --family tools --task realesrgan_x2 --to {root / 'models'}"
    assert command in html.unescape(re.sub("<!--.*?-->", "", sheet))
    assert send(served, id, "larger", network="x.pth").status == 422
    upscalers = root / "models" / "upscalers"
    upscalers.mkdir(parents=True)
    (upscalers / "x <b>.pth").write_bytes(b"x")
    (upscalers / "notes.txt").write_bytes(b"x")
    sheet = served.ask(f"/results/{id}/larger").text
    assert sheet.count('name="network"') == 1
    assert "<b>" not in sheet
    for name in ("../../set/output/own-step00000002.safetensors", "", "notes.txt"):
        assert send(served, id, "larger", network=name).status == 422


def test_an_upscaler_that_cannot_be_loaded_says_why(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    id = id_of(served, "a.png")
    assert "Choose a file to load" in send(served, id, "load", task="gfpgan").text
    send(served, id, "load", task="realesrgan_x2")
    wait_for(lambda: "being downloaded" not in served.ask(f"/results/{id}/larger").text)
    sheet = served.ask(f"/results/{id}/larger").text
    assert "It could not be loaded" in sheet
    assert "127.0.0.1" in sheet
    assert sheet.count('name="task"') == 3


def test_read_only_writes_nothing(root: Path) -> None:
    with serve_runs(root, read_only=True) as served:
        id = id_of(served, "a.png")
        part = served.ask("/results/part?from=0&count=9").text
        words = ("again", "other seed", "larger", "start from this", "use as sample", "remove")
        assert not [word for word in words if f">{word}" in part]
        assert ">settings<" in part
        for what in ("again", "other", "larger", "start", "sample", "remove"):
            assert send(served, id, what).status == 403
        assert [path.name for path in (root / "generated").iterdir()] == ["a.png"]


# --- hostile files


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_markup_and_control_codes_are_shown_as_text(tmp_path: Path) -> None:
    tags = {**TAGS, "bt_prompt": "</p><script>alert(1)</script>\x1b[31m\u202e", "bt_model_type": "<i>wan"}
    write_result(tmp_path / "generated" / 'x"><script>\u202e\n.png', tags)
    with serve_runs(tmp_path) as served:
        id = ResultFolders(served.runs).list_all()[0].id
        for address in ("/results/part?from=0&count=9", f"/results/{id}/settings", f"/results/{id}/remove"):
            text = served.ask(address).text
            assert "&lt;script&gt;" in text
            assert "<script>" not in text
            assert "\u202e" not in text
        assert send(served, id, "again").status == 422
        assert "<i>" not in send(served, id, "again").text


def test_huge_texts_and_damaged_files_end_no_list(tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    write_result(folder / "huge.png", {**TAGS, "bt_prompt": "cat " * 200_000})
    many = {f"bt_x{number}": "y" * 50 for number in range(5000)}
    write_result(folder / "many.png", {**TAGS, **many})
    for name, content in {"cut.mp4": b"\0\0\0\x20ftypisom", "empty.png": b"", "text.wav": b"hello"}.items():
        (folder / name).write_bytes(content)
    with serve_runs(tmp_path) as served:
        assert served.ask("/results").json()["all"] == 5
        part = served.ask("/results/part?from=0&count=24").text
        assert part.count('class="plate"') == 5
        assert part.count('class="bad"') == 3
        assert len(part) < 60_000
        id = id_of(served, "huge.png")
        answer = send(served, id, "again")
        assert (answer.status, len(answer.text) < 2000) == (422, True)


@pytest.mark.slow
def test_a_hundred_thousand_files_cost_little(tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    folder.mkdir()
    for number in range(100_000):
        (folder / f"{number}.png").touch()
    time.sleep(2.1)
    with serve_runs(tmp_path) as served:
        served.ask("/results")
        begin = time.process_time()
        layout = served.ask("/results").json()
        assert layout["all"] == 20_000
        assert time.process_time() - begin < 3


def test_no_other_file_is_served(served: Served, root: Path) -> None:
    id = id_of(served, "a.png")
    assert served.ask(f"/result/{id}.png").status == 200
    for name in (f"{id}.mp4", id, f"{id}.png/..", "..%2f..%2fset", "0" * 16 + ".png", f"{id}.png%00"):
        assert served.ask(f"/result/{name}").status == 404, name
    for what in ("settings", "commands", "larger"):
        assert served.ask(f"/results/{'0' * 16}/{what}").status == 404
    assert served.ask(f"/results/{id}/nothing").status == 404
    assert send(served, id, "nothing").status == 404


# --- the pocket model


@pytest.mark.slow
def test_again_gives_equal_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    root = tmp_path / "roots"
    lora = write_maker(root / "set" / "output")
    vectors = np.random.default_rng(4).normal(size=(2, 64)).astype(np.float32)
    save_file({"umt5xxl": vectors}, lora.with_name("square.safetensors"))  # a word of the prompt
    made = root / "generated"
    run_script(
        "wan_generate_video.py", *MODEL, *MADE, "--lora_weight", lora, "--lora_multiplier", "0.75",
        "--textual_inversion_embeddings", lora.with_name("square.safetensors"), "--guidance_scale", "3",
        "--save_path", made,
    )  # fmt: skip
    [original] = made.glob("*.mp4")
    with serve_runs(root) as served:
        id = id_of(served, original.name)
        command = shlex.split(served.ask(f"/results/{id}/commands").json()["again"])
        for what in ("again", "other"):
            assert send(served, id, what).status == 200
        files = wait_for_files(made, 3)
        others = [path for path in files if path != original]
        seeds = {read_tags(path)["bt_seeds"]: path for path in others}
        assert "11" in seeds
        again = seeds.pop("11")
        [other] = seeds.values()
        assert frames_of(again).tobytes() == frames_of(original).tobytes()
        assert frames_of(other).tobytes() != frames_of(original).tobytes()
        first, second = (dict(read_tags(path)) for path in (original, again))
        for tags in (first, second):
            del tags["bt_creation_timestamp"]
        assert first == second
        _, folder, _, _, script, *options = command  # cd FOLDER && python SCRIPT OPTIONS
        options = options[: options.index("--save_path")]
        run_script(script, *options, "--save_path", tmp_path / "typed", folder=Path(folder))
        [typed] = (tmp_path / "typed").glob("*.mp4")
        assert frames_of(typed).tobytes() == frames_of(original).tobytes()


def frames_of(path: Path) -> np.ndarray:
    return np.stack([*video_frames(path)])


def wait_for_files(folder: Path, count: int) -> list[Path]:
    for _ in range(1200):
        files = [path for path in folder.glob("*.mp4") if not path.stem.endswith("_progress")]
        if len(files) >= count:
            return files
        time.sleep(0.1)
    raise AssertionError(f"there are only {files}")


def test_layers_of_a_picture_are_one_result_and_shown_as_a_stack_that_hides_each(
    served: Served, root: Path
) -> None:
    folder = root / "generated"
    for index in (0, 2, 1):
        write_result(folder / f"cat_layer{index}.png")
    write_result(folder / "cat_composite.png")
    write_result(folder / "lone_layer1.png")  # nothing shows it together with others
    names = {result.path.stem: result for result in ResultFolders(Runs((root,))).list_all()}
    assert {*names} == {"a", "cat_composite", "lone_layer1"}
    layers = names["cat_composite"].layers
    assert [path.name for path in layers] == ["cat_layer0.png", "cat_layer1.png", "cat_layer2.png"]

    id = id_of(served, "cat_composite.png")
    shown = served.ask(f"/results/{id}/layers").text
    places = re.findall(r'<img src="([^"]+)" alt="([^"]+)" data-layer="(\d)"( hidden)?', shown)
    assert [(name, bool(hidden)) for _, name, _, hidden in places] == [
        ("the whole image", True),
        ("layer 1", False),
        ("layer 2", False),
    ]
    assert re.findall(r'data-toggles="(\d)"[^>]*?( checked)?>', shown) == [
        ("0", ""),
        ("1", " checked"),
        ("2", " checked"),
    ]
    answer = served.ask(places[2][0])
    assert answer.body == (folder / "cat_layer2.png").read_bytes()
    for index in ("3", "-1", "00000", "00003", "x", "\u0660"):
        assert served.ask(f"/results/{id}/layer/{quote(index)}").status == 404

    assert send(served, id, "remove").status == 200
    assert not list(folder.glob("cat_*"))
    assert len(list((root / "reelsmith-bin").rglob("cat_*.png"))) == 4
