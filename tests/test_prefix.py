"""What prompts begin with, passed through the model once: the same numbers, the same gradient."""

from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from families import FAMILIES, TINY, save_family
from torch import Tensor
from transformers import DeepseekV3Config, DogeConfig, GPTNeoConfig, PretrainedConfig

from sdft.attention import can_attend_apart
from sdft.drawing import Sampling
from sdft.model import LanguageModel, load_model
from sdft.prefix import LEAST_TOKENS, Prefix, shared_prefix
from sdft.rollout import generate
from sdft.scoring import completion_hidden

CPU = torch.device("cpu")
PLAIN = [family for family in FAMILIES if "Gemma" not in family]
"""Those that keep keys and values of all tokens."""
SPECIAL: list[PretrainedConfig] = [
    DeepseekV3Config(  # values narrower than keys
        **TINY,
        vocab_size=300,
        intermediate_size=64,
        num_key_value_heads=2,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    DogeConfig(**TINY, vocab_size=300, intermediate_size=64),  # with a mask by its values
    GPTNeoConfig(  # some layers see a few tokens only, counted in columns of what is cached
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=2,
        window_size=12,
        max_position_embeddings=256,
    ),
]
BEGINS = list(range(10, 10 + 2 * LEAST_TOKENS))
PROMPTS = [[*BEGINS, 50], [*BEGINS, 60, 61, 62, 63], [*BEGINS, 70, 71]]
ANSWERS = [[80, 81, 82, 1], [90, 1], [100, 101, 102, 103, 1]]


@pytest.fixture
def lm(tiny_dir: Path) -> LanguageModel:
    return load_model(tiny_dir, CPU)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (PROMPTS, BEGINS),
        (PROMPTS[:1], []),  # there is nobody to share with
        ([BEGINS, BEGINS], BEGINS[:-1]),  # something is left to ask
        ([BEGINS, [*BEGINS[:LEAST_TOKENS], 5, 6]], BEGINS[:LEAST_TOKENS]),
        ([BEGINS, [*BEGINS[: LEAST_TOKENS - 1], 5, 6]], []),
        ([BEGINS, [5, 6, 7]], []),
    ],
)
def test_what_is_shared(lm: LanguageModel, prompts: list[list[int]], expected: list[int]) -> None:
    assert shared_prefix(lm.model, prompts) == expected


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "in the cache"])
@pytest.mark.parametrize("family", ["pocket's", *PLAIN])
def test_hidden_states_and_gradients_are_those_without_it(
    family: str, apart: bool, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_family(family, tmp_path) if family in PLAIN else tiny_dir
    lm = load_model(directory, CPU)
    lm.model.double()
    assert can_attend_apart(lm.model, [])
    monkeypatch.setattr("sdft.prefix.can_attend_apart", lambda *_: apart)
    check_that_it_changes_nothing(lm)


@pytest.mark.parametrize("config", SPECIAL, ids=lambda config: config.model_type)
def test_models_that_attend_in_a_way_of_their_own(config: PretrainedConfig, tmp_path: Path) -> None:
    lm = load_model(save_tiny_model(tmp_path, config), CPU)
    lm.model.double()
    check_that_it_changes_nothing(lm)


def check_that_it_changes_nothing(lm: LanguageModel) -> None:
    """Two passes use the prefix; it is gone through, forward and backward, once.

    In float64, but for norms that are always in fp32.
    """

    def gradients(prefix: Prefix | None) -> tuple[Tensor, list[Tensor]]:
        lm.model.zero_grad()
        parts = [
            completion_hidden(lm.model, PROMPTS[part], ANSWERS[part], prefix)
            for part in (slice(2), slice(2, 3))
        ]
        for hidden_RD in parts:
            weights = torch.linspace(-1, 1, hidden_RD.numel(), dtype=hidden_RD.dtype)
            (hidden_RD * weights.view_as(hidden_RD)).sum().backward()
        if prefix:
            prefix.backward()
        grads = [one.grad.clone() for one in lm.model.parameters() if one.grad is not None]
        return torch.cat(parts), grads

    plain_RD, plain = gradients(None)
    shared_RD, shared = gradients(Prefix(lm.model, BEGINS))
    torch.testing.assert_close(shared_RD, plain_RD, rtol=1e-4, atol=1e-4)
    assert len(shared) == len(plain)
    for mine, theirs in zip(shared, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_samples_are_those_without_it(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(16, temperature=1.0)
    shared = generate(lm, PROMPTS, sampling, seed=1)
    monkeypatch.setattr("sdft.decoding.shared_prefix", lambda *_: [])
    assert generate(lm, PROMPTS, sampling, seed=1) == shared


def test_a_teacher_takes_no_gradient(lm: LanguageModel) -> None:
    with torch.no_grad():
        prefix = Prefix(lm.model, BEGINS)
    completion_hidden(lm.model, PROMPTS, ANSWERS, prefix).sum().backward()
    before = [one.grad.clone() for one in lm.model.parameters() if one.grad is not None]
    prefix.backward()
    after = [one.grad for one in lm.model.parameters() if one.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
