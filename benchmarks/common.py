"""What the benchmarks share: a table in Markdown, and the line that says where it was measured."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table under the conditions of its measurement."""
    print(conditions(), end="\n\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def conditions() -> str:
    """Return machine, command and date."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    machine = f"{len(names)} x {names[0]}" if names else platform.processor()
    command = " ".join(["python", *sys.argv])
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine}, `{command}`"
