"""Command lines that follow a training give the same options again, in any shell, and no secret."""

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataset.batches.example import ExampleItem
from encoders.inversion import Inversion, InvertedEncoder
from hunyuan_model.options import HunyuanTrainingOptions
from ltx_2.names import LTX_2
from modules.command import quote_for_powershell
from modules.options import read_options
from modules.parser import add_options
from protocols.families import FAMILIES, HIGH_NOISE, LOW_NOISE
from protocols.family import Abilities
from protocols.rules import ONE_EXPERT
from tests.training.toy import TWO_EXPERTS, Killed, killed_at, toy_options, write_caches
from training import next_commands as following
from training.learner import NetworkSpec, find_network_spec
from training.learning_options import FullDitOptions
from training.next_commands import NextSteps, TrainingCommand
from training.options import (
    ScriptOption,
    TrainingOptions,
    list_script_options,
    read_arguments,
    read_training,
    training_parser,
)
from training.reports.history import PageCommand, read_history, read_session
from training.run import train_network
from training.saving.files import Names
from wan.options import WanTrainingOptions

# of an entry whose family has scripts here
SCRIPTS = {"training_script": "wan_train_network", "generation_script": "wan_generate_video"}
NEEDED = ["--dataset_config", "my data.toml", "--output_dir", "out put", "--output_name", "it's \u00fc"]
EVERY_KIND = [
    *("--task", "i2v-14B", "--dit", "mo dels/dit.safetensors", "--vae", "v.pth", "--vae_tiling"),
    *("--network_args", "exclude_patterns=[r'.*ffn.*']", "rank_dropout=0.1", "--network_alpha", "16"),
    *("--optimizer_args", "betas=0.9,0.95", "--lr_warmup_steps", "5%", "--lr_scheduler", "cosine"),
    *("--training_comment=-begins with a dash", "--mixed_precision", "bf16", "--seed", "4"),
    *("--blocks_to_swap", "auto", "--gradient_checkpointing", "--compile_args", "inductor", "default"),
    *("auto", "False", "--max_train_steps", "40", "--save_every_n_minutes", "2.5"),
]


def read(words: list[str]) -> tuple[TrainingOptions, WanTrainingOptions, list[ScriptOption]]:
    return read_training(None, WanTrainingOptions, words)


def no_vectors(path: Path, option: str) -> None:
    """A LoRA without the word."""


def plan_of(options: TrainingOptions, folder: Path, family: str = "hunyuan_video", processes: int = 1) -> Any:
    """The facts of a plan that stand in commands."""
    model: Any = SimpleNamespace(
        name=family,
        experts=ONE_EXPERT,
        dit_files=(),
        abilities=Abilities(),
        lora_module="networks.lora",
        word_network=lambda word: Inversion(word, [InvertedEncoder("t5", "", list)], no_vectors).describe(),
    )
    return SimpleNamespace(
        options=options,
        features=options.features,
        network_spec=find_network_spec(model, options.network, options.features.lora_replacement),
        names=Names(folder, "x"),
        steps=SimpleNamespace(total_steps=40),
        accelerator=SimpleNamespace(num_processes=processes),
        family=model,
        lora_format=None,
    )


def next_steps(
    folder: Path, words: list[str], processes: int = 1, family: str = "hunyuan_video", **sample: Any
) -> NextSteps:
    """What follows a run of Wan. family: the name by which it is known which tool reads its LoRAs."""
    options, own, given = read([*NEEDED, "--output_dir", str(folder), "--output_name", "x", *words])
    plan = plan_of(options, folder, family, processes)
    command = TrainingCommand("wan_train_network.py", given, FAMILIES["wan"], own)
    return NextSteps(plan, command, sample)


def words_of(command: PageCommand) -> list[str]:
    return shlex.split(command.bash)


@pytest.mark.parametrize("more", [[], EVERY_KIND], ids=["few", "many"])
def test_the_words_of_a_run_give_its_options_again(more: list[str]) -> None:
    *options, given = read([*NEEDED, *more])

    assert read([word for option in given if option.is_changed for word in option.arguments]) == (
        *options,
        given,
    )


