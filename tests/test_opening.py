"""Model directories that look right and are not, and some that look odd and are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, save_tiny_model
from families import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTBigCodeConfig,
    GraniteConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from schemas.base import BadInput
from sdft.facts import FactMaker
from sdft.lora import merged
from sdft.model import load_model, max_positions
from sdft.pretrained import open_config, open_weights
from sdft.scoring import can_pack

CPU = torch.device("cpu")
WEIGHT = "model.layers.1.mlp.down_proj.weight"
SMALL = {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}


def config(kind: type[PretrainedConfig], **special: object) -> PretrainedConfig:
    tokenizer = make_tokenizer()
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return kind(**{"vocab_size": len(tokenizer), "bos_token_id": None, **tokens, **special})


def altered(model: Path, target: Path, value: float | None) -> Path:
    """A copy of a model in which a weight begins with this value, or is not there."""
    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    if value is None:
        del weights[WEIGHT]
    else:
        weights[WEIGHT][0, 0] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_weight_that_is_in_no_file_is_not_drawn(tiny_dir: Path, tmp_path: Path) -> None:
    lacking = altered(tiny_dir, tmp_path / "lacking", None)
    message = rf"lacking: lacks 1 weights of a LlamaForCausalLM, such as {WEIGHT}"
    with pytest.raises(BadInput, match=message):
        load_model(lacking, CPU)
    with pytest.raises(BadInput, match=message):
        merged(lacking, tmp_path)


def test_damaged_weights_are_told(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="damaged: its logits are not finite"):
        load_model(altered(tiny_dir, tmp_path / "damaged", torch.nan), CPU)


def test_code_of_a_models_own_is_never_run(tiny_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (model / "own.py").write_text(code)
    content = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    content |= {"model_type": "own", "auto_map": own}
    (model / "config.json").write_text(json.dumps(content))
    for opened in (FactMaker, lambda directory: load_model(directory, CPU)):
        with pytest.raises(BadInput, match="needs code of its own"):
            opened(model)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture_is_told(tiny_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"model_type": "own"}))
    with pytest.raises(BadInput, match="transformers cannot open it: .*`own`"):
        load_model(model, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_capped_logits_may_be_rounded_as_the_model_does(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    special = {**TINY, **SMALL, "initializer_range": 1.0, "final_logit_softcapping": 30.0}
    model = save_tiny_model(tmp_path / "model", config(Gemma2Config, **special))
    lm = load_model(model, CPU, torch.bfloat16, dtype)
    assert lm.model(input_ids=torch.arange(10, 18)[None]).logits.abs().max() > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_else_is_done_to_logits_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    special = {**TINY, **SMALL, "logits_scaling": 1.2}
    model = save_tiny_model(tmp_path / "model", config(GraniteConfig, **special))
    with pytest.raises(BadInput, match="GraniteForCausalLM does more between"):
        load_model(model, CPU, torch.bfloat16, dtype)


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    special = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = save_tiny_model(tmp_path / "model", config(MambaConfig, **special))
    with pytest.raises(BadInput, match="MambaForCausalLM keeps no past_key_values"):
        load_model(model, CPU)


def test_the_longest_sequence_is_that_of_the_models_text(tmp_path: Path) -> None:
    text = {**TINY, **SMALL, "vocab_size": len(make_tokenizer()), "max_position_embeddings": 64}
    vision = {**TINY, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    nested = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    model = save_tiny_model(tmp_path / "model", config(Gemma3Config, **nested))
    assert load_model(model, CPU).max_positions == 64
    assert max_positions(open_config(model)) == FactMaker(model).max_positions == 64
    assert max_positions(config(MptConfig, max_seq_len=96)) == 96


WRONG = {
    "a width that is not the weights'": (
        "config.json",
        {"intermediate_size": 32},
        r"model: model\.layers\.\S+ has the shape \[\d+, \d+\], by config\.json it would have \[",
    ),
    "a word for a number": (
        "config.json",
        {"hidden_size": "big"},
        r"model: its config\.json cannot be used: .*'hidden_size' expected int, got str",
    ),
    "heads that do not share the width": (
        "config.json",
        {"num_attention_heads": 3},
        r"model: its config\.json cannot be used: .*not a multiple of the number of att",
    ),
    "no object": ("config.json", None, r"config\.json: holds a list, not an object of JSON"),
    "no tokenizer's object": (
        "tokenizer_config.json",
        None,
        r"tokenizer_config\.json: holds a list, not an object of JSON",
    ),
    "no generation's object": (
        "generation_config.json",
        None,
        "model: transformers cannot open it: 'list' object is not a mapping",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_in_a_file_of_a_model_is_told(
    wrong: str, tiny_dir: Path, tmp_path: Path
) -> None:
    name, change, message = WRONG[wrong]
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps([] if change is None else content | change))
    with pytest.raises(BadInput, match=message):
        load_model(model, CPU)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for one in messages %}{{ one.content ", "unexpected end of template"),
        ("{{ messages[0].content | backwards }}", "No filter named 'backwards'"),
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    ],
)
def test_a_chat_template_that_renders_no_question_is_told(
    template: str, problem: str, tiny_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    for opened in (FactMaker, lambda directory: load_model(directory, CPU)):
        with pytest.raises(BadInput, match=f"model: its chat template cannot .*: {problem}"):
            opened(model)


def as_if_flash_attention_were_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps sequences in a row apart if it is told the positions.

    Like transformers' it takes fp32 only where that is to be lowered.
    """

    def flash(
        module: nn.Module,
        query_BHTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        *_: object,
        position_ids: Tensor | None = None,
        scaling: float | None = None,
        **__: object,
    ) -> tuple[Tensor, None]:
        if query_BHTD.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        width = query_BHTD.shape[-2]
        seen_TT = torch.ones(width, width, dtype=torch.bool).tril()
        if position_ids is not None:
            of_T = (position_ids[0] == 0).cumsum(-1)
            seen_TT &= of_T[:, None] == of_T
        made = nn.functional.scaled_dot_product_attention(
            query_BHTD, key_BKTD, value_BKTD, seen_TT, scale=scaling, enable_gqa=True
        )
        return made.transpose(1, 2), None

    def opened(*args: object) -> PreTrainedModel:
        model = open_weights(args[0], args[1])  # pyright: ignore[reportArgumentType]
        model.config._attn_implementation = "flash_attention_2"
        return model

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    monkeypatch.setattr("sdft.model.open_weights", opened)


def test_weights_in_fp32_open_with_flash_attention_which_takes_none(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_flash_attention_were_here(monkeypatch)
    lm = load_model(tiny_dir, CPU, torch.bfloat16)
    assert lm.model.dtype == torch.float32
    assert can_pack(lm.model)


@pytest.mark.parametrize(
    ("kind", "packs"), [(GPT2Config, True), (GPTBigCodeConfig, False)], ids=["gpt2", "bigcode"]
)
def test_sequences_are_packed_only_where_attention_is_told_where_they_begin(
    kind: type[PretrainedConfig], packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model", config(kind, **TINY))
    as_if_flash_attention_were_here(monkeypatch)
    assert can_pack(load_model(model, CPU, torch.bfloat16).model) is packs


def test_a_class_without_flash_attention_opens_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = {"hidden_size": 32, "n_layer": 2, "n_head": 2}
    model = save_tiny_model(tmp_path / "model", config(BloomConfig, **special))
    monkeypatch.setattr("sdft.model._attention", lambda *_: "flash_attention_2")
    assert not can_pack(load_model(model, CPU).model)
