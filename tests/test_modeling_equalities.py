"""All ways of running a network give the same results, on random tiny models of all generations."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

from chatglm.network import compat
from conftest import enable_checkpointing
from tiny_networks import (
    PAD,
    TOLERANCE,
    VERSIONS,
    assert_same,
    every_dtype,
    every_model,
    prompt,
    static_cache,
    text,
    tiny_model,
    with_and_without_prefix,
)

# ---- caches --------------------------------------------------------------------------------------------------------


@every_model
@every_dtype
@with_and_without_prefix
@torch.no_grad()
def test_token_by_token_is_the_whole(version: int, dtype: torch.dtype, prefix: dict[str, Any]) -> None:
    model, ids = tiny_model(version, dtype, **prefix), text(version, 9, 6)
    whole = model(ids).logits
    output = model(ids[:, :9], use_cache=True)  # generation 1's context sees itself both ways, so it goes in at once
    steps = [output.logits[:, -1]]
    for step in range(9, 14):
        options = (
            {"position_ids": model.transformer.get_position_ids(ids)[..., step : step + 1]} if version == 1 else {}
        )
        output = model(ids[:, step : step + 1], past_key_values=output.past_key_values, **options)
        steps.append(output.logits[:, -1])
    assert_same(torch.stack(steps, 1), whole[:, 8:14])


@every_model
@every_dtype
@with_and_without_prefix
@torch.no_grad()
def test_greedy_with_every_cache(version: int, dtype: torch.dtype, prefix: dict[str, Any]) -> None:
    """No cache, dynamic and static: the same raw logits at every step, so far as bf16 chooses the same ids."""
    model = tiny_model(version, dtype, **prefix)
    inputs, mask = padded_batch(version)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    reference = model.generate(inputs, use_cache=False, **options)
    for cache in ({}, {"cache_implementation": "static"}):
        output = model.generate(inputs, **cache, **options)
        if dtype == torch.float32:
            assert torch.equal(output.sequences, reference.sequences)
            for ours, theirs in zip(output.logits, reference.logits, strict=True):
                assert_same(ours, theirs)
        else:
            assert_same(output.logits[0], reference.logits[0], TOLERANCE[dtype])


@every_model
@every_dtype
@with_and_without_prefix
@torch.no_grad()
def test_a_static_cache_is_a_dynamic_one(version: int, dtype: torch.dtype, prefix: dict[str, Any]) -> None:
    model, ids = tiny_model(version, dtype, **prefix), text(version, 9, 1)
    dynamic, static = DynamicCache(config=model.config), static_cache(model, 32)
    for cache_ids in (ids[:, :9], ids[:, 9:]):
        options = {}
        if (
            version == 1 and cache_ids.shape[1] == 1
        ):  # <sop> is at 8, [gMASK] at 7: the next token is the block's second
            options["position_ids"] = torch.tensor([[[7], [2]]])
        assert_same(
            model(cache_ids, past_key_values=static, **options).logits,
            model(cache_ids, past_key_values=dynamic, **options).logits,
        )


@every_model
@torch.no_grad()
def test_a_cache_is_filled_where_it_was_given(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 0)
    cache = DynamicCache(config=model.config)
    output = model(ids, past_key_values=cache)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 9
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("version", (2, 3))
@every_dtype
@with_and_without_prefix
@torch.no_grad()
def test_two_parts_are_the_whole(version: int, dtype: torch.dtype, prefix: dict[str, Any]) -> None:
    """A prompt that continues a cache by several tokens: what reuse between turns rests on (v2, v3)."""
    model, ids = tiny_model(version, dtype, **prefix), text(version, 9, 6)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    assert_same(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])
    cropped = model(ids, use_cache=True).past_key_values
    cropped.crop(-6)
    assert_same(model(ids[:, 9:], past_key_values=cropped).logits, model(ids).logits[:, 9:])


# ---- batches -------------------------------------------------------------------------------------------------------


def padded_batch(version: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, padded on the left: ids and 2-D mask."""
    prompts = [prompt(version, length, length) for length in (5, 11, 8)]
    pad = PAD if version == 1 else 0
    ids = torch.tensor([[pad] * (11 - len(tokens)) + tokens for tokens in prompts])
    return ids, torch.tensor([[0] * (11 - len(tokens)) + [1] * len(tokens) for tokens in prompts])


@every_model
@every_dtype
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@with_and_without_prefix
@torch.no_grad()
def test_a_batch_is_its_rows(version: int, dtype: torch.dtype, attention: str, prefix: dict[str, Any]) -> None:
    model = tiny_model(version, dtype, attention, **prefix)
    ids, mask = padded_batch(version)
    batched = model(ids, attention_mask=mask).logits
    assert torch.isfinite(batched).all()
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
        assert_same(batched[row, mask[row].bool()], alone)


@every_model
@torch.no_grad()
def test_a_generated_batch_is_its_rows(version: int) -> None:
    model = tiny_model(version)
    ids, mask = padded_batch(version)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batched = model.generate(ids, attention_mask=mask, **options)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **options)
        assert batched[row, -8:].tolist() == alone[0, -8:].tolist()


