"""The calls that programs written for the originals make, in their order, on tiny models: one function for each.

Each folder looks like an original repository: `auto_map` in its configurations, and code files, which must not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

import chatglm
from chatglm.conversation.formats import chat_format
from conftest import enable_checkpointing
from tiny_folders import make_folder, to_bin

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
NAMES = {1: "chatglm-6b", 2: "chatglm2-6b", 3: "chatglm3-6b"}

pytestmark = [
    pytest.mark.usefixtures("no_network"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]


def original(folder: Path, version: int, **changes: Any) -> Path:
    """A tiny checkpoint in `folder`, in the files of the original repository."""
    sizes = {"inner_hidden_size": 128} if version == 1 else {}
    path = to_bin(make_folder(folder / NAMES[version], version, **sizes | changes))
    for file, classes in (("config.json", AUTO_MAP), ("tokenizer_config.json", TOKENIZER_MAP)):
        values = json.loads((path / file).read_text())
        values.pop("chatglm_version")
        values |= {"auto_map": classes} | (
            {"_name_or_path": f"THUDM/{NAMES[version]}"} if file == "config.json" else {}
        )
        (path / file).write_text(json.dumps(values))
    for module in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm", "quantization"):
        (path / f"{module}.py").write_text('raise RuntimeError("code of the checkpoint folder was run")\n')
    return path


class ZeroInvalidScores(LogitsProcessor):
    """What every front end puts into logits_processor; it writes to the scores that it is given."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isnan(scores).any() or torch.isinf(scores).any():
            scores.zero_()
            scores[..., 5] = 5e4
        return scores


def processors() -> LogitsProcessorList:
    return LogitsProcessorList([ZeroInvalidScores()])


# ---- FastChat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_fastchat(version: int, tmp_path: Path) -> None:
    """Its adapter's loader, its context length, and `generate_stream_chatglm` with a prompt that it wrote itself."""
    path = str(original(tmp_path, version))
    options: dict[str, Any] = {"encode_special_tokens": True} if version == 3 else {}
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, revision="main", **options)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, torch_dtype=torch.float32, revision="main")
    model.to("cpu")
    assert "chatglm" in str(type(model)).lower()  # how it finds its stream function
    lengths = [getattr(model.config, name, None) for name in ("max_sequence_length", "seq_length")]
    assert (lengths[0] or lengths[1]) == model.config.max_position_embeddings

    prompt = {1: "你好", 2: "[Round 1]\n\n问：你好\n\n答：", 3: "<|user|>\n你好<|assistant|>"}[version]
    inputs = tokenizer([prompt], return_tensors="pt").to(model.device)
    length = len(inputs["input_ids"][0])
    with torch.inference_mode():
        for given in ({"do_sample": False, "top_p": 1.0}, {"do_sample": True, "top_p": 0.7, "temperature": 0.7}):
            answers = []
            for ids in model.stream_generate(
                **inputs,
                max_length=12 + length,
                repetition_penalty=1.0,
                logits_processor=[ZeroInvalidScores()],
                **given,
            ):
                spoken = ids.tolist()[0]
                answers.append((tokenizer.decode(spoken[length:]), len(spoken) - length))
            assert [count for _, count in answers] == list(range(1, len(answers) + 1))
            if not given["do_sample"]:
                ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
                assert answers[-1][0] == tokenizer.decode(ids[0, length:])
    if version == 3:  # the roles in its prompt are control tokens, as it asked for
        assert tokenizer.get_command("<|user|>") in inputs["input_ids"][0].tolist()
    elif version == 2:
        assert inputs["input_ids"].tolist() == tokenizer.build_chat_input("你好")["input_ids"].tolist()
    else:
        assert chat_format(1).clean(answers[-1][0]) == model.process_response(answers[-1][0])


