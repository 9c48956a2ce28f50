"""One HTML page with everything that was measured: pictures as data URIs, tables, where and how. It needs no file."""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path

from .plots import planned
from .tables import measured, newest

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 76em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto }
td, th { border: 1px solid #d8d8d8; padding: .25em .6em; text-align: left; white-space: nowrap }
th { background: #f3f3f3 } img { max-width: 100%; height: auto } code { background: #f3f3f3 }
""".strip()


def inline(text: str) -> str:
    """Code and links of a line of Markdown."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\[([^\]]*)\]\(bench/results/([^)]*)\)", r'<a href="../\2">\1</a>', text)


def body(markdown: str) -> str:
    """Paragraphs and tables."""
    parts = []
    for block in markdown.split("\n\n"):
        lines = block.splitlines()
        if not block.startswith("|"):
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
            continue
        head, _, *rows = ([inline(c.strip()) for c in line.strip("|").split("|")] for line in lines)
        cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in row) + "</tr>"
        parts.append("<table>" + "\n".join([cells(head, "th"), *(cells(row, "td") for row in rows)]) + "</table>")
    return "\n".join(parts)


def provenance(results: Path) -> str:
    """A table of every file: machine, versions, command, how busy the machine was."""
    lines = ["| file | machine | torch | commit | when | load | command |", "|---|---|---|---|---|---|---|"]
    for contents in newest(results).values():
        for content in contents:
            p = content["provenance"]
            commit = (p["git"] or "unknown")[:10] + (" with changes" if p["git_changed"] else "")
            load = (p.get("probe") or {}).get("load_average")
            told = [p["device_name"], p["torch"], commit, p["time"][:16], "" if load is None else str(load)]
            file = f"[{content['path']}](bench/results/{content['path']})"
            lines.append("| " + " | ".join([file, *told, f"`{p['command']}`"]) + " |")
    return body("\n".join(lines))


def render(results: Path, pictures: Mapping[str, bytes]) -> str:
    """The page."""
    parts = []
    for plan in planned(results):
        data = base64.b64encode(pictures[plan.name]).decode()
        parts.append(f'<p><img alt="{html.escape(plan.title)}" src="data:image/png;base64,{data}"></p>')
    head = f'<meta charset="utf-8"><title>fused_attn: measured</title><style>{STYLE}</style>'
    content = "\n".join([*parts, "<h2>Tables</h2>", body(measured(results)), "<h2>Files</h2>", provenance(results)])
    title = "<h1>fused_attn: measured</h1>"
    return f'<!doctype html><html lang="en"><head>{head}</head>\n<body>{title}\n{content}\n</body></html>\n'
