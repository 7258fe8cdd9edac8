"""Provides chat templates in the styles of public models, and tokenizers that have these templates.

Each template comes with and without generation tags: `G` and `E` stand for `{% generation %}` and
`{% endgeneration %}`, or for nothing.
"""

import dataclasses

from tokenizers_for_tests import small_tokenizer
from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Style:
    """Holds a template, its special tokens, and how it renders an assistant's content (without tool calls)."""

    template: str
    specials: tuple[str, ...]
    end: str  # ends an assistant's turn
    lead: str = ""  # stands between the generation prompt and the content
    trims: bool = False
    system: bool = True  # whether it takes a system prompt
    tools: bool = False  # whether it writes tools and calls
    eos: str = "<eos>"

    def trained(self, content: str) -> str:
        return self.lead + (content.strip() if self.trims else content) + self.end

    def tokenizer(self, *, tags: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = small_tokenizer(bos=True, specials=self.specials)
        if self.eos != "<eos>":
            tokenizer.eos_token = self.eos
        tokenizer.chat_template = with_tags(self.template) if tags else without_tags(self.template)
        return tokenizer


def with_tags(template: str) -> str:
    return template.replace("{G}", "{% generation %}").replace("{E}", "{% endgeneration %}")


def without_tags(template: str) -> str:
    return template.replace("{G}", "").replace("{E}", "")


# Qwen2.5 has a default system prompt, lists tools in the system prompt, and shows tool results as a user's turns.
CHATML = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{%- else %}{% set system = 'You are helpful.' %}{% endif %}"
    "{{- '<|im_start|>system\n' + system }}"
    "{%- if tools %}{{ '\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools>' }}{% endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}{G}"
    "{%- if message.content %}{{ message.content }}{% endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if message.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>' }}{E}{{ '\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Llama 3.1 trims all contents, writes one tool call in place of the content, and tool results as JSON.
LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{%- if message.role == 'assistant' %}{G}"
    "{%- if message.tool_calls %}"
    "{%- set call = message.tool_calls[0].function %}"
    '{{- \'{"name": "\' + call.name + \'", "parameters": \' }}{{ call.arguments | tojson }}{{ "}" }}'
    "{%- else %}{{ message.content | trim }}{% endif %}"
    "{{- '<|eot_id|>' }}{E}"
    "{%- elif message.role == 'tool' %}{{ message.content | tojson }}{{ '<|eot_id|>' }}"
    "{%- else %}{{ message.content | trim }}{{ '<|eot_id|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Mistral v0.3 has no generation prompt, puts system prompt and tools before the last user's message, and refuses other
# orders of roles.
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{%- else %}{% set rest = messages %}{% endif %}"
    "{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{%- set turn = namespace(count=0) %}"
    "{%- for message in rest %}"
    "{%- if message.role == 'user' or (message.role == 'assistant' and message.tool_calls is undefined) %}"
    "{%- if (message.role == 'user') != (turn.count % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{% endif %}"
    "{%- set turn.count = turn.count + 1 %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{{- bos_token }}"
    "{%- for message in rest %}"
    "{%- if message.role == 'user' %}"
    "{%- if tools is not none and message == users[-1] %}"
    "{{- '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}"
    "{%- endif %}"
    "{{- '[INST] ' }}"
    "{%- if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{- message.content + '[/INST]' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + message.content + ', \"call_id\": \"' + message.tool_call_id + '\"}' }}"
    "{{- '[/TOOL_RESULTS]' }}"
    "{%- elif message.tool_calls is defined %}"
    "{G}{{ '[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls %}"
    "{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{%- set out = call.function | tojson %}"
    "{{- out[:-1] + ', \"id\": \"' + call.id + '\"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}"
    "{%- endfor %}"
    "{{- ']' + eos_token }}{E}"
    "{%- elif message.role == 'assistant' %}{G}{{ ' ' + message.content + eos_token }}{E}"
    "{%- else %}{{ raise_exception('unknown role') }}"
    "{%- endif %}"
    "{%- endfor %}"
)

# Gemma 2 trims all contents, has no system prompt, and names the assistant "model".
GEMMA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{% endif %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<start_of_turn>model\n' }}{G}{{ message.content | trim }}{{ '<end_of_turn>' }}{E}{{ '\n' }}"
    "{%- else %}{{ '<start_of_turn>' + message.role + '\n' + message.content | trim + '<end_of_turn>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Phi-3 ends a text with a special token unless a generation prompt follows.
PHI3 = (
    "{%- for message in messages %}"
    "{{- '<|' + message.role + '|>\n' }}"
    "{%- if message.role == 'assistant' %}{G}{{ message.content + '<|end|>' }}{E}{{ '\n' }}"
    "{%- else %}{{ message.content + '<|end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

STYLES = {
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", tools=True),
    "llama3": Style(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", trims=True, tools=True
    ),
    "mistral": Style(
        MISTRAL,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
        "</s>",
        lead=" ",
        tools=True,
        eos="</s>",
    ),
    "gemma": Style(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", trims=True, system=False),
    "phi3": Style(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
}

# Qwen3 drops earlier thoughts, and writes an empty thought before a last answer that has none.
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{% set thought = '' %}"
    "{%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{G}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{ content }}{% endif %}"
    "{{- '<|im_end|>' }}{E}{{ '\n' }}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{%- endif %}"
)
