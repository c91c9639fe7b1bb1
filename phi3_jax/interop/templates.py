"""Which chat template a checkpoint has: it brings one, as jinja, and the one of ours that says the same makes the ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.configs import ModelConfig
from phi3_jax.data.chat import ROLES
from phi3_jax.errors import UserError
from phi3_jax.records import files

_TURN = "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
_HEADER = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
_PLAIN = "{% for message in messages %}" + _TURN + "{% endfor %}" + _HEADER
JINJA = {  # `chat.chat_ids` as the released files spell it, in which text makes control tokens, too
    "mini": _PLAIN,
    "small": "{{ '<|endoftext|>' }}" + _PLAIN,
    "medium": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + "
    "'<|end|>\\n<|assistant|>\\n' }}{% else %}{{ message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}",
    "moe": "{% for message in messages %}{% if message['content'] or message['role'] != 'system' %}" + _TURN
    + "{% endif %}{% endfor %}" + _HEADER,
    "vision": "{% for message in messages %}" + _TURN + "{% endfor %}{% if add_generation_prompt and "
    "messages[-1]['role'] != 'assistant' %}{{ '<|assistant|>\\n' }}{% endif %}",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stated:
    """A checkpoint's own chat template: jinja text, the texts of its special tokens, and the file that has it."""

    jinja: str
    tokens: Mapping[str, str]
    path: Path


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template: its name among `ROLES`, and in words why it is this one."""

    name: str
    why: str


def stated(folder: Path) -> Stated | None:
    """The chat template that a folder brings, in any of the files that transformers reads; None where it brings none.

    Of several named templates it is the one called "default".

    Raises:
      UserError: a template that is no text.
    """
    config = _record(folder / "tokenizer_config.json")
    named = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    tokens = {name: token for name, token in named.items() if isinstance(token, str)}
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return Stated(path.read_text(encoding="utf-8"), tokens, path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        text = _record(path).get("chat_template")
        if isinstance(text, list):
            text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{path}: chat_template is no text; give one of the released templates")
        if text:
            return Stated(text, tokens, path)
    return None


def _record(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def template_of(folder: Path | None, model: ModelConfig) -> Template:
    """The chat template of a model: what its checkpoint says, else what the released model has whose shape it is.

    Args:
      folder: with the checkpoint's tokenizer files; None for a model without.
      model: of a released model, a proxy of one, or of any other shape, which says nothing of a template.

    Raises:
      UserError: the checkpoint's template is none of ours, or it has none and nor has any released model of its shape.
    """
    if folder is not None and (own := stated(folder)) is not None:
        name = _recognised(own)
        if name is None:
            raise UserError(
                f"the chat template of {own.path} is none of {', '.join(ROLES)}, the only ones that make token ids here; "
                "put the text of a released one there, or leave the chat out"
            )
        return Template(name, f"as {own.path} says")
    member = model.member if model.is_proxy else family.member_of(model)
    if member not in family.RELEASED:
        raise UserError(
            f"{model.name} brings no chat template, and its shape is no released model's; give its tokenizer_config.json a "
            "chat_template, or leave the chat out"
        )
    kind = "its proxies" if model.is_proxy else "of its shape"
    return Template(family.RELEASED[member].template, f"which is phi-3-{member}'s, {kind}: the checkpoint brings none")


def named_by(path: Path) -> str | None:
    """The template that a tokenizer's file or folder brings; None where it brings none, or none of ours."""
    own = stated(path if path.is_dir() else path.parent)
    return _recognised(own) if own else None


def _recognised(own: Stated) -> str | None:
    """Which of ours says the same as a template in every conversation that ours takes; None: none does."""
    wanted = {case: _said(own.jinja, own.tokens, *case) for case in _CASES}
    for name, roles in ROLES.items():
        cases = [case for case in _CASES if set(_ROLES_OF[case[0]]) <= set(roles)]
        if all(wanted[case] == _said(JINJA[name], {}, *case) for case in cases):
            return name
    return None


# Conversations, as (role, text) pairs, that tell the templates apart.
_TALKS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "U"),),
    (("user", "U"), ("assistant", " A"), ("user", "V\n")),
    (("user", "U"), ("assistant", "A")),
    (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")),
    (("system", ""), ("user", "U")),
)
_CASES = tuple((i, header) for i in range(len(_TALKS)) for header in (True, False))
_ROLES_OF = tuple({role for role, _ in talk} for talk in _TALKS)


def _said(jinja: str, tokens: Mapping[str, str], talk: int, header: bool) -> str | None:
    """What a template makes of a conversation, as transformers calls it, in a sandbox; None where it fails."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages = [{"role": role, "content": text} for role, text in _TALKS[talk]]
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(jinja)
        return template.render(messages=messages, add_generation_prompt=header, **tokens)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
