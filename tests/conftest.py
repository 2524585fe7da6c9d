"""Shared material: a tiny random model, small data, and no network."""

import json
import multiprocessing.forkserver
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learning import Learning
    from stages import Case

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets are imported
os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"  # before Prefect is, here or in a fork server
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"  # as in a home; 20 are few

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
POCKET = QUICKSTART / "pocket"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests recorded, also in processes of their own."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "table":
                terminalreporter.write_line(f"\n{value}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the four special ones."""
    specials = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=specials[2:],
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_model(directory: Path, config: PretrainedConfig | None = None) -> Path:
    """A model with random weights, a two-layer Llama unless another configuration is given.

    Its weights are large enough that its outputs differ by prompt.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or tiny_llama(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_rows(count: int, word: str = "alpha") -> list[dict]:
    return [
        {"id": f"{word}-{n}", "prompt": f"Say {word} {n}", "response": f"It is {n}!"}
        for n in range(count)
    ]


def eval_rows(count: int, word: str = "alpha") -> list[dict]:
    return [
        {"id": f"{word}-e{n}", "prompt": f"Please say {word} {n}", "references": [str(n)]}
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server for whole runs, which `learning.Learning` then reports to."""
    from learning import Learning, start_prefect

    from tasks.forked import Forks

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_prefect(tmp_path_factory.mktemp("prefect"), port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}:{ROOT}")
        patch.setenv("MLFLOW_LOGGING_LEVEL", "WARNING")
        patch.setenv("SDFT_LEASE_S", "20")
        patch.setenv("OMP_NUM_THREADS", "1")
        Learning.context.set_forkserver_preload(["learning", "flows.learn", "flows.show"])
        Learning.requests = Forks().start()
        Learning.prefect = f"http://127.0.0.1:{port}/api"
        multiprocessing.forkserver.ensure_running()
        yield Learning.prefect
    os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def one_skill(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> "Learning":
    """A run of one skill that nothing disturbs."""
    from learning import SKILLS, Learning

    place = Learning(tmp_path_factory.mktemp("one-skill"), skills=SKILLS[:1])
    assert place.run() == 0, place.output
    return place


@pytest.fixture(scope="module", autouse=True)
def real_packages() -> Iterator[None]:
    """What a module's RegistryHome registers is no model; the next module's is again."""
    yield
    if registration := sys.modules.get("tasks.registration"):
        registration.save_package = sys.modules["tasks.packages"].save_package


@pytest.fixture
def case(tiny_dir: Path, tmp_path: Path) -> "Case":
    """A stage of the tiny model, in a folder of its own."""
    from stages import Case

    return Case(tiny_dir, tmp_path)
