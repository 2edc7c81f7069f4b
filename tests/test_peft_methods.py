"""PEFT's own methods on every generation: prefix tuning, prompt tuning, P-tuning (v1) with both encoders, IA3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import DynamicCache

from chatglm.checkpoints.adapters import read_adapter
from chatglm.checkpoints.files import ModelLoadError
from chatglm.network import compat
from deviations import DEVIATIONS
from tiny_networks import BOS, GMASK, assert_same, every_model, prompt, text, tiny_model

VIRTUAL = 4
KINDS: dict[str, Callable[..., Any]] = {
    "prefix": peft.PrefixTuningConfig,
    "projected": lambda **given: peft.PrefixTuningConfig(prefix_projection=True, **given),
    "prompt": peft.PromptTuningConfig,
    "mlp": lambda **given: peft.PromptEncoderConfig(encoder_hidden_size=16, **given),
    "lstm": lambda **given: peft.PromptEncoderConfig(
        encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **given
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)

pytestmark = [
    # PEFT drops the positions that generate() makes, and the networks make their own.
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def wrapped(version: int, kind: str, **overrides: Any) -> Any:
    """A tiny model in PEFT, its prompt large enough that a wrong mask or position shows."""
    torch.manual_seed(0)
    config = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model = peft.get_peft_model(tiny_model(version, **overrides), config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(2)
    return model


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of the text, without those of virtual tokens."""
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found[:, -ids.shape[1] :]


def recomputed(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), dim=1)
    return ids


@every_model
@every_kind
@pytest.mark.parametrize("masked", [False, True])
def test_trained_saved_loaded_and_generated_with(version: int, kind: str, masked: bool, tmp_path: Path) -> None:
    model, ids = wrapped(version, kind).train(), text(version, 9, 5)
    mask = torch.ones_like(ids) if masked else None
    trained = [one for one in model.parameters() if one.requires_grad]
    assert trained and not any(one.requires_grad for one in model.get_base_model().parameters())
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(version), str(tmp_path))
    with torch.no_grad():
        assert_same(logits(loaded, ids, mask), logits(model, ids, mask))
        start = torch.tensor([prompt(version, 9)])
        expected = recomputed(loaded, start, 6)
        for options in ({}, {"attention_mask": torch.ones_like(start)}, {"use_cache": False}):
            if "prefix" in str(loaded.active_peft_config.peft_type).lower() and options == {"use_cache": False}:
                continue  # transformers then fills the prefix's own cache, whatever the model
            spoken = loaded.generate(
                input_ids=start, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, **options
            )
            assert spoken.tolist() == expected.tolist()


