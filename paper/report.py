"""Records of tables as Markdown, and all of them with their pictures as one HTML file that needs nothing else."""

import base64
import json
from collections import Counter
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from paper.plans import duration
from paper.tables import ORDER
from runtime.errors import UserError
from runtime.files import write_text

CAPTIONS = {
    "fig1": "Figure 1: the learning-rate paths of the three paradigms, and of averaging",
    "fig2": "Figure 2: mean perplexity against relative cost; the lower left is best",
    "fig3": "Figure 3: the learning-rate schedules over one increment",
    "fig6": "Figure 6: the learning rates of CPT's variants",
    "loss": "Losses: training (thin) and validation (dots; crosses: of the running mean) over steps",
}
Matrix = list[list[str]]


def grid(record: dict[str, Any]) -> Matrix:
    """The table itself: labels, costs, PPL of each column, APPL, and the paper's numbers."""
    if "header" in record:
        return [record["header"], *record["rows"]]
    first, columns, several = record["rows"][0], record["columns"], len(record["seeds"]) > 1
    appl, printed = "appl" in first, any(r["paper"] for r in record["rows"])
    of_paper = [f"paper: {c}" for c in columns] if printed else []
    rows = [[*first["labels"], *first["costs"], *columns, *["APPL"] * appl, *of_paper]]
    for r in record["rows"]:
        row = [*r["labels"].values(), *(f"{v:.2f}x" for v in r["costs"].values())]
        row += [f"{r['ppl'][c]:.2f}" + (f" ± {r['sd'][c]:.2f}" if several else "") for c in columns]
        row += [f"{r['appl']:.2f}"] if appl else []
        row += [f"{r['paper'][c]:.2f}" if c in r["paper"] else "-" for c in columns] if printed else []
        rows.append(row)
    return rows


def gaps(record: dict[str, Any]) -> Matrix:
    """Paired differences with their standard errors."""
    if not record.get("differences"):
        return []
    grouped = any(d["group"] for d in record["differences"])
    rows = [[*["group"] * grouped, "difference", *record["columns"]]]
    for d in record["differences"]:
        se = {c: "" if v is None else f" ({v:.2f})" for c, v in d["se"].items()}
        cells = [f"{d['value'][c]:+.2f}{se[c]}, {d['relative'][c]:+.1%}" for c in record["columns"]]
        rows.append([*[d["group"]] * grouped, " - ".join(d["minus"]), *cells])
    return rows


def words(record: dict[str, Any]) -> list[str]:
    """Paragraphs: what was measured, notes, and how it was made."""
    if "seeds" not in record:
        return record.get("notes", [])
    n, m, documents = len(record["seeds"]), record["made"], record["documents"]
    spread = "One seed" if n == 1 else f"Mean ± standard deviation over {n} seeds"
    paired = f"differences paired by {'document' if n == 1 else 'seed'} (standard error)"
    if n == documents == 1:
        paired = "with one document as well no difference has a standard error, and no statement is judged"
    measured = f"PPL on {record['tokens']:,} tokens of {documents} held-out document{'s' * (documents > 1)}."
    took = f"{m['segments']} segments, {m['steps']:,} steps, {duration(m['seconds'])} of training, summed over segments"
    commits = f"commit {', '.join(m['commits']) or 'unknown'}"
    made = "; ".join([f"Scale {m['scale']}", took, *m["devices"], *m["versions"], commits, m["date"]])
    return [f"{measured} {spread}; {paired}. cost: steps relative to PTFS.", *record["notes"], f"{made}."]


