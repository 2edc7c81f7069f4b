"""Our networks against the results of the original code, case by case."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LogitsProcessor

from chatglm.classifiers import ChatGLM2ForSequenceClassification
from chatglm.configuration_chatglm import ChatGLM1Config
from chatglm.modeling_chatglm import RESIDUAL_SCALE, ChatGLM1Model, rotary_angles
from conftest import needs_shared
from deviations import DEVIATIONS
from goldens import (
    BEAMS,
    DATA,
    ENDED,
    ENDED_BEAMS,
    ENDED_IN_BATCH,
    GRADIENT_NOISE,
    GREEDY,
    NOISE,
    PTUNING,
    TUNED,
    UNCACHED,
    VERSIONS,
    Case,
    assert_close_to_scale,
    assert_relative,
    build_model,
    case,
    find,
    generate_cases,
    golden_model,
    model_of,
    read_json,
    read_tensors,
    recipe_state,
    sets_of,
    tokenizer_inputs_v1,
    variant_model,
)

LATER = (2, 3, 4)  # the generations whose network is ChatGLM2's
ATTENTION = ("sdpa", "eager")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORWARD = {
    1: [
        "gmask_tok",
        "gmask_ids_only",
        "mask_tok",
        "mask_ids_only",
        "both_tok",
        "both_ids_only",
        "single",
        "train_right_pad",
        "inc_ids_only_b1",
        "inc_ids_only_batch",
        "inc_tok_batch",
        "inc_mask_tok_batch",
        "built",
    ],
    2: [
        "padded",
        "padded_no_pos",
        "padded_no_mask",
        "unpadded_no_mask",
        "unpadded_ones_mask",
        "train_right_pad",
        "return_last_logit",
        "inc_b1",
        "inc_batch",
        "continuation",
        "built",
        "rotary",
    ],
}
FORWARD[3] = FORWARD[2]
FORWARD[4] = [*FORWARD[2], "padded_no_mask", "single", "long", "long_positions"]
VARIANTS_V1 = ["untied", "pos1d_gmask", "pos1d_mask"]
VARIANTS: dict[int, list[str]] = {4: ["groups4_rope10000", "rope_ratio1", "no_final_ln"]}
VARIANTS[2] = VARIANTS[3] = [
    "post_ln_residual",
    "layernorm",
    "no_final_ln",
    "mha_bias",
    "no_qkv_bias",
    "no_qk_scaling",
    "fp32_residual",
    "rope_ratio2",
    "rope_ratio50",
]
HALVES = ("fp16", "bf16")
LOWP_V1 = ("gmask_tok", "inv_freq")
GRADIENTS = [
    (1, "gmask_tok"),
    (1, "mask_ids_only"),
    (1, "untied_gmask_ids_only"),
    *((version, name) for version in LATER for name in ("padded", "unpadded_no_mask")),
]
PTUNING_FORWARD = {
    1: ("gmask_tok", "mask_ids_only"),
    2: ("padded", "unpadded_no_mask"),
    3: ("padded", "unpadded_no_mask"),
}
#: What edge.json holds, for the tests of odd inputs; one of the two belongs to stream_generate.
EDGES = {
    1: {
        "no_bos",
        "no_mask_token",
        "generate_no_bos",
        "generate_no_mask",
        "generate_batch_mixed_gmask_mask",
        "int_attention_mask_to_forward",
        "longer_than_max_sequence_length",
        "two_bos",
        "use_cache_false_generate",
        "use_cache_true_generate",
        "use_cache_default_of_config_class",
        "num_beams2_do_sample_ok",
        "num_return_sequences2_beam3",
        "alpha",
        "alpha_note",
    },
    2: {
        "longer_than_seq_length_no_pos",
        "longer_than_seq_length_pos",
        "inputs_embeds_only",
        "use_cache_true_generate",
        "use_cache_false_generate",
        "use_cache_note",
        "output_attentions",
        "num_return_sequences2_beam3",
        "all_pad_row",
        "right_padding_mask",
        "eos_none_stream_generate",  # in test_chat_goldens.py
    },
}


def one_pass(version: int) -> list[str]:
    return [
        name for name in FORWARD[version] if not name.startswith(("inc_", "continuation", "built", "rotary", "return"))
    ]


@pytest.mark.parametrize("version", VERSIONS)
@needs_shared
def test_no_case_is_forgotten(version: int) -> None:
    """What a golden file holds is what the tests below go through; names with _ in front are remarks."""

    def present(file: str) -> set[str]:
        tensors = {key.split(".")[0] for key in read_tensors(f"v{version}/{file}.safetensors")}
        return tensors | {key.split(".")[0] for key in read_json(f"v{version}/{file}.json") if key[0] != "_"}

    assert present("forward") == set(FORWARD[version])
    if version == 1:
        assert present("variants") == {*VARIANTS_V1, "pos1d_generate", "inputs_embeds_only"}
        assert present("lowp") == {"rotary", *(f"{dtype}_{what}" for dtype in HALVES for what in LOWP_V1)}
    else:
        others = {"fp32_residual_half", "classifier"} if version < 4 else set()
        assert present("variants") == {*VARIANTS[version], *others}
        assert present("lowp") == {"rotary", *HALVES}
    assert present("grads") == {name for v, name in GRADIENTS if v == version}
    for folder in PTUNING if version in TUNED else ():
        names = {*PTUNING_FORWARD[version], *incremental(version), "get_prompt", "grads", "generate"}
        assert present(f"{folder}/golden") == names
    kinds = {entry["kind"] for folder in sets_of(version) for entry in generate_cases(version, folder)}
    if version == 4:
        assert kinds == {*GREEDY[:2], UNCACHED, BEAMS[0], BEAMS[1], *ENDED, ENDED_IN_BATCH}
    else:
        assert kinds == {*GREEDY, *BEAMS, *ENDED, *ENDED_BEAMS} - ({GREEDY[2], ENDED[1]} if version == 1 else set())
    assert present("generate") == {"cases", "stream_generate", "processors"}
    wanted = EDGES[min(version, 2)] - ({"use_cache_note", "eos_none_stream_generate"} if version == 4 else set())
    assert set(read_json(f"v{version}/edge.json")) == wanted


def is_part(part: Any, whole: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and is_part(value, whole[key]) for key, value in part.items())
    return part == whole


@needs_shared
def test_the_goldens_of_the_repository_are_the_shared_ones() -> None:
    files = [path for path in sorted(DATA.rglob("*")) if path.is_file()]
    assert len(files) == 10
    for path in files:
        shared = find(path.relative_to(DATA).as_posix())
        assert not shared.is_relative_to(DATA)
        if path.suffix == ".safetensors":
            theirs = load_file(shared)
            for key, value in load_file(path).items():
                assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
        else:
            ours, whole = (json.loads(one.read_text(encoding="utf-8")) for one in (path, shared))
            assert is_part(ours, whole) and (path.name != "config.json" or ours == whole), path


# ---- one pass ------------------------------------------------------------------------------------------------------


def rows_to_compare(golden: Case, model: Any) -> torch.Tensor:
    """Bool (batch, tokens): the real ones; all where there is a prefix, which pads see in the original as well."""
    rows = golden.real_rows(DEVIATIONS["pad_rows_are_not_fully_visible"])
    return rows if model.config.pre_seq_len is None else torch.ones_like(rows)


def check_pass(model: Any, golden: Case, version: int) -> None:
    """Logits, loss, hidden states, attentions and cache of one pass, whatever the case holds."""
    eager = model.config._attn_implementation == "eager"
    with torch.no_grad():
        output = model(
            **golden.inputs(),
            output_hidden_states=True,
            output_attentions=eager and "attentions.last" in golden,
            use_cache=True,
        )
    rows = rows_to_compare(golden, model)
    assert_close_to_scale(output.logits, golden["logits"], NOISE[version], rows)
    assert ("loss" in golden) == (golden.meta["loss"] is not None)
    if "loss" in golden:
        assert_relative(output.loss.item(), golden["loss"].item())
    states = [golden[name].transpose(0, 1) for name in sorted(golden.tensors) if name.startswith("hidden_states.")]
    if states:
        assert DEVIATIONS["hidden_states_are_batch_first"]
        assert len(output.hidden_states) == len(states)
        if version > 1:
            assert DEVIATIONS["hidden_states_end_after_the_final_norm"]
            states[-1] = model.transformer.encoder.final_layernorm(states[-1])
        for ours, theirs in zip(output.hidden_states, states, strict=True):
            assert_close_to_scale(ours, theirs, NOISE[version], rows)
    if "attentions.last" in golden and eager:
        ours = output.attentions[-1].flatten(0, 1)  # (batch * heads, queries, keys)
        heads = ours.shape[0] // rows.shape[0]
        assert_close_to_scale(ours, golden["attentions.last"], NOISE[version], rows.repeat_interleave(heads, 0))
    if "past_last.key" in golden:
        check_cache(output.past_key_values, golden, rows, NOISE[version])


def check_cache(cache: Any, golden: Case, rows: torch.Tensor, noise: float) -> None:
    layer, tokens = cache.layers[-1], rows.shape[1]
    for ours, field in ((layer.keys, "past_last.key"), (layer.values, "past_last.value")):
        theirs = golden[field].permute(1, 0, 2, 3)  # (batch, tokens, heads, head_dim)
        assert theirs.shape[1] == tokens or DEVIATIONS["the_prefix_is_not_in_the_cache"]
        assert_close_to_scale(ours.transpose(1, 2), theirs[:, -tokens:], noise, rows)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("version", "name"), [(version, name) for version in VERSIONS for name in one_pass(version)])
def test_forward(version: int, name: str, attention: str) -> None:
    check_pass(model_of(version, attention=attention), case(f"v{version}/forward", name), version)


@pytest.mark.parametrize("name", ["gmask_tok", "mask_tok"])
def test_a_plain_mask_is_the_tokenizer_s_mask(name: str) -> None:
    """Generation 1 with a 2-D mask and no positions gives what its tokenizer's 4-D mask and positions give."""
    golden = case("v1/forward", name)
    assert DEVIATIONS["plain_masks_are_accepted"]
    rows = ~golden["attention_mask"].all(-1)[:, 0]
    with torch.no_grad():
        output = model_of(1)(input_ids=golden["input_ids"], attention_mask=rows.long(), labels=golden["labels"])
    assert_close_to_scale(output.logits, golden["logits"], NOISE[1], rows)
    assert_relative(output.loss.item(), golden["loss"].item())


