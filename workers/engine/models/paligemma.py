"""PaliGemma: a prefix language model, whose image tokens see the question. Prompts are computed whole."""

from __future__ import annotations

from workers.engine.models import base


class Family(base.Family):
    """Every token of a prompt sees every other: nothing can be shared but the image's features."""

    share = "nothing"
    marks_images = False  # its token_type_ids tell prompt from answer
