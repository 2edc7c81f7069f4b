"""`response_format` and tools: restricts the choice of tokens so that answers and arguments follow a JSON schema.

The library llguidance compiles a schema into a grammar over bytes; this module gives it the bytes of every token and
keeps the state of each answer. A grammar is compiled once for a request; each of its choices has a copy.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from ..conversation.call_grammar import CallGrammar
from ..engine import EngineStep
from ..generation import AnswerText, GenerationOptions
from .answers import AssistantMessage, Change
from .errors import ApiError

#: The oldest version that works; with 1.6, our grammars never end.
OLDEST = (1, 9)
#: Limits on characters and references in a schema: the library follows references recursively, on the stack below.
MOST_CHARACTERS, MOST_REFERENCES = 65_536, 256
STACK = 256 * 2**20
#: Bytes of memory that a grammar takes for each character of its schema: large ones took up to 220.
BYTES_PER_CHARACTER = 64
#: Whitespace between two parts of a value: without a limit, a model can repeat it for ever.
BLANKS = r"[ \n\t]{0,32}"
#: In units of the library: at most about 0.1 s to compile, 15 ms per token and 100 MB.
LIMITS = {"initial_lexer_fuel": 1_000_000, "max_lexer_states": 50_000, "max_grammar_size": 200_000}
#: Models learned to begin with a space, because their tokenizers put one before every text.
START = 'start: value | BLANK value\nBLANK: " "\n'


class Vocabulary:
    """The tokens in the form that the library expects.

    Raises:
        ImportError: the library is not installed, or too old.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.library: Any = importlib.import_module("llguidance")
        if tuple(map(int, metadata.version("llguidance").split(".")[:2])) < OLDEST:
            raise ImportError("too old")
        self.pieces: list[bytes] = tokenizer.token_pieces()
        # The attributes that the library reads. In the table, ids of text replace those of equal single bytes.
        stops = tokenizer.chat_format.stop_token_ids(tokenizer)
        self.eos_token_id, self.bos_token_id = stops[0], None
        self.tokens: Sequence[bytes] = self.pieces
        self.special_token_ids: list[int] = []
        names = tokenizer.convert_ids_to_tokens(list(range(len(self.pieces))))
        ids = sorted(range(len(names)), key=lambda index: (not names[index].startswith("<0x"), -index))
        self._ids = {self.pieces[index]: index for index in ids if self.pieces[index]}
        self._longest = max(map(len, self._ids))
        wrapped = self.library.TokenizerWrapper(self)
        slices = self.library.LLTokenizer.json_slices()
        self.compiled = self.library.LLTokenizer(wrapped, n_vocab=len(self.pieces), eos_token=stops, slices=slices)

    def __call__(self, text: bytes) -> list[int]:
        """Encodes exactly the bytes of a part for which the grammar leaves no choice, the longest tokens first."""
        ids, place = [], 0
        while place < len(text):
            sizes = range(min(self._longest, len(text) - place), 0, -1)
            size = next(size for size in sizes if text[place : place + size] in self._ids)
            ids.append(self._ids[text[place : place + size]])
            place += size
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Decodes ids. The tokenizer's `decode` would turn generation 1's `<n>` into a line break even if spelt out."""
        return b"".join([self.pieces[index] for index in ids]).decode(errors="replace")


class Grammars:
    """Compiles the grammars of a server, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None

    def prepare(self, tokenizer: Any) -> None:
        """Builds the vocabulary while the server starts, because it takes 0.2 s and holds the GIL."""
        with contextlib.suppress(ImportError):  # no library: a request that needs it gets the error
            self._prepared(tokenizer)

    def _prepared(self, tokenizer: Any) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(tokenizer)
            return self._vocabulary

    def compile(
        self,
        tokenizer: Any,
        schema: dict[str, Any],
        param: str = "response_format",
        form: Callable[[dict[str, Any]], CallGrammar] | None = None,
    ) -> Grammar:
        """Compiles the grammar of JSON that follows `schema`.

        Args:
            param: the field of the request that asks for it, for errors.
            form: makes the rules for what follows the schema where that is not just JSON: a format's `call_grammar`.

        Raises:
            ApiError: (400) the library is missing, or it cannot handle the schema.
        """
        try:
            vocabulary = self._prepared(tokenizer)
        except ImportError as error:
            reason = f'{param} needs llguidance, which this server lacks: pip install "llguidance>=1.9"'
            raise ApiError(400, reason, param=param, code="unsupported_parameter") from error
        try:
            rules = CallGrammar("value: @schema", {"schema": schema}) if form is None else form(schema)
            return Grammar(vocabulary, self._matcher(vocabulary, rules))
        except ValueError as error:
            raise refusal(str(error), param) from error

    def _matcher(self, vocabulary: Vocabulary, grammar: CallGrammar) -> Any:
        """Raises ValueError with the reason if the library cannot handle the schemas."""
        text = json.dumps(list(grammar.schemas.values()), allow_nan=False)
        references = text.count('"$ref"') + text.count('"$dynamicRef"')
        if max(len(text), len(grammar.rules) // 4) > MOST_CHARACTERS or references > MOST_REFERENCES:
            raise ValueError(f"the schema is larger than {MOST_CHARACTERS} characters and {MOST_REFERENCES} references")
        written = {"x-guidance": {"lenient": False} | (grammar.json_options or {"whitespace_pattern": BLANKS})}
        parts = [{"name": "answer", "lark_grammar": START + grammar.rules}]
        parts += [{"name": name, "json_schema": schema | written} for name, schema in grammar.schemas.items()]
        library, limits = vocabulary.library, vocabulary.library.LLParserLimits(verbose_errors=False, **LIMITS)
        source = json.dumps({"grammars": parts})
        made: list[Any] = []

        def work() -> None:
            made.append(library.LLMatcher(vocabulary.compiled, source, log_level=0, limits=limits))
            # Some faults show only with the first tokens. A space is always allowed; what must follow it is known.
            made.append(made[0].deep_copy())
            if not made[0].is_error() and made[1].consume_tokens(vocabulary(b" ")):
                made[1].compute_bitmask()
                if not made[1].is_error() and made[1].consume_tokens(vocabulary(made[1].compute_ff_bytes())):
                    made[1].compute_bitmask()

        self._run(work)
        reasons = [one.get_error() for one in made if one.is_error()]
        if reasons or len(made) < 2:
            raise ValueError(reasons[0] if reasons else "the library could not read the schema")
        return made[0]

    def _run(self, work: Callable[[], None]) -> None:
        """Runs `work` in a thread whose stack is large enough for the schemas that the limits allow."""
        thread = threading.Thread(target=work, name="chatglm-grammar", daemon=True)
        with self._lock:
            before = threading.stack_size(STACK)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
        thread.join()


def refusal(reason: str, param: str = "response_format") -> ApiError:
    known = {"NoExtensionBias": "nothing follows this schema"}
    reason = reason.replace("<non-verbose/>", "").strip()
    message = f"{param}: {known.get(reason, reason)[:500]}"
    return ApiError(400, message, param=param.partition(".")[0], code="invalid_json_schema")


class Grammar:
    """A compiled grammar."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""
        return self._vocabulary.pieces

    def processor(self, prompt_tokens: int) -> LogitsProcessor:
        """Returns the processor for one answer, which begins after `prompt_tokens` tokens."""
        return Follow(self._matcher.deep_copy(), prompt_tokens)

    def answer(self, tokenizer: Any, options: GenerationOptions) -> AssistantMessage:
        return FormattedMessage(tokenizer, AnswerText(options, self._vocabulary.text))


class Follow(LogitsProcessor):
    """Allows only tokens that continue JSON of the schema, and those that end an answer where it may end."""

    def __init__(self, matcher: Any, prompt_tokens: int) -> None:
        self._matcher, self._read = matcher, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        matcher, said = self._matcher, input_ids[0, self._read :].tolist()
        self._read += len(said)
        # An answer is never taken back: a preempted request reads its tokens again without choosing.
        bits = matcher.compute_bitmask() if not said or matcher.consume_tokens(said) else b""
        if matcher.is_error():
            raise refusal(matcher.get_error())
        allowed = np.zeros(scores.shape[-1], dtype=np.bool_)
        known = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: len(allowed)]
        allowed[: len(known)] = known
        mask = torch.from_numpy(allowed).to(scores.device)
        kept = scores.masked_fill(~mask, float("-inf"))
        if bool(torch.isneginf(kept).all()):  # other processors excluded every allowed token
            kept = torch.zeros_like(scores).masked_fill(~mask, float("-inf"))
        return kept


class FormattedMessage(AssistantMessage):
    """Leaves the text unchanged: a chat's clean-up of punctuation and dates could break the format."""

    def __init__(self, tokenizer: Any, text: AnswerText) -> None:
        super().__init__(tokenizer)
        self._text = text

    def take(self, step: EngineStep) -> Change:
        text = self._text.push(step.token_id, step.finish_reason)[0].lstrip()
        change = Change(text[len(self.content) :])
        self.content = text
        return change
