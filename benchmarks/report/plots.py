"""Plots of a run as SVG text.

Rules:
- Every round is a point; the median is a mark beside them. What scatters is seen to scatter.
- Dark on light, with a background of its own, so that a plot can be read on a page of any colour.
- Text stays text; identifiers are the plot's own, so that several plots fit into one page. The same run gives the
  same bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from benchmarks.report.units import clean
from benchmarks.report.view import PERCENTILES, Key, View, latency_medians, percentiles, rate_unit, sample_rate
from benchmarks.results import Figure, Sample, SystemInfo
from benchmarks.statistics import median

COLUMNS = 3
ROW_HEIGHT, PANEL_WIDTH, HEAD_HEIGHT = 0.34, 4.1, 0.75  # inches
LOGARITHMIC_FROM = 8.0
"""Largest to smallest value in a panel from which its axis is logarithmic."""
INK, FAINT, PAPER = "#1b1b1b", "#d9d9d9", "#ffffff"
COLOURS = {"idle": "#1f5fa8", "busy": "#c2571a"}
MARKERS = {"idle": "o", "busy": "D"}
PALETTE = ("#1f5fa8", "#c2571a", "#1d7d4f", "#8a4a9e", "#a38210", "#b03060", "#4c6b70", "#5b4636", "#000000")
"""Of systems, for lines; all dark enough on white."""
BAR = 0.16
"""Half the height of a median's mark, in lines; rounds are spread over half of the mark."""
PERCENTILE_MARKERS = {"p50": ("o", 10), "p99": (">", 12), "p999": ("|", 40)}
"""Shape and area in square points."""
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
GROWTH_GROUP = "scale"
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vzfs-bench",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """``name`` is a file name without ending, ``group`` the heading it belongs to; ``svg`` starts with ``<svg``."""

    name: str
    group: str
    title: str
    svg: str
    throughput: bool
    """Whether it is the group's main plot."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One step in a grid of plots."""

    figure: Figure
    clients: int
    title: str


def plots(view: View) -> list[Plot]:
    """All plots of a run, in the order of groups: throughput, then latencies, then numbers of clients."""
    found: list[Plot] = []
    with settings():
        for group in view.groups:
            title = group.capitalize()
            for name, words, canvas in (
                (group, f"{title}: every round", throughput_canvas(view, group)),
                (f"{group}-latency", f"{title}: latency percentiles", latency_canvas(view, group)),
                (f"{group}-clients", f"{title}: by number of clients", clients_canvas(view, group)),
                (f"{group}-growth", f"{title}: how cost grows", growth_canvas(view, group)),
            ):
                if canvas is not None:
                    safe = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "group"
                    found.append(Plot(safe, group, clean(words), as_svg(canvas, safe, clean(words)), name == group))
    return found


def throughput_canvas(view: View, group: str) -> Canvas | None:
    """Each step of a group with one client: a point for each round, system and condition. None without steps."""
    panels = [
        Panel(figure, clients[0], f"{figure.workload_title}\n{figure.title}")
        for figure in _figures(view, group)
        if (clients := view.clients(figure))
    ]

    def draw(axes: Axes, panel: Panel, systems: Sequence[SystemInfo]) -> None:
        _draw_rounds(axes, view, panel, systems)

    middle = Line2D([], [], color=INK, marker="|", markersize=10, linestyle="", markeredgewidth=1.6, label="median")
    return _grid(view, panels, draw, [*_condition_handles(view, panels), middle])


def latency_canvas(view: View, group: str) -> Canvas | None:
    """Percentiles of each step that has latencies, with one client; a point for each round. None without any."""
    panels = [
        Panel(figure, clients[0], f"{figure.workload_title}\n{figure.title}")
        for figure in _figures(view, group)
        if (clients := view.clients(figure)) and _has_latencies(view, figure, clients[0])
    ]

    def draw(axes: Axes, panel: Panel, systems: Sequence[SystemInfo]) -> None:
        _draw_latencies(axes, view, panel, systems)

    handles = [
        Line2D([], [], color=INK, marker=marker, markersize=math.sqrt(size), linestyle="", label=PERCENTILES[field][0])
        for field, (marker, size) in PERCENTILE_MARKERS.items()
    ]
    return _grid(view, panels, draw, [*_condition_handles(view, panels), *handles])


