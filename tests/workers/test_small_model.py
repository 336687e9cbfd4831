"""The small model loads and behaves like the published checkpoints, and its answers vary."""

from __future__ import annotations

import base64
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

from workers.checks.reference import Reference
from workers.demo.small_model import FILES, build_small_model, main
from workers.demo.small_spec import DEMO, TEST, SmallModelSpec
from workers.demo.small_tokenizer import BPE_RANKS, PLAIN_TOKENS, SPECIAL_TOKENS

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # files of the scikit-image wheel
QUESTIONS = (
    "What is in the image?",
    "Is there a cat?",
    "How many people are there in this photograph, and what do they wear?",
)
LAYERS = (0, 3, 6)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_model(tmp_path_factory.mktemp("models") / "test", TEST)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    paths = []
    for name in PHOTOGRAPHS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            image.thumbnail((224, 224))
            image.convert("RGB").save(folder / f"{Path(name).stem}.png")
        paths.append(folder / f"{Path(name).stem}.png")
    return paths


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture(scope="module")
def results(reference: Reference, photographs: list[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    pairs = itertools.product(photographs, QUESTIONS)
    return {(p.stem, q): reference(p, q, max_new_tokens=24, layers=LAYERS) for p, q in pairs}


def test_loads_as_the_published_checkpoints_do(model_dir: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    processor = AutoProcessor.from_pretrained(model_dir)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"

    config = model.config
    named = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|im_end|>": config.text_config.eos_token_id,
        "<|endoftext|>": model.generation_config.pad_token_id,
    }
    assert named == {token: tokenizer.convert_tokens_to_ids(token) for token in named}
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.repetition_penalty == 1.05
    assert config.text_config.max_position_embeddings >= 32768
    assert config.text_config.vocab_size > len(tokenizer)


@pytest.mark.parametrize("tie", [True, False])
def test_head_is_tied_as_asked(tmp_path: Path, tie: bool) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    spec = replace(TEST, num_hidden_layers=1, vision_depth=1, fullatt_block_indexes=(0,), tie_word_embeddings=tie)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(build_small_model(tmp_path / "model", spec))
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is tie


def test_added_tokens_round_trip_in_the_published_order(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    first = len(BPE_RANKS.read_bytes().splitlines())
    for i, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS, start=first):
        ids = tokenizer(f"a{token}b")["input_ids"]
        assert ids[1:-1] == [i]
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{token}b"
        assert tokenizer.decode(ids, skip_special_tokens=True) == ("ab" if token in SPECIAL_TOKENS else f"a{token}b")


def test_text_round_trips_and_common_words_keep_their_ids(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, BPE_RANKS.open("rb"))}
    words = ["What", " is", " in", " the", " image", "?"]
    assert tokenizer("".join(words))["input_ids"] == [ranks[word.encode()] for word in words]
    # The ids that Qwen2.5-VL-7B gives this sentence: the encoding is cut, not made anew.
    assert tokenizer("".join(words))["input_ids"] == [3838, 374, 304, 279, 2168, 30]
    text = "Don't WE'LL 1234  spaces\t\r\n\n日本語 café 😀 naïve"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_template_renders_as_the_published_one(reference: Reference) -> None:
    content = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )
    processor = reference.processor
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert processor.tokenizer.chat_template == processor.chat_template


def test_answers_differ_and_end_both_ways(model_dir: Path, results: dict[tuple[str, str], dict[str, Any]]) -> None:
    answers = [result["answer"] for result in results.values()]
    assert len(set(answers)) == len(answers)
    ends = [result["answer_token_ids"][-1] for result in results.values()]
    lengths = [len(result["answer_token_ids"]) for result in results.values()]
    end_of_turn = json.loads((model_dir / "config.json").read_text())["eos_token_id"]
    by_eos = [length for length, end in zip(lengths, ends, strict=True) if end == end_of_turn]
    assert len(set(by_eos)) >= 3
    assert lengths.count(24) >= 3


