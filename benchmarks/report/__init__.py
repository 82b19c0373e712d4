"""Reports of a run: an HTML page that needs nothing else, and Markdown with SVG plots for documents.

view.py      what is shown, as numbers
verdicts.py  the run judged by ``benchmarks.targets``
units.py     numbers as text
plots.py     plots as SVG
html.py      the page (its text is ``page.html``)
markdown.py  the documents
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import html, markdown
from benchmarks.report.plots import Plot, plots
from benchmarks.report.view import View
from benchmarks.results import Run
from vzfs.errors import UsageError

PAGE, SUMMARY, PLOTS = "report.html", "report.md", "plots"
"""Names in the output folder."""


def write_report(run: Run, output: Path, *, document: Path | None = None) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``plots/*.svg`` into ``output``, which is made if need be.

    With ``document``, also replace that Markdown page's part between the markers of ``markdown``, and write its plots
    into ``plots`` beside it. Returns what was written. Raises ``UsageError`` if a place can't be written, the document
    has no markers, or the run has figures that are no numbers; nothing is written then, except where the disk fails
    half-way.
    """
    view = View(run)
    drawn = plots(view)
    summary = markdown.text(view, drawn, PLOTS)
    texts = {output / PAGE: html.page(view, drawn), output / SUMMARY: f"# Benchmarks\n\n{summary}"}
    texts |= _plot_files(drawn, output / PLOTS)
    try:
        if document is not None:
            texts[document] = markdown.update(document.read_text(encoding="utf-8"), summary, str(document))
            texts |= _plot_files(drawn, document.parent / PLOTS)
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the report can't be written: {error}", remedy="choose another --output") from error
    return list(texts)


def _plot_files(drawn: list[Plot], folder: Path) -> dict[Path, str]:
    return {folder / f"{plot.name}.svg": plot.svg for plot in drawn}
