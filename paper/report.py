"""Records of tables as Markdown, and all of them with their pictures as one HTML file that needs nothing else."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from paper.graph import duration
from paper.tables import ORDER
from runtime.errors import UserError
from runtime.files import read_bytes, write_text

CAPTIONS = {
    "fig1": "Figure 1: the learning-rate paths of the three paradigms",
    "fig2": "Figure 2: mean perplexity against relative cost; the lower left is best",
    "fig3": "Figure 3: the learning-rate schedules over one increment",
    "fig6": "Figure 6: the learning rates of CPT's variants",
    "loss": "Losses: training (thin) and validation (dots) over steps",
}
Matrix = list[list[str]]


def grid(record: dict[str, Any]) -> Matrix:
    """The table itself: labels, costs, PPL of each column, APPL, and what the paper prints."""
    if "header" in record:
        return [record["header"], *record["rows"]]
    first, columns, several = record["rows"][0], record["columns"], len(record["seeds"]) > 1
    appl, printed = "appl" in first, any(r["paper"] for r in record["rows"])
    head = [
        *first["labels"],
        *first["costs"],
        *columns,
        *["APPL"] * appl,
        *([f"paper: {c}" for c in columns] if printed else []),
    ]
    rows = []
    for r in record["rows"]:
        ppl = [f"{r['ppl'][c]:.2f}" + (f" ± {r['sd'][c]:.2f}" if several else "") for c in columns]
        paper = [f"{r['paper'][c]:.2f}" if c in r["paper"] else "-" for c in columns] if printed else []
        rows.append(
            [
                *r["labels"].values(),
                *(f"{v:.2f}x" for v in r["costs"].values()),
                *ppl,
                *[f"{r.get('appl', 0):.2f}"] * appl,
                *paper,
            ]
        )
    return [head, *rows]


def gaps(record: dict[str, Any]) -> Matrix:
    """Paired differences with their standard errors."""
    if not record.get("differences"):
        return []
    grouped = any(d["group"] for d in record["differences"])
    rows = [[*["group"] * grouped, "difference", *record["columns"]]]
    for d in record["differences"]:
        cells = [f"{d['value'][c]:+.2f} ({d['se'][c]:.2f}), {d['relative'][c]:+.1%}" for c in record["columns"]]
        rows.append([*[d["group"]] * grouped, " - ".join(d["minus"]), *cells])
    return rows


def words(record: dict[str, Any]) -> list[str]:
    """What the numbers are, and by what they were made."""
    if "seeds" not in record:
        return record.get("notes", [])
    n, m = len(record["seeds"]), record["made"]
    spread = (
        f"Mean ± standard deviation over {n} seeds; differences paired by seed (standard error)"
        if n > 1
        else "One seed; differences paired by document (standard error)"
    )
    lines = [
        f"PPL on {record['tokens']:,} tokens of {record['documents']} held-out documents. {spread}. cost: steps relative to PTFS.",
        *record["notes"],
    ]
    lines.append(
        f"Scale {m['scale']}; {m['segments']} segments, {m['steps']:,} steps, {duration(m['seconds'])} of training, summed over segments; {'; '.join(m['devices'])}; "
        f"{'; '.join(m['versions'])}; commit {', '.join(m['commits']) or 'unknown'}; {m['date']}."
    )
    return lines


def statements(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(verdict, the paper's statement, in how many places it holds, and where it does not clearly)."""
    out = []
    for c in record.get("claims", []):
        others = []
        for p in c["parts"]:
            if not (p["holds"] and p["clear"]):
                printed = f" (the paper's {p['paper']:+.2f})" if p["paper"] is not None else ""
                others.append(
                    f"{p['where']} {p['value']:+.2f} ± {p['se']:.2f}{printed}" + (" against it" if p["clear"] else "")
                )
        held, clear = sum(p["holds"] for p in c["parts"]), sum(p["holds"] and p["clear"] for p in c["parts"])
        words = f"{c['text']}: in {held} of {len(c['parts'])}, clearly in {clear}"
        out.append((c["verdict"], words + (f"; not clearly: {'; '.join(others)}" if others else "")))
    return out


LEGEND = "HOLDS: every difference has the stated sign beyond 95 % of chance (Student's t over seeds, or the normal distribution over documents for one seed); FAILS: one has the other sign beyond it; OPEN: neither. Differences are given ± their standard error, and so that below zero is as stated."


