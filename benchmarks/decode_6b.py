"""Speed of a full-shape quantised 6B model on a CPU: `python -m benchmarks.decode_6b`.

Makes the model with random weights directly in quantised form (no checkpoint), runs a prompt of 512 tokens, then
decodes at 64 tokens of context and, before each token, times a loop that only reads the same bytes. Prints medians, the
ratio of the loop's time to the token's (minimum / median / maximum) and the peak memory. With `--random-cache`, keys
and values of the context are random and no prompt is read: for long contexts. With `--busy`, every other turn of eight
tokens has a program beside it that keeps one CPU busy.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import Cache

from benchmarks.load_6b import TINY, peak_memory
from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.generation import ChatCache, piece_end
from chatglm.kernels import cpu, huge_pages
from chatglm.kernels.cpu import probes
from chatglm.loading import model_class
from chatglm.network.rotary import RotaryTable


def make(generation: int, bits: int, head: int | None, dtype: torch.dtype, precision: str, **sizes: int) -> Any:
    """A model of the published shapes (or `sizes`) on the CPU, with random weights of realistic magnitude.

    Args:
        bits: 4 or 8; or 16 for weights of `dtype`, whatever that is.
    """
    config = ChatGLMConfig.from_dict({"model_type": "chatglm", "chatglm_version": generation} | sizes)
    with torch.device("meta"):
        model = model_class(config)(config)
    model = model.to(dtype).eval()
    if bits != 16:
        model = model.quantize(bits, quantize_head=head, precision=precision, empty_init=True).eval()
    for name, parameter in list(model.named_parameters()):  # in huge pages, as after quantising or mapping a file
        owner = model.get_submodule(name.rpartition(".")[0])
        weight = nn.Parameter(huge_pages.empty(tuple(parameter.shape), parameter.dtype), requires_grad=False)
        fill(name, weight, bits)
        setattr(owner, name.rpartition(".")[2], weight)
    model.tie_weights()
    model = model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    for module in model.modules():
        if isinstance(module, RotaryTable):
            module.reset()
    return model.requires_grad_(False)


@torch.no_grad()
def fill(name: str, parameter: nn.Parameter, bits: int) -> None:
    """Fills one parameter with random values, by its name and dtype."""
    if parameter.dtype == torch.int8:
        parameter.random_(-128, 128)
    elif name.endswith("weight_scale"):
        parameter.fill_(0.02 / 2 ** (bits - 2))
    elif parameter.ndim == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        parameter.normal_(0.0, 0.02)


def weights_read(model: nn.Module) -> list[torch.Tensor]:
    """The weights that every token reads: the matrices of all products. Of the embeddings, it reads only a row."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def run(model: Any, ids: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, float]:
    """Feeds the tokens of `ids` (1, tokens) that `cache` lacks; returns `ids` with the next token, and the seconds."""
    done, start = cache.get_seq_length(), time.perf_counter()
    while done < ids.shape[1]:  # in pieces, as a chat does
        end = piece_end(model, ids, done)
        positions = {}
        if model.config.chatglm_version == 1:  # two-dimensional positions, derived from the whole sequence
            positions["position_ids"] = model.transformer.get_position_ids(ids)[..., done:end]
        piece = ids[:, done:end]
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions).logits
        done = end
    token = logits[:, -1:].argmax(-1)
    seconds = time.perf_counter() - start
    if not torch.isfinite(logits).all():
        raise SystemExit("the logits are not finite: the measurements are meaningless")
    return torch.cat((ids, token), dim=1), seconds


def begin(model: Any, context: int, random: bool = False) -> tuple[torch.Tensor, ChatCache]:
    """The ids (1, context + 1) and the cache (`context` tokens) to decode with."""
    cache, config = ChatCache(kv_cache_dtype=model.kv_cache_dtype), model.config
    if not random:
        return run(model, prompt_of(model, context), cache)[0], cache
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (1, heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype) for _ in range(2)), layer)
    return prompt_of(model, context + 1), cache


def decode(model: Any, ids: torch.Tensor, cache: ChatCache, past: int, tokens: int) -> list[float]:
    """The seconds of each of some tokens, decoded from `past` tokens in the cache on, whatever it holds behind them."""
    if cache.get_seq_length() > past:
        cache.crop(past - cache.get_seq_length())
    times = []
    for _ in range(tokens):
        ids, seconds = run(model, ids, cache)
        times.append(seconds)
    return times


