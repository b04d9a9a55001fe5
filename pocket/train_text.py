"""Train the pocket text encoder, in its own short loop. Called by pocket/train.py.

A tiny umT5 learns to predict, at every token, what the clip shows: color, shape, direction, speed and size
of the thing that the token belongs to, the ground, and the token itself, so that an unknown word leaves a
trace too.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from checkpoints.writing import save_tensors
from encoders.t5_network import T5Config, T5Network
from modules.atomic_write import write_text
from modules.seeds import derive_seed
from pocket import drawing
from pocket.captions import WORDINGS, caption

logger = logging.getLogger(__name__)

CONFIG = T5Config(
    vocabulary=512, dim=64, attention_dim=64, ffn_dim=128, num_heads=2, num_layers=2, num_buckets=32
)
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # padding is 0 and end is 1, as in umT5
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-&"
STEPS, BATCH, RATE = 1500, 64, 2e-3
INVENTED = 0.2  # share of captions in which one word is replaced by an invented one
ABSENT = -100  # class of what a caption does not mention: no loss

HEADS: dict[str, tuple[str, ...]] = {
    "colour": tuple(drawing.COLOURS),
    "shape": drawing.SHAPES,
    "direction": tuple(drawing.DIRECTIONS),
    "speed": tuple(drawing.SPEEDS),
    "width": tuple(drawing.WIDTHS),
    "ground": ("", *drawing.GROUNDS),  # "": not mentioned
}


@dataclass(frozen=True)
class Example:
    """A caption as token ids, and the class of every token for each head."""

    ids: Tensor  # n
    classes: dict[str, Tensor]  # n each


def train(folder: Path, steps: int = STEPS, seed: int = 0) -> Path:
    """Write `tokenizer/` and t5.safetensors into `folder`; return the path of the latter."""
    tokenizer = make_tokenizer(seed)
    write_text(folder / "tokenizer" / "tokenizer.json", tokenizer.to_str(pretty=False))
    torch.manual_seed(seed)
    t5 = T5Network(CONFIG)
    heads = nn.ModuleDict({name: nn.Linear(CONFIG.dim, len(values)) for name, values in HEADS.items()})
    heads["token"] = nn.Linear(CONFIG.dim, CONFIG.vocabulary)
    optimizer = torch.optim.AdamW([*t5.parameters(), *heads.parameters()], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        random = np.random.default_rng(derive_seed(seed, "captions", step))
        examples = [example(random, tokenizer) for _ in range(BATCH)]
        losses = heads_losses(t5, heads, examples)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(t5.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            logger.info(
                "text %d/%d %s",
                step + 1,
                steps,
                " ".join(f"{name} {value:.3f}" for name, value in losses.items()),
            )
    path = folder / "t5.safetensors"
    save_tensors(path, {name: tensor.to(torch.bfloat16) for name, tensor in t5.state_dict().items()})
    return path


def heads_losses(t5: T5Network, heads: nn.ModuleDict, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the cross-entropy of each head over all tokens."""
    embeds = torch.cat(t5([each.ids for each in examples]))  # L C
    targets = {name: torch.cat([each.classes[name] for each in examples]) for name in HEADS}
    targets["token"] = torch.cat([each.ids for each in examples])
    return {
        name: F.cross_entropy(heads[name](embeds), target, ignore_index=ABSENT)
        for name, target in targets.items()
    }


def example(random: np.random.Generator, tokenizer: Tokenizer) -> Example:
    """Draw a scene and return its caption with classes. Tokens after "and" belong to the second thing."""
    scene = drawing.scene(random, two=0.25)
    text = caption(random, scene)
    told = {name: [getattr(thing, name) for thing in scene.things] for name in HEADS if name != "ground"}
    for name in ("speed", "width"):  # "" also if the caption leaves it out
        told[name] = [value if value in text else "" for value in told[name]]
    told["ground"] = [scene.ground if scene.ground in text else ""] * len(scene.things)
    if random.uniform() < INVENTED:
        name = drawing.pick(random, ("colour", "shape", "direction"))
        text = text.replace(told[name][0], invented_word(random), 1)
        told[name][0] = "invented"
    encoding = tokenizer.encode(text)
    border = text.index(" and ") if len(scene.things) > 1 else len(text)
    owners = [int(start >= border and end > start) for start, end in encoding.offsets]
    classes = {
        name: torch.tensor(
            [
                HEADS[name].index(value) if value in HEADS[name] else ABSENT
                for value in (values[own] for own in owners)
            ]
        )
        for name, values in told.items()
    }
    return Example(torch.tensor(encoding.ids), classes)


def invented_word(random: np.random.Generator) -> str:
    """Make a word of three to eight letters that means nothing."""
    length = int(random.integers(3, 9))
    return "".join(
        drawing.pick(random, "aeiou" if index % 2 else "bcdfghjklmnprstvwz") for index in range(length)
    )


def make_tokenizer(seed: int) -> Tokenizer:
    """Make a lower-case tokenizer that keeps the captions' words whole.

    All other words are split down to letters. The end token is the last of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    random = np.random.default_rng(derive_seed(seed, "tokenizer"))
    texts = [caption(random, drawing.scene(random, two=0.2)) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=["▁", *CHARACTERS],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *WORDINGS], trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return tokenizer
