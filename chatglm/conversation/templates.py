"""The formats as Jinja templates, for programs that read nothing else."""

from __future__ import annotations

import re
from typing import Any

from .chat_messages import TOOLS_SYSTEM_PROMPT

_TEMPLATE_OF_PAIRS = (
    "{% set ns = namespace(round=FIRST, system='') %}"
    "{% set bare = BARE and messages | selectattr('role', 'equalto', 'user') | list | length == 1 %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content + '\\n' %}"
    "{% elif message.role == 'user' %}"
    "{{ ('' if bare else '[Round ' ~ ns.round ~ ']GAP问：') ~ ns.system ~ message.content }}{% set ns.system = '' %}"
    "{{ 'GAP答：' if not bare and (add_generation_prompt or not loop.last) else '' }}"
    "{{ 'ASK' if loop.last and add_generation_prompt else '' }}"
    "{% elif loop.last %}{{ 'ASK' ~ ('JOIN' if message.content else '') ~ message.content ~ 'END' }}"
    "{% else %}{{ message.content ~ 'GAP' }}{% endif %}"
    "{% set ns.round = ns.round + (1 if message.role == 'assistant' else 0) %}{% endfor %}"
)


def _template_of_pairs(**words: str) -> str:
    return re.sub("|".join(words), lambda word: words[word[0]], _TEMPLATE_OF_PAIRS)


#: The formats once more as Jinja templates, which are saved with a tokenizer for programs that read nothing else.
CHAT_TEMPLATES = {
    1: _template_of_pairs(FIRST="0", BARE="true", GAP="\\n", ASK="[gMASK]<sop>", JOIN="", END="<eop>"),
    2: "[gMASK]sop" + _template_of_pairs(FIRST="1", BARE="false", GAP="\\n\\n", ASK="", JOIN=" ", END="</s>"),
    3: (
        "[gMASK]sop{% macro spec(tools) %}{{ (tools | map(attribute='function') | list "
        "if tools is not mapping and tools and tools[0].function is defined else tools) | tojson(indent=4) }}"
        "{% endmacro %}"
        "{% if tools and messages[0].role != 'system' %}"
        "{{ '<|system|>\\n PROMPT\\n' ~ spec(tools) }}{% endif %}"
        "{% for message in messages %}"
        "{% set own = none if message.role != 'system' else tools if tools and loop.first else message.tools %}"
        "{% set shown = own is defined and own is not none %}"
        "{{ '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' }}"
        "{{ ' ' ~ message.content if message.content or shown else '' }}{{ '\\n' ~ spec(own) if shown else '' }}"
        "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
    ).replace("PROMPT", TOOLS_SYSTEM_PROMPT),
}


def is_published_template(template: Any) -> bool:
    """Whether this is the template of some published tokenizers, whose blanks give other ids than the format itself."""
    start = "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>"
    return isinstance(template, str) and template.startswith(start)