@pytest.mark.parametrize("name", ["gmask", "mask", "both"])
def test_masks_and_positions_that_the_original_builds(name: str) -> None:
    """Given as arguments, they change nothing: they are what generation 1 builds from the ids alone."""
    built, model = case("v1/forward", f"built.{name}"), model_of(1, attention="eager")
    assert torch.equal(model.positions_from(built["input_ids"], 0), built["position_ids"])
    with torch.no_grad():
        given = model(**built.inputs()).logits
        output = model(input_ids=built["input_ids"], output_attentions=True)
    assert torch.equal(given, output.logits)
    for weights in output.attentions:
        assert not (weights.bool() & built["attention_mask"]).any()


@pytest.mark.parametrize("version", LATER)
def test_masks_and_positions_that_later_generations_build(version: int) -> None:
    """Every token that the original hides has no weight, every other has one. Its built mask is for `padded`."""
    built, padded = case(f"v{version}/forward", "built"), case(f"v{version}/forward", "padded")
    model = model_of(version, attention="eager")
    rows = padded.real_rows(DEVIATIONS["pad_rows_are_not_fully_visible"])
    with torch.no_grad():
        attentions = model(padded["input_ids"], padded["attention_mask"], output_attentions=True).attentions
    hidden = built["full_attention_mask"][:, 0][rows]
    for weights in attentions:
        seen = weights.bool().transpose(1, 2)[rows]  # (rows, heads, keys)
        assert torch.equal(seen, ~hidden[:, None].expand_as(seen))
    assert torch.equal(
        model.positions_from(padded["input_ids"], 0).expand_as(padded["input_ids"]), built["position_ids"]
    )
    assert DEVIATIONS["pads_take_no_positions"]
    named = model.positions_from(padded["input_ids"], 0, padded["attention_mask"])
    assert torch.equal(named[rows], padded["position_ids"][rows])


