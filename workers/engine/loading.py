"""Loading a checkpoint, and what differs between versions of transformers in doing so."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.utils import cached_file

from storage.errors import UserError
from workers.checkpoint.families import refuse_blind
from workers.checkpoint.files import check_files
from workers.checkpoint.identity import local_directory
from workers.engine.interface import EngineSpec, ModelInfo
from workers.engine.models import family_of
from workers.engine.proving.soundness import refuse_foreign_tokenizer, refuse_unfinite, refuse_unmerged
from workers.errors import EngineStartError, in_a_line

_CPU_PREFIX_BYTES = 512 << 20
# Of the memory that is free once a model is loaded: prefixes that are kept, keys and values of a batch, states of a prefill.
_PREFIX_SHARE = 0.2
_BATCH_SHARE = 0.3
_PREFILL_SHARE = 0.25
_VISION_ADAPTER = "vision-lora"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _source(spec: EngineSpec) -> dict[str, Any]:
    """Return what `from_pretrained` takes beside the name. Raises UserError for a directory with files missing or damaged."""
    if (directory := local_directory(spec.model)) is None:
        return {"cache_dir": spec.cache_dir, "revision": spec.revision}
    check_files(directory)
    return {"cache_dir": spec.cache_dir}


def load_checkpoint(spec: EngineSpec) -> tuple[Any, Any, Path]:
    """Return a checkpoint's model, its processor and its config.json.

    Raises UserError for files that are missing or damaged, EngineStartError for a checkpoint that cannot be served.
    """
    source = _source(spec)
    model = _load_model(spec, source)
    try:
        processor = AutoProcessor.from_pretrained(spec.model, **source)
    except Exception as error:
        _refuse_without_package(error)
        # Whatever transformers and tokenizers raise for files that are not what they should be.
        raise EngineStartError(
            f"its processor cannot be loaded ({in_a_line(error)}): restore tokenizer.json, "
            "tokenizer_config.json, preprocessor_config.json and the chat template of the base checkpoint"
        ) from error
    if processor.chat_template is None and model.config.model_type == "phi4_multimodal":
        processor.chat_template = processor.tokenizer.chat_template  # the only place where the release has it
    if processor.chat_template is None:
        raise EngineStartError(
            "it has no chat template: put the base checkpoint's chat_template.json (or chat_template.jinja) beside its "
            "config.json; the processor does not read one in tokenizer_config.json"
        )
    refuse_foreign_tokenizer(model.config, processor.tokenizer, model.get_input_embeddings().weight.shape[0])
    return model, processor, Path(cached_file(spec.model, "config.json", **source))


def _load_model(spec: EngineSpec, source: dict[str, Any]) -> Any:
    """Load the weights on the GPU, on several where there are several, or on the CPU.

    Raises EngineStartError for another kind of model, and where transformers would warn and fill in random weights.
    """
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # in a log a bar is a hundred lines
    config = _config(spec, source)
    refuse_blind(config.to_dict())
    placement: dict[str, Any] = {}
    # Where torch prefers it (Hopper), cuDNN's attention plans anew for each shape, of which a batch has many: 0.44 s for one
    # on a B200 (modelscope/FunASR#3704). It has also failed and been wrong: pytorch/pytorch#190321, #193893.
    torch.backends.cuda.enable_cudnn_sdp(spec.cudnn_attention)
    if torch.cuda.is_available():
        # One GPU that is seen is the usual case (CUDA_VISIBLE_DEVICES); several are for a model that one cannot hold.
        placement["device_map"] = "auto" if torch.cuda.device_count() > 1 else {"": 0}
    options = {"dtype": _DTYPES[spec.dtype], "output_loading_info": True, **placement, **source}
    auto = family_of(config.model_type).AUTO
    try:
        model, report = auto.from_pretrained(spec.model, attn_implementation="sdpa", **options)
    except ImportError as error:
        _refuse_without_package(error)
        raise
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise EngineStartError(
            "its weights have other shapes than its config.json says: the two must be of one checkpoint"
        ) from error
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise EngineStartError(f"it is a {config.model_type} model, which takes no images") from error
        if "scaled_dot_product_attention" not in str(error):
            raise
        model, report = auto.from_pretrained(spec.model, **options)  # of a family that has another attention
    if missing := sorted(report["missing_keys"]):
        raise EngineStartError(f"the checkpoint lacks {len(missing)} of the model's weights, among them {missing[0]}")
    refuse_unmerged(report["unexpected_keys"])
    model = _adapted(model, spec, source)
    refuse_unfinite(model)
    return model.eval()


def _adapted(model: Any, spec: EngineSpec, source: dict[str, Any]) -> Any:
    """Return a model with the adapter that its checkpoint has for images merged into its weights, if it has one.

    Phi-4 multimodal's release keeps it beside the weights: without it, the model has not learnt to see.
    """
    files = ("adapter_config.json", "adapter_model.safetensors")
    if model.config.model_type != "phi4_multimodal":
        return model
    options = {**source, "_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = [cached_file(spec.model, f"{_VISION_ADAPTER}/{name}", **options) for name in files]
    if found == [None, None]:
        return model
    if None in found:
        raise EngineStartError(f"{_VISION_ADAPTER} lacks {files[found.index(None)]}: fetch the whole checkpoint")
    try:
        from peft import PeftModel
    except ImportError as error:
        _refuse_without_package(error)
        raise
    return PeftModel.from_pretrained(model, str(Path(found[0]).parent)).merge_and_unload()


def _refuse_without_package(error: Exception) -> None:
    """Raise EngineStartError where a package is missing that one family alone needs."""
    if isinstance(error, ImportError) and any(package in str(error) for package in ("num2words", "timm", "peft")):
        raise EngineStartError(
            f"it needs a package that is not here: pip install 'halp-extractor[models]' ({in_a_line(error)})"
        ) from error


def _config(spec: EngineSpec, source: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(spec.model, **source)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise EngineStartError(
                "it has code of its own, and no code of a model's repository is run here; is there a version of it that "
                "transformers knows?"
            ) from error
        if "revision" not in source:
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {spec.model}: there is no such directory here, and as a hub model it is neither in {spec.cache_dir} nor "
            f"to be had ({reason}). Where there is no network: `hf download {spec.model}` elsewhere, and name its cache with "
            "--cache-dir or HF_HOME"
        ) from error


def model_info(
    model: Any, processor: Any, config_file: Path, revision: str, *, vision_hidden_size: int, sized: bool, **more: Any
) -> ModelInfo:
    """Return what others must know of a loaded checkpoint; `sized`: its images come resized, within pixel limits."""
    config = model.config
    text = config.get_text_config()
    minimum, maximum = pixel_limits(processor.image_processor) if sized else (None, None)
    return ModelInfo(
        model_type=config.model_type,
        revision=getattr(config, "_commit_hash", None) or revision,
        config_sha256=hashlib.sha256(config_file.read_bytes()).hexdigest(),
        num_hidden_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vision_hidden_size=vision_hidden_size,
        max_position_embeddings=text.max_position_embeddings,
        tokenizer_json=processor.tokenizer.backend_tokenizer.to_str(),
        min_pixels=minimum,
        max_pixels=maximum,
        environment=environment(model.get_input_embeddings().weight.device, config._attn_implementation),
        **more,
    )


def pixel_limits(processor: Any) -> tuple[int, int]:
    """Return the image processor's pixel limits; they moved into `size` in transformers 5."""
    size = processor.size
    minimum = getattr(processor, "min_pixels", None) or size["shortest_edge"]
    maximum = getattr(processor, "max_pixels", None) or size["longest_edge"]
    return int(minimum), int(maximum)


def environment(device: torch.device, attention: str) -> dict[str, str]:
    """Return what computes, as a part records it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "",
        "attention_implementation": attention,
        "attention_kernels": _kernels(device),
        "library_versions": json.dumps(versions),
    }


def _kernels(device: torch.device) -> str:
    """Return which of torch's attention kernels may run."""
    if device.type != "cuda":
        return device.type
    cuda: Any = torch.backends.cuda
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return ", ".join(name for name, is_on in enabled.items() if is_on)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class MemoryBounds:
    """What is done at once in the memory that a loaded model leaves."""

    prefix_bytes: int  # of prefixes that are kept
    batch_tokens: int  # of a batch's prompts
    prefill_tokens: int  # that go through the model in one forward

    @classmethod
    def within(cls, free: int, device: str, cached: int, active: int) -> MemoryBounds:
        """Return the bounds for so many free bytes; a token's keys and values take `cached`, a forward over it `active`."""
        return cls(
            prefix_bytes=int(free * _PREFIX_SHARE) if device == "cuda" else _CPU_PREFIX_BYTES,
            batch_tokens=max(1, int(free * _BATCH_SHARE) // cached),
            prefill_tokens=max(1, int(free * _PREFILL_SHARE) // active),
        )
