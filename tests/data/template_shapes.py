"""Chat templates built as those of public model families are, in words of our own; each uses what its family uses."""

from typing import Any

_TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"

SHAPES: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml, a system message of its own": """
        {%- if messages[0]['role'] != 'system' %}
            {{- '<|im_start|>system\nBe of help.<|im_end|>\n' }}
        {%- endif %}
        {%- for m in messages %}
            {{- '<|im_start|>' ~ m['role'] ~ '\n' ~ m['content'] | trim ~ '<|im_end|>\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set system = false %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Turns of a user and an assistant must alternate.') }}{% endif %}"
        "{% if loop.index0 == 0 and system is not false %}"
        "{% set said = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set said = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + said.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3 with tools": """
        {{- bos_token }}
        {%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
        {%- if messages[0]['role'] == 'system' %}
            {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
        {%- else %}{%- set system_message = "" %}{%- endif %}
        {{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
        {%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
        {{- "Today: " + date_string + "\n\n" }}
        {%- if tools is not none %}
            {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
        {%- endif %}
        {{- system_message }}{{- "<|eot_id|>" }}
        {%- for message in messages %}
            {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
                {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
                {{- '<|eot_id|>' }}
            {%- elif 'tool_calls' in message %}
                {%- if not message.tool_calls|length == 1 %}{{- raise_exception("One call at a time.") }}{%- endif %}
                {%- set tool_call = message.tool_calls[0].function %}
                {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
                {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}
                {{- "}<|eot_id|>" }}
            {%- else %}
                {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
                {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
                {%- else %}{{- message.content }}{%- endif %}
                {{- "<|eot_id|>" }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "mistral v0.3": """
        {%- if messages[0]["role"] == "system" %}
            {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
        {%- else %}{%- set loop_messages = messages %}{%- endif %}
        {%- if not tools is defined %}{%- set tools = none %}{%- endif %}
        {%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
        {%- set ns = namespace() %}{%- set ns.index = 0 %}
        {%- for message in loop_messages %}
            {%- if message["role"] in ("user", "assistant") and not message.tool_calls is defined %}
                {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
                    {{- raise_exception("Roles must alternate.") }}
                {%- endif %}
                {%- set ns.index = ns.index + 1 %}
            {%- endif %}
        {%- endfor %}
        {{- bos_token }}
        {%- for message in loop_messages %}
            {%- if message["role"] == "user" %}
                {%- if tools is not none and (message == user_messages[-1]) %}
                    {{- "[AVAILABLE_TOOLS] [" }}
                    {%- for tool in tools %}
                        {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                        {%- for key, val in tool.items() if key != "return" %}
                            {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                            {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                            {%- if not loop.last %}{{- ", " }}{%- endif %}
                        {%- endfor %}
                        {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
                    {%- endfor %}
                    {{- "[/AVAILABLE_TOOLS]" }}
                {%- endif %}
                {%- if loop.last and system_message is defined %}
                    {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
                {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
            {%- elif message.tool_calls is defined and message.tool_calls is not none %}
                {{- "[TOOL_CALLS] [" }}
                {%- for tool_call in message.tool_calls %}
                    {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
                    {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                        {{- raise_exception("Calls have ids of 9 letters.") }}
                    {%- endif %}
                    {{- ', "id": "' + tool_call.id + '"}' }}
                    {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
                {%- endfor %}
            {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
            {%- elif message["role"] in ("tool_results", "tool") %}
                {%- set content = message.content.content if message.content is mapping else message.content %}
                {{- '[TOOL_RESULTS] {"content": ' + content|string + "}[/TOOL_RESULTS]" }}
            {%- else %}{{- raise_exception("Unknown role.") }}{%- endif %}
        {%- endfor %}""",
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('A system role is not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "gemma 3, parts": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set first = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Unknown content") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
""",
    "qwen 2.5 with tools": """
        {%- if tools %}
            {{- '<|im_start|>system\n' }}
            {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
            {%- else %}{{- 'Be of help.' }}{%- endif %}
            {{- "\n\n# Tools\n\n<tools>" }}
            {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
            {{- "\n</tools>\n\n<tool_call>\n{name: <name>}\n</tool_call><|im_end|>\n" }}
        {%- else %}
            {%- if messages[0]['role'] == 'system' %}
                {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
            {%- else %}{{- '<|im_start|>system\nBe of help.<|im_end|>\n' }}{%- endif %}
        {%- endif %}
        {%- for message in messages %}
            {%- if (message.role == "user") or (message.role == "system" and not loop.first)
                or (message.role == "assistant" and not message.tool_calls) %}
                {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
            {%- elif message.role == "assistant" %}
                {{- '<|im_start|>' + message.role }}
                {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
                {%- for tool_call in message.tool_calls %}
                    {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
                    {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                    {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
                {%- endfor %}
                {{- '<|im_end|>\n' }}
            {%- elif message.role == "tool" %}
                {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
                    {{- '<|im_start|>user' }}
                {%- endif %}
                {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
                {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "qwen 3, enable_thinking": """
        {%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
        {%- for message in messages[::-1] %}
            {%- set index = (messages|length - 1) - loop.index0 %}
            {%- if ns.multi_step_tool and message.role == "user" and not(
                message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
                {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
            {%- endif %}
        {%- endfor %}
        {%- for message in messages %}
            {%- if message.content is string %}{%- set content = message.content %}
            {%- else %}{%- set content = '' %}{%- endif %}
            {%- if message.role == "user" or message.role == "system" %}
                {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
            {%- elif message.role == "assistant" %}
                {%- set reasoning_content = '' %}
                {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
                {%- elif '</think>' in content %}
                    {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
                    {%- set reasoning_content = reasoning_content.lstrip('\n') %}
                    {%- set content = content.split('</think>')[-1].lstrip('\n') %}
                {%- endif %}
                {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
                    {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') }}
                    {{- '\n</think>\n\n' + content.lstrip('\n') }}
                {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}
                {{- '<|im_end|>\n' }}
            {%- elif message.role == "tool" %}
                {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}
            {{- '<|im_start|>assistant\n' }}
            {%- if enable_thinking is defined and enable_thinking is false %}
                {{- '<think>\n\n</think>\n\n' }}
            {%- endif %}
        {%- endif %}""",
    "deepseek r1": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(is_tool=false, system_prompt='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{% set content = message['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<|Assistant|>' + content + '<|end|>'}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}"
    ),
    "smollm 3, generation": """
        {%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
        {%- set today = strftime_now("%Y") %}
        {{- "<|im_start|>system\n" ~ ("Think." if enable_thinking else "Do not.") }}
        {{- (" It is a year." if today|length == 4) ~ "<|im_end|>\n" }}
        {%- for message in messages %}
            {%- if message.role == "system" %}{% continue %}{%- endif %}
            {%- set content = message.content if message.content is string else "" %}
            {%- if message.role == "user" %}{{ "<|im_start|>" + message.role + "\n"  + content + "<|im_end|>\n" }}
            {%- elif message.role == "assistant" %}
                {% generation %}
                {%- if enable_thinking %}{{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}
                {%- else %}
                    {{- "<|im_start|>assistant\n<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
                {%- endif %}
                {% endgeneration %}
            {%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}""",
    "command r": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% if system_message != false %}"
        "{{ '<|START|><|SYSTEM|>' + system_message + '<|END|>' }}{% endif %}{% for message in loop_messages %}"
        "{% set content = message['content'] %}{% if message['role'] == 'user' %}"
        "{{ '<|START|><|USER|>' + content.strip() + '<|END|>' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<|START|><|CHATBOT|>'  + content.strip() + '<|END|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}"
    ),
    "phi 3": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi 4 mini, roles from messages": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}"
        "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "granite": """{%- if messages[0]['role'] == 'system' %}
 {%- set system_message = messages[0]['content'] %}
 {%- set loop_messages = messages[1:] %}
{%- else %}
 {%- set system_message = "A day in " + strftime_now('%Y') ~ "." %}
 {%- if tools and documents %}{%- set system_message = system_message + " Both." %}{%- endif %}
 {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}
{%- if tools %}
 {{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in loop_messages %}
 {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
 {%- if loop.last and add_generation_prompt %}
 {{- '<|start_of_role|>assistant' }}
 {%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}
 {{- '<|end_of_role|>' }}
 {%- endif %}
{%- endfor %}""",
    "olmo": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "vicuna": (
        "{% set found = namespace(system=false) %}{% for m in messages if m.role == 'system' %}"
        "{% set found.system = true %}{{ m.content }} {% else %}A chat. {% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
        "ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "alpaca": """{% for m in messages %}
{% if m.role == 'system' %}
{{ m.content }}

{% elif m.role == 'user' %}
### Instruction:
{{ m.content }}

{% else %}
### Response:
{{ m.content }}

{% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Response:
{% endif %}""",
    "falcon, macros": """
{%- macro turn(role, text='') -%}
    {{ role|capitalize }}: {{ text|replace('\r\n', '\n')|replace('\n\n', '\n') }}{{ caller() if caller }}
{%- endmacro -%}
{%- for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ turn(m.role, m.content) }}{% endfor -%}
{% if add_generation_prompt %}{{ '\n' }}{% call turn('assistant') %}:{% endcall %}{% endif %}""",
    "hunyuan, break": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}<|sep|>"
        "{% else %}{% break %}{% endif %}{% endfor %}{% for m in messages|rejectattr('role', 'eq', 'system') %}"
        "{% set ns.n = ns.n + 1 %}{{ '<|' ~ m.role ~ '_' ~ ns.n ~ '|>' }}{{ m.content|default('', true) }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "nemotron, sorted tools": (
        "{% if tools %}{{ tools|tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{% endif %}"
        "{% for m in messages|sort(attribute='role', reverse=true) %}{{ m.items()|sort|map('join', '=')|join(';') }}|"
        "{% endfor %}{{ 'go' if add_generation_prompt }}"
    ),
    "gpt-oss, reasoning": (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}"
        "<|end|>{% endif %}{% if m.reasoning_content %}({{ m.reasoning_content|length }}){% endif %}"
        "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "a null bos_token": "{{ bos_token }}{% if bos_token is defined %}!{% endif %}{{ pad_token }}" + _TURNS,
    "strings and numbers": (
        "{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}|{}'.format('b', 2) }}{{ 2 ** 10 }}{{ '=' * 5 }}{{ [1] + [2] }}{{ 7 // 2 }}"
        "{{ 'ab'|center(6) }}{{ ['x', 'y']|join(', ')|upper }}{{ dict(a=1).get('a') }}{{ range(3)|list }}{{ 1.5 * 2 }}"
        "{% set x %}{% for i in range(2) %}{{ loop.index }}/{{ loop.length }}{{ loop.last }};{% endfor %}{% endset %}"
        "{{ x }}"
        "{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}{{ v }}{% endfor %}{{ none ~ true }}{{ undefined_name }}"
        + _TURNS
    ),
}
"""Names of the families, or what a template is about, → templates."""

_CALL = {
    "function": {"name": "add", "arguments": {"a": "ü <b>", "b": [1, 2.5, None]}},
    "id": "abc123XYZ",
    "type": "function",
}
_USER, _ANSWER = {"role": "user", "content": " Was ist 2+2? <&'\"> \n"}, {"role": "assistant", "content": "Vier ✓"}
_SYSTEM, _AGAIN = {"role": "system", "content": "Kürze."}, {"role": "user", "content": "Und 3+3?"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [_USER],
    "a system message": [_SYSTEM, _USER],
    "several turns": [_SYSTEM, _USER, _ANSWER, _AGAIN],
    "an answer at the end": [_USER, _ANSWER],
    "thoughts": [_USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nVier"}, _AGAIN],
    "reasoning": [_USER, {"role": "assistant", "content": "Vier", "reasoning": "hm", "tool_calls": None}, _AGAIN],
    "a call and its result": [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": '{"sum": 4}'},
    ],
    "two in one's name": [_USER, _AGAIN],
    "an unknown role": [{"role": "judge", "content": "x"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "x "}, {"type": "image"}]}],
    "no content": [{"role": "user"}],
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Zählt <zwei> zusammen.", "parameters": {"type": "object"}},
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]
