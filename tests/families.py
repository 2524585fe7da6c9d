"""Tiny models of several families, with random weights."""

from pathlib import Path

from conftest import make_tokenizer, save_tiny_model
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "Qwen3, a vocabulary of 200,064": (
        Qwen3Config,
        {
            "vocab_size": 200_064,
            "intermediate_size": 64,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 2, soft-capped logits": (
        Gemma2Config,
        {
            "intermediate_size": 64,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "final_logit_softcapping": 5.0,
            "sliding_window": 16,
        },
    ),
    "GPT-NeoX, a head of its own": (
        GPTNeoXConfig,
        {"intermediate_size": 64, "tie_word_embeddings": False, "attention_dropout": 0.1},
    ),
    "GPT-2, layers that are transposed": (GPT2Config, {"initializer_range": 0.2}),
    "OPT, learned positions": (
        OPTConfig,
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1, "init_std": 0.2},
    ),
}


def save_family(family: str, directory: Path) -> Path:
    """A tiny model of a family, with random weights."""
    config_class, special = FAMILIES[family]
    tokenizer = make_tokenizer()
    config = config_class(
        **{
            **TINY,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **special,
        }
    )
    return save_tiny_model(directory, config)