@every_model
@every_kind
@torch.no_grad()
def test_a_padded_batch_is_its_rows(version: int, kind: str) -> None:
    model = wrapped(version, kind).eval()
    rows = [prompt(version, length, length) for length in (5, 11, 8)]
    ids = torch.tensor([[3] * (11 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (11 - len(row)) + [1] * len(row) for row in rows])
    together = logits(model, ids, mask)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    spoken = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, found, words in zip(rows, together, spoken, strict=True):
        alone = torch.tensor([row])
        assert_same(found[-len(row) :][None], logits(model, alone), tolerance=1e-4)
        assert words[11:].tolist() == model.generate(input_ids=alone, **options)[0, len(row) :].tolist()


@every_model
@pytest.mark.parametrize("kind", ["prompt", "mlp", "lstm"])
@torch.no_grad()
def test_the_embeddings_of_words_are_words(version: int, kind: str) -> None:
    """Virtual tokens with the embeddings of words give what the words give: the same masks and positions."""
    assert DEVIATIONS["peft_prompts_are_context"]
    model, ids = wrapped(version, kind).eval(), text(version, 9, 5)
    words = torch.tensor([[20, 31, 42, 53]])
    base = model.get_base_model()
    embedded = base.get_input_embeddings()(words)
    model.prompt_encoder["default"].forward = lambda indices: embedded
    whole = torch.cat((words, ids), dim=1)
    assert_same(logits(model, ids), base(whole).logits[:, VIRTUAL:])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = torch.tensor([prompt(version, 9)])
    plain = base.generate(torch.cat((words, start), dim=1), **options)
    assert model.generate(input_ids=start, **options)[0].tolist() == plain[0, VIRTUAL:].tolist()


@torch.no_grad()
def test_a_prompt_that_starts_from_a_text_is_no_text() -> None:
    """`prompt_tuning_init="TEXT"` copies the embeddings of `[gMASK]` and `<sop>` too: they begin no answer."""
    model, ids = wrapped(1, "prompt").eval(), text(1, 9, 5)
    base = model.get_base_model()
    words = base.get_input_embeddings()(torch.tensor([[20, GMASK, BOS, 21]]))
    model.prompt_encoder["default"].forward = lambda indices: words
    whole = torch.cat((torch.tensor([[20, 30, 31, 21]]), ids), dim=1)
    embedded = torch.cat((words, base.get_input_embeddings()(ids)), dim=1)
    given = {"attention_mask": base.get_masks(whole), "position_ids": base.get_position_ids(whole)}
    assert_same(logits(model, ids), base(inputs_embeds=embedded, **given).logits[:, VIRTUAL:])


@every_model
@torch.no_grad()
def test_a_prefix_takes_places_in_the_context(version: int) -> None:
    """Prefix tuning: as if the base model continued a cache whose tokens stand in front of the text."""
    model, ids = wrapped(version, "prefix").eval(), text(version, 9, 5)
    base, cache = model.get_base_model(), model.get_prompt(1)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == VIRTUAL
    positions = base.get_position_ids(ids)
    mask = base.get_masks(ids) if version == 1 else None
    if version == 1:
        positions = positions + torch.tensor([[VIRTUAL], [0]])
        mask = torch.cat((mask.new_zeros(1, 1, 14, VIRTUAL), mask), dim=-1)
    else:
        positions = positions + VIRTUAL
    reference = base(ids, position_ids=positions, attention_mask=mask, past_key_values=cache).logits
    assert_same(logits(model, ids), reference)


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_the_keys_and_values_of_words_are_words(version: int) -> None:
    model, ids = wrapped(version, "prefix").eval(), text(version, 9, 5)
    words = torch.tensor([[20, 31, 42, 53]])
    base = model.get_base_model()
    cache = base(words, use_cache=True).past_key_values
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]  # each (1, heads, 4, size)
    rows = torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1)
    model.prompt_encoder["default"].embedding.weight.copy_(rows)
    assert_same(logits(model, ids), base(torch.cat((words, ids), dim=1)).logits[:, VIRTUAL:])


@every_model
@every_kind
@torch.no_grad()
def test_beams_and_samples(version: int, kind: str) -> None:
    model, start = wrapped(version, kind).eval(), torch.tensor([prompt(version, 9)])
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    beams = model.generate(input_ids=start, num_beams=3, do_sample=False, **options)
    best = logits(model, beams).log_softmax(-1)[0, 8:-1].gather(1, beams[0, 9:, None]).sum()
    greedy = model.generate(input_ids=start, do_sample=False, **options)
    assert best >= logits(model, greedy).log_softmax(-1)[0, 8:-1].gather(1, greedy[0, 9:, None]).sum() - 1e-4
    torch.manual_seed(0)
    assert model.generate(input_ids=start, do_sample=True, num_return_sequences=2, **options).shape == (2, 13)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@torch.no_grad()
def test_the_mask_and_positions_of_the_tokenizer_of_generation_1(kind: str) -> None:
    """`generate(**tokenizer(texts, padding=True))`, whose mask has four dimensions and whose positions have three."""
    model, start = wrapped(1, kind).eval(), torch.tensor([prompt(1, 9)])
    base = model.get_base_model()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given = {"attention_mask": base.get_masks(start), "position_ids": base.get_position_ids(start)}
    expected = model.generate(input_ids=start, **options)
    assert torch.equal(model.generate(input_ids=start, **given, **options), expected)


@pytest.mark.parametrize("changes", [{}, {"multi_query_attention": False}, {"multi_query_group_num": 1}])
def test_the_width_of_keys_and_values(changes: dict[str, Any]) -> None:
    model = wrapped(2, "prefix", **changes)
    config = model.get_base_model().config
    assert model.active_peft_config.num_attention_heads == config.num_key_value_heads
    assert model.active_peft_config.token_dim == config.num_key_value_heads * config.kv_channels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@every_model
