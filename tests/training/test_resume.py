"""A run that is killed and resumed ends with the weights of one that was not."""

import dataclasses
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.batches.items import TableCacheInfo, TrainingItem
from dataset.batches.order import BatchOrder
from ltx_2.options import Ltx2TrainingOptions
from modules.errors import CheckpointError, OptionError
from modules.options import FREE, HABIT, IDENTITY
from tests.commands import ROOT, run_python
from tests.dataset.making import make_table
from tests.training import toy
from training.resuming import _normalize_fixed_settings, epoch_digest
from training.run import train_network
from training.saving.states import SavedState, read_state

EVERYTHING = [
    *("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3),
    *("--network_dropout", "0.2", "--network_args", "rank_dropout=0.3", "loraplus_lr_ratio=4"),
    *("--scale_weight_norms", "1", "--timestep_sampling", "logsnr", "--num_timestep_buckets", 4),
    *("--save_every_n_steps", 2, "--save_state", "--resume", "latest"),
]


# before any state, mid-accumulation, mid-epoch, in a short last step
# before any state, mid-accumulation, mid-epoch, in a short last step
@pytest.mark.parametrize("moments", [(0, 3), (1, 5, 3), (4, 3), (8,), (11,)])
def test_a_killed_run_ends_with_equal_bytes(tmp_path: Path, moments: tuple[int, ...]) -> None:
    toy.write_caches(tmp_path, count=5)
    expected = toy.train_toy(tmp_path, *EVERYTHING)

    assert toy.same(expected, toy.train_with_kills(tmp_path, *EVERYTHING, moments=moments))
    full, killed = (sorted(os.listdir(tmp_path / name)) for name in ("output", "killed"))
    assert killed == full


OPTIMIZERS = {  # and the package that has it
    "AdamW amsgrad=True": "torch",
    "SGD momentum=0.9": "torch",
    "RAdam": "torch",
    "Adafactor": "torch",
    "Adafactor relative_step=False beta1=0.9": "torch",
    "AdamW8bit": "bitsandbytes",
    "Lion": "lion_pytorch",
    "Prodigy": "prodigyopt",
    "AdamWScheduleFree": "schedulefree",
    "RAdamScheduleFree": "schedulefree",
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_with_equal_bytes(tmp_path: Path, optimizer: str) -> None:
    """Saving at every step must not disturb the run either: schedule-free optimizers keep other weights while
    they train.
    """
    pytest.importorskip(OPTIMIZERS[optimizer])
    toy.write_caches(tmp_path)
    name, *arguments = optimizer.split()
    which = ["--optimizer_type", name, *(["--optimizer_args", *arguments] if arguments else [])]
    which += ["--network_dim", "64"]  # bitsandbytes keeps small tensors in 32 bits
    states = ["--save_every_n_steps", 1, "--save_state", "--resume", "latest"]

    assert toy.same(
        toy.train_toy(tmp_path, *which), toy.train_with_kills(tmp_path, *which, *states, moments=(4,))
    )


def test_without_a_seed_the_resumed_run_takes_the_saved_one(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    options = toy.toy_options(tmp_path, "--save_state", "--resume", "latest")
    unseeded = dataclasses.replace(options, loop=dataclasses.replace(options.loop, seed=None))

    with pytest.raises(toy.Killed):
        train_network(toy.killed_at(6), unseeded)
    assert train_network(toy.ToyFamily(), unseeded) == 0
    assert train_network(toy.ToyFamily(), unseeded) == 0  # at its end: nothing to do, the same files


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("", "--optimizer_type adamw"),
        ("--optimizer_type AdamW", "--optimizer_type torch.optim.AdamW"),
        ("--optimizer_type adafactor", "--optimizer_type transformers.optimization.Adafactor"),
        (
            "--optimizer_args weight_decay=0.01 betas=0.9,0.95",
            "--optimizer_args betas=(0.90,0.95) weight_decay=1e-2",
        ),
        ("", "--network_dim 4 --optimizer_args"),
        ("--network_alpha 4", "--network_alpha 0"),
        ("", "--network_module networks.lora_wan --network_args"),
    ],
)
def test_a_run_with_the_same_settings_in_other_words_goes_on(tmp_path: Path, before: str, now: str) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 1, *before.split())

    for change in ([], ["--resume_changed"]):
        toy.train_toy(tmp_path, "--max_train_steps", 2, "--resume", "latest", *change, *now.split())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@dataclass(frozen=True)
class NamedFamily(toy.ToyFamily):
    """A model of a file."""

    file: str = ""

    @property
    def metadata(self) -> Mapping[str, str]:
        return {"sd_model_name": self.file}


