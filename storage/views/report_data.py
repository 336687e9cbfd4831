"""What a run's report shows, read from its files alone: bounded numbers of parts, questions, vectors and images."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from storage.answers import is_right
from storage.errors import DamagedError, UserError
from storage.evenly import spread
from storage.fields import is_ragged
from storage.hdf5.layout import Part, open_part
from storage.hdf5.part import read_certificate
from storage.hdf5.stored import TEXTS, StoredQuestion
from storage.hdf5.timing import computed_at, engine_seconds
from storage.images.bounded import on_image
from storage.images.lookup import resolve_image
from storage.naming import question_id
from storage.question import images_of
from storage.runs.account import Account, Bookkeeper
from storage.runs.failures import published_failures
from storage.runs.pack import Sidecar, sidecars
from storage.runs.run import Run
from storage.runs.stalls import stalls
from storage.sample import Failure
from storage.stores.location import is_url

_PARTS = 200  # looked into for their times and certificates
_QUESTIONS = 5_000  # whose attributes are read, from at most
_QUESTION_PARTS = 40
_FETCHED = 10
_VECTOR_PARTS = 10
_VECTORS = 400  # questions whose vectors are read: 0.3 ms each
_SAMPLES = 12
_FAILURES = 20
_TEXT = 300  # characters shown of a text
_POINTS = 400  # of the line of the throughput
_THUMBNAIL = (160, 120)
_MOST_THUMBNAILS = 4  # of a question
_LARGEST = 50_000_000  # pixels of an image that a thumbnail is made of
_SECONDS = 2.0  # of CPU for one, besides those for its pixels


@dataclass(frozen=True, slots=True)
class Shown:
    """One question as the report shows it. A thumbnail is a data URI, empty where the image cannot be read here."""

    question_id: str
    image_id: str
    question: str
    answer: str
    ground_truth: str
    thumbnails: tuple[str, ...]  # of the images that it was asked about, as far as they are shown
    images: int


@dataclass(slots=True)
class ReportData:
    """Everything that the page is made of."""

    run: Run
    account: Account
    stalls: list[str] = field(default_factory=list)  # of a run that is not finished
    progress: list[tuple[float, float]] = field(default_factory=list)  # hours since the plan, questions computed by then
    certificates: list[dict[str, Any]] = field(default_factory=list)
    certificate_cost: list[tuple[float, float]] = field(
        default_factory=list
    )  # seconds of the engine for a part's certificate, and for its questions
    uncertified: Counter[str] = field(default_factory=Counter)  # parts without one, by the reason
    environments: dict[str, set[str]] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    shared_prefixes: int = 0
    answers_equal: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)  # field: [n, D], of one order of questions
    groups: list[str] = field(default_factory=list)  # of the same questions
    failures: list[Failure] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


def gather(run: Run) -> ReportData:
    """Read what the report shows, each part once. A part that cannot be read is left out."""
    parts = list(sidecars(run))
    data = ReportData(run, Bookkeeper(run).account())
    data.stalls = [] if data.account.finished else stalls(run)
    data.failures = [failed.failure for failed in islice(published_failures(run), _FAILURES)]
    written = [part for part in parts if part.question_ids]
    bound = _FETCHED if is_url(run.location) else _PARTS  # an object store's parts are fetched whole
    counted, shown = spread(written, min(bound, _QUESTION_PARTS)), spread(written, _VECTOR_PARTS)
    looked = {part.part for part in (*spread(parts, bound), *counted, *shown)}
    fields = _fields(run)
    rows: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in fields}
    computed: list[tuple[npt.NDArray[np.float64] | None, int]] = []
    for part in parts:
        hours = None
        if part.part in looked:
            # ValueError and TypeError: a stranger's file, whose attributes have our names and other values.
            with suppress(OSError, UserError, DamagedError, ValueError, TypeError), _opened(run, part) as file:
                hours = _read_attributes(data, file)
                if part in counted:
                    for key in spread(file.keys, -(-_QUESTIONS // len(counted))):
                        _count_question(data, file.question(key))
                if part in shown:
                    _read_vectors(data, file, rows, -(-_VECTORS // len(shown)))
                    data.shown += samples(run, file, min(-(-_SAMPLES // len(shown)), _SAMPLES - len(data.shown)))
        computed.append((hours, len(part.question_ids)))
    data.progress = _cumulative(computed)
    data.vectors = {name: np.stack(vectors) for name, vectors in rows.items() if vectors}
    return data


def compare(answer: str, ground_truth: str) -> str:
    """Tell whether an answer is right, as `storage probe` does."""
    if not ground_truth.strip():
        return "no ground truth"
    return "right answers" if is_right(answer, ground_truth) else "wrong answers"


@contextmanager
def _opened(run: Run, part: Sidecar) -> Iterator[Part]:
    with run.local_part(part.part) as path, open_part(path) as file:
        yield file


def _read_attributes(data: ReportData, file: Part) -> npt.NDArray[np.float64]:
    """Note what a part says of itself; return the hours from the plan to when each of its questions was computed."""
    if (certificate := read_certificate(file)) is not None:
        data.certificates.append(certificate)
        if certificate["seconds"] is not None and (seconds := engine_seconds(file)) is not None:
            data.certificate_cost.append((certificate["seconds"], seconds))
    if (reason := file.text("drift_absent")) is not None:
        data.uncertified[reason] += 1
    for name in ("device", "gpu", "attention_implementation", "attention_kernels", "batch_invariance", "library_versions"):
        if value := file.text(name):
            data.environments.setdefault(name, set()).add(value)
    return _hours(data.run, file)


def _hours(run: Run, file: Part) -> npt.NDArray[np.float64]:
    """Return the hours from the plan to each question's end; to the part's, where an earlier version wrote it."""
    created, begun = (datetime.fromisoformat(t).timestamp() for t in (file.text("created_at") or "", run.settings.created_at))
    times = computed_at(file)
    if times is None:
        times = np.full(len(file.keys), created)
    known = np.where(np.isfinite(times), times, created)
    return np.clip(known - begun, 0.0, max(0.0, created - begun)) / 3600  # clocks differ


def _read_vectors(data: ReportData, file: Part, rows: dict[str, list[npt.NDArray[np.float32]]], number: int) -> None:
    facts = data.run.model_facts()
    widths = {} if facts is None else facts.field_widths()
    for key in spread(file.keys, number):
        question = file.question(key)
        stored = {name: question.vector(name) for name in rows}
        vectors = {name: v.read() for name, v in stored.items() if v is not None and v.shape == (widths.get(name),)}
        if len(vectors) == len(rows):
            for name, vector in vectors.items():
                rows[name].append(vector)
            texts = question.texts()
            data.groups.append(compare(texts.get("answer", ""), texts.get("ground_truth_answer", "")))


def _cumulative(computed: Sequence[tuple[npt.NDArray[np.float64] | None, int]]) -> list[tuple[float, float]]:
    """Return (hours, questions) growing, at most so many points: what was not looked into counts as what was."""
    looked = [hours for hours, _ in computed if hours is not None and len(hours)]
    if not looked:
        return [(0.0, 0.0)]
    known = np.sort(np.concatenate(looked))
    total = sum(number for _, number in computed)
    places = np.unique(np.linspace(1, len(known), min(len(known), _POINTS)).astype(int))
    return [(0.0, 0.0), *((float(known[place - 1]), float(place * total / len(known))) for place in places)]


def _count_question(data: ReportData, question: StoredQuestion) -> None:
    attributes, texts = question.attributes(), question.texts()
    for name, values in (
        ("seq_len", data.prompt_tokens),
        ("num_answer_tokens", data.answer_tokens),
        ("batch_size", data.batch_sizes),
    ):
        if name in attributes:
            values.append(int(attributes[name]))
    data.shared_prefixes += attributes.get("image_prefix") == "shared"
    kind = compare(texts.get("answer", ""), texts.get("ground_truth_answer", ""))
    data.answers_equal[kind] = data.answers_equal.get(kind, 0) + 1


def _fields(run: Run) -> list[str]:
    facts = run.model_facts()
    return [] if facts is None else [name for name in facts.field_widths() if not is_ragged(name)]


def samples(run: Run, file: Part, number: int) -> list[Shown]:
    """Return some questions of an open part with their answers, from its beginning to its end."""
    shown = []
    for key in spread(file.keys, number):
        texts = dict.fromkeys(TEXTS, "") | file.question(key).texts()
        image_id = texts["image_id"]
        images = () if run.settings.blind else images_of(image_id)
        shown.append(
            Shown(
                question_id=clipped(question_id(key)),
                image_id=clipped(image_id),
                question=clipped(texts["question"]),
                answer=clipped(texts["answer"]),
                ground_truth=clipped(texts["ground_truth_answer"]),
                thumbnails=tuple(_thumbnail(run, one) for one in images[:_MOST_THUMBNAILS]),
                images=len(images),
            )
        )
    return shown


def clipped(text: str) -> str:
    """Return a text cut to what the page shows."""
    return text if len(text) <= _TEXT else text[:_TEXT] + "…"


def _thumbnail(run: Run, image_id: str) -> str:
    try:
        images = run.images
        location = resolve_image(image_id, images.images_dir, images.image_roots)
        small = on_image(location, _small, seconds=_SECONDS).array
    except Exception:  # noqa: BLE001  (no image is worth a report; the images may not even be on this machine)
        return ""
    if small is None:
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(small.tobytes()).decode()


def _small(image: Image.Image) -> tuple[list[int], npt.NDArray[np.uint8] | None]:
    """Return an open image's thumbnail, as the bytes of a JPEG; none of one that is too large for it."""
    if image.width * image.height > _LARGEST:
        return [], None
    image.draft("RGB", _THUMBNAIL)
    small = image.convert("RGB")
    small.thumbnail(_THUMBNAIL)
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=70)
    return [], np.frombuffer(jpeg.getvalue(), np.uint8)
