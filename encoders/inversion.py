"""Textual inversion: train the embedding vectors of a new word for each text encoder of a model.

Only the new rows of the token embeddings are trained, and only these are in the optimizer.
Source: Gal et al. 2022, arXiv 2208.01618.
"""
# Letters: V vectors of the word, C width of a text encoder

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from checkpoints.embedding_files import read_embedding
from checkpoints.opening import open_checkpoint
from checkpoints.writing import stream_tensors
from encoders.new_words import (
    GrowingEmbedding,
    ModelWord,
    NewWord,
    WordEncoder,
    compile_words,
    select_vectors,
    takes_words,
)
from modules.console import format_count, quiet
from modules.errors import CheckpointError, DatasetError, OptionError
from protocols.bundled_embeddings import WordContent, find_words, is_word_embedding
from protocols.family import TextEncoder
from protocols.family_networks import CustomNetwork, DefaultRate
from protocols.loading import TensorInfo
from protocols.new_tokens import WordToLearn

logger = logging.getLogger(__name__)

CALLED = "textual inversion"
DEFAULT_RATE = DefaultRate(1e-4, "1e-3", 2e-2)  # each step changes a vector by about the learning rate
LOUD = 3.0  # warn if a vector's norm exceeds this multiple of the mean norm, as it then dominates the prompt


