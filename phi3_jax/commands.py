"""Flags: one way to declare, to read and to print them, for every command.

A command is a `Command`: what it is for, and a table {name: `Flag`} of what may be typed after its name. `parse` reads the
words that a user types, `usage` prints the table, `call` does what is asked. Nothing here takes time to import; the
function that does the work is named by its place and imported when it is needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from phi3_jax import entry
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import Key, text

WIDTH = 118  # of the help
COLUMN = 34  # where meanings start
OVERRIDES = "overrides"  # where `parse` puts {a.b: text} of every --config.a.b=text


class Flags(dict[str, Any]):
    """{name: value} of every flag of a command, those not given with their defaults; `words` are what was typed."""

    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Flag:
    """One thing that may be typed after a command's name.

    Attributes:
      key: what it means, its type, range and default. A bool is a switch, which takes no value.
      shown: what stands for the value in the help, for example "RUN|hf:FOLDER"; without, a word for its type.
      needed: the command means nothing without it.
      repeated: it may be given several times; its value is the tuple of all.
      bare: its value is typed without its name.
      hidden: not in the help: what a command hands to a process that it starts.
      unset: its value is None where it is not given, and who does the work knows the default.
    """

    key: Key
    shown: str = ""
    needed: bool = False
    repeated: bool = False
    bare: bool = False
    hidden: bool = False
    unset: bool = False

    @property
    def default(self) -> Any:
        return () if self.repeated else None if self.unset else self.key.default

    def read(self, value: str, shown: str) -> Any:
        """The value of a text, `shown` in errors."""
        if not value.strip():
            raise UserError(f"{shown.split(' ')[0]} is empty; give a value or leave it out")
        return self.key.read(value, shown)


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      name: as it is typed after `phi3-jax`, or the path of a script.
      doc: what it does, a sentence, and more after an empty line.
      body: gets the `Flags`; what it returns is the exit status, None is 0. As "module:function", imported when needed.
      flags: {name: declaration}; a `-` in a typed name is read as `_`.
      more: "module:function" that adds flags or keys of a table in another room; it is imported for the help too.
      example: right words.
      also: another way to type the command.
      keys: every key that --config.KEY=VALUE sets, where the command takes that.
      alone: without any words it runs, instead of printing its help.
      cached: compiled programs are kept for later processes.
      hidden: in no list: a process that a command starts.
    """

    name: str
    doc: str
    body: str | Callable[[Flags], int | None]
    flags: Mapping[str, Flag]
    example: str = ""
    also: str = ""
    keys: Mapping[str, Key] | None = None
    more: str = ""
    alone: bool = False
    cached: bool = False
    hidden: bool = False

    def complete(self) -> Command:
        """With what `more` adds."""
        completed: Command = _function(self.more)(dataclasses.replace(self, more="")) if self.more else self
        return completed

    @property
    def title(self) -> str:
        return self.doc.strip().partition("\n")[0]


# ------------------------------------------------------------------------------------------------ running


def call(command: Command, words: Sequence[str]) -> int:
    """Does what the words ask for: prints the help, or runs the command; the exit status.

    Raises:
      UserError: see `parse`.
    """
    command = command.complete()
    if (not words and not command.alone) or words[:1] == ["-h"] or "--help" in words:
        print(usage(command))
        return 0
    flags = parse(command, words)
    body = _function(command.body) if isinstance(command.body, str) else command.body
    if not command.cached:
        return body(flags) or 0
    from phi3_jax.compile_cache import kept  # imports jax

    with kept():
        return body(flags) or 0


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def start(command: Command, words: Sequence[str]) -> int:
    """`call` at the top of a program: errors are one line, and the exit status is returned."""
    return entry.run(list(words), lambda given: call(command, given))


# ------------------------------------------------------------------------------------------------ reading


def parse(command: Command, words: Sequence[str]) -> Flags:
    """The flags of "--flag value", "--flag=value", "--switch" and bare values.

    Raises:
      UserError: an unknown flag (with the nearest), one without value, twice, or lost, or a value out of range. A value
        that begins with "--" has to be written --flag=VALUE.
    """
    given: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            name = _bare(command, given, word)
            flag = command.flags[name]
            _put(command, given, name, flag.read(word, f"{_shown(name, flag)} {word}"))
            continue
        typed, equals, value = word.partition("=")
        name = typed[2:].replace("-", "_")
        path = typed.removeprefix("--config.") if command.keys is not None else typed
        if path == typed and (name not in command.flags or command.flags[name].bare):
            raise UserError(f"unknown argument {word!r}{nearest(typed, _typed(command))}")
        if path == typed and command.flags[name].key.kind is bool:
            if equals:
                raise UserError(f"{typed} takes no value")
            _put(command, given, name, True)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise UserError(f"{typed} needs a value")
            value = left.pop(0)
        if path == typed:
            _put(command, given, name, command.flags[name].read(value, f"--{name} {value}"))
        elif path in overrides:
            raise UserError(f"{typed} is given twice")
        else:
            overrides[path] = value
    if lost := [_shown(n, f) for n, f in command.flags.items() if f.needed and n not in given]:
        raise UserError(f"{' and '.join(lost)} missing; for example {command.example}")
    found = Flags({name: given.get(name, flag.default) for name, flag in command.flags.items()})
    if command.keys is not None:
        found[OVERRIDES] = overrides
    found.words = tuple(words)
    return found


