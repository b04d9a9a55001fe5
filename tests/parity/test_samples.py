"""A sample whose line leaves settings out is what diffusers makes with those of the known trainers.

Its latents are caught where the sampler hands them to the decoder; tests/test_families.py compares samples
with generations.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor

from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from networks.adapter import make_network
from tests.golden_cases import read_case
from tests.parity.projects import Project, train, write_project
from tests.parity.reference import Inputs, Sampling, denoise, draw_noise
from tests.parity.running import assert_equal, models_in
from tests.parity.theirs import Theirs
from tests.training.watched import Watched
from training.options import TrainingOptions, read_arguments, training_parser
from training.samples import prepare_samples
from wan.family import family_for_training
from wan.options import WanTrainingOptions

CPU = torch.device("cpu")
LEARN_FAST = ("--optimizer_type", "AdamW", "--learning_rate", 0.05)


def sample_latents(project: Project, line: str, folder: Path) -> Tensor:
    """What a training that continues the project's LoRA would show at its next sample: 16 F h w."""
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    words = ["--task", project.task, *models_in(project.models), "--network_dim", "4", "--sdpa"]
    words += [
        *("--dataset_config", str(project.folder / "dataset.toml"), "--output_dir", str(folder)),
        *("--output_name", "lora"),
    ]
    args = read_arguments(
        parser, [*words, "--network_weights", str(project.folder / "out" / "lora.safetensors")]
    )
    options, family = (
        read_options(TrainingOptions, args),
        Watched(family_for_training(read_options(WanTrainingOptions, args))),
    )
    (folder / "prompts.txt").write_text(f"{line}\n", encoding="utf-8")
    sampler = prepare_samples(family, folder / "prompts.txt", folder / "sample", "lora", CPU, 0, 1)  # type: ignore[arg-type]
    dit = family.load_dit(Placement(CPU))
    make_network(options.network, family.lora_module, dit, seed=0).module.eval()
    with torch.no_grad():
        sampler.make(lambda _: dit, nullcontext, "000003", lambda: False)
    ((latents,),) = family.decoded
    return latents


def with_lora(project: Project) -> Theirs:
    """diffusers' networks, the transformer with the LoRA file."""
    theirs = Theirs(project.models)
    state = WanLoraLoaderMixin.lora_state_dict(str(project.folder / "out" / "lora.safetensors"))
    theirs.dit.load_lora_adapter(state, prefix="transformer")
    return theirs


def test_what_a_line_leaves_out_is_that_of_the_known_trainers(tmp_path: Path) -> None:
    """One frame, 20 steps, flow shift 14.5, guidance 5 with the release's negative text; sizes rounded down
    to multiples of 16.
    """
    project = write_project(tmp_path / "project", "t2v")
    train(project, *LEARN_FAST, steps=3, in_process=True)
    theirs = with_lora(project)
    negative = read_case("text_constants")[0]["wan_default_negative_prompt"]
    inputs = Inputs(draw_noise(3, 1, 32, 48), theirs.text("a squirrel"), theirs.text(negative))

    sample = sample_latents(project, "a squirrel --w 50 --h 47 --d 3", tmp_path)

    assert_equal(
        sample,
        denoise(theirs.dit, inputs, Sampling(flow_shift=14.5, scales=(5.0,) * 20)),
        "sample with defaults",
    )