def test_another_model_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy.write_caches(tmp_path)
    for count, name in enumerate(("a", "b"), 1):
        family = NamedFamily(file=f"{name}.safetensors")
        toy.train_toy(
            tmp_path, "--save_state", "--max_train_steps", count, "--resume", "latest", family=family
        )

    assert warnings_in(caplog) == [
        "the model's file was a.safetensors when the state was saved; it is b.safetensors from here on."
    ]


@dataclass(frozen=True)
class OwnOptions:
    """A family's own options."""

    task: str = field(default="small", metadata=IDENTITY)
    rope_func: str = field(default="default", metadata=HABIT)
    vae: str = field(default="vae.safetensors", metadata=FREE)


def test_options_of_the_family_are_compared_as_the_shared_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(
        tmp_path, "--save_state", "--max_train_steps", 2, family=toy.ToyFamily(options=OwnOptions())
    )

    with pytest.raises(OptionError, match="--task: small in the state, large now"):
        toy.train_toy(tmp_path, "--resume", "latest", family=toy.ToyFamily(options=OwnOptions(task="large")))
    assert not caplog.records
    other = OwnOptions(rope_func="comfy", vae="other")
    toy.train_toy(tmp_path, "--resume", "latest", family=toy.ToyFamily(options=other))
    assert warnings_in(caplog) == [
        "--rope_func was default when the state was saved; it is comfy from here on."
    ]


def test_a_state_of_a_version_that_recorded_less_goes_on_and_says_what_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 2)

    toy.train_toy(tmp_path, "--resume", "latest", family=toy.ToyFamily(options=OwnOptions()))

    (said,) = warnings_in(caplog)
    assert "does not say what the run that saved it had for --rope_func, --task" in said


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (7, 2), (9000, 1), (8192, 2)])
def test_the_batches_are_told_from_others_as_in_states_of_before(
    tmp_path: Path, count: int, batch_size: int
) -> None:
    table = make_table(tmp_path, batch_size=batch_size)
    order = BatchOrder(
        [TrainingItem(f"clip{index}", 4, table, (32, 32), TableCacheInfo("toy")) for index in range(count)], 3
    )
    names = "\n".join(",".join(item.key for item in batch) for batch in order.epoch(0))
    assert epoch_digest(order) == hashlib.sha256(names.encode()).hexdigest()[:12]


def test_samples_that_a_stopped_epoch_owed_are_made_when_it_goes_on(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=3)
    options = ["--sample_prompts", toy.write_prompts(tmp_path), "--sample_every_n_epochs", 1]
    options += ["--save_every_n_epochs", 1, "--save_state", "--resume", "latest", "--max_train_steps", 6]

    def die(_: torch.Tensor) -> None:
        raise toy.Killed

    with pytest.raises(toy.Killed):
        toy.train_toy(tmp_path, *options, family=toy.ToyFamily(on_decode=die))
    toy.train_toy(tmp_path, *options)

    marks = sorted(path.name.split("_")[1] for path in (tmp_path / "output" / "sample").iterdir())
    assert marks == ["e000001", "e000002"]


@pytest.mark.parametrize(
    "when", ["--sample_every_n_steps 2", "--sample_every_n_epochs 1", "--sample_at_first"]
)
def test_a_run_that_is_asked_to_end_while_sampling_makes_the_samples_later_with_the_same_weights(
    tmp_path: Path, when: str
) -> None:
    toy.write_caches(tmp_path, count=3)
    prompts = toy.write_prompts(tmp_path, "a cat --s 2 --d 1\na dog --s 2 --d 2\n")
    options = ["--sample_prompts", prompts, *when.split(), "--max_train_steps", 5, "--resume", "latest"]
    images: list[torch.Tensor] = []
    full = toy.train_toy(tmp_path, *options, family=toy.ToyFamily(on_decode=images.append))
    options += ["--output_dir", tmp_path / "stopped"]

    def interrupt(_: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # after the first picture, so the second is never finished

    found: list[torch.Tensor] = []
    assert not toy.train_toy(tmp_path, *options, family=toy.ToyFamily(on_decode=interrupt))
    again = toy.train_toy(tmp_path, *options, family=toy.ToyFamily(on_decode=found.append))

    assert all(torch.equal(here, there) for here, there in zip(found, images, strict=True))
    assert toy.same(full, again)


def write_foreign(
    folder: Path, network: Mapping[str, torch.Tensor], optimizer: object = None, is_ordered: bool = False
) -> Path:
    """A state of a known tuner. is_ordered: its network is in the file that keeps the order of tensors."""
    theirs = folder / "theirs"
    theirs.mkdir()
    if is_ordered:
        torch.save(dict(network), theirs / "pytorch_model.bin")
    else:
        save_file(dict(network), theirs / "model.safetensors", metadata={"format": "pt"})
    if optimizer is not None:
        torch.save(optimizer, theirs / "optimizer.bin")
    return theirs


@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_state_of_a_known_tuner_gives_weights_and_optimizer_and_counts_from_zero(
    is_ordered: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 3)
    network = toy.state_tensors(tmp_path / "output" / "x-state")["network"]
    modules = list(dict.fromkeys(name.partition(".")[0] for name in network))[::-1]  # in an order of its own
    network = {name: one for module in modules for name, one in network.items() if name.startswith(module)}
    names = [f"{module}.lora_{part}.weight" for module in modules for part in ("down", "up")]
    parameters = [torch.nn.Parameter(network[name]) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.999999, 0.999999))
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 1e6 * number)
    optimizer.step()
    state = optimizer.state_dict()
    resume = ["--resume", write_foreign(tmp_path, network, state, is_ordered)]

    still = ["--max_train_steps", 1, "--learning_rate", "1e-12", "--max_grad_norm", 0, "--save_state"]
    tensors = toy.train_toy(tmp_path, *resume, *still)

    assert all(torch.allclose(tensors[name], network[name], atol=1e-6) for name in network)
    saved = read_state(tmp_path / "output" / "x-state")
    assert isinstance(saved, SavedState)
    moments = [saved.optimizer["states"][f"network.{name}"]["exp_avg"].mean().item() for name in names]
    if is_ordered:  # after a step that changes them by a millionth
        assert moments == pytest.approx(list(map(float, range(8))), abs=0.01)
        assert "weights and optimizer are restored" in caplog.text
    else:
        assert max(moments) < 1
        assert "the weights alone are restored" in caplog.text
        assert "the order in which that program numbers the layers" in caplog.text