@every_model
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(version: int) -> None:
    model = tiny_model(version)
    ids = text(version, 9, 4)
    padded = torch.nn.functional.pad(ids, (0, 3), value=PAD if version == 1 else 0)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    whole = model(ids).logits
    assert_same(model(padded, attention_mask=mask).logits[:, :13], whole)
    assert_same(model(padded).logits[:, :13], whole)


# ---- attention, compile, checkpointing -----------------------------------------------------------------------------


@every_model
@every_dtype
@torch.no_grad()
def test_sdpa_is_eager(version: int, dtype: torch.dtype) -> None:
    eager, sdpa = tiny_model(version, dtype, "eager"), tiny_model(version, dtype, "sdpa")
    ids, mask = padded_batch(version)
    assert_same(sdpa(ids, attention_mask=mask).logits[mask.bool()], eager(ids, attention_mask=mask).logits[mask.bool()])
    single = text(version, 9, 5)
    assert_same(sdpa(single).logits, eager(single).logits)


@every_model
@torch.no_grad()
def test_an_attention_can_be_chosen_later(version: int) -> None:
    model, ids = tiny_model(version, attention="sdpa"), text(version, 9, 5)
    before = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True)
    assert len(output.attentions) == 3
    assert_same(output.logits, before)


@every_model
@torch.no_grad()
def test_compiled_is_eager(version: int) -> None:
    """The whole forward in one graph; the code generator itself is not ours to test, so none runs here."""
    model, ids = tiny_model(version), text(version, 9, 5)
    mask, positions = torch.ones_like(ids), None
    options: dict[str, Any] = {"attention_mask": mask}
    if version == 1:
        context = 8
        hidden = torch.ones(14, 14, dtype=torch.bool).triu(1)
        hidden[:, :context] = False
        positions = torch.tensor([[[*range(8), *[7] * 6], [*[0] * 8, *range(1, 7)]]])
        options = {"attention_mask": hidden[None, None], "position_ids": positions}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(ids, **options).logits, model(ids, **options).logits)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
@every_model
@torch.no_grad()
def test_compiled_to_machine_code_is_eager(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 5)
    torch._dynamo.reset()
    assert_same(torch.compile(model)(ids).logits, model(ids).logits)
    torch._dynamo.reset()


@every_model
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@with_and_without_prefix
def test_checkpointing_is_plain(version: int, reentrant: bool, prefix: dict[str, Any]) -> None:
    """The same loss and gradients; with a prefix also where nothing but the prefix is trained."""
    ids = text(version, 9, 5)
    labels = ids.clone()
    labels[:, :9] = -100

    def gradients(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = tiny_model(version, **prefix)
        model.train()
        if prefix:
            model.transformer.prefix_encoder.eval()  # its dropout differs from run to run
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        return loss, {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    (plain_loss, plain), (loss, ours) = gradients(False), gradients(True)
    assert_same(loss, plain_loss)
    assert ours.keys() == plain.keys() and plain
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert_same(ours[name], gradient, 1e-4)


# ---- copies --------------------------------------------------------------------------------------------------------


@every_model
@with_and_without_prefix
@torch.no_grad()
def test_copies_and_pickles(version: int, prefix: dict[str, Any]) -> None:
    model, ids = tiny_model(version, **prefix), text(version, 9, 4)
    reference = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other(ids).logits, reference, 1e-6)


@every_model
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@with_and_without_prefix
@torch.no_grad()
def test_saved_and_loaded(version: int, tied: bool, prefix: dict[str, Any], tmp_path: Path) -> None:
    model, ids = tiny_model(version, tie_word_embeddings=tied, **prefix), text(version, 9, 4)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.to_dict() | {"dtype": None, "_name_or_path": ""} == model.config.to_dict() | {
        "dtype": None,
        "_name_or_path": "",
        "architectures": ["ChatGLMModel"],
    }
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert_same(loaded(ids).logits, model(ids).logits, 1e-6)


@every_model
@torch.no_grad()
def test_saved_in_shards(version: int, tmp_path: Path) -> None:
    model, ids = tiny_model(version), text(version, 9, 4)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(type(model).from_pretrained(tmp_path, dtype=torch.float32)(ids).logits, model(ids).logits, 1e-6)


@every_model
@torch.no_grad()
def test_a_device_map(version: int, tmp_path: Path) -> None:
    """accelerate's maps: all on the CPU, and the last layer fetched from the disk when it is needed."""
    model, ids = tiny_model(version), text(version, 9, 4)
    model.save_pretrained(tmp_path / "model")
    reference = model(ids).logits
    for device_map in ("cpu", "auto"):
        loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32, device_map=device_map)
        assert_same(loaded(ids).logits, reference)
    base = model.base_model_prefix
    layers = f"{base}.layers" if version == 1 else f"{base}.encoder.layers"
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    modules = {name.rsplit(".", 1)[0] for name, _ in tensors if not name.startswith(f"{layers}.")}
    offloaded = dict.fromkeys([*modules, f"{layers}.0", f"{layers}.1"], "cpu") | {f"{layers}.2": "disk"}
    loaded = type(model).from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=offloaded, offload_folder=tmp_path / "offload"
    )
    assert_same(loaded(ids).logits, reference)