# ---- LLaMA-Factory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_llama_factory(version: int, tmp_path: Path) -> None:
    """Loader with its patches, template, a step of LoRA, generation with its stop words, the saved files."""
    path = original(tmp_path, version)
    hub: dict[str, Any] = {"trust_remote_code": True, "cache_dir": None, "revision": "main", "token": None}
    tokenizer = AutoTokenizer.from_pretrained(
        path, use_fast=True, split_special_tokens=False, padding_side="right", **hub
    )
    config = AutoConfig.from_pretrained(path, **hub)
    if "PreTrainedTokenizerBase" not in str(tokenizer._pad.__func__):
        tokenizer._pad = MethodType(PreTrainedTokenizerBase._pad, tokenizer)
    assert config.model_type == "chatglm"
    config.torch_dtype = torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, torch_dtype=torch.float32, low_cpu_mem_usage=True, **hub
    )
    assert "GenerationMixin" in str(model.generate.__func__)  # else it puts transformers' own method there
    model.lm_head = model.transformer.output_layer
    model._keys_to_ignore_on_save = ["lm_head.weight"]
    for thing, place in ((config, config.auto_map), (model, config.auto_map)):
        assert "AutoConfig" in place
        type(thing).register_for_auto_class()
    if "AutoTokenizer" in tokenizer.init_kwargs.get("auto_map", {}):
        type(tokenizer).register_for_auto_class()
    model.add_model_tags(["llama-factory"])

    # The template: its elements are encoded one by one.
    roles = ["<|user|>", "<|observation|>"]
    if version == 3:
        before = len(tokenizer)
        added = tokenizer.add_special_tokens(
            {"additional_special_tokens": roles}, replace_additional_special_tokens=False
        )
        assert (added, len(tokenizer)) == (0, before)
        assert set(roles) <= set(tokenizer.additional_special_tokens)
        user: list[Any] = [{"token": "<|user|>"}, "\n", "你好", {"token": "<|assistant|>"}]
        answer: list[Any] = ["\n", "Hello!"]
    else:
        user, answer = ["[Round 1]\n\n问：你好\n\n答："], ["Hello!"]
    ids: list[int] = []
    for element in ({"token": "[gMASK]"}, {"token": "sop"}, *user):
        if isinstance(element, dict):
            ids.append(tokenizer.convert_tokens_to_ids(element["token"]))
        else:
            ids += tokenizer.encode(element, add_special_tokens=False)
    assert ids == tokenizer.build_chat_input("你好")["input_ids"][0].tolist()
    spoken = [token for text in answer for token in tokenizer.encode(text, add_special_tokens=False)]
    spoken.append(tokenizer.eos_token_id)

    # Training: the head in float32, gradient checkpointing, LoRA.
    model.enable_input_require_grads()
    enable_checkpointing(model, {"use_reentrant": True})
    model.config.use_cache = False
    head = model.lm_head
    head.register_forward_pre_hook(lambda module, given: given[0].to(head.weight.dtype))
    head.register_forward_hook(lambda module, given, output: output.to(torch.float32))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["query_key_value"])
    tuned = peft.get_peft_model(model, lora).train()
    rows = [
        {"input_ids": ids + spoken, "attention_mask": [1] * len(ids + spoken), "labels": [-100] * len(ids) + spoken},
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * (len(ids) - 1) + [5]},
    ]
    batch = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, label_pad_token_id=-100)(rows)
    assert batch["input_ids"].shape[1] % 8 == 0 and batch["attention_mask"][1].tolist()[len(ids) :].count(1) == 0
    loss = tuned(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and any(one.grad is not None for one in tuned.parameters() if one.requires_grad)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    tuned.eval()
    stops = [tokenizer.eos_token_id, *tokenizer.additional_special_tokens_ids]
    start = torch.tensor([ids])
    output = tuned.generate(
        input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=4, do_sample=True, top_p=0.7,
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, logits_processor=processors(),
    )  # fmt: skip
    assert output.shape[1] > len(ids)
    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path, **hub), str(tmp_path / "adapter")
    )
    merged = merged.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="2GB")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "merged")
    model, again = chatglm.load(tmp_path / "merged")
    assert again.chatglm_version == version and again.build_chat_input("你好")["input_ids"][0].tolist() == ids
    model.chat(again, "你好", max_new_tokens=2)


