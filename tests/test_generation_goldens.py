"""`generate()` of our networks against the results of the original code, case by case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from chatglm.generation import GenerationOptions, InvalidScoreLogitsProcessor
from conftest import needs_shared
from deviations import DEVIATIONS
from goldens import (
    BEAMS,
    ENDED,
    ENDED_BEAMS,
    ENDED_IN_BATCH,
    GREEDY,
    SETS,
    TUNED,
    UNCACHED,
    VERSIONS,
    assert_relative,
    case,
    generate_cases,
    golden_model,
    model_of,
    pad_left,
    read_json,
    read_part,
    read_tensors,
    sets_of,
    tokenizer_inputs_v1,
)

NEW_TOKENS = 24  # every golden generate() case
INVALID = {version: InvalidScoreLogitsProcessor(198 if version == 4 else 5) for version in VERSIONS}
every_set = pytest.mark.parametrize(
    ("version", "folder"), [(version, folder) for version in VERSIONS for folder in sets_of(version)]
)
#: Cases in which another hypothesis wins than in transformers 4.30.
OTHER_BEAMS = {
    (1, "model", "eos_override_beam3"),
    (1, "model", "eos_override_beam3_early"),
    (1, "ptuning_noproj", "eos_override_beam3_lp"),
    (1, "ptuning_proj", "eos_override_beam3"),
    (1, "ptuning_proj", "eos_override_beam3_early"),
    (1, "ptuning_proj", "eos_override_beam3_lp"),
    (2, "ptuning_noproj", "eos_override_beam3"),
    (2, "ptuning_noproj", "eos_override_beam3_early"),
    (3, "model", "eos_override_beam3"),
    (3, "model", "eos_override_beam3_early"),
    (3, "ptuning_noproj", "eos_override_beam3"),
    (3, "ptuning_noproj", "eos_override_beam3_early"),
    (3, "ptuning_noproj", "eos_override_beam3_lp"),
    (3, "ptuning_proj", "eos_override_beam3"),
    (3, "ptuning_proj", "eos_override_beam3_early"),
}


def prompt_inputs(version: int, config: Any, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments that belong to a golden generate() case."""
    prompts = entry.get("prompts") or [entry["prompt"]]
    if version == 1 and entry["mode"] == "tokenizer_mask":
        inputs = tokenizer_inputs_v1(prompts, config)
        assert inputs["input_ids"].tolist() == entry.get("input_ids", prompts)
        return inputs
    input_ids = pad_left(prompts, config.pad_token_id)
    assert input_ids.tolist() == entry.get("input_ids", prompts)
    if version == 1:
        assert DEVIATIONS["ids_alone_are_read_as_padded"]
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if "attention_mask" in entry:
        return {name: torch.tensor(entry[name]) for name in ("input_ids", "attention_mask", "position_ids")}
    return {"input_ids": input_ids}


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options)


def test_the_inputs_of_generation_1_are_its_tokenizer_s() -> None:
    golden = case("v1/forward", "inc_tok_batch")
    prompts = [[token for token in row if token != 3] for row in golden["input_ids"].tolist()]
    for name, tensor in tokenizer_inputs_v1(prompts, model_of(1).config).items():
        assert torch.equal(tensor, golden[name]), name


@every_set
def test_greedy(version: int, folder: str) -> None:
    model = model_of(version, folder)
    for entry in generate_cases(version, folder, *GREEDY):
        inputs = prompt_inputs(version, model.config, entry)
        if entry["kind"] == "greedy_batch_no_position_ids":
            # The original counts pads as positions then; ours does it when told to (with a prefix it changes the text).
            assert DEVIATIONS["pads_take_no_positions"]
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        output = run(model, inputs)
        assert output.sequences.tolist() == entry["sequences"], entry["kind"]


