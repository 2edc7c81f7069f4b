"""How much memory a training run takes, told before anything is loaded.

The run is rehearsed: the very model that would be trained is built from its config with tensors that have a shape but
no memory, one training step goes through it, and every allocation is written into a ledger. So the figure follows what
the code does - which activations stay for the backward pass, when the logits go, what gradient checkpointing drops -
instead of a formula that has to be kept true by hand. A model of 6 billion parameters takes a few seconds. Where the
run evaluates, a batch of that is rehearsed, too: with more rows than a training step has, it may be the higher peak.

Two things are no tensors of the step and are added: what Python and its libraries take (`LIBRARIES`), and what torch's
operators allocate inside themselves (`_inside`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from chatglm import quantization
from chatglm.adapters import add_lora
from chatglm.kernels.reference import BLOCK
from chatglm.loading import DTYPES, MODELS
from chatglm.memory import readable

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Advice",
    "Estimate",
    "Evaluation",
    "Settings",
    "advice",
    "estimate",
    "training_steps",
]

METHODS = ("ptuning", "lora", "full")

#: Optimizers whose memory is known, by transformers' names; any other one is taken for AdamW in plain torch.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "adafactor", "sgd")
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit")

#: What main.py takes besides the tensors. On a CPU measured: Python, torch, transformers, peft and datasets (470 MiB),
#: and what Trainer and accelerate bring when they start. On a GPU an assumption: the CUDA context, and the kernels of
#: the libraries.
LIBRARIES = {"cpu": 530 * 2**20, "cuda": 600 * 2**20}
#: jieba, rouge-chinese and nltk, where answers are scored (measured; jieba's dictionary comes after training).
METRICS = {"cpu": 66 * 2**20, "cuda": 0}
#: What comes to that in the first steps: 28 MiB of code that is loaded when it is needed, and freed memory that the C
#: library keeps: it gives back only what lies at the end of its heap (30 to 90 MiB together in the runs measured).
RUNNING = {"cpu": 70 * 2**20, "cuda": 0}

#: The parts of an estimate: name -> (English, Chinese).
PARTS = {
    "weights": ("frozen weights", "冻结的权重"),
    "trainable": ("trained weights", "训练的权重"),
    "gradients": ("gradients", "梯度"),
    "optimizer": ("optimizer states", "优化器状态"),
    "activations": ("activations", "激活值"),
    "logits": ("logits and loss", "logits 与损失"),
    "buffers": ("temporary buffers", "临时缓冲区"),
    "evaluation": ("evaluation", "评估"),
    "libraries": ("Python and libraries", "Python 与库"),
}


@dataclass(frozen=True)
class Evaluation:
    """A batch of what a run evaluates, the longest rows there are: lengths in tokens."""

    batch_size: int
    length: int  # prompt and answer, for the loss
    generated: int = 0  # prompt and new answer; 0 where no answers are generated
    beams: int = 1


@dataclass(frozen=True)
class Settings:
    """What decides about the memory of a run; see `estimate`."""

    method: str
    batch_size: int
    sequence_length: int
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("query_key_value",)
    quantize: int | None = None
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = True
    gradient_accumulation: int = 1
    optimizer: str = "adamw_torch_fused"
    world_size: int = 1
    zero_stage: int = 0
    offload: bool = False
    device: str = "cpu"
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: use one of {', '.join(METHODS)}")
        if self.device not in LIBRARIES:
            raise ValueError(f"device is {self.device!r}: use {' or '.join(LIBRARIES)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage!r}: use 0 (no DeepSpeed), 1, 2 or 3")
        if self.quantize not in (None, 4, 8):
            raise ValueError(f"quantize is {self.quantize!r}: use 4, 8, or None for no quantisation")
        if self.quantize and self.method == "full":
            raise ValueError("quantised weights are frozen: full tuning needs quantize=None")
        if self.method == "ptuning" and not self.pre_seq_len:
            raise ValueError("P-tuning needs pre_seq_len, the number of trained positions (the originals take 128)")
        for name in ("batch_size", "sequence_length", "gradient_accumulation", "world_size", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it starts at 1")
        if self.offload and self.zero_stage < 1:
            raise ValueError("offloading the optimizer to the CPU is DeepSpeed's: give a zero_stage of 1, 2 or 3")


@dataclass(frozen=True)
class Estimate:
    """The peak of a training step, in bytes per part, on each device of the run."""

    settings: Settings
    parameters: int
    trainable_parameters: int
    parts: dict[str, int]  # by the names of PARTS
    # Pages of the checkpoint file that lie in memory besides, on a CPU that changes their type: while loading, and
    # afterwards. The system takes them back when memory is short, so they are not in the total.
    file_while_loading: int
    file_while_training: int
    config: Any = dataclasses.field(repr=False, compare=False)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """The peak that the system reports where there is memory enough for the pages of the file, too."""
        loaded = sum(self.parts[name] for name in ("weights", "trainable", "libraries"))
        return max(loaded + self.file_while_loading, self.total + self.file_while_training)

    @property
    def trainable(self) -> int:
        """Bytes of the trained weights."""
        return self.parts["trainable"]

    def text(self, lang: str = "en") -> str:
        """A table for people, in English ("en") or Chinese ("zh")."""
        chinese = _chinese(lang)
        share = f"{self.trainable_parameters / self.parameters:.4%}"
        if chinese:
            lines = [
                f"参数：{self.parameters:,}，其中训练 {self.trainable_parameters:,}（{share}）",
                "峰值内存（每个设备）：" if self.settings.world_size > 1 else "峰值内存：",
            ]
        else:
            lines = [
                f"Parameters: {self.parameters:,}, of which {self.trainable_parameters:,} are trained ({share})",
                "Peak memory of each device:" if self.settings.world_size > 1 else "Peak memory:",
            ]
        rows = [(PARTS[name][chinese], readable(size)) for name, size in self.parts.items() if size >= 2**19]
        rows.append(("合计" if chinese else "in all", readable(self.total)))
        width = max(_width(name) for name, _ in rows)
        lines += [f"  {name}{' ' * (width - _width(name))}  {size:>10}" for name, size in rows]
        if self.settings.device == "cpu":
            lines.append(self._in_top(chinese))
        return "\n".join(lines)

    def _in_top(self, chinese: bool) -> str:
        """What tools that show processes will say."""
        seen, pages = readable(self.resident), readable(self.resident - self.total)
        line = f"top 的 RES 最高约 {seen}" if chinese else f"top will show up to {seen} (RES)"
        if self.resident > 1.02 * self.total:
            line += (
                f"，其中至多 {pages} 是检查点文件的缓存页，内存不足时系统会收回"
                if chinese
                else f": up to {pages} of it are pages of the checkpoint file, given back when memory is short"
            )
        return line

    def advice(self, available: int) -> list[Advice]:
        """See `advice`."""
        return advice(self, available)


@dataclass(frozen=True)
class Advice:
    """One change of the settings, and what becomes of the peak."""

    english: str
    chinese: str
    total: int  # bytes after the change
    gain: int  # bytes that it saves
    fits: bool

    def text(self, lang: str = "en") -> str:
        if _chinese(lang):
            return f"{self.chinese}：省 {readable(self.gain)}，剩 {readable(self.total)}{'，可以放下' * self.fits}"
        return f"{self.english}: saves {readable(self.gain)}, leaves {readable(self.total)}{', which fits' * self.fits}"


def estimate(config: Any, *, dtype: str | torch.dtype = "float32", **settings: Any) -> Estimate:
    """The peak memory of training the model of `config`, without its weights.

    Args:
        config: a ChatGLM config of any generation; it is not changed.
        dtype: what the model computes in, a torch.dtype or its name. The trained prefix and LoRA stay in float32, and
            so do the weights of full tuning (autocast computes in `dtype`), except with a `zero_stage`: DeepSpeed holds
            them in `dtype`, with a float32 copy among the optimizer's states.
        method: "ptuning" (with `pre_seq_len`, `prefix_projection`), "lora" (with `lora_rank`, `lora_targets`), "full".
        batch_size, sequence_length: of one forward pass on one device: `sequence_length` counts prompt and answer.
        quantize: 4 or 8 for a quantised frozen base.
        gradient_checkpointing: keep only the inputs of each block for the backward pass.
        gradient_accumulation: forward passes for one optimizer step.
        optimizer: one of OPTIMIZERS, or another name that transformers knows.
        world_size, zero_stage, offload: devices that train together; DeepSpeed's stage (0 for plain data parallelism);
            optimizer states in main memory.
        device: "cpu" or "cuda".
        evaluation: what is evaluated before, during or after training, if anything is.

    Raises:
        ValueError: settings that do not go together.
        ImportError: LoRA is asked for and peft is not installed.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    present = quantization.settings_of(config)
    if present is not None:
        settings.setdefault("quantize", present.bits)
    return _estimate(config, Settings(dtype=dtype, **settings))


