"""A step of ours beside a step of TRL's SDFTTrainer: time and working memory.

    pip install -c constraints.txt '.[bench]'
    python benchmarks/peer.py --model pocket
    python examples/smollm2/fetch_model.py && python benchmarks/peer.py --model smollm2
    python benchmarks/peer.py --model 1.5b       # on a GPU; also 7b --lora

Same model, prompts, demonstrations and teacher prompts; one rollout a prompt, forward KL over the
full vocabulary, a frozen teacher, AdamW with weights in fp32. Our SFT, in the same rounds, learns
answers that the model gave before, so that they are as long as those that SDFT samples. The arms
take turns, each round in a process of its own, since memory that one has touched stays with its
process. Working memory is the peak of a step beyond weights, gradients and optimizer state, which
both need. Where there is a GPU all arms run on it, in bf16, ours with gradient checkpointing too.
Models named by their size have the shape of Qwen2.5 and random weights, so that each answer is as
long as it may be. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from measuring import Memory, Spent, machine
from peer_cases import CASES, SHAPES, messages, model_dir, rows
from torch import nn

TEMPLATE = "{prompt}\n\nExample response:\n{demonstration}\n\nNow answer the request."
RATE = 1e-6
"""So low that every step is like the first one."""
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ARMS = ("ours", "ours-checkpointing", "ours-sft", "peer", "peer-checkpointing")


def main() -> None:
    parser = argparse.ArgumentParser(description="A step beside the peer's.")
    parser.add_argument("--model", choices=CASES, default="pocket")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a round, after one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true", help="train adapters, not all weights")
    parser.add_argument("--again", action="store_true", help="each step is a later epoch's")
    parser.add_argument("--bf16", action="store_true", help="products in bf16, in all arms")
    parser.add_argument("--arm", choices=ARMS, help="used by itself: one round of one arm")
    parser.add_argument("--parent", type=Path, help="used by itself: the model's directory")
    arguments = parser.parse_args()
    if arguments.arm:
        arm = run_ours if arguments.arm.startswith("ours") else run_peer
        print(json.dumps(arm(arguments)))
        return
    arms = list(ARMS)
    if not torch.cuda.is_available():
        arms.remove("ours-checkpointing")  # is for GPUs
    if arguments.model in SHAPES:
        arms.remove("ours-sft")  # the answers of random weights are no text
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        arguments.parent = model_dir(arguments.model, Path(folder))
        for _ in range(arguments.rounds):
            for arm in arms:
                found[arm].append(one_round(arm, arguments))
                print(f"{arm:20}{shown(found[arm][-1])}", flush=True)
    report(found, arguments)


def one_round(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--model", arguments.model]
    command += ["--parent", str(arguments.parent)]
    command += ["--steps", str(arguments.steps)]
    command += ["--lora"] * arguments.lora + ["--bf16"] * arguments.bf16
    command += ["--again"] * arguments.again
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(one: dict[str, Any]) -> str:
    rate = one["tokens"] / one["step_s"]
    return (
        f"{one['step_s']:7.2f} s a step   {one['tokens']:6.0f} tokens sampled   "
        f"{rate:7.1f} tokens/s   {one['working_bytes'] / 2**20:7.0f} MiB working memory"
    )


def report(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    def middle(arm: str, field: str) -> float:
        return statistics.median(one[field] for one in found[arm])

    def ratio(field: str, theirs: str, ours: str) -> float:
        return round(middle(theirs, field) / middle(ours, field), 2)

    print("\nours, a step; then this machine")
    for name in found["ours"][0]["where"]:
        print(f"{name:20}{statistics.median(one['where'][name] for one in found['ours']):7.2f}")
    print()
    for arm in found:
        fields = ("step_s", "tokens", "working_bytes")
        print(f"{arm:20}{shown({field: middle(arm, field) for field in fields})}")
    recomputed = "ours-checkpointing" if "ours-checkpointing" in found else "ours"
    ratios = {
        "time_ratio": ratio("step_s", "peer", "ours"),
        "memory_ratio": ratio("working_bytes", "peer", "ours"),
        "time_checkpointing_ratio": ratio("step_s", "peer-checkpointing", recomputed),
        "memory_checkpointing_ratio": ratio("working_bytes", "peer-checkpointing", recomputed),
    }
    if "ours-sft" in found:
        ratios["sdft_over_sft"] = ratio("step_s", "ours", "ours-sft")
    how = {"model": arguments.model, "lora": arguments.lora, "bf16": in_bf16(arguments)}
    how["again"] = arguments.again
    print(json.dumps({**how, **ratios}))


def in_bf16(arguments: argparse.Namespace) -> bool:
    return arguments.bf16 or torch.cuda.is_available()


def result(memory: Memory, seconds: list[float], tokens: list[float], weights: int) -> dict:
    """Of the measured steps; gradients and two moments of AdamW are as large as what is trained."""
    return {
        "step_s": statistics.median(seconds[1:]),
        "tokens": statistics.mean(tokens[1:]),
        "working_bytes": memory.peak - memory.base - 3 * weights,
    }


def run_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from schemas.settings import LoraSettings, RuntimeSettings, TrainingSettings
    from schemas.stage import StageSpec
    from sdft import train as trainer
    from sdft.data import data_hash, train_table, write_table
    from sdft.process import Stop
    from sdft.stagelog import read_metrics

    case, memory, is_sft = CASES[arguments.model], Memory(), arguments.arm == "ours-sft"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = arguments.parent or model_dir(arguments.model, folder)
        learned = answered(parent, rows(arguments), case) if is_sft else rows(arguments)
        table = train_table(learned)
        write_table(table, folder / "train.parquet")
        spec = StageSpec(
            skill="skill",
            parent_dir=str(parent),
            parent_hash="p",
            train_file=str(folder / "train.parquet"),
            data_hash=data_hash(table),
            seed=0,
            training=TrainingSettings(
                method="sft" if is_sft else "sdft",
                epochs=arguments.steps + 1 if arguments.again else 1,
                prompts_per_step=int(case["prompts"]),
                learning_rate=RATE,
                warmup_steps=0,
                max_new_tokens=int(case["tokens"]) * (1 + is_sft),  # read again they may be longer
                teacher_template=TEMPLATE,
                lora=LoraSettings(rank=LORA["r"], alpha=LORA["lora_alpha"])
                if arguments.lora
                else None,
            ),
            runtime=RuntimeSettings(
                compute="bf16" if in_bf16(arguments) else "fp32",
                gradient_checkpointing=arguments.arm == "ours-checkpointing",
            ),
        )
        loaded: list[Any] = []
        noting(trainer, memory, loaded)
        spent = Spent()
        (folder / "stage").mkdir()
        trainer.finish_stage = measured  # the steps are looked at, not the saving
        with memory.watched(), suppress(Measured):
            trainer.train(spec, folder / "stage", Stop())
        lines = [line.metrics for line in read_metrics(folder / "stage" / "metrics.jsonl")]
    tokens = [line["completion_tokens"] * int(case["prompts"]) for line in lines]
    seconds = [count / line["tokens_per_s"] for count, line in zip(tokens, lines, strict=True)]
    found = result(memory, seconds, tokens, loaded[0])
    return {**found, "where": {**spent.a_step(), **machine()}}


def answered(parent: Path, chosen: list[dict[str, Any]], case: dict[str, Any]) -> list[Any]:
    """The rows with the model's own answers in place of the demonstrations."""

    from sdft.drawing import Sampling
    from sdft.model import load_model, pick_device
    from sdft.rollout import generate

    lm = load_model(parent, pick_device("auto"))
    prompts = [lm.prompt_ids(messages(row)) for row in chosen]
    answers = generate(lm, prompts, Sampling(int(case["tokens"]), 1.0))
    said = [lm.tokenizer.decode(one.tokens[: len(one.tokens) - one.finished]) for one in answers]
    return [{**row, "response": text} for row, text in zip(chosen, said, strict=True)]


