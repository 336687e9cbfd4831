"""The fake engine's marks: questions that go wrong on purpose, and only those."""

from __future__ import annotations

import numpy as np
import pytest

from workers.engine.fake import FakeEngine
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.process import EngineProcess
from workers.engine.prompt import QuestionTokenizer
from workers.errors import BatchFailedError, EngineDiedError

SPEC = EngineSpec("fake", "", "main", "bfloat16", "")


def ask(text: str) -> Request:
    info = FakeEngine(SPEC).info
    ids = (*info.prompt.after_image_ids, *QuestionTokenizer(info.tokenizer_json)(text), *info.prompt.tail_ids)
    return Request("image", (np.zeros((28, 28, 3), np.uint8),), ids, len(ids), Recipe(layers=(0,), max_new_tokens=1))


@pytest.fixture
def engine():
    engine = EngineProcess(SPEC, 20.0)
    engine.start()
    yield engine
    engine.stop()


@pytest.mark.parametrize("text", ["What?", "[", "[killer]", "kill [ kill ]", "日本 [kill"])
def test_other_questions_are_answered(text):
    [sample] = FakeEngine(SPEC).extract([ask(text)])
    assert sample.answer == FakeEngine(SPEC).compute([ask(text)])[0].answer


def test_kill(engine):
    with pytest.raises(EngineDiedError, match="SIGKILL"):
        engine.extract([ask("a [kill] question")])


def test_kill_in_company(engine):
    assert len(engine.extract([ask("[kill-in-company]")])) == 1
    with pytest.raises(EngineDiedError, match="SIGKILL"):
        engine.extract([ask("innocent"), ask("[kill-in-company]")])


def test_hang():
    engine = EngineProcess(SPEC, 0.3)
    engine.start()
    with pytest.raises(EngineDiedError, match="gave no answer"):
        engine.extract([ask("[hang]")])


def test_error(engine):
    for requests in ([ask("[error]")], [ask("innocent"), ask("[error:0]")]):
        with pytest.raises(BatchFailedError, match=r"RuntimeError: the question is marked \[error\]"):
            engine.extract(requests)
    for _ in range(2):
        with pytest.raises(BatchFailedError):
            engine.extract([ask("[error:2]")])
    assert len(engine.extract([ask("[error:2]")])) == 1