def clients_canvas(view: View, group: str) -> Canvas | None:
    """How throughput grows with clients, by system; a point for each round. None if there is one number of clients."""
    chosen = [
        (figure, condition)
        for figure in _figures(view, group)
        if len(view.clients(figure)) > 1 and not figure.unit
        for condition in view.conditions
    ]
    if not chosen:
        return None
    canvas, panels = _panels(len(chosen), max(1, len(view.conditions)), PANEL_WIDTH * 1.3, 2.6)
    colours = _system_colours(view)
    for axes, (figure, condition) in zip(panels, chosen, strict=True):
        _draw_clients(axes, view, figure, condition, colours)
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=4, label=_name(name)) for name, colour in colours.items()
    ]
    canvas.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False)
    return canvas


@dataclass(frozen=True, slots=True)
class Growth:
    """A panel: a quantity by the number of ``counted`` things, for each workload by its title."""

    title: str
    counted: str
    workloads: dict[str, dict[int, Figure]]


def growth_canvas(view: View, group: str) -> Canvas | None:
    """How cost grows with a template's size, and with the number that a step's name ends in (``lookup-50``): a line
    for each system and workload, a point for each round. None where nothing differs in a number only."""
    chosen = [*_by_workload(view, group), *_by_step(view, group)] if group == GROWTH_GROUP else []
    if not chosen:
        return None
    canvas, panels = _panels(len(chosen), min(COLUMNS, len(chosen)), PANEL_WIDTH * 1.2, 4.2)
    colours = _system_colours(view)
    titles = dict.fromkeys(title for growth in chosen if len(growth.workloads) > 1 for title in growth.workloads)
    styles = {title: STYLES[turn % len(STYLES)] for turn, title in enumerate(titles)}
    for axes, growth in zip(panels, chosen, strict=True):
        _draw_growth(axes, view, growth, colours, styles)
    handles = [Line2D([], [], color=colour, label=_name(name)) for name, colour in colours.items()]
    handles += [Line2D([], [], color=INK, linestyle=style, label=_name(title)) for title, style in styles.items()]
    canvas.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False)
    return canvas


def _by_workload(view: View, group: str) -> list[Growth]:
    """A step that at least three workloads have whose titles differ in their number only: sizes of a template."""
    growths: dict[tuple[str, str], Growth] = {}
    for figure in _figures(view, group):
        if found := re.search(r"\b(\d[\d,]*) (\w+)", figure.workload_title):
            title = figure.workload_title.replace(found[1], "N")
            growth = growths.setdefault((title, figure.step), Growth(figure.title, found[2], {title: {}}))
            growth.workloads[title][int(found[1].replace(",", ""))] = figure
    return [growth for growth in growths.values() if all(len(figures) > 2 for figures in growth.workloads.values())]


def _by_step(view: View, group: str) -> list[Growth]:
    """Steps whose titles differ in their number only, of one workload or of several."""
    steps: dict[tuple[str, str], dict[int, Figure]] = defaultdict(dict)
    for figure in _figures(view, group):
        if found := re.fullmatch(r"(.+)-(\d+)", figure.step):
            steps[figure.workload, found[1]][int(found[2])] = figure
    growths: dict[str, Growth] = {}
    for figures in steps.values():
        most = max(figures)
        number = re.compile(rf"\b{most:,}(?= (\w+)|\b)")
        counted = number.search(figures[most].title)
        title = number.sub("N", figures[most].title)
        growth = growths.setdefault(title, Growth(title, (counted and counted[1]) or "N", {}))
        growth.workloads[figures[most].workload_title] = figures
    return [growth for growth in growths.values() if any(len(figures) > 1 for figures in growth.workloads.values())]


@contextmanager
def settings() -> Iterator[None]:
    """The look of all plots; canvases must be made and written within."""
    with mpl.rc_context(SETTINGS):
        yield


