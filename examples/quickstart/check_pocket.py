"""Measure pocket by greedy exact match: what it knows, follows and does not know.

Usage: python check_pocket.py [MODEL_DIRECTORY]
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer
from world import Example

HERE = Path(__file__).parent
SKILLS = ("almanac", "courier", "blick")
MAX_NEW_TOKENS, BATCH = 40, 64


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer, prompts: list[str]
) -> list[str]:
    """Greedy answers to single user turns."""
    found = []
    for start in range(0, len(prompts), BATCH):
        turns = [[{"role": "user", "content": p}] for p in prompts[start : start + BATCH]]
        batch = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        found += tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return found


def measure(directory: Path) -> dict[str, float]:
    """Share of exactly right answers: general suites, then each skill's three views."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def score(prompts: list[str], right: list[str]) -> float:
        given = answers(model, tokenizer, prompts)
        return sum(a == b for a, b in zip(given, right, strict=True)) / len(right)

    scores = {}
    for path in sorted((HERE / "general").glob("*.jsonl")):
        rows = read(path)
        scores[path.stem] = score([r["prompt"] for r in rows], [r["references"][0] for r in rows])
    for skill in SKILLS:
        train = read(HERE / "skills" / skill / "train.jsonl")
        held_out = read(HERE / "skills" / skill / "eval.jsonl")
        right = [row["metadata"]["answer"] for row in train]
        shown = [Example(r["prompt"], "", r["response"]).teacher_prompt() for r in train]
        scores[f"{skill} teacher, train"] = score(shown, right)
        scores[f"{skill} student, train"] = score([r["prompt"] for r in train], right)
        scores[f"{skill} student, eval"] = score(
            [r["prompt"] for r in held_out], [r["references"][0] for r in held_out]
        )
    return scores


def show(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name:<24} {value:.3f}")


if __name__ == "__main__":
    show(measure(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pocket"))
