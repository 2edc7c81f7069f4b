"""llama.cpp, to compare with `decode_6b`: `python benchmarks/llama_cpp_6b.py FILE.gguf` in its own environment.

Needs `pip install llama-cpp-python gguf` (it compiles) and nothing of this package. Writes a GGUF file of the shape of
ChatGLM2-6B and 3-6B with random Q4_0 weights, the head included (3.4 GB), if there is none yet; then times a prompt of
512 tokens and single tokens at 64 tokens of context.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

LAYERS, HIDDEN, FFN, VOCABULARY = 28, 4096, 13696, 65024


def write(path: Path) -> None:
    """Writes the file; all layers share the same random weights."""
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(32)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    random = np.random.default_rng(0)

    def matrix(out: int, columns: int) -> np.ndarray:
        blocks = random.integers(0, 256, (out, columns // 32, 18), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.004).tobytes(), dtype=np.uint8)
        return blocks.reshape(out, -1)

    ones, bias = np.ones(HIDDEN, dtype=np.float32), np.zeros(4608, dtype=np.float32)
    layer = {
        "attn_qkv": matrix(4608, HIDDEN),
        "attn_output": matrix(HIDDEN, HIDDEN),
        "ffn_up": matrix(2 * FFN, HIDDEN),
        "ffn_down": matrix(HIDDEN, FFN),
    }
    quantised = {"raw_dtype": gguf.GGMLQuantizationType.Q4_0}
    writer.add_tensor("token_embd.weight", matrix(VOCABULARY, HIDDEN), **quantised)
    for index in range(LAYERS):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", ones)
        writer.add_tensor(f"blk.{index}.attn_qkv.bias", bias)
        for name, data in layer.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", data, **quantised)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", matrix(VOCABULARY, HIDDEN), **quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", action="store_true", help="for `benchmarks.turns`: decode tokens on request")
    args = parser.parse_args()
    if not args.file.exists():
        write(args.file)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(args.file).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
    settings.n_threads = settings.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, settings)

    def run(ids: list[int]) -> float:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        start = time.perf_counter()
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        taken = time.perf_counter() - start
        values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (VOCABULARY,))
        if not np.isfinite(values).all():
            raise SystemExit("the logits are not finite: the measurements are meaningless")
        return taken

    def forget() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    run([1000])
    if args.turns:
        forget()
        run([1000 + i for i in range(args.context)])
        print("ready", flush=True)
        for _ in sys.stdin:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, args.context, -1)
            print(*(f"{run([2000]) * 1e3:.3f}" for _ in range(6)), flush=True)
        return
    prompts = []
    for _ in range(2):
        forget()
        prompts.append(run([1000 + i % 1000 for i in range(args.prompt)]))
    forget()
    run([1000 + i for i in range(args.context)])
    tokens = [run([2000]) for _ in range(args.tokens)]
    print(f"llama.cpp Q4_0 (llama-cpp-python {llama_cpp.__version__}), {args.threads} threads")
    print(f"prefill of {args.prompt} tokens: {args.prompt / min(prompts):.1f} tokens/s (better of two)")
    print(f"decode at {args.context} tokens: {1 / statistics.median(tokens):.1f} tokens/s (best {1 / min(tokens):.1f})")


if __name__ == "__main__":
    main()
