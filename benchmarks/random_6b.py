"""A checkpoint with random weights, for `benchmarks.engines`: `python -m benchmarks.random_6b OUT --like FOLDER`.

FOLDER is a ChatGLM2 or ChatGLM3, of which only the config and the vocabulary are read; published sizes make 12.5 GB.
Only tokens that are text can be the likeliest: greedy answers do not end, and every token of one can be seen.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from benchmarks.load_6b import write_weights
from chatglm.checkpoints import file_names
from chatglm.configuration_chatglm import ChatGLMConfig


def not_text(vocabulary: Path, size: int) -> list[int]:
    """Of `size` token ids, those that are control tokens, single bytes or unused."""
    model = SentencePieceProcessor(str(vocabulary))
    known = model.get_piece_size()
    special = [i for i in range(known) if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)]
    return special + list(range(known, size))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--like", type=Path, required=True, metavar="FOLDER", help="of the config and the vocabulary")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    args = parser.parse_args(arguments)
    config = ChatGLMConfig.from_pretrained(args.like)
    if args.layers:
        config = ChatGLMConfig.from_dict(config.to_dict() | {"num_layers": args.layers})
    config.dtype = "bfloat16"
    vocabulary = args.like / "tokenizer.model"
    try:
        args.out.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{args.out} exists: name a new folder")
    for path in (vocabulary, args.like / file_names.TOKENIZER_CONFIG):
        shutil.copy(path, args.out)
    write_weights(args.out, config, not_text(vocabulary, config.vocab_size))
    config.save_pretrained(args.out)


if __name__ == "__main__":
    main()
