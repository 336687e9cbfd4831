"""Build a small, genuine Qwen2.5-VL checkpoint offline, for tests and CPU benchmarks; the demo's is trained from one.

The directory holds the published checkpoints' files with their names and keys (flat `config.json`, `visual.*` and
`model.*` weights), so every supported transformers loads it as it loads the 7B. The vocabulary is the first 8,192 ranks
of Qwen's own encoding and the 22 added tokens; the weights are seeded noise. The answers therefore mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from workers.demo.small_spec import DEMO, PRESETS, SmallModelSpec
from workers.demo.small_tokenizer import (
    CHAT_TEMPLATE,
    PLAIN_TOKENS,
    SPECIAL_TOKENS,
    make_tokenizer,
    read_ranks,
    tokenizer_config,
)
from workers.demo.small_weights import save_weights, vocab_size_of

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
    ranks = read_ranks()
    ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS)}
    make_tokenizer(ranks).save(str(directory / "tokenizer.json"))
    save_weights(directory / "model.safetensors", spec, ranks, ids)
    documents = {
        "config.json": _config(spec, ids),
        "generation_config.json": _generation_config(ids),
        "preprocessor_config.json": _preprocessor_config(spec),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "tokenizer_config.json": tokenizer_config(ids),
        "small_model.json": asdict(spec),
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


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
        "vocab_size": vocab_size_of(ids),
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