@every_model
@torch.no_grad()
def test_resized_embeddings(version: int) -> None:
    model, ids = tiny_model(version), text(version, 9, 4)
    before = model(ids).logits
    model.resize_token_embeddings(130, mean_resizing=False)
    after = model(ids).logits
    assert after.shape[-1] == 130
    assert model.config.vocab_size == 130
    assert_same(after[..., :120], before)


@every_model
def test_training_goes_down(version: int) -> None:
    model, ids = tiny_model(version).train(), text(version, 9, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


# ---- generate() ----------------------------------------------------------------------------------------------------


class WordTokenizer:
    """The minimal tokenizer that stop_strings needs, which measures what "abcdef" adds in front of a token."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def _convert_id_to_token(self, token_id: int) -> str:
        return "abcdef"

    def get_vocab(self) -> dict[str, int]:
        return {f"w{number}_": number for number in range(120)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


@every_model
@torch.no_grad()
def test_what_generate_offers(version: int) -> None:
    model = tiny_model(version)
    ids = torch.tensor([prompt(version, 9)])
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert greedy.shape == (1, 17)
    beams = model.generate(
        ids, max_new_tokens=8, num_beams=4, num_return_sequences=2, do_sample=False, eos_token_id=None
    )
    assert beams.shape == (2, 17)
    assert sequence_score(model, beams[0]) >= sequence_score(model, greedy[0]) - 1e-4
    single = model.generate(ids, max_new_tokens=8, no_repeat_ngram_size=1, do_sample=False, eos_token_id=None)
    assert len(set(single[0, 9:].tolist())) == 8
    penalised = model.generate(ids, max_new_tokens=8, repetition_penalty=1e6, do_sample=False, eos_token_id=None)
    assert len(set(penalised[0, 9:].tolist())) == 8
    third = greedy[0, 11].item()
    stop = model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, stop_strings=f"w{third}_", tokenizer=WordTokenizer()
    )
    assert stop.tolist() == [greedy[0, : 9 + greedy[0, 9:].tolist().index(third) + 1].tolist()]
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9, temperature=2.0, eos_token_id=None)
    torch.manual_seed(0)
    again = model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9, temperature=2.0, eos_token_id=None)
    assert torch.equal(sampled, again)


def sequence_score(model: Any, sequence: torch.Tensor, prompt_length: int = 9) -> float:
    scores = model(sequence[None]).logits[0, prompt_length - 1 : -1].log_softmax(-1)
    return scores.gather(1, sequence[prompt_length:, None]).sum().item()


@every_model
@torch.no_grad()
def test_generate_keeps_only_the_last_logits(version: int) -> None:
    """The head runs on one position per row, whatever the length of the prompt."""
    model = tiny_model(version)
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    model.generate(torch.tensor([prompt(version, 9)]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert widths == [1, 1, 1]


@every_model
@torch.no_grad()
def test_generate_continues_a_cache(version: int) -> None:
    model, ids = tiny_model(version), torch.tensor([prompt(version, 9)])
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=8, **options).sequences
    first = model.generate(ids, max_new_tokens=4, **options)
    for name in compat.CACHE_NAMES:
        cache = copy.deepcopy(compat.cache_of(first))
        rest = model.generate(first.sequences, max_new_tokens=4, **{name: cache}, **options)
        assert torch.equal(rest.sequences, whole)


@every_model
@torch.no_grad()
def test_a_stopping_criterion(version: int) -> None:
    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    ids = torch.tensor([prompt(version, 9)])
    output = tiny_model(version).generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, stopping_criteria=[After()]
    )
    assert output.shape[1] == 12


@pytest.mark.parametrize("version", (2, 3))
@torch.no_grad()
def test_generate_from_embeddings(version: int) -> None:
    model, ids = tiny_model(version), torch.tensor([prompt(version, 9)])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    output = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert output.tolist() == model.generate(ids, **options)[:, 9:].tolist()


@pytest.mark.parametrize("version", (2, 3))
@torch.no_grad()
def test_assisted_generation(version: int) -> None:
    """A draft model changes the speed, not the text (v2, v3: several tokens on top of a cache)."""
    model, draft = tiny_model(version), tiny_model(5 - version)
    ids = torch.tensor([prompt(version, 9)])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), model.generate(ids, **options))


def test_nothing_stays_behind() -> None:
    """A model is freed as soon as nobody holds it: no cycles through caches, hooks or globals."""
    for version in VERSIONS:
        model = tiny_model(version)
        model(text(version, 9, 4))
        dead = weakref.ref(model)
        del model
        gc.collect()
        assert dead() is None
