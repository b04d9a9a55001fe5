"""LoRAs of models with two experts: whose a file is, and files that hold one for each."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.loading import LoraFile, WeightedLora, read_lora, warn_about_other_expert
from networks.metadata import STALE, find_lora_expert, save_network
from protocols.families import HIGH_NOISE, LOW_NOISE
from tests.networks.making import add_lora, inputs, randomize, tiny_dit, wan_network
from tests.networks.test_key_formats import TOLERANCE, run_there
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.wan.making import in_diffusers
from wan.model import WanModel
from wan.names import WAN

EXPERTS = (HIGH_NOISE, LOW_NOISE)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("x_high_noise", HIGH_NOISE),
        ("x_low_noise", LOW_NOISE),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", HIGH_NOISE),
        ("wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022", LOW_NOISE),
        ("wan22-style-LowNoise-000010", LOW_NOISE),
        ("style-low-step00000020", LOW_NOISE),
        ("low_angle_shots", None),
        ("highlands", None),
        ("low_noise_from_high_noise", None),
        ("style", None),
    ],
)
def test_the_name_of_a_file_tells_its_expert(name: str, expert: str | None) -> None:
    assert find_lora_expert({}, Path(f"{name}.safetensors")) == expert


@pytest.mark.parametrize(
    ("metadata", "name", "expert", "says"),
    [
        ({"ss_wan_expert": "high"}, "x", LOW_NOISE, "the high-noise expert according to its metadata"),
        ({}, "x_low_noise", HIGH_NOISE, "the low-noise expert according to its name"),
        ({"ss_wan_expert": "None"}, "x_low_noise", HIGH_NOISE, "the low-noise expert according to its name"),
        ({"ss_wan_expert": "high"}, "x_low_noise", HIGH_NOISE, None),
        ({"ss_wan_expert": "both"}, "x_low_noise", HIGH_NOISE, None),
        ({"ss_wan_expert": "high"}, "x", "", None),
        ({}, "x", LOW_NOISE, None),
    ],
)
def test_a_lora_for_the_other_expert_is_warned_of(
    metadata: dict[str, str], name: str, expert: str, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    lora = LoraFile(Path(f"{name}.safetensors"), {}, metadata, "ours")

    warn_about_other_expert(lora, expert)

    assert len(caplog.records) == (0 if says is None else 1)
    assert (says or "") in caplog.text


class Pair:
    """Two tiny transformers and a LoRA file for each, in our dialect."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dits = {
            expert: tiny_dit(folder / expert, "t2v", seed=seed) for seed, expert in enumerate(EXPERTS)
        }
        self.paths = {}
        for seed, (expert, dit) in enumerate(self.dits.items(), 5):
            network = wan_network(dit, rank=4, alpha=3.0)
            randomize(network, seed=seed)
            self.paths[expert] = folder / f"x_{expert}.safetensors"
            metadata = {"ss_base_model_version": "wan", "ss_wan_expert": expert.removesuffix("_noise")}
            save_network(network, self.paths[expert], torch.float32, {**metadata, "ss_output_name": expert})

    @torch.no_grad()
    def here(self, expert: str, lora: LoraFile) -> Tensor:
        """What our transformer makes of its inputs with a LoRA."""
        dit = self.dits[expert]
        changed = WanModel(dit.config)
        changed.load_state_dict(dit.state_dict())
        return add_lora(changed, lora).eval()(**inputs(dit))

    def wanted(self, expert: str) -> Tensor:
        return self.here(expert, read_lora(self.paths[expert]))

    def pipeline(self) -> WanPipeline:
        """diffusers' pipeline of both transformers, without the other models."""
        first, second = (in_diffusers(dit.config, dit.state_dict()) for dit in self.dits.values())
        return WanPipeline(None, None, None, None, first, second, boundary_ratio=0.875)  # type: ignore[arg-type]

    def there(self, pipe: WanPipeline, expert: str) -> Tensor:
        network = pipe.transformer if expert == HIGH_NOISE else pipe.transformer_2
        return run_there(network, self.dits[expert])

    def convert(self, *arguments: object) -> None:
        convert_lora.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def content(path: Path) -> tuple[dict[str, str], str]:
    """Metadata without hashes, and a hash of the tensors."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    own = {key: text for key, text in metadata.items() if not key.startswith(STALE)}
    return own, metadata["sshs_model_hash"]


def join(pair: Pair, output: Path) -> Path:
    low, high = pair.paths[LOW_NOISE], pair.paths[HIGH_NOISE]
    pair.convert("--input", low, "--input_high_noise", high, "--output", output, "--target", "diffusers")
    return output


def test_two_files_become_one_that_diffusers_loads_into_both_transformers(tmp_path: Path, pair: Pair) -> None:
    both, pipe = join(pair, tmp_path / "both.safetensors"), pair.pipeline()

    pipe.load_lora_weights(str(both))  # reads transformer. alone
    pipe.transformer_2.load_lora_adapter(str(both), prefix="transformer_2")

    for expert in EXPERTS:
        torch.testing.assert_close(pair.there(pipe, expert), pair.wanted(expert), **TOLERANCE)


@pytest.mark.slow_cases("other")
@pytest.mark.parametrize("target", ["default", "other"])
def test_one_file_is_taken_apart_again(tmp_path: Path, pair: Pair, target: str) -> None:
    both = join(pair, tmp_path / "both.safetensors")
    outputs = {LOW_NOISE: tmp_path / "a.safetensors", HIGH_NOISE: tmp_path / "b.safetensors"}

    pair.convert(
        *("--input", both, "--output", outputs[LOW_NOISE]),
        *("--output_high_noise", outputs[HIGH_NOISE], "--target", target),
    )

    for expert, path in outputs.items():
        lora = read_lora(path)
        torch.testing.assert_close(pair.here(expert, lora), pair.wanted(expert), rtol=1e-5, atol=1e-5)
        assert lora.expert == expert
        assert lora.metadata["ss_output_name"] == expert
        alone = tmp_path / "alone.safetensors"
        pair.convert("--input", both, "--expert", expert, "--output", alone, "--target", target)
        assert content(alone) == content(path)
    again = tmp_path / "again.safetensors"
    pair.convert(
        *("--input", outputs[LOW_NOISE], "--input_high_noise", outputs[HIGH_NOISE]),
        *("--output", again, "--target", "diffusers"),
    )
    found, wanted = load_file(again), load_file(both)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=0)
    assert content(again)[0] == content(both)[0]


def saved_by_diffusers(pipe: WanPipeline, folder: Path, *networks: str) -> Path:
    """Give transformers random LoRAs with an alpha of their own and save them as diffusers does."""
    layers, settings = {}, {}
    for seed, network in enumerate(networks):
        model: WanTransformer3DModel = getattr(pipe, network)
        model.add_adapter(
            LoraConfig(r=4, lora_alpha=3 + seed, target_modules=["to_q", "to_out.0", "net.0.proj"])
        )
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        layers[network] = get_peft_model_state_dict(model)
        settings[network] = model.peft_config["default"].to_dict()
    WanLoraLoaderMixin._save_lora_weights(str(folder), layers, settings, True, "lora.safetensors", None, True)
    return folder / "lora.safetensors"


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_diffusers_for_both_transformers_acts_here_as_there(tmp_path: Path, pair: Pair) -> None:
    pipe = pair.pipeline()
    lora = read_lora(saved_by_diffusers(pipe, tmp_path, "transformer", "transformer_2"), by_expert=True)

    assert tuple(lora.loras_by_expert) == EXPERTS
    for expert in EXPERTS:
        part = lora.for_expert(expert)
        assert part.expert == expert
        torch.testing.assert_close(pair.here(expert, part), pair.there(pipe, expert), **TOLERANCE)


def test_one_part_has_to_be_chosen(tmp_path: Path, pair: Pair) -> None:
    both = join(pair, tmp_path / "both.safetensors")

    with pytest.raises(CheckpointError, match="contains two LoRAs, one for the high-noise and one for"):
        read_lora(both)
    use = WeightedLora(read_lora(both, by_expert=True))
    assert use.lora.family() is WAN
    for expert in (None, ""):
        with pytest.raises(CheckpointError, match="contains two LoRAs"):
            use.for_expert(expert)
    with pytest.raises(CheckpointError, match="contains two LoRAs"):
        LoraPatch([use])


@pytest.mark.parametrize("text", ["{", "[]", '{"high_noise": 1}', '{"high_noise": [1]}'])
def test_damaged_metadata_of_parts_are_an_error_with_a_remedy(tmp_path: Path, text: str) -> None:
    names = [
        f"{network}.blocks.0.attn1.to_q.lora_{half}.weight"
        for network in ("transformer", "transformer_2")
        for half in "AB"
    ]
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path, {"reelsmith_experts": text})

    with pytest.raises(CheckpointError, match="the metadata of its LoRAs for experts cannot be read"):
        read_lora(path, by_expert=True)


def test_what_does_not_go_together_is_refused(tmp_path: Path, pair: Pair) -> None:
    both, out, more = join(pair, tmp_path / "both.safetensors"), tmp_path / "o.safetensors", tmp_path / "h"
    low, high = pair.paths[LOW_NOISE], pair.paths[HIGH_NOISE]

    for arguments, text in (
        (["--input", both, "--target", "default"], "cannot store in one file"),
        (["--input", low, "--input_high_noise", high, "--target", "other"], "use --target diffusers"),
        (["--input", low, "--output_high_noise", more, "--target", "other"], "contains a single LoRA"),
        (["--input", low, "--expert", HIGH_NOISE, "--target", "other"], "contains a single LoRA"),
        (["--input", both, "--output_high_noise", out, "--target", "other"], "use two names"),
        (["--input", low, "--input_high_noise", out, "--target", "diffusers"], "no such file"),
    ):
        with pytest.raises(OptionError, match=text):
            pair.convert("--output", out, *arguments)
    assert not out.exists()
    assert not more.exists()


@pytest.mark.parametrize(("expert", "told"), [(HIGH_NOISE, "by its name"), (LOW_NOISE, "by --expert")])
def test_merging_uses_the_part_for_the_model(
    tmp_path: Path, pair: Pair, expert: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    both, state = join(pair, tmp_path / "both.safetensors"), pair.dits[expert].state_dict()
    model = write_dit(tmp_path, state, name=f"wan2.2_{expert}_14B" if told == "by its name" else "dit")
    option = ["--expert", expert] if told == "by --expert" else []
    merged = tmp_path / "merged.safetensors"

    merge(model, both, merged, *option)

    patch = LoraPatch([WeightedLora(read_lora(both, by_expert=True).for_expert(expert))])
    found = load_file(merged)
    assert all(torch.equal(found[name], patch(name, weight)) for name, weight in state.items())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def merge(model: Path, lora: Path, output: Path, *more: str) -> None:
    given = ["--dit", model, "--lora_weight", lora, "--save_merged_model", output, "--device", "cpu", *more]
    merge_lora.main([str(each) for each in given])


def test_merging_warns_of_a_lora_for_the_other_expert_and_asks_which_part(
    tmp_path: Path, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_dit(tmp_path, tiny_state("t2v"), name="high_noise_model")
    merge(model, pair.paths[LOW_NOISE], tmp_path / "merged.safetensors")
    assert "was trained for the low-noise expert according to its metadata" in caplog.text

    unknown = write_dit(tmp_path, tiny_state("t2v"), name="dit")
    both = join(pair, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match="--expert"):
        merge(unknown, both, tmp_path / "other.safetensors")
