"""Reports of made-up runs: numbers, targets, missing systems, hostile names, plots that can be read."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from benchmarks.report import markdown, write_report
from benchmarks.report.html import table
from benchmarks.report.plots import FAINT, PAPER, SETTINGS, as_svg, plots, settings, throughput_canvas
from benchmarks.report.units import interval, number, quantity
from benchmarks.report.verdicts import judge, wanted_text
from benchmarks.report.view import Key, Skipped, View
from benchmarks.results import Evidence, Figure, Latency, Machine, Problem, Run, Sample, SystemInfo
from benchmarks.statistics import Interval, change, median, ratio, summary
from benchmarks.targets import JUDGED, TARGETS, Other, Target
from benchmarks.workloads import WORKLOADS
from vzfs.errors import UsageError

HOSTILE = "<script>alert(1)</script>&\"'|`$x_1^$\x1b[31m]]>"
SPEED = {"ext4": 1.0, "overlayfs": 1.5, "fuse-overlayfs": 10.0, "bindfs": 8.0, "vzfs-pyfuse3": 9.0, "vzfs-direct": 2.0}
"""Time per operation to ext4's."""
LARGE = 512 << 20


def system(name: str, **fields: object) -> SystemInfo:
    base = SystemInfo(name, f"the {name}", "1.0", f"mount -t {name}", True)
    peer = name != "ext4" and not name.startswith("vzfs")
    return replace(base, peer=peer, **fields)  # type: ignore[arg-type]


SYSTEMS = (
    *(system(name, writable=name != "bindfs") for name in SPEED),
    system("unionfs-fuse", missing="not installed: apt-get install unionfs-fuse"),
)


def evidence(condition: str, *, verified: bool = True, text: str = "") -> Evidence:
    spinner = 0.97 if condition == "busy" else -1.0
    return Evidence(1_000, 5_200, 80_000, 2_048, -1.0, spinner, (1,), 1.25, verified, text)


def sample(
    step: Figure,
    name: str,
    turn: int,
    time: float,
    *,
    condition: str = "idle",
    clients: int = 1,
    operations: int = 1000,
) -> Sample:
    """``time`` is the figure."""
    seconds = time * operations if not step.unit else 1.0
    nanoseconds = int(time * 1e9)
    latency = Latency(operations, nanoseconds, 3 * nanoseconds, 9 * nanoseconds, 20 * nanoseconds)
    return Sample(
        workload=step.workload,
        step=step.step,
        system=name,
        condition=condition,
        clients=clients,
        round=turn,
        figure=time,
        seconds=seconds,
        operations=operations,
        bytes=LARGE if step.throughput else 0,
        proof=f"{step.step} {turn}",
        latency=None if step.unit or step.throughput else latency,
        evidence=evidence(condition),
    )


LSTAT = Figure(
    "lstat-random", "first", "lookup", "lstat of 5,000 names", "names dropped", "names dropped", "As stated.", "", False
)
READ = Figure(
    "sequential-read", "first", "read", "Sequential read", "file cached below", "cached below", "Mincore.", "", True
)
PSS = Figure("memory", "idle", "density", "Serving processes", "idle", "as it is", "Not verified.", "MiB", False)


