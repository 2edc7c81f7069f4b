"""The self-checks: what must be equal is computed in two ways, on the bundled demo models.

The reference for all generation is one forward over prompt and answer, without a cache: at every position of the
answer, its likeliest token must be the generated one, and its logits those from which that was chosen. It does not
use transformers' `generate`.
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from ..adapters import add_lora, add_prefix, merge_lora, save_adapter
from ..checkpoints.clues import VISUAL
from ..conversation import stop_token_ids
from ..demo import FOLDERS, VISION
from ..loading import load
from ..quantization import QuantizedLinear
from .findings import Finding, cure_for, one_line
from .messages import say
from .versions import Library

#: A conversation that all of the demo models know by heart.
TURNS = (("你好", "你好！我是ChatGLM小演示，能帮你什么？"), ("17+25", "17+25=30+12=42"))
#: What the demo that sees says of a blue square.
ABOUT_PICTURE = (("What colour is it?", "Blue."), ("是什么形状？", "正方形。"))
UNSURE = "zebra 7"  # none knows an answer to it: beams overtake each other
TEXTS = ("Hello, world! 1+1=2", "你好 ChatGLM", "a\tb\n\n  c   d", "🤖 ünïcode 龘", "<|user|> [gMASK]")
KNOWN_IDS = {  # of TEXTS[1]
    1: [5, 219, 103, 2145, 2148],
    3: [2401, 2403, 259, 534, 259, 404],
    4: [3002, 3004, 477, 32, 694],
}
LIMIT = 24  # tokens of an answer: those above are shorter
BEAMS = 3
TOLERANCE = 2e-3  # of the logits, relative to the largest: quantised products round activations to 14 bits (1e-4 each)
EXACT = 1e-4  # the same, for sums in another order
SCORE = 1e-3  # of the score of a beam, absolute


class Wrong(Exception):
    """A failed check, as a key of the doctor's texts and the values for its placeholders."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(key)
        self.key, self.values = key, values


class NotInstalled(Exception):
    """The check is for a library that is not installed and not required."""


