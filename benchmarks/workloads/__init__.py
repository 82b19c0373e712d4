"""The workloads, by group. To add one, write a class (see ``benchmarks.workload``) and put it into ``WORKLOADS``."""

from __future__ import annotations

from benchmarks.workload import Workload
from benchmarks.workloads import container, density, lookup, read, write

WORKLOADS: tuple[type[Workload], ...] = (
    lookup.Walk,
    lookup.LstatRandom,
    lookup.LstatOrder,
    lookup.Negative,
    lookup.Deep,
    lookup.Huge,
    read.SmallFiles,
    read.SequentialRead,
    read.RandomRead,
    read.FioRandomRead,
    read.MmapTouch,
    write.FirstWriteSmall,
    write.CopyUpBySize,
    write.FirstWriteLarge,
    write.ChmodLarge,
    write.Files,
    write.Tar,
    write.RemoveTemplate,
    write.SequentialWrite,
    write.FsyncRate,
    write.LookupsDuringCopy,
    container.Start,
    container.InstallPackage,
    container.Compile,
    container.GitStatus,
    density.PageCache,
    density.Memory,
    density.ManyContainers,
)
"""In the order in which they run and are shown."""
