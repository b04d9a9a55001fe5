"""Sound of references: read at its own rate, cut, then resampled, as the released pipeline does.

Source: torchaudio's windowed sinc interpolation, which the released pipeline uses (Smith, "Digital Audio
Resampling", with a Hann window of 6 zero crossings).
"""
# Letters: S samples

import math
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from minimax_h3.sound import CHANNELS, RATE
from modules.errors import MediaError
from modules.media.samples import read_beginning

CROSSINGS = 6  # zero crossings of the filter on each side
ROLLOFF = 0.99  # share of the band that passes


def read_reference_sound(path: Path, seconds: float) -> Tensor:
    """Return the first seconds of a file's sound: 1 2 S float32 at the rate of the sound VAE.

    Raises MediaError if there is none, or it cannot be read.
    """
    track = read_beginning(path, seconds, CHANNELS)
    if track is None or not track.samples.size:
        raise MediaError(f"{path} has no sound. Give a file with sound")
    samples = torch.from_numpy(track.samples)
    if len(samples) == 1:
        samples = samples.expand(CHANNELS, -1)
    return resample(samples, track.rate, RATE).unsqueeze(0)


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Return sound, channels x S, at another rate: a low-pass filter evaluated at the new places.

    rate, wanted: samples a second, before and after.
    """
    if rate == wanted:
        return samples.contiguous()
    shared = math.gcd(rate, wanted)
    step, count = rate // shared, wanted // shared  # `count` new samples for each `step` old ones
    band = min(step, count) * ROLLOFF
    reach = math.ceil(CROSSINGS * step / band)  # old samples on each side that count
    old = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    new = torch.arange(count, dtype=torch.float64) / count
    times = ((old - new[:, None]) * band).clamp(-CROSSINGS, CROSSINGS)
    window = torch.cos(times * math.pi / (2 * CROSSINGS)).square()
    filters = (torch.sinc(times) * window * (band / step)).float()
    padded = functional.pad(samples, (reach, reach + step))
    made = functional.conv1d(padded.unsqueeze(1), filters.unsqueeze(1), stride=step)  # channels count S/step
    length = math.ceil(count * samples.shape[1] / step)
    return made.mT.flatten(1)[:, :length].contiguous()
