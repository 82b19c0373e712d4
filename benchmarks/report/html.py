"""The page: one file with everything in it, readable without a network, a script or another file.

Rule: all text goes through the template engine's escaping; only our own plots are put in as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from benchmarks.report.plots import Plot
from benchmarks.report.units import clean, factor, interval, middle_and_ends, nanoseconds, number, quantity
from benchmarks.report.verdicts import CONDITIONS, judge
from benchmarks.report.view import Cell, Key, View
from benchmarks.results import Figure
from benchmarks.statistics import Summary
from benchmarks.targets import JUDGED

FIRST_GROUPS = ("lookup", "read")
"""Whose throughput comes before everything else."""
NOISIEST = 12


@dataclass(frozen=True, slots=True)
class ShownCell:
    """A system's figure under one condition, as texts; ``reason`` alone where there is none."""

    reason: str = ""
    median: str = ""
    ends: str = ""
    rate: str = ""
    latencies: str = ""
    to_limit: str = ""
    limit_interval: str = ""
    to_peer: str = ""
    peer_interval: str = ""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One system."""

    name: str
    ours: bool
    absent: bool
    cells: tuple[ShownCell, ...]


@dataclass(frozen=True, slots=True)
class ShownChecks:
    """How one system's caches were checked under one condition, as texts."""

    system: str
    condition: str
    verified: int
    samples: int
    dentries: str
    cached: str
    resident: str
    spinner: str
    cpus: str
    load: str
    texts: str
    extra: str


@dataclass(frozen=True, slots=True)
class ShownTable:
    """One step with one number of clients: all systems, all conditions."""

    figure: Figure
    title: str
    clients: int
    show_clients: bool
    conditions: tuple[str, ...]
    rates: bool
    rate_title: str
    latencies: bool
    columns: int
    rows: tuple[ShownRow, ...]
    checks: tuple[ShownChecks, ...]
    verified: int
    samples: int
    same_answers: int
    compared: int


@dataclass(frozen=True, slots=True)
class ShownWorkload:
    """A workload's tables."""

    name: str
    title: str
    anchor: str
    tables: tuple[ShownTable, ...]


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """A group's plots (those not shown at the top) and workloads."""

    name: str
    plots: tuple[Plot, ...]
    workloads: tuple[ShownWorkload, ...]


def page(view: View, plots: Sequence[Plot]) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "number": number}
    first = [plot for plot in plots if plot.name in FIRST_GROUPS]
    return environment.get_template("page.html").render(
        run=view.run,
        missing=view.missing,
        judged=JUDGED,
        first_plots=first,
        verdict_conditions=CONDITIONS,
        targets=judge(view),
        groups=_groups(view, [plot for plot in plots if plot not in first]),
        noise=_noise(view),
        troubles=view.troubles,
        skips=view.skips,
    )


def _groups(view: View, plots: Sequence[Plot]) -> tuple[ShownGroup, ...]:
    numbers = {workload: turn for turn, workload in enumerate(dict.fromkeys(item.workload for item in view.figures))}
    return tuple(
        ShownGroup(
            group,
            tuple(plot for plot in plots if plot.group == group),
            tuple(_workload(view, name, f"workload-{numbers[name]}") for name in view.workloads(group)),
        )
        for group in view.groups
    )


def _workload(view: View, name: str, anchor: str) -> ShownWorkload:
    figures = view.steps(name)
    tables = tuple(table(view, figure, clients) for figure in figures for clients in view.clients(figure))
    return ShownWorkload(name, figures[0].workload_title, anchor, tables)


