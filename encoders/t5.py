"""T5-XXL's text encoder for the shared loops: it turns each prompt into a fixed number of states.

A LoRA is applied to the linear layers of `blocks` (168 in T5-XXL), which `T5Network.spec` names. LoRA files
have Hugging Face's module paths; ours are those of Wan's umT5:

    blocks.N.attn.q        encoder.block.N.layer.0.SelfAttention.q         (k, v, o likewise)
    blocks.N.ffn.gate.0    encoder.block.N.layer.1.DenseReluDense.wi_0
    blocks.N.ffn.fc1       encoder.block.N.layer.1.DenseReluDense.wi_1
    blocks.N.ffn.fc2       encoder.block.N.layer.1.DenseReluDense.wo

The tokens of ByT5 are the bytes of a text; it encodes the letters that an image shows.

    network = load_byt5(path, device, torch.float16)
    ids, mask = byte_rows(texts, 128)
    states = network.encode_padded(ids, mask)  # B L C, on the device

The encoder of Glyph-ByT5 has more tokens than bytes (colors and fonts). HunyuanImage-2.1 never uses these.
Source: Xue et al. 2022, arXiv 2105.13626.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.model_files import inside, read_once
from checkpoints.opening import Checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders.t5_network import T5Config, T5Kind, T5Network, load_t5, read_t5
from encoders.text_encoder import END as TEXT_END
from encoders.text_encoder import FileTextEncoder, TextTokenizer, TokenizerSource, fill_rows, in_groups
from modules.devices import dtype_name
from protocols.data import Conditions
from protocols.family import EncoderAbilities
from protocols.loading import BlockSharder

# Letters: L tokens of a prompt with its padding, C = width of the model


LORA_PREFIX = "lora_te3"  # prefix of names in LoRA files
MAX_TOKENS = 512  # including the end token, as FLUX.1 dev and Chroma were trained; schnell with 256
PAD = 0  # id of the padding token

T5_XXL = T5Kind(
    name="T5",
    description="a T5 encoder",
    option="--t5xxl",
    release="t5xxl_fp16.safetensors or the folder text_encoder_2 of FLUX.1",
    has_own_tables=False,
)
T5_FILES = TokenizerFiles(
    option="--t5xxl_tokenizer",
    names=("tokenizer.json", "spiece.model", "tokenizer.model"),
    folder="",
    repository="google/t5-v1_1-xxl",
    # in diffusers' releases, it is FLUX.1's second tokenizer, and Chroma's only one
    folders=(
        "t5xxl",
        "t5-v1_1-xxl",
        "google_t5-v1_1-xxl",
        "tokenizer_2",
        "../tokenizer_2",
        "tokenizer",
        "../tokenizer",
        ".",
    ),  # fmt: skip
    unique_token="</s>",
    hub_filename="spiece.model",
)


@dataclass(frozen=True)
class T5Naming:
    """A model family's names for its T5 in caches and conditions; defaults are FLUX's and Chroma's."""

    name: str = "t5"  # in cache records
    states_key: str = "t5_out"  # key of the states, L C
    mask_key: str | None = "t5_attn_mask"  # key of the mask, L int64; None: it is not returned
    kind: T5Kind = T5_XXL
    # folders of the encoder in a release; the first that exists is used
    folders: tuple[str, ...] = ("text_encoder_2", "text_encoder")
    tokenizer: TokenizerFiles = T5_FILES

    @property
    def keys(self) -> frozenset[str]:
        """Names of the conditions that the encoder returns."""
        return frozenset({self.states_key} if self.mask_key is None else {self.states_key, self.mask_key})

    def read_width(self, checkpoint: Checkpoint) -> int:
        """Return the number of channels of a hidden state, from the header of a file."""
        return read_t5(checkpoint, self.kind).config.dim


USE = T5Naming()


