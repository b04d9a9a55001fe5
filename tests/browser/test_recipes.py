"""Forms of the page Generate become commands that the scripts read, and requests that say the same."""

import contextlib
import importlib
import re
import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser.runs.recipes import (
    LORA,
    ModelRecipe,
    RenderRequest,
    UsedLora,
    can_generate,
    find_model_set,
    make_model_recipe,
)
from downloads.catalogue import ModelSet, model_sets
from flux_3.options import DISTILLED_GUIDANCE, DISTILLED_STEPS
from generation.options import generation_parser
from generation.prompt_lines import find_option
from modules.errors import OptionError, UserError
from modules.option_values import parse_bounded_int
from modules.parser import add_options
from protocols.families import HIGH_NOISE, with_scripts

SETS = [model for model in model_sets() if can_generate(model)]
of_each_model = pytest.mark.parametrize("model", SETS, ids=lambda model: f"{model.family} {model.task}")
TEXTS = {
    "negative": "blurry\ntext",
    "width": "832",
    "height": "480",
    "frames": "9",
    "steps": "20",
    "guidance": "3.5",
    "cfg": "2",
    "high_cfg": "4",
    "start": "a b.png",
    "end": "b.png",
    "control": "c.mp4",
    "redraw": "",
}
# where the parsed options have what a field sets
NAMES = {
    "negative": "negative_prompt",
    "steps": "infer_steps",
    "start": "image_path",
    "end": "end_image_path",
    "control": "control_path",
    "cfg": "guidance_scale",
    "high_cfg": "guidance_scale_high_noise",
}


def recipe_of(model: ModelSet, folder: Path) -> ModelRecipe:
    return make_model_recipe(model, Path("models"), folder)


def parse(words: list[str], recipe: ModelRecipe) -> Namespace:
    """What the script reads of a command."""
    assert words[:2] == ["python", recipe.script]
    entry = with_scripts()[recipe.family]
    parser = generation_parser(None, recipe.defaults)
    add_options(parser, entry.options_record("Generation"))
    read, unknown = parser.parse_known_args(words[2:])
    # what scripts add themselves
    assert not {word for word in unknown if word.startswith("--")} - {"--f1", "--system_prompt"}
    return read


@of_each_model
def test_a_form_becomes_a_command_and_a_request_that_say_the_same(model: ModelSet, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path)
    texts = {name: text for name, text in TEXTS.items() if name in recipe.fields}
    request = RenderRequest(
        recipe=recipe,
        prompt="-a 'cat' --w 9",
        texts=texts,
        loras=[UsedLora("x.safetensors", "0.5"), UsedLora("y.safetensors", "1")],
        save_path="out/generated",
        references=["r 1.png", "r2.png"],
    )
    read = parse(request.command("7"), recipe)
    assert read.prompt == "-a 'cat' --w 9"
    assert read.seed == "7"
    assert [int(side) for side in read.video_size] == [480, 832]
    assert [str(path) for path in read.lora_weight] == ["x.safetensors", "y.safetensors"]
    assert list(read.lora_multiplier) == [0.5, 1]
    assert str(read.save_path) == "out/generated"
    assert read.num_videos == 1
    for name, option in NAMES.items():
        if name in texts:
            assert str(getattr(read, option)) in (texts[name], f"{texts[name]}.0")
    request = request.request("7")
    values = {}
    for key, text in request["options"].items():
        option = find_option(key, recipe.defaults.line_options)
        assert option is not None
        if not isinstance(text, list):
            values[option.key] = option.read(text)
    assert values["seed"] == 7
    assert (values["video_size_width"], values["video_size_height"]) == (832, 480)
    assert request["strengths"] == {"": ["0.5", "1"]}
    if "frames" in texts:
        key = "video_seconds" if recipe.counts_seconds else "video_length"
        assert values[key] == getattr(read, key) == 9
    if "references" in recipe.fields:
        assert [str(path) for path in read.control_image_path] == ["r 1.png", "r2.png"]
        assert request["options"]["control_image_path"] == ["r 1.png", "r2.png"]
    if "guidance" in texts:
        guidance = "embedded_cfg_scale" if recipe.embeds_guidance else "guidance_scale"
        assert values[guidance] == getattr(read, guidance) == 3.5


