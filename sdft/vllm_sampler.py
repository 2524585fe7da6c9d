"""Rollouts by vLLM in this process, on the GPU that trains; its weights follow the student's."""

import os
from collections.abc import Iterator

from torch import Tensor

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or its weights would lie in another process

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] an extra

from schemas.settings import RuntimeSettings
from sdft.drawing import Sampling
from sdft.lora import merged_weights
from sdft.model import LanguageModel
from sdft.rollout import Completion


class VllmSampler:
    """A vLLM engine that is given the student's weights before every step."""

    is_student = False

    def __init__(self, lm: LanguageModel, model_dir: str, runtime: RuntimeSettings) -> None:
        self._lm = lm
        self._engine = LLM(
            model=model_dir,
            dtype=str(lm.compute).removeprefix("torch."),
            gpu_memory_utilization=runtime.vllm_memory,
            logprobs_mode="processed_logprobs",  # after temperature and top_p
        )

    def take_weights(self) -> None:
        """Copy the weights, adapters merged, and forget what was computed with those of before."""
        self._engine.apply_model(lambda model: model.load_weights(self._weights()))
        self._engine.reset_prefix_cache()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in merged_weights(self._lm.model):
            yield name, weight.to(self._lm.compute)

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, first: int = 0
    ) -> list[Completion]:
        """As generate() does it; with its own random numbers, from the same seed."""
        settings = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=(seed + first + index) % 2**63,
                stop_token_ids=sorted(self._lm.eos_ids),
                detokenize=False,
                logprobs=0,  # of the drawn token alone
            )
            for index in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [one.outputs[0] for one in self._engine.generate(asked, settings, use_tqdm=False)]
        return [
            Completion(
                tokens=list(answer.token_ids),
                finished=answer.finish_reason == "stop",
                log_probs=[
                    choices[token].logprob
                    for token, choices in zip(answer.token_ids, answer.logprobs, strict=True)
                ],
            )
            for answer in answers
        ]
