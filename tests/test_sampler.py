"""Answers of an engine that is not quite the student, and the weights that put them right."""

from pathlib import Path

import pytest
import torch
from stages import BASIC, Case
from torch import Tensor

from schemas.base import BadInput
from schemas.settings import RuntimeSettings
from sdft.drawing import Sampling, log_probabilities
from sdft.gradient import Example, StepGradient
from sdft.model import LanguageModel, load_model
from sdft.rollout import Completion
from sdft.sampler import MAX_RATIO, Sampler, StudentSampler, open_sampler, sequence_weights
from sdft.scoring import completion_hidden
from sdft.stagelog import read_metrics
from sdft.teacher import open_teacher

FACTOR = 1.6
"""How much too improbable the engine makes every token of an even number."""
SAMPLING = Sampling(max_new_tokens=3, temperature=1.0)


@pytest.fixture(scope="module")
def lm(tiny_dir: Path) -> LanguageModel:
    return load_model(tiny_dir, torch.device("cpu"))


class OffEngine:
    """Samples from the student's distribution with a known error; counts what it is asked."""

    is_student = False

    def __init__(self, lm: LanguageModel, factor: float = FACTOR) -> None:
        self._lm, self._factor, self.taken = lm, factor, 0

    def take_weights(self) -> None:
        self.taken += 1

    @torch.no_grad()
    def distribution(self, prompts: list[list[int]]) -> Tensor:
        """[B, V]: the probabilities of the next token, of prompts of one length."""
        probability_BV = self._lm.model(torch.tensor(prompts)).logits[:, -1].softmax(-1)
        probability_BV[:, ::2] /= self._factor
        return probability_BV / probability_BV.sum(-1, keepdim=True)

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, first: int = 0
    ) -> list[Completion]:
        random = torch.Generator().manual_seed(seed)
        answers = [Completion([], finished=False) for _ in prompts]
        for _ in range(sampling.max_new_tokens):
            for prompt, answer in zip(prompts, answers, strict=True):
                [probability_V] = self.distribution([prompt + answer.tokens])
                token = int(torch.multinomial(probability_V, 1, generator=random))
                answer.tokens.append(token)
                answer.log_probs.append(probability_V[token].log().item())
        return answers


def test_the_weights_turn_the_engines_mean_into_the_students(lm: LanguageModel) -> None:
    """Exactly, over every possible answer of one token, for several functions of the answer."""
    prompt, engine = lm.prompt_ids([{"role": "user", "content": "hello"}]), OffEngine(lm)
    [theirs_V] = engine.distribution([prompt])
    tokens = range(len(theirs_V))
    answers = [
        Completion([token], finished=False, log_probs=[theirs_V[token].log().item()])
        for token in tokens
    ]
    with torch.no_grad():
        ours_V = lm.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        hidden = completion_hidden(lm.model, [prompt] * len(tokens), [[one] for one in tokens])
    weights = sequence_weights(hidden, lm.head(), answers, SAMPLING)
    assert weights.max() < MAX_RATIO
    for value_V in (torch.ones(len(tokens)), torch.arange(len(tokens)) % 2, torch.rand(261)):
        mean = (ours_V * value_V).sum()
        torch.testing.assert_close((theirs_V * weights * value_V).sum(), mean, rtol=1e-4, atol=1e-6)
    odd = torch.arange(len(tokens)) % 2
    assert (theirs_V * odd).sum() > 1.1 * (ours_V * odd).sum()  # what is put right is large