def markdown(record: dict[str, Any]) -> str:
    """A record as Markdown, to read in a terminal as well."""

    def lines(rows: Matrix) -> list[str]:
        left = next((i for i, cell in enumerate(rows[1]) if cell[:1] in "+-0123456789" and cell != ""), 1)
        return [
            "| " + " | ".join(rows[0]) + " |",
            "|" + " --- |" * left + " ---: |" * (len(rows[0]) - left),
            *("| " + " | ".join(r) + " |" for r in rows[1:]),
        ]

    out = [f"### {record['title']}", "", *lines(grid(record))]
    if rows := gaps(record):
        out += ["", *lines(rows)]
    for w in words(record):
        out += ["", w]
    if found := statements(record):
        out += ["", *(f"- **{verdict}** {text}" for verdict, text in found), "", LEGEND]
    return "\n".join(out) + "\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 3rem 0 .6rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .86rem; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid #888; font-weight: 600; } td.text, th.text { text-align: left; } tr.group td { border-top: 1px solid #bbb; } .paper { color: #777; }
img { max-width: 100%; height: auto; margin: .8rem 0; } p.small, footer { color: #666; font-size: .82rem; }
ul { padding-left: 0; list-style: none; } li { margin: .3rem 0; padding-left: 4.6rem; position: relative; }
li b { position: absolute; left: 0; width: 4rem; text-align: center; border-radius: 3px; font-size: .74rem; line-height: 1.45rem; color: #fff; }
.HOLDS { background: #00795a; } .FAILS { background: #b84a00; } .OPEN { background: #777; }
nav a { margin-right: .8rem; white-space: nowrap; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .78rem; }
"""


def table_html(rows: Matrix) -> str:
    e, body, before = html.escape, "", None
    numeric = [all(r[i][:1] in "+-0123456789" for r in rows[1:]) for i in range(len(rows[0]))]
    kinds = [" ".join(["text"] * (not numeric[i]) + ["paper"] * h.startswith("paper: ")) for i, h in enumerate(rows[0])]
    for r in rows[1:]:
        body += f"<tr{' class=group' if r[0] != before and before is not None else ''}>"
        body += "".join(f'<td class="{k}">{e(cell)}</td>' for k, cell in zip(kinds, r, strict=True)) + "</tr>\n"
        before = r[0]
    return (
        "<table><tr>"
        + "".join(f'<th class="{k}">{e(h)}</th>' for k, h in zip(kinds, rows[0], strict=True))
        + f"</tr>\n{body}</table>\n"
    )


def section(name: str, title: str, record: dict[str, Any] | None, picture: bytes | None) -> str:
    """One table or figure: numbers, statements, picture, and below them what is for the careful reader."""
    e = html.escape
    out = f'<h2 id="{name}">{e(title)}</h2>\n'
    if record:
        out += table_html(grid(record))
        out += (
            "<ul>"
            + "".join(f'<li><b class="{e(v)}">{e(v)}</b>{e(text)}</li>\n' for v, text in statements(record))
            + "</ul>\n"
        )
    if picture:
        width = int.from_bytes(picture[16:20]) * 100 // 150  # drawn at 150 dots an inch; so that letters have one size
        out += (
            f'<img alt="{e(title)}" width="{width}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">\n'
        )
    if record:
        if rows := gaps(record):
            out += f"<details><summary>Paired differences</summary>{table_html(rows)}</details>\n"
        out += "".join(f'<p class="small">{e(w)}</p>\n' for w in words(record))
    return out


def page(results: Path) -> Path:
    """Write report.html from the records and pictures of a folder. UserError if there are none yet, or one that paper did not write."""
    body = links = ""
    settings: dict[str, None] = {}
    for name in ORDER:
        file, drawn = results / f"{name}.json", results / f"{name}.png"
        if not file.exists() and not drawn.exists():
            continue
        try:
            record = json.loads(read_bytes(file)) if file.exists() else None
            title = record["title"] if record else CAPTIONS[name]
            body += section(name, title, record, read_bytes(drawn) if drawn.exists() else None)
            links += f'<a href="#{name}">{html.escape(title.partition(":")[0])}</a> '
            if record and "made" in record:
                settings[json.dumps(record["made"]["config"], indent=1)] = None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
            raise UserError(
                f"{file}: not as paper writes it ({type(e).__name__}: {e!s:.60}); make the table again: python -m paper {name}"
            ) from None
    if not body:
        raise UserError(f"{results}: no table or figure is there yet; make some: python -m paper table3 fig2")
    write_text(
        results / "report.html",
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Learning-rate path switching: results</title><style>{STYLE}</style></head><body>
<h1>Learning-rate path switching: tables and figures of the paper, measured here</h1>
<p>Perplexity (PPL) of versions of a language model trained from scratch (PTFS), continually (CPT) and by path switching (ours), beside what
<a href="https://arxiv.org/abs/2410.04103">the paper</a> prints for its own model and data. Lower is better.</p>
<p class="small">{LEGEND}</p><nav>{links}</nav>
{body}<h2>Settings</h2>{"".join(f"<pre>{html.escape(c)}</pre>" for c in settings)}</body></html>
""",
    )
    return results / "report.html"
