"""Train the demo's checkpoint: a small, genuine Qwen2.5-VL that answers easy-vqa's questions, and some of them wrongly.

Architecture, tokenizer, processor and chat template are the small model's (`small_model.py`). A step takes images of the
train split with a few of their questions each; the questions of an image lie behind one prefix [head | image], blind to one
another, and the loss is on the answer and the end of turn. The same seed, libraries, processor and number of threads give the
same bytes. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from workers.demo.easy_vqa import SHAPES, EasyVqa, read_easy_vqa
from workers.demo.pictures import Lesson, Picture, Pixels, draw_batch
from workers.demo.small_model import build_small_model
from workers.demo.small_spec import SmallModelSpec
from workers.engine.loading import pixel_limits
from workers.engine.models.qwen_vl import attend_in_spans
from workers.engine.prompt import QuestionTokenizer, split_prompt
from workers.extract.loading import smart_resize

log = logging.getLogger("demo_model")

# Enlarged from 64 to 112 pixels, an image is 64 patches and 16 tokens. Every vision block sees all of it.
SPEC = SmallModelSpec(
    hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    vision_hidden_size=96, vision_intermediate_size=256, vision_depth=4, vision_heads=4,
    fullatt_block_indexes=(0, 1, 2, 3), min_pixels=112 * 112, dtype="bfloat16", initializer_range=0.1, expressive=False,
)  # fmt: skip
WEIGHTS = "model.safetensors"
_LOG_EVERY, _SAVE_EVERY = 50, 100
_IGNORED = -100  # a position without a target


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Name what the weights depend on, beside the data, the libraries and the processor."""

    steps: int = 320
    images_per_step: int = 64
    questions_per_image: int = 2
    matrix_rate: float = 5e-3  # of Muon, for the matrices: 95% of shapes right in 250 steps, AdamW needs thousands
    other_rate: float = 2e-3  # of AdamW, for embeddings, norms and biases
    warmup: int = 60
    weight_decay: float = 0.05
    shape_weight: float = 3.0  # how much likelier a question about the shape is asked: colours are learned by themselves
    held_out_images: int = 200  # of the train split, for the accuracy that the log shows
    seed: int = 0


