"""Recipes: values of a training in a file, also of somebody else; `new --recipe` and `recipe save`."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from docs.model_tables import recipe_table
from modules.errors import OptionError, OutputError
from modules.parser import Parser
from modules.script_options import parse_options
from modules.table_parser import build_parser
from modules.text_files import parse_toml
from project.files import write_project
from project.new_options import NewOptions
from project.recipes import reading
from project.recipes.reading import find_recipe, list_allowed, list_paths, list_shipped, read_recipe
from project.recipes.saving import RecipeOptions, run_recipe_command
from tests.commands import ROOT
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES
from tests.tiny.project import write_clips
from training.config_options import toml_value

RECIPE = """title = "A test"
family = "wan"
task = "t2v-1.3B"
train = "lora"
tried_on = "two clips"

[training]
{values}

[figures]
loss = 0.5
"""


def write_recipe_file(folder: Path, values: str = "network_dim = 4", text: str = RECIPE) -> Path:
    """Write a recipe with these lines below [training]."""
    path = folder / "mine.toml"
    path.write_text(text.replace("{values}", values), encoding="utf-8")
    return path


def new(folder: Path, *words: str) -> None:
    """Describe a folder."""
    (options,) = parse_options("", [str(folder), "--memory", "0", *words], NewOptions)
    write_project(options)


def test_the_shipped_recipes_can_be_read_and_say_what_they_were_tried_on() -> None:
    recipes = list_shipped()

    assert [recipe.name for recipe in recipes] == [
        path.stem for path in sorted(reading.SHIPPED.glob("*.toml"))
    ]
    assert len(recipes) >= 4
    for recipe in recipes:
        assert recipe.figures, recipe.name
        assert "pocket" in recipe.tried_on  # nothing else was measured
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    by_name = {recipe.name: recipe.figures for recipe in recipes}
    for row, name in {
        "plain": "pocket-color",
        "guided target 3, from 150 on": "pocket-color-guided",
        "focus on 400 to 800": "pocket-color-focus",
    }.items():
        assert f"| {row} | {' | '.join(by_name[name].values())} |" in results


def test_the_table_of_the_page_is_that_of_the_files() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

    assert text.endswith(recipe_table())
    assert all(f"`{recipe.name}`" in text for recipe in list_shipped())


# what a recipe of somebody else may try, and the words of the message
HOSTILE = {
    "dit = '/etc/passwd'": "dit cannot be set by a recipe",
    "output_dir = '..'": "output_dir cannot be set by a recipe",
    "network_weights = 'x.safetensors'": "network_weights cannot be set by a recipe",
    "sample_prompts = '~/.ssh/id_rsa'": "sample_prompts cannot be set by a recipe",
    "slider = 'sliders.toml'": "slider",
    "prompts_file = 'a.toml'": "prompts_file",
    "on_end = 'rm -r .'": "on_end cannot be set by a recipe",
    "log_with = 'wandb'": "log_with cannot be set by a recipe",
    "wandb_api_key = 'k'": "wandb_api_key cannot be set by a recipe",
    "huggingface_repo_id = 'a/b'": "huggingface_repo_id cannot be set by a recipe",
    "log_tracker_config = 'x'": "log_tracker_config cannot be set by a recipe",
    "resume = 'latest'": "resume cannot be set by a recipe",
    "overwrite = true": "overwrite cannot be set by a recipe",
    "compile = true": "compile cannot be set by a recipe",
    "commands = [['rm']]": "commands cannot be set by a recipe",
    "netwrk_dim = 4": "netwrk_dim cannot be set by a recipe. Did you mean network_dim?",
    "network_module = 'evil'": "network_module = evil: use networks.",
    "network_module = 'networks.lora_wan.x'": "network_module = networks.lora_wan.x: use networks.",
    "optimizer_type = 'os.system'": "choose one from docs/training.md",
    "optimizer_type = 'AdamW'": "optimizer_type = AdamW: write adamw",
    "lr_scheduler_type = 'a.B'": "lr_scheduler_type can only be set on the command line",
    "lr_scheduler = '/etc/x'": "choose one from docs/training.md",
    "optimizer_args = ['foo=../../x']": "optimizer_args = foo=../../x: write NAME=VALUE",
    "network_args = ['preset=x.toml']": "network_args = preset=x.toml: write NAME=VALUE",
    "network_args = ['a=__import__(1)']": "network_args = a=__import__(1): write NAME=VALUE",
    "optimizer_args = [{a = 1}]": "write NAME=VALUE",
    "learning_rate = '1e-4; rm'": "learning_rate = 1e-4; rm: a recipe gives a number here",
    "learning_rate = nan": "learning_rate = nan is not a number",
    "learning_rate = true": "learning_rate = True: a recipe gives a number here",
    "network_dim = 4.5": "mine.toml: network_dim = 4.5: expected a whole number",
    "network_dim = 0": "--network_dim 0: use a number of at least 1",
    "network_dim = [4, 4]": "network_dim = [4, 4]: expected a whole number",
    "timestep_sampling = 'x/y'": "mine.toml: timestep_sampling = 'x/y': choose from",
    "network_train_unet_only = 1": "cannot be set by a recipe",
    "tread = 'x.py'": "tread = x.py",
    "teacher = '/x'": "teacher = '/x': choose from",
    '"a\\u001b[31mb" = 1': "cannot be set by a recipe",
}


@pytest.mark.parametrize("values", HOSTILE)
def test_a_recipe_of_somebody_else_sets_values_and_nothing_else(values: str, tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path, values)

    with pytest.raises(OptionError) as raised:
        read_recipe(path)

    assert HOSTILE[values] in str(raised.value)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A test"', "", "title is missing"),
        ('title = "A test"', 'title = "a\\nb"', "title has to be a line"),
        ('title = "A test"', f'title = "{"x" * 400}"', "title has to be a line"),
        ('"two clips"', '"see https://example.org"', "tried_on contains an address"),
        ('"two clips"', "3", "tried_on is missing, or is not text"),
        ('family = "wan"', 'family = "wam"', "is not a model. Did you mean wan t2v-1.3B"),
        ('train = "lora"', 'train = "script"', "train = 'script': use lora"),
        ('train = "lora"', 'train = "lllite"', "has no script for it"),
        ("[training]", 'run = "x.py"\n[training]', "run is not a key of a recipe"),
        ("[figures]", '[commands]\na = "rm"\n[figures]', "commands is not a key of a recipe"),
        ("[training]\n{values}", "training = 3", "training is not a table"),
        ("loss = 0.5", "loss = [1]", "loss is missing, or is not text"),
        ("loss = 0.5", "\n".join(f"l{number} = 1" for number in range(21)), "[figures] has 21 keys"),
        ("loss = 0.5", "loss = ", "cannot be read"),
    ],
)
def test_what_a_recipe_lacks_or_has_too_much_of_is_named(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in RECIPE
    path = write_recipe_file(tmp_path, text=RECIPE.replace(old, new))

    with pytest.raises(OptionError) as raised:
        read_recipe(path)

    assert message in str(raised.value)


def test_a_recipe_is_a_small_file_with_a_plain_name(tmp_path: Path) -> None:
    large = write_recipe_file(tmp_path, text=RECIPE + "#" * (1 << 16))
    with pytest.raises(OptionError, match="cannot be read"):
        read_recipe(large)
    named = write_recipe_file(tmp_path).rename(tmp_path / "a b.toml")
    with pytest.raises(OptionError, match="its name has to be of letters"):
        read_recipe(named)
    with pytest.raises(OptionError, match="pocket-shap: there is no such recipe. Did you mean pocket-shape?"):
        find_recipe("pocket-shap")


def test_no_option_with_a_reach_or_a_path_is_a_value() -> None:
    allowed = list_allowed("wan_train_network.py")

    assert {"network_dim", "learning_rate", "timestep_focus", "ema_decay", "optimizer_args"} <= allowed
    assert not {"dit", "vae", "t5", "on_end", "output_dir", "log_with", "base_weights", "seed"} & allowed


def test_new_takes_the_values_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "clips", count=2)
    values = (
        'learning_rate = 0.5\nnetwork_dim = 3\noptimizer_args = ["betas=(0.9, 0.99)"]\nmax_train_steps = 77'
    )
    path = write_recipe_file(tmp_path, values)

    new(tmp_path / "clips", "--recipe", str(path), "--overwrite")
    described = parse_toml((tmp_path / "clips" / "run.toml").read_text(encoding="utf-8"))
    new(tmp_path / "clips", "--recipe", str(path), "--overwrite", "--max_train_steps", "5")
    shorter = parse_toml((tmp_path / "clips" / "run.toml").read_text(encoding="utf-8"))["training"]

    assert described["training"]["learning_rate"] == 0.5
    assert described["training"]["network_dim"] == 3
    assert described["training"]["optimizer_args"] == ["betas=(0.9, 0.99)"]
    assert described["training"]["max_train_steps"] == 77
    assert described["reelsmith"]["commands"][0][2:6] == ["--family", "wan", "--task", "t2v-1.3B"]
    assert shorter["max_train_steps"] == 5
    assert "recipe mine: A test" in capsys.readouterr().out
    with pytest.raises(OptionError, match="is for --task t2v-1.3B, not t2v-14B. Omit one of them"):
        new(tmp_path / "clips", "--recipe", str(path), "--task", "t2v-14B")
    with pytest.raises(OptionError, match="is for --train lora, not whole"):
        new(tmp_path / "clips", "--recipe", str(path), "--whole_model")
    with pytest.raises(OptionError, match="--recipe"):
        new(tmp_path / "clips", "--recipe", str(path), "--from", str(path))


def write_history(folder: Path, changed: list[list[str]], kind: str = "good") -> Path:
    """Write the history of a run of two steps."""
    rows = [
        {"session": 1, "version": 1},
        {
            "step": 0,
            "started": {
                "model": "wan",
                "total_steps": 2,
                "changed": changed,
                "unchanged": [],
                "listens": True,
                "process": {},
            },
        },
        {"step": 1, "loss": 0.5, "average": 0.5, "seconds": 2.0},
        {"step": 2, "loss": 0.25, "average": 0.375, "seconds": 1.0},
        {"step": 2, "validation": {"validation/loss": 0.3}},
        {"step": 2, "ended": "finished", "kind": kind},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cat-history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHANGED = [
    ["dit", "/home/somebody/models/wan.safetensors"],
    ["task", "t2v-1.3B"],
    ["network_module", "networks.lora_wan"],
    ["network_dim", "4"],
    ["learning_rate", "0.1"],
    ["optimizer_args", "weight_decay=0.01 betas=0.9,0.99"],
    ["output_dir", "/home/somebody/output"],
    ["logging_dir", "logs"],
    ["sdpa", "True"],
    ["timestep_sampling", "shift"],
    ["lr_warmup_steps", "10"],
    ["mixed_precision", "bf16"],
]


def save(*words: str) -> None:
    """Save a recipe."""
    (options,) = parse_options("", ["save", *words], RecipeOptions)
    run_recipe_command(options)


def test_a_finished_run_becomes_a_recipe_without_its_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_history(tmp_path / "clips" / "output", CHANGED)
    save("clips", "--tried_on", "two clips of a cat")

    text = (tmp_path / "recipes" / "cat.toml").read_text(encoding="utf-8")
    recipe = find_recipe("cat")

    assert recipe.training == {
        "network_module": "networks.lora_wan",
        "network_dim": 4,
        "learning_rate": 0.1,
        "optimizer_args": ["weight_decay=0.01", "betas=0.9,0.99"],
        "timestep_sampling": "shift",
        "lr_warmup_steps": 10,
        "max_train_steps": 2,
    }
    assert recipe.figures == {
        "average loss at the end": "0.375",
        "lowest validation loss": "0.3 at step 2",
        "seconds a step, median": "2",
    }
    assert (recipe.family, recipe.task, recipe.train) == ("wan", "t2v-1.3B", "lora")
    assert "somebody" not in text
    assert "new FOLDER --recipe cat" in capsys.readouterr().out
    assert list_paths()[-1] == Path("recipes/cat.toml")
    with pytest.raises(OutputError, match="already exists. Pass another --name, or --overwrite"):
        save("clips/output")
    save("clips/output/cat-history.jsonl", "--overwrite")
    assert find_recipe("cat").tried_on == "wan.safetensors"


@pytest.mark.slow
def test_a_training_becomes_a_recipe_that_new_takes(tmp_path: Path) -> None:
    family = FAMILIES[0]
    family.prepare(tmp_path)
    steps = shlex.split("--seed 1 --max_train_steps 2 --output_dir output --output_name lora")
    for script, *words in (family.cache_latents, family.cache_texts, [*family.train, *steps]):
        succeed_here(script, *words, folder=tmp_path)

    succeed_here("tools/recipe.py", "save", "output", folder=tmp_path)
    succeed_here("new_project.py", "clips", "--recipe", "lora", "--memory", "0", folder=tmp_path)

    values = parse_toml((tmp_path / "clips" / "run.toml").read_text(encoding="utf-8"))["training"]
    assert (values["network_dim"], values["learning_rate"], values["max_train_steps"]) == (4, 0.1, 2)
    assert read_recipe(tmp_path / "recipes" / "lora.toml").figures["average loss at the end"]


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (CHANGED, "", "this run has not finished"),
        (
            [row for row in CHANGED if row[0] != "task"],
            "good",
            "does not say which model of `new` was trained",
        ),
        ([row for row in CHANGED if row[0] != "network_module"], "good", "does not say which model"),
    ],
)
def test_other_runs_become_no_recipe(
    changed: list[list[str]], kind: str, message: str, tmp_path: Path
) -> None:
    history = write_history(tmp_path, changed, kind)

    with pytest.raises(OptionError, match=message):
        save(str(history), "--to", str(tmp_path / "recipes"))

    assert not (tmp_path / "recipes").exists()


def test_a_folder_has_one_run_or_its_history_is_given(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no run"):
        save(str(tmp_path))
    path = write_history(tmp_path, CHANGED)
    path.with_name("dog-history.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(OptionError, match="has 2 runs. Pass the history of one"):
        save(str(tmp_path))
    with pytest.raises(OptionError, match="recipe save: pass the folder of a run"):
        save()
    with pytest.raises(OptionError, match="--name"):
        save(str(path), "--name", "../x")


def test_a_described_run_names_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_history(tmp_path / "clips" / "output", [row for row in CHANGED if row[0] != "task"])
    commands = [["python", "tools/download.py", "--family", "wan22", "--task", "t2v-A14B"]]
    commands += [["python", "wan_train_network.py"]]
    text = f"[reelsmith]\ncommands = {toml_value(commands)}\n"
    (tmp_path / "clips" / "run.toml").write_text(text, encoding="utf-8")

    save("clips", "--title", "Two experts")

    recipe = find_recipe("cat")
    assert (recipe.title, recipe.family, recipe.task) == ("Two experts", "wan22", "t2v-A14B")


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    (options,) = parse_options("", ["list"], RecipeOptions)
    run_recipe_command(options)

    said = capsys.readouterr().out
    assert all(f"recipe {recipe.name}: {recipe.title}" in said for recipe in list_shipped())


def test_one_bad_file_hides_no_other_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.toml").write_text("[", encoding="utf-8")
    write_recipe_file(tmp_path).rename(tmp_path / "recipes" / "b.toml")
    (options,) = parse_options("", ["list"], RecipeOptions)
    run_recipe_command(options)

    said = " ".join(capsys.readouterr().out.split())
    assert "recipe recipes/a.toml cannot be read" in said
    assert "recipe b: A test" in said


def test_many_recipes_are_listed_with_one_parser_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for number in range(100):
        write_recipe_file(tmp_path).rename(tmp_path / "recipes" / f"r{number}.toml")
    reading.find_recipe_options.cache_clear()
    scripts = []

    def build_counted(table: Mapping[str, Any], script: str) -> Parser:
        scripts.append(script)
        return build_parser(table, script)

    monkeypatch.setattr(reading, "build_parser", build_counted)
    (options,) = parse_options("", ["list"], RecipeOptions)
    run_recipe_command(options)

    assert capsys.readouterr().out.count("A test") == 100
    assert scripts == ["wan_train_network.py"]


def test_a_recipe_of_the_folder_does_not_stand_for_a_shipped_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    write_recipe_file(tmp_path).rename(tmp_path / "recipes" / "pocket-shape.toml")

    with pytest.raises(OptionError, match="has that name, and recipes/pocket-shape.toml too. Pass the path"):
        find_recipe("pocket-shape")
    assert find_recipe("recipes/pocket-shape.toml").title == "A test"
    (options,) = parse_options("", ["list"], RecipeOptions)
    run_recipe_command(options)
    said = " ".join(capsys.readouterr().out.split())
    assert "It has the name of a recipe of this program: pass its path, recipes/pocket-shape.toml" in said
    write_history(tmp_path, CHANGED)
    save("cat-history.jsonl", "--name", "pocket-shape", "--overwrite")
    assert "new FOLDER --recipe recipes/pocket-shape.toml" in capsys.readouterr().out


def test_numbers_that_an_option_lists_are_values_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for family, task in (("stable_diffusion", "xl"), ("stable_diffusion", "1.5")):
        text = RECIPE.replace('"wan"', f'"{family}"').replace('"t2v-1.3B"', f'"{task}"')
        path = write_recipe_file(tmp_path, "max_token_length = 150", text=text)
        assert read_recipe(path).training == {"max_token_length": 150}
        path.write_text(path.read_text(encoding="utf-8").replace("150", "151"), encoding="utf-8")
        with pytest.raises(OptionError, match="max_token_length = 151: choose from 75, 150, 225"):
            read_recipe(path)
    changed = [["network_module", "networks.lora"], ["max_token_length", "150"], ["clip_skip", "2"]]
    write_history(tmp_path / "clips" / "output", changed)
    commands = [["python", "tools/download.py", "--family", "stable_diffusion", "--task", "xl"]]
    commands += [["python", "sdxl_train_network.py"]]
    text = f"[reelsmith]\ncommands = {toml_value(commands)}\n"
    (tmp_path / "clips" / "run.toml").write_text(text, encoding="utf-8")
    save("clips")
    assert find_recipe("cat").training["max_token_length"] == 150


def test_values_that_no_recipe_may_have_are_named_when_it_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = [*CHANGED, ["optimizer_type", "mine.Optimizer"]]
    save(str(write_history(tmp_path, changed)))

    said = " ".join(capsys.readouterr().out.split())
    assert "left out: " in said
    assert "mine.Optimizer" in said
    assert "somebody" not in said


def test_a_run_that_ended_early_gives_its_recipe_the_steps_that_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    history = write_history(tmp_path, CHANGED)
    text = history.read_text(encoding="utf-8").replace('"total_steps": 2', '"total_steps": 500')
    history.write_text(text, encoding="utf-8")
    save(str(history))

    assert find_recipe("cat").training["max_train_steps"] == 2


@pytest.mark.parametrize(
    "text",
    [
        *(
            "reelsmith = 5",
            "reelsmith = [1]",
            "[reelsmith]\ncommands = 5",
            "[[reelsmith]]\na = 1",
            "[",
            "\x00",
        ),
        *("[reelsmith]\ncommands = [5]", "[reelsmith]\ncommands = [['--family', 'x', '--task', 'y']]"),
        *("a = " + "[" * 5000, "a." * 5000 + "a = 1", "[reelsmith]\ncommands = {}"),
    ],
)
def test_a_run_of_a_stranger_is_refused_in_a_sentence(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_history(tmp_path / "clips" / "output", CHANGED)
    (tmp_path / "clips" / "run.toml").write_text(text, encoding="utf-8")

    with pytest.raises(OptionError) as raised:
        save("clips")

    assert "\n" not in str(raised.value)
    assert not (tmp_path / "recipes").exists()