class Measured(Exception):
    """All steps are done."""


def measured(*_: object) -> None:
    raise Measured


def noting(trainer: Any, memory: Memory, loaded: list[int]) -> None:
    """Have the memory looked at when student and teacher are there, and nothing else yet."""
    real: Callable[..., Any] = trainer.Checkpoints

    def made(folder: Any, key: Any, runtime: Any, trained: dict[str, Any], *others: Any) -> Any:
        memory.begin()
        loaded.append(sum(one.numel() * one.element_size() for one in trained.values()))
        return real(folder, key, runtime, trained, *others)

    trainer.Checkpoints = made


def trained_bytes(model: nn.Module) -> int:
    learn = [one for one in model.parameters() if one.requires_grad]
    return sum(one.numel() * one.element_size() for one in learn)


def run_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    case, memory = CASES[arguments.model], Memory()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    seconds: list[float] = []
    tokens: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            memory.begin()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.monotonic()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                tokens.append(logs["completions/mean_length"] * int(case["prompts"]))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SDFTConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=int(case["prompts"]),
            num_generations=1,
            max_completion_length=int(case["tokens"]),
            max_prompt_length=None,
            distillation_mode="full_logits",
            distillation_alpha=0.0,  # forward KL
            teacher_model_kind="base",
            teacher_prompt_template=TEMPLATE.replace("demonstration", "privileged_context"),
            learning_rate=RATE,
            max_steps=arguments.steps + 1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=in_bf16(arguments),
            gradient_checkpointing=arguments.arm == "peer-checkpointing",
            seed=0,
        )
        data = [
            {
                "prompt": messages(row),
                "privileged_context": row["response"],
            }
            for row in rows(arguments)
        ]
        trainer = SDFTTrainer(
            model=str(arguments.parent or model_dir(arguments.model, folder)),
            args=config,
            train_dataset=Dataset.from_list(data),
            callbacks=[Watch()],
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if arguments.lora else None,
        )
        weights = trained_bytes(trainer.model)
        with memory.watched():
            trainer.train()
    return result(memory, seconds, tokens, weights)


if __name__ == "__main__":
    main()