@pytest.mark.parametrize("version", LATER)
def test_the_last_position_alone(version: int) -> None:
    golden = case(f"v{version}/forward", "return_last_logit")
    with torch.no_grad():
        for option in ({"logits_to_keep": 1}, {"return_last_logit": True}):
            logits = model_of(version)(**golden.inputs(), **option).logits
            assert_close_to_scale(logits, golden["logits"], NOISE[version])


@pytest.mark.parametrize("with_mask", [True, False], ids=["with_mask", "no_mask"])
@pytest.mark.parametrize("version", LATER)
def test_four_tokens_on_top_of_a_cache(version: int, with_mask: bool) -> None:
    golden = case(f"v{version}/forward", "continuation")
    for attention in ATTENTION:
        model, eager = model_of(version, attention=attention), attention == "eager"
        with torch.no_grad():
            cache = model(golden["prefix_ids"], use_cache=True).past_key_values
            mask = torch.ones(1, golden["prefix_ids"].shape[1] + 4, dtype=torch.long) if with_mask else None
            output = model(golden["input_ids"], past_key_values=cache, attention_mask=mask, output_attentions=eager)
        assert_close_to_scale(output.logits, golden[f"{'with' if with_mask else 'no'}_mask.logits"], NOISE[version])
        if eager:
            assert torch.equal(output.attentions[-1].bool()[:, :1], ~golden["mask_built"])


