"""What the doctor says, in Chinese and English: key -> language -> text."""

from __future__ import annotations

DOCTOR: dict[str, dict[str, str]] = {
    "ok": {"zh": "正常", "en": "ok"},
    "note": {"zh": "注意", "en": "note"},
    "wrong": {"zh": "错误", "en": "WRONG"},
    "skipped": {"zh": "略过", "en": "-"},
    # ---- the parts of the report
    "title": {
        "zh": "ChatGLM 重建版；Python {python}，{platform}",
        "en": "ChatGLM, rebuilt; Python {python}, {platform}",
    },
    "versions": {"zh": "版本", "en": "Versions"},
    "machine": {"zh": "本机", "en": "This machine"},
    "folder": {"zh": "文件夹 {path}", "en": "Folder {path}"},
    "checks": {"zh": "自检（随附的演示模型）", "en": "Self-checks on the bundled demo models"},
    "healthy": {"zh": "一切正常（{seconds:.1f} 秒）", "en": "all right ({seconds:.1f} s)"},
    "sick": {"zh": "{count} 处错误（{seconds:.1f} 秒）", "en": "{count} wrong ({seconds:.1f} s)"},
    "all_versions": {
        "zh": "把所有库换成测试过的版本：pip install -r {path}；若仍有错误，请附上以上全部内容报告",
        "en": "to install the tested version of every library: pip install -r {path}; if errors remain, report all of "
        "this",
    },
    "seconds": {"zh": "{seconds:.1f} 秒", "en": "{seconds:.1f} s"},
    "do": {"zh": "{text}；请执行：{cure}", "en": "{text}; do: {cure}"},
    # ---- versions
    "version_ok": {"zh": "{name} {found}（测试过 {tested}）", "en": "{name} {found} (tested: {tested})"},
    "version_newer": {
        "zh": "{name} {found} 比测试过的版本新（{tested}）",
        "en": "{name} {found} is newer than the tested versions ({tested})",
    },
    "version_older": {
        "zh": "{name} {found} 太旧（需要 {tested}）",
        "en": "{name} {found} is too old (needed: {tested})",
    },
    "version_missing": {"zh": "没有安装 {name}（需要 {tested}）", "en": "{name} is not installed (needed: {tested})"},
    "version_absent": {
        "zh": "没有安装 {name}，只有{extra}需要它",
        "en": "{name} is not installed, only needed for {extra}",
    },
    "no_versions": {
        "zh": "无从知道哪些版本测试过：旁边没有 pyproject.toml，也没有安装 {name}",
        "en": "the tested versions are unknown: there is no pyproject.toml beside the package, and {name} is not "
        "installed",
    },
    "also": {"zh": "另有 {names}", "en": "also {names}"},
    "api": {"zh": " HTTP 接口", "en": "the HTTP API"},
    "gguf": {"zh": "导出 GGUF 文件", "en": "GGUF files"},
    "format": {"zh": " response_format ", "en": "response_format"},
    "interpreter": {"zh": "代码解释器", "en": "the code interpreter"},
    "lora": {"zh": " LoRA ", "en": "LoRA"},
    "mcp": {"zh": " MCP 服务器的工具", "en": "tools of MCP servers"},
    "modelscope": {"zh": " ModelScope ", "en": "ModelScope"},
    "ray": {"zh": " Ray Serve 上的多个副本", "en": "replicas on Ray Serve"},
    "streamlit": {"zh": " web_demo2.py 网页", "en": "the page of web_demo2.py"},
    "tools": {"zh": "自动调用的工具", "en": "tools that run"},
    "tune": {"zh": "微调", "en": "fine-tuning"},
    "web": {"zh": "网页", "en": "the web page"},
    # ---- this machine
    "import": {"zh": "import chatglm", "en": "import chatglm"},
    "package": {"zh": "代码位于 {path}", "en": "this package is in {path}"},
    "environment": {"zh": "环境变量：{values}", "en": "environment variables: {values}"},
    "device": {"zh": "{device}：{name}，可用内存 {memory}", "en": "{device}: {name}, {memory} of memory available"},
    "unknown": {"zh": "未知", "en": "unknown"},
    "no_cuda": {
        "zh": "本机有 NVIDIA 驱动，但这个 torch（{version}）用不了：{reason}",
        "en": "this machine has an NVIDIA driver, but this torch ({version}) cannot use it: {reason}",
    },
    "no_cuda_build": {"zh": "它是 CPU 版", "en": "it is built for the CPU"},
    "no_cuda_device": {"zh": "它找不到 CUDA 设备", "en": "it finds no CUDA device"},
    "kernels": {
        "zh": "{device} 上的 INT4 与 INT8：自带内核（{about}），误差 {error:.0e}",
        "en": "INT4 and INT8 on {device}: our kernels ({about}), error {error:.0e}",
    },
    "kernels_torch": {
        "zh": "{device} 上的 INT4 与 INT8：由 torch 计算，较慢：{reason}；误差 {error:.0e}",
        "en": "INT4 and INT8 on {device}: plain torch, which is slow: {reason}; error {error:.0e}",
    },
    "kernels_cure": {
        "zh": "设置环境变量 CHATGLM_KERNELS=torch 可以不用它们",
        "en": "set the environment variable CHATGLM_KERNELS=torch to do without them",
    },
    "cache_whole": {"zh": "编译好的内核：{folder}", "en": "compiled kernels: {folder}"},
    "cache_healed": {
        "zh": "编译好的内核 {path} 已损坏（被截断或改动），刚刚重新编译；若再次出现，请检查磁盘",
        "en": "the compiled kernels {path} were damaged (cut off or changed) and were rebuilt; if that "
        "happens again, check the disk",
    },
    "cache_damaged": {
        "zh": "编译好的内核 {path} 已损坏（被截断或改动），不会被使用",
        "en": "the compiled kernels {path} are damaged (cut off or changed) and are not used",
    },
    "cache_cure": {"zh": "删除 {path}", "en": "delete {path}"},
    # ---- self-checks
    "generation": {"zh": "第 {generation} 代：{text}", "en": "generation {generation}: {text}"},
    "pictures": {"zh": "VisualGLM：{text}", "en": "VisualGLM: {text}"},
    "sees": {"zh": "对图片的回答 = 已知的回答", "en": "what it says of a picture = the known answers"},
    "load": {"zh": "加载", "en": "it loads"},
    "tokenizer": {"zh": "分词器：已知词元，往返一致", "en": "tokenizer: known ids, texts survive a round trip"},
    "chat": {"zh": "chat = 已知的回答", "en": "chat = the known answers"},
    "stream_chat": {"zh": "stream_chat = chat", "en": "stream_chat = chat"},
    "generate": {"zh": "generate（有缓存）= 逐个重新计算", "en": "generate with a cache = recomputed"},
    "generate_uncached": {"zh": "generate（无缓存）= 逐个重新计算", "en": "generate without a cache = recomputed"},
    "batch": {"zh": "成批 = 逐条", "en": "a batch = one by one"},
    "beams": {"zh": "束搜索（有缓存）= 重新计算", "en": "beams with a cache = recomputed"},
    "int8": {"zh": "INT8 = 反量化后的权重", "en": "INT8 = its dequantised weights"},
    "int4": {"zh": "INT4 = 反量化后的权重", "en": "INT4 = its dequantised weights"},
    "saved": {"zh": "保存后重新加载 = 原模型", "en": "saved and loaded again = the model"},
    "prefix": {"zh": "P-tuning 前缀：缓存、保存、切换", "en": "P-tuning prefix: cached, saved, switched"},
    "lora_adapter": {"zh": "LoRA：保存、加载、合并", "en": "LoRA: saved, loaded, merged"},
    "instead": {"zh": "得到 {came}，应为 {wanted}", "en": "{came} instead of {wanted}"},
    "differs": {"zh": "{what}相差 {error:.1e}", "en": "{what} differ by {error:.1e}"},
    "logits": {"zh": "logits ", "en": "the logits"},
    "weights": {"zh": "权重", "en": "the weights"},
    "scores": {"zh": "得分", "en": "the scores"},
    "no_effect": {"zh": "它不起作用", "en": "it has no effect"},
    "no_pieces": {"zh": "回答没有逐步到来", "en": "the answer does not come in pieces"},
    "not_run": {"zh": "模型没有加载，未检查", "en": "the model did not load, not checked"},
    # ---- a folder
    "no_folder": {"zh": "没有 {path} 这个文件夹", "en": "there is no folder {path}"},
    "not_local": {
        "zh": "没有 {path} 这个文件夹；作为模型网站上的名称，它也不在本机上（这里不下载；--model {path} 会下载）",
        "en": "there is no folder {path}, and as a hub id it is not on this machine either (the doctor downloads "
        "nothing; --model {path} does)",
    },
    "hub_cache": {"zh": "模型网站的缓存：{path}", "en": "from the hub's cache: {path}"},
    "a_lora": {
        "zh": "LoRA，用 --adapter 加载：基础模型 {base}，r = {r}，{modules}，{count:,} 个参数",
        "en": "a LoRA adapter, for --adapter: base model {base}, r = {r}, {modules}; {count:,} parameters",
    },
    "a_prefix": {
        "zh": "P-tuning 前缀，用 --adapter 加载：基础模型 {base}，长度 {length}，{count:,} 个参数",
        "en": "a P-tuning prefix, for --adapter: base model {base}, {length} positions; {count:,} parameters",
    },
    "is_generation": {
        "zh": "第 {generation} 代（{model}）：{why}",
        "en": "generation {generation} ({model}): {why}",
    },
    "why_though": {"zh": "{why}（虽然 {others}）", "en": "{why} (although {others})"},
    "why_guess": {
        "zh": '只是推测，可能是第 {possible} 代：请在 {file} 中写明 "chatglm_version"，或用 --chatglm-version 指定',
        "en": 'a guess, it may be {possible}: write "chatglm_version" into {file}, or give --chatglm-version',
    },
    "evidence": {"zh": "依据（及其相符的代）：{clues}", "en": "evidence, with the generations that it fits: {clues}"},
    "base_model": {"zh": "base 模型，没有对话训练", "en": "a base model without chat training"},
    "parameters": {
        "zh": "{count:,} 个参数；{layers} 层，宽 {width}，词表 {vocabulary:,}，上下文 {context:,}",
        "en": "{count:,} parameters; {layers} layers of width {width}, vocabulary {vocabulary:,}, context {context:,}",
    },
    "files": {"zh": "权重文件：{files}", "en": "weight files: {files}"},
    "one_file": {"zh": "{name}（{size}）", "en": "{name} ({size})"},
    "many_files": {"zh": "{count} 个文件，共 {size}，{first} …", "en": "{count} files of {size} in all, {first} ..."},
    "dtypes": {"zh": "存储类型：{dtypes}", "en": "stored as {dtypes}"},
    "integers": {"zh": "整数 {size}", "en": "integers, {size}"},
    "numbers": {"zh": "{dtype} {count:,} 个", "en": "{dtype}, {count:,} values"},
    "quantised": {"zh": "已量化为 {bits} 位", "en": "quantised to {bits} bits"},
    "quantised_embeddings": {
        "zh": "已量化为 {bits} 位，包括词嵌入",
        "en": "quantised to {bits} bits, embeddings included",
    },
    "other_quantisation": {
        "zh": "以 {method} 方法量化，这里读不了；请用未量化的模型（--quantize 4）",
        "en": "quantised by {method}, which cannot be read here: use the full-precision model (with --quantize 4)",
    },
    "with_prefix": {"zh": "带有 P-tuning 前缀，长度 {length}", "en": "with a P-tuning prefix of {length} positions"},
    "wants_prefix": {
        "zh": "config.json 要求长度 {length} 的 P-tuning 前缀，权重中没有：用 --adapter 指明，或删去 pre_seq_len",
        "en": "config.json asks for a P-tuning prefix of {length} positions but the weights contain none: give it "
        "with --adapter, or remove pre_seq_len",
    },
    "memory": {
        "zh": "所需内存：{sizes}；另外每千个词元的上下文 {cache}（16 位）；{device} 可用 {room}",
        "en": "memory needed: {sizes}; and {cache} per 1,000 tokens of context (16 bit); {room} available on {device}",
    },
    "fits": {"zh": "{kind} {size}", "en": "{kind} {size}"},
    "too_large": {"zh": "{kind} {size}（放不下）", "en": "{kind} {size} (does not fit)"},
    "tokenizer_ok": {"zh": "分词器：{file}，{count:,} 个词元", "en": "tokenizer: {file}, {count:,} tokens"},
    "vocabulary_larger": {
        "zh": "分词器有 {theirs:,} 个词元，模型只有 {ours:,} 个",
        "en": "the tokenizer has {theirs:,} tokens, the model only {ours:,}",
    },
    "round_trip": {"zh": "分词器把 {text} 变成了 {came}", "en": "the tokenizer turns {text} into {came}"},
    "unknown_fields": {
        "zh": "config.json 中这里不认识、也不起作用的字段：{names}",
        "en": "fields of config.json that are unknown here and without effect: {names}",
    },
    "absent_shards": {
        "zh": "{index} 列出的 {total} 个文件缺少 {count} 个：{names}；请下载到此文件夹",
        "en": "{count} of the {total} files that {index} lists are missing: {names}; download them into the folder",
    },
    "index_missing": {
        "zh": "{file} 中缺少 {index} 列出的 {names}",
        "en": "{file} lacks tensors that {index} lists for it: {names}",
    },
    "index_extra": {
        "zh": "{file} 中有 {index} 没有列出的 {names}",
        "en": "{file} holds tensors that {index} does not list for it: {names}",
    },
    "index_size": {
        "zh": "{index} 写明共 {there:,} 字节，文件中有 {here:,}",
        "en": "{index} says {there:,} bytes in all, the files hold {here:,}",
    },
    "tensors_missing": {"zh": "权重中缺少 {names}", "en": "the weights lack {names}"},
    "tensors_extra": {
        "zh": "权重中有多余的 {names}（与 config.json 不符）",
        "en": "the weights hold tensors that config.json has no place for: {names}",
    },
    "tensors_size": {
        "zh": "与 config.json 大小不符：{names}",
        "en": "sizes that differ from config.json: {names}",
    },
    "one_size": {"zh": "{name}（{here:,} 个，应为 {there:,} 个）", "en": "{name} ({here:,} values, not {there:,})"},
    "not_read": {"zh": "不会读取的权重文件：{names}", "en": "weight files that are not read: {names}"},
    "unfinished": {"zh": "没有下载完的文件：{names}", "en": "unfinished downloads: {names}"},
    "whole": {"zh": "文件完整，与 config.json 相符", "en": "the files are complete and match config.json"},
    "more": {"zh": "{names}，以及另外 {count} 个", "en": "{names} and {count} more"},
}


def say(key: str, language: str, /, **values: object) -> str:
    """A text of DOCTOR with its blanks filled in."""
    return DOCTOR[key][language].format(**values)