def test_a_state_with_more_modules_than_the_default_goes_on_with_them(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--save_state", "--max_train_steps", 1)
    network = toy.state_tensors(tmp_path / "output" / "x-state")["network"]
    down, up = torch.full((4, toy.WIDTH), 0.5), torch.full((toy.LATENT.channels, 4), 0.25)
    head = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    network = {**network, **{f"lora_unet_head.{name}": one for name, one in head.items()}}
    still = ["--max_train_steps", 1, "--learning_rate", "1e-12", "--save_state"]

    theirs = toy.train_toy(tmp_path, *still, "--resume", write_foreign(tmp_path, network))
    own = toy.train_toy(tmp_path, *still, "--max_train_steps", 2, "--resume", tmp_path / "output" / "x-state")

    for tensors in (theirs, own):
        assert tensors.keys() == network.keys()
        assert all(torch.allclose(tensors[name], network[name], atol=1e-6) for name in network)


def test_a_foreign_state_of_one_network_is_not_resumed_with_two(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = ["--resume", write_foreign(tmp_path, {"a": torch.zeros(1)}), "--lora_per_expert"]

    with pytest.raises(OptionError, match="is of one network, and --lora_per_expert trains two"):
        toy.train_toy(tmp_path, *words, family=toy.ToyFamily(experts=toy.TWO_EXPERTS))


def test_code_in_a_foreign_state_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    toy.write_caches(tmp_path)
    folder = write_foreign(tmp_path, {"a": torch.zeros(1)}, {"state": Payload()})

    with pytest.raises(CheckpointError, match=r"optimizer\.bin"):
        toy.train_toy(tmp_path, "--resume", folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
def test_two_processes_train_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Seven micro-batches: the last step of an epoch has three instead of four, two for one process and one
    for the other.
    """
    toy.write_caches(tmp_path, count=7)
    words = ["--network_args", "rank_dropout=0.3", "--validation_split", "0.01", "--save_state"]
    four = [*words, "--gradient_accumulation_steps", 4]
    expected = toy.train_toy(tmp_path, *four, "--max_train_steps", 6)

    two = [*words, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "two"]
    train_in_two_processes(tmp_path, 29611, *two, "--max_train_steps", 6)

    found = load_file(tmp_path / "two" / "x.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    # another spread over processes is no other run
    assert toy.train_toy(tmp_path, *four, "--max_train_steps", 7, "--resume", tmp_path / "two" / "x-state")


def train_in_two_processes(
    folder: Path, port: int, *arguments: object, environment: Mapping[str, str] = MappingProxyType({})
) -> None:
    # "gpu": several
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    launch += f"--mixed_precision no --dynamo_backend no --main_process_port {port}"
    script = ROOT / "tests" / "training" / "train_toy.py"
    environment = {"PYTHONPATH": str(ROOT), **environment}
    run_python(*launch.split(), script, folder, *arguments, environment=environment)


def test_a_respelled_value_of_the_same_meaning_resumes() -> None:
    saved, same, other = ({"--ltx_mode": mode, "--seed": 3} for mode in ("video", "v", "av"))

    before = _normalize_fixed_settings(saved, Ltx2TrainingOptions)

    assert before == _normalize_fixed_settings(same, Ltx2TrainingOptions)
    assert before != _normalize_fixed_settings(other, Ltx2TrainingOptions)