# ---- incremental decoding ------------------------------------------------------------------------------------------


class Forced(LogitsProcessor):
    """Makes generate() choose the given tokens, [batch, steps], one column per step."""

    def __init__(self, tokens: torch.Tensor, prompt_length: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        chosen = self.tokens[:, min(step, self.tokens.shape[1] - 1)]
        return torch.full_like(scores, -1e4).scatter(1, chosen[:, None], 0.0)


def incremental(version: int) -> list[str]:
    return ["inc_ids_only_b1", "inc_tok_batch"] if version == 1 else ["inc_b1", "inc_batch"]


INCREMENTAL = [
    *((version, "model", name) for version in VERSIONS for name in FORWARD[version] if name.startswith("inc_")),
    *((version, folder, name) for version in TUNED for folder in PTUNING for name in incremental(version)),
]


def incremental_case(version: int, folder: str, name: str) -> Case:
    return case(f"v{version}/forward" if folder == "model" else f"v{version}/{folder}/golden", name)


@pytest.mark.parametrize(("version", "folder", "name"), INCREMENTAL)
def test_step_by_step(version: int, folder: str, name: str) -> None:
    """A prompt, then forced tokens one at a time with the cache and the original's masks and positions."""
    golden, model = incremental_case(version, folder, name), model_of(version, folder)
    forced, inputs, rows = golden["forced_tokens"], golden.inputs(), rows_to_compare(golden, model)
    prefix = 0
    if folder != "model":
        assert DEVIATIONS["the_prefix_is_not_in_the_cache"]
        prefix = model.config.pre_seq_len
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        theirs = golden["step0.logits"]
        kept = theirs.shape[1]
        assert_close_to_scale(output.logits[:, -kept:], theirs, NOISE[version], rows[:, -kept:])
        for step in range(1, forced.shape[1] + 1):
            step_inputs: dict[str, Any] = {"input_ids": forced[:, step - 1 : step]}
            assert list(step_inputs["input_ids"].shape) == golden.meta["steps"][step]["input_shape"]
            assert output.past_key_values.get_seq_length() + prefix == golden.meta["steps"][step]["past_len"]
            step_inputs["position_ids"] = torch.tensor(golden.meta["steps"][step]["position_ids"])
            if version == 1:
                step_inputs["attention_mask"] = golden.tensors.get(f"step{step}.attention_mask")
            elif "attention_mask" in golden:
                step_inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, step), value=1)
            output = model(**step_inputs, past_key_values=output.past_key_values, use_cache=True)
            assert_close_to_scale(output.logits, golden[f"step{step}.logits"], NOISE[version])
    if "past_last.key" in golden:
        rows = F.pad(rows, (0, forced.shape[1]), value=True)
        check_cache(output.past_key_values, golden, rows, NOISE[version])


@pytest.mark.parametrize(("version", "folder", "name"), INCREMENTAL)
def test_generate_feeds_the_network_as_the_original_did(version: int, folder: str, name: str) -> None:
    """generate() with forced tokens gives the raw logits of every step: masks and positions grow as they should."""
    golden, model = incremental_case(version, folder, name), model_of(version, folder)
    forced, inputs = golden["forced_tokens"], golden.inputs()
    if version == 1 and "attention_mask" not in inputs:
        assert DEVIATIONS["ids_alone_are_read_as_padded"]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=forced.shape[1] + 1,
        eos_token_id=None,
        logits_processor=[Forced(forced, inputs["input_ids"].shape[1])],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert len(output.logits) == forced.shape[1] + 1
    for step, logits in enumerate(output.logits):
        assert_close_to_scale(logits, golden[f"step{step}.logits"][:, -1], NOISE[version])