@dataclass
class Patient:
    """A demo model in float32 on the device that is checked."""

    folder: Path
    generation: int
    device: str
    libraries: list[Library]

    def fresh(self, **options: Any) -> tuple[Any, Any]:
        return load(self.folder, self.device, "float32", **options)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return self.fresh()

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self.loaded[1]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The prompt ids of each question alone, and of the last one with its history; their lengths differ."""
        (first, answer), (second, _) = TURNS
        turn = [{"role": "user", "content": first}, {"role": "assistant", "metadata": "", "content": answer}]
        before = self.tokenizer.chat_format.from_messages(turn)
        asked: list[tuple[str, list[Any]]] = [(first, []), (second, []), (second, before)]
        return [self.model.prepare_turn(self.tokenizer, question, history)[0] for question, history in asked]

    def generate(self, model: Any, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], Any]:
        """Runs transformers' `generate`; returns each answer up to the token that ends it, and the whole output."""
        batch = self.tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(model.device)
        stops, width = stop_token_ids(self.tokenizer), batch["input_ids"].shape[1]
        options = {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": stops} | options
        with torch.no_grad():
            output = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
        return [up_to_stop(row, stops) for row in output.sequences[:, width:].tolist()], output

    def expect_greedy(self, model: Any, prompts: list[list[int]], **options: Any) -> None:
        """Raises Wrong if `generate` gives other tokens than recomputing, or the same from other logits."""
        answers, output = self.generate(model, prompts, **options)
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            logits = self.expect_likeliest(model, prompt, answer)
            steps = torch.stack([step[index] for step in output.logits[: len(answer)]])
            expect_close(steps.float().cpu(), logits, EXACT)

    def expect_likeliest(self, model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Raises Wrong unless every token is the likeliest after all those before it.

        Returns:
            (tokens of the answer, vocabulary): the logits, recomputed, on the CPU.
        """
        logits = recompute(model, prompt + answer)[len(prompt) - 1 : -1]
        if logits.argmax(-1).tolist() != answer:
            raise Wrong("instead", came=self.text(answer), wanted=self.text(self.greedy(model, prompt)))
        return logits

    def greedy(self, model: Any, prompt: list[int]) -> list[int]:
        """Returns the right answer, for the message: every token is computed from the whole sequence."""
        stops, answer = stop_token_ids(self.tokenizer), list[int]()
        while len(answer) < LIMIT and not (answer and answer[-1] in stops):
            answer.append(int(recompute(model, prompt + answer)[-1].argmax()))
        return answer

    def text(self, ids: list[int]) -> str:
        return shorten(self.tokenizer.decode(ids))

    def logits(self, model: Any) -> torch.Tensor:
        """(tokens, vocabulary) of the longest prompt, on the CPU."""
        return recompute(model, self.prompts[-1])


def recompute(model: Any, ids: list[int]) -> torch.Tensor:
    """Returns the logits (tokens, vocabulary) of one forward over a sequence, in float32 on the CPU."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return found.float().cpu()


def up_to_stop(row: list[int], stops: Iterable[int]) -> list[int]:
    ends = [index for index, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


def expect_close(came: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Raises Wrong if the largest difference of logits is more than `tolerance` times the largest of them."""
    error = ((came - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= tolerance:  # NaN, too
        raise Wrong("differs", what="logits", error=error)


def expect_text(came: Any, wanted: str) -> None:
    if came != wanted:
        raise Wrong("instead", came=shorten(str(came)), wanted=shorten(wanted))


def shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


# ---- the checks ------------------------------------------------------------------------------------------------------


def check_load(patient: Patient) -> None:
    found = patient.model.config.chatglm_version
    if found != patient.generation:
        raise Wrong("instead", came=found, wanted=patient.generation)


def check_tokenizer(patient: Patient) -> None:
    tokenizer = patient.tokenizer
    for text in TEXTS:
        expect_text(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)), text)
    ids = tokenizer.encode(TEXTS[1])
    if ids != KNOWN_IDS[patient.generation]:
        raise Wrong("instead", came=ids, wanted=KNOWN_IDS[patient.generation])


def check_chat(patient: Patient) -> None:
    history: list[Any] = []
    for question, wanted in TURNS:
        answer, history = patient.model.chat(patient.tokenizer, question, history, do_sample=False)
        expect_text(answer, wanted)


def check_stream_chat(patient: Patient) -> None:
    question, wanted = TURNS[1]
    pieces = [piece for piece, _ in patient.model.stream_chat(patient.tokenizer, question, [], do_sample=False)]
    expect_text(pieces[-1] if pieces else "", wanted)
    if len(pieces) < 3:
        raise Wrong("no_pieces")


def check_sees(patient: Patient) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((35, 70, 215), (16, 16, 48, 48))
    for question, wanted in ABOUT_PICTURE:
        answer, _ = patient.model.chat(patient.tokenizer, picture, question, do_sample=False)
        expect_text(answer, wanted)
        *_, (streamed, _) = patient.model.stream_chat(patient.tokenizer, picture, question, do_sample=False)
        expect_text(streamed, wanted)


def check_generate(patient: Patient) -> None:
    for prompt in patient.prompts:
        patient.expect_greedy(patient.model, [prompt])


def check_generate_uncached(patient: Patient) -> None:
    patient.expect_greedy(patient.model, patient.prompts[-1:], use_cache=False)


def check_batch(patient: Patient) -> None:
    patient.expect_greedy(patient.model, patient.prompts)


def check_beams(patient: Patient) -> None:
    """Compares beams with a cache to those without, and their scores to recomputed ones."""
    options = {"num_beams": BEAMS, "num_return_sequences": BEAMS, "max_new_tokens": LIMIT // 2, "length_penalty": 0.0}
    prompt = patient.model.prepare_turn(patient.tokenizer, UNSURE, [])[0]
    cached, output = patient.generate(patient.model, [prompt], output_scores=True, **options)
    uncached, _ = patient.generate(patient.model, [prompt], use_cache=False, **options)
    for one, other in zip(cached, uncached, strict=True):
        if one != other:
            raise Wrong("instead", came=patient.text(one), wanted=patient.text(other))
    for answer, score in zip(cached, output.sequences_scores.tolist(), strict=True):
        chances = recompute(patient.model, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1)
        wanted = chances.gather(-1, torch.tensor(answer)[:, None]).sum().item()
        if not abs(score - wanted) <= SCORE:
            raise Wrong("differs", what="scores", error=abs(score - wanted))


def check_quantised(patient: Patient, bits: int) -> None:
    """Compares the logits of a prompt, and an answer, which uses the kernels for single tokens."""
    small, _ = patient.fresh(quantize=bits)
    large, _ = patient.fresh()
    for name, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            large.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    expect_close(patient.logits(small), patient.logits(large), TOLERANCE)
    steps = list(small.stream_steps(patient.tokenizer, TURNS[1][0], [], do_sample=False, max_new_tokens=LIMIT))
    answer = [step.token_id for step in steps if step.token_id is not None]
    patient.expect_likeliest(large, patient.prompts[1], answer)


def check_saved(patient: Patient) -> None:
    with tempfile.TemporaryDirectory() as folder:
        patient.model.save_pretrained(folder)
        patient.tokenizer.save_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(patient.model.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    state = model.state_dict()
    for name, tensor in patient.model.state_dict().items():
        if not torch.equal(state[name], tensor):
            raise Wrong("differs", what="weights", error=(state[name] - tensor).abs().max().item())
    question, wanted = TURNS[1]
    expect_text(model.chat(tokenizer, question, [], do_sample=False)[0], wanted)


def check_prefix(patient: Patient) -> None:
    plain = patient.logits(patient.model)
    model, _ = patient.fresh()
    add_prefix(model, 4, name="doctor")
    tuned = patient.logits(model)
    if torch.equal(tuned, plain):
        raise Wrong("no_effect")
    patient.expect_greedy(model, patient.prompts[1:2])
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        again, _ = patient.fresh(adapter=folder)
    expect_close(patient.logits(again), tuned, EXACT)
    with again.adapter(None):
        expect_close(patient.logits(again), plain, EXACT)


def check_lora(patient: Patient) -> None:
    library = next((one for one in patient.libraries if one.name == "peft"), None)
    if library is not None and library.found is None:
        raise NotInstalled("peft")
    import peft

    plain = patient.logits(patient.model)
    model, _ = patient.fresh()
    add_lora(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value"]), "doctor")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # zeros: LoRA starts without an effect
            torch.nn.init.normal_(parameter.data, std=0.1)
    tuned = patient.logits(model)
    if torch.equal(tuned, plain):
        raise Wrong("no_effect")
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        again, _ = patient.fresh(adapter=folder)
    expect_close(patient.logits(again), tuned, EXACT)
    with again.adapter(None):
        expect_close(patient.logits(again), plain, EXACT)
    expect_close(patient.logits(merge_lora(model)), tuned, EXACT)


#: Name, function, and the libraries involved, the likeliest culprit first.
Check = tuple[str, Callable[[Patient], None], tuple[str, ...]]
CHECKS: tuple[Check, ...] = (
    ("load", check_load, ("transformers", "safetensors", "torch")),
    ("tokenizer", check_tokenizer, ("transformers", "sentencepiece")),
    ("chat", check_chat, ("transformers", "torch")),
    ("stream_chat", check_stream_chat, ("transformers", "torch")),
    ("generate", check_generate, ("transformers", "torch")),
    ("generate_uncached", check_generate_uncached, ("transformers", "torch")),
    ("batch", check_batch, ("transformers", "torch")),
    ("beams", check_beams, ("transformers", "torch")),
    ("int8", lambda patient: check_quantised(patient, 8), ("transformers", "torch")),
    ("int4", lambda patient: check_quantised(patient, 4), ("transformers", "torch")),
    ("saved", check_saved, ("transformers", "safetensors", "accelerate")),
    ("prefix", check_prefix, ("transformers", "safetensors", "torch")),
    ("lora_adapter", check_lora, ("peft", "transformers")),
)

#: Those of the demo that sees.
PICTURE_CHECKS: tuple[Check, ...] = (CHECKS[0], ("sees", check_sees, ("transformers", "torch", "pillow")))


def run_checks(language: str, device: str, libraries: list[Library], verbose: bool = False) -> Iterator[Finding]:
    """Runs every check on the demo model of every generation; yields each finding at once. A fault raises nothing.

    Args:
        device: as in `chatglm.load`.
        verbose: print tracebacks and the libraries' messages to standard error.
    """
    with _quiet_libraries(verbose), torch.random.fork_rng():
        torch.manual_seed(0)
        for generation, folder in FOLDERS.items():
            yield from _examine(Patient(folder, generation, device, libraries), CHECKS, language, verbose)
        yield from _examine(Patient(VISION, VISUAL, device, libraries), PICTURE_CHECKS, language, verbose)


@contextlib.contextmanager
def _quiet_libraries(verbose: bool) -> Iterator[None]:
    """Silences their progress bars, warnings and log: deprecations concern maintainers only. And uses one thread: the
    models are so small that more threads only wait for each other."""
    level, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    with warnings.catch_warnings():
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        if not verbose:
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _examine(patient: Patient, checks: Iterable[Check], language: str, verbose: bool) -> Iterator[Finding]:
    loaded = True
    for name, check, packages in checks:
        start = perf_counter()
        status, text, cure = "ok", "", None
        try:
            if not loaded:
                raise Wrong("not_run")
            check(patient)
        except NotInstalled as missing:
            status, text = "skipped", say("version_absent", language, name=missing, extra=say("lora", language))
        except Exception as error:
            if not loaded:
                status, text = "skipped", say("not_run", language)
            else:
                status, cure = "wrong", cure_for(packages, patient.libraries)
                text = _words(error, language)
                if verbose and not isinstance(error, Wrong):
                    traceback.print_exc()
        key = "pictures" if patient.generation == VISUAL else "generation"
        label = say(key, language, generation=patient.generation, text=say(name, language))
        seconds = round(perf_counter() - start, 2)
        text = f"{label}: {text}" if text else label
        yield Finding(name, status, text, cure, seconds, {"generation": patient.generation})
        loaded = loaded and not (name == "load" and status == "wrong")


def _words(error: Exception, language: str) -> str:
    if not isinstance(error, Wrong):
        return one_line(error)
    values = dict(error.values)
    if "what" in values:
        values["what"] = say(str(values["what"]), language)
    return say(error.key, language, **values)
