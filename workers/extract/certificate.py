"""The drift certificate's exact results: for one question of each part, after it is computed, and never at its cost.

The first question of a part that a worker has computed, and whose prompt is not long, is computed again exactly, and so once
more under another attention kernel. Whatever goes wrong meanwhile leaves the part without a certificate, with the reason.
A claim in the run directory lets one worker alone try, once: a certificate that ends a worker does not end the next.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from storage.drift import with_certificate, without_certificate
from storage.runs.run import Run
from storage.sample import ENGINE_SECONDS, Sample
from workers.engine.interface import Request
from workers.errors import EngineDiedError, in_a_line
from workers.extract.batcher import MAX_CRASHES_ALONE, Crashes
from workers.monitor.metrics import tally

logger = logging.getLogger(__name__)
# Attention over a whole prompt grows with the square of its length: this one takes seconds, one of 16,000 tokens minutes.
MAX_TOKENS = 2048
_KNOWN_PARTS = 4096  # beyond which the run directory is asked again


class _OneTry:
    """Crashes of the engine under a certificate: they are not the question's, and one ends it."""

    suspect = True  # it shares no batch

    def note(self, _: EngineDiedError, *, alone: bool) -> int:
        """Say that it has had its try."""
        return MAX_CRASHES_ALONE


class Certifier:
    """Adds exact results to a part's first fitting sample. Thread-safe."""

    def __init__(self, compute: Callable[[str, Request, Crashes], Sample]) -> None:
        self._compute = compute
        self._asked: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, run: Run, part: int, request: Request, sample: Sample) -> Sample:
        """Return a sample with its exact results, or why it has none; or as it is, where another question has them."""
        if request.num_tokens > MAX_TOKENS:
            return without_certificate(
                sample, f"its prompts have more than {MAX_TOKENS:,} tokens, one of them {request.num_tokens:,}"
            )
        if self._was_asked(run.run_id, part):
            return sample
        try:
            return self._with_exact(run.run_id, request, sample) if run.claim_certificate(part) else sample
        except Exception as error:  # noqa: BLE001  (the sample is computed: whatever happens here must not cost it)
            reason = in_a_line(error)
            logger.warning("part %d of %s gets no drift certificate: %s", part, run.location, reason)
            return without_certificate(sample, f"it could not be computed: {reason}", tried=True)

    def _was_asked(self, run_id: str, part: int) -> bool:
        with self._lock:
            if (run_id, part) in self._asked:
                return True
            self._asked[run_id, part] = None
            if len(self._asked) > _KNOWN_PARTS:
                self._asked.popitem(last=False)
            return False

    def _with_exact(self, run_id: str, request: Request, sample: Sample) -> Sample:
        exact = request.recipe.model_copy(update={"exact": True})
        no_answer = {} if exact.answer_states else {"max_new_tokens": 0}
        other = exact.model_copy(update={"math_kernel": True} | no_answer)
        results = [self._compute(run_id, replace(request, recipe=recipe), _OneTry()) for recipe in (exact, other)]
        with self._lock:
            tally.exact_seconds += sum(found.facts.get(ENGINE_SECONDS, 0.0) for found in results)
        return with_certificate(sample, *results)
