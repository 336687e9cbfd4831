"""Celery's command line with our app, and without the working directory: `python -P -m workers.launch -A workers worker …`.

While Celery looks for the app of `-A` it puts the working directory before everything else on `sys.path`
(celery.utils.imports.cwd_in_path), even under `python -P`: a `redis.py` that lies where a person stands would be run.
"""

from __future__ import annotations

from contextlib import nullcontext

from celery.__main__ import main as celery_main
from celery.utils import imports


def main() -> None:
    """Become Celery."""
    imports.cwd_in_path = nullcontext
    celery_main()


if __name__ == "__main__":
    main()
