"""Nothing lost, nothing twice: a run whose processes, server and connections are killed again and again."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.chaos import Chaos
from tests.support.expectations import assert_whole

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(1_000_000))


@pytest.mark.timeout(600)
def test_a_run_under_fire_loses_and_repeats_nothing(tmp_path: Path, small_model: Path) -> None:
    print(f"CHAOS_SEED={SEED}")
    chaos = Chaos(tmp_path, small_model, SEED)
    tally = chaos.run()
    print(tally)
    assert_whole(chaos.output, chaos.data)
