"""Audio of references: read at its own rate, cut, then resampled, as in the released pipeline.

Source: torchaudio's windowed sinc interpolation, which the released pipeline uses (Smith, "Digital Audio
Resampling", with a Hann window of 6 zero crossings).
"""
# Letters: S samples

import math
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from minimax_h3.audio import CHANNELS, RATE
from modules.errors import MediaError
from modules.media.samples import read_beginning

CROSSINGS = 6  # zero crossings of the filter on each side
ROLLOFF = 0.99  # fraction of the frequency band that passes


def read_reference_audio(path: Path, seconds: float) -> Tensor:
    """Read the first seconds of a file's audio, 1 2 S float32 at the audio VAE's sample rate.

    Raises MediaError if there is none, or it cannot be read.
    """
    track = read_beginning(path, seconds, CHANNELS)
    if track is None or not track.samples.size:
        raise MediaError(f"{path} has no audio. Pass a file with audio")
    samples = torch.from_numpy(track.samples)
    if len(samples) == 1:
        samples = samples.expand(CHANNELS, -1)
    return resample(samples, track.rate, RATE).unsqueeze(0)


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample audio, channels x S, by a low-pass filter evaluated at the new sample positions.

    `rate` and `new_rate` are samples per second, before and after.
    """
    if rate == new_rate:
        return samples.contiguous()
    divisor = math.gcd(rate, new_rate)
    step = rate // divisor
    count = new_rate // divisor  # new samples for each `step` old ones
    filters = _make_low_pass_filters(step, count)
    reach = (filters.shape[1] - step) // 2  # how far a filter extends beyond its `step` samples
    # `step` more at the end, so that the last new samples are computed too
    padded = functional.pad(samples, (reach, reach + step))
    resampled = functional.conv1d(padded.unsqueeze(1), filters.unsqueeze(1), stride=step)
    by_channel = resampled.mT.flatten(1)  # from channels x count x S / step to channels x new samples
    length = math.ceil(count * samples.shape[1] / step)
    return by_channel[:, :length].contiguous()


def _make_low_pass_filters(step: int, count: int) -> Tensor:
    """Return the filters that resample audio, one for each of `count` new samples."""
    # `step` old samples last as long as `count` new ones. The result is count x (2 reach + step) float32.
    band = min(step, count) * ROLLOFF
    reach = math.ceil(CROSSINGS * step / band)  # old samples on each side of a new one
    old = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    new = (torch.arange(count, dtype=torch.float32) / count).double()  # rounded, as released
    times = ((old - new[:, None]) * band).clamp(-CROSSINGS, CROSSINGS)
    window = torch.cos(times * math.pi / (2 * CROSSINGS)).square()
    return (torch.sinc(times) * window * (band / step)).float()
