"""Tiny checkpoints of many families: the genuine classes with random weights, saved as a user's are, from configs alone.

Each has its family's real processor and image processor, a chat template of the family's shape, and Qwen's first 8,192 ranks as
its vocabulary. Attention is peaked and norms and biases are random, so that mistakes of position and mask show.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from workers.demo.small_tokenizer import make_tokenizer, read_ranks

SINCE_5 = transformers.__version__ >= "5"
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 224, "patch_size": 14, "head_dim": 16,
}  # fmt: skip
SQUARE = {"height": 56, "width": 56}
TILES = {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 6}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


class NotBuiltError(Exception):
    """The installed transformers does not have a family, or cannot save a tiny one."""


Made = tuple[Any, Any, str]  # model, processor, chat template


def template(user: str, image: str, before_question: str, assistant: str, *, start: str = "") -> str:
    """Return a Jinja template over one user message [image, text], and over a system message as plain text."""
    return (
        "{%- if messages[0]['role'] == 'system' %}SYSTEM{%- endif %}".replace("SYSTEM", "{{ messages[0]['content'] + '\\n' }}")
        + f"{{{{ {start!r} }}}}"
        + "{%- for message in messages if message['role'] == 'user' %}"
        + f"{{{{ {user!r} }}}}"
        + "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}"
        + f"{{{{ {image + before_question!r} }}}}"
        + "{%- else %}{{ part['text'] }}{%- endif %}{%- endfor %}"
        + f"{{%- endfor %}}{{{{ {assistant!r} }}}}"
    )


CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def of_class(name: str) -> Any:
    if (found := getattr(transformers, name, None)) is None:
        raise NotBuiltError(f"transformers {transformers.__version__} has no {name}")
    return found


def tokenizer(*specials: str, of: str = "PreTrainedTokenizerFast", **named: str) -> Any:
    """Return a tokenizer with added special tokens; `named` ones are attributes, as some processors want them.

    `of`: the class that the family's processor insists on before transformers 5.
    """
    kind: Any = PreTrainedTokenizerFast if SINCE_5 else of_class(of)
    made = kind(
        tokenizer_object=make_tokenizer(read_ranks()), pad_token="<|endoftext|>", eos_token="<|im_end|>",
        model_input_names=["input_ids", "attention_mask"], **({"extra_special_tokens": named} if named else {}),
    )  # fmt: skip
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials], special_tokens=True)
    made.padding_side = "left"
    return made


def wide() -> int:
    return TEXT["hidden_size"]


def head() -> int:
    return TEXT["hidden_size"] // TEXT["num_attention_heads"]


def sections() -> list[int]:
    """Return how the frequencies of a head are divided between time, height and width, as in the released models."""
    side = 3 * (head() // 2) // 8
    return [head() // 2 - 2 * side, side, side]


def kinds(*pattern: str) -> list[str]:
    """Return the kind of each layer."""
    return list(pattern) * (TEXT["num_hidden_layers"] // len(pattern))


def rows(made: Any) -> int:
    return -(-(len(made) + 8) // 64) * 64


def rope(**more: Any) -> dict[str, Any]:
    """Return rotary settings as the installed transformers spells them."""
    if SINCE_5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **more}}
    partial = {"partial_rotary_factor": more.pop("partial_rotary_factor")} if "partial_rotary_factor" in more else {}
    return {"rope_theta": 1e4, "rope_scaling": None if partial and not more else {"rope_type": "default", **more}, **partial}


def ids_of(made: Any, **names: str) -> dict[str, int]:
    return {name: made.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen(kind: str, vision: dict[str, Any], text: dict[str, Any], patch: int, *, system: str = "") -> Made:
    made = tokenizer(of="Qwen2TokenizerFast")
    named = ids_of(
        made, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )  # fmt: skip
    config = of_class(f"{kind}Config")(text_config={**TEXT, "vocab_size": rows(made), **text}, vision_config=vision, **named)
    images = transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": (2 * patch) ** 2 * 4, "longest_edge": (2 * patch) ** 2 * 60}, patch_size=patch
    )
    processor = "Qwen3VL" if kind.startswith("Qwen3") else kind
    video = "Qwen3VL" if kind.startswith("Qwen3") else "Qwen2VL"
    return (
        of_class(f"{kind}ForConditionalGeneration")(config),
        of_class(f"{processor}Processor")(
            image_processor=images, tokenizer=made, video_processor=of_class(f"{video}VideoProcessor")()
        ),
        template(CHATML[0], QWEN_IMAGE, "", CHATML[1], start=system),
    )


def qwen2_vl() -> Made:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": wide(), "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return qwen("Qwen2VL", vision, rope(mrope_section=sections()), 14, system=SYSTEM)


def qwen3_vl() -> Made:
    vision = {
        "depth": 4, "hidden_size": 32, "out_hidden_size": wide(), "num_heads": 2, "intermediate_size": 64, "patch_size": 16,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    return qwen("Qwen3VL", vision, {"head_dim": head(), **rope(mrope_section=sections(), mrope_interleaved=True)}, 16)


def qwen3_5() -> Made:
    vision = {
        "depth": 4, "hidden_size": 32, "out_hidden_size": wide(), "num_heads": 2, "intermediate_size": 64, "patch_size": 16,
        "num_position_embeddings": 64,
    }  # fmt: skip
    text = {
        "head_dim": head(), "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": kinds("linear_attention", "full_attention"),
        **rope(partial_rotary_factor=1.0, mrope_section=sections(), mrope_interleaved=True),
    }  # fmt: skip
    return qwen("Qwen3_5", vision, text, 16)


def glm4v() -> Made:
    made = tokenizer(
        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|user|>", "<|assistant|>",
        "[gMASK]", "<sop>", "<think>", image_token="<|image|>", video_token="<|video|>",
    )  # fmt: skip
    named = ids_of(
        made, image_token_id="<|image|>", video_token_id="<|video|>", image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>", video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )  # fmt: skip
    config = transformers.Glm4vConfig(
        text_config={**TEXT, "vocab_size": rows(made), **rope(mrope_section=sections(), partial_rotary_factor=1.0)},
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 2, "image_size": 112, "patch_size": 14, "out_hidden_size": wide(),
            "intermediate_size": 64,
        },
        **named,
    )  # fmt: skip
    images = transformers.Glm4vImageProcessor(
        size={"shortest_edge": 56 * 56 * 2, "longest_edge": 28 * 28 * 2 * 60}, patch_size=14
    )
    processor = transformers.Glm4vProcessor(
        image_processor=images, tokenizer=made, video_processor=transformers.Glm4vVideoProcessor()
    )
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    return (
        transformers.Glm4vForConditionalGeneration(config),
        processor,
        template("<|user|>\n", image, "", "<|assistant|>\n", start="[gMASK]<sop>"),
    )


def gemma3(window: int = 4096) -> Made:
    made = tokenizer(
        "<start_of_turn>", "<end_of_turn>", "<bos>", image_token="<image_soft_token>", boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )  # fmt: skip
    named = ids_of(
        made, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>", image_token_index="<image_soft_token>"
    )
    text = {
        **TEXT, "head_dim": head(), "vocab_size": rows(made), "sliding_window": window, "query_pre_attn_scalar": 16,
        "layer_types": kinds("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
        "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, **named)
    images = transformers.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    return (
        transformers.Gemma3ForConditionalGeneration(config),
        transformers.Gemma3Processor(image_processor=images, tokenizer=made, image_seq_length=16),
        template("<start_of_turn>user\n", "<start_of_image>", "", "<end_of_turn>\n<start_of_turn>model\n", start="<bos>"),
    )


def llava() -> Made:
    made = tokenizer("<image>")
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": rows(made)}, vision_config=CLIP,
        **ids_of(made, image_token_index="<image>"),
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=made, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor, template("USER: ", "<image>", "\n", " ASSISTANT:")


def vipllava() -> Made:
    """Return a model of an architecture that the project knows nothing of."""
    model, processor, chat_template = llava()
    config = transformers.VipLlavaConfig(
        text_config=model.config.text_config, vision_config=model.config.vision_config, vision_feature_layers=[-2, -1],
        **ids_of(processor.tokenizer, image_token_index="<image>"),
    )  # fmt: skip
    return transformers.VipLlavaForConditionalGeneration(config), processor, chat_template


def pixtral() -> Made:
    made = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "<s>")
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "mistral", "head_dim": head(), "vocab_size": rows(made), "sliding_window": None},
        vision_config=PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full",
        **ids_of(made, image_token_index="[IMG]"),
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = transformers.PixtralProcessor(image_processor=images, tokenizer=made, patch_size=14)
    return (
        transformers.LlavaForConditionalGeneration(config),
        processor,
        template("[INST]", "[IMG]", "", "[/INST]", start="<s>"),
    )


def mistral3() -> Made:
    made = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "<s>")
    config = transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "head_dim": head(), "vocab_size": rows(made), "sliding_window": None},
        vision_config=PIXTRAL, spatial_merge_size=2, **ids_of(made, image_token_index="[IMG]"),
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(size={"longest_edge": 168}, patch_size={"height": 28, "width": 28})
    processor = transformers.PixtralProcessor(image_processor=images, tokenizer=made, patch_size=14, spatial_merge_size=2)
    return (
        transformers.Mistral3ForConditionalGeneration(config),
        processor,
        template("[INST]", "[IMG]", "", "[/INST]", start="<s>"),
    )


def llava_next() -> Made:
    made = tokenizer("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    config = transformers.LlavaNextConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": rows(made)}, vision_config=CLIP,
        image_grid_pinpoints=PINPOINTS, **ids_of(made, image_token_index="<image>"),
    )  # fmt: skip
    images = transformers.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaNextProcessor(
        image_processor=images, tokenizer=made, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return (
        transformers.LlavaNextForConditionalGeneration(config),
        processor,
        template(header.format("user"), "<image>", "\n", "<|eot_id|>" + header.format("assistant")),
    )


def llava_onevision() -> Made:
    made = tokenizer("<image>", "<video>")
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": rows(made)}, vision_config=SIGLIP,
        image_grid_pinpoints=PINPOINTS, **ids_of(made, image_token_index="<image>", video_token_index="<video>"),
    )  # fmt: skip
    images = transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=images, tokenizer=made, video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16, vision_feature_select_strategy="full",
    )  # fmt: skip
    return (
        transformers.LlavaOnevisionForConditionalGeneration(config),
        processor,
        template("<|im_start|>user ", "<image>", "\n", "<|im_end|><|im_start|>assistant\n"),
    )


def idefics3(kind: str = "Idefics3") -> Made:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    made = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", *tiles)
    config = of_class(f"{kind}Config")(
        text_config={**TEXT, "model_type": "llama", "vocab_size": rows(made), "pad_token_id": 0},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
            "patch_size": 14,
        },
        scale_factor=2, **ids_of(made, image_token_id="<image>"),
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 56}}
    parts: dict[str, Any] = {"image_processor": of_class(f"{kind}ImageProcessor")(**sizes), "tokenizer": made}
    if kind == "SmolVLM":
        parts["video_processor"] = transformers.SmolVLMVideoProcessor(**sizes)
    processor = of_class(f"{kind}Processor")(image_seq_len=4, **parts)
    model = of_class(f"{kind}ForConditionalGeneration")(config)
    return model, processor, template("<|im_start|>User:", "<image>", "", "<end_of_utterance>\nAssistant:")


def smolvlm() -> Made:
    return idefics3("SmolVLM")


def internvl() -> Made:
    made = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": rows(made)},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": False,
        },
        image_seq_length=4, **ids_of(made, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(**TILES), tokenizer=made,
        video_processor=transformers.InternVLVideoProcessor(), image_seq_length=4,
    )  # fmt: skip
    return (
        transformers.InternVLForConditionalGeneration(config),
        processor,
        template(CHATML[0], "<IMG_CONTEXT>", "\n", CHATML[1]),
    )


def aya_vision(window: int = 4096) -> Made:
    turn = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
    made = tokenizer(
        "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL", "<image>", *turn
    )
    config = transformers.AyaVisionConfig(
        text_config={
            **TEXT, "model_type": "cohere2", "vocab_size": rows(made), "sliding_window": window,
            "layer_types": kinds("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
        },
        vision_config=SIGLIP, downsample_factor=2, **ids_of(made, image_token_index="<|IMG_PATCH|>"),
    )  # fmt: skip
    processor = transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(**TILES), tokenizer=made, patch_size=14, img_size=56,
        downsample_factor=2,
    )  # fmt: skip
    start, end, user, bot = turn
    return (
        transformers.AyaVisionForConditionalGeneration(config),
        processor,
        template(start + user, "<image>", "", end + start + bot),
    )


def ovis2() -> Made:
    made = tokenizer("<image>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    config = transformers.Ovis2Config(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": rows(made)},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
            "patch_size": 14, "vocab_size": 128, "hidden_stride": 2, "num_visual_indicator_tokens": 5,
        },
        visual_indicator_token_ids=[made.convert_tokens_to_ids(token) for token in indicators], vocab_size=rows(made),
        hidden_size=wide(), **ids_of(made, image_token_id="<IMG_ATOM>"),
    )  # fmt: skip
    processor = transformers.Ovis2Processor(
        image_processor=transformers.Ovis2ImageProcessor(**TILES), tokenizer=made, image_seq_length=4
    )
    return transformers.Ovis2ForConditionalGeneration(config), processor, template(CHATML[0], "<image>", "\n", CHATML[1])


def deepseek_vl() -> Made:
    made = tokenizer(image_token="<image_placeholder>")
    config = transformers.DeepseekVLConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": rows(made)}, vision_config=SIGLIP,
        **ids_of(made, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    processor = transformers.DeepseekVLProcessor(
        image_processor=transformers.DeepseekVLImageProcessor(size=SQUARE), tokenizer=made, num_image_tokens=16
    )
    return (
        transformers.DeepseekVLForConditionalGeneration(config),
        processor,
        template("User: ", "<image_placeholder>", "", "\n\nAssistant:"),
    )


def janus() -> Made:
    if not SINCE_5:
        raise NotBuiltError("transformers 4 does not save how many tokens its processor makes of an image")
    made = tokenizer(
        of="LlamaTokenizerFast", image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>"
    )
    config = transformers.JanusConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": rows(made)},
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
            "mlp_ratio": 2.0, "projection_dim": wide(), "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 64, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
            "num_res_blocks": 1, "projection_dim": wide(), "image_token_embed_dim": wide(), "num_patches": 4,
        },
        **ids_of(made, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    processor = transformers.JanusProcessor(
        image_processor=transformers.JanusImageProcessor(size=SQUARE, min_size=14), tokenizer=made, num_image_tokens=16
    )
    return (
        transformers.JanusForConditionalGeneration(config),
        processor,
        template("<|User|>: ", "<image_placeholder>", "\n", "\n\n<|Assistant|>:"),
    )


def molmo2() -> Made:
    made = tokenizer(
        "<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>",
        "<frame_end>", "<im_low>",
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "image_size": [56, 56], "patch_size": 14, "num_position_embeddings": 16,
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [-1, -2], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 64, "text_hidden_size": wide(),
    }  # fmt: skip
    config = of_class("Molmo2Config")(
        text_config={**TEXT, "head_dim": head(), "vocab_size": rows(made), "additional_vocab_size": 0}, vision_config=vision,
        adapter_config=adapter,
        **ids_of(
            made, image_start_token_id="<im_start>", low_res_image_start_token_id="<low_res_im_start>",
            image_end_token_id="<im_end>", image_patch_id="<im_patch>", frame_start_token_id="<frame_start>",
            frame_end_token_id="<frame_end>",
        ),
    )  # fmt: skip
    images = transformers.Molmo2ImageProcessor(size=SQUARE, patch_size=14, max_crops=4, overlap_margins=[1, 1])
    processor = transformers.Molmo2Processor(
        image_processor=images, video_processor=transformers.Molmo2VideoProcessor(), tokenizer=made
    )
    return transformers.Molmo2ForConditionalGeneration(config), processor, template(CHATML[0], "<|image|>", "", CHATML[1])


def phi4_multimodal() -> Made:
    made = tokenizer(
        "<|user|>", "<|end|>", "<|assistant|>", of="GPT2TokenizerFast", image_token="<|endoftext10|>",
        audio_token="<|endoftext11|>",
    )  # fmt: skip
    image, audio = (made.convert_tokens_to_ids(token) for token in ("<|endoftext10|>", "<|endoftext11|>"))
    config = transformers.Phi4MultimodalConfig(
        **TEXT, vocab_size=rows(made), pad_token_id=0, bos_token_id=0, original_max_position_embeddings=4096,
        **rope(partial_rotary_factor=1.0),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 448,
            "patch_size": 14, "crop_size": 448, "image_token_id": image,
        },
        audio_config={
            "hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "nemo_conv_channels": 16,
            "ext_pw_out_channel": 32, "audio_token_id": audio,
        },
    )  # fmt: skip
    images = of_class("Phi4MultimodalImageProcessor" if SINCE_5 else "Phi4MultimodalImageProcessorFast")(
        size={"height": 448, "width": 448}, patch_size=14, dynamic_hd=4
    )
    processor = transformers.Phi4MultimodalProcessor(
        image_processor=images, audio_processor=transformers.Phi4MultimodalFeatureExtractor(), tokenizer=made
    )
    return (
        transformers.Phi4MultimodalForCausalLM(config),
        processor,
        template("<|user|>", "<|endoftext10|>", "", "<|end|><|assistant|>"),
    )


def mllama() -> Made:
    made = tokenizer(
        "<|image|>", "<|python_tag|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    made.bos_token = "<|begin_of_text|>"
    text = {
        **TEXT, "num_hidden_layers": 5, "cross_attention_layers": [1, 3], "vocab_size": rows(made) - 8, "pad_token_id": 0,
        "bos_token_id": 0, **rope(),
    }  # fmt: skip
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 64,
        "image_size": 56, "patch_size": 14, "max_num_tiles": 4, "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96, "supported_aspect_ratios": ratios,
    }  # fmt: skip
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, **ids_of(made, image_token_index="<|image|>"))
    processor = transformers.MllamaProcessor(
        image_processor=transformers.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer=made
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return (
        transformers.MllamaForConditionalGeneration(config),
        processor,
        template(header.format("user"), "<|image|>", "", "<|eot_id|>" + header.format("assistant"), start="<|begin_of_text|>"),
    )


def paligemma() -> Made:
    made = tokenizer("<image>", "<bos>", of="GemmaTokenizerFast")
    made.bos_token = "<bos>"
    images = transformers.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=made)
    text = {
        **TEXT, "model_type": "gemma2", "head_dim": head(), "vocab_size": rows(made) + 1280, "sliding_window": 4096,
        "query_pre_attn_scalar": 16,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config={**SIGLIP, "projection_dim": wide()}, image_token_index=processor.image_token_id,
        projection_dim=wide(), hidden_size=wide(),
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config), processor, template("", "<image>", "", "")


def fast_vlm() -> Made:
    made = tokenizer("<image>")
    config = of_class("FastVlmConfig")(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": rows(made)},
        vision_config={
            "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
            "hidden_size": 3072, "initializer_range": 0.02, "model_args": {"inference_mode": True},
        },
        **ids_of(made, image_token_index="<image>"),
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=made, patch_size=64, vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )  # fmt: skip
    return transformers.FastVlmForConditionalGeneration(config), processor, template(CHATML[0], "<image>", "\n", CHATML[1])


FAMILIES: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        qwen2_vl, qwen3_vl, qwen3_5, glm4v, gemma3, llava, pixtral, mistral3, llava_next, llava_onevision, idefics3, smolvlm,
        internvl, aya_vision, ovis2, deepseek_vl, janus, molmo2, phi4_multimodal, mllama, paligemma, fast_vlm,
    )
}  # fmt: skip


UNKNOWN = {"vipllava": vipllava}


def decoder_of(model: Any) -> Any:
    """Return the text decoder, by the names that families give it."""
    for name in ("language_model", "text_model"):
        if hasattr(model.model, name):
            return getattr(model.model, name)
    return model.model


@torch.no_grad()
def shake(model: Any, gain: float = 2.0) -> Any:
    """Give a model weights under which positions, masks and gates matter; by each weight's name, so always the same."""
    decoder = decoder_of(model)
    # Norms of Gemma and Qwen3.5 multiply by one more than their weight.
    plus_one = "gemma" in type(model).__name__.lower() or "Qwen3_5" in type(model).__name__
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        low = name.lower()
        base = 0.0 if plus_one and "language_model" in low and "linear_attn.norm" not in low else 1.0
        if weight is decoder.norm.weight:  # both signs: a tied head must not find the token's own embedding
            value = noise * 0.3 + torch.sign(noise) - (1.0 - base)
        elif ("norm" in low and weight.ndim == 1 and not low.endswith("bias")) or low.endswith("ln_q.weight"):
            value = (noise * 0.3 + base).clamp(base - 0.8, base + 1.0)
        elif "gate" in low and weight.numel() == 1:  # mllama's, which are zero before training
            value = noise.abs() * 0.3 + 0.7
        elif low.endswith("a_log"):
            value = noise * 0.3 - 1.5
        elif low.endswith("dt_bias"):
            value = noise * 0.3 - 1.0
        elif weight.ndim <= 1:
            value = noise * 0.3
        elif "embed_tokens" in low and "extend" not in low:
            value = noise
        elif "embedding" in low and weight.ndim == 2 and "patch" not in low:
            value = noise * 0.5
        else:
            value = noise * math.prod(weight.shape[1:]) ** -0.5
            if any(part in low for part in ("q_proj", "k_proj", ".query", ".key")):
                value = value * gain
            if ".qkv." in low:
                value[: 2 * weight.shape[0] // 3] *= gain
        weight.copy_(value)
    return model.eval()


def build_tiny(family: str, directory: Path) -> Path:
    """Save a family's tiny checkpoint, as `from_pretrained` of a user's machine finds one."""
    model, processor, chat_template = (FAMILIES | UNKNOWN)[family]()
    shake(model)
    made = processor.tokenizer
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=made.pad_token_id, eos_token_id=made.eos_token_id, bos_token_id=made.bos_token_id
    )
    processor.chat_template = chat_template
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
