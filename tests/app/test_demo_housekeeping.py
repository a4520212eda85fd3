"""Memory that was freed goes back to the system while the page runs, and old files go."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from segmentors.demo import housekeeping
from segmentors.demo.housekeeping import remove_old

FRAGMENTED = """
import sys, time, psutil
from pathlib import Path
from segmentors.demo.housekeeping import housekeeping
held = [bytes(2000) for _ in range(100_000)]
kept = held[::50]  # so that the heap has no free end
del held
before = psutil.Process().memory_info().rss
with housekeeping(Path(sys.argv[1]), 900):
    deadline = time.monotonic() + 30
    while psutil.Process().memory_info().rss > before - 100 * 2**20:
        if time.monotonic() > deadline:
            sys.exit("nothing was given back")
        time.sleep(0.2)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees by itself")
def test_what_is_free_is_given_back(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FRAGMENTED, tmp_path], check=True)


def test_elsewhere_files_are_removed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping.sys, "platform", "win32")
    (tmp_path / "example.png").touch()
    threads = threading.active_count()
    with housekeeping.housekeeping(tmp_path, kept=1):
        assert threading.active_count() == threads + 1
        (tmp_path / "upload").mkdir()
        (tmp_path / "upload" / "picture.png").touch()
        deadline = time.monotonic() + 20
        while (tmp_path / "upload" / "picture.png").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["example.png"]
    assert threading.active_count() == threads


def test_new_files_stay_and_so_does_what_a_link_leads_to(tmp_path: Path) -> None:
    folder, outside = tmp_path / "served", tmp_path / "outside.png"
    folder.mkdir()
    outside.touch()
    (folder / "new.png").touch()
    (folder / "link.png").symlink_to(outside)
    remove_old(folder, 60, set())
    assert (folder / "new.png").exists() and (folder / "link.png").exists()
    remove_old(folder, -60, set())
    assert not list(folder.iterdir()) and outside.exists()


def test_uploads_while_files_are_removed_do_no_harm(tmp_path: Path) -> None:
    """Files come and go under its hands."""
    ended = threading.Event()

    def churn(number: int) -> None:
        while not ended.is_set():
            for i in range(20):
                (tmp_path / f"{number}-{i}").touch()
            for i in range(20):
                (tmp_path / f"{number}-{i}").unlink(missing_ok=True)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            remove_old(tmp_path, -60, set())
    finally:
        ended.set()
        for thread in threads:
            thread.join()