def test_llama_factory_saves_a_head_under_two_names(tmp_path: Path) -> None:
    """Full tuning: the base itself is saved with the second name of the head that the loader gave it."""
    model = AutoModelForCausalLM.from_pretrained(original(tmp_path, 3), trust_remote_code=True)
    model.lm_head = model.transformer.output_layer
    model._keys_to_ignore_on_save = ["lm_head.weight"]
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.transformer.output_layer.weight, model.lm_head.weight)


# ---- ChatGLM-Tuning and other scripts of 2023 for LoRA on ChatGLM-6B -------------------------------------------------


class CastOutputToFloat(torch.nn.Sequential):
    """What the scripts put in place of the head."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).to(torch.float32)


def test_chatglm_tuning(tmp_path: Path) -> None:
    """Flags that the scripts set, a head that casts, masks and positions made by their collator, the loss."""
    path = original(tmp_path, 1)
    model = AutoModel.from_pretrained(path, load_in_8bit=False, trust_remote_code=True, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    enable_checkpointing(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    model.is_parallelizable = model.model_parallel = True
    model.lm_head = CastOutputToFloat(model.lm_head)
    model.config.use_cache = False
    lora = peft.LoraConfig(task_type="CAUSAL_LM", inference_mode=False, r=2, lora_alpha=4, lora_dropout=0.1)
    tuned = peft.get_peft_model(model, lora).train()

    rows = []
    for question, answer in (("你好", "Hello!"), ("Who are you?", "ChatGLM")):
        prompt = tokenizer.encode(question, max_length=20, truncation=True)
        target = tokenizer.encode(answer, max_length=20, truncation=True, add_special_tokens=False)
        rows.append((len(prompt), prompt + target + [tokenizer.eos_token_id]))
    width = max(len(ids) for _, ids in rows)
    batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for length, ids in rows:
        context, mark = ids.index(tokenizer.bos_token_id), ids.index(tokenizer.sp_tokenizer[tokenizer.gmask_token])
        mask = torch.ones(1, width, width).tril()
        mask[..., :context] = 1
        first = torch.arange(width)
        first[context:] = mark
        second = torch.cat((torch.zeros(context, dtype=torch.long), torch.arange(width - context) + 1))
        padding = width - len(ids)
        batch["input_ids"].append(torch.tensor(ids + [tokenizer.eos_token_id] * padding))
        batch["labels"].append(torch.tensor([-100] * (length - 1) + ids[length - 1 :] + [-100] * padding))
        batch["attention_mask"].append(mask < 0.5)
        batch["position_ids"].append(torch.stack((first, second)))
    inputs = {name: torch.stack(parts) for name, parts in batch.items()}
    output = tuned(**inputs)
    assert output.logits.dtype == torch.float32
    output.loss.backward()
    assert all(one.grad is not None for one in tuned.parameters() if one.requires_grad)
    own = tuned.eval()(input_ids=inputs["input_ids"][:1], labels=inputs["labels"][:1])  # masks and positions of ours
    theirs = tuned(**{name: rows[:1] for name, rows in inputs.items()})
    torch.testing.assert_close(own.loss, theirs.loss)
    # save_tunable_parameters: names with `.default.`, which our loader takes.
    trained_ones = {name: value.detach() for name, value in tuned.named_parameters() if value.requires_grad}
    (tmp_path / "lora").mkdir()
    torch.save(trained_ones, tmp_path / "lora" / "adapter_model.bin")
    tuned.peft_config["default"].save_pretrained(tmp_path / "lora")
    loaded, _ = chatglm.load(path, adapter=tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs["input_ids"][:1]).logits.float(), own.logits.float())


# ---- chatglm.cpp's converter -----------------------------------------------------------------------------------------

BLOCK_1 = [
    f"{module}.{kind}"
    for module in ("input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm",
                   "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    for kind in ("weight", "bias")
]  # fmt: skip
BLOCK_2 = [
    "input_layernorm.weight", "self_attention.query_key_value.weight", "self_attention.query_key_value.bias",
    "self_attention.dense.weight", "post_attention_layernorm.weight", "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
]  # fmt: skip


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_chatglm_cpp_converter(version: int, bits: int, tmp_path: Path) -> None:
    """What it reads of config, tokenizer and state dict, to write them into its own file."""
    path = original(tmp_path, version)
    if bits:
        chatglm.load(path, quantize=bits)[0].save_pretrained(tmp_path / "small")
        for file in path.iterdir():
            if file.suffix == ".model" or file.name == "tokenizer_config.json":
                (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "small" / "config.json").read_text())
        (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
        path = tmp_path / "small"
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert "AutoModel" in config.auto_map
    model = AutoModel.from_pretrained(path, trust_remote_code=True, low_cpu_mem_usage=True)
    assert model.config.model_type == "chatglm" and model.config.quantization_bit == bits
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
        assert isinstance(getattr(config, name), int | None)
    assert hasattr(config, "multi_query_attention") is (version > 1)  # how it tells the generations apart
    state = model.state_dict()
    if version == 1:
        assert config.position_encoding_2d and config.inner_hidden_size == 4 * config.hidden_size
        numbers = [config.vocab_size, config.num_layers, config.max_sequence_length, config.num_attention_heads]
        proto = tokenizer.sp_tokenizer.text_tokenizer.sp.serialized_model_proto()
        assert torch.allclose(state["transformer.word_embeddings.weight"], state["lm_head.weight"])
        start, block = "transformer.layers", BLOCK_1
        outside = ["word_embeddings.weight", "final_layernorm.weight", "final_layernorm.bias"]
    else:
        flags = {
            "add_bias_linear": False, "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False,
            "multi_query_attention": True, "original_rope": True, "post_layer_norm": True, "rmsnorm": True,
        }  # fmt: skip
        assert {name: getattr(config, name) for name in flags} == flags
        assert config.kv_channels * config.num_attention_heads == config.hidden_size
        numbers = [config.padded_vocab_size, config.ffn_hidden_size, config.seq_length, config.multi_query_group_num]
        proto = tokenizer.tokenizer.sp_model.serialized_model_proto()
        start, block = "transformer.encoder.layers", BLOCK_2
        outside = ["embedding.word_embeddings.weight", "encoder.final_layernorm.weight", "output_layer.weight"]
    assert all(isinstance(number, int) for number in numbers)
    assert proto == next(path.glob("*.model")).read_bytes()
    names = [f"transformer.{name}" for name in outside]
    names += [f"{start}.{layer}.{name}" for layer in range(config.num_layers) for name in block]
    assert set(names) <= set(state)
    reference, _ = chatglm.load(path)
    for name in names:
        tensor = state[name]
        if tensor.dtype != torch.int8:
            assert tensor.dim() in (1, 2) and tensor.is_floating_point()
            continue
        assert bits == 4 and f"{name}_scale" in state
        even, odd = tensor >> 4, (tensor << 4) >> 4  # the even column is in the high half of a byte
        numbers = torch.stack((even, odd), dim=-1).flatten(1) * state[f"{name}_scale"].float()[:, None]
        module = reference.get_submodule(name.removesuffix(".weight"))
        identity = torch.eye(numbers.shape[1], dtype=reference.dtype)
        with torch.no_grad():
            product = module(identity) - (0 if module.bias is None else module.bias)
        torch.testing.assert_close(product.T.float(), numbers, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("projection", [False, True])
def test_chatglm_cpp_converter_with_a_prefix(projection: bool, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(original(tmp_path, 2), trust_remote_code=True)
    config.pre_seq_len, config.prefix_projection = 6, projection
    model = AutoModel.from_pretrained(tmp_path / NAMES[2], config=config, trust_remote_code=True)
    rows = model.transformer.prefix_encoder(torch.arange(config.pre_seq_len).unsqueeze(0))
    prefix = rows.view(1, 6, config.num_layers * 2, config.multi_query_group_num, config.kv_channels)
    layers = prefix[0].permute(1, 2, 0, 3)  # (layers * 2, groups, prefix, size)
    expected = model.eval().transformer.prefix_encoder(1, torch.float32)
    for layer, (key, value) in enumerate(expected):
        torch.testing.assert_close(layers[2 * layer], key[0])
        torch.testing.assert_close(layers[2 * layer + 1], value[0])


# ---- Langchain-Chatchat ----------------------------------------------------------------------------------------------


class Listener(StoppingCriteria):
    """Its own criterion, which counts the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> bool:
        self.steps += 1
        return False


