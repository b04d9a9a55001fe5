"""A training step of Stable Diffusion against the same step in plain torch, diffusers and transformers."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from networks.builtin_networks import build_network
from protocols.data import SIZES, Batch
from protocols.loading import Placement
from protocols.requests import Prompt
from stable_diffusion.contract import SD1, SD2, SDXL
from stable_diffusion.family import StableDiffusion
from stable_diffusion.noise import VariedNoise, make_noise_spec, read_betas
from stable_diffusion.training_files import TrainingFiles
from stable_diffusion.training_options import LossWeightOptions
from tests.tiny.loras import network_options
from tests.tiny.stable_diffusion import tokenizer_folder, write_folder
from training.data.feed import NoiseSampler
from training.data.live import LiveTextEncoders
from training.loss import NoisyBatch
from training.noise_options import TimestepOptions
from training.targets.passes import training_loss

KINDS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
CAPTIONS = ("a red cat", "a cat " * 50)  # the second one takes two chunks of 75 tokens
CPU = torch.device("cpu")


def make_family(kind: str, folder: Path, predicts_v: bool = False, **settings: Any) -> StableDiffusion:
    checkpoint = write_folder(kind, folder / kind, velocity=predicts_v)
    files = TrainingFiles((KINDS[kind],), checkpoint, tokenizer_cache_dir=tokenizer_folder(folder / "tok"))
    noise = make_noise_spec(predicts_v, settings.pop("zero_terminal_snr", False))
    return StableDiffusion(files, noise, **settings)


def encode(family: StableDiffusion, captions: tuple[str, ...]) -> dict[str, Tensor]:
    """The outputs of all text encoders, B first."""
    tensors: dict[str, Tensor] = {}
    for encoder in family.text_encoders():
        encoder.load(CPU)
        rows = encoder.encode([Prompt(caption) for caption in captions])
        tensors |= {key: torch.stack([row[key] for row in rows]) for key in encoder.keys}  # type: ignore[misc]
    return tensors


def plain_encoders(kind: str, folder: Path) -> list[Any]:
    """The text encoders, as transformers loads them."""
    encoders: list[Any] = [CLIPTextModel.from_pretrained(folder / "text_encoder").eval()]
    if kind == "sdxl":
        encoders.append(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval())
    return encoders


def encode_plainly(
    kind: str, folder: Path, captions: tuple[str, ...], chunks: int, encoders: Sequence[Any] = ()
) -> dict[str, Tensor]:
    """The same by transformers: chunks of 75 ids between start and end, padded as each tokenizer says."""
    results: dict[str, Tensor] = {}
    for number, encoder in enumerate(encoders or plain_encoders(kind, folder)):
        ending = f"_{number + 1}" if number else ""
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{ending}")
        states, pooled = [], []
        for caption in captions:
            words = tokenizer(caption, add_special_tokens=False).input_ids[: 75 * chunks]
            parts = []
            for chunk in range(chunks):
                ids = words[75 * chunk : 75 * chunk + 75]
                row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
                row += [tokenizer.pad_token_id] * (77 - len(row))
                output = encoder(torch.tensor([row]), output_hidden_states=True)
                if kind == "sdxl":
                    parts.append(output.hidden_states[-2][0])
                else:
                    parts.append(output.last_hidden_state[0])
                if number and chunk == 0:
                    last = encoder.text_model.final_layer_norm(output.hidden_states[-1][0])
                    pooled.append(encoder.text_projection(last[row.index(tokenizer.eos_token_id)]))
            states.append(torch.cat([parts[0][:1], *(part[1:-1] for part in parts), parts[-1][-1:]]))
        name = f"hidden_state{number + 1}" if kind == "sdxl" else "hidden_state"
        results[name] = torch.stack(states)
        if pooled:
            results["pool2"] = torch.stack(pooled)
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_texts_are_those_of_transformers(kind: str, chunks: int, tmp_path: Path) -> None:
    family = make_family(kind, tmp_path, max_chunks=chunks)

    with torch.no_grad():
        ours = encode(family, CAPTIONS)
        theirs = encode_plainly(kind, tmp_path / kind, CAPTIONS, chunks)

    assert ours.keys() == theirs.keys() == family.text_keys
    for key, expected in theirs.items():
        # sums in another order, in float32
        torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-4)


def test_clip_skip_takes_an_earlier_layer_with_the_last_norm(tmp_path: Path) -> None:
    family = make_family("sd1", tmp_path, clip_skip=2)
    encoder = CLIPTextModel.from_pretrained(tmp_path / "sd1" / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "sd1" / "tokenizer")

    with torch.no_grad():
        ours = encode(family, ("a red cat",))["hidden_state"]
        ids = tokenizer("a red cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = encoder(ids, output_hidden_states=True).hidden_states[-2]
        expected = encoder.final_layer_norm(states)

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def make_batch(family: StableDiffusion, timesteps: tuple[int, ...]) -> NoisyBatch:
    generator = torch.Generator().manual_seed(3)
    shape = (len(timesteps), 4, 1, 8, 8)
    tensors: dict[str, Tensor] = {"latents": torch.randn(shape, generator=generator) * 5}
    with torch.no_grad():
        tensors |= encode(family, CAPTIONS[: len(timesteps)])
    if family.kind is SDXL:
        tensors[SIZES] = torch.tensor([[300.0, 100.0, 0.0, 21.0, 64.0, 64.0]]).repeat(len(timesteps), 1)
    sigmas = torch.tensor(family.noise.table)[list(timesteps)]
    return NoisyBatch(
        batch=Batch(tensors, CAPTIONS[: len(timesteps)], ("0", "1")[: len(timesteps)]),
        noise=torch.randn(shape, generator=generator),
        sigmas=sigmas,
        timesteps=torch.tensor(timesteps, dtype=torch.float32),
        weights=torch.ones(len(timesteps)),
    )


def plain_loss(
    unet: nn.Module, family: StableDiffusion, noisy_batch: NoisyBatch, zero_terminal_snr: bool = False
) -> Tensor:
    """The loss as a loop of diffusers writes it."""
    predicts_v = family.noise.predicts_v
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if predicts_v else "epsilon",
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    tensors = noisy_batch.batch.tensors
    latents = noisy_batch.batch.tensor("latents")[:, :, 0] * KINDS[family.name].latent_scale
    noise = noisy_batch.noise[:, :, 0]
    timesteps = noisy_batch.timesteps.long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    inputs: dict[str, Any] = {}
    if family.kind is SDXL:
        context = torch.cat([tensors["hidden_state1"], tensors["hidden_state2"]], dim=-1)  # type: ignore[list-item]
        added = {"text_embeds": tensors["pool2"], "time_ids": tensors[SIZES]}
        inputs = {"added_cond_kwargs": added}
    else:
        context = noisy_batch.batch.tensor("hidden_state")
    output = unet(noisy, timesteps, encoder_hidden_states=context, **inputs).sample
    target = scheduler.get_velocity(latents, noise, timesteps) if predicts_v else noise
    return nn.functional.mse_loss(output, target)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_embedded_in_float32_where_the_unet_computes_in_bf16(kind: str, tmp_path: Path) -> None:
    """Of 1333 bf16 makes 1336, of the timestep 801 800: diffusers rounds their embeddings alone."""
    family = make_family(kind, tmp_path)
    unet = family.load_dit(Placement(CPU, torch.bfloat16))
    noisy_batch = make_batch(family, (801, 437))
    tensors = {name: value.bfloat16() for name, value in noisy_batch.batch.tensors.items()}  # type: ignore[union-attr]
    numbers = {"timesteps": noisy_batch.timesteps}
    if kind == "sdxl":
        numbers[SIZES] = torch.tensor([[1333.0, 853.0, 0.0, 21.0, 1365.0, 1533.0]]).repeat(2, 1)

    def predict(changed: Mapping[str, Tensor]) -> Tensor:
        timesteps = changed["timesteps"]
        conditions = {**tensors, **{name: value for name, value in changed.items() if name == SIZES}}
        with torch.no_grad():
            return family.predict(unet, noisy_batch.noise.bfloat16(), timesteps, conditions)

    output = predict(numbers)
    for name, exact in numbers.items():
        assert not torch.equal(predict({**numbers, name: exact.bfloat16().float()}), output), name
    names = sorted(family.text_keys - {"pool2"})
    context = torch.cat([tensors[name] for name in names], dim=-1)
    added = {"text_embeds": tensors["pool2"], "time_ids": numbers[SIZES]} if kind == "sdxl" else None
    with torch.no_grad():
        expected = unet(
            noisy_batch.noise[:, :, 0].bfloat16(),
            numbers["timesteps"],
            encoder_hidden_states=context,
            added_cond_kwargs=added,
        ).sample
    assert torch.equal(output[:, :, 0], expected)


CASES: Mapping[str, tuple[str, bool, bool]] = {
    "sd1": ("sd1", False, False),
    "sd2, v": ("sd2", True, False),
    "sdxl": ("sdxl", False, False),
    "sdxl, v, zero terminal SNR": ("sdxl", True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_a_plain_loop(case: str, tmp_path: Path) -> None:
    """The gradients of both factors of each LoRA, from those of the whole weights."""
    kind, predicts_v, zero_terminal_snr = CASES[case]
    family = make_family(kind, tmp_path, predicts_v, zero_terminal_snr=zero_terminal_snr)
    timesteps = (20, 999)
    noisy_batch = make_batch(family, timesteps)
    dit = family.load_dit(Placement(CPU))
    network = build_network("networks.lora", network_options("lora", 2), dit, {})
    network.attach()
    generator = torch.Generator().manual_seed(5)
    for layer in network.layers:
        nn.init.normal_(layer.lora_up.weight, std=0.02, generator=generator)

    loss = training_loss(family, dit, noisy_batch, contextlib.nullcontext)
    loss.backward()

    plain = UNet2DConditionModel.from_pretrained(tmp_path / kind / "unet")
    weights = dict(plain.named_parameters())
    by_name = {name.removesuffix(".weight").replace(".", "_"): name for name in weights}
    with torch.no_grad():
        for name, layer in zip(network.names, network.layers, strict=True):
            weight = weights[by_name[name.removeprefix("lora_unet_")]]
            weight += (
                layer.scale * (layer.lora_up.weight.flatten(1) @ layer.lora_down.weight.flatten(1))
            ).view_as(weight)
    expected = plain_loss(plain, family, noisy_batch, zero_terminal_snr)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, layer in zip(network.names, network.layers, strict=True):
        gradient = weights[by_name[name.removeprefix("lora_unet_")]].grad
        assert gradient is not None
        gradient = gradient.flatten(1) * layer.scale
        up, down = layer.lora_up.weight, layer.lora_down.weight
        for factor, of_factor in (
            (up, gradient @ down.flatten(1).T),
            (down, up.flatten(1).T @ gradient),
        ):
            assert factor.grad is not None
            # relative to the largest: sums of thousands of products in another order
            scale = float(of_factor.detach().abs().max())
            torch.testing.assert_close(
                factor.grad.flatten(1),
                of_factor,
                rtol=1e-3,
                atol=2e-3 * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_text_encoders_learn_as_in_a_plain_loop(kind: str, tmp_path: Path) -> None:
    family = make_family(kind, tmp_path, max_chunks=2)
    noisy_batch = make_batch(family, (300, 700))
    dit = family.load_dit(Placement(CPU)).requires_grad_(False)
    encoders = family.text_encoders()
    texts = LiveTextEncoders(encoders, encoders)  # type: ignore[arg-type]
    texts.load(CPU)
    network = build_network("networks.lora", network_options("lora", 2), None, texts.networks)
    network.attach()
    generator = torch.Generator().manual_seed(5)
    for layer in network.layers:
        nn.init.normal_(layer.lora_up.weight, std=0.05, generator=generator)

    live = replace(noisy_batch, batch=texts.add_encoded_captions(noisy_batch.batch))
    training_loss(family, dit, live, contextlib.nullcontext).backward()

    plain = plain_encoders(kind, tmp_path / kind)
    weights = {}
    for prefix, encoder in zip(KINDS[kind].lora_prefixes, plain, strict=True):
        for path, module in encoder.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in path:
                inner = path.removeprefix("text_model.").replace(".", "_")
                weights[f"{prefix}_text_model_{inner}"] = module.weight
    assert weights.keys() == set(network.names)
    with torch.no_grad():
        for name, layer in zip(network.names, network.layers, strict=True):
            weights[name] += layer.scale * layer.lora_up.weight @ layer.lora_down.weight
    theirs = encode_plainly(kind, tmp_path / kind, CAPTIONS, 2, plain)
    batch = replace(noisy_batch.batch, tensors={**noisy_batch.batch.tensors, **theirs})
    unet = UNet2DConditionModel.from_pretrained(tmp_path / kind / "unet")
    plain_loss(unet, family, replace(noisy_batch, batch=batch)).backward()
    unread = 0
    for name, layer in zip(network.names, network.layers, strict=True):
        gradient = weights[name].grad
        if gradient is None:  # behind the state that is read
            unread += 1
            assert layer.lora_up.weight.grad is None or not layer.lora_up.weight.grad.any()
            continue
        expected = layer.scale * gradient @ layer.lora_down.weight.T
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(layer.lora_up.weight.grad, expected, rtol=2e-3, atol=2e-3 * scale)
    assert unread == (6 if kind == "sdxl" else 0)  # the last layer of CLIP-L


def test_order_of_the_six_sizes_matters(tmp_path: Path) -> None:
    family = make_family("sdxl", tmp_path)
    noisy_batch = make_batch(family, (500,))
    dit = family.load_dit(Placement(CPU))
    turned = noisy_batch.batch.tensor(SIZES)[:, [1, 0, 3, 2, 5, 4]]
    batch = replace(noisy_batch.batch, tensors={**noisy_batch.batch.tensors, SIZES: turned})

    with torch.no_grad():
        first = training_loss(family, dit, noisy_batch, contextlib.nullcontext)
        second = training_loss(family, dit, replace(noisy_batch, batch=batch), contextlib.nullcontext)

    assert abs(float(first - second)) > 1e-4


SHARES = torch.cumprod(1 - read_betas().double(), dim=0)
SNR = SHARES / (1 - SHARES)


@pytest.mark.parametrize(
    ("values", "predicts_v", "expected"),
    [
        ({"min_snr_gamma": 5.0}, False, SNR.clamp(max=5) / SNR),
        ({"min_snr_gamma": 5.0}, True, SNR.clamp(max=5) / (SNR + 1)),
        ({"scale_v_pred_loss_like_noise_pred": True}, True, SNR.clamp(max=1000) / (SNR.clamp(max=1000) + 1)),
        ({"debiased_estimation_loss": True}, False, SNR.clamp(max=1000) ** -0.5),
        ({"debiased_estimation_loss": True}, True, 1 / (SNR.clamp(max=1000) + 1)),
        ({"v_pred_like_loss": 0.5}, False, 1 + 0.5 * (SNR.clamp(max=1000) + 1) / SNR.clamp(max=1000)),
        (
            {"min_snr_gamma": 1.0, "debiased_estimation_loss": True},
            False,
            SNR.clamp(max=1) / SNR * SNR.clamp(max=1000) ** -0.5,
        ),
    ],
)
def test_weights_of_losses_follow_the_snr(values: dict[str, Any], predicts_v: bool, expected: Tensor) -> None:
    weights = LossWeightOptions.from_defaults(**values)
    spec = make_noise_spec(predicts_v, weights=weights)

    # float32 betas against float64: the first SNR differs by 1e-4
    torch.testing.assert_close(torch.tensor(spec.loss_factors).double(), expected, rtol=5e-4, atol=1e-9)
    rescaled = make_noise_spec(predicts_v, True, weights=weights)
    assert rescaled.loss_factors == spec.loss_factors  # of the betas before they are rescaled
    assert rescaled.table[-1] == 1.0


def test_a_batch_gets_the_weights_of_its_timesteps() -> None:
    spec = make_noise_spec(False, weights=LossWeightOptions.from_defaults(min_snr_gamma=5.0))
    batch = Batch({"latents": torch.zeros(4, 4, 1, 8, 8)}, ("",) * 4, ("",) * 4)
    times = TimestepOptions.from_defaults(timestep_sampling="uniform", min_timestep=7, max_timestep=8)

    noisy = NoiseSampler(times, 0, noise_spec=spec, weighted_by="nothing").add_noise(batch, 0, 0)

    assert noisy.timesteps.tolist() == [7] * 4
    torch.testing.assert_close(noisy.weights, torch.full((4,), spec.loss_factors[7]))


def test_timesteps_are_uniform_and_leave_the_upper_bound_out() -> None:
    spec = make_noise_spec(False)
    batch = Batch({"latents": torch.zeros(6000, 4, 1, 1, 1)}, ("",) * 6000, ("",) * 6000)
    times = TimestepOptions.from_defaults(timestep_sampling="uniform", min_timestep=10, max_timestep=16)

    noisy = NoiseSampler(times, 0, noise_spec=spec, weighted_by="nothing").add_noise(batch, 0, 0)

    counts = torch.bincount(noisy.timesteps.long(), minlength=17)
    assert counts[:10].sum() == counts[16:].sum() == 0
    assert counts[10:16].min() > 850  # of 1000 each, with a standard deviation of 29
    torch.testing.assert_close(noisy.sigmas, torch.tensor(spec.table)[noisy.timesteps.long()])


def test_noise_gets_its_offset_before_coarser_noise() -> None:
    noise = torch.randn(2, 4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = torch.full_like(noise, -2.0)
    vary = VariedNoise(0.1, adaptive_scale=0.05, levels=2, discount=0.5)

    varied = vary(noise, latents, torch.Generator().manual_seed(2))

    generator = torch.Generator().manual_seed(2)
    offset = 0.1 + 0.05 * 2
    expected = noise + offset * torch.randn((2, 4, 1, 1, 1), generator=generator)
    for level in range(2):
        ratio = 2 + 2 * torch.rand((), generator=generator).item()
        side = int(16 / ratio**level)
        coarse = torch.randn((2, 4, side, side), generator=generator)
        fine = nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
        expected = expected + 0.5**level * fine[:, :, None]
    torch.testing.assert_close(varied, expected / expected.std())
    only_offset = VariedNoise(0.1)(noise, latents, torch.Generator().manual_seed(2)) - noise
    assert torch.allclose(only_offset.std(dim=(-2, -1)), torch.zeros(()), atol=1e-6)
