"""Messages of fine-tuning in Chinese and English; those of the front doors are in `chatglm.front.messages`."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

#: Key -> language -> text.
TEXTS: dict[str, dict[str, str]] = {
    # main.py
    "note": {"zh": "注意：{text}", "en": "note: {text}"},
    "untuned": {
        "zh": "未训练模型的损失（{count} 条{kind}样本）：{loss:.4f}",
        "en": "loss of the untuned model on {count} {kind} examples: {loss:.4f}",
    },
    "validation": {"zh": "验证", "en": "validation"},
    "training": {"zh": "训练", "en": "training"},
    "stopping": {
        "zh": "\n将在本步结束后写检查点并停止（再按一次立即停止）",
        "en": "\nstopping after this step, with a checkpoint (press again to stop at once)",
    },
    "stopped": {
        "zh": "已在第 {step} 步停止；继续训练请加 --resume_from_checkpoint {folder}",
        "en": "stopped at step {step}; resume with --resume_from_checkpoint {folder}",
    },
    "resuming": {
        "zh": "从 {folder} 继续（重新开始请加 --overwrite_output_dir，或换一个 --output_dir）",
        "en": "resuming from {folder} (to start from scratch: --overwrite_output_dir, or another --output_dir)",
    },
    "no_optimizer": {
        "zh": "注意：{folder} 中没有优化器状态，动量与学习率将从头开始",
        "en": "note: {folder} has no optimizer state: moments and learning rate start from scratch",
    },
    "finished": {
        "zh": "训练已经完成：第 {step} 步是最后一步（--max_steps）",
        "en": "nothing is left to train: the last step is {step} (--max_steps)",
    },
    # prefer.py
    "preferences": {
        "zh": "偏好数据：训练 {train} 条，检验 {held_out} 条",
        "en": "preferences: {train} to train on, {held_out} held out",
    },
    "preferred": {
        "zh": "检验数据中，更可能说出较好回答的比例：训练前 {before:.3f}，训练后 {after:.3f}",
        "en": (
            "share of held-out pairs whose chosen answer is the more probable one: {before:.3f} before, "
            "{after:.3f} after"
        ),
    },
    "reward_model": {
        "zh": "奖励模型的适配器：{folder}（用 peft.PeftModel.from_pretrained 加载）",
        "en": "adapter of the reward model: {folder} (load it with peft.PeftModel.from_pretrained)",
    },
    "best": {
        "zh": "最好的检查点：{folder}（{metric} {value:.4f}）",
        "en": "the best checkpoint: {folder} ({metric} {value:.4f})",
    },
    "no_curve": {
        "zh": "注意：没有安装 matplotlib，不画损失曲线 loss.png：pip install matplotlib",
        "en": "note: matplotlib is not installed, so the losses are not drawn in loss.png: pip install matplotlib",
    },
    "summary": {"zh": "总结：{path}", "en": "summary: {path}"},
    # summary.py
    "summary_title": {"zh": "微调总结", "en": "Fine-tuning: a summary"},
    "summary_data": {"zh": "数据", "en": "Data"},
    "summary_settings": {"zh": "设置", "en": "Settings"},
    "summary_argument": {"zh": "参数", "en": "argument"},
    "summary_value": {"zh": "值", "en": "value"},
    "summary_curve": {"zh": "损失曲线", "en": "Losses"},
    "summary_best": {"zh": "最好的检查点", "en": "best checkpoint"},
    "summary_metrics": {"zh": "指标", "en": "Metrics"},
    "summary_metric": {"zh": "指标", "en": "metric"},
    "summary_answers": {"zh": "部分回答", "en": "Some answers"},
    "summary_prompt": {"zh": "提示", "en": "prompt"},
    "summary_answer": {"zh": "回答", "en": "answer"},
    "summary_reference": {"zh": "参考", "en": "reference"},
    "checkpointing_off": {
        "zh": "梯度检查点：关闭，训练约需 {needed}，可用 {room}（--gradient_checkpointing True 打开）",
        "en": (
            "gradient checkpointing is off: the run takes about {needed} of the {room} available "
            "(--gradient_checkpointing True turns it on)"
        ),
    },
    "checkpointing_on": {
        "zh": "梯度检查点：打开，不用它训练约需 {needed}，可用 {room}（--gradient_checkpointing False 关闭，每步更快）",
        "en": (
            "gradient checkpointing is on: without it the run would take about {needed} of the {room} available "
            "(--gradient_checkpointing False turns it off, for faster steps)"
        ),
    },
    "trained": {"zh": "训练完成：{command}", "en": "trained: {command}"},
    "predictions": {"zh": "预测结果：{path}", "en": "predictions: {path}"},
    "interrupted": {"zh": "\n已中断", "en": "\ninterrupted"},
    # data.py
    "data": {
        "zh": (
            "{path}（{forms}）：{rows} 行，{examples} 个样本，{tokens} 个 token（其中学习 {learned} 个），"
            "最长 {longest}"
        ),
        "en": (
            "{path} ({forms}): {rows} rows, {examples} examples, {tokens} tokens ({learned} learned), "
            "the longest {longest}"
        ),
    },
    "unused": {"zh": "{path}：未使用的列：{unused}", "en": "{path}: columns that are not used: {unused}"},
    "skipped": {
        "zh": "{path}：{skipped} 行没有问题或回答，已跳过（行号 {lines}）",
        "en": "{path}: {skipped} rows without a question or an answer are left out (lines {lines})",
    },
    "truncated": {
        "zh": (
            "{path}：{truncated} 个样本过长：{old_turns} 个丢弃较早的轮次，{questions} 个截去问题中间部分，"
            "{answers} 个截去回答末尾（--max_source_length、--max_target_length）"
        ),
        "en": (
            "{path}: {truncated} examples are too long: {old_turns} lose old turns, {questions} the middle of "
            "a question, {answers} the end of an answer (--max_source_length, --max_target_length)"
        ),
    },
    "example": {
        "zh": "一个样本：{tokens} 个 token，其中学习 {learned} 个",
        "en": "An example: {tokens} tokens, {learned} of them learned",
    },
    "position": {"zh": "位置", "en": "position"},
    "id": {"zh": "编号", "en": "id"},
    "label": {"zh": "标签", "en": "label"},
    "text": {"zh": "文本", "en": "text"},
    # dry_run.py
    "steps": {
        "zh": "{steps} 步，每步 {each} 个样本，最长 {longest} 个 token（一步要多久，开始训练后看进度条）",
        "en": (
            "{steps} steps of {each} examples, the longest of {longest} tokens "
            "(the time per step shows in training: the progress bar shows the time left)"
        ),
    },
    "fits": {"zh": "可用 {size}：可以放下", "en": "{size} are available: it fits"},
    "too_large": {"zh": "可用 {size}：放不下。可以：", "en": "{size} are available: it does not fit. You can:"},
    # estimate/
    "parameters": {
        "zh": "参数：{all:,}，其中训练 {trained:,}（{share:.4%}）",
        "en": "Parameters: {all:,}, of which {trained:,} are trained ({share:.4%})",
    },
    "peak": {"zh": "峰值内存：", "en": "Peak memory:"},
    "peak_each": {"zh": "峰值内存（每个设备）：", "en": "Peak memory of each device:"},
    "weights": {"zh": "冻结的权重", "en": "frozen weights"},
    "trainable": {"zh": "训练的权重", "en": "trained weights"},
    "gradients": {"zh": "梯度", "en": "gradients"},
    "optimizer": {"zh": "优化器状态", "en": "optimizer states"},
    "activations": {"zh": "激活值", "en": "activations"},
    "logits": {"zh": "logits 与损失", "en": "logits and loss"},
    "buffers": {"zh": "临时缓冲区", "en": "temporary buffers"},
    "evaluation": {"zh": "评估", "en": "evaluation"},
    "libraries": {"zh": "Python 与库", "en": "Python and libraries"},
    "total": {"zh": "合计", "en": "in all"},
    "in_top": {"zh": "top 的 RES 最高约 {seen}", "en": "top will show up to {seen} (RES)"},
    "pages": {
        "zh": "，其中至多 {pages} 是检查点文件的缓存页，内存不足时系统会收回",
        "en": ": up to {pages} of it are pages of the checkpoint file, which the system reclaims when memory is short",
    },
    "advice": {
        "zh": "{change}：省 {gain}，剩 {total}",
        "en": "{change}: saves {gain}, leaves {total}",
    },
    "which_fits": {"zh": "，可以放下", "en": ", which fits"},
    "checkpointing": {"zh": "打开梯度检查点", "en": "turn gradient checkpointing on"},
    "flag": {"zh": "{flag}", "en": "{flag}"},
    "same_result": {"zh": "{flag}（结果相同）", "en": "{flag} (the same result)"},
    "bfloat16": {"zh": "用 bfloat16 计算", "en": "compute in bfloat16"},
    "lora": {"zh": "用 LoRA 代替全参数微调", "en": "train LoRA instead of all weights"},
    "shorter": {"zh": "序列长度从 {now} 减到 {half}", "en": "sequences of {half} tokens instead of {now}"},
    "zero": {"zh": "DeepSpeed ZeRO-{stage}，{devices} 张显卡", "en": "DeepSpeed ZeRO-{stage} on {devices} GPUs"},
    "zero_offload": {
        "zh": "DeepSpeed ZeRO-{stage}，{devices} 张显卡，优化器放在内存",
        "en": "DeepSpeed ZeRO-{stage} on {devices} GPUs with the optimizer in main memory",
    },
}


def text(key: str, language: str, /, **values: Any) -> str:
    """The text of this key. Raises ValueError unless the language is "en" or "zh"."""
    if language not in TEXTS[key]:
        raise ValueError(f"lang is {language!r}: use 'en' or 'zh'")
    return TEXTS[key][language].format(**values)


def command_line(words: Sequence[str | os.PathLike[str]]) -> str:
    """Returns the words as one line that can be pasted into the shell; words with blanks are quoted."""
    texts = [os.fspath(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)
