"""LECO: LoRAs that learn from prompts alone (--prompts_file, train_leco.py, sdxl_train_leco.py)."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.errors import OptionError
from networks.builtin_networks import build_network
from protocols.data import SIZES, Batch
from protocols.loading import Placement
from stable_diffusion.noise import make_noise_spec
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.stable_diffusion.test_training_step import CPU, make_family
from tests.tiny.loras import network_options
from tests.tiny.stable_diffusion import WRITERS, tokenizer_folder
from tests.training.toy import same
from training.features.leco_file import LecoPair, read_pairs
from training.features.leco_options import LecoOptions
from training.features.leco_passes import DdpmSchedule, encode_pairs, leco_passes
from training.loss import LossRule, NoisyBatch
from training.targets.passes import TrainingPasses, run_usual_pass

PAIRS = """resolution = 64
weight = 2.0

[[prompts]]
target = "a cat"
action = "erase"

[[prompts]]
target = "a dog"
positive = "a red dog"
neutral = "dog"
action = "enhance"
guidance_scale = 3.0
resolution = [64, 96]
"""
SLIDER = """[slider]
target_class = "person"
multiplier = 2.0
neutrals = ["a", "b"]
resolutions = [64, 128]
{ends}
"""
YAML = """resolution: 64
weight: 2.0
prompts:
- target: a cat
  action: erase
- target: a dog
  positive: a red dog
  neutral: dog
  action: enhance
  guidance_scale: 3.0
  resolution: [64, 96]
