"""Completions: the exact distribution, and no dependence on who else is in the batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sdft.drawing import BLOCK, Sampling, draw
from sdft.layout import laid_out_linears
from sdft.model import LanguageModel, load_model
from sdft.prefix import Prefix
from sdft.rollout import generate
from sdft.scoring import completion_hidden

PROMPTS = ["a", "tell me", "something much longer than the others", "b c"]


@pytest.fixture(scope="module")
def lm(tiny_dir: Path) -> LanguageModel:
    loaded = load_model(tiny_dir, torch.device("cpu"))
    loaded.model.eval()
    return loaded


def ids(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    return [lm.prompt_ids([{"role": "user", "content": text}]) for text in texts]


def test_first_tokens_follow_the_models_own_distribution(lm: LanguageModel) -> None:
    prompt = ids(lm, ["hello"])[0]
    count, temperature = 4000, 0.7
    drawn = generate(lm, [prompt] * count, Sampling(1, temperature=temperature), seed=3)
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1]
    exact = (logits / temperature).softmax(-1)
    counted = torch.zeros_like(exact)
    for completion in drawn:
        counted[completion.tokens[0]] += 1
    # the expected total variation of `count` exact draws, and a wide margin over it
    noise = (exact * (1 - exact) / count).sqrt().sum() * 0.4
    assert (counted / count - exact).abs().sum() / 2 < 1.5 * noise


@pytest.mark.parametrize("vocabulary", [BLOCK - 1, 3 * BLOCK, 7 * BLOCK + 5])
def test_a_draw_inverts_the_cumulative_distribution(vocabulary: int) -> None:
    """Block by block as over the whole vocabulary; tokens without probability are never drawn."""
    torch.manual_seed(0)
    logits_BV, draw_B = 3 * torch.randn(2000, vocabulary), torch.rand(2000)
    logits_BV[:, torch.rand(vocabulary) < 0.5] = -torch.inf
    draw_B[:3] = torch.tensor([0.0, 0.5, 1 - 2**-24])
    drawn = draw(logits_BV, draw_B, Sampling(1, temperature=1.0))
    next_B, log_prob_B = drawn.tokens_B, drawn.log_prob_B
    exact_BV = logits_BV.double().softmax(-1)
    upto_B = exact_BV.cumsum(-1).gather(-1, next_B[:, None])[:, 0]
    chosen_B = exact_BV.gather(-1, next_B[:, None])[:, 0]
    assert (chosen_B > 0).all()
    assert ((upto_B - chosen_B - 1e-6 <= draw_B) & (draw_B <= upto_B + 1e-6)).all()
    torch.testing.assert_close(log_prob_B, chosen_B.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [BLOCK, 7 * BLOCK + 5])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_a_draw_from_what_is_not_finite_is_a_token_and_is_told(
    damage: float, vocabulary: int
) -> None:
    logits_BV = torch.randn(2, vocabulary)
    logits_BV[1] = damage
    for sampling in (Sampling(1, 1.0), Sampling(1, 0.7, 0.9)):
        drawn = draw(logits_BV, torch.tensor([0.5, 0.5]), sampling)
        assert drawn.finite_B.tolist() == [True, False]
        assert (drawn.tokens_B < vocabulary).all()


def test_a_decoding_cache_is_one_piece_of_memory(lm: LanguageModel) -> None:
    """What it holds is what a growing one holds, also after rows have left."""
    roomy, growing = Prefix(lm.model, []).cache(3, room=9), DynamicCache(config=lm.model.config)
    assert roomy is not None
    places = set[int]()
    for ids_BT in (torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]]), *([[4]] * 3, [[3]] * 3)):
        for cache in (roomy, growing):
            lm.model(torch.as_tensor(ids_BT), past_key_values=cache)
        places.add(roomy.layers[0].keys.data_ptr())
    assert len(places) == 1
    for cache in (roomy, growing):
        cache.reorder_cache(torch.tensor([0, 2]))
    logits = [
        lm.model(torch.tensor([[1], [2]]), past_key_values=c).logits for c in (roomy, growing)
    ]
    torch.testing.assert_close(*logits)
    for mine, theirs in zip(roomy.layers, growing.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_top_p_keeps_the_smallest_set_that_reaches_it(lm: LanguageModel) -> None:
    prompt = ids(lm, ["hello"])[0]
    with torch.no_grad():
        exact = lm.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    order = exact.argsort(descending=True)
    size = int((exact[order].cumsum(-1) < 0.5).sum()) + 1
    drawn = generate(lm, [prompt] * 500, Sampling(1, temperature=1.0, top_p=0.5), seed=0)
    assert {completion.tokens[0] for completion in drawn} <= set(order[:size].tolist())


def test_a_completion_does_not_depend_on_who_is_in_the_batch(lm: LanguageModel) -> None:
    prompts = ids(lm, PROMPTS)
    sampling = Sampling(24, temperature=1.0)
    together = generate(lm, prompts, sampling, seed=5)
    shorter = generate(lm, prompts[:2], sampling, seed=5)
    assert together[:2] == shorter
    assert together == generate(lm, prompts, sampling, seed=5)
    assert together != generate(lm, prompts, sampling, seed=6)


def test_greedy_equals_transformers_generate(lm: LanguageModel) -> None:
    for prompt, mine in zip(
        ids(lm, PROMPTS), generate(lm, ids(lm, PROMPTS), Sampling(20)), strict=True
    ):
        theirs = lm.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        assert theirs[0, len(prompt) :].tolist() == mine.tokens


def test_eos_ends_a_completion_and_the_limit_clips_one(lm: LanguageModel) -> None:
    drawn = generate(lm, ids(lm, PROMPTS) * 40, Sampling(60, temperature=1.5), seed=1)
    assert any(one.finished for one in drawn)
    assert any(not one.finished for one in drawn)
    for one in drawn:
        ends = [token in lm.eos_ids for token in one.tokens]
        assert not any(ends[:-1])
        assert one.finished == ends[-1]
        assert one.finished or len(one.tokens) == 60


def test_a_prompt_without_room_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="only 56 of the model's 256 positions"):
        generate(lm, [[5] * 57], Sampling(200))


def test_hidden_rows_are_those_that_predict_the_completion(lm: LanguageModel) -> None:
    """Batched with padding equals one by one."""
    prompts = ids(lm, PROMPTS)
    answers = [[7, 8, 9], [10], [11, 12], [13, 14, 15, 16]]
    with torch.no_grad():
        batched = lm.head().logits(completion_hidden(lm.model, prompts, answers))
        row = 0
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = lm.model(torch.tensor([prompt + answer])).logits[0]
            expected = logits[len(prompt) - 1 : -1]
            torch.testing.assert_close(
                batched[row : row + len(answer)], expected, rtol=1e-4, atol=1e-4
            )
            row += len(answer)


def test_packed_sequences_give_what_padded_ones_do(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden rows and gradients of a row without padding, positions beginning anew."""
    prompts, answers = ids(lm, PROMPTS), [[7, 8, 9], [10], [], [13, 14, 15, 16]]

    def scored() -> list[Tensor]:
        lm.model.zero_grad()
        hidden_RD = completion_hidden(lm.model, prompts, answers)
        (hidden_RD * torch.arange(len(hidden_RD))[:, None]).square().sum().backward()
        grads = [one.grad.clone() for one in lm.model.parameters() if one.grad is not None]
        return [hidden_RD.detach(), *grads]

    padded = scored()
    monkeypatch.setattr("sdft.scoring.can_pack", lambda _: True)
    for one, other in zip(scored(), padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_packed_linear_layers_give_the_same_and_are_gone_afterwards(lm: LanguageModel) -> None:
    prompt = torch.tensor([ids(lm, ["hello"])[0]])
    before = generate(lm, ids(lm, PROMPTS), Sampling(8))
    with torch.no_grad():
        plain = lm.model(prompt).logits
        with laid_out_linears(lm):
            assert any("forward" in vars(module) for module in lm.model.modules())
            packed = lm.model(prompt).logits
        with pytest.raises(KeyError), laid_out_linears(lm):
            raise KeyError
        assert not any("forward" in vars(module) for module in lm.model.modules())
        lm.model.get_output_embeddings().weight.mul_(-1)  # what is packed is never an old weight
        assert generate(lm, ids(lm, PROMPTS), Sampling(8)) != before
        lm.model.get_output_embeddings().weight.mul_(-1)
    torch.testing.assert_close(packed, plain)
    assert generate(lm, ids(lm, PROMPTS), Sampling(8)) == before
