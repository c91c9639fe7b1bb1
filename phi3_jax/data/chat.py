"""Chat templates of the family, as token ids.

The turns are those of the released `tokenizer_config.json` files (phi-3-small's: of its tokenizer's code). Which template a
checkpoint has, `interop.templates` finds out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from phi3_jax.data.pictured import BEGIN, check_tags, places, split, tags_in
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError, nearest

# The templates, called by the first released model that has each, and the roles it has a turn for.
ROLES = {
    "mini": ("system", "user", "assistant"),
    "small": ("system", "user", "assistant"),
    "medium": ("user", "assistant"),
    "moe": ("system", "user", "assistant"),
    "vision": ("system", "user", "assistant"),
}
END = "<|endoftext|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", END)  # the control tokens of all templates
# What a token with `rstrip` swallows: Unicode's White_Space (Python's own strip takes four control characters more).
_BLANK = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    template: str,
    add_generation_prompt: bool = True,
    pictures: Sequence[int] = (),
) -> list[int]:
    """Token ids of a conversation.

    mini, small: `<|role|>\\n` content `<|end|>\\n` for each message, then `<|assistant|>\\n`, or `<|endoftext|>` without
    `add_generation_prompt`; small begins with `<|endoftext|>`. moe (phi-3.5): as mini, but no turn for an empty system
    message. medium: the user's turn brings `<|assistant|>\\n` with it, so `add_generation_prompt` changes nothing. vision:
    begins with `<s>`; no header after an assistant's message, and no `<|endoftext|>`; pictures as in `data.pictured`.

    Only the template makes control tokens: a message that contains the characters `<|end|>` contains just these, where a
    template rendered to a string would end the turn. Blanks after a control token cost ids or not as the tokenizer's
    `rstrip` flags say: none in the tokenizer files of mini's June 2024 update, two for a newline in its first release's.

    Args:
      tokenizer: the model's own.
      messages: each {"role": "system" | "user" | "assistant", "content": text}.
      template: "mini", "small", "medium", "moe" or "vision".
      add_generation_prompt: end with the assistant's header, for the model to go on.
      pictures: tokens that each takes; `<|image_k|>` in a message is where picture k stands.

    Raises:
      UserError: unknown template or role; a system message to medium, whose template would drop it; a tokenizer without the
        template's tokens.
    """
    return [int(i) for i in _masked(tokenizer, messages, template, (), add_generation_prompt, pictures)[0]]


def masked_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    template: str,
    bears: Collection[int],
    pictures: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (n,) int32 of a whole conversation, and (n,) bool: which are targets of training on it.

    Targets are the text of the messages numbered in `bears` and the `<|end|>` after each (with what the tokenizer makes of
    the newline after that), and the closing `<|endoftext|>` where the last message is one of them (vision's too, as in
    Microsoft's recipe). Headers are none. Arguments and errors otherwise as in `chat_ids`.
    """
    return _masked(tokenizer, messages, template, bears, False, pictures)


def common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differ[0]) if differ.size else n


@dataclasses.dataclass
class _Turn:
    """A control token and the text after it: `lead` of the template, then `content`; whether each bears loss."""

    control: str | None
    lead: str = ""
    content: str = ""
    control_bears: bool = False
    content_bears: bool = False


def _turns(
    messages: Sequence[Mapping[str, str]], template: str, bears: Collection[int], add_generation_prompt: bool
) -> list[_Turn]:
    turns = {"small": [_Turn(END)], "vision": [_Turn(BEGIN)]}.get(template, [])
    for number, message in enumerate(messages):
        role, content, loss = message["role"], message["content"], number in bears
        if template == "moe" and role == "system" and not content:
            continue
        if template != "medium" or role == "user":
            turns.append(_Turn(f"<|{role}|>", "\n"))
        elif not turns:  # an answer without a question has no header
            turns.append(_Turn(None))
        turns[-1].content += content
        turns[-1].content_bears |= loss
        turns.append(_Turn("<|end|>", "\n", control_bears=loss))
        if template == "medium" and role == "user":
            turns.append(_Turn("<|assistant|>", "\n"))
    if template != "medium":
        closes = bool(messages) and len(messages) - 1 in bears
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        if template == "vision" and not closes and (answered or not add_generation_prompt):
            return turns
        turns.append(_Turn("<|assistant|>", "\n") if add_generation_prompt else _Turn(END, control_bears=closes))
    return turns


def _masked(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    template: str,
    bears: Collection[int],
    add_generation_prompt: bool,
    pictures: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    if template not in ROLES:
        raise UserError(f"no chat template called {template!r}{nearest(template, ROLES)}")
    for number, message in enumerate(messages):
        _check(message, number, template)
    tagged = template == "vision"
    if tagged:
        check_tags(tags_in(message["content"] for message in messages), len(pictures))
    elif pictures:
        raise UserError(f"the chat template {template!r} has no pictures; take phi-3-vision's, or leave them out")
    ids: list[int] = []
    answer: list[bool] = []
    for turn in _turns(messages, template, bears, add_generation_prompt):
        lead, content = turn.lead, turn.content
        if turn.control is not None:
            if turn.control not in tokenizer.special_tokens:
                raise UserError(f"this {tokenizer.kind} tokenizer has no {turn.control}; take phi-3-{template}'s own")
            ids.append(tokenizer.special_tokens[turn.control])
            answer.append(turn.control_bears)
            if turn.control in tokenizer.stripping:
                lead, content = "", (lead + content).lstrip(_BLANK)
        content, shown = split(content) if tagged else (content, [])
        if shown and turn.content_bears:
            raise UserError(f"<|image_{shown[0][0]}|> is in an answer; pictures stand in questions alone")
        text = tokenizer.encode(lead + content) if lead + content else []
        header = common(tokenizer.encode(lead), text) if lead and content else len(text) if lead else 0
        ids += text
        answer += [turn.control_bears] * header + [turn.content_bears] * (len(text) - header)
        for picture, piece in shown:
            ids += places(picture, piece, tokenizer, pictures)
        answer += [False] * (len(ids) - len(answer))
    return np.array(ids, np.int32), np.array(answer, bool)


def _check(message: Mapping[str, str], number: int, template: str) -> None:
    if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        raise UserError(f"message {number} is {message!r:.80}; give a mapping with the strings role and content")
    if message["role"] not in ROLES[template]:
        raise UserError(
            f"message {number} has the role {message['role']!r}; the template {template} has {', '.join(ROLES[template])}"
        )
