"""Draw the README's picture: `python docs/picture.py demo-output/…_part_001.h5` writes docs/inspect.svg."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from storage.views.inspect import describe_part, part_tables


def main() -> None:
    """Record what `storage inspect` shows of one question."""
    console = Console(record=True, width=118, file=io.StringIO())
    summary = describe_part(Path(sys.argv[1]))
    _, questions, question = part_tables(summary, rows=4)
    console.print(questions)
    console.print(question)
    picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="storage inspect"), flags=re.DOTALL)
    Path(__file__).with_name("inspect.svg").write_text(picture)  # without the web fonts, which a page would fetch


if __name__ == "__main__":
    main()