def test_options_that_differ_from_their_defaults_are_told_from_the_others() -> None:
    *_, given = read([*NEEDED, "--network_alpha", "1", "--learning_rate", "3e-5"])

    changed = {option.name: option.text for option in given if option.is_changed}
    unchanged = {option.name for option in given if not option.is_changed}
    assert (changed["learning_rate"], changed["output_name"]) == ("3e-05", "it's \u00fc")
    assert {"network_alpha", "task", "sdpa"} <= unchanged


def test_keys_and_tokens_are_never_told() -> None:
    secrets = ["--huggingface_token", "a_secret", "--wandb_api_key=a_secret"]
    assert "a_secret" not in str(read([*NEEDED, *secrets])[-1])


def test_a_finished_run_goes_on_from_its_state_if_there_is_one(tmp_path: Path) -> None:
    steps = next_steps(tmp_path, ["--max_train_epochs", "3", "--resume", "latest", "--resume_changed"])

    going = words_of(steps.commands(None, is_finished=False)[0])
    (tmp_path / "x-other-state").mkdir()  # of another run
    without = words_of(steps.commands(None, is_finished=True)[0])
    (tmp_path / "x-state").mkdir()
    longer = words_of(steps.commands(None, is_finished=True)[0])

    assert going[-4:] == ["--max_train_steps", "40", "--resume", "latest-or-fail"]
    begun = ["--network_weights", str(tmp_path / "x.safetensors"), "--save_state_on_train_end"]
    assert without[-5:] == ["--max_train_steps", "40", *begun]
    assert "--resume" not in without
    assert longer[-4:] == ["--max_train_steps", "80", "--resume", "latest-or-fail"]
    assert not {"--max_train_epochs", "--resume_changed"} & {*going, *without, *longer}


def test_two_files_saved_together_have_one_state(tmp_path: Path) -> None:
    steps = next_steps(tmp_path, [])
    steps.plan.names = Names(tmp_path, "x", (LOW_NOISE, HIGH_NOISE))
    (tmp_path / "x-step00000040-state").mkdir()

    longer, *_ = steps.commands(None, is_finished=True)

    assert "No state was saved" not in longer.note
    assert "--save_state" not in words_of(longer)


def test_what_begins_with_the_trained_files_names_one_for_each_network(tmp_path: Path) -> None:
    low, high = (str(tmp_path / f"x_{part}.safetensors") for part in (LOW_NOISE, HIGH_NOISE))
    steps = next_steps(tmp_path, ["--network_weights", __file__])
    steps.plan.names = Names(tmp_path, "x", (LOW_NOISE, HIGH_NOISE))
    steps.plan.family.experts = TWO_EXPERTS

    words = words_of(steps.commands(None, is_finished=True)[0])

    assert words.count("--network_weights") == 1
    assert words[words.index("--network_weights") + 1] == low
    assert words[words.index("--network_weights_high_noise") + 1] == high


def test_several_processes_are_launched_again(tmp_path: Path) -> None:
    first, *_ = next_steps(tmp_path, [], processes=2).commands(None, is_finished=False)

    launch = ["accelerate", "launch", "--quiet", "--num_processes", "2", "wan_train_network.py"]
    assert words_of(first)[:6] == launch


def test_the_best_file_is_generated_with_and_converted(tmp_path: Path) -> None:
    steps = next_steps(tmp_path, [], prompt="a cat's $HOME", negative_prompt="-", width=64, height=32)
    best = tmp_path / "x-step00000010.safetensors"

    _, generate, convert, _ = steps.commands(best, is_finished=True)

    words = words_of(generate)
    assert words[words.index("--lora_weight") + 1] == str(best)
    assert words[words.index("--prompt") + 1] == "a cat's $HOME"
    assert words[words.index("--video_size") + 1 :][:2] == ["32", "64"]
    assert "--negative_prompt=-" in words
    converted = str(tmp_path / "x-step00000010_comfyui.safetensors")
    assert words_of(convert)[-3:] == [converted, "--target", "other"]


