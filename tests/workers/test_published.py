"""`--halp-compat`: each of the study's models by what its extraction script does, written again over plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from storage.computation import Computation
from storage.errors import UserError
from storage.naming import model_slug
from tests.support.plain import Plain
from tests.support.processes import command, write_csv
from tests.support.tiny import decoder_of
from workers.checkpoint.families import refuse_blind
from workers.checkpoint.published import PUBLISHED, other_answer_length, refuse_unpublished
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.process import make_engine
from workers.errors import EngineStartError
from workers.extract.preprocess import Preprocessor

QUESTION = "Is there a red car to the left of the tall building, and how many people stand near it?"
TOLERANCE = 1e-4


def tower_output(plain: Plain, inputs: Any) -> torch.Tensor:
    seen: list[Any] = []
    tower = getattr(plain.model.model, "vision_tower", None) or plain.model.model.vision_model
    handle = tower.register_forward_hook(lambda _m, _i, out: seen.append(out))
    plain.model(**inputs)
    handle.remove()
    return seen[0].last_hidden_state


def gemma3(plain: Plain, inputs: Any, image: int, length: int) -> tuple[int, int, torch.Tensor]:
    return min(255, length // 2), length - 1, tower_output(plain, inputs).mean(dim=1).squeeze(0)


def mllama(plain: Plain, inputs: Any, image: int, length: int) -> tuple[int, int, torch.Tensor]:
    features = tower_output(plain, inputs)
    while features.dim() > 1:
        features = features.mean(dim=0)
    return image, length - 1, features


def phi4_multimodal(plain: Plain, inputs: Any, image: int, length: int) -> tuple[int, int, torch.Tensor]:
    features = inputs["image_pixel_values"]
    while features.dim() > 2:
        features = features.mean(dim=1)
    return image, length - 1, features.squeeze(0)


def llava_next(plain: Plain, inputs: Any, image: int, length: int) -> tuple[int, int, torch.Tensor]:
    found = plain.model.get_image_features(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    means = getattr(found, "pooler_output", found)[0].mean(dim=1)
    position = max(1, min(min(max(400, length // 3), 1500), length - 10))
    return position, length - 1, means


def smolvlm(plain: Plain, inputs: Any, image: int, length: int) -> tuple[int, int, torch.Tensor]:
    pixels = inputs["pixel_values"].view(-1, 3, *inputs["pixel_values"].shape[-2:])
    blocks: list[torch.Tensor] = []
    tower = plain.model.model.vision_model
    handle = tower.encoder.layers[-1].register_forward_hook(
        lambda _m, _i, out: blocks.append(out[0] if isinstance(out, tuple) else out)
    )
    tower(pixel_values=pixels)
    handle.remove()
    position = max(1, min(min(max(200, length // 4), 800), length - 10))
    return position, length - 1, blocks[0].flatten(0, -2).mean(0)


def fast_vlm(plain: Plain, inputs: Any, image: int, length: int) -> tuple[int, int, torch.Tensor]:
    ids = inputs["input_ids"][0].tolist()
    first, number = ids.index(plain.image_id), ids.count(plain.image_id)
    maps = tower_output(plain, inputs)  # (1, E, rows, columns)
    return first, length - number + 1 - 1, maps.flatten(2).mean(2)[0]


SCRIPTS: dict[str, tuple[Callable[..., tuple[int, int, torch.Tensor]], int | None]] = {
    # With what `hidden_states` is read at for `layer_k`; None: hooks on the layers.
    "gemma3": (gemma3, None),
    "mllama": (mllama, 1),
    "phi4_multimodal": (phi4_multimodal, 1),
    "llava_next": (llava_next, 0),
    "smolvlm": (smolvlm, 0),
    "fast_vlm": (fast_vlm, 0),
}


def as_published(plain: Plain, family: str, image: np.ndarray, question: str) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """Return a question's vectors by field and layer, and the two positions, as the family's script takes them."""
    script, offset = SCRIPTS[family]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = plain.processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=plain.template, add_generation_prompt=True, tokenize=False
    )
    inputs = plain.processor(images=[Image.fromarray(image)], text=[text], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    last = max(i for i, token in enumerate(ids) if token == plain.image_id)
    layers = decoder_of(plain.model).layers
    with torch.inference_mode():
        vision, query, pooled = script(plain, inputs, last, len(ids))
        hooked: dict[int, torch.Tensor] = {}
        handles = [
            layer.register_forward_hook(
                lambda _m, _i, out, k=k: hooked.setdefault(k, out[0] if isinstance(out, tuple) else out)
            )
            for k, layer in enumerate(layers)
        ]
        states = plain.model(**inputs, output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
    found = {"vision_only_representation": pooled.float().numpy()}
    for k in range(len(layers)):
        chosen = hooked[k] if offset is None else states[k + offset]
        found[f"vision_token_representation/layer_{k}"] = chosen[0, vision].numpy()
        found[f"query_token_representation/layer_{k}"] = chosen[0, query].numpy()
    return found, (vision, query)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        ours = found[name].astype(np.float32)
        if name == "vision_only_representation":  # padded with zeros where its length is the image's
            assert not ours[len(wanted) :].any()
            ours = ours[: len(wanted)]
        assert np.abs(ours - wanted).max() <= TOLERANCE * np.abs(wanted).max(), name


@pytest.mark.parametrize("family", SCRIPTS)
def test_each_of_the_studys_models(family: str, tiny: Callable[[str], Path], pictures: Path) -> None:
    engine, plain = make_engine(EngineSpec("model", str(tiny(family)), "main", "float32", "unused")), Plain(tiny(family))
    recipe = Recipe(layers=tuple(range(engine.info.num_hidden_layers)), max_new_tokens=4, halp_compat=True)
    preprocess = Preprocessor(engine.info)
    for number in range(4):
        image = preprocess.image(f"{number}.png", pictures, (), (None, None), halp_compat=True)
        [sample] = engine.extract([preprocess.request([image], QUESTION, recipe)])
        expected, positions = as_published(plain, family, image.pixels, QUESTION)
        assert_equal(sample.vectors, expected)
        assert (sample.facts["vision_token_position"], sample.facts["query_token_position"]) == positions
        size = engine.info.published_vision_size or engine.info.vision_hidden_size
        assert sample.vectors["vision_only_representation"].shape == (size,)
        assert sample.facts["answer_token_ids"] == plain([image.pixels], QUESTION, new=4).answer


def test_a_run_in_a_part(tiny: Callable[[str], Path], pictures: Path, tmp_path: Path) -> None:
    """The largest images of LLaVA-NeXT fill the vector; what a part says of it; verified."""
    model, plain = tiny("llava_next"), Plain(tiny("llava_next"))
    Image.effect_noise((112, 112), 90).convert("RGB").save(tmp_path / "square.png")
    rows = [{"question_id": "q", "image_id": "square.png", "question": QUESTION, "answer": ""}]
    table = write_csv(tmp_path / "vqa.csv", rows)
    result = command(
        "producer", "run", table, "--images-dir", tmp_path, "--output-dir", tmp_path / "o", "--model", model, "--halp-compat",
        "--dtype", "float32", "--layers", "all", "--max-new-tokens", "2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    verified = command("storage", "verify", "--deep", tmp_path / "o")
    assert verified.returncode == 0, verified.stderr
    [path] = (tmp_path / "o").glob("*.h5")
    expected, _ = as_published(plain, "llava_next", np.asarray(Image.open(tmp_path / "square.png")), QUESTION)
    with h5py.File(path) as part:
        assert part.attrs["layer_definition"] == "input"
        assert part.attrs["vision_only_definition"] == "token_means"
        assert part.attrs["positions"] == PUBLISHED["llava_next"].positions
        assert part["q"]["vision_only_representation"].shape == (len(expected["vision_only_representation"]),)
        assert_equal({name: part["q"][name][()] for name in expected}, expected)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("google/gemma-3-12b-it", "gemma3_12b"),
        ("apple/FastVLM-7B", "fastvlm_7b"),
        ("llava-hf/llama3-llava-next-8b-hf", "llava_next"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen25vl_7b"),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "llama3_2_11b_vision"),
        ("microsoft/Phi-4-multimodal-instruct", "phi4_multimodal"),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm_2.2b"),
        ("google/gemma-3-4b-it", "gemma_3_4b_it"),
    ],
)
def test_the_published_files_names(model: str, slug: str) -> None:
    assert model_slug(model) == slug


def test_what_the_study_does_not_have() -> None:
    with pytest.raises(UserError, match=r"the study has no molmo2 model \(the study's Molmo is an older one"):
        refuse_unpublished("molmo2")
    with pytest.raises(EngineStartError, match="Molmo 2 is served: allenai/Molmo2-8B"):
        refuse_blind({"model_type": "molmo", "auto_map": {"AutoConfig": "config_molmo.MolmoConfig"}, "vision_config": {}})


def test_answers_of_another_length_are_named() -> None:
    asked = Computation(halp_compat=True)
    assert other_answer_length("gemma3", asked) is None
    assert "--max-new-tokens 100 makes them comparable" in str(other_answer_length("smolvlm", asked))
    assert other_answer_length("smolvlm", asked.model_copy(update={"max_new_tokens": 0})) is None
