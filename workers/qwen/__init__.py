"""The Qwen2.5-VL engine. An engine process alone loads it, and with it torch and transformers."""

from workers.qwen.engine import QwenEngine

__all__ = ["QwenEngine"]
