"""What the model is asked: the row's columns, special tokens, system prompt and chat template, against the processor."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from jinja2 import TemplateError
from transformers import AutoProcessor

from producer.check.check import check
from producer.options import RunOptions, run_options
from producer.planning import plan_run
from storage import load_frame
from storage.errors import UserError
from storage.question import Question
from storage.reading.diff import compare
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.wording import LoneBraceError, asked, column_names
from tests.support.builders import make_facts, make_questions, make_run, stage
from tests.support.processes import command, write_csv
from workers.checks.reference import Reference
from workers.demo.small_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.model import ModelEngine
from workers.engine.prompt import PLACEHOLDERS, PromptStyle, QuestionTokenizer, split_prompt
from workers.errors import EngineStartError, RunRefusedError
from workers.extract.extractor import Extractor
from workers.extract.preprocess import Preprocessor
from workers.settings import WorkerSettings

ROW = Question("q1", "a.png", "What {A} is {it}?", "blue", 1, {"A": "red", "B": "", "a b.c": "x"})


# The row's columns


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("{question}", "What {A} is {it}?"),
        ("{question} A: {A}", "What {A} is {it}? A: red"),
        ("{A}{A}", "redred"),
        ("B: {B}.", "B: ."),
        ("{a b.c}", "x"),
        ('Say {{"a": {A}}}', 'Say {"a": red}'),
        ("{{A}}", "{A}"),
        ("{{{A}}}", "{red}"),
        ("{question_id} {image_id} {image_name} {answer} {gt_answer}", "q1 a.png a.png blue blue"),
    ],
)
def test_columns_are_inserted_as_they_stand(prompt: str, text: str) -> None:
    assert asked(prompt, ROW, columns=True) == text


def test_a_prompt_of_before_knows_the_question_alone() -> None:
    assert asked("{question} {{A}} {A} {", ROW, columns=False) == "What {A} is {it}? {{A}} {A} {"


def test_the_columns_that_a_prompt_names() -> None:
    assert column_names("{b}{{x}}{a} {b}") == ["b", "a"]


@pytest.mark.parametrize("prompt", ["{question} {", "} {question}", "{question} {a{b}", "{{{question}}"])
def test_a_lone_brace_is_refused(prompt: str) -> None:
    with pytest.raises(LoneBraceError, match="stands alone"):
        column_names(prompt)


@pytest.fixture
def options(tmp_path: Path, photographs: Path, small_model: Path) -> Any:
    rows = [
        {"question_id": "q1", "image_id": "coffee.png", "question": "Which?", "answer": "x", "A": "red", "B": "blue"},
        {
            "question_id": "q2",
            "image_id": "coffee.png",
            "question": "Why <image>?",
            "answer": "",
            "A": "<|box_end|>",
            "B": " ",
        },
    ]
    table = write_csv(tmp_path / "vqa.csv", rows)

    def make(**changes: Any) -> RunOptions:
        fields = {"images_dir": str(photographs), "output_dir": str(tmp_path / "o"), "model": str(small_model)}
        return run_options(table, **fields | changes)

    return make


def test_an_unknown_column_is_refused_with_those_that_there_are(options: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'C'; it has question_id, image_id, .*question, answer, .*A, B"):
        plan_run(options(prompt="{question} {A} {C}"))
    with pytest.raises(UserError, match=r"no column 'question '; "):
        plan_run(options(prompt="{question }"))
    with pytest.raises(UserError, match=r"the \} at character 12 stands alone: write \{name\} .*\{\{"):
        plan_run(options(prompt="{question} }"))
    with pytest.raises(UserError, match=r"has no \{question\}"):
        options(prompt="What is this?")
    assert not (tmp_path / "o").exists()


def test_an_answer_that_no_row_has_is_no_column(options: Any, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "vqa.csv", [{"question_id": "q1", "image_id": "coffee.png", "question": "Which?"}])
    with pytest.raises(UserError, match="no column 'answer'"):
        plan_run(options(prompt="Is {answer} right?"))
    assert table.exists()


def test_what_is_asked_is_recorded_and_compared(options: Any, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(CHAT_TEMPLATE.replace("helpful", "terse"))
    changes = {
        "prompt": "{question} {A}",
        "system_prompt": "Be brief.",
        "chat_template": template,
        "special_tokens": "parse",
    }
    run = plan_run(options(**changes))
    assert run.settings.chat_template == template.read_text()
    template.write_text("gone")  # read once
    with pytest.raises(UserError, match=r"chat_template: .*SHA-256 .*in the run, gone now"):
        plan_run(options(**changes))
    template.write_text(run.settings.chat_template)
    assert plan_run(options(**changes)).run_id == run.run_id
    for name, other in {
        "prompt": "{question} {B}",
        "system_prompt": None,
        "chat_template": None,
        "special_tokens": "text",
    }.items():
        with pytest.raises(UserError, match=f"other settings:\n  {name}: "):
            plan_run(options(**changes | {name: other}))


def test_a_run_from_before_goes_on(options: Any, tmp_path: Path) -> None:
    """Its run.json lacks the new settings, and its prompt's braces stand as they are."""
    prompt = "{question} Answer as {json} or {{x}}, or {"
    run = plan_run(options(prompt="{question}"))
    path = tmp_path / "o" / ".run" / "run.json"
    body = json.loads(path.read_text()) | {"prompt": prompt}
    for name in ("prompt_columns", "system_prompt", "chat_template", "special_tokens"):
        del body[name]
    path.write_text(json.dumps(body))
    again = plan_run(options(prompt=prompt))
    assert (again.run_id, again.settings.prompt_columns) == (run.run_id, False)
    with pytest.raises(UserError, match="stands alone"):
        plan_run(options(prompt=prompt, output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jinja", b"\xff\xfe", "neither a template in UTF-8"),
        ("t.jinja", b" \n", "has no text"),
        ("t.jinja", b"x" * (1 << 19), "more than 262,144 bytes"),
        ("t.json", b"{}", "nor a JSON with chat_template"),
        ("t.json", b"[1", "nor a JSON with chat_template"),
        ("t.json", b'{"chat_template": {"a": 1}}', "has no text"),
        ("t.jinja", None, "No such file"),
    ],
)
def test_a_template_file_that_is_none(options: Any, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--chat-template {tmp_path / name}: .*{message}"):
        options(chat_template=tmp_path / name)


def test_a_system_prompt_holds_no_image(options: Any) -> None:
    with pytest.raises(UserError, match=r"holds <\|image_pad\|>, which would be an image"):
        options(system_prompt="See <|image_pad|>")


def test_check_says_what_the_texts_hold(options: Any, tmp_path: Path) -> None:
    def found(**changes: Any) -> tuple[str, dict[str, int]]:
        checked = check(options(**changes), decode=False, sample=0, cache_dir=tmp_path)
        return checked.texts.words(), {finding.kind: finding.number for finding in checked.findings}

    assert found() == ("<image> in 1 questions, which is text", {"image_words": 1})
    words, findings = found(prompt="{question} A: {A} B: {B}")
    assert words == "special tokens in 1 questions, taken as text; <image> in 1 questions, which is text"
    assert findings == {"special_tokens": 1, "image_words": 1, "empty_cells": 1}
    words, findings = found(prompt="<|video_pad|>{question}{A}", special_tokens="parse")
    assert words.startswith("special tokens in 2 questions, parsed, as the processor does")
    assert findings == {"image_words": 1, "placeholders": 2}


# Special tokens, against the processor


@pytest.fixture(scope="module")
def processor(small_model: Path) -> Any:
    return AutoProcessor.from_pretrained(small_model)


@pytest.fixture(scope="module")
def tokenize(processor: Any) -> QuestionTokenizer:
    return QuestionTokenizer(processor.tokenizer.backend_tokenizer.to_str())


PARSED = [token for token in SPECIAL_TOKENS if token not in PLACEHOLDERS]


@pytest.mark.parametrize("token", PARSED)
@pytest.mark.parametrize("question", ["{}", "What is in {}(10,10),(40,40)\n {} \n?", " {0}{0} cafe\u0301"])
def test_parsed_tokens_are_the_processors(processor: Any, tokenize: QuestionTokenizer, question: str, token: str) -> None:
    text = question.format(token, token)
    assert list(tokenize(text, "parse")) == processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("token", PLACEHOLDERS)
@pytest.mark.parametrize("mode", ["text", "parse"])
def test_placeholders_are_never_parsed(processor: Any, tokenize: QuestionTokenizer, mode: Any, token: str) -> None:
    text = f"<|box_start|>{token} and <|vision_start|>{token}<|vision_end|>"
    ids = tokenize(text, mode)
    assert not set(ids) & set(processor.tokenizer.convert_tokens_to_ids(PLACEHOLDERS))
    assert processor.tokenizer.decode(ids) == text
    boxes = processor.tokenizer.convert_tokens_to_ids(["<|box_start|>", "<|vision_end|>"])
    assert set(boxes) <= set(ids) if mode == "parse" else not set(boxes) & set(ids)


# The system prompt and the template, against the processor

WORDS = (  # no special token stands beside the text, and the template holds what usually stands for it
    "{% for m in messages %}{% if m['content'] is string %}SYSTEM: {{ m['content'] }}\n{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}QUESTION <|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "Answer the QUESTION: {{ c['text'] }}\nASSISTANT:{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
LISTS = (  # takes a system message as a list alone
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|image_pad|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
STYLES = [
    PromptStyle(),
    PromptStyle(system="Answer in one word, as in <|box_start|>."),
    PromptStyle(system=""),
    PromptStyle(system="The QUESTION\nhas  blanks. "),
    PromptStyle(template=CHAT_TEMPLATE.replace("helpful", "terse")),
    PromptStyle(template=CHAT_TEMPLATE.replace("{{ content['text'] }}", "{{ content['text'] | trim }}")),
    PromptStyle(system="Be brief.", template=WORDS),
    PromptStyle(template=WORDS),
]
TEXTS = ["Is there a dog?", "?!", "  edges \n", "\n\nlines\n\n", "a <|box_start|>b", "QUESTION", "1", "cafe\u0301"]


def official(processor: Any, style: PromptStyle, text: str) -> list[int]:
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    if style.system is not None:
        content = [{"type": "text", "text": style.system}] if style.template == LISTS else style.system
        messages.insert(0, {"role": "system", "content": content})
    more = {} if style.template is None else {"chat_template": style.template}
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **more)
    return list(processor.tokenizer(rendered)["input_ids"])


@pytest.mark.parametrize("style", [*STYLES, PromptStyle(system="Hm.", template=LISTS)])
@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_the_processors(processor: Any, tokenize: QuestionTokenizer, style: PromptStyle, text: str) -> None:
    parts = split_prompt(processor, style)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ours = [*parts.head_ids, image, *parts.after_image_ids, *tokenize(parts.around(text), "parse"), *parts.tail_ids]
    assert ours == official(processor, style, text)


def test_every_style_has_a_digest_of_its_own(processor: Any) -> None:
    assert len({split_prompt(processor, style).sha256 for style in STYLES}) == len(STYLES) - 1  # `trim` shows in no rendering


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (
            PromptStyle(template=CHAT_TEMPLATE.replace("content['text'] }}", "content['text'] | upper }}")),
            "does not insert the question as it is",
        ),
        (
            PromptStyle(template=CHAT_TEMPLATE.replace("content['text'] }}", "content['text'] | trim('\n') }}")),
            "does not insert the question as it is",
        ),
        (
            PromptStyle(system="A", template=CHAT_TEMPLATE.replace("messages %}", "messages[1:] %}", 1)),
            "no place for a system prompt",
        ),
        (PromptStyle(template="{{ messages[0]['content'][1]['text'] }}"), "the run's settings is not Qwen2.5-VL's"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(processor: Any, style: PromptStyle, message: str) -> None:
    with pytest.raises(EngineStartError, match=message):
        split_prompt(processor, style)


class StyledReference(Reference):
    """The reference, asked in a style."""

    style = PromptStyle()

    def inputs(self, image_path: str | Path, question: str) -> dict[str, Any]:
        inner = self.processor.apply_chat_template
        system = [] if self.style.system is None else [{"role": "system", "content": self.style.system}]
        more = {} if self.style.template is None else {"chat_template": self.style.template}
        self.processor.apply_chat_template = lambda messages, **o: inner([*system, *messages], **o, **more)
        try:
            return super().inputs(image_path, question)
        finally:
            self.processor.apply_chat_template = inner


def test_vectors_are_the_processors(small_model: Path, photographs: Path) -> None:
    """Batches of one style and of another about the same image, shared, exact and compatible."""
    engine = ModelEngine(EngineSpec("model", str(small_model), "main", "float32", "unused"))
    reference, preprocess = StyledReference(small_model), Preprocessor(engine.info)
    limits = (engine.info.min_pixels, engine.info.max_pixels)
    for style in (STYLES[1], STYLES[0], STYLES[6]):
        prompt = engine.prompt(style)
        reference.style = style
        texts = ["Find <|object_ref_start|>it<|object_ref_end|>.", "Why?"]
        image = preprocess.image("coffee.png", photographs, (), limits)
        expected = [reference(photographs / "coffee.png", text, max_new_tokens=3, layers=(0, 3)) for text in texts]
        asked: dict[str, Any] = {"special_tokens": "parse", "system_prompt": style.system, "chat_template": style.template}
        shared = Recipe(layers=(0, 3), max_new_tokens=3, **asked)
        for recipe in (shared, shared.model_copy(update={"exact": True})):
            requests = [preprocess.request([image], text, recipe, prompt) for text in texts]
            for request, sample, wanted in zip(requests, engine.extract(requests), expected, strict=True):
                assert request.num_tokens == sample.facts["seq_len"] == wanted["seq_len"]
                assert sample.facts["vision_token_position"] == wanted["vision_token_position"]
                assert sample.facts["answer_token_ids"] == wanted["answer_token_ids"]
                for name, values in sample.vectors.items():
                    assert np.abs(values - wanted[name]).max() < 1e-4 * np.abs(wanted[name]).max()


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[0]['x']['y'] }}", "x"])
def test_an_engine_raises_for_a_template_that_is_none(processor: Any, template: str) -> None:
    with pytest.raises((EngineStartError, TemplateError)):
        split_prompt(processor, PromptStyle(template=template))


def test_a_worker_refuses_a_template_once(tmp_path: Path) -> None:
    """And goes on with other runs, though one template raises and another never ends."""
    config = WorkerSettings(engine="fake:0", engine_timeout=1.0, data_roots=(str(tmp_path.resolve()),))
    extractor = Extractor(config, "extract@here", lambda error: None)
    runs = {
        name: make_run(tmp_path / name, 3, agreed=False, run_id=name.strip("[]"), chat_template=name, dtype="float32")
        for name in ("plain", "[error]", "[hang]")
    }
    try:
        for name, why in (
            ("[error]", "cannot be used: .*marked"),
            ("[hang]", "cannot be rendered: the engine gave no answer"),
        ):
            for _ in range(2):
                begun = time.monotonic()
                with pytest.raises(RunRefusedError, match=why):
                    extractor.open_run(str(runs[name].location), runs[name].run_id)
            assert time.monotonic() - begun < 0.5
            assert re.search(why, runs[name].refusals()["extract@here"])
        opened = extractor.open_run(str(runs["plain"].location), "plain")
        assert opened.facts.template_sha256 == opened.prompt.sha256 != extractor.info.prompt.sha256
    finally:
        extractor.close()


# Whole runs


@pytest.mark.slow
def test_a_run_in_all_its_options(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    rows = [
        {"question_id": f"q{i}", "image_id": "coffee.png", "question": f"Find <|box_start|>{i}<|box_end|>.", "A": a}
        for i, a in enumerate(("red", "<|image_pad|>"))
    ]
    template = tmp_path / "chat_template.json"
    template.write_text(json.dumps({"chat_template": WORDS}))
    style = PromptStyle(system="Be brief.", template=WORDS)
    table = write_csv(tmp_path / "vqa.csv", rows)
    options = [
        table,
        "--images-dir",
        photographs,
        "--output-dir",
        tmp_path / "o",
        "--model",
        small_model,
        "--dtype",
        "float32",
    ]
    options += [
        "--max-new-tokens",
        3,
        "--layers",
        "0,3",
        "--prompt",
        "{question} A: {A} {{}}",
        "--special-tokens",
        "parse",
    ]
    options += ["--system-prompt", style.system, "--chat-template", template]
    result = command("producer", "run", *options)
    assert result.returncode == 0, result.stderr
    reference = StyledReference(small_model)
    reference.style = style
    text = "Find <|box_start|>0<|box_end|>. A: red {}"
    wanted = reference(photographs / "coffee.png", text, max_new_tokens=3, layers=(0, 3))
    run = Run.open(tmp_path / "o")
    with h5py.File(run.part_path(1)) as part:
        assert part.attrs["special_tokens"] == "parse"
        assert part.attrs["system_prompt"] == "Be brief."
        assert part.attrs["prompt"] == "{question} A: {A} {{}}"
        assert part.attrs["chat_template_sha256"] == run.settings.chat_template_sha256()
        group = part["q0"]
        assert group.attrs["seq_len"] == wanted["seq_len"]
        values = group["query_token_representation/layer_3"][:]
        assert np.abs(values - wanted["query_token_representation/layer_3"]).max() < 1e-4 * np.abs(values).max()
    assert "chat_template_sha256" in command("storage", "inspect", run.part_path(1)).stdout
    refused = command("producer", "run", *options, "--special-tokens", "text")
    assert (refused.returncode, "special_tokens: parse in the run, text now" in refused.stderr) == (2, True)


def test_parts_of_two_kinds_are_not_mixed(tmp_path: Path) -> None:
    """A part that does not say how special tokens were taken took them as text."""
    paths = []
    for name in ("text", "parse", "before"):
        facts = make_facts(special_tokens="parse" if name == "parse" else "text")
        questions = [replace(question, question_id=f"{name} {question.question_id}") for question in make_questions(3)]
        run = make_run(tmp_path / name, questions, model=facts, run_id=name * 2)
        stage(run, 1)
        assert pack(run, 1)
        paths.append(run.part_path(1))
        with h5py.File(paths[-1], "r+") as part:
            assert "system_prompt" not in part.attrs
            if name == "before":
                del part.attrs["special_tokens"]
    with pytest.raises(UserError, match=r"must not be mixed: for special_tokens, .* has 'text'; .* has 'parse'"):
        load_frame(paths[:2])
    assert compare(*paths[:2]).settings["special_tokens"] == ("text", "parse")
    assert "special_tokens" not in compare(paths[0], paths[2]).settings
