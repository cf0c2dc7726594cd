"""What the host gives and what others take, read from files that a test wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from profilers.host import HostWatch, available_cpus, cgroup_quota


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def topology(sys_folder: Path, cores: list[int]) -> None:
    """A machine with one logical processor for each entry, on that core."""
    for cpu, core in enumerate(cores):
        folder = sys_folder / f"devices/system/cpu/cpu{cpu}/topology"
        write(folder / "physical_package_id", "0\n")
        write(folder / "core_id", f"{core}\n")


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    topology(tmp_path, [0, 0, 1, 1])
    assert available_cpus({0, 1, 2, 3}, tmp_path / "none", tmp_path) == 2
    assert available_cpus({0, 1}, tmp_path / "none", tmp_path) == 1
    assert available_cpus({1, 2}, tmp_path / "none", tmp_path) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_on_one_processor_has_one_thread() -> None:
    """As after ``taskset -c 0``; the backend and what it says of itself included."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from profilers.backends import open_backend\n"
        "backend = open_backend('cpu')\n"
        "print(backend.threads, backend.provenance()['threads'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 8)],
)
def test_a_quota_limits_the_threads(tmp_path: Path, quota: str, cpus: int) -> None:
    topology(tmp_path, list(range(8)))
    write(tmp_path / "proc/self/cgroup", "0::/user/run\n")
    write(tmp_path / "fs/cgroup/user/run/cpu.max", quota + "\n")
    assert available_cpus(set(range(8)), tmp_path / "proc", tmp_path) == cpus


def test_the_tightest_group_around_a_process_decides(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    write(tmp_path / "fs/cgroup/outer/cpu.max", "200000 100000\n")
    write(tmp_path / "fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    assert cgroup_quota(tmp_path / "proc", tmp_path) == 2.0


def test_version_1_groups_and_containers_are_read(tmp_path: Path) -> None:
    # inside a container the path is the host's, and the mounted root is the container's group
    write(tmp_path / "proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    write(tmp_path / "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cgroup_quota(tmp_path / "proc", tmp_path) == 3.0
    write(tmp_path / "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert cgroup_quota(tmp_path / "proc", tmp_path) is None


class FakeHost:
    """A ``/proc`` whose counters a test moves, with its clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 50.0
        self.waits = {"7": 1.0, "8": 2.0}
        self.busy = self.steal = self.own = self.stalled = 0.0
        self.idle = 0.0

    def watch(self) -> HostWatch:
        self.write()
        return HostWatch(7, proc=self.folder, clock=lambda: self.now)

    def write(self) -> None:
        for thread, waited in self.waits.items():
            write(self.folder / f"7/task/{thread}/schedstat", f"900 {round(waited * 1e9)} 3\n")
        ticks = [round(100 * s) for s in (self.busy, self.idle, self.steal)]
        write(self.folder / "stat", f"cpu  {ticks[0]} 0 0 {ticks[1]} 0 0 0 {ticks[2]} 0 0\n")
        own = " ".join(["0"] * 10 + [str(round(100 * self.own)), "0", "0"])
        write(self.folder / "7/stat", f"7 (a) name) R {own}\n")
        write(self.folder / "pressure/cpu", f"some avg10=0.00 total={round(1e6 * self.stalled)}\n")


def test_what_others_took_is_told_by_its_kind(tmp_path: Path) -> None:
    host = FakeHost(tmp_path)
    watch = host.watch()
    before = watch.read()
    host.now += 0.5
    host.waits = {"7": 1.05, "8": 2.0, "9": 0.1}  # a thread that began meanwhile has waited too
    host.own, host.busy, host.steal, host.stalled = 0.9, 1.15, 0.02, 0.1
    host.write()
    found = watch.since(before)
    assert found.waited == pytest.approx(0.3)  # 0.05 + 0.1 s of 0.5
    assert found.others == pytest.approx(0.5)
    assert found.stolen == pytest.approx(0.04)
    assert found.stalled == pytest.approx(0.2)
    assert found.lost == pytest.approx(0.3)


def test_a_system_that_tells_nothing_is_not_known(tmp_path: Path) -> None:
    watch = HostWatch(7, proc=tmp_path / "none")
    found = watch.since(watch.read())
    assert (found.waited, found.others, found.stolen, found.stalled) == (None,) * 4
    assert found.lost is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="no /proc here")
def test_a_process_that_shares_its_processor_is_seen_to_wait() -> None:
    """Two that compute on one processor: each waits for about half of the time."""
    code = (
        "import os, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from profilers.host import HostWatch\n"
        "pid = os.fork()\n"
        "while pid == 0: pass\n"
        "watch = HostWatch()\n"
        "before = watch.read()\n"
        "end = time.perf_counter() + 0.5\n"
        "while time.perf_counter() < end: pass\n"
        "print(watch.since(before).lost)\n"
        "os.kill(pid, 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # an equal share is 0.5; a busy machine takes more, and no scheduler gives one of two 80%
    assert float(done.stdout) > 0.2
