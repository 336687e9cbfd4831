"""Build a small, genuine Qwen2.5-VL checkpoint offline, for tests and CPU benchmarks; the demo's is trained from one.

The directory holds the published checkpoints' files with their names and keys (flat `config.json`, `visual.*` and
`model.*` weights), so every supported transformers loads it as it loads the 7B. The vocabulary is the first 8,192 ranks
of Qwen's own encoding and the 22 added tokens; the weights are seeded noise. The answers therefore mean nothing.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

BPE_RANKS = Path(__file__).parent.parent / "data" / "qwen-8k.tiktoken"

# The order is the checkpoint's: ids follow the encoding's last rank. The last eight print as ordinary text.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's own template, byte for byte.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class SmallModelSpec:
    """Name the sizes and the temper of one small checkpoint; the same spec gives the same bytes.

    `expressive` replaces the default initialisation, under which a model ignores positions and masks and answers every
    question alike, by peaked attention (`attention_gain` is the standard deviation of queries and keys), random biases
    and norm weights; without it, weights have the standard deviation `initializer_range`. `end_gain` enlarges the
    end-of-turn row of the head: higher values end more answers early. `word_gain` enlarges the rows of whole words, so
    that answers read as words.
    """

    hidden_size: int = 128
    intermediate_size: int = 576
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 172  # like the 7B's 3420, no multiple of 8
    vision_depth: int = 4
    vision_heads: int = 4
    fullatt_block_indexes: tuple[int, ...] = (1, 3)
    window_size: int = 112
    min_pixels: int = 3136
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    seed: int = 0
    initializer_range: float = 0.02
    expressive: bool = True
    attention_gain: float = 2.0
    end_gain: float = 2.2
    word_gain: float = 1.0


DEMO = SmallModelSpec(end_gain=3.8, word_gain=1.5)
BENCH = SmallModelSpec(
    hidden_size=512, intermediate_size=1536, num_attention_heads=8,
    vision_hidden_size=320, vision_intermediate_size=856, vision_depth=8, vision_heads=8, fullatt_block_indexes=(3, 7),
)  # fmt: skip
TEST = SmallModelSpec(
    hidden_size=64, intermediate_size=160, num_hidden_layers=7,
    vision_hidden_size=32, vision_intermediate_size=84, vision_heads=2, tie_word_embeddings=False, seed=1,
)  # fmt: skip
PRESETS = {"demo": DEMO, "bench": BENCH, "test": TEST}

UNSAID = ("fuck", "shit", "sex", "porn", "erot", "rape", "nazi", "kill")  # the demo's answers are shown to people

FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json", "tokenizer.json",
    "tokenizer_config.json", "model.safetensors", "small_model.json",
)  # fmt: skip


def build_small_model(directory: Path, spec: SmallModelSpec = DEMO) -> Path:
    """Write the checkpoint of `spec` to `directory` in one rename, or leave a complete one of the same spec as it is.

    Raises FileExistsError where the directory holds anything else.
    """
    directory = Path(directory)
    if _holds(directory, spec):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        _write(partial, spec)
        try:
            partial.rename(directory)
        except OSError as error:  # not empty: somebody else's files, or another process was faster with the same model
            if not _holds(directory, spec):
                raise FileExistsError(
                    f"{directory} exists and is not the small model asked for: remove it or name another directory."
                ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _holds(directory: Path, spec: SmallModelSpec) -> bool:
    if not all((directory / name).is_file() for name in FILES):
        return False
    stored: object = json.loads((directory / "small_model.json").read_text(encoding="utf-8"))
    return bool(stored == json.loads(json.dumps(asdict(spec))))  # tuples become lists


def _write(directory: Path, spec: SmallModelSpec) -> None:
    ranks = _read_ranks()
    ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS)}
    _tokenizer(ranks).save(str(directory / "tokenizer.json"))
    _save_weights(directory / "model.safetensors", spec, ranks, ids)
    documents = {
        "config.json": _config(spec, ids),
        "generation_config.json": _generation_config(ids),
        "preprocessor_config.json": _preprocessor_config(spec),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "tokenizer_config.json": _tokenizer_config(ids),
        "small_model.json": asdict(spec),
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _read_ranks() -> dict[bytes, int]:
    lines = (line.split() for line in BPE_RANKS.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Assemble the tokenizer from primitives: `Qwen2Tokenizer(...)` would number eos and pad first and break 4.x."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in (_parents(t, ranks) for t in sorted(ranks, key=ranks.__getitem__)[256:])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([_added_token(AddedToken, t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([_added_token(AddedToken, t, special=False) for t in PLAIN_TOKENS])
    return tokenizer


def _added_token(kind: Any, token: str, special: bool) -> Any:
    return kind(token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)


def _byte_letters() -> list[str]:
    """Return the printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def _parents(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two pieces that the merge of `token` joins: what lower ranks alone make of its bytes."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        joined = [ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(pieces)]
        i = joined.index(min(joined))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces[0], pieces[1]


# --- configuration files ---------------------------------------------------------------------------------------------


def _config(spec: SmallModelSpec, ids: dict[str, int]) -> dict[str, Any]:
    """Return the flat `config.json` of the published checkpoints, which 4.49 to 5.x all read."""
    half = spec.hidden_size // spec.num_attention_heads // 2  # rotary frequencies of a head
    side = 3 * half // 8  # the 7B's [16, 24, 24] of 64
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": 128000,
        "max_window_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_key_value_heads": spec.num_key_value_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "torch_dtype": spec.dtype,
        "use_cache": True,
        "vocab_size": _vocab_size(ids),
        "vision_config": {
            "depth": spec.vision_depth,
            "fullatt_block_indexes": list(spec.fullatt_block_indexes),
            "hidden_act": "silu",
            "hidden_size": spec.vision_hidden_size,
            "in_chans": 3,
            "intermediate_size": spec.vision_intermediate_size,
            "num_heads": spec.vision_heads,
            "out_hidden_size": spec.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": spec.window_size,
        },
    }


