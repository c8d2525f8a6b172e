"""The results as a table, as build/bench.json and as build/bench.svg."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench._stats import OURS, Result, document, median
from tests.lab._places import PROJECT

__all__ = ["AIMS", "machine_facts", "plot", "show", "show_profile", "write"]

BUILD = PROJECT / "build"

AIMS: Mapping[str, str] = {
    "initial_copy_vs_nbdcopy": ">= 1.1, aim 1.3",
    "secure_copy_vs_zstd_tls_pipe": ">= 1.6, aim 2.0",
    "wan_delta_vs_rsync": "> 1",
    "wan_bytes_vs_zstd_ssh": "> 1",
    "wan_resent_ratio": "<= 1.01: with ten cuts",
    "wan_bytes_vs_rsync": "about 1: rsync compares both disks to find what asrcore reads from a bitmap",
    "delta_vs_virtnbdbackup": ">= 3, aim 5",
    "delta_bytes_read_ratio": "<= 1.05",
    "delta_bytes_wire_ratio": "<= 0.6",
    "resync_vs_rsync": ">= 1.7, aim 2.5",
    "resync_bytes_ratio": "<= 1.1",
    "verify_vs_qemu_img_compare": ">= 0.5, aim 0.8",
    "boot_any_point_extra_seconds": "< 1.0",
    "idle_cycle_seconds": "< 0.25",
    "idle_cycle_cpu_seconds": "< 0.05",
    "status_seconds_50_machines": "< 0.3",
    "far_scattered_vs_single": ">= 0.5, aim 0.8: of the throughput of one large read",
    "far_agent_scattered_vs_single": ">= 0.5, aim 0.8: the same of an agent",
}
"""All keys of the figures, and their targets."""


def machine_facts(*, quick: bool) -> dict[str, object]:
    """The machine and the versions that were measured."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": pages * size,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[2], 2),
        "versions": {name: _version(name) for name in ("qemu-utils", "libvirt0", "libnbd-bin", "virtnbdbackup")},
        "commit": _printed(["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
    }


def _version(package: str) -> str:
    return _printed(["dpkg-query", "-W", "-f", "${Version}", package])


def _printed(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


def show(result: Result) -> None:
    """A table on the terminal."""
    table = Table(title=result.title, title_justify="left")
    for column in ("", "median s", "from", "to", "CPU s", "times asrcore"):
        table.add_column(column, justify="left" if not column else "right")
    ours = median(result.rounds[OURS]) if result.rounds.get(OURS) else 0.0
    for name, items in result.rounds.items():
        seconds = [item.seconds for item in items]
        cpu = sorted(item.cpu_seconds for item in items)[len(items) // 2]
        times = f"{median(items) / ours:.2f}" if ours else ""
        table.add_row(name, f"{median(items):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}", f"{cpu:.3f}", times)
    console = Console()
    console.print(table)
    for key, value in result.figures.items():
        console.print(f"  {key} = {value:.4g}   ({AIMS[key]})", highlight=False)
    for text in result.missing:
        console.print(f"  not measured: {text}", highlight=False)


def show_profile(samples: Mapping[str, int], lines: int = 12) -> None:
    """The code locations where asrcore's threads were sampled most often, waiting included."""
    total = sum(samples.values()) or 1
    for place, count in sorted(samples.items(), key=lambda item: -item[1])[:lines]:
        print(f"  {100 * count / total:5.1f} %  {place}")


def write(results: Sequence[Result], machine: Mapping[str, object]) -> list[Path]:
    """Write build/bench.json and build/bench.svg; returns their paths."""
    BUILD.mkdir(exist_ok=True)
    report, picture = BUILD / "bench.json", BUILD / "bench.svg"
    report.write_text(json.dumps(document(results, machine), indent=2) + "\n")
    picture.write_text(plot(results))
    return [report, picture]


ROW, BAR_LEFT, BAR_WIDTH, WIDTH = 22, 220, 560, 900


def plot(results: Sequence[Result]) -> str:
    """An SVG: for each section a bar per contender, as long as its median, with a line from its best to its worst."""
    parts, y = [], 10
    for result in results:
        if not result.rounds:
            continue
        longest = max(item.seconds for items in result.rounds.values() for item in items) or 1.0
        y += ROW
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(result.title)}</text>')
        for name, items in result.rounds.items():
            y += ROW
            scale = BAR_WIDTH / longest
            low, high = (BAR_LEFT + scale * edge(item.seconds for item in items) for edge in (min, max))
            width, colour = scale * median(items), "#2a6f97" if name == OURS else "#b8c4cc"
            parts.append(
                f'<text x="{BAR_LEFT - 8}" y="{y}" text-anchor="end">{escape(name)}</text>'
                f'<rect x="{BAR_LEFT}" y="{y - 13}" width="{width:.1f}" height="16" fill="{colour}"/>'
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y - 5}" y2="{y - 5}" stroke="#333"/>'
                f'<text x="{max(high, BAR_LEFT + width) + 8:.1f}" y="{y}">{median(items):.3g} s</text>'
            )
        y += ROW // 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + ROW}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
