"""Results as they are kept: values that go to JSON and back. ``report`` and ``compare`` need nothing else.

Rule: a file says by ``format`` and ``version`` what it is; a reader refuses what it doesn't know instead of guessing.
Fields may be added without a new version, if they have a default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vzfs.errors import UsageError

FORMAT = "vzfs-bench"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of single operations, in nanoseconds."""

    count: int
    p50: int
    p99: int
    p999: int
    largest: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """How it is known that the cache was as stated, and where things ran, for one sample.

    Dentries are the kernel's (all file systems), page cache in KiB (/proc/meminfo: Cached), each when the step began
    and by how much it grew; ``resident`` is the share of the stored files that mincore(2) found in memory (-1: not
    asked); ``spinner`` the share of a CPU that the busy condition's processes got (-1: idle condition);
    ``server_cpus`` where the serving processes ran last; ``load`` the one-minute load average. ``verified`` says
    whether all that is as stated, ``text`` what was not.
    """

    dentries: int
    dentries_grown: int
    cached_kib: int
    cached_grown_kib: int
    resident: float
    spinner: float
    server_cpus: tuple[int, ...]
    load: float
    verified: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One step of one workload on one system in one round.

    ``figure`` is what is compared: seconds per operation, or a quantity in ``Figure.unit``; less is better.
    """

    workload: str
    step: str
    system: str
    condition: str
    clients: int
    round: int
    figure: float
    seconds: float
    operations: int
    bytes: int
    proof: str
    latency: Latency | None
    evidence: Evidence
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def mib_per_second(self) -> float:
        """Throughput; 0 when no bytes were counted."""
        return self.bytes / self.seconds / (1 << 20) if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """What a step measures: described once for all samples with this ``workload`` and ``step``."""

    workload: str
    step: str
    group: str
    workload_title: str
    title: str
    cache: str
    cache_text: str
    """How the cache state is made and verified, a sentence."""
    unit: str
    """Of ``Sample.figure``; empty = seconds per operation."""
    throughput: bool
    """Whether to show MiB/s."""


@dataclass(frozen=True, slots=True)
class SystemInfo:
    """A system of the run: its version, how it was mounted, and why it is missing if it is."""

    name: str
    title: str
    version: str
    command: str
    """How it was mounted, as a user would type it."""
    writable: bool
    missing: str = ""
    peer: bool = True
    """What a user could pick instead of vzfs: not ext4, not vzfs."""


SKIPPED = "skipped"
WRONG = ("failed", "differs")
"""Kinds of problems, the worst first, that are a fault of a system or of the suite."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What didn't work: a failed or skipped workload, or answers that differ from ext4's."""

    kind: str
    """``failed``, ``skipped`` or ``differs``."""
    workload: str
    step: str
    system: str
    condition: str
    clients: int
    round: int
    text: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a run happened on."""

    cpu: str
    cpus: int
    memory_mib: int
    architecture: str
    virtual: str
    """What virtual machine it is, as systemd-detect-virt says; empty if none."""
    file_system: str
    device: str
    kernel: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run, complete. ``started`` and ``ended`` are ISO 8601 with zone; loads are one-minute averages."""

    machine: Machine
    versions: dict[str, str]
    started: str
    ended: str
    load_before: float
    load_after: float
    commit: str
    template: str
    """What the template was made of, in words."""
    entries: int
    quick: bool
    rounds: int
    conditions: dict[str, str]
    """Name to how it was made."""
    systems: tuple[SystemInfo, ...]
    figures: tuple[Figure, ...]
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...] = ()
    profiles: dict[str, str] = field(default_factory=dict)
    """Flame graphs and request counts: title to file name beside the results."""

    def as_json(self) -> str:
        """The text of a result file."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "the results") -> Self:
        """What ``as_json`` wrote. Raises ``UsageError`` naming ``name`` for anything else."""
        remedy = "give a file that 'vzfs-bench run' wrote"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{name} is not JSON: {error}", remedy=remedy) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UsageError(f"{name} is no result of vzfs-bench", remedy=remedy)
        if data.get("version") != VERSION:
            raise UsageError(
                f"{name} has version {data.get('version')} of the format, this program reads {VERSION}",
                remedy="use the vzfs-bench that wrote it, or run it again",
            )
        try:
            return cls(
                **_fields(cls, data)
                | {
                    "machine": Machine(**_fields(Machine, data["machine"])),
                    "systems": tuple(SystemInfo(**_fields(SystemInfo, item)) for item in data["systems"]),
                    "figures": tuple(Figure(**_fields(Figure, item)) for item in data["figures"]),
                    "samples": tuple(_sample(item) for item in data["samples"]),
                    "problems": tuple(Problem(**_fields(Problem, item)) for item in data.get("problems", ())),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{name} is incomplete: {error}", remedy=remedy) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a result file. Raises ``UsageError``."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} can't be read: {error}", remedy="give a result file") from error
        return cls.from_json(text, str(path))


def _fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``data`` that ``kind`` has: what a later program added is left out."""
    names = {item.name for item in dataclasses.fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def _sample(data: Mapping[str, Any]) -> Sample:
    latency, evidence = data["latency"], dict(data["evidence"])
    evidence["server_cpus"] = tuple(evidence["server_cpus"])
    return Sample(
        **_fields(Sample, data)
        | {
            "latency": Latency(**_fields(Latency, latency)) if latency else None,
            "evidence": Evidence(**_fields(Evidence, evidence)),
        }
    )