@pytest.mark.parametrize("folder", SETS)
@pytest.mark.parametrize("version", TUNED)  # GLM-4's pad token also ends answers, so pads cannot be told from ids
def test_greedy_from_padded_ids_alone(version: int, folder: str) -> None:
    """A batch without mask and positions is read as padded: the same text as with both."""
    model = model_of(version, folder)
    *_, with_both = generate_cases(version, folder, "greedy_batch")
    assert version > 1 or with_both["mode"] == "tokenizer_mask"
    assert DEVIATIONS["pads_take_no_positions"] and DEVIATIONS["ids_alone_are_read_as_padded"]
    output = run(model, {"input_ids": torch.tensor(with_both["input_ids"])})
    assert output.sequences.tolist() == with_both["sequences"]


@every_set
def test_beams(version: int, folder: str) -> None:
    model = model_of(version, folder)
    for entry in generate_cases(version, folder, *BEAMS):
        inputs = prompt_inputs(version, model.config, entry)
        output = run(model, inputs, num_beams=3, output_scores=True)
        assert output.sequences.tolist() == entry["sequences"], entry["kind"]
        assert DEVIATIONS["beam_scores_count_generated_tokens"]
        total_length = NEW_TOKENS  # transformers 4.42, with which GLM-4's were made, counts as today's
        if version < 4:
            total_length = entry.get("length_in_score", len(entry["sequences"][0]))
            assert total_length == len(entry["sequences"][0])
        for ours, theirs in zip(output.sequences_scores.tolist(), entry["sequences_scores"], strict=True):
            assert_relative(ours * NEW_TOKENS, theirs * total_length)


@every_set
def test_an_eos_of_the_caller_stops(version: int, folder: str) -> None:
    model = model_of(version, folder)
    for entry in generate_cases(version, folder, *ENDED):
        output = run(model, {"input_ids": torch.tensor([entry["prompt"]])}, eos_token_id=entry["eos_token_id"])
        assert output.sequences.tolist() == entry["sequences"], entry["kind"]


@needs_shared
def test_cases_of_glm4_only() -> None:
    model = model_of(4)
    for entry in generate_cases(4, "model", UNCACHED):
        output = run(model, {"input_ids": torch.tensor([entry["prompt"]])}, use_cache=False)
        assert output.sequences.tolist() == entry["sequences"]
    for entry in generate_cases(4, "model", ENDED_IN_BATCH):
        ids = pad_left(entry["prompts"], 300)
        inputs = {"input_ids": ids, "attention_mask": (ids != 300).long()}
        output = run(model, inputs, eos_token_id=entry["eos_token_id"])
        assert output.sequences.tolist() == entry["sequences"]


def log_probability(model: Any, prompt: list[int], sequence: list[int], eos: int) -> tuple[float, int, bool]:
    """Of what was generated after the prompt, up to an eos; the number of these tokens; whether an eos ended them."""
    generated = sequence[len(prompt) :]
    ended = eos in generated
    if ended:
        generated = generated[: generated.index(eos) + 1]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
    total = logits.log_softmax(-1).gather(1, torch.tensor(generated)[:, None]).sum().item()
    return total, len(generated), ended


@pytest.mark.parametrize("folder", SETS)
@pytest.mark.parametrize("version", TUNED)
def test_beams_that_may_stop(version: int, folder: str) -> None:
    """Where hypotheses of different lengths compete, another may win; each has the score that is its own.

    The originals' are divided by the length with the prompt and without the eos, ours by the generated tokens.
    """
    model = model_of(version, folder)
    for entry in generate_cases(version, folder, *ENDED_BEAMS):
        kind, eos, prompt = entry["kind"], entry["eos_token_id"], entry["prompt"]
        penalty = ENDED_BEAMS[kind].get("length_penalty", 1.0)
        options = {"num_beams": 3, "output_scores": True, "eos_token_id": eos, **ENDED_BEAMS[kind]}
        output = run(model, {"input_ids": torch.tensor([prompt])}, **options)
        assert len(output.sequences) == len(entry["sequences"])
        for sequence, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
            total, length, _ = log_probability(model, prompt, sequence, eos)
            assert_relative(score, total / length**penalty)
        for sequence, score in zip(entry["sequences"], entry["sequences_scores"], strict=True):
            total, length, ended = log_probability(model, prompt, sequence, eos)
            assert_relative(total / (len(prompt) + length - ended) ** penalty, score)
        assert DEVIATIONS["beam_scores_count_generated_tokens"]
        same = output.sequences.tolist() == entry["sequences"]
        assert same == ((version, folder, kind) not in OTHER_BEAMS), kind


