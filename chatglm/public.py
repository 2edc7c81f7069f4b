"""The names of `import chatglm`. Importing them registers the generations with transformers."""

from .chat import (
    ChatGLM1ForConditionalGeneration,
    ChatGLM2ForConditionalGeneration,
    ChatGLM3ForConditionalGeneration,
    ChatGLM4ForConditionalGeneration,
    ChatStep,
)
from .chat_visualglm import VisualGLMForConditionalGeneration
from .classifiers import ChatGLM2ForSequenceClassification, ChatGLM3ForSequenceClassification
from .configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLM3Config, ChatGLM4Config, ChatGLMConfig
from .configuration_visualglm import VisualGLMConfig
from .conversation import ChatFormat
from .generation import InvalidScoreLogitsProcessor, NonFiniteLogitsError
from .generations import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    register_generation,
)
from .loading import load
from .modelscope import register as _register_with_modelscope
from .pictures import PictureError
from .quantization import ChatGLMQuantizationConfig
from .tokenization_chatglm import ChatGLM1Tokenizer, ChatGLMTokenizer
from .tokenization_chatglm2 import ChatGLM2Tokenizer
from .tokenization_chatglm4 import ChatGLM4Tokenizer

__all__ = [
    "ChatFormat",
    "ChatGLM1Config",
    "ChatGLM1ForConditionalGeneration",
    "ChatGLM1Tokenizer",
    "ChatGLM2Config",
    "ChatGLM2ForConditionalGeneration",
    "ChatGLM2ForSequenceClassification",
    "ChatGLM2Tokenizer",
    "ChatGLM3Config",
    "ChatGLM3ForConditionalGeneration",
    "ChatGLM3ForSequenceClassification",
    "ChatGLM4Config",
    "ChatGLM4ForConditionalGeneration",
    "ChatGLM4Tokenizer",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMQuantizationConfig",
    "ChatGLMTokenizer",
    "ChatStep",
    "InvalidScoreLogitsProcessor",
    "NonFiniteLogitsError",
    "PictureError",
    "VisualGLMConfig",
    "VisualGLMForConditionalGeneration",
    "load",
    "register_generation",
]

_register_with_modelscope()
