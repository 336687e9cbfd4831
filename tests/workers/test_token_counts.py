"""One arithmetic: what `producer check` counts before a run is what the run's prompts have, whatever a checkpoint names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from producer.check.findings import long_prompts
from producer.check.survey import ImageSource
from storage.question import Question
from workers.checkpoint.shapes import shape_of
from workers.engine.fake import FakeEngine
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.loading import pixel_limits
from workers.extract.preprocess import Preprocessor, limits_of

NAMED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "as released": {"min_pixels": 3136, "max_pixels": 12845056},
    "the least only": {"min_pixels": 100_000},
    "the most only": {"max_pixels": 500_000},
    "as a size": {"size": {"shortest_edge": 784, "longest_edge": 300_000}},
    "both": {"size": {"shortest_edge": 784, "longest_edge": 300_000}, "max_pixels": 600_000},
    "null": {"min_pixels": None, "max_pixels": None},
}


@pytest.fixture(params=NAMED, ids=NAMED.keys())
def named(request: pytest.FixtureRequest, small_model: Path, tmp_path: Path) -> Path:
    """Return a checkpoint whose image processor's file names these limits."""
    directory = tmp_path / "model"
    shutil.copytree(small_model, directory)
    file = directory / "preprocessor_config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("min_pixels", "max_pixels", "size")}
    file.write_text(json.dumps(kept | NAMED[request.param]))
    return directory


def assert_same_count(model: Path, tmp_path: Path) -> None:
    shape = shape_of(str(model))
    assert shape is not None
    processor = AutoProcessor.from_pretrained(model)
    assert (shape.min_pixels, shape.max_pixels) == pixel_limits(processor.image_processor)
    image = tmp_path.resolve() / "a.png"
    Image.new("1", (1400, 1372)).save(image)
    info = FakeEngine(EngineSpec("fake", "fake", "main", "float32", "")).info
    minimum, maximum = pixel_limits(processor.image_processor)
    info = replace(info, factor=28, min_pixels=minimum, max_pixels=maximum)
    prepare = Preprocessor(info)
    for asked in ((None, None), (None, 200_000), (3_000_000, 9_000_000)):
        gallery = ImageSource(str(image.parent), (), limits_of(asked, shape), shape.factor, False, False)
        prepared = prepare.image("a.png", image.parent, (), limits_of(asked, info))
        request = prepare.request([prepared], "", Recipe(layers=(0,), max_new_tokens=0))
        around = len(info.prompt.head_ids) + len(request.suffix_ids)
        assert gallery.tokens(prepared.original_size) == request.num_tokens - around


def test_check_counts_the_tokens_of_the_run(named: Path, tmp_path: Path) -> None:
    assert_same_count(named, tmp_path)


def test_also_where_the_processor_was_saved_by_transformers_5(small_model: Path, tmp_path: Path) -> None:
    """It nests the image processor in processor_config.json, and reads that one first."""
    directory = tmp_path / "model"
    shutil.copytree(small_model, directory)
    processor = AutoProcessor.from_pretrained(small_model)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 400_000}
    processor.save_pretrained(directory)
    assert "image_processor" in json.loads((directory / "processor_config.json").read_text())
    assert_same_count(directory, tmp_path)
    shape = shape_of(str(directory))
    assert shape is not None
    assert shape.max_pixels == 400_000


def test_the_prompt_around_the_question_counts() -> None:
    question = Question("q", "a.png", "Why?", "", 1, {})
    assert long_prompts([question], {"a.png": 100}, "{question}") == []
    (finding,) = long_prompts([question], {"a.png": 100}, "{question}" + "word " * 40_000)
    assert finding.kind == "prompt_too_long"
