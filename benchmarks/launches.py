"""Count the kernels that a training step starts, beside diffusers and PEFT.

    python benchmarks/launches.py
    python benchmarks/launches.py --only sdxl --max_operators 20

A fast GPU ends the kernels of a small image sooner than the host starts them, so that a step takes as long as
the host needs for its operators. They are counted on the CPU, in a tiny network in bf16 with a LoRA: the
forward pass with checkpointing, its backward pass, clipping and a step of AdamW. The baseline is diffusers'
class of the same sizes with a LoRA of PEFT on the same layers, the same steps and optimizer. Attention and
RMSNorm count as the single kernels that they are on CUDA, for both. Views are not counted.
benchmarks/traffic.py has the kernels of a released model (column `kernels`).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.traffic_count import FREE  # noqa: E402

RANK = 4
SIZE = (1, 4, 4, 5)  # latent frames, rows, columns, tokens of the text
ATTENTION = r"attn\d?\.(to_[qkv]|to_out\.0)"


class Operators(TorchDispatchMode):
    """Counts operators by name, without views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not func.is_view and not FREE.match(name):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """A network with a LoRA that is ready for a step: what computes its output, and the LoRA's factors."""

    predict: Callable[[], Tensor]
    parameters: Sequence[nn.Parameter]


@contextmanager
def fused_kernels() -> Iterator[None]:
    """While active, attention and RMSNorm are single operators that compute nothing.

    A mode would be off in the backward pass, in which blocks are computed again.
    """
    from modules.attention import sdpa
    from runtime.planning.kernels import KERNELS

    with (
        patch.object(sdpa, "MAX_SCORES_FOR_MATMUL", 0),  # a CPU's way for few tokens, as matrix products
        patch.object(functional, "rms_norm", KERNELS[functional.rms_norm]),
        patch.object(
            functional, "scaled_dot_product_attention", KERNELS[functional.scaled_dot_product_attention]
        ),
    ):
        yield


def count_step(step: Step) -> Counter[str]:
    """Return the operators of the second step, because the first creates the optimizer's states."""
    optimizer = torch.optim.AdamW(step.parameters, lr=1e-4, foreach=True)
    counts: Counter[str] = Counter()
    for _ in range(2):
        with Operators() as operators, fused_kernels():
            with torch.autocast("cpu", torch.bfloat16):
                output = step.predict()
            output.float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(step.parameters, 1.0, foreach=True)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts = operators.counts
    return counts


def prepare_ours(name: str) -> Step:
    """Return the transformer of tests/tiny/dits.py with our LoRA and checkpointing."""
    from networks.cast_factors import cast_before_pass, group_layers, join_groups
    from runtime.offload.checkpointing import checkpoint_blocks
    from tests.tiny.dits import dit_called

    tiny = dit_called(name)
    dit, network = tiny.with_lora(blocks=2)
    for name, parameter in dit.named_parameters():  # as a file is loaded
        if not tiny.spec.stays_float32(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    dit.train()
    for layer in network.layers:
        layer.min_in_place_numel = 0  # as in layers of released sizes
    join_groups(group_layers(dit, network.dit_layers(), tiny.spec.shared_inputs))  # as on CUDA
    cast_before_pass(dit, network.dit_layers(), tiny.spec.shared_inputs)
    checkpoint_blocks(dit, tiny.spec)
    inputs = tiny.inputs(SIZE, 1)
    return Step(lambda: dit(**inputs), list(network.parameters()))


def prepare_our_unet(kind: str) -> Step:
    """Return diffusers' U-Net, which we train too, with our LoRA and checkpointing."""
    from modules.speed_options import SDPA
    from networks.cast_factors import cast_before_pass, group_layers, join_groups
    from runtime.offload.checkpointing import checkpoint_blocks
    from stable_diffusion.attention import ChosenAttention
    from stable_diffusion.resnets import use_fewer_kernels
    from stable_diffusion.training_files import unet_spec
    from tests.networks.making import randomize
    from tests.tiny.loras import make_lora
    from tests.tiny.stable_diffusion import KINDS

    unet: Any = make_unet(kind)
    unet.spec = unet_spec(KINDS[kind].unet)
    unet.set_attn_processor(ChosenAttention(SDPA))  # as on CUDA
    use_fewer_kernels(unet)
    network = make_lora("lora", RANK, RANK, unet)
    randomize(network)
    network.attach()
    unet.to(torch.bfloat16).train()
    for layer in network.layers:
        layer.min_in_place_numel = 0
    join_groups(group_layers(unet, network.dit_layers(), unet.spec.shared_inputs))
    cast_before_pass(unet, network.dit_layers(), unet.spec.shared_inputs)
    checkpoint_blocks(unet, unet.spec)
    inputs = make_unet_inputs(kind)
    return Step(lambda: unet(**inputs).sample, list(network.parameters()))


def make_unet(kind: str) -> nn.Module:
    """Return the tiny U-Net of tests/tiny/stable_diffusion.py, frozen."""
    from diffusers import UNet2DConditionModel

    from tests.tiny.stable_diffusion import KINDS, unet_state

    unet: nn.Module = UNet2DConditionModel(**KINDS[kind].unet)
    unet.load_state_dict(unet_state(kind))
    return unet.requires_grad_(False)


def make_unet_inputs(kind: str) -> dict[str, Any]:
    """Return random inputs of a U-Net."""
    from tests.tiny.stable_diffusion import KINDS, TEXT_DIM

    inputs: dict[str, Any] = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, KINDS[kind].unet["cross_attention_dim"]),
    }
    if kind == "sdxl":
        sizes = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, TEXT_DIM), "time_ids": sizes}
    return inputs