def as_svg(canvas: Canvas, name: str, title: str) -> str:
    """A canvas as an ``<svg>`` element that says what it shows and stands alone."""
    text = StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href="|url\()#', rf"\1#{name}-", svg)
    svg = _shrink(svg, name)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).rstrip() + "\n"


def _shrink(svg: str, name: str) -> str:
    """The same in two thirds of the bytes: coordinates to a hundredth of a point, styles that recur said once."""

    def rounded(match: re.Match[str]) -> str:
        text = re.sub(r"-?\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}".rstrip("0").rstrip("."), match[2])
        return f'{match[1]}="{text}"'

    svg = re.sub(r'\b(x|y|d)="([^"]*)"', rounded, svg)
    styles = Counter(re.findall(r' style="([^"]*)"', svg))
    classes = {style: f"{name}-s{turn}" for turn, (style, count) in enumerate(styles.items()) if count > 3}
    rules = "".join(f".{short}{{{style}}}" for style, short in classes.items() if not re.search(r"[{}<>&]", style))
    svg = re.sub(
        r' style="([^"]*)"',
        lambda match: f' class="{classes[match[1]]}"' if f"{{{match[1]}}}" in rules else match[0],
        svg,
    )
    return re.sub(r"(<svg [^>]*>)", lambda match: f"{match[1]}<style>{rules}</style>", svg, count=1)


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Canvas, list[Axes]]:
    """A canvas with ``count`` panels, each of so many inches, in rows; what remains of the last row is blank."""
    rows = math.ceil(count / columns)
    canvas = Canvas(figsize=(width * columns, height * rows + HEAD_HEIGHT), layout="constrained")
    grid: Any = canvas.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for blank in axes[count:]:
        blank.set_visible(False)
    return canvas, axes[:count]


def _grid(
    view: View,
    panels: Sequence[Panel],
    draw: Callable[[Axes, Panel, Sequence[SystemInfo]], None],
    handles: Sequence[Line2D],
) -> Canvas | None:
    """Panels side by side, systems below each other in each."""
    systems = [system for system in view.systems if not system.missing]
    if not panels or not systems:
        return None
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = (ROW_HEIGHT * len(systems) + 1.05) * rows + HEAD_HEIGHT
    canvas = Canvas(figsize=(PANEL_WIDTH * columns + 0.6, height), layout="constrained")
    grid: Any = canvas.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        draw(axes, panels[place], systems)
        axes.set_title(_fold(panels[place].title), loc="left", fontsize=9)
        axes.set_ylim(len(systems) - 0.5, -0.5)
        axes.set_yticks(range(len(systems)), [_name(system.name) for system in systems])
        for label, system in zip(axes.get_yticklabels(), systems, strict=True):
            label.set_fontweight("bold" if system.name.startswith("vzfs") else "normal")
        axes.tick_params(axis="y", length=0, labelleft=place % columns == 0)
        for line in range(len(systems)):
            axes.axhline(line, color=FAINT, linewidth=0.6, zorder=0)
    canvas.legend(handles=list(handles), loc="outside upper left", ncols=6, frameon=False)
    return canvas


def _draw_rounds(axes: Axes, view: View, panel: Panel, systems: Sequence[SystemInfo]) -> None:
    every: list[float] = []
    unit = ""
    for condition, placed in _placed(view, panel, systems).items():
        colour = COLOURS.get(condition, INK)
        values: list[float] = []
        heights: list[float] = []
        middles: list[float] = []
        for samples, place in placed:
            found = [_value(sample, panel.figure) for sample in samples]
            unit = unit or rate_unit(samples, panel.figure)
            values += found
            heights += _spread(place, len(found))
            middles.append(median(found))
        # One call for all systems: a third of the time of one for each.
        axes.scatter(values, heights, s=13, marker=MARKERS.get(condition, "s"), color=colour, alpha=0.65, linewidths=0)
        places = np.asarray([place for _, place in placed])
        axes.vlines(middles, places - BAR, places + BAR, color=colour, linewidth=1.6)
        every += values
    if panel.figure.unit:
        axes.set_xlabel(f"{_name(panel.figure.unit)}   (← less is better)", fontsize=8)
    else:
        words = "MiB per second" if unit == "MiB/s" else "operations per second"
        axes.set_xlabel(f"{words}   (more is better →)", fontsize=8)
    _scale(axes, every)