def statements(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(verdict, a claim of the paper, in how many places it holds, and where it does not clearly)."""
    out = []
    for c in record.get("claims", []):
        unclear, against = list[str](), list[str]()
        for p in c["parts"]:
            if not (p["holds"] and p["clear"]):
                printed = f" (the paper's {p['paper']:+.2f})" if p["paper"] is not None else ""
                se = "" if p["se"] is None else f" ± {p['se']:.2f}"
                (against if p["clear"] else unclear).append(f"{p['where']} {p['value']:+.2f}{se}{printed}")
        n, holds = len(c["parts"]), sum(p["holds"] for p in c["parts"])
        text = f"{c['text']}: in {holds} of {n}, clearly in {n - len(unclear + against)}"
        for what, places in (("clearly against it", against), ("not clearly", unclear)):
            text += f"; {what}: {'; '.join(places)}" if places else ""
        out.append((c["verdict"], text))
    return out


LEGEND = (
    "HOLDS: every difference has the stated sign beyond 95 % of chance (Student's t over seeds, or the normal "
    "distribution over documents for one seed); FAILS: one has the other sign beyond it; OPEN: neither. "
    "Differences are given ± their standard error, and so that below zero is as stated."
)


def markdown(record: dict[str, Any]) -> str:
    """A record as Markdown, to read in a terminal as well."""

    def lines(rows: Matrix) -> list[str]:
        left = next((i for i, cell in enumerate(rows[1]) if cell and cell[0] in "+-0123456789"), 1)
        head, *body = ("| " + " | ".join(r) + " |" for r in rows)
        return [head, "|" + " --- |" * left + " ---: |" * (len(rows[0]) - left), *body]

    out = [f"### {record['title']}", "", *lines(grid(record))]
    if rows := gaps(record):
        out += ["", *lines(rows)]
    out += [line for paragraph in words(record) for line in ("", paragraph)]
    if found := statements(record):
        out += ["", *(f"- **{verdict}** {text}" for verdict, text in found), "", LEGEND]
    return "\n".join(out) + "\n"


def table_html(rows: Matrix) -> str:
    head, *body = rows
    kinds = []  # a class of the style sheet for each column
    for title, *cells in zip(*rows, strict=True):
        numeric = all(cell[:1] in "+-0123456789" for cell in cells)
        kinds.append("paper" if title.startswith("paper: ") else "" if numeric else "text")

    def line(tag: str, row: list[str], group: bool = False) -> str:
        cells = (f'<{tag} class="{k}">{escape(cell)}</{tag}>' for k, cell in zip(kinds, row, strict=True))
        return f"<tr{' class=group' * group}>{''.join(cells)}</tr>\n"

    lines = [line("th", head)]
    lines += [line("td", row, group=row[0] != before[0]) for before, row in zip([body[0], *body], body, strict=False)]
    return f"<table>{''.join(lines)}</table>\n"


def seeds(record: dict[str, Any]) -> str:
    """How many seeds a record is of, in words; empty if nothing was trained for it."""
    n = len(record.get("seeds") or record.get("scores", [{"seeds": ()}])[0]["seeds"])
    return f"{n} seed{'s' * (n > 1)}" if n else ""


def verdicts(said: list[tuple[str, str]]) -> str:
    items = "".join(f'<li><b class="{v}">{v}</b>{escape(text)}</li>\n' for v, text in said)
    return f"<ul>{items}</ul>" if items else ""


def contents(records: dict[str, dict[str, Any]]) -> str:
    """A row for each table and figure: a link, its seeds, and how its statements were judged."""
    rows = ""
    count = Counter(c["verdict"] for record in records.values() for c in record.get("claims", []))
    for name, record in records.items():
        title, _, about = map(escape, record["title"].partition(": "))
        said = [(c["verdict"], c["text"]) for c in record.get("claims", [])]
        rows += f'<tr><td><a href="#{name}">{title}</a></td><td>{about}</td><td>{seeds(record)}</td>'
        rows += f"<td>{verdicts(said)}</td></tr>\n"
    judged = ", ".join(f"{count[v]} {v}" for v in ("HOLDS", "OPEN", "FAILS"))
    return f'<p>Statements of all tables, ours among them: {judged}.</p>\n<table class="contents">{rows}</table>\n'


def section(name: str, record: dict[str, Any], picture: bytes | None) -> str:
    """One table or figure: numbers, claims, picture; below them the differences and how it was made."""
    title = escape(record["title"])
    out = f'<h2 id="{name}">{title} <small>{seeds(record)}</small></h2>\n'
    if "rows" in record:
        out += f"{table_html(grid(record))}{verdicts(statements(record))}\n"
    if picture is not None:
        if not picture.startswith(b"\x89PNG"):
            raise ValueError
        width = int.from_bytes(picture[16:20]) * 100 // 150  # drawn at 150 dots an inch; so all letters have one size
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        out += f'<img alt="{title}" width="{width}" src="{source}">\n'
    if rows := gaps(record):
        out += f"<details><summary>Paired differences</summary>{table_html(rows)}</details>\n"
    return out + "".join(f'<p class="small">{escape(paragraph)}</p>\n' for paragraph in words(record))


def page(results: Path) -> Path:
    """Write report.html from the records and pictures of a folder. UserError if there are none yet."""
    records: dict[str, dict[str, Any]] = {}
    body, settings = "", set()
    for name in ORDER:
        file, drawn = results / f"{name}.json", results / f"{name}.png"
        if not file.exists() and not drawn.exists():
            continue
        try:
            record: Any = json.loads(file.read_text("utf-8")) if file.exists() else {"title": CAPTIONS.get(name, name)}
            body += section(name, record, drawn.read_bytes() if drawn.exists() else None)
            if "made" in record:
                settings.add(f"<pre>{escape(json.dumps(record['made']['config'], indent=1))}</pre>")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file} or {drawn.name}: is damaged; delete both, and ask for {name} again") from None
        records[name] = record
    if not body:
        raise UserError(f"{results}: has no table or figure yet; make some: python -m paper table3 --schedules cosine")
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    text = template.substitute(legend=LEGEND, contents=contents(records), body=body, settings="".join(sorted(settings)))
    write_text(results / "report.html", text)
    return results / "report.html"