# ---- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS_V1)
def test_variants_of_generation_1(name: str) -> None:
    check_pass(model_of(1, f"model_{name.split('_')[0]}"), case("v1/variants", name), 1)


def test_generate_with_one_kind_of_positions() -> None:
    """After [gMASK], the original's steps stand still where its own prompts count on: ours is as without a cache."""
    (golden,) = read_json("v1/variants.json")["pos1d_generate"]["ok"]
    model = model_of(1, "model_pos1d")
    prompt = golden[: golden.index(model.config.bos_token_id) + 1]
    new = len(golden) - len(prompt)
    cached, whole = (
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, use_cache=use_cache)[0].tolist()
        for use_cache in (True, False)
    )
    assert DEVIATIONS["one_kind_of_positions_goes_on"]
    assert cached == whole != golden
    assert cached[: len(prompt) + 1] == golden[: len(prompt) + 1]  # the first token is of the prompt alone


@pytest.mark.parametrize(("version", "name"), [(version, name) for version in LATER for name in VARIANTS[version]])
def test_variants(version: int, name: str) -> None:
    golden = case(f"v{version}/variants", name)
    if version < 4 and not name.startswith("rope_ratio"):  # the same config once more, as a file
        file = find(f"v{version}/variant_{name}/config.json")
        assert json.loads(file.read_text(encoding="utf-8")) == golden.meta["config"]
    check_pass(variant_model(version, name), golden, version)


