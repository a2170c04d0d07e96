"""What a tokenizer's chat template says whatever the record: the day it prints, and what ends an answer.

Templates are text of the base model's maker; one that cannot be rendered says nothing.
"""

import datetime
from typing import Any

from jinja2 import TemplateError

# Templates that print today's date would make another example of the same record every day.
_TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)  # the one that Llama 3's own template falls back to
_TODAYS = "".join(
    f"|replace('{code}', '{_TODAY.strftime(code)}')"
    for code in ("%d", "%-d", "%b", "%B", "%Y", "%y", "%m", "%a", "%A", "%H", "%I", "%M", "%S", "%p")
)
_CLOCK = "strftime_now"  # what transformers offers to templates; it takes no function instead of it
_STOPPED_CLOCK = f"{{% macro {_CLOCK}(format) %}}{{{{ format{_TODAYS} }}}}{{% endmacro %}}"
_ANSWER = "Yes."
_EXCHANGE = ({"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": _ANSWER})
REFUSALS = (TemplateError, TypeError, ValueError)  # what rendering raises


def on_that_day(template: str) -> dict[str, str]:
    """The template, with a clock that stands still if it looks at one."""
    pinned = _STOPPED_CLOCK + template if _CLOCK in template else template
    return {"chat_template": pinned, "date_string": _TODAY.strftime("%d %b %Y")}


def answer_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the end of sequence, and what the chat template ends the assistant's turn with.

    The second need not be the first: a base model with ChatML's template ends a turn with <|im_end|>, but a sequence
    with <|endoftext|>. Who waits for the end of sequence alone waits for ever.
    """
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    after = tokenizer(_after_an_answer(tokenizer), add_special_tokens=False)["input_ids"]
    return tuple(sorted(ends.union([token for token in after if token in known][:1])))


def _after_an_answer(tokenizer: Any) -> str:
    """What the template puts behind the assistant's last word; empty if there is none or it cannot be told."""
    if not tokenizer.chat_template:
        return ""
    try:
        template = str(tokenizer.get_chat_template())
        text = tokenizer.apply_chat_template(list(_EXCHANGE), **on_that_day(template), tokenize=False)
    except REFUSALS:
        return ""
    return str(text).rpartition(_ANSWER)[2] if _ANSWER in text else ""
