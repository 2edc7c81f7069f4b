"""What the game says, in Chinese and English."""

from __future__ import annotations

TEXTS: dict[str, dict[str, str]] = {
    "title": {"zh": "海龟汤", "en": "Lateral Thinking Puzzles"},
    "keywords": {
        "zh": "注意：没有加载真正的模型，由关键词裁判作答：它只认得题库里的问题和关键词，其余一律答“无关”。\n"
        "要让模型当裁判：--model 模型文件夹，或 --api-base 地址 --api-model 名称",
        "en": "Note: no real model is loaded. A keyword referee answers: it knows the questions and key words of the "
        "puzzles, and calls everything else irrelevant.\n"
        "For a model as referee: --model FOLDER, or --api-base URL --api-model NAME",
    },
    "fallible": {"zh": "裁判是语言模型，可能判错。", "en": "The referee is a language model and can be wrong."},
    "rules": {
        "zh": "请提问，主持人只回答“是”“否”或“无关”。说出全部关键就算解开。\n"
        "finish 换下一题，stop 退出，hint（提示）看提示，reveal（汤底）看答案，score 看得分，help 看帮助。",
        "en": "Ask questions: the host answers yes, no or irrelevant. State all the key facts to solve it.\n"
        "finish: next puzzle, stop: quit, hint: a hint, reveal: the solution, score: your score, help: this text.",
    },
    "puzzle": {"zh": "【{title}】{surface}", "en": "[{title}] {surface}"},
    "ask": {"zh": "提问：", "en": "question: "},
    "answer": {"zh": "回答：{text}", "en": "answer: {text}"},
    "yes": {"zh": "是", "en": "Yes"},
    "no": {"zh": "否", "en": "No"},
    "irrelevant": {"zh": "无关", "en": "Irrelevant"},
    "unsure": {"zh": "（主持人没有把握）", "en": " (the host is not sure)"},
    "key": {"zh": "找到关键 {found}/{all}：{fact}", "en": "Key {found}/{all}: {fact}"},
    "hint": {"zh": "提示 {number}/{all}：{hint}", "en": "Hint {number}/{all}: {hint}"},
    "no_hint": {"zh": "没有提示了。", "en": "There are no hints left."},
    "solved": {"zh": "解开了！", "en": "Solved!"},
    "bottom": {"zh": "汤底：{bottom}", "en": "The solution: {bottom}"},
    "score": {
        "zh": "关键 {found}/{all}，提问 {questions}，提示 {hints}，得分 {score}",
        "en": "keys {found}/{all}, questions {questions}, hints {hints}, score {score}",
    },
    "over": {
        "zh": "这一题已经结束：finish 换下一题，stop 退出。",
        "en": "This round is over: finish for the next, stop to quit.",
    },
    "stopped": {"zh": "（已中止，可以重新提问）", "en": "(stopped; ask again)"},
    "failed": {"zh": "裁判没有回答：{reason}。请再问一次。", "en": "The referee gave no answer: {reason}. Ask again."},
    "bye": {"zh": "再见！", "en": "Bye!"},
    "error": {"zh": "错误：{reason}", "en": "Error: {reason}"},
    "needs_model": {
        "zh": "{path} 里的谜题没有关键词，需要模型当裁判：--model 模型文件夹，或 --api-base 地址 --api-model 名称",
        "en": "the puzzles of {path} have no key words and need a model as referee: --model FOLDER, or --api-base URL "
        "--api-model NAME",
    },
    "button_hint": {"zh": "提示", "en": "Hint"},
    "button_reveal": {"zh": "看汤底", "en": "Reveal"},
    "button_new": {"zh": "新的一局", "en": "New game"},
    "box": {"zh": "提问，回车发送", "en": "Ask a question: Enter sends"},
    "host": {"zh": "问答", "en": "Questions and answers"},
    "too_long": {"zh": "一句话最多 {most} 个字符。", "en": "A line has at most {most} characters."},
}

#: What the player may type -> what it does; everything else is a question.
COMMANDS = {
    "finish": "finish", "stop": "stop", "hint": "hint", "提示": "hint", "reveal": "reveal", "汤底": "reveal",
    "score": "score", "得分": "score", "help": "help", "帮助": "help",
}  # fmt: skip


def text(key: str, lang: str, **values: object) -> str:
    return TEXTS[key][lang].format(**values)
