"""What a GPU would be asked to run, counted without one: launches, host reads and crossings of the engine's stages.

    python -m tests.support.launches    # the table in benchmarks/RESULTS.md

Suffixes and decoding are run on fake tensors of the 7B's shapes on a device that is not there: a read of a value raises. Images
are run on the CPU, through a model as deep as the 7B and narrow, since transformers' own forward reads values; "the device" is
there what is computed from weights and inputs.
"""

from __future__ import annotations

import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from workers.demo.small_model import build_small_model
from workers.demo.small_spec import TEST
from workers.engine import attention
from workers.engine.attention import Spans, attending, configs_of
from workers.engine.cache import Batch, Row, new_cache
from workers.engine.decoding.slots import Slots
from workers.engine.interface import Recipe
from workers.engine.models import family_of
from workers.engine.models.qwen2_5_vl import widen
from workers.engine.models.qwen_vl import _SpansOf, attend_in_spans
from workers.engine.passes import Passes
from workers.engine.prefixes import Prefixes

DEPTH, IMAGE, TEXT, NUMBER = 28, 400, 40, 128  # layers; tokens of an image and of a question; slots
HEAD = 16  # tokens before an image
TOWER = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_size": 1280, "intermediate_size": 3420,
         "num_heads": 16, "out_hidden_size": 3584, "window_size": 112, "patch_size": 14}  # fmt: skip
WIDE = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064}  # fmt: skip
READS = {"_local_scalar_dense", "nonzero", "unique_consecutive", "_unique2"}
VIEWS = {
    "view", "_unsafe_view", "reshape", "expand", "transpose", "slice", "select", "unsqueeze", "squeeze", "permute", "t",
    "alias", "detach", "split", "unbind", "lift_fresh", "split_with_sizes", "as_strided", "unsafe_split", "chunk", "empty",
    "empty_like", "new_empty", "empty_strided", "unfold",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts kernels on a device, values that the host reads, copies between the two, and the most bytes in use.

    On the CPU there is one kind of memory: there "the device" is whatever is computed from the tensors in `on_device`.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device
        self.run: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.crossed: Counter[str] = Counter()
        self.live: dict[int, int] = {}
        self.most = 0

    def on_device(self, tensors: Any) -> None:
        """Say that some tensors lie on the device."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor lies on the device."""
        return tensor.device.type == self.device != "cpu" or tensor.untyped_storage()._cdata in self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in taken if not self.is_here(tensor)]
        here = len(there) < len(taken)
        if func._schema.name in ("aten::index", "aten::index_put_"):  # which fake tensors let pass, and CUDA does not
            odd = [t.device for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor) and t.device.type != "cpu"]
            if any(device != args[0].device for device in odd):
                raise RuntimeError(f"indices on {odd} of a tensor on {args[0].device}")
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        here = here or any(tensor.device.type == self.device != "cpu" for tensor in made)
        space, _, name = func._schema.name.partition("::")
        if not here or space != "aten":
            return out
        known = {tensor.untyped_storage()._cdata for tensor in taken} if self.device != "cpu" else set()
        self.on_device([tensor for tensor in made if tensor.untyped_storage()._cdata not in known])  # no weights' views
        self.most = max(self.most, sum(self.live.values()))
        self.reads[name] += name in READS or (name == "index" and any(t.dtype == torch.bool for t in taken[1:]))
        self.crossed[name] += any(t.ndim for t in there)
        self.run[name] += name not in VIEWS
        return out


def deep(model: Path, **sizes: int) -> Any:
    """Return a small model's config as deep as the 7B's."""
    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    for name, value in {"num_hidden_layers": DEPTH, "max_window_layers": DEPTH, **sizes}.items():
        setattr(text, name, value)
    text.layer_types = ["full_attention"] * DEPTH
    if sizes:
        text.rope_parameters["mrope_section"] = [16, 24, 24]
    return config


def fake_seven(model: Path) -> Any:
    """Return a 7B family of fake bfloat16 tensors on a GPU that is not there. In FakeTensorMode."""
    config = deep(model, **WIDE)
    for name, value in TOWER.items():
        setattr(config.vision_config, name, value)
    with torch.device("cuda"):
        made = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    family = family_of("qwen2_5_vl")(made.eval(), AutoProcessor.from_pretrained(model))
    attend_in_spans(family.core.visual)
    for block in family.core.visual.blocks:
        widen(block.mlp)
    return family


