"""At load: a checkpoint whose files do not fit together, or ask for what is not served, is refused by name; others are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.mistakes import SHARING, lengths_ignored, padding_mask_ignored, windows_ignored
from workers.checks.reference import Reference
from workers.demo.small_tokenizer import CHAT_TEMPLATE
from workers.engine.decoding.slot_cache import SlotCache
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.model import ModelEngine
from workers.engine.proving import proof
from workers.errors import EngineStartError
from workers.extract.preprocess import Preprocessor

TEXT = "{{ content['text'] }}"


def load(model: Path, dtype: str = "float32") -> ModelEngine:
    return ModelEngine(EngineSpec("model", str(model), "main", dtype, "unused"))


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "Qwen2.5-VL-Copy"))


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        body = json.loads((model / name).read_text())
        change(body)
        (model / name).write_text(json.dumps(body))

    return edit


def setting(name: str, **values: Any) -> Callable[[Path], None]:
    return edited(name, lambda body: body.update(values))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def one_value(name: str, value: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[name].view(-1).__setitem__(7, value))


def rows(number: int) -> Callable[[Path], None]:
    """Embeddings and head of another number of rows, as `resize_token_embeddings` leaves them."""

    def resize(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            old = tensors[name]
            tensors[name] = torch.cat([old, old.new_zeros(max(0, number - len(old)), old.shape[1])])[:number]

    def edit(model: Path) -> None:
        weights(resize)(model)
        setting("config.json", vocab_size=number)(model)

    return edit


def slow_tokenizer(model: Path) -> None:
    body = json.loads((model / "tokenizer.json").read_text())
    (model / "vocab.json").write_text(json.dumps(body["model"]["vocab"]))
    merges = (m if isinstance(m, str) else " ".join(m) for m in body["model"]["merges"])
    (model / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (model / "tokenizer.json").unlink()


def added_tokens_lost(model: Path) -> None:
    slow_tokenizer(model)
    kinds = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    edited("tokenizer_config.json", lambda body: [body.pop(kind, None) for kind in kinds])(model)


def image_token_renamed(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text()
        assert "<|image_pad|>" in text
        (model / name).write_text(text.replace('"<|image_pad|>"', '"<|img|>"'))


def template(text: str) -> Callable[[Path], None]:
    return setting("chat_template.json", chat_template=text)


WEIGHT = "model.layers.3.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "image token renamed": (image_token_renamed, r"<\|image_pad\|> is not known to its tokenizer.*restore tokenizer\.json"),
    "added tokens lost": (added_tokens_lost, r"<\|(image_pad|vision_start)\|> is .*token.*restore"),
    "another image token": (setting("config.json", image_token_id=8205), r"<\|image_pad\|> is token 8204.*image_token_id"),
    "another start": (setting("config.json", vision_start_token_id=8193), r"<\|vision_start\|> is token 8201"),
    "NaN": (one_value(WEIGHT, float("nan")), r"layers\.3\.mlp\.up_proj\.weight have values that are not finite"),
    "infinity": (one_value("visual.blocks.1.attn.qkv.weight", -float("inf")), r"blocks\.1\.attn\.qkv\.weight have values"),
    "NaN in the head": (one_value("lm_head.weight", float("nan")), r"lm_head\.weight have values that are not finite"),
    "adapter not merged": (
        weights(lambda t: t.update({WEIGHT.replace("weight", "lora_A.weight"): torch.zeros(2, 64)})),
        r"lora_A\.weight.*an adapter that was not merged",
    ),
    "embeddings too small": (rows(8192), r"tokenizer has tokens up to 8213, its embeddings only 8192 rows"),
    "no end token of the tokenizer's": (
        setting("generation_config.json", eos_token_id=151645),
        r"no answer would end: its end token \(eos_token_id \[151645\]",
    ),
    "no template": (lambda m: (m / "chat_template.json").unlink(), r"no chat template: put .*chat_template\.json"),
    "capitals": (template(CHAT_TEMPLATE.replace(TEXT, "{{ content['text'] | upper }}")), r"does not insert the question"),
    "another merging": (setting("preprocessor_config.json", merge_size=1), r"one small image.*preprocessor_config\.json"),
    "another patch": (setting("preprocessor_config.json", patch_size=28), r"one small image.*preprocessor_config\.json"),
    "no tokenizer in it": (lambda m: (m / "tokenizer.json").write_text("{}"), r"processor cannot be loaded.*tokenizer\.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_by_name(name: str, model: Path) -> None:
    change, message = BROKEN[name]
    change(model)
    with pytest.raises(EngineStartError, match=message):
        load(model)


WHOLE: dict[str, Callable[[Path], object]] = {
    "padded embeddings": rows(8256 + 3 * 64),  # the 7B's have 399 rows more than its tokenizer has tokens
    "no padding": rows(8214),
    "rows to spare": rows(8256 + 3),
    "slow tokenizer": slow_tokenizer,
    "a window that is not used": setting("config.json", use_sliding_window=False, sliding_window=16),
    "sliding windows": setting("config.json", use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "positions by length": setting(
        "config.json", rope_scaling={"type": "dynamic", "factor": 2.0, "mrope_section": [2, 3, 3]},
    ),
    "static rotary scaling": setting(
        "config.json",
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3], "original_max_position_embeddings": 32768
        },
    ),
    "trimming": template(CHAT_TEMPLATE.replace(TEXT, "{{ content['text'] | trim }}")),
    "a line of its own": template(CHAT_TEMPLATE.replace(TEXT, f"\n{TEXT}\n")),
    "no generation config": lambda model: (model / "generation_config.json").unlink(),
}  # fmt: skip


def test_rows_that_no_token_has_are_told_of(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer may have lost the tokens that a fine-tune added; or the rows were to spare."""
    rows(8256 + 3)(model)
    load(model)
    assert "embeddings have 8259 rows, and its tokenizer tokens up to 8213: if they were resized" in caplog.text