def take_turns(model: Any, context: int, random: bool = False) -> None:
    """Decodes six tokens at `context` tokens of context for every line on stdin, and reads the weights once; see
    `benchmarks.turns`."""
    streamed, backend = weights_read(model), cpu.load()
    prompt, cache = begin(model, context, random)
    print("ready", flush=True)
    for _ in sys.stdin:
        times = decode(model, prompt, cache, context, 6)
        start = time.perf_counter()
        for weight in streamed:
            probes.read(backend, weight)
        reading = time.perf_counter() - start
        print(*(f"{seconds * 1e3:.3f}" for seconds in times), "|", f"{reading * 1e3:.3f}", flush=True)


def share_beside_busy(model: Any, ids: torch.Tensor, cache: ChatCache, turns: int) -> list[float]:
    """The speed beside a program that keeps one CPU busy, as shares of the speed without, in ascending order."""
    past = cache.get_seq_length()

    def seconds() -> float:
        return statistics.mean(decode(model, ids, cache, past, 8)[1:])

    shares = []
    for _ in range(turns):
        alone = seconds()
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            time.sleep(0.3)
            shares.append(alone / seconds())
            busy.kill()
    return sorted(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", type=int, choices=(1, 2, 3, 4), default=2)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="16: not quantised, see --dtype")
    parser.add_argument("--head", type=int, choices=(4, 8), help="bits of the output head (default: not quantised)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--precision", choices=("default", "int8", "exact"), default="default")
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's choice)")
    parser.add_argument("--context", type=int, default=64, help="tokens of context when decoding")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the timed prompt; 0 for none")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to decode; the median is reported")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick try")
    parser.add_argument("--random-cache", action="store_true", help="for long contexts: fill the cache, read no prompt")
    parser.add_argument("--busy", type=int, default=0, metavar="TURNS", help="turns beside a busy program")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--turns", action="store_true", help="for `benchmarks.turns`: decode tokens on request")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = TINY[args.generation] if args.tiny else {}
    sizes |= {"num_layers": args.layers} if args.layers else {}
    model = make(args.generation, args.bits, args.head, getattr(torch, args.dtype), args.precision, **sizes)
    model.kv_cache_dtype = args.kv_cache_dtype
    if args.turns:
        with torch.inference_mode():
            take_turns(model, args.context, args.random_cache)
        return
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    streamed, backend = weights_read(model), cpu.load()
    bytes_read = sum(weight.numel() * weight.element_size() for weight in streamed)
    kind = f"INT{args.bits} {args.precision}" if args.bits != 16 else "not quantised"
    shape = f"{kind}, head {args.head or args.dtype}, activations {args.dtype}"
    print(f"ChatGLM generation {args.generation}, {shape}, {torch.get_num_threads()} threads, {backend.variant}")

    with torch.inference_mode():
        if args.prompt:
            caches = [ChatCache(kv_cache_dtype=args.kv_cache_dtype) for _ in range(2)]
            taken = [run(model, prompt_of(model, args.prompt), cache)[1] for cache in caches]
            print(f"prefill of {args.prompt} tokens: {args.prompt / min(taken):.1f} tokens/s (better of two)")
        ids, cache = begin(model, args.context, args.random_cache)
        reads, tokens = [], []
        for _ in range(args.tokens):
            start = time.perf_counter()
            for weight in streamed:
                probes.read(backend, weight)
            reads.append(time.perf_counter() - start)
            ids, taken_one = run(model, ids, cache)
            tokens.append(taken_one)
        beside = share_beside_busy(model, ids, cache, args.busy) if args.busy else []
    shares = [read / token_ for read, token_ in zip(reads, tokens, strict=True)]
    middle = statistics.median(tokens)
    print(
        f"decode at {args.context} tokens: {1 / middle:.1f} tokens/s ({middle * 1e3:.1f} ms; reading alone "
        f"{statistics.median(reads) * 1e3:.1f} ms, {bytes_read / statistics.median(reads) / 1e9:.1f} GB/s); "
        f"share of the read loop {min(shares):.2f} / {statistics.median(shares):.2f} / {max(shares):.2f}"
    )
    if beside:
        middle = statistics.median(beside)
        print(f"beside a busy program, share of the speed: {beside[0]:.2f} / {middle:.2f} / {beside[-1]:.2f}")
    print(f"weights {size / 1e6:.0f} MB, peak of the process {peak_memory() / 1e6:.0f} MB")


def prompt_of(model: Any, tokens: int) -> torch.Tensor:
    """Ids (1, tokens); those of generation 1 end in [gMASK] <sop>."""
    config = model.config
    ids = torch.arange(1, tokens + 1).unsqueeze(0) % 1000 + 1000
    if config.chatglm_version == 1:
        ids[0, -2], ids[0, -1] = config.gmask_token_id, config.bos_token_id
    return ids


if __name__ == "__main__":
    main()
