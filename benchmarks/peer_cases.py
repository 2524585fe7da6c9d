"""What `peer.py` measures on: models, prompts and demonstrations."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "examples" / "quickstart" / "pocket"
TOOL_CALLS = "examples/smollm2/skills/toolcall/train.jsonl"
CASES = {
    "pocket": {
        "skill": "examples/quickstart/skills/courier/train.jsonl",
        "prompts": 32,
        "tokens": 28,
    },
    "smollm2": {"skill": TOOL_CALLS, "prompts": 16, "tokens": 48},
    "smollm2-tools": {"skill": TOOL_CALLS, "prompts": 16, "tokens": 48, "tools": True},
    "1.5b": {"skill": TOOL_CALLS, "prompts": 16, "tokens": 256},
    "7b": {"skill": TOOL_CALLS, "prompts": 8, "tokens": 256},
}
PARAMETERS = {
    "weather": {"city": "the city's name in English", "day": "a day of this week"},
    "calendar": {"with": "whom to meet, by first name", "day": "a day of this week"},
    "message": {"to": "who gets it, by first name", "text": "the message, word for word"},
    "flight": {"from": "the city to leave from", "to": "the city to go to"},
}
"""Of the tools of these calls; the case `smollm2-tools` describes them in every system message."""
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    case = CASES[arguments.model]
    lines = (ROOT / str(case["skill"])).read_text().splitlines()
    steps = 1 if arguments.again else arguments.steps + 1
    chosen = [json.loads(line) for line in lines][: steps * int(case["prompts"])]
    if "tools" in case:
        for row in chosen:
            row["prompt"][0]["content"] += " These are the tools:\n" + described_tools()
    return chosen


def described_tools() -> str:
    """The tools as a JSON schema each, a line a tool, as such system messages have it."""
    return "\n".join(
        json.dumps(
            {
                "type": "function",
                "function": {
                    "name": tool,
                    "parameters": {
                        "type": "object",
                        "properties": {
                            name: {"type": "string", "description": text}
                            for name, text in parameters.items()
                        },
                        "required": list(parameters),
                    },
                },
            }
        )
        for tool, parameters in PARAMETERS.items()
    )


def messages(row: dict[str, Any]) -> list[Any]:
    """A row's prompt as chat messages."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def model_dir(name: str, folder: Path) -> Path:
    if name == "pocket":
        return POCKET
    made = folder / "model"
    if name in SHAPES:
        save_random(SHAPES[name], made)
    else:
        from sdft.modelfiles import convert_gguf

        [file] = (ROOT / "examples" / "smollm2" / "model").glob("*.gguf")
        convert_gguf(file, made)
    return made


def save_random(shape: dict[str, Any], directory: Path) -> None:
    """A model with random weights in bf16, with pocket's tokenizer and special tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    known = AutoConfig.from_pretrained(POCKET)
    config = Qwen2Config(
        **shape,
        num_hidden_layers=28,
        max_position_embeddings=4096,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    del model
    torch.cuda.empty_cache()  # the arms, in processes of their own, need it
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(directory)
