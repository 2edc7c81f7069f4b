"""The chat model of VisualGLM-6B: chat() and stream_chat() about a picture, with the original's signatures."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .chat_methods import ChatMixin
from .conversation.visualglm import VisualGLMFormat
from .decoding.options import PlacedPicture
from .generation import GenerationOptions, weights_stamp
from .modeling_visualglm import VisualGLMForCausalLM
from .pictures import pixels_of, read_picture

#: How many pictures a model remembers the embeddings of: the questions of a conversation are about one.
_REMEMBERED = 8
#: The original's default of `min_length`.
MIN_LENGTH = 100


class VisualGLMForConditionalGeneration(ChatMixin, VisualGLMForCausalLM):
    """VisualGLM-6B. History is a list of (question, answer) pairs; all questions are about the same picture."""

    sampling_defaults = {
        "do_sample": True, "top_p": 0.4, "top_k": 100, "temperature": 0.8, "repetition_penalty": 1.2,
    }  # fmt: skip
    turn_keywords = frozenset(("image", "allow_urls", "english", "min_length"))

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 1024,
        min_length: int = MIN_LENGTH,
        do_sample: bool = True,
        top_p: float = 0.4,
        top_k: int = 100,
        temperature: float = 0.8,
        repetition_penalty: float = 1.2,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Returns the answer and the new history. See `ChatMixin.stream_steps` for more arguments and the errors.

        Args:
            image_path: what `chatglm.pictures.read_picture` takes: a path, bytes, a PIL image; "" or None for a
                conversation without a picture.
            min_length: of prompt and answer together, in tokens.
            **kwargs: also `allow_urls=True`, to fetch a picture from an http address, and `english=True`, for the
                prompt of the original's English demo.

        Raises:
            PictureError: (a ValueError) the picture cannot be read.
        """
        return self._chat(
            tokenizer, query, history, "user", kwargs.pop("num_beams", 1),
            kwargs | {
                "image": image_path, "max_length": max_length, "min_length": min_length, "do_sample": do_sample,
                "top_p": top_p, "top_k": top_k, "temperature": temperature, "repetition_penalty": repetition_penalty,
                "logits_processor": logits_processor or [],
            },
        )  # fmt: skip

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_path: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 1024,
        min_length: int = MIN_LENGTH,
        do_sample: bool = True,
        top_p: float = 0.4,
        top_k: int = 100,
        temperature: float = 0.8,
        repetition_penalty: float = 1.2,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields the answer so far and the new history; the last item is what `chat` returns."""
        return self._stream_chat(
            tokenizer, query, history, "user", image=image_path, max_length=max_length, min_length=min_length,
            do_sample=do_sample, top_p=top_p, top_k=top_k, temperature=temperature,
            repetition_penalty=repetition_penalty, logits_processor=logits_processor or [], **kwargs,
        )  # fmt: skip

    def process_response(self, response: str) -> str:
        """Returns a decoded answer as the user sees it: the originals' name for `chat_format.clean`."""
        return self.chat_format.clean(response)

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        images: torch.Tensor | None = None,
        pre_image_length: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """As `ChatMixin.stream_generate`, with a picture as `forward` takes it."""
        if images is not None:
            if pre_image_length is None:
                raise ValueError("images need pre_image_length, the number of tokens before the picture's")
            with torch.no_grad():
                kwargs["picture"] = PlacedPicture(self.encode_images(images), pre_image_length, object())
        elif pre_image_length:
            raise ValueError("pre_image_length is the place of a picture: give images, too")
        return super().stream_generate(input_ids, *args, **kwargs)

    def _min_length(self, given: int | None) -> int:
        """`min_length` of a turn: a checkpoint may have another default than the original's 100."""
        own = getattr(self.generation_config, "min_length", None)
        return own or MIN_LENGTH if given in (None, MIN_LENGTH) else int(given)

    def format_with_picture(self, english: bool = False) -> VisualGLMFormat:
        """The format of a conversation about a picture."""
        return VisualGLMFormat(self.config.image_length, english)

    def place_picture(self, tokenizer: PreTrainedTokenizerBase, image: Any, allow_urls: bool = False) -> PlacedPicture:
        """A picture for the `picture` of `GenerationOptions`: read, encoded, and with its place in the prompt.

        Raises PictureError.
        """
        pixels = pixels_of(read_picture(image, allow_urls), self.config.image_size)
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        remembered: OrderedDict[object, torch.Tensor] = self.__dict__.setdefault("_pictures", OrderedDict())
        key = (digest, weights_stamp(self))
        features = remembered.get(key)
        if features is None:
            with torch.no_grad():
                features = self.encode_images(pixels)
        remembered[key] = features
        while len(remembered) > _REMEMBERED:
            remembered.popitem(last=False)
        return PlacedPicture(features, len(tokenizer.encode_text("<img>")), digest)

    def clear_chat_cache(self) -> None:
        super().clear_chat_cache()
        self.__dict__.pop("_pictures", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_pictures"}

    def _fit(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None,
        role: str,
        options: GenerationOptions,
        answer_room: int | None,
        turn: Mapping[str, Any],
    ) -> list[int]:
        english, image = bool(turn.get("english")), turn.get("image")
        chat_format = VisualGLMFormat(english=english)
        image = image.strip() if isinstance(image, str) else image
        if image is not None and not (isinstance(image, str) and not image):
            options.picture = self.place_picture(tokenizer, image, bool(turn.get("allow_urls")))
            chat_format = self.format_with_picture(english)
        ids = self._fit_to(chat_format, tokenizer, query, history, role, options, answer_room)
        room = options.length_limit(len(ids), self._context()) - len(ids)
        least = min(self._min_length(turn.get("min_length")) - len(ids), room)
        if least > 0:
            options.min_new_tokens = max(options.min_new_tokens or 0, least)
        return ids