@pytest.mark.parametrize("parts", [(), (LOW_NOISE, HIGH_NOISE)])
def test_two_transformers_are_generated_with_by_the_files_for_each(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    marks = [f"_{part}" for part in parts] or ["", ""]
    generation = ["wan_generate_video.py", "--dit", "low", "--dit_high_noise", "high"]
    steps = next_steps(tmp_path, ["--ema_decay", "0.9", "--sample_ema"], guidance_scale_high_noise=4.0)
    loras = [(Path("distilled.safetensors"), 0.8)]
    entry: Any = SimpleNamespace(generation_argv=lambda *_: generation, spellings={}, **SCRIPTS)
    steps = replace(steps, command=replace(steps.command, family_entry=entry), sample_loras=loras)
    steps.plan.family.experts = TWO_EXPERTS
    steps.plan.names = Names(tmp_path, "x", parts)
    best = tmp_path / f"x-step00000010{marks[1]}.safetensors"

    _, generate, *converting, _ = steps.commands(best, is_finished=True)

    words = words_of(generate)
    for end, mark in zip(("", "_high_noise"), marks, strict=True):
        trained = str(tmp_path / f"x-step00000010-ema{mark}.safetensors")
        assert words[words.index(f"--lora_weight{end}") + 1 :][:2] == [trained, "distilled.safetensors"]
        assert words[words.index(f"--lora_multiplier{end}") + 1 :][:2] == ["1", "0.8"]
    assert words[words.index("--guidance_scale_high_noise") + 1] == "4.0"
    converted = [words_of(each)[3] for each in converting]
    assert converted == [str(tmp_path / f"x-step00000010{mark}.safetensors") for mark in dict.fromkeys(marks)]


def test_a_network_with_its_own_command_is_generated_with_as_the_samples_show_it(tmp_path: Path) -> None:
    steps = next_steps(tmp_path, ["--ema_decay", "0.9", "--sample_ema"])
    entry: Any = SimpleNamespace(generation_argv=lambda *_: ["generate.py"], spellings={}, **SCRIPTS)
    steps = replace(steps, command=replace(steps.command, family_entry=entry))
    custom: Any = SimpleNamespace(
        generate=lambda file, _, base: [*base, "--own", str(file)], write_prompt=None, start_option="own"
    )
    steps.plan.network_spec = NetworkSpec(custom=custom)

    _, generate, *_ = steps.commands(tmp_path / "x-step00000010.safetensors", is_finished=True)

    assert words_of(generate)[-1] == str(tmp_path / "x-step00000010-ema.safetensors")


WORD_ALONE = ["--train_embedding", "zorb", "--embedding_vectors", "3", "--embedding_only"]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"prompt": "a zorb, red"}, "a STEM, red"),
        ({"prompt": "zorb2 and zorbs"}, "STEM2 and zorbs"),
        ({"prompt": "a user's"}, "a user's"),
        ({"prompt": "-zorb"}, "-STEM"),
        ({"prompt": "a caption without the word", "example": None}, "a photo of STEM"),
        ({}, "a photo of STEM"),
    ],
)
def test_a_word_alone_is_prompted_by_the_name_of_its_file(
    tmp_path: Path, sample: dict[str, Any], expected: str
) -> None:
    saved = tmp_path / "x-step00000010.safetensors"

    _, generate, *_ = next_steps(tmp_path, WORD_ALONE, **sample).commands(saved, is_finished=True)

    words = words_of(generate)
    prompt = expected.replace("STEM", saved.stem)
    assert f"--prompt={prompt}" in words or words[words.index("--prompt") + 1] == prompt
    assert words[words.index("--textual_inversion_embeddings") + 1] == str(saved)