def prepare_theirs(model: Any, targets: str, predict: Callable[[Any], Tensor]) -> Step:
    """Return a network of diffusers with a LoRA of PEFT and checkpointing.

    Args:
        model: Network.
        targets: Expression that matches the names of the layers that our LoRA is on.
        predict: What computes the network's output.
    """
    from peft import LoraConfig

    model.requires_grad_(False).to(torch.bfloat16).train()
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()  # as diffusers' training scripts do
    model.enable_gradient_checkpointing()
    return Step(lambda: predict(model), parameters)


def their_unet(kind: str) -> Step:
    """Return the baseline of Stable Diffusion: the layers that are trained by default there and here."""
    inputs = make_unet_inputs(kind)
    targets = rf".*(transformer_blocks\.\d+\.({ATTENTION}|ff\.net\.(0\.proj|2))|\.proj_(in|out))"
    return prepare_theirs(make_unet(kind), targets, lambda unet: unet(**inputs).sample)


def their_lumina() -> Step:
    """Return the baseline of Lumina."""
    from tests.lumina.making import in_diffusers
    from tests.tiny.dits import dit_called
    from tests.tiny.lumina import tiny_state

    given = dit_called("lumina").inputs(SIZE, 1)
    blocks = (
        rf"(layers|noise_refiner|context_refiner)\.\d+\.({ATTENTION}|feed_forward\.linear_\d|norm1\.linear)"
    )
    return prepare_theirs(
        in_diffusers(tiny_state(num_layers=2), 2),
        rf"{blocks}|norm_out\.linear_\d",
        lambda dit: dit(
            hidden_states=given["noisy"],
            timestep=given["times"],
            encoder_hidden_states=given["caption"],
            encoder_attention_mask=given["caption_mask"].bool(),
            return_dict=False,
        )[0],
    )


def their_z_image() -> Step:
    """Return the baseline of Z-Image."""
    from dataclasses import replace

    from tests.tiny.dits import dit_called
    from tests.tiny.z_image import CONFIG, tiny_state
    from tests.z_image.making import in_diffusers, predict_with

    given = dit_called("z_image").inputs(SIZE, 1)
    given["caption_mask"] = given["caption_mask"].bool()
    model = in_diffusers(tiny_state(num_layers=2), replace(CONFIG, num_layers=2))
    targets = r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w\d)"
    return prepare_theirs(model, targets, lambda dit: predict_with(dit, given))


def their_flux() -> Step:
    """Return the baseline of FLUX.1, whose layers for q, k and v are one layer here."""
    from dataclasses import replace

    from diffusers import FluxTransformer2DModel

    from tests.flux.making import run_there
    from tests.tiny.dits import dit_called
    from tests.tiny.flux import CONFIGS

    config = replace(CONFIGS["dev"], double_blocks=2, single_blocks=2)
    width = config.dim // config.num_heads
    side = 7 * width // 16
    model: Any = FluxTransformer2DModel(
        in_channels=config.token_dim,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=width,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim,
        pooled_projection_dim=config.pooled_dim,
        guidance_embeds=True,
        axes_dims_rope=(width - 2 * side, side, side),
    )
    given = dit_called("flux dev").inputs(SIZE, 1)
    blocks = (
        r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm1?(_context)?\.linear|proj_mlp|proj_out"
        r"|ff(_context)?\.net\.(0\.proj|2)"
    )
    targets = rf"(single_)?transformer_blocks\.\d+\.({blocks})"
    return prepare_theirs(model, targets, lambda dit: run_there(dit, given, 0))