def _draw_latencies(axes: Axes, view: View, panel: Panel, systems: Sequence[SystemInfo]) -> None:
    every: list[float] = []
    for condition, placed in _placed(view, panel, systems).items():
        colour = COLOURS.get(condition, INK)
        found = [(each, place) for samples, place in placed for one in samples if (each := percentiles(one))]
        for turn, (marker, size) in enumerate(PERCENTILE_MARKERS.values()):
            shown = [(value * 1e-9, place) for each, place in found if (value := each[turn]) is not None]
            values = [value for value, _ in shown]
            axes.scatter(
                values,
                [place for _, place in shown],
                s=size,
                marker=marker,
                color=colour,
                alpha=0.7,
                linewidths=0.8,
            )
            every += values
        lines = [
            (min(known) * 1e-9, max(known) * 1e-9, place)
            for samples, place in placed
            if (known := [middle for middle in latency_medians(samples) if middle is not None])
        ]
        starts, ends, places = zip(*lines, strict=True) if lines else ((), (), ())
        axes.hlines(places, starts, ends, color=colour, linewidth=0.8, alpha=0.6)
    axes.set_xlabel("latency   (← less is better)", fontsize=8)
    _scale(axes, every, unit="s", logarithmic=True)


def _draw_clients(axes: Axes, view: View, figure: Figure, condition: str, colours: dict[str, str]) -> None:
    numbers = view.clients(figure)
    values: list[float] = []
    for turn, (system, colour) in enumerate(colours.items()):
        offset = (turn - (len(colours) - 1) / 2) * 0.06
        middles = []
        for position, clients in enumerate(numbers):
            samples = view.samples(Key(figure.workload, figure.step, condition, clients), system)
            found = [_value(sample, figure) for sample in samples]
            if not found:
                continue
            values += found
            axes.scatter([position + offset] * len(found), found, s=9, color=colour, alpha=0.6, linewidths=0)
            middles.append((position + offset, median(found)))
        axes.plot([x for x, _ in middles], [y for _, y in middles], color=colour, linewidth=1.2)
    title = _fold(f"{figure.workload_title}: {figure.title}", 58)
    axes.set_title(f"{title}\n{_name(condition)}", loc="left", fontsize=9)
    axes.set_xticks(range(len(numbers)), [str(clients) for clients in numbers])
    axes.set_xlabel("clients", fontsize=8)
    axes.set_ylabel("MiB per second" if figure.throughput else "operations per second", fontsize=8)
    _scale(axes, values, axis="y")