@pytest.mark.parametrize("further", [[], ["--dit_high_noise", "high"]], ids=["one", "two transformers"])
def test_a_file_with_its_own_option_is_generated_with_next_to_the_loras_of_samples(
    tmp_path: Path, further: list[str]
) -> None:
    generation = ["wan_generate_video.py", "--dit", "low", *further]
    entry: Any = SimpleNamespace(generation_argv=lambda *_: generation, spellings={}, **SCRIPTS)
    steps = next_steps(tmp_path, WORD_ALONE)
    loras = [(Path("distilled.safetensors"), 0.8), (Path("style.safetensors"), 1.0)]
    steps = replace(steps, command=replace(steps.command, family_entry=entry), sample_loras=loras)
    saved = tmp_path / "x.safetensors"

    _, generate, *_ = steps.commands(saved, is_finished=True)

    words = words_of(generate)
    for end in ("", "_high_noise") if further else ("",):
        files = [str(path) for path, _ in loras]
        assert words[words.index(f"--lora_weight{end}") + 1 :][:3] == [*files, f"--lora_multiplier{end}"]
        assert words[words.index(f"--lora_multiplier{end}") + 1 :][:2] == ["0.8", "1"]
    assert ("--lora_weight_high_noise" in words) == bool(further)
    assert words[-2:] == ["--textual_inversion_embeddings", str(saved)]


def test_a_file_that_tools_read_as_it_is_saved_is_not_converted(tmp_path: Path) -> None:
    steps = next_steps(tmp_path, [], family="wan")

    *titles, _ = (each.title for each in steps.commands(None, is_finished=True))
    assert titles == ["Train longer, as a new run from the trained file", "Generate with it"]


@pytest.mark.parametrize(("family", "target"), [("hunyuan_video", "other"), ("wan", "default")])
@pytest.mark.parametrize("dit", ["--dit", "--dit_high_noise"])
def test_a_dora_becomes_a_plain_lora_for_tools_that_take_it_otherwise(
    tmp_path: Path, family: str, target: str, dit: str
) -> None:
    words = ["--network_args", "dora_wd=True", dit, "mo dels/dit.safetensors"]
    steps = next_steps(tmp_path, words, family=family)
    steps.plan.family.dit_files = [Path("mo dels/dit.safetensors")]

    *_, command, _ = steps.commands(None, is_finished=True)

    files = ["--input", str(tmp_path / "x.safetensors"), "--output", str(tmp_path / "x_plain.safetensors")]
    baked = ["--target", target, "--bake", "64", "--dit", "mo dels/dit.safetensors"]
    assert words_of(command)[2:] == [*files, *baked]
    assert "In ComfyUI, its effect differs by" in command.note


@pytest.mark.parametrize(("module", "more"), [("networks.lora_wan", []), ("networks.lokr", ["--bake", "64"])])
def test_tools_besides_comfyui_get_what_they_read(tmp_path: Path, module: str, more: list[str]) -> None:
    steps = next_steps(tmp_path, ["--network_module", module], family=LTX_2.name)

    *_, command, _ = steps.commands(None, is_finished=True)

    files = [str(tmp_path / f"x{end}.safetensors") for end in ("", "_converted")]
    assert words_of(command)[2:] == ["--input", files[0], "--output", files[1], "--target", "other", *more]
    assert command.title.startswith("Convert the LoRA for diffusers, LTX-2's own pipelines")


@pytest.mark.parametrize(
    ("family", "module", "converts"),
    [
        ("hunyuan_video", "networks.lora", False),
        ("hunyuan_video", "networks.lokr", False),
        (LTX_2.name, "networks.lora_ltx2", False),
        (LTX_2.name, "networks.loha", True),  # which ComfyUI alone reads
    ],
)
def test_a_file_in_the_format_of_the_tool_is_not_converted(
    tmp_path: Path, family: str, module: str, converts: bool
) -> None:
    steps = next_steps(tmp_path, ["--network_module", module], family=family)
    steps.plan.lora_format = SimpleNamespace(name="comfyui")

    commands = steps.commands(None, is_finished=True)

    assert any("convert_lora.py" in one.bash for one in commands) == converts