def training_steps(
    rows: int,
    *,
    batch_size: int,
    gradient_accumulation: int = 1,
    world_size: int = 1,
    epochs: float = 3.0,
    max_steps: int = -1,
) -> int:
    """Optimizer steps of a run, as transformers' Trainer counts them; `max_steps` above 0 decides alone."""
    if max_steps > 0:
        return max_steps
    batches = math.ceil(rows / (batch_size * world_size))
    return math.ceil(epochs * max(1, math.ceil(batches / gradient_accumulation)))


# ---- the rehearsal ---------------------------------------------------------------------------------------------------


def _estimate(config: Any, settings: Settings) -> Estimate:
    ledger = _Ledger(config.vocab_size, _shares(settings))
    with torch.device("meta"), no_init_weights():
        model = build(config, settings)
    with FakeTensorMode(), ledger:
        _materialise(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            ledger.move(parameter, "trainable")
        states = _optimizer_states(trained, settings, ledger)
        gradients = ledger.watch_gradients(trained)
        for _ in range(min(settings.gradient_accumulation, 2)):
            step(model, settings, on_forward=lambda: ledger.tag_as("activations"))
        ledger.touch("buffers", _step_copies(trained, settings))
        model.zero_grad()
        if settings.evaluation is not None:
            ledger.tag_as("evaluation")
            _evaluate(model, settings, settings.evaluation)
        parts = {name: int(ledger.at_peak.get(name, 0)) for name in PARTS}
        del gradients, states
        quantized = _quantized_numbers(model)
        scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_scale"))
        stored = sum(p.numel() for p in parameters if p.dtype == torch.int8)
        total = sum(p.numel() for p in parameters) - stored - scales + quantized
        trainable = sum(p.numel() for p in trained)
    parts["buffers"] += _communication(trained, parameters, settings)
    parts["libraries"] = LIBRARIES[settings.device] + RUNNING[settings.device]
    if settings.evaluation is not None and settings.evaluation.generated:
        parts["libraries"] += METRICS[settings.device]
    in_file = total if settings.method == "full" else total - trainable
    pages = _file_pages(config, in_file, quantized, settings)
    return Estimate(settings, total, trainable, parts, *pages, config)


def build(config: Any, settings: Settings) -> Any:
    """A model with fresh weights as training would have it: type, quantisation, prefix or LoRA, what is frozen."""
    config = copy.deepcopy(config)
    config.pre_seq_len = settings.pre_seq_len if settings.method == "ptuning" else None
    config.prefix_projection = settings.prefix_projection
    with _default_dtype(_kept_dtype(settings)):
        model = MODELS[config.chatglm_version](config)
        model.tie_weights()  # left out where nothing is initialised
        if settings.quantize and quantization.settings_of(config) is None:
            quantization.apply(model, quantization.ChatGLMQuantizationConfig(settings.quantize), empty=True)
    if settings.method == "ptuning":
        model.transformer.prefix_encoder.float()
    if settings.gradient_checkpointing:
        checkpoint(model)
    if settings.method == "lora":
        return _with_lora(model, settings)
    return model.train()


def _kept_dtype(settings: Settings) -> torch.dtype:
    """Of the weights that are not quantised."""
    return torch.float32 if settings.method == "full" and not settings.zero_stage else settings.dtype


def _materialise(model: nn.Module) -> None:
    """Tensors without a device become those of the rehearsal; what was shared stays shared."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                tensors[name] = made[tensor]


def checkpoint(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.20 or so
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _with_lora(model: PreTrainedModel, settings: Settings) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install -r ptuning/requirements.txt") from error
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_rank, lora_dropout=0.1, target_modules=list(settings.lora_targets)
    )
    add_lora(model, lora)
    return model.train()


def step(model: Any, settings: Settings, on_forward: Callable[[], None] = lambda: None) -> None:
    """One forward and backward pass over zeros."""
    on_forward()
    ids = torch.zeros(settings.batch_size, settings.sequence_length, dtype=torch.long)
    with _autocast(settings):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def _autocast(settings: Settings) -> AbstractContextManager[Any]:
    if settings.method == "full" and not settings.zero_stage and settings.dtype != torch.float32:
        return torch.autocast("cpu", settings.dtype)
    return nullcontext()


def _evaluate(model: Any, settings: Settings, plan: Evaluation) -> None:
    """What `Tuner.prediction_step` does: the loss row by row from all logits, then answers with a cache."""
    model.eval()
    with torch.no_grad(), _autocast(settings):
        ids = torch.zeros(plan.batch_size, plan.length, dtype=torch.long)
        logits = model(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
        del logits
        if plan.generated:
            # At once, where `generate` goes on token by token from the prompt: it is the cache that counts.
            ids = torch.zeros(plan.batch_size * plan.beams, plan.generated, dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            if plan.beams > 1:
                cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long))


class _Ledger(TorchDispatchMode):
    """Follows every tensor from its allocation to its end, and keeps what was there at the highest point."""

    def __init__(self, vocab_size: int, shares: dict[str, float]) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._shares = shares  # of a part, what one device of many holds
        self._entries: dict[int, tuple[str, int]] = {}
        self._live: Counter[str] = Counter()
        self._tag: str | None = "weights"
        self.peak = 0.0
        self.at_peak: dict[str, float] = {}

    def tag_as(self, tag: str) -> None:
        """What new tensors are, except those that a backward pass makes."""
        self._tag = tag

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # positions and checks that the model looks at: there is nothing in the tensors
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        for tensor in made:
            self._enter(tensor)
        self.touch("buffers", _inside(func, args))
        return out

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return
        tag = self._tag or "weights"
        if tag == "activations":
            if tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size:
                tag = "logits"
            elif not torch.is_grad_enabled():  # backward, except where a checkpointed block is computed again
                tag = "buffers"
        self._entries[key] = (tag, storage.nbytes())
        weakref.finalize(storage, self._leave, key)
        self._live[tag] += storage.nbytes()
        self._look()

    def _leave(self, key: int) -> None:
        tag, size = self._entries.pop(key)
        self._live[tag] -= size

    def move(self, tensor: torch.Tensor, tag: str) -> None:
        """The tensor turned out to be of another part."""
        key = tensor.untyped_storage()._cdata
        if key in self._entries:
            old, size = self._entries[key]
            self._entries[key] = (tag, size)
            self._live[old] -= size
            self._live[tag] += size

    def watch_gradients(self, parameters: list[nn.Parameter]) -> list[Any]:
        def arrived(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self.move(parameter.grad, "gradients")

        return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]

    def touch(self, tag: str, size: int) -> None:
        """Memory that is taken and given back at once."""
        if size:
            self._live[tag] += size
            self._look()
            self._live[tag] -= size

    def _look(self) -> None:
        total = sum(size * self._shares.get(tag, 1.0) for tag, size in self._live.items())
        if total > self.peak:
            self.peak = total
            self.at_peak = {tag: size * self._shares.get(tag, 1.0) for tag, size in self._live.items()}


def _inside(func: Any, args: tuple[Any, ...]) -> int:
    """What an operator allocates for itself: blocks of a quantised matrix that are expanded for a product."""
    if func is torch.ops.chatglm.quantized_linear.default:
        x, weight = args[0], args[1]
        numbers = min(BLOCK, weight.shape[0] * x.shape[-1])
        return int(numbers * max(4, x.element_size()))
    return 0


def _shares(settings: Settings) -> dict[str, float]:
    """What of each part one device holds under DeepSpeed's ZeRO."""
    part = 1 / settings.world_size
    shares = {}
    if settings.zero_stage >= 1:
        shares["optimizer"] = 0.0 if settings.offload else part
    if settings.zero_stage >= 2:
        shares["gradients"] = part
    if settings.zero_stage >= 3:
        shares["weights"] = shares["trainable"] = part
    return shares


def _optimizer_states(trained: list[nn.Parameter], settings: Settings, ledger: _Ledger) -> list[torch.Tensor]:
    """Tensors as large as what the optimizer keeps from its first step on."""
    ledger.tag_as("optimizer")
    sizes = [int(_state_bytes(parameter, settings)) for parameter in trained]
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def _state_bytes(parameter: nn.Parameter, settings: Settings) -> float:
    kept = settings.zero_stage > 0 and parameter.element_size() < 4
    width = 4 if settings.zero_stage else parameter.element_size()  # DeepSpeed steps in float32
    master = 4 * parameter.numel() * kept
    if settings.optimizer in EIGHT_BIT:
        return master + 2.03 * parameter.numel()  # a byte for each of two moments, and a scale for each block of them
    if settings.optimizer == "adafactor":  # sums over rows and over columns instead of the second moment
        rows = parameter.numel() // parameter.shape[-1] if parameter.dim() > 1 else 0
        return master + 4.0 * (rows + parameter.shape[-1])
    if settings.optimizer == "sgd":
        return master
    return master + 2 * width * parameter.numel()


def _step_copies(trained: list[nn.Parameter], settings: Settings) -> int:
    """What an optimizer step allocates: an unfused one a copy, of all at once on a GPU, else of one at a time."""
    if settings.optimizer in ("adamw_torch_fused", "sgd", *EIGHT_BIT) or settings.zero_stage or not trained:
        return 0
    sizes = [4 * parameter.numel() for parameter in trained]
    if settings.device == "cuda" and settings.optimizer == "adamw_torch":
        return sum(sizes)
    return 2 * max(sizes)


def _communication(trained: list[nn.Parameter], parameters: list[nn.Parameter], settings: Settings) -> int:
    """Buckets in which gradients and weights travel between devices: DDP's copies, DeepSpeed's sizes of our configs."""
    if settings.world_size == 1:
        return 0
    numbers = sum(parameter.numel() for parameter in trained)
    if settings.zero_stage == 0:
        return sum(parameter.numel() * parameter.element_size() for parameter in trained)
    bucket = min(numbers, 500_000_000) * settings.dtype.itemsize
    if settings.zero_stage < 3:
        return 2 * bucket
    gathered = min(sum(parameter.numel() for parameter in parameters), 1_000_000_000) * settings.dtype.itemsize
    return bucket + gathered


def _file_pages(config: Any, parameters: int, quantized: int, settings: Settings) -> tuple[int, int]:
    """Weights that stay as they are lie in memory as the file does; others are copies, made beside it."""
    stored = getattr(config, "dtype", None)
    stored = DTYPES.get(stored) if isinstance(stored, str) else stored
    if settings.device != "cpu" or stored is None or quantization.settings_of(config) is not None:
        return 0, 0
    if stored == _kept_dtype(settings):
        # Without quantisation nothing is copied; with it, what is not quantised keeps the whole file open.
        return quantized * stored.itemsize, quantized * stored.itemsize
    return parameters * stored.itemsize, 0


def _quantized_numbers(model: nn.Module) -> int:
    """How many numbers the quantised weights hold, several of which may share a byte."""
    found = {
        id(module.weight): module.weight.numel() * 8 // module.bits
        for module in model.modules()
        if isinstance(module, (quantization.QuantizedLinear, quantization.QuantizedEmbedding))
    }
    return sum(found.values())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---- what to change --------------------------------------------------------------------------------------------------


def advice(found: Estimate, available: int) -> list[Advice]:
    """Changes that save memory, the mildest first; empty where `available` bytes are enough.

    Each is for itself, against the present settings.
    """
    if found.total <= available:
        return []
    now = found.settings
    changes: list[tuple[str, str, dict[str, Any]]] = []
    if not now.gradient_checkpointing:
        changes.append(("turn gradient checkpointing on", "打开梯度检查点", {"gradient_checkpointing": True}))
    if now.batch_size > 1:
        more = now.batch_size * now.gradient_accumulation
        changes.append((
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more} (the same result)",
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {more}（结果相同）",
            {"batch_size": 1, "gradient_accumulation": more},
        ))  # fmt: skip
    if now.evaluation is not None and now.evaluation.batch_size > 1:
        one = dataclasses.replace(now.evaluation, batch_size=1)
        flag = "--per_device_eval_batch_size 1"
        changes.append((f"{flag} (the same result)", f"{flag}（结果相同）", {"evaluation": one}))
    if now.dtype == torch.float32 and now.method != "full":
        changes.append(("compute in bfloat16", "用 bfloat16 计算", {"dtype": torch.bfloat16}))
    for bits in (8, 4):
        if now.method != "full" and (now.quantize or 16) > bits:
            changes.append((f"--quantization_bit {bits}", f"--quantization_bit {bits}", {"quantize": bits}))
    if now.method == "full":
        if now.optimizer not in (*EIGHT_BIT, "adafactor", "sgd"):
            smaller = ("adamw_bnb_8bit", "adafactor") if now.device == "cuda" else ("adafactor",)
            changes += [(f"--optim {name}", f"--optim {name}", {"optimizer": name}) for name in smaller]
        if now.device == "cuda":
            changes += _more_devices(now)
        changes.append(("train LoRA instead of all weights", "用 LoRA 代替全参数微调", {"method": "lora"}))
    half = now.sequence_length // 2
    if half >= 32:
        changes.append((
            f"sequences of {half} tokens instead of {now.sequence_length}",
            f"序列长度从 {now.sequence_length} 减到 {half}",
            {"sequence_length": half},
        ))  # fmt: skip
    result = []
    for english, chinese, values in changes:
        total = _estimate(found.config, dataclasses.replace(now, **values)).total
        if total < found.total:
            result.append(Advice(english, chinese, total, found.total - total, total <= available))
    return result


def _more_devices(now: Settings) -> list[tuple[str, str, dict[str, Any]]]:
    devices = max(now.world_size, 4)
    dtype = torch.bfloat16 if now.dtype == torch.float32 else now.dtype
    changes: list[tuple[str, str, dict[str, Any]]] = []
    for stage, offload in ((2, False), (3, False), (3, True)):
        changes.append((
            f"DeepSpeed ZeRO-{stage} on {devices} GPUs{' with the optimizer in main memory' * offload}",
            f"DeepSpeed ZeRO-{stage}，{devices} 张显卡{'，优化器放在内存' * offload}",
            {"dtype": dtype, "world_size": devices, "zero_stage": stage, "offload": offload},
        ))  # fmt: skip
    return changes


def _chinese(lang: str) -> bool:
    if lang not in ("en", "zh"):
        raise ValueError(f"lang is {lang!r}: use 'en' or 'zh'")
    return lang == "zh"


def _width(text: str) -> int:
    """Columns in a terminal: a Chinese character takes two."""
    return sum(2 if ord(character) > 0x2E7F else 1 for character in text)