@pytest.mark.parametrize("name", WHOLE)
def test_unusual_checkpoints_are_computed_as_transformers_does(name: str, model: Path, photographs: Path) -> None:
    WHOLE[name](model)
    engine, reference = load(model), Reference(model)
    preprocess = Preprocessor(engine.info)
    limits = (engine.info.min_pixels, engine.info.max_pixels)
    path = sorted(photographs.iterdir())[0]
    image = preprocess.image(path.name, photographs, (), limits)
    questions = ("Why?", "  What is in the image?\n", " \n", "One line.\n\nAnother. ")
    requests = [preprocess.request([image], question, Recipe(layers=(0, 3, 6), max_new_tokens=8)) for question in questions]
    for question, sample in zip(questions, engine.extract(requests), strict=True):
        expected = reference(path, question, max_new_tokens=8, layers=(0, 3, 6))
        assert sample.facts["answer_token_ids"] == expected["answer_token_ids"]
        assert sample.facts["seq_len"] == expected["seq_len"]
        for field, vector in sample.vectors.items():
            assert np.abs(vector - expected[field]).max() < 1e-4 * np.abs(expected[field]).max()


# The proof finds what nobody has thought of: each of these mistakes is refused at load.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", SHARING)
def test_where_sharing_goes_wrong_prompts_are_computed_whole(
    mistake: Callable[[pytest.MonkeyPatch], None], dtype: str, small_model: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mistake(monkeypatch)
    assert not load(small_model, dtype).info.shares_images
    assert "away from a plain forward of transformers on one small image" in caplog.text


def test_where_slots_go_wrong_questions_are_padded(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lengths_ignored(monkeypatch)
    engine = load(small_model)
    assert engine.info.shares_images
    assert engine._slots is None
    assert "questions are padded, which is slower" in caplog.text
    padding_mask_ignored(monkeypatch)
    assert not load(small_model).info.shares_images


def test_where_slots_cannot_be_used_questions_are_padded(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a version of torch whose attention takes other arguments."""

    def attend(*_: Any) -> Any:
        raise TypeError("_flash_attention_forward() got an unexpected keyword argument 'seqused_k'")

    monkeypatch.setattr(SlotCache, "attend", attend)
    engine = load(small_model)
    assert (engine._slots, engine.info.shares_images) == (None, True)
    assert "questions are padded, which is slower: TypeError: _flash_attention_forward()" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mistake_that_whole_prompts_have_too_is_refused(
    dtype: str, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows_ignored(monkeypatch)
    with pytest.raises(EngineStartError, match="away from a plain forward of transformers on one small image"):
        load(small_model, dtype)


def test_what_overflows_is_refused(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = proof._forward

    def overflowing(*arguments: Any) -> Any:
        vectors, scores = original(*arguments)
        return {name: vector * np.float32("inf") for name, vector in vectors.items()}, scores

    monkeypatch.setattr(proof, "_forward", overflowing)
    with pytest.raises(EngineStartError, match=r"has values that are not finite in float32, though its weights have none"):
        load(small_model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_proof_leaves_nothing_behind(small_model: Path, dtype: str) -> None:
    engine = load(small_model, dtype)
    assert not engine._prefixes.kept._kept
    assert not any(module._forward_hooks for module in engine._family.model.modules())
