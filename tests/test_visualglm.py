"""VisualGLM-6B against the original code: network, prompts, chat; and what ours does besides."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import chatglm
from chatglm import ChatGLMTokenizer, VisualGLMConfig, VisualGLMForConditionalGeneration
from chatglm.checkpoints.clues import VISUAL
from chatglm.conversation.visualglm import VisualGLMFormat
from chatglm.demo import FOLDERS
from chatglm.quantization.layers import QuantizedLinear
from conftest import SHARED, needs_shared
from deviations import DEVIATIONS
from goldens import GRADIENT_NOISE, NOISE, assert_close_to_scale, assert_relative, case, find, read_json, read_tensors
from test_chat_goldens import Force
from tiny_visualglm import picture_bytes, picture_file, tiny_visualglm

SETS = ("image_0", "image_1", "image_2", "image_batch", "image_batch_ones_mask", "image_train_right_pad")
NOISE_1, GRADIENT_1 = NOISE[1], GRADIENT_NOISE[1]


@cache
def golden_model(dtype: torch.dtype = torch.float32) -> Any:
    return VisualGLMForConditionalGeneration.from_pretrained(find("visualglm/model"), dtype=dtype).eval()


@cache
def tokenizer_golden() -> Any:
    return json.loads((SHARED / "goldens" / "tokenizer" / "visualglm.json").read_text(encoding="utf-8"))


@cache
def published_tokenizer() -> Any:
    return ChatGLMTokenizer.from_pretrained(SHARED / "checkpoints" / "chatglm-6b", chatglm_version=VISUAL)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    return tiny_visualglm(tokenizer), tokenizer


# ---- the network ---------------------------------------------------------------------------------------------------


@needs_shared
def test_features_of_pictures() -> None:
    golden, model = case("visualglm/forward", "features"), golden_model()
    with torch.no_grad():
        seen = model.image_encoder.vit(pixel_values=golden["images"]).last_hidden_state
        assert_close_to_scale(seen, golden["vit"], NOISE_1)
        assert_close_to_scale(model.encode_images(golden["images"]), golden["embeds"], NOISE_1)


@needs_shared
@pytest.mark.parametrize("name", SETS)
def test_logits_and_losses(name: str) -> None:
    golden = case("visualglm/forward", name)
    outputs = golden_model()(
        **golden.inputs(), images=golden["images"], pre_image_length=golden.meta["pre_image_length"],
        output_hidden_states=True,
    )  # fmt: skip
    assert_close_to_scale(outputs.logits, golden["logits"], NOISE_1)
    if "loss" in golden:
        assert_relative(outputs.loss.item(), golden["loss"].item())
    for layer in range(4 if "hidden_states.0" in golden else 0):
        assert_close_to_scale(outputs.hidden_states[layer].transpose(0, 1), golden[f"hidden_states.{layer}"], NOISE_1)


@needs_shared
@pytest.mark.parametrize("name", ["no_image", "text_only", "text_batch"])
def test_logits_without_a_picture(name: str) -> None:
    golden = case("visualglm/forward", name)
    rows = golden.real_rows(DEVIATIONS["pad_rows_are_not_fully_visible"])
    assert_close_to_scale(golden_model()(**golden.inputs()).logits, golden["logits"], NOISE_1, rows)


@needs_shared
@pytest.mark.parametrize("name", ["inc_image", "inc_image_batch", "inc_text_batch"])
def test_tokens_one_by_one(name: str) -> None:
    golden, model = case("visualglm/forward", name), golden_model()
    ids, mask, tokens = golden["input_ids"], None, golden["forced_tokens"]
    picture: dict[str, Any] = {}
    if "images" in golden:
        picture = {"images": golden["images"], "pre_image_length": golden.meta["pre_image_length"]}
    positions = golden.tensors.get("position_ids")
    if "attention_mask" in golden:
        mask = golden["attention_mask"]
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **picture)
        rows = golden.real_rows(DEVIATIONS["pad_rows_are_not_fully_visible"])
        assert_close_to_scale(outputs.logits, golden["step0.logits"], NOISE_1, rows)
        cache = chatglm.network.compat.cache_of(outputs)
        for step, described in enumerate(golden.meta["steps"][1:]):
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(ids), 1)), dim=1)
            outputs = model(
                input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache,
                position_ids=torch.tensor(described["position_ids"]),
            )  # fmt: skip
            assert_close_to_scale(outputs.logits, golden[f"step{step + 1}.logits"], NOISE_1)


@needs_shared
def test_gradients() -> None:
    golden = case("visualglm/grads", "image_train_right_pad")
    model = VisualGLMForConditionalGeneration.from_pretrained(find("visualglm/model"), dtype=torch.float32)
    model.eval().requires_grad_(True)
    place = golden.meta["pre_image_length"]
    outputs = model(**golden.inputs(), images=golden["images"], pre_image_length=place)
    outputs.loss.backward()
    assert_relative(outputs.loss.item(), golden.meta["loss"])
    state = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = published(model, state)
    for name, norm in golden.meta["grad_norm"].items():
        if name in ours:
            assert abs(ours[name].norm().item() - norm) <= 1e-4 * norm + 1e-6, name
    missing = set(golden.meta["grad_norm"]) - set(ours)
    assert missing <= {"lm_head.weight"}, missing
    whole = [name for name in golden.tensors if name.startswith("grad.")]
    assert whole
    for name in whole:
        assert_close_to_scale(ours[name.removeprefix("grad.")], golden[name], 10 * GRADIENT_1)


def published(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the published names."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, state))


@needs_shared
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_precision(kind: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    features, noise = case("visualglm/lowp", kind), read_json("visualglm/lowp.json")
    exact = case("visualglm/forward", "features")
    model = VisualGLMForConditionalGeneration.from_pretrained(find("visualglm/model"), dtype=dtype).eval()
    with torch.no_grad():
        seen = model.encode_images(features["images"])
    assert seen.dtype == dtype
    assert (seen.float() - exact["embeds"]).abs().max() <= 2 * noise[kind]["embeds_max_diff_vs_fp32"]
    golden = case("visualglm/lowp", f"{kind}_image_0")
    logits = model(golden["input_ids"], images=golden["images"], pre_image_length=3).logits
    difference = (logits.float() - case("visualglm/forward", "image_0")["logits"]).abs().max().item()
    assert difference <= 2 * golden.meta["max_diff_vs_fp32"]


@needs_shared
@pytest.mark.parametrize("index", range(10))
def test_generated_ids(index: int) -> None:
    entry = read_json("visualglm/generate.json")["cases"][index]
    images = read_tensors("visualglm/generate.safetensors")
    options: dict[str, Any] = {"max_new_tokens": len(entry["sequences"][0]) - len(entry["prompt"]), "do_sample": False}
    if "images" in entry:
        options |= {"images": images[entry["images"]], "pre_image_length": entry["pre_image_length"]}
    if entry["kind"] == "beam3":
        options["num_beams"] = 3
    if "eos_token_id" in entry:
        options |= {"eos_token_id": entry["eos_token_id"], "max_new_tokens": 24}
    for use_cache in (True, False):
        ids = golden_model().generate(torch.tensor([entry["prompt"]]), use_cache=use_cache, **options)
        assert ids.tolist() == entry["sequences"]


@needs_shared
def test_streamed_ids() -> None:
    golden = read_json("visualglm/generate.json")["stream_generate"]
    prompt = torch.tensor([golden["prompt"]])
    picture = {"images": read_tensors("visualglm/generate.safetensors")[golden["images"]], "pre_image_length": 3}
    *_, last = golden_model().stream_generate(prompt, max_new_tokens=12, do_sample=False, **picture)
    assert last[0].tolist() == golden["greedy12"]
    assert DEVIATIONS["the_last_token_is_kept"]
    *_, last = golden_model().stream_generate(prompt, max_length=prompt.shape[1] + 6, do_sample=False, **picture)
    assert last[0, :-1].tolist() == golden["max_length=n+6"]["ok"]["last"][0]


# ---- files ---------------------------------------------------------------------------------------------------------


@needs_shared
def test_the_published_config() -> None:
    config = chatglm.ChatGLMConfig.from_pretrained(SHARED / "checkpoints" / "visualglm-6b")
    assert isinstance(config, VisualGLMConfig)
    assert (config.image_size, config.image_length, config.eva_config["num_layers"]) == (224, 32, 39)
    plain = VisualGLMConfig()
    assert {**plain.eva_config, **config.eva_config} == config.eva_config


@needs_shared
def test_saved_under_the_published_names(tmp_path: Path) -> None:
    golden_model().save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), read_tensors("visualglm/model/model.safetensors")
    assert set(theirs) - set(ours) == {name for name in theirs if name.endswith("inv_freq") or name == "lm_head.weight"}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert values["architectures"] == ["ChatGLMModel"]
    del values["chatglm_version"]
    assert isinstance(chatglm.ChatGLMConfig(**values), VisualGLMConfig)


@needs_shared
def test_dispatch_by_the_config_or_the_weights(tmp_path: Path) -> None:
    values = json.loads((find("visualglm/model") / "config.json").read_text(encoding="utf-8"))
    del values["_name_or_path"]
    assert isinstance(chatglm.ChatGLMConfig(**values), VisualGLMConfig)
    del values["eva_config"], values["qformer_config"]
    assert not isinstance(chatglm.ChatGLMConfig(**values), VisualGLMConfig)


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_text_part_is_quantised(small: Any, tmp_path: Path, bits: int) -> None:
    model, tokenizer = small
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    made, _ = chatglm.load(tmp_path / "float", device="cpu", dtype="float32", quantize=bits)
    quantised = {name for name, module in made.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(quantised) == 2 * 4
    assert all(name.startswith("transformer.layers.") for name in quantised)
    picture = picture_bytes()
    answer = made.chat(tokenizer, picture, "这是什么？", do_sample=False, max_new_tokens=8)
    made.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = chatglm.load(tmp_path / "saved", device="cpu", dtype="float32")
    assert again.chat(tokenizer, picture, "这是什么？", do_sample=False, max_new_tokens=8) == answer
    direct = type(model).from_pretrained(tmp_path / "float", dtype=torch.float32).eval().quantize(bits)
    assert direct.chat(tokenizer, picture, "这是什么？", do_sample=False, max_new_tokens=8) == answer


# ---- prompts and chat ----------------------------------------------------------------------------------------------


def prompt_cases(kind: str) -> list[Any]:
    return tokenizer_golden()[kind] if (SHARED / "goldens").is_dir() else []


@needs_shared
def test_prompts() -> None:
    tokenizer = published_tokenizer()
    for entry in prompt_cases("build_inputs_with_image"):
        has_image = bool(entry["image_path"].strip())
        ids = VisualGLMFormat(32 if has_image else 0).encode(tokenizer, entry["query"], entry["history"])
        golden = entry["result"]["ok"]
        if "[gMASK]" in entry["query"]:
            assert DEVIATIONS["typed_control_tokens_stay_text"]
            assert ids.count(tokenizer.get_command("<sop>")) == 1 and ids != golden["input_ids"][0]
        else:
            assert [ids] == golden["input_ids"], entry
        if has_image:
            assert ids.index(0) == golden["pre_image_length"]


@needs_shared
def test_prompts_of_the_english_demo() -> None:
    tokenizer = published_tokenizer()
    for entry in prompt_cases("sat_chat"):
        length = 32 if entry["has_image"] else 0
        ids = VisualGLMFormat(length, entry["english"]).encode(tokenizer, entry["query"], entry["history"])
        assert [3 if token == 0 else token for token in ids] == entry["ids"]
        assert VisualGLMFormat().clean(entry["answer"]) == entry["result"]["ok"][0]


@needs_shared
def test_typed_tags_open_no_file(no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert DEVIATIONS["typed_img_tags_are_text"]
    monkeypatch.chdir(SHARED / "goldens" / "tokenizer" / "visualglm_images")
    tokenizer = published_tokenizer()
    for entry in prompt_cases("unsafe"):
        if entry["image_path"] not in ("", "gradient.png"):
            continue
        length = 32 if entry["image_path"] else 0
        ids = VisualGLMFormat(length).encode(tokenizer, entry["query"], entry["history"])
        assert ids.count(0) == length and ids[3 : 3 + length] == [0] * length


@pytest.fixture(scope="module")
def vocabulary_model() -> Iterator[tuple[Any, Any]]:
    """A tiny model of the published vocabulary."""
    tokenizer = published_tokenizer()
    yield tiny_visualglm(tokenizer, vocab_size=130528, num_layers=1), tokenizer


@needs_shared
@pytest.mark.parametrize("kind", ["chat", "stream_chat"])
def test_answers(vocabulary_model: Any, kind: str) -> None:
    model, tokenizer = vocabulary_model
    pictures = SHARED / "goldens" / "tokenizer" / "visualglm_images"
    for entry in prompt_cases(kind):
        path = str(pictures / entry["image_path"]) if entry["image_path"] else ""
        end = tokenizer.get_command("<eop>")
        force = [*(token for token in entry["answer_ids"] if token != end), end]
        history = entry["history"]
        options = {"logits_processor": [Force(force)], "min_length": 1}
        if kind == "chat":
            ours = json.loads(json.dumps(model.chat(tokenizer, path, entry["query"], history, **options)))
            assert ours == entry["result"]["ok"]
        else:
            ours = json.loads(json.dumps(list(model.stream_chat(tokenizer, path, entry["query"], history, **options))))
            assert ours[-1] == entry["result"]["ok"][-1]
            assert all(shown in entry["result"]["ok"] for shown in ours)
        assert history == entry["history"]


@needs_shared
def test_the_original_signatures() -> None:
    golden = tokenizer_golden()["defaults"]
    for name in ("chat", "stream_chat"):
        parameters = inspect.signature(getattr(VisualGLMForConditionalGeneration, name)).parameters
        assert list(parameters)[:4] == ["self", "tokenizer", "image_path", "query"]
        found = {key: one.default for key, one in parameters.items() if key in golden[name]}
        assert found == golden[name]


def test_min_length_counts_the_prompt(small: Any) -> None:
    model, tokenizer = small
    options = {"do_sample": False, "min_length": 80, "max_length": 90}
    *_, step = model.stream_steps(tokenizer, "你好", image=picture_bytes(), **options)
    assert step.prompt_tokens + step.completion_tokens >= 80


def test_a_picture_changes_the_answer_and_the_cache(small: Any) -> None:
    """The placeholders of all pictures are equal: a cache must not be taken for that of another picture."""
    model, tokenizer = small
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "repetition_penalty": 1.0}

    def scores(picture: Any) -> torch.Tensor:
        model.clear_chat_cache()
        placed = model.place_picture(tokenizer, picture)
        ids = model.format_with_picture().encode(tokenizer, "这是什么？")
        return model(torch.tensor([ids]), **placed.inputs).logits[0, -1]

    red, blue = picture_bytes(), picture_bytes((10, 20, 250))
    assert not torch.allclose(scores(red), scores(blue), atol=1e-3)
    model.clear_chat_cache()
    steps = [list(model.stream_steps(tokenizer, "这是什么？", image=one, **options))[-1] for one in (red, red, blue)]
    assert [step.cached_tokens > 0 for step in steps] == [False, True, False]
    model.clear_chat_cache()
    assert list(model.stream_steps(tokenizer, "这是什么？", image=blue, **options))[-1].text == steps[2].text


def test_beams_see_the_picture(small: Any) -> None:
    model, tokenizer = small
    one = model.chat(tokenizer, picture_bytes(), "这是什么？", do_sample=False, max_new_tokens=6, num_beams=1)
    two = model.chat(tokenizer, picture_bytes(), "这是什么？", do_sample=False, max_new_tokens=6, num_beams=2)
    assert two[1][-1][0] == one[1][-1][0] == "这是什么？"


def test_where_a_picture_may_come_from(small: Any, tmp_path: Path, no_network: None) -> None:
    model, tokenizer = small
    path = picture_file(tmp_path)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    answers = [model.chat(tokenizer, one, "?", **options)[0] for one in (path, str(path), path.read_bytes())]
    assert len(set(answers)) == 1
    with pytest.raises(chatglm.PictureError, match="allow_urls"):
        model.chat(tokenizer, "http://example.com/a.png", "?", **options)
    blind, plain = chatglm.load(FOLDERS[1], device="cpu")
    with pytest.raises(TypeError, match="image"):
        next(iter(blind.stream_steps(plain, "你好", image=str(path))))


def test_the_engine_keeps_pictures_apart(small: Any) -> None:
    from chatglm.serving.chat_engine import ChatEngine

    model, tokenizer = small
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    pictures = [picture_bytes(), picture_bytes((10, 20, 250)), None]
    alone = [list(model.stream_steps(tokenizer, "这是什么？", image=one, **options))[-1].text for one in pictures]
    with ChatEngine(model, tokenizer, max_batch=3) as engine:
        runs = [engine.chat("这是什么？", image=one, **options) for one in pictures * 2]
        together = [list(run)[-1].text for run in runs]
    assert together == alone * 2
