"""The Qwen2.5-VL engine. The only modules that import torch and transformers; an engine process alone loads them."""

from workers.qwen.engine import QwenEngine

__all__ = ["QwenEngine"]
