"""What every part of a page is made of: its style, escaped text, lists, tables, and numbers in words."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;color:#1b1b1b;
background:#fff;
max-width:1200px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px}
h2{font-size:21px;margin:40px 0 8px;border-bottom:1px solid #ddd}
h3{font-size:17px;margin:28px 0 4px}p{margin:8px 0}.label{font-size:18px;font-weight:600;color:#7a3b00}
pre{background:#f4f4f2;padding:10px 12px;overflow-x:auto;font-size:14px;white-space:pre-wrap;margin:8px 0}
.headline{background:#eef5fb;border-left:4px solid #0072B2;padding:8px 16px;margin:16px 0}
.missing{background:#fdf3e7;border-left:4px solid #D55E00;padding:8px 16px;margin:16px 0}
figure{margin:16px 0 8px}figure img{width:100%;height:auto;display:block}
figcaption{font-size:14.5px;color:#444;margin-top:4px}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 6px;border-bottom:1px solid #e2e2e2;text-align:right;white-space:nowrap}
thead th{border-bottom:2px solid #888;
vertical-align:bottom;background:#fff;white-space:normal;min-width:52px}
th:first-child,td.text,th.text{text-align:left}th:first-child{position:sticky;left:0;
background:#fff}tr.off td{color:#8a5a2b}
.bar{display:flex;width:100px;height:12px}.key{display:block;width:9px;height:9px;margin-left:auto}
.small{font-size:14px;color:#444}li{margin:3px 0}
"""


def text(value: Any) -> str:
    return html.escape(str(value))


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page of parts in HTML, which needs nothing from elsewhere; empty parts are left out."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}{style}</style></head>\n<body>\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )


def items(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], text_columns: int = 1) -> str:
    """An HTML table; each row is (CSS class, cells); the first columns are left-aligned text."""

    def kind(i: int) -> str:
        return ' class="text"' if i < text_columns else ""

    head = "".join(f"<th{kind(i)}>{text(h)}</th>" for i, h in enumerate(header))
    body = "".join(
        f'<tr class="{css}">'
        + "".join(f"<th>{text(v)}</th>" if i == 0 else f"<td{kind(i)}>{text(v)}</td>" for i, v in enumerate(values))
        + "</tr>"
        for css, values in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.1f} min"
        if seconds < 36000
        else f"{seconds / 3600:.1f} h"
    )


def size_in_bytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f} GB" if count < 1e12 else f"{count / 1e12:.1f} TB"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def decimal(value: float | None, factor: float = 1.0, digits: int = 3) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def power(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}".replace("e+", "e")
