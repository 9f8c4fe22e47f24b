"""HTML fragments of a report: every text escaped, every number set alike, one style sheet."""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

from pyro_vae.runs.canvas import DPI, number

__all__ = [
    "definitions",
    "document",
    "duration",
    "is_number",
    "number_table",
    "picture",
    "table",
    "tree",
    "value",
]

_CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff;
  --tint: #f5f6f7; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --soft: #a3a3a3; --line: #3b3b3b;
  --paper: #17181a; --tint: #222427; --accent: #66b5e3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 900px; margin: 0 auto; padding: 0 1.25rem; }
main, header, footer { box-sizing: content-box; }
h1 { margin: 2.5rem 0 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .6rem; font-size: 1.2rem; }
p, figcaption { max-width: 42rem; }
.soft, figcaption, dt, th, .tree code, footer { color: var(--soft); }
.note { padding: .6rem .9rem; border-left: 4px solid #d55e00; background: var(--tint); }
dl { display: flex; flex-wrap: wrap; gap: 1px; margin: 1.25rem 0 2.5rem; padding: 1px;
  background: var(--line); }
dl > div { flex: 1 1 10rem; padding: .7rem .9rem; background: var(--paper); }
dl > .first { flex-basis: 100%; }
dt { font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.first dd { color: var(--accent); font-size: clamp(1.3rem, 6vw, 2rem); font-weight: 600;
  line-height: 1.25; }
dd small { display: block; color: var(--soft); font-size: .85rem; font-weight: 400; }
figure { margin: 2.5rem 0 0; }
h2:not(.unseen) + figure { margin-top: 0; }
.unseen { position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: .4rem; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; white-space: nowrap; }
.numbers th, .numbers td { text-align: right; white-space: nowrap; }
.tree, .tree ul { margin: 0; padding-left: 1.1rem; list-style: none; font-size: .9rem; }
.tree { padding-left: 0; }
.tree ul { border-left: 1px solid var(--line); }
code { font: .92em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 3rem; padding-bottom: 2.5rem; font-size: .85rem; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --tint: #fff; --accent: #000; }
  body { font-size: 10pt; }
  figure, dl, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  @page { margin: 18mm; }
}
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole page; `parts` are HTML, the title is text."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"


def definitions(items: Sequence[tuple[str, str, str]], *, first_is_large: bool) -> str:
    """Return a list of (name, figure, unit), all text."""
    rows = [
        f"<dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(unit)}</small></dd>"
        for name, figure, unit in items
    ]
    divisions = [f"<div>{row}</div>" for row in rows]
    if rows and first_is_large:
        divisions[0] = f'<div class="first">{rows[0]}</div>'
    return "<dl>\n" + "\n".join(divisions) + "\n</dl>" if rows else ""


def picture(content: bytes, heading: str, caption: str, *, has_title: bool) -> str:
    """Return a section with a PNG inside the page.

    A picture with a title within is one of `plots`: it's shown at the size for which its letters
    were set, its heading serves the outline and screen readers. Others have a pixel a CSS pixel.
    """
    width, height = struct.unpack(">II", content[16:24])
    scale = 100 / DPI if has_title else 1
    size = f'width="{width * scale:.0f}" height="{height * scale:.0f}"'
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    seen = ' class="unseen"' if has_title else ""
    return (
        f"<section>\n<h2{seen}>{escape(heading)}</h2>\n<figure>"
        f'<img alt="{escape(heading)}" {size} src="{source}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n</section>"
    )


def table(heading: str, content: Any) -> str:
    """Return a section with a table of two columns, or nothing where there is nothing to show."""
    if not isinstance(content, Mapping) or not content:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(key).replace("_", " "))}</th><td>{tree(item)}</td></tr>'
        for key, item in content.items()
    )
    return f"<section>\n<h2>{escape(heading)}</h2>\n<table>\n{rows}\n</table>\n</section>"


def number_table(heading: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a section with a table of one row a record, or nothing where there is none."""
    if not records:
        return ""
    keys = list(dict.fromkeys(key for record in records for key in record))
    head = "".join(f'<th scope="col">{escape(key.replace("_", " "))}</th>' for key in keys)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{tree(record.get(key, ''))}</td>" for key in keys) + "</tr>"
        for record in records
    )
    return (
        f'<section>\n<h2>{escape(heading)}</h2>\n<div class="wide"><table class="numbers">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n</section>"
    )


def tree(content: Any) -> str:
    """Return a JSON value: what is simple on one line, what is not as a nested list."""
    if isinstance(content, Mapping) and content:
        named = [(f"<code>{escape(str(key))}</code>", item) for key, item in content.items()]
    elif isinstance(content, list) and any(isinstance(item, list | dict) for item in content):
        named = [("", item) for item in content]
    else:
        return escape(value(content))
    rows = "\n".join(f"<li>{name} {_on_one_line(item)}</li>" for name, item in named)
    return f'<ul class="tree">\n{rows}\n</ul>'


def _on_one_line(content: Any) -> str:
    """A JSON value beside its name: a call, which is one name with its arguments, begins there."""
    if isinstance(content, Mapping) and len(content) == 1:
        [(name, arguments)] = content.items()
        if isinstance(arguments, Mapping):
            return f"{escape(str(name))} {tree(arguments) if arguments else ''}"
    return tree(content)


def value(content: Any) -> str:
    """Return a simple JSON value as text, not yet escaped.

    Example:
        >>> value([1234, 0.0005, None, True])
        '1,234, 0.0005, none, yes'
    """
    if isinstance(content, bool):
        return "yes" if content else "no"
    if content is None:
        return "none"
    if isinstance(content, list):
        return ", ".join(map(value, content)) or "none"
    if isinstance(content, int):
        return number(content, 0)
    if isinstance(content, float):
        return f"{content:.6g}".replace("-", "\N{MINUS SIGN}")
    return str(content) if content != {} else "none"


def duration(seconds: float) -> str:
    """Return a time in the units a person would take.

    Example:
        >>> duration(12.34), duration(754), duration(7325)
        ('12.3 s', '12 min 34 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def is_number(content: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number."""
    simple = isinstance(content, int | float) and not isinstance(content, bool)
    return simple and math.isfinite(content)