def _vocab_size(ids: dict[str, int]) -> int:
    """Round the vocabulary up past the tokenizer's last id, as the published checkpoints do."""
    return -(-(max(ids.values()) + 1) // 64) * 64


def _generation_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "repetition_penalty": 1.05,
        "temperature": 0.000001,
    }


def _preprocessor_config(spec: SmallModelSpec) -> dict[str, Any]:
    return {
        "min_pixels": spec.min_pixels,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": t, **flags, "special": t in SPECIAL_TOKENS} for t, i in ids.items()}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5_VLProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# --- weights ---------------------------------------------------------------------------------------------------------


def _save_weights(path: Path, spec: SmallModelSpec, ranks: dict[bytes, int], ids: dict[str, int]) -> None:
    import torch
    from safetensors.torch import save

    dtype: torch.dtype = getattr(torch, spec.dtype)
    rows = _head_rows(spec, ranks, ids)
    tensors = {}
    for name, shape in _shapes(spec, _vocab_size(ids)):
        values = _sample(name, shape, spec)
        if spec.expressive and (name == "lm_head.weight" or (spec.tie_word_embeddings and "embed_tokens" in name)):
            values *= rows[:, None]
        tensors[name] = torch.from_numpy(values).to(dtype)
    path.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file would leave it readable by its owner only


def _shapes(spec: SmallModelSpec, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's published name and shape; transformers 4.52 and later rename them as they load."""
    width, inner = spec.vision_hidden_size, spec.vision_intermediate_size
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for block in (f"visual.blocks.{i}" for i in range(spec.vision_depth)):
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.gate_proj", inner, width)
        yield from _linear(f"{block}.mlp.up_proj", inner, width)
        yield from _linear(f"{block}.mlp.down_proj", width, inner)
    yield "visual.merger.ln_q.weight", (width,)
    yield from _linear("visual.merger.mlp.0", 4 * width, 4 * width)
    yield from _linear("visual.merger.mlp.2", spec.hidden_size, 4 * width)

    hidden, inner = spec.hidden_size, spec.intermediate_size
    shared = hidden // spec.num_attention_heads * spec.num_key_value_heads
    yield "model.embed_tokens.weight", (vocab_size, hidden)
    for layer in (f"model.layers.{i}" for i in range(spec.num_hidden_layers)):
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        yield from _linear(f"{layer}.self_attn.k_proj", shared, hidden)
        yield from _linear(f"{layer}.self_attn.v_proj", shared, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (vocab_size, hidden)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _sample(name: str, shape: tuple[int, ...], spec: SmallModelSpec) -> np.ndarray:
    """Draw one tensor; the generator depends on seed and name only, so that a new tensor moves no other."""
    import numpy as np

    random = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    noise: np.ndarray = random.standard_normal(shape, dtype=np.float32)
    is_norm = "norm" in name or "ln_q" in name
    if not spec.expressive:
        noise *= 0.0 if is_norm or name.endswith(".bias") else spec.initializer_range
        noise += is_norm
        return noise
    if name == "model.norm.weight":
        # Both signs, so that a tied head does not find the last token's own embedding in the state and repeat it.
        noise *= 0.3
        noise += np.copysign(1.0, noise)
    elif is_norm:
        noise *= 0.3
        noise += 1.0
        noise.clip(0.2, 2.0, out=noise)
    elif name.endswith(".bias"):
        noise *= 0.3
    elif "embed_tokens" not in name:
        noise *= math.prod(shape[1:]) ** -0.5  # a sum over the inputs keeps their variance
    if ".q_proj." in name or ".k_proj." in name:
        noise *= spec.attention_gain
    if ".qkv." in name:
        noise[: 2 * spec.vision_hidden_size] *= spec.attention_gain  # queries and keys, not values
    return noise


def _head_rows(spec: SmallModelSpec, ranks: dict[bytes, int], ids: dict[str, int]) -> np.ndarray:
    """Return each vocabulary row's factor: words and the end of turn up, other added tokens down, padding out."""
    import numpy as np

    rows = np.zeros(_vocab_size(ids), dtype=np.float32)
    for token, rank in ranks.items():
        is_word = len(token) > 3 and token[:1] == b" " and token[1:].isalpha() and token.isascii()
        rows[rank] = spec.word_gain if is_word and not any(stem.encode() in token.lower() for stem in UNSAID) else 1.0
    for name, i in ids.items():
        rows[i] = spec.end_gain if name == "<|im_end|>" else 0.2
    return rows


def main(argv: list[str] | None = None) -> None:
    """Build a small model from the command line and print its directory."""
    parser = argparse.ArgumentParser(prog="python -m workers.demo.small_model", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo", help="the sizes (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="the seed of the weights (default: the preset's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    options = parser.parse_args(argv)
    preset = PRESETS[options.preset]
    seed = preset.seed if options.seed is None else options.seed
    directory = build_small_model(options.directory, replace(preset, seed=seed, dtype=options.dtype))
    sys.stdout.write(f"{directory}\n")


if __name__ == "__main__":
    main()