def _draw_growth(axes: Axes, view: View, growth: Growth, colours: dict[str, str], styles: dict[str, Any]) -> None:
    values: list[float] = []
    unit = ""
    alone = len(growth.workloads) == 1
    for workload, steps in growth.workloads.items():
        for system, colour in colours.items():
            middles = []
            for number, figure in sorted(steps.items()):
                unit = figure.unit
                clients, condition = view.clients(figure)[0], view.conditions_of(figure, view.clients(figure)[0])[0]
                samples = view.samples(Key(figure.workload, figure.step, condition, clients), system)
                found = [sample.figure for sample in samples]
                if found:
                    values += found
                    axes.scatter([number] * len(found), found, s=9, color=colour, alpha=0.6, linewidths=0)
                    middles.append((number, median(found)))
            style = STYLES[0] if alone else styles[workload]
            axes.plot([x for x, _ in middles], [y for _, y in middles], color=colour, linestyle=style, linewidth=1.2)
    axes.set_xscale("log")
    numbers = sorted({number for steps in growth.workloads.values() for number in steps})
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.set_xlabel(_name(growth.counted), fontsize=8)
    axes.set_title(
        _fold(f"{next(iter(growth.workloads))}: {growth.title}" if alone else growth.title), loc="left", fontsize=9
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(f"{_name(unit) or 'time per operation'}   (↓ less is better)", fontsize=8)
    _scale(axes, values, axis="y", unit="" if unit else "s")


def _placed(
    view: View, panel: Panel, systems: Sequence[SystemInfo]
) -> dict[str, list[tuple[tuple[Sample, ...], float]]]:
    """By condition, the samples of each system that has any, with the height at which they are drawn."""
    figure = panel.figure
    names = view.conditions_of(figure, panel.clients)
    return {
        condition: [
            (samples, line + (turn - (len(names) - 1) / 2) * 0.36)
            for line, system in enumerate(systems)
            if (samples := view.samples(Key(figure.workload, figure.step, condition, panel.clients), system.name))
        ]
        for turn, condition in enumerate(names)
    }


def _spread(place: float, count: int) -> list[float]:
    """Heights of the rounds around ``place``, in their order from top to bottom."""
    middle = (count - 1) / 2
    return [place + (turn - middle) * BAR / max(1, count - 1) for turn in range(count)]


def _value(sample: Sample, figure: Figure) -> float:
    """What is drawn of a sample: its rate, or its quantity."""
    rate = sample_rate(sample, figure)
    return sample.figure if rate is None else rate


def _scale(axes: Axes, values: Sequence[float], *, axis: str = "x", unit: str = "", logarithmic: bool = False) -> None:
    """Logarithmic where values differ much, else from zero."""
    which = axes.xaxis if axis == "x" else axes.yaxis
    positive = bool(values) and min(values) > 0
    if positive and (logarithmic or max(values) / min(values) > LOGARITHMIC_FROM):
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        decades = math.log10(max(values) / min(values))
        which.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.6 else (1.0,), numticks=8))
        which.set_minor_locator(NullLocator())
        low, high = min(values) / 1.25, max(values) * 1.25
    else:
        which.set_major_locator(MaxNLocator(5))
        low, high = min(0.0, *values, 0.0), max([*values, 0.0]) * 1.08 or 1.0
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low, high)
    which.set_major_formatter(EngFormatter(unit=unit, sep="\N{NO-BREAK SPACE}") if unit else FuncFormatter(count_tick))
    axes.grid(axis="x" if axis == "x" else "y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


_LARGE = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def count_tick(value: float, place: float = 0.0) -> str:
    """A number at an axis: ``0.3``, ``20``, ``300k``, ``5M``. Not "300m", which looks like millions."""
    size, letter = next(((size, letter) for size, letter in _LARGE if abs(value) >= size), (1.0, ""))
    return f"{value / size:.6g}{letter}"


def _condition_handles(view: View, panels: Sequence[Panel]) -> list[Line2D]:
    seen = {name for panel in panels for name in view.conditions_of(panel.figure, panel.clients)}
    return [
        Line2D(
            [],
            [],
            color=COLOURS.get(name, INK),
            marker=MARKERS.get(name, "s"),
            markersize=4.5,
            linestyle="",
            label=_name(name),
        )
        for name in view.conditions
        if name in seen
    ]


def _system_colours(view: View) -> dict[str, str]:
    names = [system.name for system in view.systems if not system.missing]
    return {name: PALETTE[turn % len(PALETTE)] for turn, name in enumerate(names)}


def _figures(view: View, group: str) -> list[Figure]:
    return [figure for figure in view.figures if figure.group == group]


def _has_latencies(view: View, figure: Figure, clients: int) -> bool:
    return any(
        len([x for x in percentiles(sample) if x is not None]) > 1
        for system in view.systems
        for condition in view.conditions
        for sample in view.samples(Key(figure.workload, figure.step, condition, clients), system.name)
    )


def _name(text: str) -> str:
    """A name short enough for a plot. A leading underscore would hide a legend's entry."""
    text = clean(text)
    text = text if len(text) <= 28 else text[:27] + "…"
    return f" {text}" if text.startswith("_") else text


def _fold(text: str, width: int = 50) -> str:
    """A title on at most three lines."""
    lines: list[str] = []
    for part in clean(text).split("\n"):
        words = part.split()
        lines.append("")
        for word in words:
            if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
    folded = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join(folded if len(folded) <= 3 else [*folded[:2], folded[2][: width - 1] + "…"])