class Pupil:
    """The model in float32, run over pictures as the engine runs it over questions."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).to(device)
        processor = AutoProcessor.from_pretrained(directory)
        self._prompt = split_prompt(processor)
        self._tokenize = QuestionTokenizer(processor.tokenizer.backend_tokenizer.to_str())
        self._end: int = processor.tokenizer.eos_token_id
        self._limits = pixel_limits(processor.image_processor)
        self._factor = processor.image_processor.patch_size * processor.image_processor.merge_size
        self._images = processor.image_processor
        attend_in_spans(self.model.model.visual)
        self._embed = self.model.get_input_embeddings()
        self._device = device

    def pictures(self, data: EasyVqa, shape_weight: float) -> list[Picture]:
        """Return a split's pictures in the order of their first questions."""
        lessons: dict[str, list[Lesson]] = {}
        for row in data.rows:
            suffix = (*self._prompt.after_image_ids, *self._tokenize(row.question), *self._prompt.tail_ids)
            ids = (*suffix, *self._tokenize(row.answer), self._end)
            of_shape = row.answer_type == "shape" or not SHAPES.isdisjoint(row.question.rstrip("?").split())
            lesson = Lesson(ids, len(suffix), row.answer_type, shape_weight if of_shape else 1.0)
            lessons.setdefault(row.image_id, []).append(lesson)
        pictures = []
        for image_id, mine in lessons.items():
            with Image.open(data.images_dir / image_id) as image:
                pictures.append(Picture.of(np.array(image.convert("RGB")), mine))
        return pictures

    def __call__(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Return logits (targets, vocabulary) of every answer token and end of turn, and labels (B, K, S)."""
        resized = [self._resized(picture.pixels) for picture in pictures]
        patches = self._images(resized, do_resize=False, return_tensors="pt").to(self._device)
        seen = self.model.model.visual(patches["pixel_values"], grid_thw=patches["image_grid_thw"])
        merged = seen if isinstance(seen, Tensor) else seen.pooler_output  # (B * tokens, D); an output object since 5.0
        ids, labels = self._targets(pictures)  # (B, K, S)
        rows, number, length = ids.shape
        head = self._embed(torch.tensor(self._prompt.head_ids, device=self._device)).expand(rows, -1, -1)  # (B, H, D)
        prefix = torch.cat([head, merged.unflatten(0, (rows, -1))], dim=1)  # (B, P, D)
        embedded = torch.cat([prefix, self._embed(ids.flatten(1))], dim=1)  # (B, P + K*S, D)
        positions, mask = self._layout(head.shape[1], patches["image_grid_thw"][0].tolist(), number, length)
        states = self.model.model.language_model(
            inputs_embeds=embedded,
            position_ids=positions[:, None].expand(-1, rows, -1),
            attention_mask=mask.expand(rows, 1, -1, -1),
            use_cache=False,
        ).last_hidden_state
        asked = states[:, prefix.shape[1] :].unflatten(1, (number, length))[labels != _IGNORED]
        return self.model.lm_head(asked), labels

    def _resized(self, pixels: Pixels) -> Pixels:
        height, width = smart_resize(pixels.shape[0], pixels.shape[1], self._factor, *self._limits)
        return np.array(Image.fromarray(pixels).resize((width, height)))

    def _targets(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Return the ids of all lessons, padded at their ends, and at each place the id that is to follow it."""
        number = max(len(picture.lessons) for picture in pictures)
        length = max(len(lesson.ids) for picture in pictures for lesson in picture.lessons)
        ids = torch.zeros(len(pictures), number, length, dtype=torch.long)
        labels = torch.full_like(ids, _IGNORED)
        for row, picture in enumerate(pictures):
            for place, lesson in enumerate(picture.lessons):
                own = torch.tensor(lesson.ids)
                ids[row, place, : len(own)] = own
                labels[row, place, lesson.answer_at - 1 : len(own) - 1] = own[lesson.answer_at :]
        return ids.to(self._device), labels.to(self._device)

    def _layout(self, head: int, grid: Sequence[int], number: int, length: int) -> tuple[Tensor, Tensor]:
        """Return positions (3, L), each lesson's counting on after the image, and who sees whom (L, L)."""
        height, width = grid[1] // 2, grid[2] // 2
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + head
        lesson = (head + max(height, width) + torch.arange(length)).repeat(number)
        positions = torch.cat([torch.arange(head).expand(3, -1), image, lesson.expand(3, -1)], dim=1)
        segment = torch.cat([torch.zeros(head + height * width), 1 + torch.arange(number).repeat_interleave(length)])
        mask = ((segment[:, None] == segment) | (segment == 0)).tril()
        return positions.to(self._device), mask.to(self._device)


def accuracy(pupil: Pupil, pictures: Sequence[Picture], at_once: int = 50) -> dict[str, float]:
    """Return the share of answers of which every token is the likeliest, by answer type and for `all`."""
    right, asked = Counter[str](), Counter[str]()
    with torch.inference_mode():
        for start in range(0, len(pictures), at_once):
            some = pictures[start : start + at_once]
            logits, labels = pupil(some)
            likeliest = labels.clone()
            likeliest[labels != _IGNORED] = logits.argmax(-1)
            whole = (likeliest == labels).all(-1).tolist()
            for picture, answered in zip(some, whole):
                for lesson, is_right in zip(picture.lessons, answered):
                    for kind in (lesson.answer_type, "all"):
                        asked[kind] += 1
                        right[kind] += is_right
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def train(directory: Path, recipe: TrainingRecipe) -> None:
    """Train into `directory`, which then holds the checkpoint and `training.json`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    pupil = Pupil(build_small_model(unfinished, replace(SPEC, seed=recipe.seed)), device)
    pictures = pupil.pictures(read_easy_vqa("train"), recipe.shape_weight)
    held_out, taught = pictures[: recipe.held_out_images], pictures[recipe.held_out_images :]
    optimizers = _optimizers(pupil.model, recipe)
    progress = unfinished / "progress.pt"
    begun, spent = _resume(progress, recipe, pupil.model, optimizers)
    log.info("%s parameters, %d pictures, from step %d", f"{pupil.model.num_parameters():,}", len(taught), begun)
    started = time.monotonic() - spent
    for step in range(begun, recipe.steps):
        loss = _step(pupil, optimizers, _batch(taught, step, recipe), _rate(step, recipe))
        if (step + 1) % _LOG_EVERY == 0:
            log.info("step %d of %d: loss %.3f, %.0f s", step + 1, recipe.steps, loss, time.monotonic() - started)
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < recipe.steps:
            log.info("held out: %s", _show(accuracy(pupil, held_out)))
            _save_progress(progress, recipe, step + 1, time.monotonic() - started, pupil.model, optimizers)
    seconds = time.monotonic() - started
    names = load_file(unfinished / WEIGHTS).keys()
    (unfinished / WEIGHTS).write_bytes(save(_published(pupil.model, names), metadata={"format": "pt"}))
    figures = {
        "held_out": accuracy(pupil, held_out),
        "test": accuracy(pupil, pupil.pictures(read_easy_vqa("test"), recipe.shape_weight)),
    }
    for name, figure in figures.items():
        log.info("%s: %s", name, _show(figure))
    facts = {"recipe": asdict(recipe), "accuracy": figures, "seconds": round(seconds), **_environment(device)}
    (unfinished / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    progress.unlink(missing_ok=True)
    (unfinished / "small_model.json").unlink()  # these are no longer the weights that it describes
    unfinished.rename(directory)


def _optimizers(model: Any, recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    matrices: list[Any] = []
    others: list[Any] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.other_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def _batch(pictures: Sequence[Picture], step: int, recipe: TrainingRecipe) -> list[Picture]:
    size, lessons = recipe.images_per_step, recipe.questions_per_image
    return draw_batch(pictures, step, size=size, lessons=lessons, seed=recipe.seed)


def _rate(step: int, recipe: TrainingRecipe) -> float:
    """Return the factor of the learning rates: a warm-up, then half a cosine."""
    return min((step + 1) / recipe.warmup, (1 + math.cos(math.pi * step / recipe.steps)) / 2)


def _step(pupil: Pupil, optimizers: list[torch.optim.Optimizer], pictures: list[Picture], rate: float) -> float:
    logits, labels = pupil(pictures)
    loss = cross_entropy(logits, labels[labels != _IGNORED])
    pupil.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(pupil.model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.setdefault("full_rate", group["lr"])
        optimizer.step()
    return loss.item()


def _published(model: Any, names: Any) -> dict[str, Tensor]:
    """Return the weights in bfloat16 by their published names, which transformers 4.52 and later rename as they load."""
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in model.state_dict().items()
    }
    return {name: weights[name].to("cpu", torch.bfloat16).contiguous() for name in sorted(names)}


def _save_progress(
    path: Path, recipe: TrainingRecipe, step: int, seconds: float, model: Any, optimizers: list[torch.optim.Optimizer]
) -> None:
    partial = path.with_suffix(".partial")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"recipe": asdict(recipe), "step": step, "seconds": seconds, "model": model.state_dict(),
                "optimizers": states}, partial)  # fmt: skip
    partial.rename(path)


def _resume(path: Path, recipe: TrainingRecipe, model: Any, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Load what an interrupted training of the same recipe left; return its step and its seconds."""
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path, weights_only=True)
    if saved["recipe"] != asdict(recipe):
        return 0, 0.0
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["seconds"]


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "easy-vqa")},
    }


def _show(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in figures.items())


def main(argv: list[str] | None = None) -> None:
    """Train from the command line and print the directory."""
    defaults = TrainingRecipe()
    parser = argparse.ArgumentParser(prog="python -m workers.demo.model", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write the checkpoint; must not exist")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.directory.exists():
        parser.error(f"{options.directory} exists: remove it, or name another directory")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options.directory, replace(defaults, seed=options.seed, steps=options.steps))
    sys.stdout.write(f"{options.directory}\n")


if __name__ == "__main__":
    main()