@of_each_model
def test_a_model_keeps_what_its_command_fixes(model: ModelSet, tmp_path: Path) -> None:
    """Switches among them; what a person has to name is needed, and no example is taken for a file."""
    recipe = recipe_of(model, tmp_path)
    request = RenderRequest(
        recipe=recipe, prompt="a cat", texts=recipe.initial_texts, loras=recipe.loras, save_path="generated"
    )
    typed = shlex.split(model.commands["generate"])
    words = request.command("1")
    for switch in ("--fp8_scaled", "--f1", "--split_uncond", "--sample_two_stage"):
        assert (switch in words) == (switch in typed)
        assert (switch in request.session_argv) == (switch in typed)
    assert not {"start.png", "end.png", "control.mp4"}.intersection(words)
    examples = {"--image_path": "start", "--end_image_path": "end", "--control_path": "control"}
    examples |= {"--first_frame": "start", "--last_frame": "end"}
    examples |= {"--src_video": "control", "--control_image_path": "references"}
    examples |= {"--first_frame": "start", "--last_frame": "end"}
    assert {*recipe.required_images} == {name for flag, name in examples.items() if flag in typed}
    assert recipe.missing_files  # no file is there
    assert "--interactive" in request.session_argv
    assert "--prompt" not in request.session_argv


def test_the_number_of_layers_is_a_field_of_releases_that_take_pictures_apart(tmp_path: Path) -> None:
    recipes = {f"{model.family} {model.task}": recipe_of(model, tmp_path) for model in SETS}
    with_layers = [name for name, recipe in recipes.items() if "layers" in recipe.fields]
    (name,) = with_layers
    recipe = recipes[name]
    assert (name, recipe.initial_texts["layers"]) == ("qwen_image layered", "4")

    request = RenderRequest(
        recipe=recipe,
        prompt="a cat",
        texts={"layers": "6"},
        loras=[],
        save_path="out",
        references=["a.png"],
    )

    assert parse(request.command("1"), recipe).output_layers == 6
    assert request.request("1")["options"]["output_layers"] == "6"
    unsaid = replace(request, texts={})
    assert "--output_layers" not in unsaid.command("1")


def test_fields_are_those_that_a_model_can_use(tmp_path: Path) -> None:
    fields = {
        f"{model.family} {model.task}": {*recipe_of(model, tmp_path).fields} & {"start", "end", "control"}
        for model in SETS
    }
    assert fields["wan t2v-1.3B"] == set()
    assert fields["wan i2v-14B-480p"] == {"start", "end"}
    assert fields["wan22 ti2v-5B"] == {"start"}
    assert fields["wan t2v-14B-FC"] == {"control"}
    assert fields["vace vace-1.3B"] == {"control"}
    assert fields["hunyuan_video t2v"] == set()
    assert fields["skyreels i2v"] == {"start"}
    assert fields["framepack i2v"] == {"start", "end"}
    assert fields["ltx_2 av"] == {"start"}
    assert fields["flux dev"] == set()


@pytest.mark.parametrize("family", ["hunyuan_video", "framepack"])
def test_a_picture_that_a_runs_command_names_has_its_field(family: str, tmp_path: Path) -> None:
    """Other models of these scripts need the picture or have none: the command says which one it is."""
    bare = ModelRecipe(title="x", family=family, fixed_options={}, initial_texts={}, folder=tmp_path)
    named = replace(bare, initial_texts={"start": "start.png"})

    assert "start" not in bare.fields
    assert "start" in named.fields
    request = RenderRequest(
        recipe=named, prompt="a cat", texts=named.initial_texts, loras=[], save_path="made"
    )
    words = request.command("1")
    assert words[words.index("--image_path") + 1].endswith("start.png")


def ready_recipe(folder: Path, family: str = "wan", task: str = "t2v-1.3B") -> ModelRecipe:
    model = find_model_set(family, task)
    assert model is not None
    return replace(recipe_of(model, folder), missing_files=(), unfilled_options=())


@pytest.mark.parametrize(
    ("prompt", "texts", "loras", "message"),
    [
        (" \n", {}, [], "Prompt: describe what to generate."),
        ("a", {"steps": "ten"}, [], "Steps: 'ten' is not a whole number"),
        ("a", {"steps": "0"}, [], "Steps 0: use a number from 1"),
        ("a", {"width": "64"}, [], "Width and Height: set both"),
        ("a", {"width": "1e3", "height": "64"}, [], "Width: '1e3' is not a whole number"),
        ("a", {"width": "832x480", "height": "64"}, [], "pass --w 832 --h 480"),
        ("a", {"frames": "-3"}, [], "Frames -3: use a number from 1"),
        ("a", {"guidance": "high"}, [], "Guidance: 'high' is not a number"),
        ("a", {"redraw": "gone.png"}, [], "Redraw gone.png: there is no such file."),
        ("a", {"share": "2"}, [], "Share 2: use a share from 0 to 1"),
        ("a", {}, [UsedLora("x.safetensors", "much")], "strength much of x.safetensors: use a number"),
        ("a", {}, [UsedLora("x.safetensors", "nan")], "strength nan of x.safetensors: use a number"),
        ("a", {}, [UsedLora("x.safetensors", "1")], "x.safetensors no longer exists"),
    ],
)
def test_wrong_render_jobs_say_which_field_is_wrong(
    tmp_path: Path, prompt: str, texts: dict[str, str], loras: list[UsedLora], message: str
) -> None:
    request = RenderRequest(
        ready_recipe(tmp_path), prompt=prompt, texts=texts, loras=loras, save_path="generated"
    )
    with pytest.raises(OptionError) as error:
        request.check()
    assert message in str(error.value)