@pytest.mark.parametrize("version", (2, 3))
def test_fp32_residual_in_half_precision(version: int) -> None:
    assert DEVIATIONS["fp32_residual_works_in_half_precision"]
    assert read_json(f"v{version}/variants.json")["fp32_residual_half"]["error"] == "RuntimeError"
    golden = case(f"v{version}/variants", "fp32_residual")
    model = variant_model(version, "fp32_residual", dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(**golden.inputs()).logits
    rows = golden.real_rows(DEVIATIONS["pad_rows_are_not_fully_visible"])
    assert_close_to_scale(logits, golden["logits"], 0.05, rows)  # the rounding of bfloat16: measured 0.038


@pytest.mark.parametrize("version", (2, 3))
def test_classifier(version: int) -> None:
    golden = case(f"v{version}/variants", "classifier")
    shapes = read_json(f"v{version}/variants.json")["no_qk_scaling"]["state_dict"]
    state = recipe_state({key: shape for key, (shape, _) in shapes.items()}, golden.meta["seed"])
    state |= {"classifier_head.weight": golden["weight"], "classifier_head.bias": golden["bias"]}
    model = build_model(version, golden.meta["config"], state, model_class=ChatGLM2ForSequenceClassification)
    with torch.no_grad():
        output = model(**golden.inputs())
    assert set(golden.meta["state_dict_extra"]) <= set(state)
    assert_close_to_scale(output.logits, golden["logits"], NOISE[version])
    assert_relative(output.loss.item(), golden["loss"].item())
    assert DEVIATIONS["the_classifier_reads_the_last_real_token"]
    ids = golden["input_ids"][:1]
    with torch.no_grad():
        padded = model(F.pad(ids, (0, 3)), attention_mask=F.pad(torch.ones_like(ids), (0, 3))).logits
        assert_close_to_scale(padded, model(ids).logits, NOISE[version])


# ---- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision(version: int, dtype: str, attention: str) -> None:
    """With the originals' rotary tables in the model's precision.

    Kernels round in different orders: ours is no further from the original's logits than these are from float32.
    """
    golden = case(f"v{version}/lowp", f"{dtype}_gmask_tok" if version == 1 else dtype)
    exact = case(f"v{version}/forward", "gmask_tok" if version == 1 else "padded")
    assert torch.equal(golden["input_ids"], exact["input_ids"])
    torch_dtype = DTYPES[dtype]
    assert DEVIATIONS["rotary_tables_are_float32"]
    model = golden_model(version, dtype=torch_dtype, rope_precision="original", attention=attention)
    with torch.no_grad():
        logits = model(**golden.inputs()).logits
    assert logits.dtype == torch_dtype
    rows = golden.real_rows(DEVIATIONS["pad_rows_are_not_fully_visible"])
    if version == 1:
        assert DEVIATIONS["fully_hidden_rows_in_half_precision"]
        rows = ~golden["attention_mask"].all(-1)[:, 0]
    theirs = golden["logits"][rows].double()
    ours_off, theirs_off = logits[rows].double() - theirs, exact["logits"][rows].double() - theirs
    assert ours_off.abs().max() <= theirs_off.abs().max()  # measured: 0.75 of it
    assert ours_off.norm() <= theirs_off.norm()


@pytest.mark.parametrize("version", LATER)
def test_rotary_tables(version: int) -> None:
    golden = case(f"v{version}/forward", "rotary")["cache_fp32"]
    table = model_of(version).transformer.rotary_pos_emb
    ours = torch.stack(table(torch.arange(len(golden))[None], torch.float32), -1)[0]
    assert_close_to_scale(ours, golden, 1e-6)
    lowp = case(f"v{version}/lowp", "rotary")
    assert set(lowp.tensors) == set(DTYPES)
    for name, dtype in DTYPES.items():
        table = golden_model(version, rope_precision="original").transformer.rotary_pos_emb
        ours = torch.stack(table(torch.arange(0, 40 * len(lowp[name]), 40)[None], dtype), -1)[0]
        if dtype == torch.float32:
            assert_close_to_scale(ours, lowp[name], 1e-6)
        else:
            assert torch.equal(ours, lowp[name])


@pytest.mark.parametrize(("name", "dtype"), list(DTYPES.items()))
def test_rotary_tables_of_generation_1(name: str, dtype: torch.dtype) -> None:
    """Frequencies are float16 numbers in every precision; the originals' tables hold each angle twice, side by side."""
    golden = case("v1/lowp", "rotary")
    config = ChatGLM1Config(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        inner_hidden_size=8,
        vocab_size=8,
        rope_precision="original",
    )
    table = ChatGLM1Model(config).rotary_emb(torch.arange(600)[None], dtype)
    for ours, field in zip(table, ("cos", "sin"), strict=True):
        first, second = golden[f"{name}.{field}"][:, 0].chunk(2, -1)
        assert torch.equal(first, second)
        assert_close_to_scale(ours[0], first, torch.finfo(dtype).eps)
    if dtype != torch.float32:  # the first row of angles is 0, the second the frequencies
        frequencies = read_json("v1/lowp.json")[f"{name}_inv_freq"]
        assert frequencies["dtype"] == str(dtype)
        assert rotary_angles(2, dtype, torch.device("cpu"), dim=8)[1].tolist() == frequencies["values"]


@pytest.mark.parametrize(
    ("version", "name"),
    [
        *((version, name) for version in (2, 3) for name in ("rope_ratio2", "rope_ratio50")),
        *((4, name) for name in ("rope_ratio1", "groups4_rope10000")),
    ],
)
def test_rotary_tables_of_long_contexts(version: int, name: str) -> None:
    golden = case(f"v{version}/variants", name)["rotary_cache"]
    table = variant_model(version, name).transformer.rotary_pos_emb
    assert_close_to_scale(torch.stack(table(torch.arange(len(golden))[None], torch.float32), -1)[0], golden, 1e-6)


@pytest.mark.parametrize("folder", PTUNING)
@pytest.mark.parametrize("version", TUNED)
def test_prefixes(version: int, folder: str) -> None:
    """The keys and values of the first and the last layer, for two sequences."""
    golden = case(f"v{version}/{folder}/golden", "get_prompt")
    with torch.no_grad():
        prefixes = model_of(version, folder).transformer.prefix_encoder(2, torch.float32)
    for ours, name in ((prefixes[0], "layer0"), (prefixes[-1], "last")):
        theirs = golden[name].permute(0, 2, 3, 1, 4)  # (key/value, batch, heads, prefix, head_dim)
        assert_close_to_scale(torch.stack(ours), theirs, 1e-6)


# ---- gradients -----------------------------------------------------------------------------------------------------


def check_gradients(version: int, model: Any, inputs: dict[str, torch.Tensor], golden: Case) -> None:
    """Loss, which parameters have a gradient, the norms of all of them, and those that are stored."""
    loss = model(**inputs).loss
    loss.backward()
    assert_relative(loss.item(), golden.meta["loss"])
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(ours) == set(golden.meta["requires_grad_true"])
    assert [name for name, gradient in ours.items() if gradient is None] == golden.meta["no_grad"]
    assert set(ours) == set(golden.meta["grad_norm"])
    for name, norm in golden.meta["grad_norm"].items():
        assert_relative(ours[name].double().norm().item(), norm)
    fields = [field for field in golden.tensors if field.startswith("grad.")]
    assert fields
    for field in fields:
        assert_close_to_scale(ours[field.removeprefix("grad.")], golden[field], GRADIENT_NOISE[version])


@pytest.mark.parametrize(("version", "name"), GRADIENTS)
def test_gradients(version: int, name: str) -> None:
    golden = case(f"v{version}/grads", name)
    untied = name.startswith("untied")
    inputs = (case("v1/forward", "gmask_ids_only") if untied else golden).inputs()
    check_gradients(version, golden_model(version, "model_untied" if untied else "model"), inputs, golden)


# ---- P-tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("folder", PTUNING)
@pytest.mark.parametrize(
    ("version", "name"), [(version, name) for version in TUNED for name in PTUNING_FORWARD[version]]
)
def test_prefix_forward(version: int, folder: str, name: str, attention: str) -> None:
    check_pass(model_of(version, folder, attention), case(f"v{version}/{folder}/golden", name), version)


@pytest.mark.parametrize("folder", PTUNING)
@pytest.mark.parametrize("version", TUNED)
def test_prefix_gradients(version: int, folder: str) -> None:
    """Only the prefix is trained, and its gradients are the original's."""
    name = PTUNING_FORWARD[version][0]
    golden = case(f"v{version}/{folder}/golden", f"grads.{name}")
    inputs = case(f"v{version}/{folder}/golden", name).inputs()
    check_gradients(version, golden_model(version, folder), inputs, golden)


# ---- odd inputs ----------------------------------------------------------------------------------------------------


def test_what_generation_1_refuses() -> None:
    edge, model = read_json("v1/edge.json"), model_of(1)
    no_bos, no_mask = torch.tensor([[7, 8, 373, 9]]), torch.tensor([[7, 8, 376, 9]])
    assert edge["int_attention_mask_to_forward"]["error"] == "RuntimeError"
    assert DEVIATIONS["plain_masks_are_accepted"]
    whole = torch.tensor([[7, 373, 376, 9]])
    with pytest.raises(ValueError, match="bool"):
        model(whole, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.long))
    for name, ids, token in (("bos", no_bos, "<sop>"), ("mask", no_mask, r"\[gMASK\]")):
        assert edge[f"generate_no_{name}"]["error"] == "ValueError"
        assert edge["no_mask_token" if name == "mask" else "no_bos"]["error"] == "ValueError"
        with pytest.raises(ValueError, match=f"a row without {token} "):
            model(ids)
        with pytest.raises(ValueError, match=f"a row without {token} "):
            model.generate(ids, max_new_tokens=2)


