"""Model directories that look right and are not, and some that look odd and are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, save_tiny_model
from families import TINY
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
)

from schemas.base import BadInput
from sdft.facts import FactMaker
from sdft.lora import merged
from sdft.model import load_model, max_positions
from sdft.pretrained import open_config

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