def test_a_whole_transformer_takes_the_place_of_the_released_one(tmp_path: Path) -> None:
    parser = training_parser("", FullDitOptions)
    add_options(parser, HunyuanTrainingOptions)
    args = read_arguments(parser, [*NEEDED, "--dit", "released.safetensors"], {})
    options, own = read_options(TrainingOptions, args), read_options(HunyuanTrainingOptions, args)
    given = list_script_options(parser, own, options)
    command = TrainingCommand("hv_train.py", given, FAMILIES["hunyuan_video"], own)

    steps = NextSteps(plan_of(options, tmp_path, "wan"), command, sample={})
    resume, generate, _ = steps.commands(None, is_finished=False)

    assert words_of(resume)[:2] == ["python", "hv_train.py"]
    words = words_of(generate)
    assert words[words.index("--dit") + 1] == str(tmp_path / "x.safetensors")
    assert "--lora_weight" not in words
    saved = tmp_path / "x-000002.safetensors"
    *_, extract, _ = steps.commands(saved, is_finished=False)
    words = words_of(extract)[1:]
    assert words[0] == "networks/extract_lora_from_models.py"
    assert words[words.index("--model_tuned") + 1] == str(saved)
    assert words[words.index("--save_to") + 1] == str(tmp_path / "x-000002_lora.safetensors")
    assert "DIT_FILE" in extract.note  # of a plan without files


def test_powershell_takes_words_literally_in_single_quotes() -> None:
    words = ["a\\b.mp4", "my file", "$HOME", "it's", "\u2019", "", "a;b"]
    quoted = "a\\b.mp4 'my file' '$HOME' 'it''s' '\u2019\u2019' '' 'a;b'"
    assert quote_for_powershell(words) == quoted


@pytest.mark.parametrize(("length", "is_told"), [(4000, True), (4001, False), (1 << 20, False)])
def test_a_caption_that_no_terminal_takes_is_left_out(
    monkeypatch: pytest.MonkeyPatch, length: int, is_told: bool
) -> None:
    caption = "x" * length
    item = SimpleNamespace(table=SimpleNamespace(references=SimpleNamespace(rules=None)))
    features = SimpleNamespace(mask_input_option="")
    plan: Any = SimpleNamespace(training=[item], sources=SimpleNamespace(stores=None), features=features)
    monkeypatch.setattr(following, "find_example", lambda *_: ExampleItem(caption))

    assert following.example_values(plan, {})["prompt"] == (caption if is_told else None)


@pytest.mark.parametrize("removed", [(), ("--save_last_n_steps", 2)], ids=["all kept", "old ones removed"])
def test_a_killed_run_names_the_file_that_was_saved_last(removed: tuple[object, ...], tmp_path: Path) -> None:
    """Its page is not written after each save, and its history is."""
    write_caches(tmp_path)
    saves = ["--max_train_steps", 20, "--save_every_n_steps", 2, *removed]
    options = toy_options(tmp_path, *saves, has_page=True)
    entry: Any = SimpleNamespace(
        caching_commands=lambda *_: ("cache", "cache"),
        generation_argv=lambda *_: ["toy_generate.py"],
        spellings={},
        **SCRIPTS,
    )

    with pytest.raises(Killed):
        train_network(killed_at(8), options, TrainingCommand(family_entry=entry, family_options=options))

    *_, newest = sorted((tmp_path / "output").glob("x-step*.safetensors"))
    path = tmp_path / "output" / "x-history.jsonl"
    run_history = read_history(path, read_session(path) or 0)
    (generate,) = [command for command in run_history.commands if command.title == "Generate with it"]
    words = words_of(generate)
    assert words[words.index("--lora_weight") + 1] == str(newest)


def test_before_the_first_save_the_command_says_that_its_file_is_not_there(tmp_path: Path) -> None:
    _, generate, *_ = next_steps(tmp_path, []).commands(None, is_finished=False)
    (tmp_path / "x.safetensors").touch()
    _, after, *_ = next_steps(tmp_path, []).commands(tmp_path / "x.safetensors", is_finished=True)

    assert "x.safetensors is not saved yet" in generate.note
    assert "not saved yet" not in after.note
