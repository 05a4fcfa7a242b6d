"""Conversation templates as Jinja, for `apply_chat_template` of `transformers`.

They render the text that training used: `data/chat_template.py` in Jinja.
"""

import logging
import os
from pathlib import Path

from moddistill.config import TEMPLATES
from moddistill.data.chat_template import CHATML_SYSTEM, IM_START, VICUNA_SYSTEM, end_token
from moddistill.errors import UserError
from moddistill.storage.json_file import read_json, read_text

LOG = logging.getLogger("moddistill")
FILE = "chat_template.jinja"

# An image precedes the text, on a line of its own, as in LLaVA's records.
_TEXT = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for item in content -%}
      {%- if item['type'] == 'text' -%}{{ item['text'] }}
      {%- elif item['type'] == 'image' -%}<image>{{ '\\n' }}
      {%- else -%}{{ raise_exception('content is text or image, not ' + item['type']) }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + text(message['content']) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_VICUNA = """\
{{- "SYSTEM " -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + text(message['content']) + ' ASSISTANT:' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' + text(message['content']) + '<|endoftext|>' -}}
  {%- else -%}{{ raise_exception('this format has a system message of its own') }}
  {%- endif -%}
{%- endfor -%}
"""

_PLAIN = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}<image>
  {%- else -%}{{- text(message['content']) + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""


def read_chat_template(folder: Path) -> str:
    """Returns the chat template of a Hugging Face folder; empty if it has none or several."""
    file = folder / FILE
    if os.path.lexists(file):
        return read_text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        if os.path.lexists(folder / name):
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return _check_unicode(template, folder / name)
    return ""


def _check_unicode(text: str, file: Path) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{file}: expected a chat_template in Unicode, got {error}") from None
    return text


def detect_template(folder: Path) -> str:
    """Returns the conversation format of the chat template in a folder.

    The template of an export is recognised. Any other is treated as ChatML, the format of Qwen,
    with a warning if it lacks the tokens of ChatML.
    """
    stored = read_chat_template(folder)
    for name in TEMPLATES:
        if chat_template(name) == stored:
            return name
    if stored and IM_START not in stored:
        LOG.warning(
            "%s: its chat template is not one of %s and has no %s; the model is imported with the "
            "template chatml, unless --template names another",
            folder,
            ", ".join(TEMPLATES),
            IM_START,
        )
    return "chatml"


def chat_template(template: str) -> str:
    """Returns the Jinja template of a conversation format; UserError for an unknown one."""
    end_token(template)  # raises
    return (
        _TEXT
        + {
            "chatml": _CHATML.replace("SYSTEM", CHATML_SYSTEM),
            "vicuna": _VICUNA.replace("SYSTEM", VICUNA_SYSTEM),
            "plain": _PLAIN,
        }[template]
    )


def stop_token(template: str) -> str:
    """Returns the control token that ends generation; `<|endoftext|>` for `plain`."""
    end = end_token(template)
    return "<|endoftext|>" if end.isspace() else end
