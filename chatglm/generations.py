"""Registers the generations, with the classes of each, here and with transformers."""

from __future__ import annotations

from abc import ABC
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from .chat import (
    CHAT_MODELS,
    ChatGLM1ForConditionalGeneration,
    ChatGLM2ForConditionalGeneration,
    ChatGLM3ForConditionalGeneration,
    ChatGLM4ForConditionalGeneration,
)
from .chat_visualglm import VisualGLMForConditionalGeneration
from .checkpoints.clues import VISUAL
from .checkpoints.encodings import let_transformers_read_them
from .checkpoints.file_names import VOCABULARIES
from .classifiers import (
    ChatGLM2ForSequenceClassification,
    ChatGLM3ForSequenceClassification,
    ChatGLM4ForSequenceClassification,
)
from .configuration_chatglm import (
    CONFIGS,
    ChatGLM1Config,
    ChatGLM2Config,
    ChatGLM3Config,
    ChatGLM4Config,
    ChatGLMConfig,
)
from .configuration_visualglm import VisualGLMConfig
from .conversation.formats import ChatFormat, chat_format, register_chat_format, unregister_chat_format
from .tokenization_chatglm import ChatGLM1Tokenizer, ChatGLMTokenizer
from .tokenization_chatglm2 import ChatGLM2Tokenizer
from .tokenization_chatglm4 import ChatGLM4Tokenizer


def register_generation(
    format: ChatFormat,
    config: type[ChatGLMConfig],
    model: type[PreTrainedModel],
    tokenizer: type[ChatGLMTokenizer],
    classifier: type[PreTrainedModel] | None = None,
) -> None:
    """Registers a generation. `chatglm.load`, the front doors and transformers' Auto classes then take its checkpoints:
    those whose config.json has `"chatglm_version": <format.generation>`, or that `checkpoints/clues.py` recognises.

    Args:
        format: the format of its conversations; `format.generation` is its number.
        config: a config class of its own, because transformers finds the model by it.
        model: the network with `chat`: a `ChatMixin`.
        classifier: the network with a classification head, if there is one.

    Raises:
        ValueError: the generation already has another chat format.
    """
    generation = register_chat_format(format).generation
    CONFIGS[generation], CHAT_MODELS[generation], ChatGLMTokenizer.classes[generation] = config, model, tokenizer
    VOCABULARIES[generation] = tokenizer.vocab_files_names["vocab_file"]
    # In the originals, AutoModel also gives the class with chat().
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto.register(config, model, exist_ok=True)
    ChatGLMForConditionalGeneration.register(model)
    if classifier is not None:
        AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
        ChatGLMForSequenceClassification.register(classifier)


def unregister_generation(generation: int) -> None:
    """Removes a generation from our registries, for tests; transformers keeps its classes."""
    unregister_chat_format(generation)
    for registry in (CONFIGS, CHAT_MODELS, ChatGLMTokenizer.classes, VOCABULARIES):
        registry.pop(generation, None)


class ChatGLMForConditionalGeneration(ABC):  # noqa: B024 (an ABC for its virtual subclasses)
    """The originals' name for the chat models: makes or loads the model of the right generation.

    `isinstance(model, ChatGLMForConditionalGeneration)` holds for the chat models of every generation.
    """

    from_pretrained = AutoModel.from_pretrained

    def __new__(cls, config: ChatGLMConfig, **kwargs: Any) -> Any:
        return CHAT_MODELS[config.chatglm_version or 0](config, **kwargs)


class ChatGLMForSequenceClassification(ABC):  # noqa: B024
    """The originals' name for the classifiers of generations 2 and 3, like `ChatGLMForConditionalGeneration`."""

    from_pretrained = AutoModelForSequenceClassification.from_pretrained

    def __new__(cls, config: ChatGLMConfig, **kwargs: Any) -> Any:
        return AutoModelForSequenceClassification.from_config(config, **kwargs)


let_transformers_read_them()
AutoConfig.register("chatglm", ChatGLMConfig)
register_generation(chat_format(1), ChatGLM1Config, ChatGLM1ForConditionalGeneration, ChatGLM1Tokenizer)
register_generation(
    chat_format(2), ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer,
    ChatGLM2ForSequenceClassification,
)  # fmt: skip
register_generation(
    chat_format(3), ChatGLM3Config, ChatGLM3ForConditionalGeneration, ChatGLM2Tokenizer,
    ChatGLM3ForSequenceClassification,
)  # fmt: skip
register_generation(
    chat_format(4), ChatGLM4Config, ChatGLM4ForConditionalGeneration, ChatGLM4Tokenizer,
    ChatGLM4ForSequenceClassification,
)  # fmt: skip
register_generation(chat_format(VISUAL), VisualGLMConfig, VisualGLMForConditionalGeneration, ChatGLM1Tokenizer)
# Registered for the base class, which is no config's own class: registered for that one, transformers would run the
# checkpoint's own tokenizer code under trust_remote_code=True.
AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer)