class T5TextEncoder(FileTextEncoder[T5Network]):
    """T5 with a fixed number of states per prompt. As in the released code, texts are not cleaned."""

    abilities = EncoderAbilities(trainable=True, shardable=True, accepts_new_words=True)
    lora_prefix = LORA_PREFIX
    description = "T5"
    embedding = "token_embedding.weight"
    word_keys = ("t5xxl", "t5")  # in embedding files of ComfyUI and of OneTrainer
    blocks: BlockSharder | None = None  # splits the network over processes

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype | None = torch.bfloat16,
        tokenizer: Path | None = None,
        max_length: int = MAX_TOKENS,
        uses_mask: bool = False,
        form: str | None = None,
        naming: T5Naming = USE,
    ) -> None:
        """Set up the encoder; files are read by `load`.

        Args:
            path: File or folder of the model, or the folder of a full release.
            dtype: Compute dtype; None for the file's dtype.
            tokenizer: Value of the tokenizer's option; None searches near the model.
            max_length: Number of tokens in each row (L), including the end token and padding.
            uses_mask: Whether padding is masked; otherwise tokens attend to padding too.
            form: Module of `checkpoints.stored` in whose form weights are stored; None for the file's form.
            naming: The family's names for the encoder in options, caches and conditions.
        """
        # subfolders of a release that may contain the encoder
        folders = [folder for folder in naming.folders if (path / folder).is_dir()]
        super().__init__(inside(path, folders[0] if folders else ""), tokenizer, form)
        self.name = naming.name
        self.keys = naming.keys
        self.weighted_states_key = naming.states_key
        self.max_length = max_length
        self.dtype = dtype
        self.source = TokenizerSource(naming.tokenizer, end=TEXT_END, may_be_inside=True)
        self.uses_mask = uses_mask
        self.naming = naming

    @property
    def identity(self) -> Mapping[str, str]:
        """Fields of cache records: everything that states depend on except the text."""
        return self.identify(
            self.name,
            dtype="of the file" if self.dtype is None else dtype_name(self.dtype),
            length=str(self.max_length),
            mask="used" if self.uses_mask else "not used",
            weights=self.form,
        )

    def load_network(self, device: torch.device) -> T5Network:
        """Load the network; gradients can flow through its layers even if weights are in 8 bits."""
        return load_t5(
            self.path, device, self.naming.kind, dtype=self.dtype, form=self.form, blocks=self.blocks
        )

    def compute(
        self,
        network: T5Network,
        tokenizer: TextTokenizer,
        token_ids: Sequence[list[int]],
        num_template_tokens: int,
    ) -> list[Conditions]:
        """Return each prompt's states L C and its mask: L int64, 1 for tokens including the end token.

        `num_template_tokens` is not used, because T5 has no template before the prompt.
        """
        ids, masks = fill_rows(token_ids, self.max_length, PAD)
        results: list[Conditions] = []
        num_encoded = 0
        for batch in in_groups(ids.tolist()):  # a few prompts at a time, to limit memory
            batch_masks = masks[num_encoded : num_encoded + len(batch)]
            num_encoded += len(batch)
            attention_mask = batch_masks if self.uses_mask else None
            states = network.encode_padded(torch.tensor(batch), attention_mask).cpu()
            for state, mask in zip(states, batch_masks, strict=True):
                conditions = {self.naming.states_key: state.clone()}
                if self.naming.mask_key is not None:
                    conditions[self.naming.mask_key] = mask.clone()
                results.append(conditions)
        return results


# Letters: B texts, L tokens of a text with its padding, C = width of the model


END = 1  # id of the end token
FIRST_BYTE = 3  # id of byte 0; id 2 is for unknown tokens
BYT5 = T5Kind(
    name="ByT5",
    description="a ByT5 encoder",
    option="--byt5",
    release="byt5_small_glyphxl_fp16.safetensors",
    has_own_tables=False,
    reads_bytes=True,
)


def load_byt5(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> T5Network:
    """Load a ByT5 encoder of any size.

    `dtype` is the compute dtype; None uses the file's dtype, or bfloat16 if the file is in fp8.

    Raises:
        CheckpointError: If the file is damaged or contains a different model.
    """
    return load_t5(path, device, BYT5, dtype)


def read_byt5_header(path: Path) -> T5Config:
    """Return the dimensions of a ByT5 encoder from the file's header."""
    return read_once(path, read_t5, BYT5).config


def byte_rows(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return ByT5's token ids and mask, each B L int64: the bytes of each text, an end token, padding.

    `length` is L; longer texts are truncated so that the end token fits.
    """
    rows = []
    for text in texts:
        ids = [FIRST_BYTE + byte for byte in text.encode()]
        rows.append([*ids[: length - 1], END])
    return fill_rows(rows, length, PAD)
