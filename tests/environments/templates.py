"""Chat templates of families of models, as short as what an episode reads of them allows, and a
tokenizer that has their marks.
"""

from __future__ import annotations

from typing import Any

from tests.common.tiny import tiny_tokenizer

# thoughts of earlier turns are left out, answers of functions stand in one user's message
QWEN3 = """{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set text = m.content %}
{%- if '</think>' in text and not loop.last %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.last and '</think>' not in text %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{{- text }}
{%- for call in m.tool_calls or [] %}
{%- if not loop.first or text %}{{- '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token or '' }}{% for m in messages %}
{%- if 'tool_calls' in m %}
{{- '<|im_start|>assistant<|im_start|>\n\n{"name": "' + m.tool_calls[0].function.name + '", ' }}
{{- '"parameters": ' + (m.tool_calls[0].function.arguments | tojson) + '}<|im_end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>ipython<|im_start|>\n\n' + (m.content | tojson) + '<|im_end|>' }}
{%- else %}
{%- if tools and loop.first %}{{- '<|im_start|>user<|im_start|>\n\n' }}
{%- for tool in tools %}{{- tool | tojson }}{% endfor %}{{- m.content | trim + '<|im_end|>' }}
{%- else %}
{{- '<|im_start|>' + m.role + '<|im_start|>\n\n' + m.content | trim + '<|im_end|>' }}
{%- endif %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}"""

# turns alternate, there is no system message and no function; it ends with a space it then drops
GEMMA = """{% for m in messages %}
{%- if m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}
{{- m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\n' }}{% endif %}"""

# ids of calls have nine signs, as in Mistral's; an answer follows a call only
MISTRAL = """{% for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.last %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('nine signs') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}{% endif %}{% endfor %}{{- ']<|im_end|>' }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{- raise_exception('nine signs') }}{% endif %}
{%- if loop.previtem.role == 'user' %}{{- raise_exception('no call') }}{% endif %}
{{- '[RESULTS] {"content": ' + m.content + ', "id": "' + m.tool_call_id + '"}[/RESULTS]' }}
{%- else %}{{- ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""

# arguments between tags
CODER = QWEN3.replace(
    """{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}""",
    """{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + (value | string) + '\n</parameter>\n' }}{% endfor %}
{{- '</function>\n</tool_call>' }}""",
)

assert CODER != QWEN3
ALL = {"qwen3": QWEN3, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "coder": CODER}


def chatting(template: str) -> Any:
    """A tokenizer with this template."""
    made = tiny_tokenizer()
    made.chat_template = template
    return made
