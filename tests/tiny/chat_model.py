"""A tiny chat model on disk, in the layout of transformers."""

from pathlib import Path

import torch

TEMPLATE = "{% for turn in messages %}<user> {{ turn['content'] }} <model> {% endfor %}"


def write_chat_model(folder: Path) -> Path:
    """Write a Llama with random weights that knows fourteen words, and return the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<unk>",
        "<end>",
        "<user>",
        "<model>",
        *["a", "cat", "dog", "walks", "runs", "on", "the", "grass", "in", "light"],
    ]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=2048,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