def test_half_precision(version: int, kind: str, dtype: torch.dtype) -> None:
    """PEFT's prompt is float32, the base is not."""
    config = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model, ids = peft.get_peft_model(tiny_model(version, dtype), config), text(version, 9, 5)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.generate(input_ids=ids[:, :9], max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@every_model
def test_a_quantised_base(version: int, kind: str, bits: int) -> None:
    """Trained through INT4 or INT8; its tokens come from the kernels, which read the prefix in the cache."""
    torch.manual_seed(0)
    config = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model, ids = peft.get_peft_model(tiny_model(version).quantize(bits, precision="exact"), config), text(version, 9, 5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    with torch.no_grad():
        start = torch.tensor([prompt(version, 9)])
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert model.eval().generate(input_ids=start, **options).tolist() == recomputed(model, start, 6).tolist()


@every_model
def test_ia3(version: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["query_key_value", "dense_4h_to_h"],
        feedforward_modules=["dense_4h_to_h"],
    )
    model, ids = peft.get_peft_model(tiny_model(version), config), text(version, 9, 5)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in trained)
    with torch.no_grad():
        for one in trained:
            one.normal_(1, 0.3)
        model.eval().save_pretrained(tmp_path, save_embedding_layers=False)
        loaded = peft.PeftModel.from_pretrained(tiny_model(version), str(tmp_path))
        assert_same(logits(loaded, ids), logits(model, ids))
        assert (logits(loaded, ids) - tiny_model(version)(ids).logits).abs().max() > 1e-2
        start = torch.tensor([prompt(version, 9)])
        spoken = loaded.generate(input_ids=start, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert spoken.tolist() == recomputed(loaded, start, 5).tolist()


@every_model
@pytest.mark.parametrize("kind", ["prefix", "prompt", "mlp"])
def test_our_loader_names_the_way_to_load_them(version: int, kind: str, tmp_path: Path) -> None:
    wrapped(version, kind).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"peft\.PeftModel\.from_pretrained\(model, "):
        read_adapter(tmp_path)


# ---- without PEFT: what these calls rest on --------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_alone_say_where_the_answer_begins() -> None:
    model, ids = tiny_model(1), text(1, 9, 5)
    embedded = model.get_input_embeddings()(ids)
    assert_same(model(inputs_embeds=embedded).logits, model(ids).logits)
    assert_same(model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)
    with pytest.raises(ValueError, match="<sop>"):
        model(inputs_embeds=embedded[:, :8])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    start = torch.tensor([prompt(1, 9)])
    spoken = model.generate(inputs_embeds=model.get_input_embeddings()(start), **options)
    assert spoken.tolist() == model.generate(start, **options)[:, 9:].tolist()
    both = model.generate(start, inputs_embeds=model.get_input_embeddings()(start), **options)
    assert both[:, 9:].tolist() == spoken.tolist()


@torch.no_grad()
def test_new_tokens_behind_a_cache_need_positions() -> None:
    model = tiny_model(1)
    cache = model(text(1, 9, 2), use_cache=True).past_key_values
    for rest in ([20, 21], [GMASK], [BOS, GMASK, 20]):  # none of them starts a text
        with pytest.raises(ValueError, match="Give position_ids with past_key_values"):
            model(torch.tensor([rest]), past_key_values=cache)


@torch.no_grad()
def test_an_answer_that_quotes_the_marks_stays_an_answer() -> None:
    """Several tokens behind a cache, as candidates of a draft: the second `[gMASK] <sop>` begins no context."""
    model, ids = tiny_model(1), torch.tensor([[*prompt(1, 9), 20, GMASK, BOS, 21, 22]])
    cache = model(ids[:, :9], use_cache=True).past_key_values
    positions = model.get_position_ids(ids)[..., 9:]
    rest = model(ids[:, 9:], past_key_values=cache, position_ids=positions).logits
    assert_same(rest, model(ids).logits[:, 9:])


@every_model
def test_the_inputs_of_a_step_have_one_cache(version: int) -> None:
    model, ids, cache = tiny_model(version), text(version, 9, 2), DynamicCache()
    for name in compat.CACHE_NAMES:
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **{name: cache})
        assert inputs["past_key_values"] is cache and "cache" not in inputs