"""


def read(folder: Path, text: str, name: str = "prompts.toml") -> tuple[LecoPair, ...]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_pairs(path)


def test_pairs_have_the_defaults_of_the_file_and_of_each_other(tmp_path: Path) -> None:
    first, second = read(tmp_path, PAIRS)

    assert first == LecoPair("a cat", "a cat", "", "", "erase", 1.0, 64, 64, weight=2.0)
    assert second == LecoPair("a dog", "a red dog", "", "dog", "enhance", 3.0, 64, 96, weight=2.0)
    assert (first.sign, second.sign) == (-1, 1)


def test_yaml_gives_the_same_entries(tmp_path: Path) -> None:
    pairs = read(tmp_path, PAIRS)
    assert read(tmp_path, YAML, "prompts.yaml") == pairs
    entries = YAML.partition("prompts:\n")[2]
    alone = read(tmp_path, entries.replace("erase", "erase\n  resolution: 64"), "prompts.yml")
    assert [pair.target for pair in alone] == ["a cat", "a dog"]


ENDS: dict[str, list[tuple[str, str, str, float]]] = {
    'positive = "old"\nnegative = "young"': [
        ("young", "old", "erase", 2.0),
        ("old", "young", "enhance", 2.0),
        ("old", "young", "erase", -2.0),
        ("young", "old", "enhance", -2.0),
    ],
    'negative = "young"': [("young", "", "erase", 2.0), ("young", "", "enhance", -2.0)],
    'positive = "old"': [("old", "", "enhance", 2.0), ("old", "", "erase", -2.0)],
}


@pytest.mark.parametrize("ends", ENDS)
def test_a_slider_becomes_pairs_for_each_neutral_prompt_then_each_size(ends: str, tmp_path: Path) -> None:
    pairs = read(tmp_path, SLIDER.format(ends=ends))

    rows = [(pair.positive, pair.unconditional, pair.action, pair.multiplier) for pair in pairs]
    assert rows == ENDS[ends] * 4
    count = len(ENDS[ends])
    places = [(pair.neutral, pair.height) for pair in pairs[::count]]
    assert places == [("a", 64), ("a", 128), ("b", 64), ("b", 128)]
    assert {pair.target for pair in pairs} == {"person"}


def test_neutral_prompts_of_an_entry_win_and_files_lie_next_to_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "neutral.txt").write_text("c\u2028c\n\nd\n", encoding="utf-8")
    text = 'target_class = ""\npositive = "old"\nneutrals = ["a"]\n\n[[targets]]\nneutral = "b"\n'
    text += 'neutral_prompt_file = "neutral.txt"\n\n[[targets]]\npositive = "red"\n'
    pairs = read(tmp_path, text)

    assert Counter(pair.neutral for pair in pairs) == {"b": 2, "c\u2028c": 2, "d": 2, "a": 2}
    alone = read(tmp_path, 'target_class = "cat"\npositive = "old"\n')
    assert [(pair.neutral, pair.height) for pair in alone] == [("", 512)] * 2


WRONG: dict[str, tuple[str, str]] = {
    "empty": ("", "has no targets"),
    "no TOML": ("prompts = [", "is not a TOML file"),
    "unknown key": (PAIRS.replace("action", "aktion"), r"\[\[prompts\]\] 1: unknown key aktion"),
    "unknown key at the top": (f"sides = 3\n{PAIRS}", "unknown key sides"),
    "no target": (PAIRS.replace('target = "a dog"', ""), r"\[\[prompts\]\] 2: it has no target"),
    "another action": (PAIRS.replace('"erase"', '"remove"'), "write erase or enhance"),
    "an odd side": (PAIRS.replace("resolution = 64", "resolution = 66"), "multiples of 8"),
    "no square": (f"dynamic_resolution = true\n{PAIRS}", "dynamic_resolution is for a square"),
    "no end": (SLIDER.format(ends=""), "write positive, negative or both"),
    "a number": (PAIRS.replace("2.0", "-1"), "use a number above 0"),
    "a lost file": (SLIDER.format(ends='positive = "a"\nneutral_prompt_file = "no.txt"'), "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named_with_their_place(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    with pytest.raises(OptionError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize("predicts_v", [False, True])
def test_a_step_of_the_walk_is_that_of_diffusers(predicts_v: bool) -> None:
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if predicts_v else "epsilon",
        clip_sample=False,
    )
    scheduler.set_timesteps(40)
    walk = DdpmSchedule(make_noise_spec(predicts_v), 40)
    x = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for index in (0, 20, 39):
        time = int(scheduler.timesteps[index])
        ours = walk.step(index, output, x, torch.Generator().manual_seed(2))
        theirs = scheduler.step(output, time, x, generator=torch.Generator().manual_seed(2)).prev_sample
        assert walk.timestep(index) == time
        # the table has sigma in float32, of which the fraction of data is 1 - sigma^2
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("action", ["erase", "enhance"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_error_is_that_of_a_plain_loop(kind: str, action: str, tmp_path: Path) -> None:
    """The walk and the prediction have the LoRA at the strength of the pair, the three targets do not."""
    family = make_family(kind, tmp_path)
    pair = LecoPair("a cat", "red", "old", "dog", action, 2.0, 64, 96, batch_size=2, multiplier=-1.5)
    options = LecoOptions.from_defaults(
        prompts_file=tmp_path, max_denoising_steps=4, leco_denoise_guidance_scale=3.0
    )
    target = encode_pairs(family, options, [pair], CPU)
    unet = family.load_dit(Placement(CPU))
    network = build_network("networks.lora", network_options("lora", 2), unet, {})
    generator = torch.Generator().manual_seed(5)
    changes: dict[str, Tensor] = {}
    for name, layer in zip(network.names, network.layers, strict=True):
        nn.init.normal_(layer.lora_down.weight, std=0.2, generator=generator)
        nn.init.normal_(layer.lora_up.weight, std=0.2, generator=generator)
        change = layer.scale * (layer.lora_up.weight.flatten(1) @ layer.lora_down.weight.flatten(1))
        changes[name.removeprefix("lora_unet_")] = change.detach()
    network.attach()

    @contextlib.contextmanager
    def at_strength(strength: float) -> Iterator[None]:
        network.set_multiplier(strength)
        yield
        network.set_multiplier(1.0)

    rule = LossRule(as_base=lambda: at_strength(0.0), seed=7)
    batch = NoisyBatch(
        batch=Batch({}, ("",), ("0",)),
        noise=torch.zeros(1, 4, 1, 8, 8),
        sigmas=torch.zeros(1),
        timesteps=torch.zeros(1),
        weights=torch.ones(1),
    )
    seen: list[tuple[Tensor, int]] = []
    noted = replace(family)
    passes = TrainingPasses(noted, unet, batch.noise, contextlib.nullcontext, rule)
    handle = unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["sample"], int(kwargs["timestep"][0]))), with_kwargs=True
    )
    ((errors,),) = leco_passes(target, at_strength, run_usual_pass, passes, batch)
    handle.remove()

    plain = UNet2DConditionModel.from_pretrained(tmp_path / kind / "unet")
    changed = UNet2DConditionModel.from_pretrained(tmp_path / kind / "unet")
    for name, weight in changed.named_parameters():
        delta = changes.get(name.removesuffix(".weight").replace(".", "_"))
        if delta is not None and name.endswith(".weight"):
            weight.data += pair.multiplier * delta.view_as(weight)

    def predict(network: Any, prompt: str, x: Tensor, time: int) -> Tensor:
        encoded = target.captions.encoded[prompt]
        rows = {name: torch.stack([value] * 2) for name, value in encoded.items()}  # type: ignore[list-item]
        context = torch.cat([rows[name] for name in sorted(rows) if name != "pool2"], dim=-1)
        added = None
        if kind == "sdxl":
            sizes = torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
            added = {"text_embeds": rows["pool2"], "time_ids": sizes}
        with torch.no_grad():
            return network(x, time, encoder_hidden_states=context, added_cond_kwargs=added).sample

    # the walk: two calls a step, then three targets and the prediction
    walked = (len(seen) - 4) // 2
    assert 1 <= walked < 4
    assert [time for _, time in seen] == [
        *(time for index in range(walked) for time in [750 - 250 * index] * 2),
        *[999 - 250 * walked] * 4,
    ]
    last = seen[-1][0]
    assert all(torch.equal(x, last) for x, _ in seen[-4:])
    if walked > 1:
        assert not torch.equal(seen[0][0], last)
    time = 999 - 250 * walked
    direction = predict(plain, "red", last, time) - predict(plain, "old", last, time)
    sign = 1 if action == "enhance" else -1
    goal = predict(plain, "dog", last, time) + sign * 2.0 * direction
    expected = (predict(changed, "a cat", last, time) - goal).square().flatten(1).mean(1)
    # sums in another order, in float32
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-5)
    with_lora = predict(changed, "dog", last, time) + sign * 2.0 * direction
    wrong = (predict(changed, "a cat", last, time) - with_lora).square().flatten(1).mean(1)
    assert not torch.allclose(wrong, expected, rtol=1e-2)
    assert family.kind.name == "sd1" or SIZES in target.make_conditions("red", torch.zeros(2, 6), CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer_folder(tmp_path / "tokenizers")
    (tmp_path / "prompts.toml").write_text(PAIRS, encoding="utf-8")
    return tmp_path


def words(model: Path, *further: object) -> list[object]:
    files = ["--pretrained_model_name_or_path", model, "--tokenizer_cache_dir", "tokenizers"]
    steps = ["--max_train_steps", 1, "--max_denoising_steps", 2, "--learning_rate", 0.01]
    return [*files, *steps, "--output_dir", "output", "--output_name", "leco", *further]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_file_names_its_prompts_and_makes_images(kind: str, folder: Path) -> None:
    model = WRITERS[kind](folder)
    script = "sdxl_train_leco.py" if kind == "sdxl" else "train_leco.py"

    said = succeed_here(script, *words(model, "--prompts_file", "prompts.toml"), folder=folder)

    assert "2 pairs" in said
    assert "rank 4" in said
    with safe_open(folder / "output" / "leco.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert all(name.startswith("lora_unet_") for name in file.keys())  # noqa: SIM118
    assert metadata["ss_leco_prompt_count"] == "2"
    assert metadata["ss_leco_prompts_file"] == "prompts.toml"
    assert [entry["target"] for entry in json.loads(metadata["ss_leco_preview"])] == ["a cat", "a dog"]
    generate = "sdxl_gen_img.py" if kind == "sdxl" else "gen_img.py"
    lora = ["--network_module", "networks.lora", "--network_weights", "output/leco.safetensors"]
    given = ["--ckpt", model, "--tokenizer_cache_dir", "tokenizers", "--prompt", "a cat", "--steps", 1]
    succeed_here(generate, *given, *lora, "--W", 64, "--H", 64, "--outdir", "made", folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_resumed_training_ends_with_the_same_weights_and_tells_of_other_prompts(
    kind: str, folder: Path
) -> None:
    model = WRITERS[kind](folder)
    script = "sdxl_train_leco.py" if kind == "sdxl" else "train_leco.py"
    further: list[object] = ["--prompts_file", "prompts.toml", "--max_train_steps", 4, "--save_state"]
    command = words(model, *further, "--save_every_n_steps", 2, "--seed", 1, "--lr_scheduler", "cosine")
    first = succeed_here(script, *command, folder=folder)
    state: list[object] = ["--resume", "output/leco-step00000002-state"]

    said = succeed_here(script, *command, "--output_dir", "again", *state, folder=folder)

    assert "Resuming from" in said
    full = load_file(folder / "output" / "leco.safetensors")
    assert same(full, load_file(folder / "again" / "leco.safetensors"))
    assert not same(full, load_file(folder / "output" / "leco-step00000002.safetensors"))
    (folder / "prompts.toml").write_text(PAIRS.replace("a dog", "a bird"), encoding="utf-8")
    told = "prompts.toml has other prompts than when the state was saved"
    assert told in succeed_here(script, *command, *state, folder=folder)
    assert told not in first + said


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "no file": ("train_leco.py", [], "--prompts_file is missing"),
    "text encoders alone": (
        *("train_leco.py", ["--prompts_file", "prompts.toml", "--network_train_text_encoder_only"]),
        "trains the U-Net alone",
    ),
    "another family": (
        *("flux_train_network.py", ["--prompts_file", "prompts.toml"]),
        "is for Stable Diffusion, and this script trains",
    ),
    "inpainting": (
        *("train_leco.py", ["--prompts_file", "prompts.toml", "--train_inpainting"]),
        "LECO learns without images. Omit it",
    ),
    "a side that XL has not": (
        *("sdxl_train_leco.py", ["--prompts_file", "odd.toml"]),
        "multiples of 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(case: str, folder: Path) -> None:
    script, further, reason = REFUSED[case]
    (folder / "odd.toml").write_text(PAIRS.replace("resolution = 64", "resolution = 72"), encoding="utf-8")
    model = WRITERS["sdxl" if script.startswith("sdxl") else "sd1"](folder)
    code, said = run_here(script, *words(model, *further), folder=folder)

    assert_one_message(code, said, reason)