def test_a_model_that_needs_a_picture_asks_for_it(tmp_path: Path) -> None:
    recipe = ready_recipe(tmp_path, task="i2v-14B-480p")
    with pytest.raises(OptionError, match="Start: this model needs one"):
        RenderRequest(recipe, prompt="a", texts={}, loras=[], save_path="generated").check()
    (tmp_path / "a.png").write_bytes(b"")
    RenderRequest(recipe, prompt="a", texts={"start": "a.png"}, loras=[], save_path="generated").check()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = find_model_set("flux", "dev")
    assert model is not None
    request = RenderRequest(recipe_of(model, tmp_path), prompt="a", texts={}, loras=[], save_path="generated")
    with pytest.raises(OptionError, match=r"is missing: download the model first \(Models\)"):
        request.check()


def test_loras_of_two_experts_have_options_of_their_own(tmp_path: Path) -> None:
    recipe = ready_recipe(tmp_path, "wan22", "t2v-A14B")
    request = RenderRequest(
        recipe=recipe,
        prompt="a",
        texts={},
        loras=[UsedLora("low.safetensors", "1"), UsedLora("high.safetensors", "0.5", HIGH_NOISE)],
        save_path="generated",
    )
    read = parse(request.command("1"), recipe)
    assert [str(path) for path in read.lora_weight] == ["low.safetensors"]
    assert [str(path) for path in read.lora_weight_high_noise] == ["high.safetensors"]
    assert list(read.lora_multiplier_high_noise) == [0.5]
    assert request.request("1")["strengths"] == {"": ["1"], HIGH_NOISE: ["0.5"]}
    words = request.session_argv
    assert words[words.index(LORA) + 1] == "low.safetensors"
    assert words[words.index(f"{LORA}_{HIGH_NOISE}") + 1] == "high.safetensors"


def test_loras_of_a_released_model_are_of_its_command(tmp_path: Path) -> None:
    recipe = ready_recipe(tmp_path, "wan22", "t2v-A14B-4steps")
    assert [(lora.strength, lora.expert) for lora in recipe.loras] == [("1", ""), ("1", HIGH_NOISE)]
    assert recipe.initial_texts["steps"] == "4"
    assert recipe.initial_texts["high_cfg"] == "1"


def test_a_picture_or_a_clip_is_changed_in_part(tmp_path: Path) -> None:
    recipe = ready_recipe(tmp_path)
    texts = {"redraw": "a.mp4", "share": "0.4"}
    request = RenderRequest(recipe, prompt="a", texts=texts, loras=[], save_path="generated")
    read = parse(request.command("1"), recipe)
    assert str(read.video_path) == "a.mp4"
    assert read.v2v_denoise == 0.4
    assert request.request("1")["options"] == {"video_path": "a.mp4", "denoise": "0.4", "seed": "1"}
    still = replace(request, texts={"redraw": "a.png"})
    assert str(parse(still.command("1"), recipe).i2i_path) == "a.png"


def test_shapes_have_about_as_many_pixels_as_the_usual_one(tmp_path: Path) -> None:
    shapes = ready_recipe(tmp_path).shapes
    assert shapes[:3] == [(832, 480), (480, 832), (640, 640)]
    for width, height in shapes:
        assert abs(width * height / (832 * 480) - 1) < 0.06
        assert parse_bounded_int(str(width)) % 16 == 0


@pytest.mark.parametrize(("family", "embeds"), [("flux", True), ("wan", False), ("hunyuan_video", True)])
def test_guidance_is_what_the_model_has(tmp_path: Path, family: str, embeds: bool) -> None:
    model = next(model for model in SETS if model.family == family)
    recipe = recipe_of(model, tmp_path)
    assert recipe.embeds_guidance == embeds
    assert ("cfg" in recipe.fields) == embeds
    assert {"negative", "guidance"} <= {*recipe.fields}


