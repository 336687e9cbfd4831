"""The options that `enqueue` and `run` share: what the user asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from storage.errors import UserError
from storage.settings import QUESTION, Dtype, Order, SpecialTokens
from workers.engine.prompt import PLACEHOLDERS
from workers.settings import DEFAULT_MODEL

_COLUMN = re.compile(r"\{[^{}]+\}")
_MAX_TEMPLATE = 1 << 18  # bytes; Qwen2.5-VL's has 1,017


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the user asks for: the options of `enqueue` and `run`."""

    csv: Path
    images_dir: str  # a directory or a URL, as are the next two
    output_dir: str
    image_roots: tuple[str, ...]
    model: str
    revision: str
    dtype: Dtype
    layers: tuple[int, ...] | Literal["all"] | None
    vision_encoder: bool
    prompt: str
    repetition_penalty: float | None
    exact: bool
    halp_compat: bool
    exif_rotation: bool
    max_new_tokens: int
    min_pixels: int | None
    max_pixels: int | None
    checkpoint_interval: int
    order: Order
    limit: int | None
    test: bool
    allow_missing: bool
    repair: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None  # its text
    special_tokens: SpecialTokens = "text"


def _run_options(
    csv: Annotated[
        Path | None,
        typer.Argument(metavar="CSV", help="Questions: question_id,image_id,question,answer. `.csv` or `.csv.gz`."),
    ] = None,
    vqa_dataset: Annotated[Path | None, typer.Option("--vqa-dataset", help="The same as CSV.")] = None,
    images_dir: Annotated[str, typer.Option(help="Directory or URL that the image ids are relative to.")] = ...,  # type: ignore[assignment]
    output_dir: Annotated[
        str | None,
        typer.Option(
            help="Where the parts go: a directory or a URL. [default: ./output, with --test ./output-test]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="A hub name or a local directory.")] = DEFAULT_MODEL,
    revision: Annotated[str, typer.Option(help="Revision of a hub model.")] = "main",
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = "bfloat16",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Decoder layers to keep, as in 0,7,14, or all. [default: 0, n/4, n/2, 3n/4, n-1]", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Length of an answer; 0 keeps the vectors only.")] = 200,
    prompt: Annotated[
        str,
        typer.Option(
            help="What the model is asked, as in '{question} A: {A} B: {B}': {name} is the row's text in a column, {{ a brace."
        ),
    ] = QUESTION,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="The system message, as in 'Answer in one word.' [default: the template's]", show_default=False
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A Jinja template, or a chat_template.json, in place of the checkpoint's; read now, and kept with the run.",
            show_default=False,
        ),
    ] = None,
    special_tokens: Annotated[
        SpecialTokens,
        typer.Option(
            help="Of the model's special tokens in the prompt: take them as text, or parse them as the processor does."
        ),
    ] = "text",
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=0.01, help="Of generated and prompt tokens. [default: the checkpoint's]", show_default=False),
    ] = None,
    vision_encoder: Annotated[bool, typer.Option(help="Keep the vision tower's mean before the merger too.")] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="Batch 1, nothing shared: slow, free of batch effects.")
    ] = False,
    halp_compat: Annotated[
        bool, typer.Option("--halp-compat", help="The published features and positions: see docs/format.md.")
    ] = False,
    exif_rotation: Annotated[
        bool,
        typer.Option("--exif-rotation", help="Turn images as their EXIF data say; the reference recipe does not."),
    ] = False,
    min_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Smaller images are enlarged. [default: the checkpoint's]", show_default=False),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Larger images are shrunk. [default: the checkpoint's]", show_default=False),
    ] = None,
    checkpoint_interval: Annotated[int, typer.Option(min=1, help="Questions in one part.")] = 1000,
    order: Annotated[
        Order, typer.Option(help="Keep the questions of an image together, or the file's order.")
    ] = "image",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first N rows only. [default: all]", show_default=False)
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Take three rows, chosen at random with a fixed seed.")] = False,
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
) -> RunOptions:
    """Collect the options that `enqueue` and `run` share."""
    if halp_compat and (min_pixels is not None or max_pixels is not None):
        raise UserError("--halp-compat uses the checkpoint's pixel limits: leave out --min-pixels and --max-pixels")
    if halp_compat and exif_rotation:
        raise UserError("--halp-compat takes images as the published scripts do: leave out --exif-rotation")
    if (csv is None) == (vqa_dataset is None):
        raise UserError("name the CSV file once: `CSV` or `--vqa-dataset CSV`")
    return RunOptions(
        csv=csv or vqa_dataset,  # type: ignore[arg-type]
        images_dir=images_dir,
        output_dir=output_dir or ("output-test" if test else "output"),
        image_roots=tuple(image_root or ()),
        model=model,
        revision=revision,
        dtype=dtype,
        layers=_parse_layers(layers),
        vision_encoder=vision_encoder and not halp_compat,
        prompt=_checked_prompt(prompt),
        repetition_penalty=repetition_penalty,
        exact=exact,
        halp_compat=halp_compat,
        exif_rotation=exif_rotation,
        max_new_tokens=max_new_tokens,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        checkpoint_interval=checkpoint_interval,
        order="csv" if halp_compat else order,
        limit=limit,
        test=test,
        allow_missing=allow_missing,
        repair=repair,
        system_prompt=_checked_system_prompt(system_prompt),
        chat_template=None if chat_template is None else _read_template(chat_template),
        special_tokens=special_tokens,
    )


def with_run_options(command: Callable[..., None], *, leave_out: tuple[str, ...] = ()) -> Callable[..., None]:
    """Give a command the shared options, but those of `leave_out`: it is called with one RunOptions in their place."""
    every = signature(_run_options, eval_str=True).parameters
    shared = {name: parameter for name, parameter in every.items() if name not in leave_out}
    own = {n: p for n, p in signature(command, eval_str=True).parameters.items() if n != "options"}

    @wraps(command)
    def wrapper(**values: Any) -> None:
        options = _run_options(**{name: values.pop(name) for name in shared})
        command(options=options, **values)

    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*shared.values(), *own.values())]
    wrapper.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return wrapper


def _checked_prompt(prompt: str) -> str:
    if not _COLUMN.search(prompt):
        raise UserError(f"--prompt {prompt!r} has no {QUESTION}: say where the question stands")
    return prompt


def _checked_system_prompt(text: str | None) -> str | None:
    if text is not None and (held := [token for token in PLACEHOLDERS if token in text]):
        raise UserError(
            f"--system-prompt holds {' and '.join(held)}, which would be an image without pixels: remove it"
        )
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


def _parse_layers(text: str | None) -> tuple[int, ...] | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--layers {text}: give numbers separated by commas, as in 0,7,14") from None
