"""Chat templates in the manner of those in use, each beside its text written out: what a template renders, in marked pieces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lit_unlearn import FictionalAuthors
from lit_unlearn.data.tokenizer import train_tokenizer

Messages = Sequence[dict[str, str]]
Spelled = list[tuple[str, bool]]
"""Text, and whether its tokens are supervised where the turn is."""

SMALL = train_tokenizer(FictionalAuthors(4, 1).texts(), vocab_size=400)
TODAY = "01 Jan 2025"  # what a template is told that asks for the date

_CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = f"{{% for m in messages %}}{_CHATML_TURN}{{% endfor %}}{_CHATML_PROMPT}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>\n"
    f"{{% endgeneration %}}{{% else %}}{_CHATML_TURN}{{% endif %}}{{% endfor %}}{_CHATML_PROMPT}"
)
# As one well known template has it: the header is within the marks, too.
MARKED_WIDELY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}{{ m.content }}<|im_end|>\n"
    f"{{% endgeneration %}}{{% else %}}{_CHATML_TURN}{{% endif %}}{{% endfor %}}{_CHATML_PROMPT}"
)
LLAMA3 = """{{- '<|begin_of_text|>' }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST]' + (system if loop.first else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}
{%- endfor %}"""
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}{% set thought = '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def _spell_chatml(messages: Messages) -> Spelled:
    spelled: Spelled = []
    for m in messages:
        spelled += [(f"<|im_start|>{m['role']}\n", False), (m["content"], True), ("<|im_end|>", True), ("\n", False)]
    return spelled


def _spell_llama3(messages: Messages) -> Spelled:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"].strip(), messages[1:]
    header = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    spelled: Spelled = [(f"{header}Today Date: {TODAY}\n\n{system}<|eot_id|>", False)]
    for m in messages:
        spelled += [(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False)]
        spelled += [(m["content"].strip() + "<|eot_id|>", True)]
    return spelled


def _spell_gemma(messages: Messages) -> Spelled:
    spelled: Spelled = [("<bos>", False)]
    for m in messages:
        role = "model" if m["role"] == "assistant" else m["role"]
        spelled += [(f"<start_of_turn>{role}\n", False), (m["content"].strip() + "<end_of_turn>", True), ("\n", False)]
    return spelled


def _spell_mistral(messages: Messages) -> Spelled:
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"] + "\n\n", messages[1:]
    spelled: Spelled = [("<s>", False)]
    for m in messages:
        if m["role"] == "user":
            spelled.append((f"[INST]{system}{m['content']}[/INST]", False))
            system = ""
        else:
            spelled += [(" ", False), (m["content"].strip() + "</s>", True)]
    return spelled


def _spell_qwen3(messages: Messages) -> Spelled:
    """Without thoughts in the contents: the last turn gets an empty one."""
    spelled = _spell_chatml(messages[:-1])
    answer = messages[-1]["content"].lstrip("\n") + "<|im_end|>"
    return [*spelled, ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False), (answer, True), ("\n", False)]


def _spell_phi(messages: Messages) -> Spelled:
    spelled: Spelled = []
    for m in messages:
        spelled += [(f"<|{m['role']}|>\n", False), (m["content"] + "<|end|>", True), ("\n", False)]
    # The end of the last turn is all that the template writes there.
    return [*spelled[:-1], ("\n<|endoftext|>", True)]


class Kind(NamedTuple):
    """A template with its text written out, which ends with a turn of the assistant's."""

    template: str
    spell: Callable[[Messages], Spelled]
    special: tuple[str, ...]
    has_system: bool = True
    bos: str | None = None
    eos: str = "<|endoftext|>"


_IM = ("<|im_start|>", "<|im_end|>")
KINDS = {
    "chatml": Kind(CHATML, _spell_chatml, _IM, eos="<|im_end|>"),
    "marked": Kind(MARKED, _spell_chatml, _IM, eos="<|im_end|>"),
    "marked_widely": Kind(MARKED_WIDELY, _spell_chatml, _IM),
    "llama3": Kind(
        LLAMA3,
        _spell_llama3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "gemma": Kind(GEMMA, _spell_gemma, ("<bos>", "<start_of_turn>", "<end_of_turn>"), has_system=False, bos="<bos>"),
    "mistral": Kind(MISTRAL, _spell_mistral, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>"),
    "qwen3": Kind(QWEN3, _spell_qwen3, _IM, eos="<|im_end|>"),
    "phi": Kind(PHI, _spell_phi, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
}


def make_tokenizer(kind: Kind) -> Any:
    """A small byte-level tokenizer with the template and its special tokens."""
    tokenizer = copy.deepcopy(SMALL)
    tokenizer.add_special_tokens({"additional_special_tokens": [*kind.special]})
    if kind is KINDS["qwen3"]:
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.bos_token = kind.bos
    tokenizer.eos_token = kind.eos
    tokenizer.chat_template = kind.template
    return tokenizer


TOKENIZERS = {name: make_tokenizer(kind) for name, kind in KINDS.items()}


def spell_supervised(messages: Messages, turns: Sequence[int], spell: Callable[[Messages], Spelled]) -> Spelled:
    """The text of a conversation in pieces, of which those of some of the assistant's turns are supervised."""
    # Every turn is spelled with a number in place of its text, to know its pieces again.
    marks = {index: f"\ue000{index}\ue001" for index in range(len(messages))}
    numbered = [{**m, "content": marks[i]} for i, m in enumerate(messages)]
    spelled = spell(messages)
    supervised: Spelled = []
    current = None
    for (text, is_said), (mark, _) in zip(spelled, spell(numbered), strict=True):
        for index, content in marks.items():
            if content in mark:
                current = index
        supervised.append((text, is_said and current in turns))
    return supervised