def test_a_model_with_guidance_built_in_has_no_field_for_it(tmp_path: Path) -> None:
    model = next(model for model in SETS if model.family == "minimax_h3")
    assert not {"negative", "guidance", "cfg"} & {*recipe_of(model, tmp_path).fields}


def settled(model: ModelSet) -> tuple[Any, Any] | None:
    """The family and the shared options of a model's command; None if its family has to read files."""
    words = shlex.split(with_paths(model))
    made: list[tuple[Any, Any]] = []
    with contextlib.suppress(UserError, SystemExit):
        script = importlib.import_module(words[1].removesuffix(".py"))
        script.main(words[2:], lambda family, options: made.append((family, options)))
        _ = made[0][0].defaults, made[0][0].latent
        return made[0]
    return None


def test_an_empty_field_shows_what_the_script_computes(tmp_path: Path) -> None:
    compared = 0
    for model in SETS:
        recipe = recipe_of(model, tmp_path)
        found = settled(model)
        if found is None:
            continue
        family, options = found
        default, request = family.defaults, options.request
        compared += 1
        expected = {
            "steps": request.infer_steps or default.steps,
            "guidance": default.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            "cfg": default.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            "frames": request.video_length or default.frames,
            "high_cfg": default.expert_guidance.get(HIGH_NOISE),
            "width": (request.video_size or (default.height, default.width))[1],
        }
        if recipe.embeds_guidance:
            expected["guidance"] = request.embedded_guidance or default.embedded_guidance
        for name, value in expected.items():
            shown = recipe.initial_texts.get(name) or recipe.find_default(name)
            if name in recipe.fields and shown and not recipe.counts_seconds:
                assert float(shown) == value, (model.family, model.task, name)
        if "steps" in recipe.fields:
            assert recipe.initial_texts.get("steps") or recipe.find_default("steps"), (
                model.family,
                model.task,
            )
        assert recipe.side_step == family.latent.pixel_step, (model.family, model.task)
        if "frames" in recipe.fields and not recipe.counts_seconds:
            assert recipe.defaults.lengths == family.latent.lengths
    assert compared > 35


def with_paths(model: ModelSet) -> str:
    """The command of a model with the names of its files, which say what it is."""
    command = model.commands["generate"]
    for part in model.components:
        if part.option:
            command = command.replace(f"{{{part.option.lstrip('-')}}}", f"models/{part.path}")
    return command


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    [
        ("flux_3", "klein", {"steps": DISTILLED_STEPS, "guidance": DISTILLED_GUIDANCE}),
        ("flux_3", "klein-base", {"steps": 50, "guidance": 3.5}),
        ("qwen_image_21", "turbo", {"steps": 8, "guidance": 1}),
        ("flux", "schnell", {"steps": 4, "guidance": ""}),
        ("flux_2", "klein-4b", {"steps": 4, "cfg": 1}),
        ("stable_diffusion", "1.5", {"share": 0.8}),
    ],
)
def test_a_distilled_model_shows_its_own_steps_and_guidance(
    family: str, task: str, expected: dict[str, float], tmp_path: Path
) -> None:
    model = find_model_set(family, task)
    assert model is not None
    recipe = recipe_of(model, tmp_path)
    for name, value in expected.items():
        assert recipe.find_default(name) == f"{value}".removesuffix(".0")


@pytest.mark.parametrize(
    ("model", "texts", "message"),
    [
        ("wan t2v-1.3B", {"width": "65", "height": "64"}, "Width 65: use a multiple of 16. Nearest: 64"),
        ("wan22 ti2v-5B", {"width": "64", "height": "7"}, "Height 7: use a multiple of 32. Nearest: 32"),
        ("wan t2v-1.3B", {"frames": "6"}, "Frames 6: use a length of 4n + 1. Nearest: 5"),
        ("ltx_2 av", {"frames": "14"}, "Frames 14: use a length of 8n + 1. Nearest: 17"),
        ("stable_diffusion xl", {"guidance": "1e9"}, "Guidance 1e9: use a number from -1,000 to 1,000"),
        ("stable_diffusion xl", {"steps": "0"}, "Steps 0: use a number from 1 to 10,000"),
    ],
)
def test_what_a_script_refuses_or_changes_is_refused_with_the_nearest_value(
    model: str, texts: dict[str, str], message: str, tmp_path: Path
) -> None:
    found = find_model_set(*model.split())
    assert found is not None
    recipe = replace(recipe_of(found, tmp_path), missing_files=[], unfilled_options=[])
    with pytest.raises(OptionError, match=re.escape(message)):
        RenderRequest(recipe, prompt="a", texts=texts, loras=[], save_path="generated").check()
