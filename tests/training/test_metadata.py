"""What a saved LoRA says of its training, and averages of weights."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from modules.options import NO_OPTIONS, read_options
from protocols.family import Abilities
from runtime.offload.block_swap import get_swap
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, gradients, learner
from tests.training import toy
from training.features.ema_weights import make_average
from training.learner import find_network_spec
from training.learning_options import FullDitOptions
from training.metadata import file_metadata, run_metadata
from training.options import TrainingOptions, read_arguments, training_parser
from training.saving.states import SavedState, read_state, write_state
from training.steps import Progress, StepPlan
from training.trainable import Trainable

NOW = datetime(2030, 1, 2, 3, 4, 5, 678)
FAMILY = {
    "architecture": "wan2.1",
    "implementation": "https://example.org/model",
    "sd_model_name": "dit.safetensors",
}
OPTIMIZER = "torch.optim.adamw.AdamW(weight_decay=0.1)"


def make_plan(options: TrainingOptions, folder: str, name: str, **family: str) -> Any:
    """The facts of a plan that stand in metadata."""
    module = "" if options.network is None else "networks.lora_wan"
    table = SimpleNamespace(describe=lambda: {"resolution": [64, 64], "image_directory": folder})
    model: Any = SimpleNamespace(
        name=name,
        metadata={**FAMILY, **family},
        options=NO_OPTIONS,
        hashed_files={},
        noise=SimpleNamespace(keeps_variance=False),
        abilities=Abilities(),
        lora_module=module,
    )
    return SimpleNamespace(
        options=options,
        features=options.features,
        network_spec=find_network_spec(model, options.network),
        family=model,
        progress=Progress(42, 7, 12.5),
        steps=StepPlan(num_batches=3, data_parallel_size=1, accumulation_steps=1, total_steps=6),
        order=SimpleNamespace(num_items=6),
        network_module=module,
        config=SimpleNamespace(datasets=[table]),
    )


# formats.md, section 4
TRAINING_KEYS = """
    ss_session_id ss_ss_session_id ss_training_started_at ss_training_finished_at ss_output_name
    ss_learning_rate ss_num_train_items ss_num_batches_per_epoch ss_num_epochs ss_gradient_checkpointing
    ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler ss_network_dropout
    ss_mixed_precision ss_seed ss_training_comment ss_optimizer ss_max_grad_norm ss_fp8_base ss_full_fp16
    ss_full_bf16 ss_weighting_scheme ss_logit_mean ss_logit_std ss_mode_scale ss_guidance_scale
    ss_timestep_sampling ss_sigmoid_scale ss_discrete_flow_shift ss_datasets ss_sd_model_name ss_vae_name
    ss_steps ss_epoch