class LearnedWordVectors(nn.Module):
    """A word's trained vectors: one parameter, V C, for each tensor name in files."""

    def __init__(self, word: WordToLearn, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.word = word
        self.mean_norms: dict[str, float] = {}  # name -> mean norm of the encoder's known token embeddings
        for name, tensor in vectors.items():
            self.register_parameter(name, Parameter(tensor))

    def prepare_optimizer_params(self, learning_rate: float) -> tuple[list[dict[str, Any]], list[str]]:
        """Return one parameter group with all vectors, and its name for the logs."""
        return [{"params": [*self.parameters()], "lr": learning_rate}], [CALLED]

    def join(self, names: Sequence[str]) -> Tensor:
        """Concatenate the vectors stored under several names."""
        return torch.cat([self.get_parameter(name) for name in names])

    def set_multiplier(self, multiplier: float) -> None:
        """Do nothing: prompts are encoded before the forward pass, which cannot scale the word's vectors."""

    def log_norms(self) -> None:
        """Log the norm of each vector and the mean norm of known tokens; warn if a vector is much longer."""
        for name, vectors in self.named_parameters():
            norms = vectors.detach().float().norm(dim=1).tolist()
            mean_norm = self.mean_norms[name]
            text = ", ".join(f"{norm:.3g}" for norm in norms)
            if max(norms) > LOUD * mean_norm:
                logger.warning(
                    "%s: the vectors of %s have the norms %s, known words %.3g on average. Such a word "
                    "drowns out all others in a prompt: lower %s, or use an earlier file.",
                    name,
                    self.word.text,
                    text,
                    mean_norm,
                    self.word.option_names.rate,
                )
            else:
                logger.info(
                    "%s: norms of the vectors of %s: %s; of known words: %.3g",
                    name,
                    self.word.text,
                    text,
                    mean_norm,
                )


def report_norms(module: nn.Module) -> None:
    """Log the norms of a trained word's embedding vectors; `module` is a `LearnedWordVectors`."""
    assert isinstance(module, LearnedWordVectors)
    module.log_norms()


def write_vectors(
    module: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write the vectors, and log their norms.

    Args:
        module: Module with the vectors.
        path: Path of the file.
        dtype: Dtype of the file; None keeps the vectors' dtype.
        metadata: Metadata of the file.
    """
    report_norms(module)
    tensors = {name: vectors.detach() for name, vectors in module.named_parameters()}
    infos = {}
    for name, vectors in tensors.items():
        infos[name] = TensorInfo(dtype or vectors.dtype, tuple(vectors.shape))
    stream_tensors(path, infos, lambda name: tensors[name].to(infos[name].dtype), metadata)


def _leave_command(file: Path, sample: Mapping[str, Any], base: Sequence[str]) -> Sequence[str]:
    """Return the generation command unchanged: the LoRA's file also contains the learned word."""
    return base


@dataclass(frozen=True)
class InvertedEncoder:
    """Name and tokenizer of a text encoder, for textual inversion before the encoder is loaded."""

    vector_key: str  # key of its vectors in files
    embedding: str  # name of the weight of its token embeddings
    tokenize: Callable[[str], list[int]]  # without special tokens; [] if the text has no tokens
    # keys of separate vectors for several layers of the trained model, V C each; (): one set of vectors
    layer_keys: tuple[str, ...] = ()

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Keys of this encoder's vectors in files, one for each set of vectors."""
        return self.layer_keys or (self.vector_key,)


class Inversion:
    """Textual inversion in a training run: the word and its initial vectors."""

    def __init__(
        self,
        word: WordToLearn,
        encoders: Sequence[InvertedEncoder],
        read_vectors: Callable[[Path, str], Mapping[str, Tensor] | None],
    ) -> None:
        """Set up an inversion; no file is read.

        Args:
            word: The word to learn.
            encoders: Names and tokenizers of the text encoders, in the order in which the model uses them.
            read_vectors: Reads the vectors from an embedding file or from a LoRA with the word; returns them,
                each V C, by the keys of the encoders, or None for a LoRA without the word. The second
                argument is the option that names the file.
        """
        self.word_options = word
        self.encoders = encoders
        self.read_vectors = read_vectors
        self.word = NewWord(word.text, word.count)

    def describe(self) -> CustomNetwork:
        """Describe this inversion as a network that is trained next to a LoRA."""
        word = self.word
        encoders = {1: "the text encoder", 2: "both text encoders"}[len(self.encoders)]
        return CustomNetwork(
            label=CALLED,
            description=f"the word {word.text}: {format_count(word.count, 'vector')} for {encoders}",
            architecture_suffix="textual-inversion",
            make=self.make,
            check=self.check,
            generate=_leave_command,  # the LoRA's file contains the word too
            default_rate=DEFAULT_RATE,
            write=write_vectors,
            report=report_norms,
            start_option="weights",
            values={
                "ss_token_string": word.text,
                "modelspec.trigger_phrase": word.text,
                "ss_num_vectors_per_token": word.count,
            },
            in_text_encoders=True,
            check_captions=self.check_captions,
            write_prompt=self.write_prompt,
        )

    def write_prompt(self, file: Path, sample: Mapping[str, Any], sentences: Sequence[str]) -> str:
        """Return a prompt for an embedding file, whose word in prompts is its file name.

        Args:
            file: The trained file.
            sample: Values of a sample, by the field names of `Request`.
            sentences: Sentences with the word, the first of which is used if the sample has no prompt.
        """
        word = self.word
        # longest first: the word is a prefix of the names of its single vectors
        names = sorted(word.list_ids(0), key=len, reverse=True)
        stem_names = [f"{file.stem}{name.removeprefix(word.text)}" for name in names]
        pattern = compile_words(names)
        prompt = sample.get("prompt") or ""
        # a caption of a training item need not have the word; a user's prompt is kept without it
        is_caption = "example" in sample
        if not prompt or (is_caption and not pattern.search(prompt)):
            prompt = sentences[0] if sentences else f"a photo of {word.text}"
        # the pattern has a group for each name
        return pattern.sub(lambda found: stem_names[(found.lastindex or 1) - 1], prompt)

    def make(self, networks: nn.Module, with_values: bool) -> LearnedWordVectors:
        """Create the word's vectors and connect them to the text encoders.

        Random vectors are drawn from torch's default generator.

        Args:
            networks: Networks of the text encoders, in the order of `encoders`.
            with_values: Whether to initialize the vectors; otherwise they are zero.

        Raises:
            UserError: If the initial values cannot be read, or have a different width than the token
            embeddings.
        """
        token_embeddings: dict[str, GrowingEmbedding] = {}  # by the encoder's key in files
        for network, encoder in zip(networks.children(), self.encoders, strict=True):
            embedding = network.get_submodule(encoder.embedding.removesuffix(".weight"))
            assert isinstance(embedding, GrowingEmbedding)
            token_embeddings[encoder.vector_key] = embedding
        if with_values:
            known_embeddings = {
                key: embedding.weight.detach().float().cpu() for key, embedding in token_embeddings.items()
            }
            initial = self._make_initial(known_embeddings)
        else:
            initial = self._make_zeros(token_embeddings)
        vectors = LearnedWordVectors(self.word_options, initial)
        for encoder in self.encoders:
            embedding = token_embeddings[encoder.vector_key]
            # called in each forward pass of the encoder: returns the current vectors of the new tokens
            embedding.get_new_vectors = partial(vectors.join, encoder.vector_keys)
            if with_values:
                # for the log, to compare with the norms of trained vectors
                mean_norm = float(embedding.weight.detach().float().norm(dim=1).mean())
                vectors.mean_norms |= dict.fromkeys(encoder.vector_keys, mean_norm)
        return vectors

    def _make_zeros(self, token_embeddings: Mapping[str, GrowingEmbedding]) -> dict[str, Tensor]:
        """Return vectors of zeros, each V C, by their keys in embedding files."""
        zeros: dict[str, Tensor] = {}
        for encoder in self.encoders:
            width = token_embeddings[encoder.vector_key].embedding_dim
            for key in encoder.vector_keys:
                zeros[key] = torch.zeros(self.word.count, width)
        return zeros

    def _make_initial(self, known_embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial vectors, each V C, by their keys in embedding files."""
        # They come from a file, or else from the initial word, or else are random.
        from_file = self._read_weights()
        if from_file is not None:
            self._check_widths(from_file, known_embeddings)
            keys = [key for encoder in self.encoders for key in encoder.vector_keys]
            return {key: from_file[key].clone() for key in keys}
        if self.word_options.init_word is None:
            return self._draw_random(known_embeddings)
        initial: dict[str, Tensor] = {}
        for number, encoder in enumerate(self.encoders, start=1):
            # One token id of the initial word per vector; warn if their numbers differ
            # `encoder_number` counts the text encoders from 1, for the warning.
            ids = self._tokenize_init_word(encoder)
            count = self.word.count
            if len(ids) != count:
                option_names = self.word_options.option_names
                logger.warning(
                    "%s %r has %s in text encoder %d, but %s is %d: its vectors are %s.",
                    option_names.init_word,
                    self.word_options.init_word,
                    format_count(len(ids), "token"),
                    number,
                    option_names.count,
                    count,
                    "repeated" if len(ids) < count else "cut",
                )
            ids = [ids[index % len(ids)] for index in range(count)]  # repeated from the start, or cut
            vectors = known_embeddings[encoder.vector_key][ids]
            initial |= {key: vectors.clone() for key in encoder.vector_keys}
        return initial

    def _draw_random(self, known_embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return random vectors with the standard deviation of the known tokens' embeddings, by key."""
        initial = {}
        for encoder in self.encoders:
            known = known_embeddings[encoder.vector_key]
            for key in encoder.vector_keys:
                initial[key] = torch.randn(self.word.count, known.shape[1]) * known.std()
        return initial

    def _tokenize_init_word(self, encoder: InvertedEncoder) -> list[int]:
        """Return the token ids of the initialization word; raise OptionError if an encoder has none."""
        init_word = self.word_options.init_word or ""
        ids = encoder.tokenize(init_word)
        if not ids:
            raise OptionError(
                f"{self.word_options.option_names.init_word} {self.word_options.init_word!r}: the text "
                "encoder has no token for it. Pass a known word, or omit it for random vectors"
            )
        return ids

    def _read_weights(self) -> Mapping[str, Tensor] | None:
        """Read the initial vectors from an embedding file or a LoRA; None if no option gives such a file."""
        option_names = self.word_options.option_names
        path = self.word_options.weights or self.word_options.lora
        option = "--network_weights" if self.word_options.weights is None else option_names.weights
        if path is None:
            return None
        vectors = self.read_vectors(path, option)
        if vectors is None:  # a LoRA without the word
            return None
        # Raise CheckpointError if a file lacks vectors for an encoder, or has another number of vectors
        needed_keys = [key for encoder in self.encoders for key in encoder.vector_keys]
        missing = [key for key in needed_keys if key not in vectors]
        if missing:
            raise CheckpointError(f"{option} {path}: it has no {' and no '.join(missing)}.", path)
        num_stored = len(next(iter(vectors.values())))
        count_option = self.word_options.option_names.count
        if num_stored != self.word.count:
            raise CheckpointError(
                f"{option} {path}: it has {format_count(num_stored, 'vector')}, but {count_option} is "
                f"{self.word.count}. Pass {count_option} {num_stored}.",
                path,
            )
        return vectors

    def _check_widths(self, vectors: Mapping[str, Tensor], known_embeddings: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if vectors from a file do not match the width of their text encoder."""
        for encoder in self.encoders:
            width = vectors[encoder.vector_keys[0]].shape[1]
            expected = known_embeddings[encoder.vector_key].shape[1]
            if width != expected:
                path = self.word_options.weights or self.word_options.lora
                raise CheckpointError(
                    f"{path}: its vectors {encoder.vector_keys[0]} have width {width}, but this text encoder "
                    f"takes width {expected}. Pass a file that was made for this model.",
                    path,
                )

    def check(self) -> None:
        """Raise UserError if the word is already a token, or if its vectors cannot be initialized."""
        for encoder in self.encoders:
            if len(encoder.tokenize(self.word.text)) == 1:
                raise OptionError(
                    f"{self.word_options.option_names.word} {self.word.text}: the text encoder knows this "
                    f"word already. Pass a new one, such as my-{self.word.text}"
                )
            if self.word_options.init_word is not None:
                self._tokenize_init_word(encoder)
        self._read_weights()

    def check_captions(self, captions: Sequence[str]) -> str:
        """Return a warning about a dataset's captions without the new word; "" if all contain it.

        Raises:
            DatasetError: If no caption contains the word.
        """
        names = self.word.list_ids(0)  # the word, and its single vectors, which also count
        pattern = compile_words([*names])
        lacking = [caption for caption in captions if not pattern.search(caption)]
        word = self.word.text
        if len(lacking) == len(captions):
            option_names = self.word_options.option_names
            alternative = ""
            if option_names.without_captions:
                alternative = f", or {option_names.without_captions}, which needs no captions"
            raise DatasetError(
                f"{option_names.word} {word}: no caption has this word, so that nothing would be learned. "
                f'Write it into the captions, or set trigger_word = "{word}" in the dataset\'s configuration'
                f"{alternative}"
            )
        if not lacking:
            return ""
        count = format_count(len(captions), "caption")
        return f"{len(lacking)} of {count} lack the word {word} and teach it nothing, such as {lacking[0]!r}."


def find_in_lora(path: Path, word: str) -> WordContent | None:
    """Return a word's embedding vectors from a LoRA file; None if `path` is not a LoRA or lacks the word."""
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return None
    with open_checkpoint(path) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors if is_word_embedding(name)}
    return find_words(stored).get(word)


def invert_encoders(word: WordToLearn, encoders: Sequence[TextEncoder]) -> CustomNetwork:
    """Return a word's trainable vectors for all text encoders that support additional words.

    Args:
        word: The word to learn.
        encoders: All text encoders of a model; others tokenize the word as plain text.
    """
    word_encoders = [encoder for encoder in encoders if takes_words(encoder)]
    inverted = []
    for encoder in word_encoders:
        inverted.append(InvertedEncoder(encoder.word_keys[0], encoder.embedding, encoder.tokenize_word))
    return Inversion(word, inverted, partial(_read_start_vectors, word, word_encoders)).describe()


def _read_start_vectors(
    word: WordToLearn, encoders: Sequence[WordEncoder], path: Path, option: str
) -> Mapping[str, Tensor] | None:
    """Return a word's initial vectors by encoder key; None if a LoRA does not contain the word."""
    content = find_in_lora(path, word.text)
    if content is None and word.weights is None:  # `path` is a LoRA to continue training
        return None
    if content is None:
        content = read_embedding(path, option)
    stored_word = ModelWord(word.text, content=content, source=path, option=option)
    with quiet():  # `select_vectors` logs words that prompts may use
        return select_vectors(stored_word, encoders)