def table(view: View, figure: Figure, clients: int) -> ShownTable:
    """What is shown of one step with ``clients`` clients."""
    conditions = view.conditions_of(figure, clients)
    keys = [Key(figure.workload, figure.step, condition, clients) for condition in conditions]
    found = [(key, cell) for key in keys for system in view.systems if (cell := view.cell(key, system.name))]
    cells = [cell for _, cell in found]
    rates, latencies = any(cell.rate for cell in cells), any(cell.latencies for cell in cells)
    rows = tuple(
        ShownRow(
            system.name,
            system.name.startswith("vzfs"),
            bool(system.missing),
            tuple(
                shown_cell(cell) if (cell := view.cell(key, system.name)) else ShownCell(view.why_not(key, system))
                for key in keys
            ),
        )
        for system in view.systems
    )
    return ShownTable(
        figure=figure,
        title=figure.title,
        clients=clients,
        show_clients=len(view.clients(figure)) > 1,
        conditions=conditions,
        rates=rates,
        rate_title="MiB/s" if any(cell.rate_unit == "MiB/s" for cell in cells) else "operations/s",
        latencies=latencies,
        columns=4 + rates + latencies,
        rows=rows,
        checks=tuple(_checks(key, cell) for key, cell in found),
        verified=sum(cell.checks.verified for cell in cells),
        samples=sum(cell.checks.samples for cell in cells),
        same_answers=sum(cell.checks.same_answers for cell in cells),
        compared=sum(cell.checks.compared for cell in cells),
    )


def shown_cell(cell: Cell) -> ShownCell:
    """The texts of a cell."""
    middle, ends = middle_and_ends(cell.figure, cell.unit)
    return ShownCell(
        median=middle if cell.checks.verified == cell.checks.samples else f"{middle} *",
        ends=ends,
        rate=number(cell.rate.median) if cell.rate else "",
        latencies=" / ".join("–" if value is None else nanoseconds(value) for value in cell.latencies),
        to_limit=factor(cell.to_limit.value) if cell.to_limit else "",
        limit_interval=interval(cell.to_limit) if cell.to_limit else "",
        to_peer=factor(cell.to_peer.value) if cell.to_peer else "best peer" if cell.best_peer else "",
        peer_interval=interval(cell.to_peer) if cell.to_peer else "",
    )


def _checks(key: Key, cell: Cell) -> ShownChecks:
    checks = cell.checks
    return ShownChecks(
        system=cell.system,
        condition=key.condition,
        verified=checks.verified,
        samples=checks.samples,
        dentries=_whole(checks.dentries_grown),
        cached=f"{number(checks.cached_grown_mib.median)} MiB",
        resident=_percent(checks.resident),
        spinner=_percent(checks.spinner),
        cpus=", ".join(str(cpu) for cpu in checks.server_cpus),
        load=f"{number(checks.load.smallest)} – {number(checks.load.largest)}",
        texts="; ".join(checks.texts),
        extra="; ".join(f"{name}: {number(found.median)}" for name, found in cell.extra),
    )


def _whole(found: Summary) -> str:
    return f"{found.median:,.0f} ({found.smallest:,.0f} – {found.largest:,.0f})"


def _percent(found: Summary | None) -> str:
    return f"{found.median * 100:.0f} %" if found else ""


def _noise(view: View) -> dict[str, object]:
    spreads = [cell.figure.spread * 100 for _, cell in view.all_cells()]
    middle, ninth = np.percentile(spreads, [50, 90]) if spreads else (0.0, 0.0)
    return {
        "cells": len(spreads),
        "middle": number(float(middle)),
        "ninth": number(float(ninth)),
        "worst": [_noisy(view, key, cell) for key, cell in view.noisiest(NOISIEST)],
    }


def _noisy(view: View, key: Key, cell: Cell) -> dict[str, object]:
    figure = view.figure_of(key.workload, key.step)
    middle, ends = middle_and_ends(cell.figure, cell.unit)
    return {
        "title": f"{figure.workload_title}: {figure.title}" if figure else f"{key.workload}: {key.step}",
        "system": cell.system,
        "condition": key.condition,
        "clients": key.clients,
        "median": middle,
        "ends": ends,
        "rounds": ", ".join(quantity(value, cell.unit) for value in cell.figures),
    }