def _bare(command: Command, given: Mapping[str, Any], word: str) -> str:
    """The flag that a word without a name is for."""
    names = [name for name, flag in command.flags.items() if flag.bare]
    for name in names:
        if name not in given or command.flags[name].repeated:
            return name
    if names:
        raise UserError(f"{word!r} is one too many; give {' '.join(_shown(n, command.flags[n]) for n in names)}")
    raise UserError(f"unknown argument {word!r}{nearest(word, _typed(command))}")


def _put(command: Command, given: dict[str, Any], name: str, value: Any) -> None:
    if command.flags[name].repeated:
        given[name] = (*given.get(name, ()), value)
    elif name in given:
        raise UserError(f"{_shown(name, command.flags[name])} is given twice")
    else:
        given[name] = value


def _typed(command: Command) -> list[str]:
    named = [f"--{name}" for name, flag in command.flags.items() if not flag.bare and not flag.hidden]
    return [*named, *(["--config.KEY"] if command.keys is not None else [])]


# ------------------------------------------------------------------------------------------------ the help


def usage(command: Command) -> str:
    """The help: what the command does, and the meaning, type and default of each flag and each key of an experiment."""
    title, _, more = command.doc.strip().partition("\n")
    script = command.name.endswith(".py")
    head = f"    {'python' if script else 'phi3-jax'} {command.name} {command.example}".rstrip()
    also = f"\n    (as `{command.also}` too, in a clone without installing)" if command.also else ""
    parts = [title, head + also, textwrap.dedent(more).strip("\n")]
    rows = [(_row(name, flag), _says(flag)) for name, flag in command.flags.items() if not flag.hidden]
    if command.keys is not None:
        rows.append(("--config.KEY=VALUE", "sets one key of the experiment; the keys are below"))
    parts.append(table([*rows, ("--help", "prints this")]))
    if command.keys is not None:
        parts.append(
            "Keys of every experiment; its file changes some and may add more. A count may end in k, M, B or T."
        )
        parts.append(table((f"--config.{name}={_value(key)}", _meaning(key)) for name, key in command.keys.items()))
    return "\n\n".join(part for part in parts if part)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of (what is typed, what it means), the meaning in a column of its own."""
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, WIDTH - COLUMN, break_on_hyphens=False) or [""]
        if len(left) >= COLUMN - 1:
            lines.append(left)
        else:
            wrapped[0] = left.ljust(COLUMN) + wrapped[0]
        start = 0 if len(left) >= COLUMN - 1 else 1
        lines += wrapped[:start] + [" " * COLUMN + line for line in wrapped[start:]]
    return "\n".join(lines)


def _shown(name: str, flag: Flag) -> str:
    return (flag.shown or name.upper()) if flag.bare else f"--{name}"


def _row(name: str, flag: Flag) -> str:
    if flag.bare:
        return _shown(name, flag) + ("..." if flag.repeated else "")
    return f"--{name}" if flag.key.kind is bool else f"--{name} {flag.shown or _value(flag.key)}"


def _value(key: Key) -> str:
    """A word for the type of a value."""
    if key.item is not None:
        return f"{_value(key.item)},..."
    if key.choices:
        return "|".join(key.choices) if all(key.choices) and len("|".join(key.choices)) < 20 else "WORD"
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}[key.kind]


def _meaning(key: Key) -> str:
    """The meaning, type and default of a value."""
    kind = f"list of {key.item.range}" if key.item is not None else key.range
    default = "none" if key.default is None else text(key.default) or "empty"
    return f"{key.doc} [{kind}; default {default.lower() if key.kind is bool else default}]"


def _says(flag: Flag) -> str:
    if flag.key.kind is bool:
        return f"{flag.key.doc} [switch]"
    if flag.needed:
        return _meaning(flag.key).rpartition("; default ")[0] + "; needed]"
    if flag.repeated:
        return _meaning(flag.key).rpartition("; default ")[0] + "; may be given several times]"
    return _meaning(flag.key)