@pytest.mark.parametrize("kind", ["plain", "p-tuning", "lora"])
@pytest.mark.parametrize("version", [1, 2])
def test_langchain_chatchat(version: int, kind: str, tmp_path: Path) -> None:
    """Its loader on a CPU, with the adapters that it knows, and its turns, streamed and whole."""
    path = original(tmp_path, version)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    if kind == "p-tuning":
        tuning = AutoConfig.from_pretrained(path, pre_seq_len=4, prefix_projection=True)
        state = AutoModel.from_pretrained(path, config=tuning).state_dict()
        (tmp_path / "prefix").mkdir()
        (tmp_path / "prefix" / "config.json").write_text(json.dumps({"pre_seq_len": 4, "prefix_projection": True}))
        prefix = {name: value for name, value in state.items() if ".prefix_encoder." in name}
        torch.save(prefix, tmp_path / "prefix" / "pytorch_model.bin")
        values = json.loads((tmp_path / "prefix" / "config.json").read_text())
        config.pre_seq_len, config.prefix_projection = values["pre_seq_len"], values["prefix_projection"]
    model = AutoModel.from_pretrained(path, config=config, trust_remote_code=True).float().to("cpu")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    if kind == "lora":
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        peft.get_peft_model(AutoModel.from_pretrained(path), lora).save_pretrained(
            tmp_path / "lora", save_embedding_layers=False
        )
        model.resize_token_embeddings(len(tokenizer))
        model = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    if kind == "p-tuning":
        start, loaded = "transformer.prefix_encoder.", torch.load(tmp_path / "prefix" / "pytorch_model.bin")
        loaded = {name[len(start) :]: value for name, value in loaded.items() if name.startswith(start)}
        model.transformer.prefix_encoder.load_state_dict(loaded)
        model.transformer.prefix_encoder.float()
    model = model.eval()

    def turn(query: str, history: list[Any], stream: bool) -> tuple[str, list[Any]]:
        settings: dict[str, Any] = {"max_length": 200, "temperature": 0.01, "top_p": 0.4, "top_k": 10, "seed": 0}
        if not stream:
            answer, _ = model.chat(tokenizer, query, history=history[-10:], max_new_tokens=8, **settings)
            return answer, [*history, [query, answer]]
        history = [*history, []]
        listener = Listener()
        for answer, _ in model.stream_chat(
            tokenizer, query, history=history[-10:-1], stopping_criteria=StoppingCriteriaList([listener]),
            max_new_tokens=8, **settings,
        ):  # fmt: skip
            history[-1] = [query, answer]
        assert 0 < listener.steps <= 8
        return answer, history

    whole: list[Any] = []
    streamed: list[Any] = []
    for query in ("你好", "Who are you?"):
        answer, whole = turn(query, whole, stream=False)
        said, streamed = turn(query, streamed, stream=True)
        assert said == answer
    assert whole == streamed and len(whole) == 2


