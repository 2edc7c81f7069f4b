"""The model of the programs about pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from ..demo import VISION
from ..front.messages import TERMINAL


def vision_model(args: argparse.Namespace, load: Callable[[argparse.Namespace], Any]) -> tuple[Any, Any]:
    """Loads the model that the arguments name, or else the bundled demo that sees.

    Args:
        load: `load_from_arguments`.

    Raises:
        ValueError: the model sees no pictures.
        What `load` raises.
    """
    if args.model is None and not os.environ.get("CHATGLM_MODEL"):
        args.model = str(VISION)
    model, tokenizer = load(args)
    if not hasattr(model, "place_picture"):
        raise ValueError(TERMINAL["blind"][args.lang].format(name=tokenizer.chat_format.model_name))
    return model, tokenizer