def run_of(figures: tuple[Figure, ...], samples: list[Sample], **fields: object) -> Run:
    made = Run(
        machine=Machine("Some CPU", 2, 24_105, "x86_64", "kvm", "ext4", "/dev/vda", "Linux 6.18"),
        versions={"python": "3.11.2", "libfuse": "3.14"},
        started="2026-11-20T22:00:00+00:00",
        ended="2026-11-20T22:30:00+00:00",
        load_before=0.2,
        load_after=1.5,
        commit="abc123",
        template="Debian 12",
        entries=28_000,
        quick=False,
        rounds=5,
        conditions={"idle": "nothing else runs", "busy": "a spinner on CPU 1"},
        systems=SYSTEMS,
        figures=figures,
        samples=tuple(samples),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def usual(seed: int = 1) -> Run:
    """Every step of every workload, on all systems, under its conditions, with noise of some per cent."""
    noise = random.Random(seed)
    figures, samples = [], []
    for kind in WORKLOADS:
        for step in kind.steps:
            figure = Figure(
                kind.name,
                step.name,
                str(kind.group),
                kind.title,
                step.title,
                str(step.cache),
                "A sentence.",
                step.unit,
                step.throughput,
            )
            figures.append(figure)
            samples += [
                sample(
                    figure,
                    name,
                    turn,
                    noise.lognormvariate(0, 0.05)
                    * speed
                    * (1.0 if step.unit else 2e-6)
                    * (0.5 if condition == "busy" and name != "ext4" else 1),
                    condition=str(condition),
                    clients=clients,
                )
                for condition in kind.conditions
                for clients in kind.clients
                for name, speed in SPEED.items()
                for turn in range(5)
            ]
    return run_of(tuple(figures), samples)


@pytest.fixture(scope="module")
def full() -> Run:
    return usual()


def times(step: Figure, values: dict[str, list[float]], condition: str = "idle") -> list[Sample]:
    return [
        sample(step, name, turn, time, condition=condition)
        for name, each in values.items()
        for turn, time in enumerate(each)
    ]


# Statistics


def test_summary_is_middle_and_ends() -> None:
    found = summary([3.0, 1.0, 10.0, 2.0])
    assert (found.median, found.smallest, found.largest, found.count) == (2.5, 1.0, 10.0, 4)
    assert found.spread == pytest.approx(9 / 2.5)
    with pytest.raises(ValueError, match="no values"):
        median([])
    with pytest.raises(ValueError, match="not a number"):
        median([1.0, math.nan])


def test_ratio_pairs_rounds() -> None:
    # A disturbance that hits both systems in the same rounds cancels out: the interval is a point.
    disturbed = {0: 1.0, 1: 5.0, 2: 1.0, 3: 1.0, 4: 7.0}
    found = ratio({turn: 3 * value for turn, value in disturbed.items()}, disturbed)
    assert found == Interval(3.0, 3.0, 3.0)
    # Rounds that only one side has say nothing.
    assert ratio({0: 2.0, 1: 2.0, 9: 50.0}, {0: 1.0, 1: 1.0, 8: 70.0}) == Interval(2.0, 2.0, 2.0)
    assert ratio({0: 1.0}, {1: 1.0}) is None


def test_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    noise = random.Random(5)
    hits = 0
    for _ in range(200):
        ours = {turn: 2 * noise.lognormvariate(0, 0.1) for turn in range(7)}
        theirs = {turn: noise.lognormvariate(0, 0.1) for turn in range(7)}
        found = ratio(ours, theirs)
        assert found is not None
        assert found.low <= found.value <= found.high
        hits += found.low <= 2 <= found.high
    assert 170 <= hits <= 199


def test_ratios_of_little_or_nothing() -> None:
    assert ratio({0: 4.0}, {0: 2.0}) == Interval(2.0, 0.0, math.inf)
    assert interval(Interval(2.0, 0.0, math.inf)) == "one round"
    assert ratio({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}) == Interval(1.0, 1.0, 1.0)
    infinite = ratio({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    assert infinite is not None
    assert infinite.value == math.inf
    assert ratio({0: 1.0, 1: 2.0}, {0: 3.0, 1: 5.0}) == ratio({0: 1.0, 1: 2.0}, {0: 3.0, 1: 5.0})


def test_change_needs_more_than_noise() -> None:
    assert change([1.0, 1.1, 1.2, 0.9, 1.05], [1.5, 1.6, 1.7, 1.55, 1.65]).larger_than_noise
    assert not change([1.0, 1.1, 1.2, 0.9, 1.05], [1.02, 1.12, 1.22, 0.92, 1.0]).larger_than_noise
    assert not change([1.0], [9.0]).larger_than_noise
    assert not change([1.0] * 5, [1.0] * 5).larger_than_noise
    assert change([2.0] * 3, [1.0] * 3).ratio.value == 0.5


def test_below_a_limit() -> None:
    assert Interval(0.5, 0.4, 0.6).below(0.6) is True
    assert Interval(0.5, 0.4, 0.6).below(0.55) is None
    assert Interval(0.5, 0.4, 0.6).below(0.39) is False


# Texts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (9.996, "10.0"),
        (0.012345, "0.0123"),
        (99.95, "100"),
        (1234.5, "1,230"),
        (-2.5, "-2.50"),
        (math.inf, "∞"),
        (999.7, "1,000"),
        (0.09996, "0.100"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.5e-6, "", "2.50 µs"),
        (0.0375, "", "37.5 ms"),
        (61.0, "", "61.0 s"),
        (2e-9, "", "2.00 ns"),
        (21.5, "MiB", "21.5 MiB"),
    ],
)
def test_quantities_have_fitting_units(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


# What is shown of a step


def test_numbers_of_a_table() -> None:
    values = {
        "ext4": [2e-6, 1e-6, 3e-6],
        "fuse-overlayfs": [20e-6, 21e-6, 19e-6],
        "bindfs": [10e-6, 11e-6, 9e-6],
        "vzfs-direct": [4e-6, 2e-6, 6e-6],
    }
    view = View(run_of((LSTAT,), times(LSTAT, values)))
    key = Key("lstat-random", "first", "idle", 1)
    assert view.best_peer(key) == "bindfs"
    cell = view.cell(key, "vzfs-direct")
    assert cell is not None
    assert (cell.figure.median, cell.figure.smallest, cell.figure.largest) == (4e-6, 2e-6, 6e-6)
    assert cell.rate is not None
    assert cell.rate.median == pytest.approx(250_000)
    assert cell.latencies == pytest.approx((4_000, 12_000, 36_000))
    assert cell.to_limit is not None
    assert [cell.to_limit.value, cell.to_limit.low, cell.to_limit.high] == pytest.approx([2, 2, 2])
    assert cell.to_peer is not None
    assert cell.to_peer.value == pytest.approx(0.4)
    shown = table(view, LSTAT, 1)
    rows = {row.name: row for row in shown.rows}
    ours = rows["vzfs-direct"].cells[0]
    assert (ours.median, ours.ends, ours.rate) == ("4.00 µs", "2.00 – 6.00", "250,000")
    assert ours.latencies == "4.00 µs / 12.0 µs / 36.0 µs"
    assert (ours.to_limit, ours.limit_interval, ours.to_peer) == ("2.00 ×", "2.00 – 2.00", "0.400 ×")
    assert rows["bindfs"].cells[0].to_peer == "best peer"
    assert rows["ext4"].cells[0].to_limit == ""
    assert rows["unionfs-fuse"].cells[0].reason == "missing: not installed: apt-get install unionfs-fuse"
    assert rows["overlayfs"].cells[0].reason == "not measured"
    assert (shown.verified, shown.samples, shown.same_answers, shown.compared) == (12, 12, 12, 12)


def test_percentiles_need_operations_beyond_them() -> None:
    def shown(count: int) -> str:
        samples = times(LSTAT, {"ext4": [1e-6, 3e-6, 2e-6]})
        few = [replace(one, latency=replace(one.latency, count=count)) for one in samples if one.latency]
        return table(View(run_of((LSTAT,), few)), LSTAT, 1).rows[0].cells[0].latencies

    assert [shown(count) for count in (1000, 999, 99, 1)] == [
        "2.00 µs / 6.00 µs / 18.0 µs",
        "2.00 µs / 6.00 µs / –",
        "2.00 µs / – / –",
        "",
    ]


def test_throughput_is_shown_in_mib() -> None:
    view = View(run_of((READ,), [sample(READ, "ext4", turn, 0.25, operations=1) for turn in range(5)]))
    cell = view.cell(Key("sequential-read", "first", "idle", 1), "ext4")
    assert cell is not None
    assert cell.rate is not None
    assert (cell.rate.median, cell.rate_unit) == (2048.0, "MiB/s")
    assert table(view, READ, 1).rate_title == "MiB/s"


def test_quantities_have_no_rate() -> None:
    view = View(run_of((PSS,), times(PSS, {"vzfs-direct": [21.0, 22.0, 23.0]})))
    cell = view.cell(Key("memory", "idle", "idle", 1), "vzfs-direct")
    assert cell is not None
    assert cell.rate is None
    assert not table(view, PSS, 1).rates
    assert table(view, PSS, 1).rows[5].cells[0].median == "22.0 MiB"


def test_unverified_caches_and_other_answers_are_counted() -> None:
    samples = times(LSTAT, {"ext4": [1e-6] * 3, "overlayfs": [2e-6] * 3})
    samples[4] = replace(samples[4], proof="wrong", evidence=evidence("idle", verified=False, text="no dentries grew"))
    view = View(run_of((LSTAT,), samples))
    shown = table(view, LSTAT, 1)
    assert (shown.verified, shown.samples, shown.same_answers, shown.compared) == (5, 6, 5, 6)
    (check,) = [check for check in shown.checks if check.system == "overlayfs"]
    assert (check.verified, check.samples, check.texts) == (2, 3, "no dentries grew")


def test_reasons_for_missing_figures() -> None:
    problem = Problem("skipped", "lstat-random", "first", "overlayfs", "idle", 1, 2, "can't do it")
    run = run_of((LSTAT,), times(LSTAT, {"ext4": [1e-6] * 3}), problems=(problem, replace(problem, round=3)))
    view = View(run)
    assert view.why_not(Key("lstat-random", "first", "idle", 1), SYSTEMS[1]) == "skipped: can't do it"
    assert view.why_not(Key("lstat-random", "first", "busy", 1), SYSTEMS[1]) == "not measured"
    assert view.troubles == ()
    assert view.skips == (Skipped("overlayfs", ("lstat-random (first)",), "can't do it"),)


def test_what_went_wrong_is_told_once_with_its_rounds() -> None:
    problem = Problem("failed", "lstat-random", "first", "overlayfs", "idle", 1, 2, "EIO")
    others = replace(problem, round=3), replace(problem, kind="skipped", text="can't do it")
    view = View(run_of((LSTAT,), times(LSTAT, {"ext4": [1e-6] * 3}), problems=(problem, *others)))
    assert [(trouble.text, trouble.rounds) for trouble in view.troubles] == [("EIO", (2, 3))]


def test_what_was_left_out_is_gathered_by_system_and_reason() -> None:
    where = [("walk", "", "idle"), ("walk", "", "busy"), ("memory", "idle", "idle"), ("memory", "walked", "idle")]
    problems = [Problem("skipped", work, step, "bindfs", which, 1, 0, "no") for work, step, which in where]
    problems.append(Problem("skipped", "tar", "", "bindfs", "idle", 1, 0, "read-only"))
    view = View(run_of((LSTAT,), times(LSTAT, {"ext4": [1e-6] * 3}), problems=tuple(problems)))
    assert view.skips == (
        Skipped("bindfs", ("walk", "memory (idle, walked)"), "no"),
        Skipped("bindfs", ("tar",), "read-only"),
    )
    assert "| bindfs | walk, memory (idle, walked) | no |" in markdown.text(view, (), "plots")


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_figures_that_are_no_numbers_are_refused(figure: float) -> None:
    bad = replace(times(LSTAT, {"ext4": [1e-6]})[0], figure=figure)
    with pytest.raises(UsageError, match="no measured figure"):
        View(run_of((LSTAT,), [bad]))


# Targets


def test_every_target_is_measured_by_a_workload() -> None:
    known = {(kind.name, step.name): (kind, step) for kind in WORKLOADS for step in kind.steps}
    for target in TARGETS:
        kind, step = known[target.workload, target.step]
        assert target.clients in kind.clients
        assert {"idle"} | ({"busy"} if target.busy is not None else set()) <= {str(one) for one in kind.conditions}
        if target.against is None:
            assert target.unit == step.unit, target
        elif target.against.step:
            assert (target.workload, target.against.step) in known


def test_what_is_wanted_is_said_as_in_the_plan() -> None:
    said = {wanted_text(target, condition) for target in TARGETS for condition in ("idle", "busy")}
    assert said >= {
        "≤ 1.2 × overlayfs",
        "≤ 1/4 × fuse-overlayfs",
        "≤ 1/2 × fuse-overlayfs",
        "≤ 2/3 × fuse-overlayfs",
        "not slower than fuse-overlayfs",
        "≤ 1.1 × ext4",
        "≥ 0.95 × the speed of ext4",
        "≥ 0.9 × the speed of ext4",
        "≥ 0.9 × the speed of cp of it on the disk's file system",
        "≤ 100 µs",
        "≤ 5,000 µs",
        "≤ 5.12 MiB",
        "≤ 30.0 MiB",
        "≤ 40.0 MiB",
        "≤ 100 descriptors",
        "",
    }


TARGET = Target("row", "", "lstat-random", "first", Fraction(1, 4), Fraction(1, 2), Other("fuse-overlayfs"))


def verdicts(direct: list[float], peer: list[float], busy: list[float]) -> list[tuple[str, str]]:
    samples = times(LSTAT, {"vzfs-direct": direct, "fuse-overlayfs": peer})
    samples += times(LSTAT, {"vzfs-direct": busy, "fuse-overlayfs": peer}, "busy")
    ((_, found),) = judge(View(run_of((LSTAT,), samples)), targets=(TARGET,))
    return [(verdict.measured_text, verdict.verdict_text) for verdict in found]


def test_met_missed_and_within_noise() -> None:
    assert verdicts([2.0] * 5, [10.0] * 5, [8.0] * 5) == [
        ("0.200 × [0.200 – 0.200]", "met"),
        ("0.800 × [0.800 – 0.800]", "missed by 60.0 %"),
    ]
    (_, met), (_, missed) = verdicts([2.0, 2.1, 2.2, 3.5, 4.0], [10.0] * 5, [5.5, 5.4, 5.6, 4.0, 4.1])
    assert (met, missed) == ("met, within noise", "missed by 8.00 %, within noise")


def test_unverified_caches_are_told_beside_a_verdict() -> None:
    samples = times(LSTAT, {"vzfs-direct": [2.0] * 5, "fuse-overlayfs": [10.0] * 5})
    for place in (1, 7):
        samples[place] = replace(samples[place], evidence=evidence("idle", verified=False))
    view = View(run_of((LSTAT,), samples))
    ((_, (idle, _)),) = judge(view, targets=(TARGET,))
    assert idle.verdict_text == "met, cache unverified in 2 samples"
    cells = {row.name: row.cells[0].median for row in table(view, LSTAT, 1).rows}
    assert (cells["vzfs-direct"], cells["fuse-overlayfs"]) == ("2.00 s *", "10.0 s *")


def test_speed_is_the_inverse_of_time() -> None:
    target = replace(TARGET, idle=1 / Fraction("0.9"), busy=None, against=Other("fuse-overlayfs"), speed=True)
    samples = times(LSTAT, {"vzfs-direct": [1.1] * 5, "fuse-overlayfs": [1.0] * 5})
    ((_, (idle, busy)),) = judge(View(run_of((LSTAT,), samples)), targets=(target,))
    assert (idle.verdict_text, idle.sure) == ("met", True)
    assert idle.measured_text == "0.909 × [0.909 – 0.909]"
    assert (busy.asked, busy.verdict_text, busy.measured_text) == (False, "", "")
    samples = times(LSTAT, {"vzfs-direct": [2.0] * 5, "fuse-overlayfs": [1.0] * 5})
    ((_, (idle, _)),) = judge(View(run_of((LSTAT,), samples)), targets=(target,))
    assert (idle.measured_text, idle.verdict_text) == ("0.500 × [0.500 – 0.500]", "missed by 44.4 %")


def test_quantities_are_judged_by_their_range() -> None:
    target = Target("row", "", "memory", "idle", Fraction(30), None, unit="MiB")
    view = View(run_of((PSS,), times(PSS, {"vzfs-direct": [29.0, 28.0, 31.0]})))
    ((_, (idle, _)),) = judge(view, targets=(target,))
    assert (idle.measured_text, idle.verdict_text) == ("29.0 MiB [28.0 MiB – 31.0 MiB]", "met, within noise")
    ((_, (idle, _)),) = judge(view, targets=(replace(target, unit=""),))
    assert (idle.met, idle.measured_text) == (None, "the run has MiB, wanted are seconds")


def test_targets_that_were_not_measured_say_why() -> None:
    missing = tuple(system(JUDGED, missing="the kernel has no passthrough") if s.name == JUDGED else s for s in SYSTEMS)
    samples = times(LSTAT, {"fuse-overlayfs": [1.0] * 5})
    ((_, (idle, _)),) = judge(View(run_of((LSTAT,), samples, systems=missing)), targets=(TARGET,))
    assert idle.verdict_text == "not measured"
    assert idle.measured_text == "vzfs-direct: missing: the kernel has no passthrough"
    ((_, (idle, _)),) = judge(
        View(run_of((LSTAT,), times(LSTAT, {JUDGED: [1.0]}), systems=SYSTEMS[-2:])), targets=(TARGET,)
    )
    assert idle.measured_text == "fuse-overlayfs was not part of the run"


def test_all_targets_of_a_full_run_are_judged(full: Run) -> None:
    for target, found in judge(View(full)):
        for verdict in found:
            assert verdict.asked == (target.limit(verdict.condition) is not None)
            assert (verdict.met is not None) == verdict.asked, target


# The page


class Page(HTMLParser):
    """Elements and text; complains about what is not closed."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def written(full: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new" / "folder"
    write_report(full, output)
    return output


def test_page_is_whole_and_needs_nothing_else(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "embed"} == set()
    for _, attributes in page.tags:
        for name in ("href", "src", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            if name in attributes:
                assert str(attributes[name])[1:] in identifiers


def test_page_has_the_machine_the_systems_and_the_plots_in_order(written: Path) -> None:
    text = (written / "report.html").read_text()
    for words in (
        "Some CPU",
        "Linux 6.18",
        "libfuse 3.14",
        "2026-11-20T22:00:00+00:00",
        "a spinner on CPU 1",
        "0.20 before",
    ):
        assert words in text
    assert "<b>unionfs-fuse</b> (not installed: apt-get install unionfs-fuse)" in text
    places = [text.index(f'aria-label="{name}: every round"') for name in ("Lookup", "Read", "Write", "Container")]
    assert places == sorted(places)
    assert places[1] < text.index('<h2 id="targets">') < text.index('<h2 id="group-1">') < places[2]
    for kind in WORKLOADS:
        assert f"<code>{kind.name}</code>" in text
    assert text.count("Cache: <b>") == sum(len(kind.steps) * len(kind.clients) for kind in WORKLOADS)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    figure = replace(
        LSTAT, group=HOSTILE, workload=HOSTILE, step=HOSTILE, workload_title=HOSTILE, title=HOSTILE, cache_text=HOSTILE
    )
    systems = (system("ext4"), system(HOSTILE, version=HOSTILE, command=HOSTILE), system("_gone", missing=HOSTILE))
    samples = [
        sample(figure, name, turn, 1e-6 * (turn + 1), condition=condition, clients=clients)
        for name in ("ext4", HOSTILE)
        for turn in range(3)
        for condition in ("idle", HOSTILE)
        for clients in (1, 2)
    ]
    samples[0] = replace(samples[0], evidence=evidence("idle", verified=False, text=HOSTILE), extra={HOSTILE: 2.0})
    problem = Problem(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "idle", 1, 1, HOSTILE)
    run = run_of(
        (figure,),
        samples,
        systems=systems,
        versions={HOSTILE: HOSTILE},
        conditions={"idle": HOSTILE, HOSTILE: HOSTILE},
        machine=Machine(HOSTILE, 2, 1, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        template=HOSTILE,
        commit=HOSTILE,
        problems=(problem,),
        profiles={HOSTILE: HOSTILE},
    )
    paths = write_report(Run.from_json(run.as_json()), tmp_path)
    assert all(path.is_relative_to(tmp_path) for path in paths)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert '1 <a href="#problems">problems</a>' in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in text
    assert sum("<script>alert(1)</script>" in words for words in page.words) > 10
    summary_text = (tmp_path / "report.md").read_text()
    assert "<script" not in summary_text
    assert "\x1b" not in summary_text
    for path in tmp_path.glob("plots/*.svg"):
        tree = ElementTree.parse(path)
        assert not list(tree.iter("{http://www.w3.org/2000/svg}script"))
        assert "$x_1^$" in "".join(tree.getroot().itertext())
    assert len(list(tmp_path.glob("plots/*.svg"))) == 3


# Plots


def test_every_round_of_every_system_is_a_point(full: Run) -> None:
    view = View(full)
    with settings():
        canvas = throughput_canvas(view, "lookup")
        assert canvas is not None
        for axes, figure in zip(canvas.axes, [item for item in full.figures if item.group == "lookup"], strict=False):
            points = [one for one in axes.collections if isinstance(one, PathCollection)]
            drawn = sorted(float(x) for one in points for x in np.asarray(one.get_offsets())[:, 0])
            expected = sorted(
                one.per_second
                for one in full.samples
                if (one.workload, one.step, one.clients) == (figure.workload, figure.step, 1)
            )
            assert drawn == pytest.approx(expected)
            assert len(drawn) == len(SPEED) * 2 * 5
            low, high = axes.get_xlim()
            assert low <= drawn[0] <= drawn[-1] <= high


def test_plots_are_dark_on_light_and_their_text_is_text(written: Path) -> None:
    drawn = {path.stem: path.read_text() for path in written.glob("plots/*.svg")}
    assert drawn.keys() >= {"lookup", "read", "write", "container", "density", "lookup-latency", "read-clients"}
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        words = " ".join("".join(root.itertext()).split())
        assert "vzfs-direct" in words
        assert "better" in words or name.endswith("-clients")
        background = root.find(f".//*[@id='{name}-patch_1']/*")
        assert background is not None
        style = background.get("style") or re.findall(rf"\.{background.get('class')}{{(.*?)}}", svg)[0]
        assert f"fill: {PAPER}" in style
        assert len(svg) < 500_000
        inks = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)) - {PAPER}
        assert inks
        for ink in inks - {FAINT}:  # the lines of the grid
            assert contrast(ink, PAPER) > 3, ink


def contrast(ink: str, paper: str) -> float:
    """As the Web Content Accessibility Guidelines count it; 3 is wanted of graphics."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_same_run_gives_the_same_bytes(full: Run) -> None:
    view = View(full)

    def draw() -> str:
        with settings():
            canvas = throughput_canvas(view, "read")
            assert canvas is not None
            return as_svg(canvas, "read", "Read")

    assert draw() == draw()
    assert SETTINGS["svg.fonttype"] == "none"


def test_growth_has_a_line_for_each_size() -> None:
    figures = [
        Figure(name, f"lookup-{count}", "scale", title, f"lstat, {count} containers", "any", "-", "", False)
        for name, title in [(f"scale-{size}k", f"Template of {size},000 entries") for size in (10, 100, 500)]
        for count in (1, 10, 50)
    ]
    figures += [
        Figure("lookups", f"files-{count}", "scale", "lstat", f"directory of {count:,} files", "any", "-", "", False)
        for count in (10, 1_000)
    ]
    samples = [sample(figure, "vzfs-direct", turn, 1e-6 * (turn + 1)) for figure in figures for turn in range(3)]
    names = {plot.name: plot for plot in plots(View(run_of(tuple(figures), samples)))}
    assert set(names) == {"scale", "scale-latency", "scale-growth"}
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", names["scale-growth"].svg)
    assert {"Template of 10,000 entries", "Template of 100,000 entries", "lstat, N containers", "containers"} <= set(
        drawn
    )
    assert {"Template of N entries: lstat, 1 containers", "entries", "500,000"} <= set(drawn)
    assert {"lstat: directory of N files", "files", "1,000"} <= set(drawn)  # alone in its panel, so in no legend


# Markdown


def test_markdown_has_targets_figures_and_plots(written: Path, full: Run) -> None:
    text = (written / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert sorted(links) == sorted(f"plots/{path.name}" for path in (written / "plots").iterdir())
    assert links[:2] == ["plots/lookup.svg", "plots/read.svg"]
    assert "**Missing**: unionfs-fuse (not installed: apt-get install unionfs-fuse)." in text
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = lines.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    for target in TARGETS:
        assert target.row in text
    row = next(line for line in text.splitlines() if line.startswith("| rm -rf of a template directory"))
    assert row.count("missed") + row.count("met") == 2


def test_a_documents_generated_part_is_replaced(full: Run, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text(f"# Ours\n\n{markdown.BEGIN}\nold\n{markdown.END}\n\nAlso ours.\n")
    small = run_of((LSTAT,), times(LSTAT, {"ext4": [1e-6] * 3, JUDGED: [2e-6] * 3}))
    write_report(small, tmp_path / "out", document=page)
    once = page.read_text()
    assert once.startswith(f"# Ours\n\n{markdown.BEGIN}\n\n**Machine**: Some CPU")
    assert once.endswith(f"{markdown.END}\n\nAlso ours.\n")
    assert "old" not in once
    assert (page.parent / "plots" / "lookup.svg").exists()
    write_report(small, tmp_path / "out", document=page)
    assert page.read_text() == once


@pytest.mark.parametrize(
    "text", ["nothing", markdown.BEGIN, f"{markdown.END}\n{markdown.BEGIN}", f"{markdown.BEGIN}\n" * 2 + markdown.END]
)
def test_a_document_without_a_place_is_left_alone(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    small = run_of((LSTAT,), times(LSTAT, {"ext4": [1e-6] * 3}))
    with pytest.raises(UsageError, match="no place for the report"):
        write_report(small, tmp_path / "out", document=page)
    assert page.read_text() == text
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    small = run_of((LSTAT,), times(LSTAT, {"ext4": [1e-6] * 3}))
    with pytest.raises(UsageError, match=r"can't be written.*file"):
        write_report(small, tmp_path / "file")


def test_a_run_without_a_sample_gives_a_report(tmp_path: Path) -> None:
    write_report(run_of((LSTAT,), []), tmp_path)
    assert "not measured" in (tmp_path / "report.html").read_text()
    assert list(tmp_path.glob("plots/*")) == []


def test_the_performance_page_has_a_place_for_the_report() -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    assert "generated here" in markdown.update(page, "generated here", "docs/performance.md")


def test_numbers_at_axes_are_no_thousandths() -> None:
    """For "300m operations per second" is read as millions."""
    from benchmarks.report.plots import count_tick

    values = (0, 0.3, 0.05, 1, 20, 999, 1_000, 2_500, 300_000, 5e6, 2e9)
    assert [count_tick(value) for value in values] == [
        "0", "0.3", "0.05", "1", "20", "999", "1k", "2.5k", "300k", "5M", "2G",
    ]  # fmt: skip