def their_krea2() -> Step:
    """Return the baseline of Krea 2."""
    from tests.krea2.making import in_diffusers, predict_with
    from tests.tiny.dits import dit_called
    from tests.tiny.krea2 import tiny_state

    given = dit_called("krea2").inputs(SIZE, 1)
    given["text_mask"] = given["text_mask"].bool()
    model = in_diffusers(tiny_state(num_layers=2), 2)
    return prepare_theirs(model, "all-linear", lambda dit: predict_with(dit, given))


def their_qwen_image() -> Step:
    """Return the baseline of Qwen-Image."""
    from tests.qwen_image.making import in_diffusers, predict_with
    from tests.tiny.dits import dit_called
    from tests.tiny.qwen_image import tiny_state

    given = dit_called("qwen_image").inputs(SIZE, 1)
    given["text_mask"] = given["text_mask"].bool()
    model = in_diffusers(tiny_state(num_layers=2), num_layers=2)
    blocks = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2)"
    targets = rf"transformer_blocks\.\d+\.({blocks})"
    return prepare_theirs(model, targets, lambda dit: predict_with(dit, given))


def their_anima() -> Step:
    """Return the baseline of Anima, with diffusers' adapter of the text, which is frozen."""
    from tests.anima.making import (
        conditioner_in_diffusers,
        predict_in_diffusers,
        text_in_diffusers,
        transformer_in_diffusers,
    )
    from tests.tiny.anima import tiny_state
    from tests.tiny.dits import dit_called

    state = tiny_state(num_layers=2)
    given = dit_called("anima").inputs(SIZE, 1)
    adapter = conditioner_in_diffusers(state).to(torch.bfloat16)

    def predict(dit: Any) -> Tensor:
        with torch.no_grad():
            text = text_in_diffusers(adapter, given)
        return predict_in_diffusers(dit, given["noisy"], given["sigmas"], text)

    targets = rf"transformer_blocks\.\d+\.({ATTENTION}|ff\.net\.(0\.proj|2))"
    return prepare_theirs(transformer_in_diffusers(state, 2), targets, predict)


def their_ltx() -> Step:
    """Return the baseline of LTX-2.3, video and audio."""
    from dataclasses import replace

    from tests.ltx_2.test_model import in_diffusers
    from tests.ltx_2.tiny_dit import DIT_CONFIGS, dit_in_diffusers, dit_inputs, dit_state

    config = replace(DIT_CONFIGS["2.3"], num_layers=2)
    model = dit_in_diffusers("2.3", dit_state("2.3", num_layers=2), config=config)
    given = dit_inputs("2.3", SIZE, 1)
    attention = r"(audio_)?attn\d|audio_to_video_attn|video_to_audio_attn"
    targets = rf"transformer_blocks\.\d+\.({attention})\.(to_[qkv]|to_out\.0)"
    return prepare_theirs(
        model, targets, lambda dit: torch.cat([each.flatten(1) for each in in_diffusers(dit, given)], 1)
    )


# name of a row -> our step and diffusers'
ROWS: dict[str, tuple[Callable[[], Step], Callable[[], Step]]] = {
    "sdxl": (lambda: prepare_our_unet("sdxl"), lambda: their_unet("sdxl")),
    "sd1": (lambda: prepare_our_unet("sd1"), lambda: their_unet("sd1")),
    "lumina": (lambda: prepare_ours("lumina"), their_lumina),
    "z_image": (lambda: prepare_ours("z_image"), their_z_image),
    "flux dev": (lambda: prepare_ours("flux dev"), their_flux),
    "krea2": (lambda: prepare_ours("krea2"), their_krea2),
    "qwen_image": (lambda: prepare_ours("qwen_image"), their_qwen_image),
    "anima": (lambda: prepare_ours("anima"), their_anima),
    "ltx_2 2.3": (lambda: prepare_ours("ltx_2 2.3"), their_ltx),
}


def main() -> None:
    """Print the operators of each row, and those that ours starts most."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=ROWS, help="one row")
    parser.add_argument("--max_operators", type=int, default=0, help="operators that are listed; default 0")
    args = parser.parse_args()
    for name, (prepare, prepare_baseline) in ROWS.items():
        if args.only not in (None, name):
            continue
        ours, baseline = count_step(prepare()), count_step(prepare_baseline())
        ratio = ours.total() / baseline.total()
        print(f"{name}: {ours.total()} operators, diffusers and PEFT {baseline.total()}, ratio {ratio:.3f}")
        for operator, count in ours.most_common(args.max_operators):
            print(f"  {count:4d} {operator} (there {baseline[operator]})")


if __name__ == "__main__":
    main()
