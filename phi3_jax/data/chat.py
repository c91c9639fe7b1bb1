"""Chat templates of the family, as token ids.

The turns are those of the released `tokenizer_config.json` files (phi-3-small's: of its tokenizer's code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError, nearest

# Members with a template, and the roles it has a turn for.
ROLES = {
    "mini": ("system", "user", "assistant"),
    "small": ("system", "user", "assistant"),
    "medium": ("user", "assistant"),
    "moe": ("system", "user", "assistant"),
}
END = "<|endoftext|>"
# What a token with `rstrip` swallows: Unicode's White_Space (Python's own strip takes four control characters more).
_BLANK = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    member: str,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation.

    mini, small: `<|role|>\\n` content `<|end|>\\n` for each message, then `<|assistant|>\\n`, or `<|endoftext|>` without
    `add_generation_prompt`; small begins with `<|endoftext|>`. moe (phi-3.5): as mini, but no turn for an empty system
    message. medium: the user's turn brings `<|assistant|>\\n` with it, so `add_generation_prompt` changes nothing.

    Only the template makes control tokens: a message that contains the characters `<|end|>` contains just these, where a
    template rendered to a string would end the turn. Blanks after a control token cost ids or not as the tokenizer's
    `rstrip` flags say: none in the tokenizer files of mini's June 2024 update, two for a newline in its first release's.

    Args:
      tokenizer: the member's own.
      messages: each {"role": "system" | "user" | "assistant", "content": text}.
      member: "mini", "small", "medium" or "moe".
      add_generation_prompt: end with the assistant's header, for the model to go on.

    Raises:
      UserError: unknown member or role; a system message to medium, whose template would drop it; a tokenizer without the
        template's tokens.
    """
    if member not in ROLES:
        raise UserError(f"no chat template called {member!r}{nearest(member, ROLES)}")
    for number, message in enumerate(messages):
        _check(message, number, member)
    # Each control token with the text after it; the text before the first has None.
    turns: list[tuple[str | None, str]] = [(END if member == "small" else None, "")]
    for message in messages:
        role, content = message["role"], message["content"]
        if member == "moe" and role == "system" and not content:
            continue
        if member == "medium" and role == "assistant":  # its header came with the user's turn
            turns[-1] = (turns[-1][0], turns[-1][1] + content)
        else:
            turns.append((f"<|{role}|>", "\n" + content))
        turns.append(("<|end|>", "\n"))
        if member == "medium" and role == "user":
            turns.append(("<|assistant|>", "\n"))
    if member != "medium":
        turns.append(("<|assistant|>", "\n") if add_generation_prompt else (END, ""))
    return _ids(tokenizer, turns, member)


def _check(message: Mapping[str, str], number: int, member: str) -> None:
    if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        raise UserError(f"message {number} is {message!r:.80}; give a mapping with the strings role and content")
    if message["role"] not in ROLES[member]:
        raise UserError(
            f"message {number} has the role {message['role']!r}; phi-3-{member}'s template has {', '.join(ROLES[member])}"
        )


def _ids(tokenizer: Tokenizer, turns: Sequence[tuple[str | None, str]], member: str) -> list[int]:
    ids: list[int] = []
    for control, text in turns:
        if control is not None:
            if control not in tokenizer.special_tokens:
                raise UserError(f"this {tokenizer.kind} tokenizer has no {control}; take phi-3-{member}'s own")
            ids.append(tokenizer.special_tokens[control])
            text = text.lstrip(_BLANK) if control in tokenizer.stripping else text
        ids += tokenizer.encode(text) if text else []
    return ids