def test_constants_of_generation_1() -> None:
    edge = read_json("v1/edge.json")
    assert edge["alpha"] == RESIDUAL_SCALE
    assert DEVIATIONS["the_cache_is_on_by_default"]
    assert (edge["use_cache_default_of_config_class"], ChatGLM1Config().use_cache) == (False, True)


def test_a_batch_of_both_mask_tokens() -> None:
    expected = read_json("v1/edge.json")["generate_batch_mixed_gmask_mask"]["ok"]
    prompts = torch.tensor([row[:4] for row in expected])
    assert model_of(1).generate(prompts, do_sample=False, max_new_tokens=6).tolist() == expected


def test_longer_than_max_sequence_length() -> None:
    shape = read_json("v1/edge.json")["longer_than_max_sequence_length"]["ok"]
    input_ids = torch.tensor([[7] * (shape[1] - 2) + [373, 376]])
    with torch.no_grad():
        assert list(model_of(1)(input_ids).logits.shape) == shape


def test_two_sop_tokens() -> None:
    """The first one ends the context."""
    golden = torch.tensor(read_json("v1/edge.json")["two_bos"]["ok"])
    with torch.no_grad():
        logits = model_of(1)(torch.tensor([[7, 373, 376, 8, 376, 9]])).logits
    assert_close_to_scale(logits[0, -1, :5], golden, NOISE[1])


def test_sampling_from_beams() -> None:
    shape = read_json("v1/edge.json")["num_beams2_do_sample_ok"]["ok"]
    output = model_of(1).generate(torch.tensor([[7, 8, 373, 376]]), num_beams=2, do_sample=True, max_new_tokens=4)
    assert list(output.shape) == shape