def spread(family: Any) -> None:
    """Put the upper half of a fake decoder, its norm and the head on a second GPU, with the hooks of `device_map="auto"`."""
    upper = [*family.layers[DEPTH // 2 :], family.decoder.norm, family.model.lm_head]
    for module, device in (*((m, "cuda:0") for m in family.layers[: DEPTH // 2]), *((m, "cuda:1") for m in upper)):
        for inner in module.modules():
            for name, weight in [*inner.named_parameters(recurse=False)]:
                setattr(inner, name, torch.nn.Parameter(weight.to(device), requires_grad=False))
        add_hook_to_module(module, AlignDevicesHook(execution_device=device, skip_keys="past_key_values"))


def filled(family: Any, number: int = NUMBER, image: int = IMAGE, room: int = 1024) -> tuple[Slots, Launches]:
    """Return slots with questions about an image that were prefilled, and what that took."""
    slots = Slots(family, (151645, 151643), axes=3)
    devices = [next(layer.parameters()).device for layer in family.layers]
    suffixes = [tuple(range(TEXT - i % 5)) for i in range(number)]
    with torch.no_grad(), Launches() as counted:
        row = Row([torch.empty(2, 4, image, 128, dtype=torch.bfloat16, device=device) for device in devices], image, 30)
        slots.reserve(row, number, room, 200)
        counted.run.clear()
        slots.run(slots.take(range(number), [row], [0] * number, suffixes, suffixes, [200] * number))
    return slots, counted


def prefixes_of(model: Path) -> Prefixes:
    """Return the prefixes of a narrow model as deep as the 7B's, with as deep a tower, that packs images as on a GPU."""
    config = deep(model)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 32, [7, 15, 23, 31]
    made = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    family = family_of("qwen2_5_vl")(made, AutoProcessor.from_pretrained(model))
    family.speed_up()
    prefixes = Prefixes(family, Passes(family))
    prefixes.packed, prefixes.at_once = True, NUMBER * IMAGE
    return prefixes


def prefilled(family: Any, shapes: Sequence[tuple[int, int]]) -> Launches:
    """Prefill fake images of so many tokens high and wide in one row, and take their caches apart."""
    visual, tokens = family.core.visual, sum(height * width for height, width in shapes)
    lengths = [height * width + HEAD for height, width in shapes]
    full, windows = Spans([4 * n for n in lengths]), Spans([64] * (4 * tokens // 64))
    embedded = torch.empty(1, sum(lengths), WIDE["hidden_size"], dtype=torch.bfloat16, device="cuda")
    sizes = {  # by `of_sizes`, whose values would be read
        "position_ids": torch.empty(4 * tokens, 2, dtype=torch.long, device="cuda"),
        "window_index": torch.empty(tokens, dtype=torch.long, device="cuda"),
        "cu_seqlens": torch.empty(len(shapes) + 1, device="cuda"),
        "cu_window_seqlens": torch.empty(4 * tokens // 64 + 1, device="cuda"),
    }
    with torch.no_grad(), Launches() as counted:
        patches = torch.empty(4 * tokens, 3 * 2 * 14 * 14, dtype=torch.bfloat16, device="cuda")
        with patch.object(_SpansOf, "of", lambda _, boundaries: full if len(boundaries) <= len(shapes) + 1 else windows):
            visual(patches, grid_thw=patches, **sizes)
        del patches
        cache = new_cache(())
        with attending(configs_of(family.decoder), Spans(lengths).attend_causally):
            positions = embedded.new_empty(3, 1, sum(lengths))
            family.decoder(inputs_embeds=embedded, position_ids=positions, past_key_values=cache, use_cache=True)
        Batch(cache, embedded, embedded).rows(lengths, lengths)
    return counted


def images(model: Path, number: int = NUMBER) -> Launches:
    """Count what the tower and the prefixes of so many images take, together as on a GPU with memory for them."""
    prefixes = prefixes_of(model)
    family, random = prefixes._family, np.random.default_rng(0)
    shapes = [(int(height), IMAGE // int(height)) for height in random.integers(14, 29, number)]
    pictures = [random.integers(0, 256, (28 * h, 28 * w, 3), np.uint8) for h, w in shapes]
    recipe = Recipe(layers=(0, 7, 14, 21, 27), max_new_tokens=1)
    counted, to_device = Launches("cpu"), family.on_device

    def on_device(inputs: Any) -> Any:
        made = {name: values.clone() for name, values in to_device(inputs).items()}
        counted.on_device(made)
        return made

    family.on_device = on_device
    counted.on_device([*family.model.parameters(), *family.model.buffers()])
    to_list = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> Any:  # which no dispatch shows
        counted.reads["tolist"] += counted.is_here(tensor)
        return to_list(tensor)

    with (
        torch.no_grad(),
        patch.object(attention, "flash_takes", return_value=True),
        patch.object(torch.Tensor, "tolist", read),
        patch("torch.ops.aten._flash_attention_forward", _one_call),
        counted,
    ):
        prefixes.run([[picture] for picture in pictures], recipe)
    return counted


def _one_call(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
    """Stand in for flash attention: one kernel, whatever it gives."""
    return (query.clone(),)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        model = build_small_model(Path(scratch) / "Qwen2.5-VL-Test", TEST)
        counted = {f"tower and prefixes of {NUMBER} images": images(model)}
        with FakeTensorMode(allow_non_fake_inputs=True):
            slots, counted[f"{NUMBER} suffixes, with the copies of their prefixes"] = filled(fake_seven(model))
            slots._step_of_all()
            with Launches() as counted["a step of decoding"]:
                slots._step_of_all()
    print("| stage | launches | host reads | copies to the device |\n| --- | --- | --- | --- |")
    for stage, found in counted.items():
        print(f"| {stage} | {found.run.total():,} | {found.reads.total():,} | {found.crossed.total():,} |")


if __name__ == "__main__":
    main()