def test_representations_depend_on_image_and_question(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    for (stem, _), result in results.items():
        assert result["vision_only_representation"].shape == (TEST.hidden_size,)
        assert result["vision_encoder_representation"].shape == (TEST.vision_hidden_size,)
        assert result["query_token_position"] == result["seq_len"] - 1
        first = results[stem, QUESTIONS[0]]
        for layer in LAYERS:
            key = f"vision_token_representation/layer_{layer}"
            np.testing.assert_allclose(result[key], first[key], rtol=1e-4, atol=1e-4)
    for (a, x), (b, y) in itertools.combinations(results, 2):
        one, other = results[a, x], results[b, y]
        keys = [f"query_token_representation/layer_{layer}" for layer in LAYERS]
        keys += ["vision_only_representation", "vision_encoder_representation"] if a != b else []
        for key in keys:
            enough = 0.01 if key.endswith("layer_0") else 0.1
            assert _difference(one[key], other[key]) > enough, (key, a, x, b, y)


def test_positions_and_windows_show(reference: Reference, photographs: list[Path]) -> None:
    """Under a default initialisation these changes all but vanish, and tests would let such bugs pass."""
    inputs = reference.inputs(photographs[1], QUESTIONS[1])
    right = _last_state(reference, inputs)
    length = inputs["input_ids"].shape[1]
    flat = np.broadcast_to(np.arange(length), (3, 1, length))
    grid = _positions(reference, inputs)
    suffix_off = grid.copy()
    suffix_off[:, :, int((inputs["input_ids"][0] == reference.model.config.image_token_id).nonzero()[-1]) + 1 :] += 1
    assert _difference(_last_state(reference, inputs, grid), right) < 1e-5
    assert _difference(_last_state(reference, inputs, flat), right) > 0.3
    assert _difference(_last_state(reference, inputs, grid[[0, 2, 1]]), right) > 0.02  # height and width swapped
    assert _difference(_last_state(reference, inputs, suffix_off), right) > 0.1

    visual = reference.model.model.visual
    windows = visual.fullatt_block_indexes
    try:
        visual.fullatt_block_indexes = list(range(TEST.vision_depth))
        assert _difference(_last_state(reference, inputs), right) > 0.1
    finally:
        visual.fullatt_block_indexes = windows


def test_pixel_limits_of_the_reference_hold(model_dir: Path, photographs: list[Path]) -> None:
    limited = Reference(model_dir, max_pixels=28 * 28 * 16)
    assert (limited.min_pixels, limited.max_pixels) == (3136, 28 * 28 * 16)
    result = limited(photographs[0], QUESTIONS[0], max_new_tokens=0, layers=[0])
    assert np.prod(result["image_grid_thw"]) // 4 <= 16
    assert result["answer"] == "" and result["answer_token_ids"] == []


@pytest.mark.parametrize("spec", [TEST, DEMO], ids=["test", "demo"])
def test_same_seed_same_bytes(tmp_path: Path, spec: SmallModelSpec) -> None:
    one, two = build_small_model(tmp_path / "one", spec), build_small_model(tmp_path / "two", spec)
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    other = build_small_model(tmp_path / "other", replace(spec, seed=spec.seed + 1))
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "other"}  # no partial directories


def test_complete_directory_is_left_and_another_refused(tmp_path: Path) -> None:
    directory = build_small_model(tmp_path / "model", TEST)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert build_small_model(directory, TEST) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="not the small model asked for"):
        build_small_model(directory, replace(TEST, seed=7))
    (tmp_path / "empty").mkdir()
    assert build_small_model(tmp_path / "empty", TEST).joinpath("config.json").is_file()


def test_command_line_builds_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open

    main([str(tmp_path / "model"), "--preset", "test", "--dtype", "bfloat16"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _positions(reference: Reference, inputs: dict[str, Any]) -> np.ndarray:
    """Return the three position rows, written out by hand."""
    ids = inputs["input_ids"][0].tolist()
    image = reference.model.config.image_token_id
    head, tokens = ids.index(image), ids.count(image)
    rows, columns = (int(n) // 2 for n in inputs["image_grid_thw"][0][1:])
    tail = np.arange(len(ids) - head - tokens) + head + max(rows, columns)
    before = np.arange(head)
    row, column = (axis.reshape(-1) + head for axis in np.indices((rows, columns)))
    image_rows = (np.full(tokens, head), row, column)
    return np.stack([np.concatenate([before, axis, tail]) for axis in image_rows])[:, None]  # (3, 1, L)


def _last_state(reference: Reference, inputs: dict[str, Any], positions: np.ndarray | None = None) -> np.ndarray:
    import torch

    extra = {} if positions is None else {"position_ids": torch.tensor(np.ascontiguousarray(positions))}
    with torch.inference_mode():
        states = reference.model(**inputs, **extra, output_hidden_states=True).hidden_states
    return np.asarray(states[-1][0, -1])
