"""Mistakes of newcomers with targets and kinds of networks: one short message before any model is loaded."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.faults.messages import assert_one_message, succeed_here
from tests.faults.mistakes import COMMANDS, try_mistake

TRAIN, FULL, MAKE = "wan_train_network.py", "wan_train.py", "wan_generate_video.py"
MERGE, CONVERT = "merge_lora.py", "convert_lora.py"
OFT = "--network_module networks.oft"
FUSED = "--fused_backward_pass --optimizer_type adafactor"
CHARACTERS: Mapping[str, tuple[tuple[str, str, str], ...]] = {  # script, words, what the message has
    "guided target": (
        (TRAIN, "--guided_target 1", "above 1 and of at most 20"),
        (TRAIN, "--guided_target 21", "above 1 and of at most 20"),
        (TRAIN, "--guided_target 3,5", "write a decimal point"),
        (TRAIN, "--guided_target 3 --teacher base", "Omit one of the two"),
        (TRAIN, "--guided_target 3 --guided_target_min_timestep 0.15", "not a whole number"),
        (TRAIN, "--guided_target_min_timestep 150", "needs --guided_target"),
        (TRAIN, "--guided_target 3 --guided_target_sound 3", "has no sound"),
        (TRAIN, "--guided_target 3", "--empty_prompt"),
        (FULL, "--guided_target 3", "--empty_prompt"),
        (TRAIN, "--h3_guidance_loss_scale 3", "Did you mean --guided_target?"),
        (TRAIN, "--do_guidance_loss", "Did you mean --guided_target?"),
        (TRAIN, "--empty_prompt", "the script that caches texts"),
        (MAKE, "--guided_target 3", "Unknown option --guided_target"),
    ),
    "teacher": (
        (TRAIN, "--teacher bas", "Did you mean base?"),
        (TRAIN, "--teacher base --teacher_weight 1.5", "at most 1"),
        (TRAIN, "--teacher base --teacher_max_timestep 0.75", "not a whole number"),
        (TRAIN, "--teacher base --teacher_min_timestep 800 --teacher_max_timestep 200", "the lower one"),
        (TRAIN, "--teacher base --teacher_size_weight 0.5", "needs --teacher_split"),
        (TRAIN, "--teacher base --teacher_split --loss_type l1", "Use --loss_type l2"),
        (TRAIN, "--teacher base --teacher_color_weight 1", "Did you mean --teacher_colour_weight?"),
        (TRAIN, "--teacher base --teacher_sees clip", "takes no such condition"),
        (TRAIN, "--h3_teacher_matching", "Did you mean --teacher?"),
        (TRAIN, "--timestep_focus 0.5 --min_timestep 100", "Pass one of the two"),
        (TRAIN, "--timestep_focus 0.5 --timestep_focus_range 800 400", "LOW < HIGH"),
        (FULL, "--teacher base", "Train a LoRA instead"),
    ),
    "another teacher": (
        (TRAIN, "--teacher dit", "--teacher_dit FILE"),
        (TRAIN, "--teacher dit --teacher_dit none.safetensors", "no such file"),
        (
            TRAIN,
            "--teacher dit --teacher_dit model/dit.safetensors",
            "this is the transformer that is trained",
        ),
        (TRAIN, "--teacher dit --teacher_dit model/vae.safetensors", "a transformer to --teacher_dit"),
        (TRAIN, "--teacher dit --teacher_dit lora.safetensors", "a transformer to --teacher_dit"),
        (TRAIN, "--teacher base --teacher_lora lora.safetensors", "is for --teacher dit"),
        (TRAIN, "--teacher dit --teacher_lora model/vae.safetensors", "is not a LoRA"),
        (TRAIN, "--teacher dit --teacher_lora dataset.toml", "neither a safetensors nor a PyTorch file"),
        (TRAIN, "--teacher dit --teacher_lora boft.safetensors", "of the kind BOFT"),
        (TRAIN, "--teacher dit --teacher_lora narrow.safetensors", "does not fit"),
        (TRAIN, "--teacher dit --teacher_delta", "needs --teacher_lora"),
        (FULL, "--teacher dit", "Train a LoRA instead"),
    ),
    "rounding": (
        (MAKE, "--lora_rounding", "expected one argument"),
        (MAKE, "--lora_rounding random", "Use auto, nearest, stochastic"),
        (TRAIN, "--lora_rounding random", "Use auto, nearest, stochastic"),
        (MERGE, "--lora_rounding random", "Use auto, nearest, stochastic"),
        (MAKE, "--lora_rounding nearest", "needs --lora_weight"),
        (TRAIN, "--lora_rounding stochastic", "needs --base_weights"),
        (MAKE, "--lora_roundings nearest", "Did you mean --lora_rounding?"),
        (CONVERT, "--lora_rounding nearest", "Omit it"),
        (MERGE, "--lora_rounding auto nearest", "belongs to no option"),
        (MERGE, "--save_precision float", "the dtypes of the model's file"),
        (TRAIN, "--base_weights none.safetensors --lora_rounding nearest", "no such file"),
    ),
    "priors": (
        (TRAIN, "--mask_prior_weight 0", "above 0"),
        (TRAIN, "--mask_prior_weight 101", "at most 100"),
        (TRAIN, "--mask_prior_weight 0,5", "write a decimal point"),
        (TRAIN, "--mask_prior_weight 0.5", "no item has a mask"),
        (TRAIN, "--blank_prior_weight nan", "above 0"),
        (TRAIN, "--blank_prior_weight 0.5", "--empty_prompt"),
        (TRAIN, "--masked_prior_preservation_weight 1", "Did you mean --mask_prior_weight?"),
        (TRAIN, "--blank_prompt_preservation", "Did you mean --blank_prior_weight?"),
        (TRAIN, "--prior_loss_weight 0.5", "key of the dataset file"),
        (FULL, "--mask_prior_weight 0.5", "Train a LoRA instead"),
        (FULL, "--blank_prior_weight 0.5", "Train a LoRA instead"),
    ),
    "tread": (
        (TRAIN, "--tread 0", "above 0 and below 1"),
        (TRAIN, "--tread 50", "above 0 and below 1"),
        (TRAIN, "--tread 50%", "not a number"),
        (TRAIN, "--tread 0.5", "the model wan has 2 blocks"),
        (TRAIN, "--tread 0.5 --tread_blocks 1", "needs two numbers and has 1"),
        (TRAIN, "--tread 0.5 --tread_blocks 1 0", "the first not after the last"),
        (TRAIN, "--tread 0.5 --tread_blocks 2,-2", "write several numbers apart"),
        (TRAIN, "--tread selection_ratio=0.5", "write the number alone, 0.5"),
        (TRAIN, "--tread_blocks 1 -1", "needs --tread"),
        (TRAIN, "--tread 0.5 --context_parallel 2", "Omit one of the two"),
        (TRAIN, "--tread_config x", "Did you mean --tread?"),
        (TRAIN, "--tread 0.5 --check", "the model wan has 2 blocks"),
        (TRAIN, "--tread 0.5 --plan 24", "the model wan has 2 blocks"),
        (FULL, "--tread 0.5", "the model wan has 2 blocks"),
    ),
    "sliders": (
        (TRAIN, "--slider none.toml", "no such file"),
        (TRAIN, "--slider dataset.toml", "unknown key general. Use guidance, sliders"),
        (TRAIN, "--slider model/dit.safetensors", "it is not a TOML file"),
        (TRAIN, "--slider model", "it is not a TOML file"),
        (TRAIN, "--slider empty.toml", "it has no [[sliders]]"),
        (TRAIN, "--slider equal.toml", "Write two different captions"),
        (TRAIN, "--slider number.toml", 'Write neutral = "a caption"'),
        (TRAIN, "--slider weight.toml", "above 0"),
        (TRAIN, "--slider anchor.toml", "needs an anchor"),
        (TRAIN, "--slider good.toml --guided_target 3", "Omit one of the two"),
        (TRAIN, "--slider_config x", "Did you mean --slider?"),
        (FULL, "--slider good.toml", "Train a LoRA instead"),
    ),
    "preferences": (
        (TRAIN, "--preference 0", "above 0"),
        (TRAIN, "--preference 2e9", "at most 1,000,000"),
        (TRAIN, "--preference 2000", "this table has no worse_directory"),
        (TRAIN, "--preference_data_weight 1", "needs --preference"),
        (TRAIN, "--preference 2000 --preference_data_weight -1", "from 0"),
        (TRAIN, "--preference 2000 --guided_target 3", "Omit one of the two"),
        (TRAIN, "--preference 2000 --teacher base", "Omit one of the two"),
        (TRAIN, "--dpo_beta 2000", "Did you mean --preference?"),
        (TRAIN, "--worse_directory worse", "key of the dataset file"),
        (FULL, "--preference 2000", "Train a LoRA instead"),
    ),
    "T-LoRA and OFT": (
        (TRAIN, "--network_args tlora=yes", "pass True or False"),
        (TRAIN, "--network_args tlora=True tlora_min_rank=0", "at least 1"),
        (TRAIN, "--network_args tlora=True tlora_min_rank=99", "Use less than --network_dim"),
        (TRAIN, "--network_args tlora=True tlora_alpha=0", "Use more than 0"),
        (TRAIN, "--network_args tlora_min_rank=1", "add tlora=True"),
        (TRAIN, "--network_args tlora=True dora_wd=True", "omit one"),
        (TRAIN, "--network_args Tlora=True", "Did you mean tlora?"),
        (TRAIN, "--tlora True", "--network_args tlora=True"),
        (TRAIN, f"{OFT} --network_args tlora=True", "omit them"),
        (TRAIN, f"{OFT} --network_dim 1", "Pass 2 or more"),
        (TRAIN, f"{OFT} --network_dim 100000", "1024 is the most values in a block"),
        (TRAIN, f"{OFT} --scale_weight_norms 1", "Omit it"),
        (TRAIN, f"{OFT} --network_weights lora.safetensors", "is no OFT"),
        (TRAIN, "--network_weights oft.safetensors", "Pass that"),
        (TRAIN, "--network_module networks.boft", "BOFT is not supported"),
        (TRAIN, "--do_differential_guidance", "a higher --learning_rate"),
        (MAKE, "--lora_weight boft.safetensors", "of the kind BOFT"),
        (MAKE, "--lora_weight old_oft.safetensors", "OFT in an older form"),
        (MAKE, "--lora_weight oft_of_three.safetensors", "Pass an OFT that was trained for this model"),
        (MAKE, "--lora_weight rule.safetensors", "rule.safetensors: its metadata says tlora=True"),
        (MERGE, "--lora_weight rule.safetensors", "rule.safetensors: its metadata says tlora=True"),
        (TRAIN, "--base_weights rule.safetensors", "rule.safetensors: its metadata says tlora=True"),
        (CONVERT, "--input oft.safetensors --target comfyui", "--bake RANK --dit MODEL"),
        (CONVERT, "--input boft.safetensors", "of the kind BOFT"),
    ),
    "a command at the end": (
        (TRAIN, "--on_end", "expected one argument"),
        (TRAIN, "--on_end nosuchprogram", "is not a program"),
        (TRAIN, "--on_end notify.py", "Start it with Python"),
        (TRAIN, "--on_end model", "is a folder"),
        (TRAIN, "--on_end dataset.toml", "may not be executed"),
        (TRAIN, "--on_end python none.py", "Put a text with spaces in quotes"),
        (TRAIN, "--on_end >", "is for a shell"),
        (TRAIN, "--config_file end.toml", "no file may do that"),
        (MAKE, "--on_end ls", "Unknown option --on_end"),
        ("wan_cache_latents.py", "--on_end ls", "Omit it"),
    ),
    "steps that go wrong": (
        (TRAIN, "--skip_bad_steps", "expected one argument"),
        (TRAIN, "--skip_bad_steps 0", "from 1"),
        (TRAIN, "--skip_bad_steps 1.5", "not a whole number"),
        (TRAIN, "--skip_bad_steps all", "not a whole number"),
        (TRAIN, "--skip_spikes 1", "above 1"),
        (TRAIN, "--skip_spikes nan", "above 1"),
        (TRAIN, "--skip_spikes inf", "above 1"),
        (TRAIN, "--skip_grad_norm 5", "Did you mean --skip_spikes?"),
        (FULL, f"--skip_bad_steps 3 {FUSED}", "Omit one of the two"),
        (FULL, f"--skip_spikes 5 {FUSED}", "Omit one of the two"),
        (MAKE, "--skip_bad_steps 3", "Omit it"),
    ),
}
KEYS = (  # of a table, and what the message has
    ("min_timestep = 0.6", "a whole number from 0 to 999"),
    ("min_timestep = true", "a whole number from 0 to 999"),
    ("max_timestep = 1001", "a whole number from 1 to 1000"),
    ("min_timestep = 800\nmax_timestep = 200", "is not below max_timestep"),
    ("min_timestep = 500\nmax_timestep = 500", "is not below max_timestep"),
    ("min_timesteps = 3", "min_timestep"),
    ("discrete_flow_shift = 0", "above 0"),
    ('discrete_flow_shift = "3"', "above 0"),
    ("discrete_flow_shift = 3", "use --timestep_sampling shift"),
    ("validation = true\nmin_timestep = 200", "Omit one or the other"),
    ("network_multiplier = 0", "other than 0"),
    ("network_multiplier = 11", "from -10 to 10"),
    ("slider_strength = 1", "network_multiplier"),
    ("worse_directory = 3", "a path in quotes"),
    ('worse_dir = "worse"', "worse_directory"),
)
SLIDER = '[[sliders]]\npositive = "a"\nnegative = "b"\nneutral = "c"\n'
FILES = {
    "good.toml": SLIDER,
    "empty.toml": "guidance = 3\n",
    "equal.toml": SLIDER.replace('"b"', '"a"'),
    "number.toml": SLIDER.replace('"c"', "3"),
    "weight.toml": f"{SLIDER}weight = -1\n",
    "anchor.toml": f"{SLIDER}anchor_weight = 1\n",
    "notify.py": "print(1)\n",
    "end.toml": 'on_end = "python notify.py"\n',
}


@pytest.fixture(scope="module")
def project(made_projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan's project, with files of networks that are none for it."""
    folder = tmp_path_factory.mktemp("targets") / "project"
    shutil.copytree(made_projects[COMMANDS[TRAIN].family], folder)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    oft = ("--network_dim", "8", "--output_name", "oft", "--output_dir", ".", "--max_train_steps", "1")
    succeed_here(*COMMANDS[TRAIN].words, *oft, "--network_module", "networks.oft", folder=folder)
    rotations = load_file(folder / "oft.safetensors")
    layer = next(iter(rotations)).removesuffix(".oft_R.weight")
    ones = torch.ones(64, 1)
    blocks = torch.zeros(4, 16, 16)

    def write(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        save_file(tensors, folder / f"{name}.safetensors", metadata)

    write("boft", {f"{layer}.boft_R": torch.zeros(2, 4, 16, 16), f"{layer}.boft_s": ones})
    write("old_oft", {f"{layer}.oft_blocks": blocks, f"{layer}.alpha": torch.tensor(1.0)})
    write("oft_of_three", {name: torch.zeros(3, 28) for name in rotations})
    down, up = torch.ones(2, 3), torch.ones(5, 2)
    write("narrow", {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up})
    path = folder / "lora.safetensors"
    with safe_open(path, "pt") as file:
        stored = dict(file.metadata())
    arguments = json.dumps({"tlora": "True", "tlora_min_rank": "-3"})
    write("rule", load_file(path), {**stored, "ss_network_args": arguments})
    return folder


CASES = [
    pytest.param(letter, *case, id=f"{letter}: {case[0]} {case[1]}")
    for letter, cases in CHARACTERS.items()
    for case in cases
]


@pytest.mark.slow
@pytest.mark.parametrize(("letter", "script", "words", "message"), CASES)
def test_a_mistake_is_told_before_anything_is_loaded(
    project: Path, letter: str, script: str, words: str, message: str
) -> None:
    assert len(CHARACTERS[letter]) >= 10
    without = [word for word in words.split() if word in {"--network_module", "--input", "--lora_weight"}]
    if "--target" in words:
        without.append("--target")

    code, said = try_mistake(script, *words.split(), folder=project, without=without)

    assert isinstance(code, int), code
    is_clear = any(part in message for part in ("expected one argument", "LOW < HIGH", "--bake RANK"))
    assert_one_message(code, said, message, remedy=not is_clear)


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "message"), KEYS)
def test_a_mistake_in_a_table_is_told_before_anything_is_loaded(
    project: Path, keys: str, message: str
) -> None:
    text = (project / "dataset.toml").read_text(encoding="utf-8").rstrip()
    (project / "bad.toml").write_text(f"{text}\n{keys}\n", encoding="utf-8")
    words = ("--dataset_config", "bad.toml")

    code, said = try_mistake(TRAIN, *words, folder=project, without=("--dataset_config",))

    assert isinstance(code, int), code
    assert_one_message(code, said, message, remedy=False)