"""
KEPT_KEYS = "ss_base_model_version ss_network_module ss_network_dim ss_network_alpha ss_network_args"


def metadata(
    *argv: str,
    full_dit: bool = False,
    licence: str | None = None,
    folder: str = "cats",
    name: str = "wan",
    **family: str,
) -> dict[str, str]:
    """What a file says. license: the model's. folder: of the pictures. family: what the model says."""
    needed = ["--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "x"]
    parser = training_parser(None, FullDitOptions) if full_dit else training_parser(None)
    options = read_options(TrainingOptions, read_arguments(parser, [*needed, *argv], {}))
    run = run_metadata(make_plan(options, folder, name, **family), OPTIMIZER, "constant")
    return file_metadata(run, options, {**FAMILY, **family}, step=5, epoch=2, now=NOW, licence=licence)


def keys_of(made: dict[str, str]) -> set[str]:
    return {key for key in made if key.startswith("ss_")}


def test_names_of_files_that_are_no_utf_8_lose_no_run() -> None:
    made = metadata(folder="caf\udce9", sd_model_name="\udce9.pt")
    # `ascii`, as pytest could not print what is wrong
    assert ascii(made["ss_sd_model_name"]) == ascii("\\udce9.pt")
    assert ascii(made["ss_datasets"]) == ascii('[{"resolution": [64, 64], "image_directory": "caf\\udce9"}]')


def test_every_key_of_the_format_is_there_as_text() -> None:
    made = metadata("--network_args", "loraplus_lr_ratio=4", "--network_dim", "8")

    assert keys_of(made) == {*TRAINING_KEYS.split(), *KEPT_KEYS.split()}
    assert all(isinstance(value, str) for value in made.values())
    assert made["ss_session_id"] == made["ss_ss_session_id"] == "7"
    assert (made["ss_steps"], made["ss_epoch"]) == ("5", "2")
    assert float(made["ss_training_finished_at"]) == NOW.timestamp()
    assert json.loads(made["ss_network_args"]) == {"loraplus_lr_ratio": "4"}
    assert json.loads(made["ss_datasets"])[0]["image_directory"] == "cats"
    assert (made["ss_network_dim"], made["ss_network_dropout"], made["ss_vae_name"]) == ("8", "None", "None")
    assert made["ss_sd_model_name"] == "dit.safetensors"


def test_another_loss_than_the_usual_is_recorded() -> None:
    made = metadata("--loss_type", "huber", "--huber_c", "0.2")
    assert {key: made[key] for key in made.keys() - metadata().keys()} == {
        "ss_loss_type": "huber",
        "ss_huber_schedule": "snr",
        "ss_huber_c": "0.2",
        "ss_huber_scale": "1.0",
    }


def test_without_metadata_only_what_loading_needs_stays() -> None:
    made = metadata("--no_metadata")

    assert keys_of(made) == set(KEPT_KEYS.split())
    assert made["ss_network_dim"] == "4"
    assert made["modelspec.title"] == "x"


def test_the_model_specification_says_what_the_file_is() -> None:
    made = metadata("--metadata_author", "me", "--metadata_tags", "a,b", "--min_timestep", "100")

    spec = {
        key.removeprefix("modelspec."): value for key, value in made.items() if key.startswith("modelspec.")
    }
    assert spec == {
        "sai_model_spec": "1.0.0",
        "architecture": "wan2.1/lora",
        "implementation": "https://example.org/model",
        "title": "x",
        "resolution": "1280x720",
        "date": "2030-01-02T03:04:05",
        "author": "me",
        "tags": "a,b",
        "timestep_range": "100,1000",
    }
    assert metadata("--metadata_title", "y")["modelspec.title"] == "y"


@pytest.mark.parametrize(("given", "said"), [("832,480", "832x480"), ("1024", "1024x1024"), ("72x8", "72x8")])
def test_resolution_and_architecture_may_be_given(given: str, said: str) -> None:
    made = metadata("--metadata_reso", given, "--metadata_arch", "my-model")

    assert made["modelspec.resolution"] == said
    assert made["modelspec.architecture"] == "my-model/lora"


@pytest.mark.parametrize("given", ["large", "1024,", "1,2,3"])
def test_a_resolution_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(OptionError, match="--metadata_reso"):
        metadata("--metadata_reso", given)


def test_a_whole_model_does_not_look_like_a_lora() -> None:
    made = metadata("--full_bf16", "--mixed_precision", "bf16", full_dit=True)

    assert made["modelspec.architecture"] == "wan2.1"
    assert keys_of(made) == {*TRAINING_KEYS.split(), "ss_base_model_version"} - {"ss_network_dropout"}
    assert made["ss_full_bf16"] == "True"


def test_of_a_model_with_several_uses_the_file_says_what_it_was_trained_for() -> None:
    made = metadata(name="framepack", trained_for="single images")
    assert made["reelsmith_trained_for"] == "single images"
    assert "reelsmith_trained_for" not in metadata()


@pytest.mark.parametrize(
    ("given", "of_model", "said"),
    [([], "Apache-2.0", "Apache-2.0"), (["mine"], "Apache-2.0", "mine"), ([], None, None)],
)
def test_the_licence_is_the_models_where_none_is_given(
    given: list[str], of_model: str | None, said: str | None
) -> None:
    words = ["--metadata_license", *given] if given else []
    assert metadata(*words, licence=of_model).get("modelspec.license") == said


STATES = ["--save_state", "--save_every_n_steps", 1]
EMA = ["--ema_decay", "0.5"]
FULL = "--optimizer_type Adafactor --optimizer_args relative_step=False --mixed_precision bf16 --full_bf16 "
FULL += "--fused_backward_pass --max_grad_norm 0 --blocks_to_swap 1 --gradient_checkpointing"


def test_the_average_of_a_lora_leaves_swapped_blocks_where_they_are() -> None:
    device = FakeDevice()
    dit, network = learner(CASES[0], 3, checkpointing=True, device=device)
    parameters = list(network.parameters())
    trainable = Trainable(
        modules={"network": network}, groups=[{"params": parameters}], group_names=("unet",), written_files={}
    )
    optimizer = torch.optim.SGD(parameters, 0.1)
    average = make_average(0.5, 1, dits=[dit], trainable=trainable, optimizer=optimizer, is_needed=True)
    assert average is not None
    swap = get_swap(dit)
    assert swap is not None

    def in_slots() -> list[int | None]:
        return [slot.block and slot.block.position for pool in swap.pools for slot in pool.slots]

    gradients(CASES[0], dit, network)
    before = in_slots()
    average.after_step()
    assert in_slots() == before != [None, None]


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_that_of_the_weights_of_each_step(tmp_path: Path, every: int) -> None:
    toy.write_caches(tmp_path)
    output = tmp_path / "output"
    start = toy.train_toy(tmp_path, "--max_train_steps", 1, "--learning_rate", 0)

    toy.train_toy(tmp_path, *EMA, "--ema_update_every", every, "--save_every_n_steps", 1)

    expected = start
    for step in range(every, 9, every):
        weights = load_file(output / ("x.safetensors" if step == 8 else f"x-step{step:08d}.safetensors"))
        share = 1 - min(0.5, (1 + step) / (10 + step)) ** every
        expected = {name: old + share * (weights[name] - old) for name, old in expected.items()}
    found = load_file(output / "x-ema.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    metadata = toy.metadata_of(output / "x-ema.safetensors")
    assert (metadata["ss_ema_decay"], metadata["ss_ema_steps"]) == ("0.5", "8")
    assert "sshs_model_hash" in metadata


def test_a_killed_run_ends_with_the_same_average(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    options = [*EMA, "--ema_update_every", 2, "--save_every_n_steps", 3, "--save_state", "--resume", "latest"]
    toy.train_toy(tmp_path, *options)
    toy.train_with_kills(tmp_path, *options, moments=(1, 5))

    expected = load_file(tmp_path / "output" / "x-ema.safetensors")
    assert toy.same(expected, load_file(tmp_path / "killed" / "x-ema.safetensors"))


@pytest.mark.slow_cases("bf16, fused, swapped")
@pytest.mark.parametrize("how", ["", FULL], ids=["float32", "bf16, fused, swapped"])
def test_a_whole_model_has_one_too_in_the_dtype_of_its_weights(tmp_path: Path, how: str) -> None:
    toy.write_caches(tmp_path)
    words = [*how.split(), *EMA, "--save_every_n_steps", 3, "--save_state", "--resume", "latest"]
    plain = toy.train_toy(tmp_path, *how.split(), full_dit=True)
    expected = toy.train_toy(tmp_path, *words, full_dit=True)
    toy.train_with_kills(tmp_path, *words, moments=(5,), full_dit=True)

    average = load_file(tmp_path / "output" / "x-ema.safetensors")
    assert toy.same(plain, expected)
    assert toy.same(average, load_file(tmp_path / "killed" / "x-ema.safetensors"))
    assert all(one.dtype == plain[name].dtype for name, one in average.items())
    assert not toy.same(average, plain)


def test_it_begins_with_the_weights_of_a_state_that_has_none(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    state = toy.train_toy(tmp_path, "--max_train_steps", 4, "--save_state")

    toy.train_toy(tmp_path, *EMA, "--max_train_steps", 5, "--resume", "latest", "--learning_rate", "1e-2")

    after = load_file(tmp_path / "output" / "x.safetensors")
    average = load_file(tmp_path / "output" / "x-ema.safetensors")
    for name, tensor in state.items():
        torch.testing.assert_close(average[name], tensor + (1 - 2 / 11) * (after[name] - tensor))


def test_samples_show_the_average_if_asked(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    images: list[Tensor] = []
    family = toy.ToyFamily(on_decode=images.append)
    samples = ["--sample_prompts", toy.write_prompts(tmp_path)]
    shown = toy.train_toy(
        tmp_path, *EMA, *samples, "--sample_every_n_steps", 4, "--sample_ema", family=family
    )
    start = ["--network_weights", tmp_path / "output" / "x-ema.safetensors", "--max_train_steps", 1]

    toy.train_toy(
        tmp_path, *samples, "--sample_at_first", *start, "--output_dir", tmp_path / "o", family=family
    )

    assert torch.equal(images[1], images[2])  # after the last step, and of the file
    assert toy.same(shown, toy.train_toy(tmp_path))


def test_samples_of_a_whole_model_with_its_average_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--sample_ema"):
        toy.toy_options(tmp_path, *EMA, "--sample_ema", full_dit=True)


@pytest.mark.parametrize(
    ("first", "then", "rank", "alpha", "said"),
    [
        ("", "--network_dim 4 --network_alpha 1", "4", "8", "8 for rank 4, of the file"),
        ("", "--dim_from_weights", "4", "8", "8 for rank 4, of the file"),
        (
            "--network_args exclude_patterns=['.*down']",
            "--network_dim 4 --network_alpha 2",
            "4",
            "Dynamic",
            "2, 8 for rank 4, of the file",
        ),
    ],
)
def test_a_network_that_goes_on_from_a_file_has_the_sizes_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, then: str, rank: str, alpha: str, said: str
) -> None:
    toy.write_caches(tmp_path)
    begin = ["--network_dim", 4, "--network_alpha", 8, "--max_train_steps", 1]
    toy.train_toy(tmp_path, *begin, *first.split())
    caplog.set_level("INFO")
    words = ["--output_name", "y", "--save_state", *then.split()]
    start = ["--network_weights", tmp_path / "output/x.safetensors"]

    for more in ([*start, "--max_train_steps", 1], [*start, "--resume", "latest", "--max_train_steps", 2]):
        toy.train_toy(tmp_path, *words, *more)
        made = toy.metadata_of(tmp_path / "output/y.safetensors")
        assert (made["ss_network_dim"], made["ss_network_alpha"]) == (rank, alpha)
    assert caplog.text.count("rank 4 of the file") == caplog.text.count(said) == 2


class Averaging(torch.optim.SGD):
    """Trains as SGD, saves the mean of the weights of all steps; before the first, eval() cannot be used."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1
            state.setdefault("mean", torch.zeros_like(parameter)).lerp_(parameter, 1 / state["count"])

    def eval(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["own"] = parameter.clone()
            parameter.copy_(state["mean"])

    def train(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if "own" in self.state[parameter]:
                parameter.copy_(self.state[parameter].pop("own"))


class Wrapping(torch.optim.Optimizer):
    """Leaves all to an optimizer that averages, and has neither train() nor eval()."""

    def __init__(self, params: Any, lr: float) -> None:
        self.inner = Averaging(params, lr=lr)
        super().__init__(self.inner.param_groups, {})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


@pytest.mark.parametrize("kind", [Averaging, Wrapping])
def test_files_and_samples_of_an_averaging_optimizer_are_the_average_whatever_its_name(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    toy.write_caches(tmp_path)
    images: list[Tensor] = []
    family = toy.ToyFamily(on_decode=images.append)
    samples = ["--sample_prompts", toy.write_prompts(tmp_path), "--sample_at_first"]
    words = ["--optimizer_type", f"{__name__}.{kind.__name__}", "--max_train_steps", 3]
    file = toy.train_toy(tmp_path, *words, *samples, "--sample_every_n_steps", 3, *STATES, family=family)
    states = [toy.state_tensors(tmp_path / f"output/x-step0000000{n}-state")["network"] for n in (1, 2, 3)]
    start = ["--network_weights", tmp_path / "output/x.safetensors", "--max_train_steps", 1]
    toy.train_toy(tmp_path, *samples, *start, "--output_dir", tmp_path / "o", family=family)

    for name, tensor in states[0].items():
        mean = (tensor + states[1][name] + states[2][name]) / 3
        torch.testing.assert_close(file[name.removeprefix("network.")], mean)
    assert torch.equal(images[1], images[2])
    with pytest.raises(OptionError, match=f"{kind.__name__} saves an average"):
        toy.train_toy(tmp_path, *EMA, *words)


def test_the_average_of_other_weights_is_refused(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, *EMA, "--max_train_steps", 2, "--save_state")
    state = tmp_path / "output" / "x-state"
    saved = read_state(state)
    assert isinstance(saved, SavedState)
    saved.parts["ema"] = dict(list(saved.parts["ema"].items())[1:])
    write_state(state, saved)

    with pytest.raises(CheckpointError, match="average"):
        toy.train_toy(tmp_path, *EMA, "--resume", "latest")
