"""The command line that options were given by, spelled again."""

from __future__ import annotations

import shlex
from typing import Any

from producer.options import RunOptions, option_defaults


def command_line(command: str, options: RunOptions, output_dir: str) -> str | None:
    """Return the command with these options that writes into another directory; None where no command has them: of a frame."""
    source, asked = options.source, options.computation
    if source.frame is not None:
        return None
    values: dict[str, Any] = {
        "images_dir": None if source.question is not None else options.images_dir,
        "columns": [",".join(f"{role}={column}" for role, column in source.columns.items())] if source.columns else None,
        "question": source.question,
        "strip_placeholders": source.strip_placeholders,
        "model": options.model,
        "revision": options.revision,
        **asked.options(),
        "chat_template": None if asked.chat_template is None else "FILE",
        "checkpoint_interval": options.checkpoint_interval,
        "order": options.order,
        "limit": options.limit,
        "test": options.test,
        "shard": None if options.shard is None else str(options.shard),
        "image_root": list(options.image_roots),
        "allow_missing": options.allow_missing,
        "output_dir": output_dir,
    }
    if asked.halp_compat:  # these follow from it
        values |= {"vision_encoder": None, "order": None}
    defaults, words = option_defaults(), ["producer", command, str(source.path)]
    for name, value in values.items():
        if value not in (None, (), [], defaults[name]):
            words += _option(f"--{name.replace('_', '-')}", value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else name.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [word for one in value for word in (name, str(one))]
    return [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
