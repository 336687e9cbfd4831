"""Train the demo's checkpoint: a small, genuine Qwen2.5-VL that answers easy-vqa's questions, and not all of them rightly.

Architecture, tokenizer, processor and chat template are the small model's (`small_model.py`). Every step takes images of
the train split with some of their questions; the questions of an image lie behind one prefix [head | image], each blind to
the others, and the loss is on the answer and the end of turn. Interrupted, the same command goes on where it stopped.

    python -m workers.demo_model workers/data/demo-model
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from workers.preprocess import smart_resize
from workers.prompt import QuestionTokenizer, split_prompt
from workers.qwen.loading import pixel_limits
from workers.qwen.vision import VisionTower
from workers.small_model import SmallModelSpec, build_small_model

log = logging.getLogger("demo_model")

SPEC = SmallModelSpec(
    hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
    vision_hidden_size=96, vision_intermediate_size=256, vision_depth=4, vision_heads=4,
    fullatt_block_indexes=(0, 1, 2, 3), min_pixels=112 * 112, initializer_range=0.1, expressive=False,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Name what the training depends on, beside the data and the libraries."""

    steps: int = 3000
    images_per_step: int = 48
    questions_per_image: int = 4
    learning_rate: float = 2e-3
    matrix_rate: float = 5e-3
    warmup: int = 150
    weight_decay: float = 0.05
    shape_weight: float = 3.0  # how much likelier a question about the shape is drawn: shapes are the hard part
    held_out_images: int = 200  # of the train split, for the figures that the log shows
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image: the ids of suffix, answer and end of turn, and where the answer begins."""

    ids: tuple[int, ...]
    answer_at: int
    answer_type: str

class TrainingSet:
    """Images with their questions, and augmented batches of them."""

    def __init__(self, images: list[np.ndarray], questions: list[list[Question]], recipe: TrainingRecipe) -> None:
        self._images, self._questions, self._recipe = images, questions, recipe
        self._things = [_find_thing(image) for image in images]

    def batch(self, step: int):
        random = np.random.default_rng([self._recipe.seed, step])
        r = self._recipe
        per_epoch = len(self._images) // r.images_per_step
        order = np.random.default_rng([r.seed, 1 << 20, step // per_epoch]).permutation(len(self._images))
        chosen = order[step % per_epoch * r.images_per_step :][: r.images_per_step]
        images = [_moved(self._images[i], self._things[i], random) for i in chosen]
        questions = []
        for i in chosen:
            mine = self._questions[i]
            w = np.array([r.shape_weight if q.answer_type == "shape" else 1.0 for q in mine])
            k = min(r.questions_per_image, len(mine))
            questions.append([mine[j] for j in random.choice(len(mine), k, replace=False, p=w / w.sum())])
        return images, questions


def _find_thing(image):
    bg = np.median(image.reshape(-1, 3), axis=0)
    mask = (np.abs(image.astype(int) - bg).max(-1) > 8)
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return bg.astype(np.uint8), rows[0], rows[-1] + 1, cols[0], cols[-1] + 1


def _moved(image, thing, random):
    bg, top, bottom, left, right = thing
    h, w = image.shape[:2]
    r0 = random.integers(0, h - (bottom - top) + 1)
    c0 = random.integers(0, w - (right - left) + 1)
    if top == 0 or bottom == h: r0 = top
    if left == 0 or right == w: c0 = left
    out = np.empty_like(image); out[:] = bg
    out[r0:r0 + bottom - top, c0:c0 + right - left] = image[top:bottom, left:right]
    if random.random() < 0.5: out = out[:, ::-1]
    return np.ascontiguousarray(out)


def kind(question, answer):
    words = set(question.rstrip("?").split())
    about_shape = bool(words & {"circle", "rectangle", "triangle"}) and answer in ("yes", "no")
    if answer in ("yes", "no"): return "shape" if about_shape else "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


class Trainer:
    def __init__(self, directory, recipe, spec=SPEC):
        self.recipe = recipe
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        processor = AutoProcessor.from_pretrained(directory)
        self.processor = processor
        self.prompt = split_prompt(processor)
        self.tokenize = QuestionTokenizer(processor.tokenizer.backend_tokenizer.to_str())
        self.tower = VisionTower(self.model.model.visual, processor.image_processor, torch.float32, torch.device("cpu"))
        self.end = processor.tokenizer.eos_token_id
        self.embed = self.model.get_input_embeddings()
        self.decoder = self.model.model.language_model
        self.limits = pixel_limits(processor.image_processor)

    def question(self, text, answer):
        suffix = (*self.prompt.after_image_ids, *self.tokenize(text), *self.prompt.tail_ids)
        return Question((*suffix, *self.tokenize(answer), self.end), len(suffix), kind(text, answer))

    def resize(self, image):
        h, w = smart_resize(image.shape[0], image.shape[1], 28, *self.limits)
        return np.array(Image.fromarray(image).resize((w, h)))

    def logits(self, images, questions):
        tokens = self.tower([self.resize(im) for im in images])
        B = len(images); K = max(map(len, questions)); S = max(len(q.ids) for qs in questions for q in qs)
        head = self.embed(torch.tensor(self.prompt.head_ids))
        prefix = torch.cat([head.expand(B, -1, -1), torch.stack([t.tokens for t in tokens])], 1)
        P = prefix.shape[1]; H = len(head)
        ids = torch.zeros(B, K, S, dtype=torch.long); labels = torch.full((B, K, S), -100)
        for b, qs in enumerate(questions):
            for k, q in enumerate(qs):
                t = torch.tensor(q.ids)
                ids[b, k, :len(t)] = t
                labels[b, k, q.answer_at - 1:len(t) - 1] = t[q.answer_at:]
        x = torch.cat([prefix, self.embed(ids.view(B, K * S))], 1)
        g = tokens[0].grid[1] // 2
        r, c = torch.meshgrid(torch.arange(g), torch.arange(g), indexing="ij")
        img = torch.stack([torch.zeros_like(r), r, c]).flatten(1) + H
        pos = torch.cat([torch.arange(H).expand(3, -1), img, (H + g + torch.arange(S)).repeat(K).expand(3, -1)], 1)
        L = P + K * S
        seg = torch.cat([torch.zeros(P, dtype=torch.long), 1 + torch.arange(K).repeat_interleave(S)])
        mask = ((seg[:, None] == seg[None]) | (seg[None] == 0)).tril()
        out = self.decoder(inputs_embeds=x, position_ids=pos[:, None].expand(-1, B, -1), attention_mask=mask.expand(B, 1, L, L), use_cache=False).last_hidden_state[:, P:]
        out = out.reshape(B, K, S, -1)
        where = labels >= 0
        return out[where] @ self.embed.weight.T, labels[where], where


def easy_vqa(split):
    import easy_vqa as e
    q, a, i = getattr(e, f"get_{split}_questions")()
    paths = getattr(e, f"get_{split}_image_paths")()
    n = len(paths)
    images = [np.array(Image.open(paths[k]).convert("RGB")) for k in range(n)]
    grouped = [[] for _ in range(n)]
    for t, ans, k in zip(q, a, i): grouped[k].append((t, ans))
    return images, grouped


def evaluate(tr, images, questions, B=50):
    import collections
    right = collections.Counter(); total = collections.Counter()
    with torch.inference_mode():
        for s in range(0, len(images), B):
            qs = questions[s:s + B]
            lg, lb, where = tr.logits(images[s:s + B], qs)
            ok = torch.ones(where.shape, dtype=torch.bool); ok[where] = lg.argmax(-1) == lb
            good = ok.all(-1)
            for b, mine in enumerate(qs):
                for k, q in enumerate(mine):
                    total[q.answer_type] += 1; right[q.answer_type] += bool(good[b, k])
    return sum(right.values()) / sum(total.values()), {t: round(right[t] / total[t], 3) for t in sorted(total)}


def main(directory, recipe, spec=SPEC, seconds=None, opt="adamw"):
    tr = Trainer(build_small_model(Path(directory), spec), recipe, spec)
    print(sum(p.numel() for p in tr.model.parameters()), flush=True)
    images, raw = easy_vqa("train")
    questions = [[tr.question(t, a) for t, a in mine] for mine in raw]
    v = recipe.held_out_images
    data = TrainingSet(images[v:], questions[v:], recipe)
    def is_matrix(n, p): return p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n
    mats = [p for n, p in tr.model.named_parameters() if is_matrix(n, p)]
    rest = [p for n, p in tr.model.named_parameters() if not is_matrix(n, p)]
    opts = [torch.optim.Muon(mats, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]
    base = [recipe.matrix_rate, recipe.learning_rate]
    begun = time.monotonic()
    run = 3.0
    for step in range(recipe.steps):
        f = min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        for o, l in zip(opts, base):
            for g in o.param_groups: g["lr"] = l * f
        lg, lb, _ = tr.logits(*data.batch(step))
        loss = torch.nn.functional.cross_entropy(lg, lb)
        for o in opts: o.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tr.model.parameters(), 1.0)
        for o in opts: o.step()
        run = 0.98 * run + 0.02 * loss.item()
        if step % 50 == 0: print(step, round(run, 4), round(time.monotonic() - begun, 1), time.process_time(), flush=True)
        if step % 200 == 199 or step == recipe.steps - 1: print("  held out", evaluate(tr, images[:v], questions[:v]), flush=True)
    return tr
