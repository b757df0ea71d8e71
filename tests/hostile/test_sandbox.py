"""Attempts of programs on the sandbox: to get out, to fill the disk and memory, to see, and to pass
for right. None may pass, harm anything or leave anything behind.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from opdkit.rewards.sandbox import Calls, Limits, Prints, Sandbox
from tests.rewards.test_sandbox import nothing_left
from tests.rewards.test_verdicts import FORGED, calls

pytestmark = [
    pytest.mark.hostile,
    pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux"),
]
SECONDS = 3
MEMORY = 1.2  # GiB that an attempt may take of the machine, its own limit of 1 GiB included
OUTSIDE = Path(tempfile.gettempdir()) / "opdkit-hostile-outside"

# what f() does; it must raise, or return nothing true
GETS_OUT = {
    "reads a file": f"return open({str(OUTSIDE)!r}).read()",
    "reads /etc/passwd": "return open('/etc/passwd').read()",
    "lists /": "import os; return [n for n in os.listdir('/') if n not in ('program',)]",
    "stats a file": f"import os; return os.stat({str(OUTSIDE)!r}).st_size",
    "stats /etc/shadow": "import os; return os.stat('/etc/shadow').st_mtime",
    "lstats a home": "import os; return os.lstat('/home').st_mode",
    "asks whether files are there": f"import os; return os.path.exists({str(OUTSIDE)!r})",
    "asks for access": f"import os; return os.access({str(OUTSIDE)!r}, os.F_OK)",
    "stats by statx": "import ctypes; return ctypes.CDLL(None).access(b'/etc/passwd', 0) == 0",
    "reads a link": "import os; return os.readlink('/proc/self/exe')",
    "climbs": "import os; os.chdir('../../../..'); return os.path.exists('etc/passwd')",
    "reads the environment": "return open('/proc/self/environ').read()",
    "writes outside": f"open({str(OUTSIDE)!r}, 'w').write('x'); return True",
    "appends to Python's library": "import os; return open(os.__file__, 'a').write('#')",
    "removes a file": f"import os; os.unlink({str(OUTSIDE)!r}); return True",
    "changes a mode": f"import os; os.chmod({str(OUTSIDE)!r}, 0o777); return True",
    "links": f"import os; os.link({str(OUTSIDE)!r}, 'a'); return True",
    "mounts": "import ctypes; return ctypes.CDLL(None).mount(b'a', b'/', b'tmpfs', 0, None) == 0",
    "changes its root": "import os; os.chroot('.'); return True",
    "takes namespaces": "import ctypes; return ctypes.CDLL(None).unshare(0x10020000) == 0",
    "forks": "import os; pid = os.fork(); pid or os._exit(0); return True",
    "starts a program": "import subprocess; return subprocess.run(['true']).returncode == 0",
    "opens a socket": "import socket; socket.socket(); return True",
    "kills its parent": "import os; os.kill(os.getppid(), 9); return True",
    "maps a secret file": "import ctypes; return ctypes.CDLL(None).memfd_create(b'x', 0) >= 0",
}
# how many bytes f() could keep; the quota is 64 MiB
FILLS = {
    "many files": "[open(str(i), 'wb').write(bytes(1 << 20)) for i in range(900)]",
    "fallocate": "[os.posix_fallocate(os.open(str(i), 66), 0, 16 << 20) for i in range(900)]",
    "unlinked files": (
        "[(os.write(fd := os.open('a', 66), bytes(16 << 20)), os.unlink('a')) for i in range(58)]"
    ),
    "holes": "[os.ftruncate(os.open(str(i % 40), 66), 16 << 20) for i in range(40)]",
    "one large file": "open('a', 'wb').write(bytes(512 << 20))",
    "10,000 files": "[open(str(i), 'w').close() for i in range(10000)]",
}
OTHERS: dict[str, Calls | Prints] = {
    "a program of 20 MB": calls("x = '" + "a" * (20 << 20) + "'\ndef f(x): return 0"),
    "a program of 70 MB": calls("#" + "a" * (70 << 20)),
    "a result of 80 MB": calls("def f(x): return 'a' * (80 << 20)"),
    "a result that is deep": calls(
        "def f(x):\n    r = []\n    for _ in range(10**5): r = [r]\n    return r"
    ),
    "an input of 70 MB": Prints(("print(1)",), ("a" * (70 << 20),), ("2",)),
    "endless output": Prints(("while True: print('a' * 1000)",), ("",), ("2",)),
    "endless memory": calls("def f(x):\n    r = []\n    while True: r.append(bytes(1 << 20))"),
    "a crash": calls("import ctypes\ndef f(x): ctypes.string_at(0)"),
}


def free(path: str) -> int:
    """Bytes on a disk that nobody uses."""
    size = os.statvfs(path)
    return size.f_bavail * size.f_frsize


def used() -> float:
    """GiB of the machine's memory."""
    lines = Path("/proc/meminfo").read_text().split()
    of = {name: int(lines[i + 1]) for i, name in enumerate(lines) if name.endswith(":")}
    return (of["MemTotal:"] - of["MemAvailable:"]) / (1 << 20)


def attempts() -> dict[str, Calls | Prints]:
    made: dict[str, Calls | Prints] = dict(OTHERS)
    for name, line in GETS_OUT.items():
        made[name] = Calls((f"def f():\n    {line}",), ("assert f()",), ("f",))
    for name, line in FILLS.items():
        # it tells how much lies there in the end, by what could be written or kept open
        program = (
            f"import os\ndef f():\n    try: {line}\n    except OSError: pass\n"
            "    return sum(os.stat(n).st_blocks * 512 for n in os.listdir())"
        )
        made[f"fills the disk: {name}"] = Calls((program,), ("assert f() > 64 << 20",), ("f",))
    for name, (program, test) in FORGED.items():
        made[f"passes for right: {name}"] = calls(program, test)
    return made


def test_none_of_them_comes_through() -> None:
    box = Sandbox(Limits(SECONDS, 1024), workers=1)
    box.check()
    OUTSIDE.write_text("secret")
    before, bad = OUTSIDE.stat(), {}
    disk = free(tempfile.gettempdir())
    for name, case in attempts().items():
        start, memory = time.monotonic(), used()
        [verdict] = box.run([case])
        if verdict.right:
            bad[name] = "it passes"
        elif not verdict.why or "Traceback" in verdict.why:
            bad[name] = f"why is not told: {verdict.why!r}"
        elif time.monotonic() - start > 3 * SECONDS + 20:
            bad[name] = f"it took {time.monotonic() - start:.0f} s"
        elif used() - memory > MEMORY:
            bad[name] = f"it left {used() - memory:.1f} GiB"
        nothing_left(())
    after = OUTSIDE.stat()
    assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
    OUTSIDE.unlink()
    assert disk - free(tempfile.gettempdir()) < 2 << 30, "the disk has filled"
    print(f"\nthe sandbox: {len(attempts())} attempts, {len(bad)} came through")
    assert not bad, "\n".join(f"{name}: {why}" for name, why in bad.items())