@pytest.mark.parametrize("version", VERSIONS)
def test_lengths(version: int) -> None:
    """max_length counts the prompt, max_new_tokens does not and wins."""
    golden, model = read_json(f"v{version}/generate.json")["stream_generate"], model_of(version)
    inputs, whole = {"input_ids": torch.tensor([golden["prompt"]])}, golden["greedy12"]
    length = len(golden["prompt"])
    longer = model.generate(**inputs, do_sample=False, max_length=length + 6)
    assert longer[0].tolist() == whole[: length + 6]
    counted = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert counted[0].tolist() == whole[: length + 4]
    for new, name in ((1, "first"), (3, "third")):
        eos = golden["eos_values"][name]
        stopped = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=eos)
        assert stopped[0].tolist() == whole[: length + new] and whole[length + new - 1] == eos


@needs_shared
@pytest.mark.parametrize("version", VERSIONS)
def test_generate_without_room(version: int) -> None:
    golden, model = read_json(f"v{version}/generate.json")["stream_generate"], model_of(version)
    inputs, length = {"input_ids": torch.tensor([golden["prompt"]])}, len(golden["prompt"])
    assert golden["generate:eos_first"]["ok"] == [golden["greedy12"][: length + 1]]  # as in test_lengths
    assert DEVIATIONS["a_prompt_without_room_is_an_error"]
    for name, limit in (("generate:max_length=n", length), ("generate:max_length=n-3", length - 3)):
        if version == 4:  # its transformers refuses as today's does
            assert golden["generate:max_length=n"]["error"] == "ValueError"
        else:
            assert golden[name]["ok"] == [golden["greedy12"][: length + 1]]
        with pytest.raises(ValueError, match=rf"input_ids is {length}, but `max_length` is set to {limit}"):
            model.generate(**inputs, do_sample=False, max_length=limit)


def scores_of(version: int, number: int, processors: list[LogitsProcessor]) -> torch.Tensor:
    """The scores that generate() makes of the golden logits, with the parameters of processor case `number`."""
    kwargs = read_part(f"v{version}/generate.json", "processors")[f"case{number}"]["kwargs"]
    golden = read_tensors(f"v{version}/generate.safetensors")
    model = golden_model(version)
    model.get_output_embeddings().register_forward_hook(lambda *args: golden["processors.logits"][:, None].clone())
    input_ids = golden["processors.input_ids"]
    options = {"top_k": 50, **kwargs} if kwargs["do_sample"] else kwargs  # 50 was the default of transformers 4.30
    output = run(
        model,
        {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)},
        **{"max_new_tokens": kwargs.get("min_new_tokens", 1), "output_scores": True, **options},
        logits_processor=processors,
    )
    return output.scores[0]


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("version", VERSIONS)
def test_processed_scores(version: int, number: int) -> None:
    """With the originals' InvalidScoreLogitsProcessor at its place, every case is theirs."""
    scores = scores_of(version, number, [INVALID[version]])
    golden = read_tensors(f"v{version}/generate.safetensors")
    expected = golden[f"processors.case{number}.scores"]
    if not read_part(f"v{version}/generate.json", "processors")[f"case{number}"]["kwargs"]["do_sample"]:
        assert DEVIATIONS["greedy_ignores_warpers"]
        expected = golden[f"processors.case{number}.after_processors"]
    assert torch.equal(torch.isfinite(scores), torch.isfinite(expected))
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("version", VERSIONS)
def test_processed_scores_without_the_invalid_score_processor(version: int, number: int) -> None:
    """generate() does not add it: what the caller forbids is forbidden, and token 5 is not forced."""
    scores = scores_of(version, number, [])
    entry = read_part(f"v{version}/generate.json", "processors")[f"case{number}"]
    if "Invalid fires" not in entry["name"]:
        torch.testing.assert_close(scores, scores_of(version, number, [INVALID[version]]))
        return
    assert DEVIATIONS["minus_infinity_is_a_valid_score"]
    golden, kwargs = read_tensors(f"v{version}/generate.safetensors"), entry["kwargs"]
    forbidden = kwargs["bad_words_ids"][0] if "bad_words_ids" in kwargs else model_of(version).config.eos_token_id
    expected, input_ids = golden["processors.logits"].clone(), golden["processors.input_ids"]
    expected[:, forbidden] = -float("inf")
    for warp in (
        TemperatureLogitsWarper(kwargs["temperature"]),
        TopKLogitsWarper(50),
        TopPLogitsWarper(kwargs["top_p"]),
    ):
        expected = warp(input_ids, expected)
    torch.testing.assert_close(scores, expected)
    assert (torch.isfinite(scores).sum(-1) > 1).all()


