"""Classifiers on the network of ChatGLM2 and its successors."""

from __future__ import annotations

from torch import nn

from .configuration_chatglm import ChatGLM2Config, ChatGLM3Config, ChatGLM4Config
from .modeling_chatglm2 import ChatGLM2Model, ChatGLM2PreTrainedModel
from .network.heads import ClassifierHead


class ChatGLM2ForSequenceClassification(ChatGLM2PreTrainedModel, ClassifierHead):
    """A classifier on the last real token of each sequence."""

    # The head for generation stays in the checkpoint but is not used here.
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLM2Config, empty_init: bool = True) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels, bias=True)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()


class ChatGLM3ForSequenceClassification(ChatGLM2ForSequenceClassification):
    """The same classifier for checkpoints of generation 3."""

    config: ChatGLM3Config
    config_class = ChatGLM3Config


class ChatGLM4ForSequenceClassification(ChatGLM2ForSequenceClassification):
    """The same classifier for checkpoints of GLM-4."""

    config: ChatGLM4Config
    config_class = ChatGLM4Config
