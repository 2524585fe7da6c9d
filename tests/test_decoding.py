"""Steps of fixed shapes, as a GPU replays them: the same answers as those of growing ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, save_tiny_model
from families import FAMILIES, TINY, save_family
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sdft import decoding
from sdft.decoding import Batch, RecordedBatch, masked_attention
from sdft.drawing import Drawn, Sampling
from sdft.model import LanguageModel, load_model
from sdft.rollout import Completion, generate

SAMPLING = Sampling(24, temperature=1.5)


def opened(directory: Path, device: str = "cpu") -> LanguageModel:
    """In fp64, so that no draw hangs on rounding; a quarter of all tokens end an answer."""
    lm = load_model(directory, torch.device(device))
    lm.model.double()
    return replace(lm, eos_ids=frozenset(range(0, lm.model.config.vocab_size, 4)))


def answers(lm: LanguageModel) -> list[Completion]:
    questions = ["a", "tell me", "something much longer than the others", "b c"] * 4
    prompts = [lm.prompt_ids([{"role": "user", "content": one}]) for one in questions]
    return generate(lm, prompts, SAMPLING, seed=1)


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert found == expected
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_shapes_give_the_same_answers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with prompts of several lengths, and when sequences have left the batch."""
    lm = opened(save_family(family, tmp_path / "model"))
    if family.startswith("Gemma 2"):  # a window's cache takes no fixed place
        assert not decoding._can_record(lm.model)
        return
    assert decoding._can_record(lm.model)
    sizes = list[int]()

    class Watched(RecordedBatch):
        def keep(self, rows: list[int]) -> None:
            super().keep(rows)
            sizes.append(len(rows))

    expected = answers(lm)
    monkeypatch.setattr(decoding, "Batch", Watched)
    monkeypatch.setattr(decoding, "LEAST_STEPS", 3)
    assert_same(answers(lm), expected)
    assert sizes, "no sequence left"


def test_in_bf16_the_cache_holds_what_attention_multiplies(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys come in fp32 there, and so do values of a prefix that the prompts share."""
    lm = load_model(tiny_dir, torch.device("cpu"), torch.bfloat16)
    kept = set[torch.dtype]()

    class Watched(RecordedBatch):
        def next(self) -> Drawn:
            drawn = super().next()
            kept.update(one.dtype for one in self._cache.layers[0]._memory)
            return drawn

    monkeypatch.setattr(decoding, "Batch", Watched)
    prompts = [[*range(10, 30), 50], [*range(10, 30), 60, 61]]
    assert all(one.finite for one in generate(lm, prompts, SAMPLING))
    assert kept == {torch.bfloat16}


def test_flash_attention_gives_way_while_decoding(tiny_dir: Path) -> None:
    lm = opened(tiny_dir)
    lm.model.config._attn_implementation = "flash_attention_2"  # as if it were installed
    with masked_attention(lm.model):
        assert lm.model.config._attn_implementation == "sdpa"
    assert lm.model.config._attn_implementation == "flash_attention_2"
    assert answers(lm) == answers(opened(tiny_dir))


@pytest.mark.parametrize(
    ("kind", "special"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    **dict.fromkeys(("short_factor", "long_factor"), [1.0] * 8),
                },
                "original_max_position_embeddings": 128,
            },
        ),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_steps_that_wait_for_what_a_gpu_computes_are_not_recorded(
    kind: str, special: dict[str, object]
) -> None:
    common = TINY | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    small = AutoConfig.for_model(kind, **common, vocab_size=64, pad_token_id=0, **special)
    assert not decoding._can_record(AutoModelForCausalLM.from_config(small))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_replays_what_it_recorded(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as there are tokens but the first two of each group of sequences."""
    lm = opened(tiny_dir, "cuda")
    graph, replays = torch.cuda.CUDAGraph.replay, list[int]()

    def counted(self: torch.cuda.CUDAGraph) -> None:
        replays.append(1)
        graph(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    monkeypatch.setattr(decoding, "LEAST_STEPS", 5)
    recorded = answers(lm)
    assert len(replays) >= max(len(one.tokens) for one in recorded) // 2
    monkeypatch.setattr(decoding, "RecordedBatch", Batch)
    assert_same(recorded, answers(lm))


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "falcon_h1"])
def test_states_that_are_no_keys_and_values_leave_with_their_sequence(
    kind: str, tmp_path: Path
) -> None:
    """Convolutions, linear attention, and a state space beside attention in each layer."""
    model = save_tiny_model(tmp_path / "model", without_all_keys(kind))
    lm = load_model(model, torch.device("cpu"))
    prompts = [list(range(30, 30 + length)) for length in (20, 35, 28)]
    greedy = Sampling(12)
    first = generate(lm, prompts[:1], greedy)[0].tokens
    lm = replace(lm, eos_ids=frozenset([first[3]]))
    alone = [generate(lm, [prompt], greedy)[0].tokens for prompt in prompts]
    assert len(alone[0]) < max(map(len, alone))
    assert [one.tokens for one in generate(lm, prompts, greedy)] == alone


def without_all_keys(kind: str) -> PretrainedConfig:
    tokenizer = make_tokenizer()
    common = TINY | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    common |= {"vocab_size": len(tokenizer), "bos_token_id": None}
    common |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    special: dict[str, object] = {
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "qwen3_next": {
            "layer_types": ["linear_attention", "full_attention"],
            **dict.fromkeys(("num_experts", "linear_num_value_heads", "linear_num_key_heads"), 2),
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
            **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
            "num_experts_per_tok": 1,
        },
        "falcon_h1": {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_state": 8,
            "mamba_d_head": 16,
        },
    }[kind]
    return AutoConfig.for_model(kind, **common, **special)
