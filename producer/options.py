"""The options that `enqueue` and `run` share: what the user asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from annotated_types import Ge
from pydantic.fields import FieldInfo

from producer.dataset.columns import parse_columns
from producer.dataset.selection import Shard
from producer.dataset.table import Source
from storage.computation import QUESTION, Computation
from storage.errors import UserError
from storage.fields import ANSWER_STATES
from storage.settings import Order
from workers.engine.prompt import PLACEHOLDERS
from workers.settings import DEFAULT_MODEL

_COLUMN = re.compile(r"\{[^{}]+\}")
_MAX_TEMPLATE = 1 << 18  # bytes; Qwen2.5-VL's has 1,017


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the user asks for: the options of `enqueue` and `run`."""

    source: Source
    images_dir: str | None  # a directory or a URL, as are the next two; None where the table holds its images
    output_dir: str
    image_roots: tuple[str, ...]
    model: str
    revision: str
    computation: Computation
    checkpoint_interval: int
    order: Order
    limit: int | None
    test: bool
    allow_missing: bool
    shard: Shard | None = None
    repair: bool = False
    relocate: bool = False
    append: bool = False


def run_options(
    table: Annotated[
        Path | None,
        typer.Argument(
            metavar="TABLE",
            help="Questions: question_id,image_id,question,answer. CSV, TSV, JSON, JSONL, Parquet, a WebDataset tar, or a "
            "folder of images: docs/tables.md.",
        ),
    ] = None,
    vqa_dataset: Annotated[Path | None, typer.Option("--vqa-dataset", help="The same as TABLE.")] = None,
    images_dir: Annotated[
        str | None,
        typer.Option(
            help="Directory or URL that the image ids are relative to. Not where the table holds the images themselves.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=COLUMN,…",
            help="Which column is what, as in question=text,answer=label; roles: question_id, image, question, answer. "
            "[default: by their names]",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked about each image of a folder.", show_default=False)
    ] = None,
    strip_placeholders: Annotated[
        bool, typer.Option("--strip-placeholders", help="Take <image> and the like out of the questions: here they are text.")
    ] = False,
    output_dir: Annotated[
        str | None,
        typer.Option(
            help="Where the parts go: a directory or a URL. [default: ./output, with --test ./output-test]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="A hub name or a local directory.")] = DEFAULT_MODEL,
    revision: Annotated[str, typer.Option(help="Revision of a hub model.")] = "main",
    checkpoint_interval: Annotated[int, typer.Option(min=1, help="Questions in one part.")] = 1000,
    order: Annotated[Order, typer.Option(help="Keep the questions of an image together, or the file's order.")] = "image",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first N rows only. [default: all]", show_default=False)
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Take three rows, chosen at random with a fixed seed.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Take the K-th of N shares of these, such as 2/8: the same one everywhere, an image's questions together.",
            show_default=False,
        ),
    ] = None,
    image_root: Annotated[
        list[str] | None,
        typer.Option(help="A further directory or URL that images may lie in; repeatable.", show_default=False),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Run even if over a fifth of the images are missing.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Compute parts again that `storage verify` finds damaged or gone.")
    ] = False,
    relocate: Annotated[
        bool, typer.Option("--relocate", help="The images of the run lie elsewhere now: go on with them there.")
    ] = False,
    append: Annotated[
        bool,
        typer.Option("--append", help="The table of the run has got further questions: compute those too, in further parts."),
    ] = False,
    **asked: Any,
) -> RunOptions:
    """Collect the options that `enqueue` and `run` share."""
    path = table or vqa_dataset
    if path is None or (table is not None and vqa_dataset is not None):
        raise UserError("name the table once: `TABLE` or `--vqa-dataset TABLE`")
    computation = _computation(asked)
    return RunOptions(
        source=Source(
            path, question, parse_columns(columns or ()), strip_placeholders=strip_placeholders, blind=computation.blind
        ),
        images_dir=images_dir or (str(path) if question is not None else None),
        output_dir=output_dir or ("output-test" if test else "output"),
        image_roots=tuple(image_root or ()),
        model=model,
        revision=revision,
        computation=computation,
        checkpoint_interval=checkpoint_interval,
        order="csv" if computation.halp_compat else order,
        limit=limit,
        test=test,
        allow_missing=allow_missing,
        shard=None if shard is None else Shard.parse(shard),
        repair=repair,
        relocate=relocate,
        append=append,
    )


def option_defaults() -> dict[str, Any]:
    """Return the options by name, each with its default."""
    return {name: parameter.default for name, parameter in _parameters().items()}


def with_run_options(command: Callable[..., None], *, leave_out: tuple[str, ...] = ()) -> Callable[..., None]:
    """Give a command the shared options, but those of `leave_out`: it is called with one RunOptions in their place."""
    shared = {name: parameter for name, parameter in _parameters().items() if name not in leave_out}
    own = {n: p for n, p in signature(command, eval_str=True).parameters.items() if n != "options"}

    @wraps(command)
    def wrapper(**values: Any) -> None:
        options = run_options(**{name: values.pop(name) for name in shared})
        command(options=options, **values)

    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*shared.values(), *own.values())]
    wrapper.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return wrapper