# ---- ChatGLM3's demos ------------------------------------------------------------------------------------------------

TOOLS = [
    {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
]
TOOL_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "p-tuning"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["chat", "tools"])
def test_composite_demo(tools: Any, prefix: bool, tmp_path: Path) -> None:
    """Its client: own prompt from system message, tools and turns with any role, `stream_generate` with all options."""
    path = original(tmp_path, 3)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    if prefix:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True, pre_seq_len=4)
        state = AutoModel.from_pretrained(path, config=config).state_dict()
        model = AutoModel.from_pretrained(path, trust_remote_code=True, config=config)
        start = "transformer.prefix_encoder."
        model.transformer.prefix_encoder.load_state_dict(
            {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
        )
    else:
        model = AutoModel.from_pretrained(path, trust_remote_code=True)
    model = model.float().to("cpu").eval()
    assert model.transformer.pre_seq_len == (4 if prefix else None)

    history: list[dict[str, Any]] = [{"role": "system", "content": TOOL_PROMPT if tools else "You are helpful."}]
    if tools:
        history[0]["tools"] = tools
    history += [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]
    stops = [tokenizer.eos_token_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]
    for query, role in (("你好", "user"), ("30 degrees", "observation")):
        before = [dict(message) for message in history]
        inputs = tokenizer.build_chat_input(query, history=history, role=role).to(model.device)
        history.append({"role": role, "content": query})
        length = inputs["input_ids"].shape[1]
        assert length + 8 < model.config.seq_length
        answers = [
            tokenizer.decode(ids.tolist()[0][length:])
            for ids in model.stream_generate(
                **inputs, past_key_values=None, eos_token_id=stops, return_past_key_values=False, max_new_tokens=8,
                do_sample=False, top_p=0.8, temperature=0.8, logits_processor=processors(),
                repetition_penalty=1.2, length_penalty=1.0, num_beams=1,
            )
        ]  # fmt: skip
        steps = model.stream_steps(
            tokenizer, query, before, role, do_sample=False, max_new_tokens=8, repetition_penalty=1.2
        )
        *_, last = steps
        stop = answers[-1].removeprefix(last.text) if last.finish_reason == "stop" else ""
        assert answers[-1].strip() == (last.text + stop).strip()
        history.append({"role": "assistant", "content": answers[-1]})


def test_finetune_demo(tmp_path: Path) -> None:
    """finetune_hf.py with LoRA, rows that it builds message by message, and inference_hf.py with what it saved."""
    path = original(tmp_path, 3)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, empty_init=False, use_cache=False)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=0.1)
    tuned = peft.get_peft_model(model, lora)
    ids, learned = [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")], [False, False]
    for message in ({"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello!"}):
        new = tokenizer.build_single_message(message["role"], "", message["content"])
        ids += new
        learned += [message["role"] == "assistant"] * len(new)
    ids.append(tokenizer.eos_token_id)
    learned = [False, *learned]
    labels = [token if loss else -100 for token, loss in zip(ids, learned, strict=True)]
    batch = DataCollatorForSeq2Seq(tokenizer, padding="longest", return_tensors="pt")(
        [{"input_ids": ids, "labels": labels}, {"input_ids": ids[:-3], "labels": labels[:-3]}]
    )
    tuned.train()(**batch).loss.backward()
    with torch.no_grad():
        for one in tuned.parameters():
            if one.requires_grad:
                one.normal_(std=0.2)
    tuned.save_pretrained(tmp_path / "output", save_embedding_layers=False)

    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "output", trust_remote_code=True, device_map="auto"
    )
    base = loaded.peft_config["default"].base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    answer, _ = loaded.chat(tokenizer, "你好", do_sample=False, max_new_tokens=8)
    ours, _ = chatglm.load(path, adapter=tmp_path / "output")
    assert answer == ours.chat(tokenizer, "你好", do_sample=False, max_new_tokens=8)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_openai_demo(temperature: float, tmp_path: Path) -> None:
    """Its generator: messages with tools in the system message, the prompt of the last one, ids without the last."""
    path = original(tmp_path, 3)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, device_map="auto").eval()
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": TOOL_PROMPT, "tools": TOOLS},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call()\n```"},
        {"role": "observation", "content": "sunny"},
    ]
    query, role = messages[-1]["content"], messages[-1]["role"]
    inputs = tokenizer.build_chat_input(query, history=messages[:-1], role=role).to(model.device)
    length = len(inputs["input_ids"][0])
    assert length < model.config.seq_length
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": temperature > 1e-5, "top_p": 0.8}
    options |= {"repetition_penalty": 1.1, "logits_processor": [ZeroInvalidScores()]}
    if temperature > 1e-5:
        options["temperature"] = temperature
    stops = [tokenizer.eos_token_id, tokenizer.get_command("<|user|>")]
    total = 0
    for ids in model.stream_generate(**inputs, eos_token_id=stops, **options):
        total = len(ids[0])
        text = tokenizer.decode(ids.tolist()[0][length:-1])
        assert "<|user|>" not in text
    assert length < total <= length + 12
    if not options["do_sample"]:
        expected = model.generate(
            **inputs, eos_token_id=stops, do_sample=False, max_new_tokens=12, repetition_penalty=1.1
        )
        assert text == tokenizer.decode(expected[0, length:-1])
