"""The golden values of the original code: where they are, the tiny models they belong to, and how ours are compared.

All of them are in ../shared/goldens (its README has the formulas); `tests/data/goldens` holds a small part in the same
layout, so that the tests are useful on a machine that has only this repository. Tests whose data is in neither place
are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatglm.configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLM3Config, ChatGLM4Config
from conftest import SHARED

DATA = Path(__file__).parent / "data" / "goldens"
# Tolerance in float32, relative to the largest golden value. Measured with the kernels of SSE, AVX2 and AVX-512:
# generation 1 (whose residuals are scaled up) 2.3e-5, its gradients 4e-5; generations 2 and 3 7e-6, gradients 6e-6.
NOISE = {1: 5e-5, 2: 2e-5, 3: 2e-5, 4: 2e-5}
GRADIENT_NOISE = {1: 1e-4, 2: 2e-5, 3: 2e-5, 4: 2e-5}
RELATIVE_NOISE = 4e-5  # of losses, gradient norms and beam scores; measured: 1.7e-5
INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
CONFIG = {1: ChatGLM1Config, 2: ChatGLM2Config, 3: ChatGLM3Config, 4: ChatGLM4Config}
VERSIONS = tuple(CONFIG)
TUNED = (1, 2, 3)  # GLM-4's code has no P-tuning
PTUNING = ("ptuning_noproj", "ptuning_proj")
SETS = ("model", *PTUNING)
# The kinds of generate() cases.
GREEDY = ("greedy", "greedy_batch", "greedy_batch_no_position_ids")
BEAMS = ("beam3", "beam3_batch")
ENDED = ("eos_override_greedy", "eos_list_greedy")
UNCACHED, ENDED_IN_BATCH = "greedy_no_cache", "eos_in_batch"  # of GLM-4 only
ENDED_BEAMS: dict[str, dict[str, Any]] = {
    "eos_override_beam3": {},
    "eos_override_beam3_early": {"early_stopping": True},
    "eos_override_beam3_lp": {"length_penalty": 2.0, "num_return_sequences": 2},
}


def find(relative: str) -> Path:
    """The file or folder below one of the two roots; skips the calling test if neither has it.

    GLM-4's lie in `glm4`, and are called `v4` here.
    """
    relative = re.sub(r"^v4\b", "glm4", relative)
    for root in (SHARED / "goldens", DATA):
        if (root / relative).exists():
            return root / relative
    pytest.skip(f"needs ../shared/goldens/{relative}")


@cache
def read_json(relative: str) -> Any:
    """A golden JSON file. Removes the messages with unescaped quotes of two edge.json files; none is compared."""
    text = find(relative).read_text(encoding="utf-8")
    return json.loads(re.sub(r',\s*"message": ".*"', "", text) if relative.endswith("edge.json") else text)


@cache
def read_tensors(relative: str) -> dict[str, torch.Tensor]:
    return load_file(find(relative))


def read_part(relative: str, key: str) -> Any:
    """One part of a golden JSON file; skips if only tests/data is there and lacks it."""
    content = read_json(relative)
    if key not in content and not (SHARED / "goldens").is_dir():
        pytest.skip(f"needs ../shared/goldens/{relative}: tests/data has no {key}")
    return content[key]


@dataclass(frozen=True)
class Case:
    """One case of a golden file: its tensors by field name and its JSON entry."""

    name: str
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]

    def __getitem__(self, field: str) -> torch.Tensor:
        return self.tensors[field]

    def __contains__(self, field: str) -> bool:
        return field in self.tensors

    def inputs(self, *without: str) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in INPUTS if name in self.tensors and name not in without}

    def real_rows(self, reason: str) -> torch.Tensor:
        """Bool (batch, tokens): the query rows to compare. `reason` is the deviation that excludes the others."""
        assert reason
        mask = self.tensors.get("attention_mask")
        if mask is None or mask.dim() == 4:  # generation 1's pad rows, fully hidden and so uniform, are comparable
            return torch.ones_like(self["input_ids"], dtype=torch.bool)
        return mask.bool()


def case(file: str, name: str) -> Case:
    """Case `name` of the pair `file`.safetensors + `file`.json; skips if only tests/data is there and lacks it."""
    prefix = f"{name}."
    tensors = {
        key[len(prefix) :]: value
        for key, value in read_tensors(f"{file}.safetensors").items()
        if key.startswith(prefix)
    }
    if not tensors and not (SHARED / "goldens").is_dir():
        pytest.skip(f"needs ../shared/goldens/{file}.safetensors: tests/data has no case {name}")
    assert tensors, f"no case {name} in {file}"
    meta = read_json(f"{file}.json").get(name)
    return Case(name, tensors, meta if isinstance(meta, dict) else {})


def assert_close_to_scale(
    ours: torch.Tensor, golden: torch.Tensor, tolerance: float, rows: torch.Tensor | None = None
) -> None:
    """max |ours - golden| <= tolerance * max |golden|, over the `rows` (bool, leading dimensions) to compare."""
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    ours, golden = ours.detach().double(), golden.double()
    if rows is not None:
        ours, golden = ours[rows], golden[rows]
    assert golden.numel(), "nothing to compare"
    assert torch.isfinite(ours).all(), "not finite"
    difference, scale = (ours - golden).abs().max().item(), golden.abs().max().item()
    assert difference <= tolerance * scale, (
        f"differs by {difference:.3g} at a scale of {scale:.3g}: {difference / scale:.2g} of it"
    )


def assert_relative(ours: float, golden: float) -> None:
    assert abs(ours - golden) <= RELATIVE_NOISE * abs(golden), f"{ours} against {golden}"


# ---- tiny models ---------------------------------------------------------------------------------------------------


def make_config(version: int, values: dict[str, Any], **overrides: Any) -> Any:
    return CONFIG[version].from_dict({**values, "chatglm_version": version, **overrides})


def causal_lm(version: int) -> Any:
    if version == 1:
        from chatglm.modeling_chatglm import ChatGLM1ForCausalLM

        return ChatGLM1ForCausalLM
    from chatglm.modeling_chatglm2 import ChatGLM2ForCausalLM

    return ChatGLM2ForCausalLM


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Loads an original state dict: only tied weights may be missing, and only rotary buffers left over."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    assert set(missing) <= tied, missing
    assert all(name.endswith("inv_freq") for name in unexpected), unexpected


def build_model(
    version: int,
    values: dict[str, Any],
    state: dict[str, torch.Tensor],
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    model_class: Any = None,
    **overrides: Any,
) -> Any:
    config = make_config(version, values, **overrides)
    config._attn_implementation = attention
    model = (model_class or causal_lm(version))(config)
    load_state(model, state)
    return model.to(dtype).eval()


def golden_model(version: int, folder: str = "model", **options: Any) -> Any:
    """The tiny model of `v{version}/{folder}`: config.json there, weights of `model/`, `extra.safetensors` on top."""
    values = json.loads((find(f"v{version}/{folder}") / "config.json").read_text(encoding="utf-8"))
    state = dict(read_tensors(f"v{version}/model/model.safetensors"))
    if folder != "model":
        state |= read_tensors(f"v{version}/{folder}/extra.safetensors")
    return build_model(version, values, state, **options)


@cache
def weights_recipe() -> ModuleType:
    """The module that computes the weights of the variants and of the stream models from their names."""
    spec = importlib.util.spec_from_file_location("weights_recipe", find("weights_recipe.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_state(shapes: dict[str, Any], seed: int, over: dict[str, float] | None = None) -> dict[str, torch.Tensor]:
    arrays = weights_recipe().make_state_dict(shapes, seed, over)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def variant_model(version: int, name: str, **options: Any) -> Any:
    """A 2-layer variant of generation 2 or 3 (`variants.json`), its weights by the recipe."""
    entry = read_json(f"v{version}/variants.json")[name]
    described = entry if "state_dict" in entry else read_json(f"v{version}/variants.json")["no_qk_scaling"]
    state = recipe_state({key: shape for key, (shape, _) in described["state_dict"].items()}, entry["seed"])
    return build_model(version, entry["config"], state, **options)


def stream_model(version: int, **options: Any) -> Any:
    """The full-vocabulary model behind `stream/v{version}.json`; its tokenizer lies in ../shared/checkpoints."""
    entry = read_json(f"stream/v{version}.json")
    state = {name: torch.from_numpy(array) for name, array in weights_recipe().stream_state_dict(entry).items()}
    return build_model(version, entry["config"], state, **options)


# ---- generation 1's inputs -----------------------------------------------------------------------------------------


def pad_left(prompts: list[list[int]], pad: int) -> torch.Tensor:
    width = max(map(len, prompts))
    return torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])


def tokenizer_inputs_v1(prompts: list[list[int]], config: Any) -> dict[str, torch.Tensor]:
    """Generation 1's tokenizer output for prompts with [gMASK] <sop>: ids, mask [b, 1, t, t], positions."""
    input_ids = pad_left(prompts, config.pad_token_id)
    batch, width = input_ids.shape
    mask = torch.ones(batch, 1, width, width, dtype=torch.bool)
    positions = torch.zeros(batch, 2, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        pads, length, context = width - len(prompt), len(prompt), prompt.index(config.bos_token_id)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[:, :context] = False
        mask[row, 0, pads:, pads:] = hidden
        positions[row, 0, pads:] = torch.arange(length)
        positions[row, 0, pads + context :] = prompt.index(config.gmask_token_id)
        positions[row, 1, pads + context :] = torch.arange(1, length - context + 1)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


@cache
def model_of(version: int, folder: str = "model", attention: str = "sdpa") -> Any:
    """One tiny model per kind for all tests that only read it."""
    return golden_model(version, folder, attention=attention)


def sets_of(version: int) -> tuple[str, ...]:
    """The sets of goldens that this generation has, of SETS."""
    return SETS if version in TUNED else SETS[:1]


def generate_cases(version: int, folder: str, *kinds: str) -> list[dict[str, Any]]:
    """The golden cases of these kinds, at least one; without kinds, all."""
    if folder == "model":
        cases = read_json(f"v{version}/generate.json")["cases"]
    else:
        cases = read_json(f"v{version}/{folder}/golden.json")["generate"]
    found = [entry for entry in cases if not kinds or entry["kind"] in kinds]
    assert found, kinds
    return found
