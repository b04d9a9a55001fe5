"""Lumina-Image-2.0 as the shared loops see it: sampling, prompts, sizes, options, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generation.denoise import make_latents
from lumina.family import DEFAULTS, Lumina
from lumina.files import LuminaFiles
from lumina.official_options import generation_words, read_minimal
from lumina.options import LuminaTrainingOptions, translate_training
from lumina_generate_image import DEFAULTS as SCRIPT
from lumina_train_network import DEFAULTS as TRAINING
from modules.contract.requests import Prepared, Prompt, Request
from modules.contract.steps import EncodedPrompts
from modules.errors import OptionError
from modules.flow.schedule import make_schedule
from modules.parser import add_options
from tests.golden_cases import FOLDER, read_case
from tests.lumina.making import golden_model
from training.image_options import image_training_parser

CPU = torch.device("cpu")
DESCRIPTION, TENSORS = read_case("lumina_sampling")
FLOAT32 = Lumina(LuminaFiles(dit_dtype=torch.float32))


def prepare(**asked: Any) -> Prepared:
    return FLOAT32.prepare(Request("a cat", 7, **asked))


@pytest.mark.parametrize("run", DESCRIPTION["runs"], ids=lambda run: run["name"])
def test_whole_sampling_equals_the_recorded_latents(run: dict[str, Any]) -> None:
    """From the seed to clean latents, with guidance that ends early and is limited."""
    extra = {name: str(run[name]) for name in ("cfg_trunc_ratio", "renorm_cfg")}
    rows, columns = DESCRIPTION["latent_h_w"]
    size = {"width": 8 * columns, "height": 8 * rows, "steps": DESCRIPTION["steps"]}
    prepared = prepare(guidance_scale=run["guidance_scale"], extra=extra, **size)
    prepared = replace(prepared, seed=DESCRIPTION["seed"])

    def text(ending: str) -> dict[str, Tensor | list[Tensor]]:
        names = {"hidden_state": "cap_feats", "attention_mask": "cap_mask"}
        return {ours: TENSORS[theirs + ending][0] for ours, theirs in names.items()}

    calls: list[float] = []

    class Counted(nn.Module):
        def forward(self, noisy: Tensor, times: Tensor, **given: Any) -> Tensor:
            calls.append(float(times[0]))
            found: Tensor = model(noisy, times, **given)
            return found

    model, counted = golden_model(), Counted()
    prompts = {0: EncodedPrompts(text(""), text("_negative"))}
    latents = make_latents(FLOAT32, lambda _: counted, prepared, prompts, {}, CPU)

    torch.testing.assert_close(latents[:, :, 0], TENSORS[run["name"]], **DESCRIPTION["tolerance"]["latent*"])
    assert len(calls) == DESCRIPTION["steps"] + run["guided_steps"]


def test_the_noise_levels_are_those_recorded() -> None:
    cases = json.loads((FOLDER / "image_schedules.json").read_text(encoding="utf-8"))["cases"]
    for case in (one for one in cases if one["family"] == "lumina"):
        schedule = make_schedule(DEFAULTS.solver, case["steps"], case["shift"])
        torch.testing.assert_close(schedule.sigmas, torch.tensor(case["sigmas"]), atol=2e-6, rtol=0)
        if "time_given_to_model" in case:
            times = 1 - schedule.timesteps / 1000
            torch.testing.assert_close(times, torch.tensor(case["time_given_to_model"]), atol=2e-6, rtol=0)


def test_what_the_release_does_is_the_default() -> None:
    prepared = prepare()
    rules = prepared.rules
    assert (prepared.width, prepared.height, prepared.frames, prepared.steps) == (1024, 1024, 1, 36)
    assert (prepared.guidance_scale, prepared.flow_shift, rules.below_share, rules.norm_limit) == (
        (3.5,),
        6,
        0.25,
        1,
    )
    assert prepare(solver="euler").solver == prepared.solver == "euler-trained"
    assert prepare(solver="unipc").solver == "unipc"
    assert prepare(width=100, height=47).width == 96  # cut to whole patches
    assert prepare(extra={"cfg_trunc_ratio": "1", "renorm_cfg": "0"}).rules == replace(
        rules, below_share=None, norm_limit=None
    )
    assert FLOAT32.prepare(Request("a cat", 0)).seed == 0


def test_only_the_prompt_is_read_behind_the_system_prompt() -> None:
    texts = prepare(negative_prompt="a cat", away_prompt="dull").prompts[0]
    assert texts.positive == Prompt("a cat")
    assert texts.negative == Prompt("a cat", is_negative=True)
    assert texts.blank == Prompt("", is_negative=True)
    assert texts.away == Prompt("dull", is_negative=True)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"cfg_trunc_ratio": "2"}, "--ctr.*from 0 to 1"),
        ({"renorm_cfg": "-1"}, "--rcfg"),
        ({"renorm_cfg": "x"}, "x"),
    ],
)
def test_numbers_that_cannot_be_are_refused(extra: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        prepare(extra=extra)


def test_training_has_luminas_names_of_shared_options() -> None:
    parser = image_training_parser(None, TRAINING)
    add_options(parser, LuminaTrainingOptions)

    args = parser.parse_args(["--ae", "ae.safetensors", "--use_flash_attn"])
    translate_training(args)

    assert (args.vae, args.flash_attn, args.discrete_flow_shift) == ("ae.safetensors", True, 6.0)
    assert args.timestep_sampling == "shift"
    for words, said in ((["--use_sage_attn"], "no backward pass"), (["--ae", "a", "--vae", "b"], "give one")):
        with pytest.raises(OptionError, match=said):
            translate_training(parser.parse_args(words))


def test_the_guides_command_is_that_of_the_generation_script(tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    minimal = read_minimal(
        None,
        [
            "--pretrained_model_name_or_path",
            "d",
            "--gemma2_path",
            "g",
            "--ae_path",
            "a",
            "--prompt=-x",
            "--seed",
            "0",
        ]
        + [
            "--image_width",
            "1000",
            "--image_height",
            "777",
            "--lora_weights",
            f"{lora};0.5",
            "other",
            "--offload",
        ]
        + ["--use_sage_attn", "--system_prompt", "Draw."],
    )

    words = generation_words(minimal)

    assert {"--prompt=-x", "--seed=0", "--attn_mode=sageattn", "--system_prompt=Draw."} <= set(words)
    assert words[words.index("--image_size") :][:3] == ["--image_size", "768", "992"]
    assert words[words.index("--lora_weight") :][:3] == ["--lora_weight", str(lora), "other"]
    assert words[words.index("--lora_multiplier") :][:3] == ["--lora_multiplier", "0.5", "1"]
    with pytest.raises(OptionError, match="PATH;STRENGTH"):
        replace(minimal.model, lora_weights=("a;b",))


def test_prompt_lines_have_the_options_of_lumina_s_guidance() -> None:
    assert {SCRIPT.line_options[letter].key for letter in ("ctr", "rcfg")} == set(SCRIPT.extras)