def test_a_tokens_ratio_counts_at_most_so_much(lm: LanguageModel) -> None:
    prompt = lm.prompt_ids([{"role": "user", "content": "hello"}])
    tokens = [20, 21, 22]
    with torch.no_grad():
        hidden = completion_hidden(lm.model, [prompt], [tokens])
        ours = log_probabilities(lm.head().logits(hidden), torch.tensor(tokens), SAMPLING)
    off = [(ours[0] - 9.0).item(), (ours[1] + 1.0).item(), ours[2].item()]
    answer = Completion(tokens, finished=False, log_probs=off)
    [weight] = sequence_weights(hidden, lm.head(), [answer], SAMPLING)
    assert weight.item() == pytest.approx(MAX_RATIO * torch.tensor(-1.0).exp().item(), rel=1e-3)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_correction_removes_the_bias_from_a_steps_gradient(case: Case, corrected: bool) -> None:
    """All answers of two tokens whose first is any: the engine's shares, with the weights, give the
    gradient of the student's shares, and without them another one."""
    lm = load_model(case.model_dir, torch.device("cpu"))
    spec = case.spec(BASIC.model_copy(update={"skip_first_tokens": 1}))
    teacher = open_teacher(lm, None, spec)
    prompt = lm.prompt_ids([{"role": "user", "content": "hello"}])
    taught = lm.prompt_ids([{"role": "user", "content": "hello, and an example"}])
    example = Example("x", prompt, taught, Completion([5, 1], finished=True))
    second = 30

    def gradient(sampler: Sampler, probability_V: Tensor) -> Tensor:
        """Of as many answers with each first token as it is probable; the second is the same."""
        counts = (4000 * probability_V).round().int().tolist()
        with torch.no_grad():
            firsts = torch.tensor([[*prompt, token] for token in range(len(counts))])
            seconds = lm.model(firsts).logits[:, -1].log_softmax(-1)[:, second].tolist()
        answers = [
            Completion([token, second], False, log_probs=[p.log().item(), seconds[token]])
            for token, (p, count) in enumerate(zip(probability_V, counts, strict=True))
            for _ in range(count)
        ]
        lm.model.zero_grad()
        step = StepGradient(lm, teacher, sampler, [example], spec)
        step.accumulate([example] * len(answers), answers)
        return torch.cat(
            [one.grad.flatten() for one in lm.model.parameters() if one.grad is not None]
        )

    learned_otherwise(lm)
    engine = OffEngine(lm, 1.9)
    [theirs_V] = engine.distribution([prompt])
    [ours_V] = OffEngine(lm, 1.0).distribution([prompt])
    expected = gradient(StudentSampler(lm), ours_V)
    found = gradient(engine if corrected else StudentSampler(lm), theirs_V)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.02 if corrected else error > 0.05


def test_a_stage_asks_its_engine_every_step_and_tells_how_far_it_is_off(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[OffEngine] = []

    def off(lm: LanguageModel, *_: object) -> OffEngine:
        engines.append(OffEngine(lm))
        return engines[-1]

    monkeypatch.setattr("sdft.train.open_sampler", off)
    record, _, directory = case.run("stage", case.spec())
    [engine] = engines
    assert engine.taken == record.steps
    told = [line.metrics["sequence_weight"] for line in read_metrics(directory / "metrics.jsonl")]
    assert all(one > 0 for one in told)
    assert len(set(told)) == len(told)


def test_an_engine_that_cannot_run_here_is_refused_before_the_first_step(case: Case) -> None:
    with pytest.raises(BadInput, match=r"runtime\.sampler is 'vllm', which needs a CUDA device"):
        case.run("stage", case.spec(sampler="vllm"))
    assert not (case.folder / "stage" / "metrics.jsonl").exists()


def test_by_default_the_student_samples_itself(lm: LanguageModel) -> None:
    sampler = open_sampler(lm, "nowhere", RuntimeSettings())
    assert sampler.is_student
    prompts = [lm.prompt_ids([{"role": "user", "content": "hello"}])]
    [answer] = sampler.sample(prompts, SAMPLING, seed=1)
    assert len(answer.log_probs) == len(answer.tokens)


def learned_otherwise(lm: LanguageModel) -> None:
    """Move the student away from its teacher, so that there is a divergence."""
    torch.manual_seed(0)
    with torch.no_grad():
        for one in lm.model.parameters():
            one += 0.05 * torch.randn_like(one)
