"""What many skills, a large model and many GPUs would cost: arithmetic from named constants.

`python benchmarks/scale.py [--skills 1000] [--parameters 70e9] [--gpus 64]` prints the tables of
docs/scale.md. Nothing is run.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """What is learned, on what. Comments say where a number is from."""

    skills: int
    parameters: float
    gpus: int

    # assumed: a skill, in rows and tokens
    demonstrations: int = 1000
    epochs: int = 2  # the default
    prompts_a_step: int = 32  # the default
    prompt_tokens: int = 300
    demonstration_tokens: int = 500
    response_tokens: int = 1000  # the paper's runs allow 1024 to 2048
    items: int = 100
    item_tokens: int = 300  # prompt and answer of an evaluation item
    general: int = 10
    lora_parameters: float = 414e6  # rank 32 on all linear layers of a Llama of 70B

    # assumed: the machine
    gpu_flops: float = 989e12  # an H100's dense bf16 by its data sheet, for training
    gpu_flops_fp32: float = 67e12  # its fp32, for evaluation, which stays in fp32
    utilisation: float = 0.35  # not measured: no large model was trained here
    gpu_read: float = 3.35e12  # bytes a second, its data sheet
    tensor_parallel: int = 8  # GPUs that hold one copy for sampling

    # measured (docs/benchmarks.md)
    hash_rate: float = 800e6 / 1.17  # bytes a second, one process: 100 stages of 8 MB
    pass_over_s: float = 0.064 / 100  # a finished stage that nobody has touched
    points_a_second: float = 1e6 / 87.5  # metric points carried to MLflow
    checkpoint_bytes: int = 12  # a parameter: fp32 weights and two moments (1.6 GB for 135M)

    @property
    def sequences(self) -> int:
        return self.demonstrations * self.epochs

    @property
    def steps(self) -> float:
        return self.sequences / self.prompts_a_step

    @property
    def training_flop(self) -> float:
        """A stage: a forward pass is 2 operations a parameter and token, a backward pass 4.

        Sampling 2, teacher 2 (with the demonstration), student 2, again in the backward pass 2, 4.
        """
        seen = self.prompt_tokens + self.response_tokens
        tokens = 10 * seen + 2 * (seen + self.demonstration_tokens)
        return self.sequences * self.parameters * tokens

    @property
    def flops(self) -> float:
        return self.gpus * self.gpu_flops * self.utilisation

    @property
    def cell_s(self) -> float:
        """Scoring one suite of one model, with all GPUs at it."""
        return self.cell_flop / (self.gpus * self.gpu_flops_fp32 * self.utilisation)

    @property
    def scoring_s(self) -> float:
        """Teacher, student and backward pass of a stage."""
        sampling = 2 * (self.prompt_tokens + self.response_tokens)
        return (self.training_flop - self.sequences * self.parameters * sampling) / self.flops

    @property
    def decoding_s(self) -> float:
        """Sampling of a stage: a token reads all weights (bf16) once, for a whole batch."""
        token_s = 2 * self.parameters / self.tensor_parallel / self.gpu_read
        return self.steps * self.response_tokens * token_s

    @property
    def cell_flop(self) -> float:
        return self.items * self.item_tokens * 2 * self.parameters

    def cells(self, forward_transfer: bool) -> int:
        """Of the whole matrix: every stage and the base model on its suites."""
        n = self.skills
        own = (n + 1) * n if forward_transfer else sum(min(i + 1, n) for i in range(n + 1))
        return own + (n + 1) * self.general

    @property
    def even(self) -> float:
        """Skills from which on evaluating one stage takes longer than training it."""
        return (self.scoring_s + self.decoding_s) / self.cell_s - self.general

    @property
    def model_bytes(self) -> float:
        return 4 * self.parameters  # stages are kept in fp32


def days(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def bytes_of(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e12 else f"{size / 1e12:,.1f} TB"


def table(case: Case) -> list[tuple[str, str, str]]:
    """What, of one stage, of all."""
    n = case.skills
    full, half = (case.cells(one) * case.cell_s for one in (True, False))
    hashing = case.model_bytes / case.hash_rate
    again = n * hashing
    adapters = n * 4 * case.lora_parameters
    points = 15 * case.steps
    return [
        ("scoring and backward passes", days(case.scoring_s), days(n * case.scoring_s)),
        ("sampling", days(case.decoding_s), days(n * case.decoding_s)),
        (f"evaluation, {case.cells(True):,} cells", days(full / (n + 1)), days(full)),
        (f"... no forward transfer, {case.cells(False):,}", days(half / (n + 1)), days(half)),
        ("model hashed once, one process", days(hashing), days(again)),
        (
            "finished stages passed over by every run",
            f"{1000 * case.pass_over_s:.1f} ms",
            f"{n * case.pass_over_s:.1f} s each night",
        ),
        ("registered models, fp32", bytes_of(case.model_bytes), bytes_of(n * case.model_bytes)),
        (
            "adapters alone, of a Llama of 70B",
            bytes_of(4 * case.lora_parameters),
            bytes_of(adapters),
        ),
        (
            "a checkpoint of all weights",
            bytes_of(case.checkpoint_bytes * case.parameters),
            "two a running stage",
        ),
        ("metric points to MLflow", f"{points:,.0f}", days(n * points / case.points_a_second)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skills", type=int, default=1000)
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--gpus", type=int, default=64)
    case = Case(**vars(parser.parse_args()))
    print(f"{case.skills} skills, {case.parameters / 1e9:g}B parameters, {case.gpus} GPUs\n")
    print("| | one stage | all |\n|---|---|---|")
    for row in table(case):
        print(f"| {' | '.join(row)} |")
    print(f"\na stage: {case.training_flop:.2g} operations; a cell: {case.cell_flop:.2g}; ", end="")
    print(f"evaluating a stage takes longer than training it from {case.even:.0f} skills on")


if __name__ == "__main__":
    main()
