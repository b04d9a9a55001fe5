"""The two schedules of MiniMax-H3: pictures and sound have noise levels of their own at each step."""

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from torch import Tensor, nn

from generation.denoise import denoise
from minimax_h3.configs import AUDIO_SHIFT, IMAGE_SHIFT, NOISE
from modules.flow.solvers import solver_for
from protocols.data import AudioVideoShapes, Conditions
from protocols.steps import NO_OVERRIDES, CompletedStep, Overrides, Section
from training.data.timesteps import Timesteps, shift_audio_timesteps

JOINT = AudioVideoShapes((2, 1, 2, 2), (3, 2, 4))
IMAGE, SOUND = torch.linspace(-2, 2, 8).view(1, 2, 1, 2, 2), torch.linspace(-1, 3, 24).view(1, 3, 2, 4)
EXACT = 1e-5  # float32, values up to 10; levels are shifted once or twice


class Curved:
    """A network that predicts data minus noise, not on a straight path: of each stream by itself."""

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        image, audio = JOINT.split(noisy)
        return JOINT.join(image.sin() - 1, audio.cos() + 0.5)


def theirs(shift: float, sample: Tensor, velocity_of: object) -> list[Tensor]:
    """The samples behind each of seven steps."""
    scheduler = MiniMaxH3Scheduler(shift)
    scheduler.set_timesteps(8)
    samples = []
    for time in scheduler.timesteps:
        sample = scheduler.step(velocity_of(sample), time, sample, return_dict=False)[0]  # type: ignore[operator]
        samples.append(sample)
    return samples


def test_euler_moves_each_stream_by_its_own_levels() -> None:
    """diffusers steps along data minus noise, the loop along noise minus data."""
    solver = solver_for("euler", 7, IMAGE_SHIFT, audio_shift=NOISE.audio_shift)
    section = Section(JOINT.join(IMAGE, SOUND), {}, overrides=Overrides(audio_video_shapes=JOINT))
    seen: list[CompletedStep] = []

    found = denoise(
        Curved(),
        lambda _: nn.Identity(),
        section,
        latents=section.noise,
        solver=solver,
        guidance=lambda step, predict, section: predict({})[0],
        watchers=[lambda done: bool(seen.append(done))],
    )

    image, audio = JOINT.split(found)
    expected = theirs(IMAGE_SHIFT, IMAGE, lambda sample: -(sample.sin() - 1))
    torch.testing.assert_close(image, expected[-1], atol=EXACT, rtol=EXACT)
    expected = theirs(AUDIO_SHIFT, SOUND, lambda sample: -(sample.cos() + 0.5))
    torch.testing.assert_close(audio, expected[-1], atol=EXACT, rtol=EXACT)
    assert seen[0].step.audio_sigma == 1
    last = JOINT.split(seen[-1].clean)[1]  # the last step leads to it
    torch.testing.assert_close(last, audio, atol=EXACT, rtol=EXACT)


def test_training_makes_sound_as_noisy_as_the_sampler_does() -> None:
    base = torch.tensor([0.1, 0.5, 0.9])
    images, audios = (shift * base / (1 + (shift - 1) * base) for shift in (IMAGE_SHIFT, AUDIO_SHIFT))

    times = shift_audio_timesteps(Timesteps(images, 1000 * images, levels=base), NOISE)

    torch.testing.assert_close(times.sigmas, audios, atol=1e-6, rtol=0)
    torch.testing.assert_close(times.timesteps, 1000 * audios, atol=1e-3, rtol=0)


def test_other_solvers_follow_one_schedule() -> None:
    with pytest.raises(ValueError, match="audio with its own needs Euler"):
        solver_for("unipc", 7, IMAGE_SHIFT, audio_shift=NOISE.audio_shift)