@needs_shared
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("version", VERSIONS)
def test_the_chain_of_our_own_loop(version: int, number: int) -> None:
    """chat and stream_generate build the same chain as generate(): class by class and number by number."""
    entry = read_json(f"v{version}/generate.json")["processors"][f"case{number}"]
    golden = read_tensors(f"v{version}/generate.safetensors")
    eos, input_ids = model_of(version).config.eos_token_id, golden["processors.input_ids"]
    options = GenerationOptions(**entry["kwargs"], eos_token_id=eos, logits_processor=[INVALID[version]])
    chain = options.processors(input_ids.shape[1], input_ids.device)
    warpers = entry["warpers"]
    if not entry["kwargs"]["do_sample"]:
        assert DEVIATIONS["greedy_ignores_warpers"] and warpers == ([] if version == 4 else ["TopKLogitsWarper"])
        warpers = []
    assert [type(one).__name__ for one in chain] == [*entry["processors"], *warpers]
    scores = golden["processors.logits"].clone()
    for index, one in enumerate(chain):
        if index == len(entry["processors"]):
            torch.testing.assert_close(scores, golden[f"processors.case{number}.after_processors"])
        scores = one(input_ids, scores)
    torch.testing.assert_close(scores, golden[f"processors.case{number}.{'scores' if warpers else 'after_processors'}"])
    if warpers:
        assert torch.isfinite(scores).sum() == entry["finite"]


@needs_shared
@pytest.mark.parametrize("version", VERSIONS)
def test_no_processor_is_forgotten(version: int) -> None:
    names = {*(f"case{number}" for number in range(8)), *(f"invalid{number}" for number in range(3))}
    assert set(read_json(f"v{version}/generate.json")["processors"]) == names


@needs_shared
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("version", VERSIONS)
def test_invalid_scores(version: int, number: int) -> None:
    """One bad score anywhere in the batch, and the processor forces token 5 in every row."""
    entry = read_json(f"v{version}/generate.json")["processors"][f"invalid{number}"]
    golden = read_tensors(f"v{version}/generate.safetensors")
    scores = golden["processors.logits"].clone()
    scores[0, 7] = float(entry["bad"])
    given = scores.clone()
    processed = INVALID[version](golden["processors.input_ids"], given)
    assert torch.equal(processed, golden[f"processors.invalid{number}"])
    assert processed.argmax(-1).tolist() == entry["argmax"]
    assert entry["same_storage"] and DEVIATIONS["arguments_are_left_alone"]
    torch.testing.assert_close(given, scores, rtol=0, atol=0, equal_nan=True)