def _checked_prompt(prompt: str) -> str:
    if not _COLUMN.search(prompt):
        raise UserError(f"--prompt {prompt!r} has no {QUESTION}: say where the question stands")
    return prompt


def _checked_system_prompt(text: str) -> str:
    if held := [token for token in PLACEHOLDERS if token in text]:
        raise UserError(f"--system-prompt holds {' and '.join(held)}, which would be an image without pixels: remove it")
    return text


def _read_template(path: Path) -> str:
    """Return the text of a chat template's file. Raises UserError."""
    try:
        data = path.read_bytes() if path.stat().st_size <= _MAX_TEMPLATE else b""
        text = data.decode("utf-8-sig")
        if path.suffix == ".json":
            text = json.loads(text)["chat_template"]
    except OSError as error:
        raise UserError(f"--chat-template {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--chat-template {path}: neither a template in UTF-8 nor a JSON with chat_template") from error
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--chat-template {path}: it has no text, or more than {_MAX_TEMPLATE:,} bytes")
    return text


def _parse_layers(text: str) -> tuple[int, ...] | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(
            f"--layers {text}: give layers' numbers, counted from 0, as in 0,7,14; or `all`; or leave it out for five of them: "
            "0, n/4, n/2, 3n/4 and n-1"
        ) from None


def _parse_answer_states(text: str | Sequence[str]) -> tuple[str, ...]:
    asked = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    if unknown := [part for part in asked if part not in ANSWER_STATES]:
        raise UserError(f"--answer-states {text}: there is no {unknown[0]!r}; there are {', '.join(ANSWER_STATES)}")
    return tuple(kind for kind in ANSWER_STATES if kind in asked)


# Where the command line takes something else than the field holds: its type there, and what reads it.
_READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "layers": (str | None, _parse_layers),
    "answer_states": (str | None, _parse_answer_states),
    "prompt": (str, _checked_prompt),
    "system_prompt": (str | None, _checked_system_prompt),
    "chat_template": (Path | None, _read_template),
}


def _computation(asked: dict[str, Any]) -> Computation:
    """Return how the questions are computed. Raises UserError."""
    values = {n: _READERS[n][1](v) if n in _READERS and v is not None else v for n, v in asked.items()}
    values = {n: v for n, v in values.items() if v is not None}
    computation = Computation(**values)
    if computation.answer_states and not computation.max_new_tokens:
        raise UserError("--answer-states: with --max-new-tokens 0 there is no answer: leave one of them out")
    if computation.blind and (computation.exif_rotation or (computation.min_pixels, computation.max_pixels) != (None, None)):
        raise UserError("--blind reads no image: leave out --min-pixels, --max-pixels and --exif-rotation")
    if not computation.halp_compat:
        return computation
    if computation.min_pixels is not None or computation.max_pixels is not None:
        raise UserError("--halp-compat uses the checkpoint's pixel limits: leave out --min-pixels and --max-pixels")
    if computation.answer_states:
        raise UserError("--halp-compat keeps what was published: leave out --answer-states")
    if computation.blind:
        raise UserError("--halp-compat keeps what was published, of images: leave out --blind")
    if computation.exif_rotation:
        raise UserError("--halp-compat takes images as the published scripts do: leave out --exif-rotation")
    return computation.model_copy(update={"vision_encoder": False})


def _parameters() -> dict[str, Parameter]:
    """Return the command line's parameters; those of the computation, made from its fields, follow the model's."""
    found: dict[str, Parameter] = {}
    for name, parameter in signature(run_options, eval_str=True).parameters.items():
        if name != "asked":
            found[name] = parameter
        if name == "revision":
            found |= {n: _parameter(n, field) for n, field in Computation.model_fields.items()}
    return found


def _parameter(name: str, field: FieldInfo) -> Parameter:
    kind = _READERS[name][0] if name in _READERS else field.annotation
    default = None if field.default == () else field.default  # several words are one text there
    spelling = [f"--{name.replace('_', '-')}"] if field.default is False else []  # no --no-exact
    least = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    option = typer.Option(
        *spelling,
        help=field.description,
        min=least if isinstance(least, int | float) else None,
        metavar="FILE" if kind == Path | None else None,
        show_default=default is not None,
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