@pytest.mark.parametrize("version", LATER)
def test_padding_on_the_right(version: int) -> None:
    golden = torch.tensor(read_json(f"v{version}/edge.json")["right_padding_mask"]["ok"])
    ids, mask = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        logits = model_of(version)(ids, attention_mask=mask).logits
    assert DEVIATIONS["pad_rows_are_not_fully_visible"]
    assert_close_to_scale(logits[..., :5], golden, NOISE[version], mask.bool())


@pytest.mark.parametrize("version", LATER)
def test_a_row_of_nothing_but_padding(version: int) -> None:
    golden = torch.tensor(read_json(f"v{version}/edge.json")["all_pad_row"]["ok"])
    ids, mask = torch.tensor([[0, 0, 0], [5, 6, 7]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    with torch.no_grad():
        logits = model_of(version)(ids, attention_mask=mask).logits
    assert DEVIATIONS["pad_rows_are_not_fully_visible"]
    assert torch.isfinite(logits).all()
    assert_close_to_scale(logits[1, -1, :5], golden[1], NOISE[version])


@pytest.mark.parametrize("version", LATER)
def test_longer_than_seq_length(version: int) -> None:
    assert DEVIATIONS["rotary_tables_grow"]
    edge, model = read_json(f"v{version}/edge.json"), golden_model(version)
    assert edge["longer_than_seq_length_pos"]["error"] == "IndexError"
    assert edge["longer_than_seq_length_no_pos"]["error"] == "RuntimeError"
    length = model.config.seq_length + 20
    ids = torch.randint(10, 300, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        long = model(ids).logits
        assert torch.equal(model(ids, position_ids=torch.arange(length)[None]).logits, long)
    assert long.shape[1] == length
    assert torch.isfinite(long).all()


@needs_shared
def test_what_the_originals_do_not_have() -> None:
    """And ours has, in the tests below."""
    edges = {1: read_json("v1/variants.json"), **{version: read_json(f"v{version}/edge.json") for version in (2, 3)}}
    assert {edge["inputs_embeds_only"]["error"] for edge in edges.values()} == {"AttributeError"}
    assert {edges[version]["output_attentions"]["ok"] for version in (2, 3)} == {"None"}


@pytest.mark.parametrize("version", VERSIONS)
def test_inputs_embeds(version: int) -> None:
    """Embeddings instead of ids; generation 1 then needs the mask and positions that it cannot read from ids."""
    assert DEVIATIONS["inputs_embeds_are_accepted"]
    golden, model = case(f"v{version}/forward", "inc_ids_only_b1" if version == 1 else "inc_b1"), model_of(version)
    ids = golden["input_ids"]
    inputs = tokenizer_inputs_v1(ids.tolist(), model.config) if version == 1 else {"input_ids": ids}
    del inputs["input_ids"]
    with torch.no_grad():
        logits = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).logits
    assert_close_to_scale(logits[:, -1], golden["step0.logits"][:, -1], NOISE[version])


@pytest.mark.parametrize("version", LATER)
def test_attentions(version: int) -> None:
    assert DEVIATIONS["attentions_are_returned"]
    golden, model = case(f"v{version}/forward", "unpadded_no_mask"), model_of(version, attention="eager")
    with torch.no_grad():
        attentions = model(golden["input_ids"], output_attentions=True).attentions
    batch, tokens = golden["input_ids"].shape
    assert len(attentions) == model.config.num_layers
    assert attentions[0].shape == (batch, model.config.num_attention_heads, tokens, tokens)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(batch, model.config.num_attention_heads, tokens))


@pytest.mark.parametrize("version", VERSIONS)
def test_generate_with_and_without_cache(version: int) -> None:
    edge, model = read_json(f"v{version}/edge.json"), model_of(version)
    for use_cache in (True, False):
        expected = edge[f"use_cache_{str(use_cache).lower()}_generate"]["ok"]
        prompt = torch.tensor([expected[0][:-6]])
        assert model.generate(prompt, do_sample=False, max_new_tokens=6, use_cache=use_cache).tolist() == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_two_sequences_of_three_beams(version: int) -> None:
    expected = read_json(f"v{version}/edge.json")["num_return_sequences2_beam3"]["ok"]
    output = model_of(version).generate(
        torch.tensor([expected[0][:-6]]), do_sample=False, max_new_tokens=6, num_beams=3, num_return_sequences=2
    )
    assert output.tolist() == expected
