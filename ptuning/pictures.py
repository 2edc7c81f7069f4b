"""Pictures in training data: the prompt of a row about one, and its embeddings for a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from chatglm.conversation.visualglm import VisualGLMFormat

from .arguments import ArgumentsError
from .data_files import DataError

#: Placeholders of a picture in VisualGLM-6B; a folder's own number is in its config.json.
IMAGE_LENGTH = 32
#: How many pictures' embeddings are kept between batches: up to 0.5 GB for VisualGLM-6B.
_REMEMBERED = 1_000


class WithPicture:
    """A tokenizer whose chat format puts a picture in front."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat_format = VisualGLMFormat(getattr(tokenizer, "image_length", IMAGE_LENGTH))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def check_rows(rows: Sequence[Any]) -> bool:
    """Whether the rows are about pictures. Raises DataError if only some are."""
    blind = next((row for row in rows if row.image is None), None)
    if blind is not None and any(row.image is not None for row in rows):
        raise DataError(f"{blind.where}: this row has no 'img', and others have: divide them into two files")
    return bool(rows) and blind is None


def check_arguments(packing: bool, workers: int) -> None:
    """Raises ArgumentsError for arguments that training on pictures does not go with."""
    if packing:
        raise ArgumentsError("--packing is for text: leave it out, as every row here has a picture")
    if workers:
        raise ArgumentsError("--dataloader_num_workers: the model itself encodes the pictures; leave it out")


class Features:
    """Encodes the pictures of batches. The image encoder is not trained, so what it returned is kept.

    Args:
        model: a VisualGLM.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    def of(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a forward takes besides the ids; {} for examples without pictures.

        Raises DataError if only some have one, and PictureError if one cannot be read.
        """
        if not any(example.get("image") for example in examples):
            return {}
        if not all(example.get("image") for example in examples):
            raise DataError("some rows have an 'img', and others have none: divide them into two files")
        placed = [self._encode(str(example["image"])) for example in examples]
        place = len(self._tokenizer.encode_text("<img>"))
        return {"image_features": torch.cat(placed), "pre_image_length": torch.full((len(placed),), place)}

    def _encode(self, path: str) -> torch.Tensor:
        features = self._known.pop(path, None)
        if features is None:
            was_training = self._model.image_encoder.training
            self._model.image_encoder.eval()
            features = self._model.place_picture(self._tokenizer, path).features.detach().cpu()
            self._model.image_encoder.train(was_training)
        self._known[path] = features
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return features


def pictures_in(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward takes for the pictures of a batch."""
    return {name: inputs[name] for name in ("image_features", "pre_image_length") if name in inputs}


def one_by_one(inputs: Mapping[str, Any], generate: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Generated ids (batch, tokens), padded with -100, row by row: in padded prompts, the pictures would stand in
    different places."""
    answers = []
    for row, features in enumerate(inputs["image_features"]):
        prompt = inputs["prompt_ids"][row, inputs["prompt_mask"][row].bool()][None]
        picture = {"image_features": features[None], "pre_image_length": inputs["pre_image_length"][:1]}
        answers.append(generate(prompt, torch.ones_like(prompt), **picture)[0])
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
