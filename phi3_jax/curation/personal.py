"""Personal data that a pattern finds: mail addresses, Internet addresses, telephone numbers.

What takes its place is a function of the match alone, a constant or a keyed hash, and never a counter: the text of a
document depends on no other document. Patterns of mail and IPv4 are datatrove's (0.10.1, pipeline/formatters/pii.py).
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable
from typing import Any

from phi3_jax.curation.rule import Measured, Rule
from phi3_jax.keys import Key, switch, word

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
MAIL = re.compile(
    rf"\b{_ATOM}(?:\.{_ATOM})*@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:{_OCTET}\.){{3}}(?:{_OCTET}|[A-Za-z0-9-]*[A-Za-z0-9]:)])"
)
IPV4 = re.compile(rf"(?:{_OCTET}\.){{3}}{_OCTET}")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
PHONE = re.compile(r"(?<![\w+])(?:\+\d{1,3}[ .-]?)(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,4}(?!\w)")


def replace(
    text: str, row: Any, mail: str = "email@example.com", address: str = "192.0.2.1", phone: str = "+1 555 0100",
    phones: bool = True, ipv6: bool = True, all_addresses: bool = False, key: str = "",
) -> Measured:  # fmt: skip
    """How many mail addresses, Internet addresses and telephone numbers there were, and the text without them.

    Args:
      all_addresses: also those of private and reserved ranges.
      key: without, each kind has one replacement; with, `{hash}` in it is replaced by eight hex digits of a keyed hash.
    """
    counts = {"mail": 0, "address": 0, "phone": 0}

    def put(kind: str, form: str, valid: Callable[[str], bool] = lambda _: True) -> Callable[[re.Match[str]], str]:
        def one(match: re.Match[str]) -> str:
            if not valid(match[0]):
                return match[0]
            counts[kind] += 1
            return form.replace("{hash}", _digest(match[0], key)) if key else form

        return one

    def public(found: str) -> bool:
        try:
            return ipaddress.ip_address(found).is_global or all_addresses
        except ValueError:
            return False

    if "@" in text:
        text = MAIL.sub(put("mail", mail), text)
    if "." in text:
        text = IPV4.sub(put("address", address, public), text)
    if ipv6 and ("::" in text or text.count(":") > 6):
        text = IPV6.sub(put("address", address, public), text)
    if phones and "+" in text:
        text = PHONE.sub(put("phone", phone), text)
    return tuple(counts.values()), text


def _digest(found: str, key: str) -> str:
    return hashlib.blake2b(found.encode("utf-8", "replace"), digest_size=4, key=key.encode()[:64]).hexdigest()


PERSONAL = Rule(
    "Replaces mail addresses, Internet addresses and telephone numbers",
    replace,
    (),
    {
        "mail": word("stands for a mail address", "email@example.com"),
        "address": word("stands for an Internet address", "192.0.2.1"),
        "phone": word("stands for a telephone number", "+1 555 0100"),
        "phones": Key("replaces telephone numbers that begin with + as well", True, bool),
        "ipv6": Key("replaces addresses of IPv6 as well", True, bool),
        "all_addresses": switch("replaces Internet addresses of private and reserved ranges as well"),
        "key": word("of the hash that {hash} in a replacement stands for", ""),
    },
    changes=True,
)
