"""Make pocket, the quickstart's base model: tokenizer and weights from nothing but the world.

Usage: python make_pocket.py [--steps N] [--out DIR]      (about 10 minutes on 2 CPU cores)
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import words
import world
from check_pocket import measure, show
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 0
BATCH, MICRO_BATCH = 64, 32
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 100, 0.05
VOCAB_SIZE, MAX_LENGTH, TOKENIZER_EXAMPLES = 1024, 512, 20_000

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# An invented name is always its two halves. Words and numbers come with the space before them, and
# so nothing else ends in a space; newlines and the end of a JSON object stand on their own.
NAME_START = f" ?(?:{'|'.join(words.ONSETS)})(?=(?:{'|'.join(words.CODAS)})(?:\\W|$))"
PRE_TOKENS = NAME_START + r'| ?\p{L}+| ?\p{N}{1,2}|\n+|"?\}|[^\p{L}\p{N}\}\n]+(?<! )'


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the world's own text."""
    rng = random.Random(SEED)
    examples = [world.pretraining_example(rng) for _ in range(TOKENIZER_EXAMPLES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for example in examples for text in (example.shown(), example.answer)]
    # What opens an answer must be one token after a space too, however rare that is in the mix.
    numbers = tuple(str(number) for number in range(1, 2 * words.SUM_LIMIT + 1))
    texts += [f" {word}" for word in words.THINGS + numbers] * 100
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about two million parameters, weights drawn from the seed."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of BATCH examples, shortest first."""
    examples = [world.pretraining_example(rng) for _ in range(BATCH)]
    turns = [[{"role": "user", "content": example.shown()}] for example in examples]
    texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = tokenizer([example.answer + END for example in examples], add_special_tokens=False)
    rows = [(p + a, len(p)) for p, a in zip(prompts, answers["input_ids"], strict=True)]
    return sorted(rows, key=lambda row: len(row[0]))


def answer_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Summed next-token loss over the answers of some rows, [] in nats.

    Rows are padded on the right, where causal attention makes an attention mask unnecessary.
    """
    ids_BT = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    is_answer_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (ids, prompt_length) in enumerate(rows):
        is_answer_BT[row, prompt_length : len(ids)] = True
    hidden_BTH = model.model(ids_BT[:, :-1]).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[is_answer_BT[:, 1:]])
    return F.cross_entropy(logits_NV, ids_BT[:, 1:][is_answer_BT[:, 1:]], reduction="sum")


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Next-token training on the answers: Muon for the layers' matrices, AdamW for the rest.

    Linear warm-up, then linear decay to zero.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / steps)
        )
        for optimizer in optimizers
    ]
    rng, started, running = random.Random(SEED + 1), time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        rows = make_batch(rng, tokenizer)
        answer_tokens = sum(len(ids) - prompt_length for ids, prompt_length in rows)
        for start in range(0, BATCH, MICRO_BATCH):
            loss = answer_loss(model, rows[start : start + MICRO_BATCH]) / answer_tokens
            loss.backward()
            running += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 50 == 0:
            elapsed_s = time.monotonic() - started
            print(f"step {step:5d}  loss {running / 50:.4f}  {elapsed_s:6.0f} s", flush=True)
            running = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=HERE / "pocket")
    arguments = parser.parse_args()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    show(measure(arguments.out))


if __name__ == "__main__":
    main()
