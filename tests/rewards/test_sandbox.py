"""Attacks on the sandbox: each is a real one, and must fail its case, leave nothing behind and do
no harm.
"""

import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards import sandbox, workers
from opdkit.rewards.sandbox import Calls, Limits, Prints, Sandbox, Verdict
from opdkit.rewards.workers import protection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux")
# what is left out
LAYERS = [(), ("landlock",), ("user",), ("mounts",), ("landlock", "user"), ("landlock", "mounts")]


def calls(
    program: str, *tests: str, wanted: tuple[str, ...] = ("f",), setup: tuple[str, ...] = ()
) -> Calls:
    return Calls((program,), tests, wanted, setup=setup)


def descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def run(
    case: Calls | Prints,
    *,
    without: tuple[str, ...] = (),
    seconds: int = 2,
    memory: int = 256,
    partial=False,
) -> Verdict:
    """The verdict, having seen that in the end no process, no file and no memory is left of it,
    within the time allowed.
    """
    box = Sandbox(Limits(seconds, memory), workers=1, partial=partial, without=without)
    box.check()
    start = time.monotonic()
    [verdict] = box.run([case])
    assert (
        time.monotonic() - start
        < 3 * seconds * (len(case.inputs) if isinstance(case, Prints) else 1) + 5
    )
    nothing_left(without)
    return verdict


def nothing_left(without: tuple[str, ...]) -> None:
    for worker in Sandbox(without=without).programs.idle:
        assert worker.alive and len(descendants(worker.process.pid)) == 1  # the parent of programs
        assert os.listdir(worker.base) == ["readable"]


def fails(program: str, *tests: str, **options) -> str:
    verdict = run(calls(program, *(tests or ("assert f(1) == 2",))), **options)
    assert not verdict.right
    return verdict.why


def sees(program: str, *, without: tuple[str, ...] = ()) -> object:
    """What a program's f() returns."""
    verdict = run(calls(program, "import json; raise Exception(json.dumps(f()))"), without=without)
    kind, _, rest = verdict.why.partition(": ")
    assert kind == "Exception", verdict.why
    return json.loads(rest.rpartition(" in ")[0])


def holds(what: str, without: tuple[str, ...] = ()) -> None:
    """Skip where this machine does not keep programs from something, and says so."""
    Sandbox(workers=1, without=without).check()
    if not Sandbox(without=without).programs.idle[-1].held[what]:
        pytest.skip(f"not enforced on this machine: {workers.HELD[what]}")


def attempts(*lines: str) -> str:
    """A program whose f() tells which of the lines succeed."""
    return (
        "import os, socket, ctypes, subprocess, shutil, signal\ndef f():\n    done = []\n    for "
        f"line in {lines!r}:\n        try:\n            exec(line, globals())\n        except "
        "BaseException:\n            continue\n        done.append(line)\n    return done\n"
    )


def test_what_is_right_passes_and_what_is_wrong_does_not():
    assert run(calls("def f(x): return x + 1", "assert f(1) == 2", "assert f(2) == 3")) == Verdict(
        2, 2
    )
    wrong = run(
        calls("def f(x): return 2", "assert f(1) == 2", "assert f(2) == 3", "assert f(1) == 2")
    )
    assert (wrong.passed, wrong.total, wrong.why) == (
        1,
        3,
        "AssertionError: f(2) gives 2 and not 3 in 'assert f(2) == 3'",
    )
    assert (
        run(
            calls("def f(x): return 2", "assert f(1) == 2", "assert f(2) == 3", "assert f(1) == 2"),
            partial=True,
        ).passed
        == 2
    )


# ---------------------------------------------------------------------------------- time and memory


IGNORE = (
    "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
)
ENDLESS = {
    "a loop in a function": calls("def f(x):\n    while True: pass", "f(1)"),
    "a loop when imported": calls("while True: pass", "f(1)"),
    "signals are ignored": calls(IGNORE + "while True: pass", "f(1)"),
    "it sleeps": calls("import time\ndef f(x): time.sleep(1000)", "f(1)"),
    "it stops itself": calls(
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)", "f(1)"
    ),
    "it waits for input": calls(
        "import time\nwhile True:\n    try: input()\n    except EOFError: time.sleep(1)", "f(1)"
    ),
    "a fork bomb": calls(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "f(1)"
    ),
    "it never answers": calls("import os, time\nos.write(3, b'\\9\\0')\ntime.sleep(1000)", "f(1)"),
    "tests that hang": calls("def f(x): return 2", "while f(1): pass"),
    "a loop that prints nothing": Prints(("while True: pass",), ("",), ("",)),
    "standard output closed": Prints(
        ("import os, time\nos.close(1)\ntime.sleep(1000)",), ("",), ("",)
    ),
}


def test_what_never_ends_is_ended():
    box = Sandbox(Limits(seconds=1, memory=256), workers=len(ENDLESS))
    start = time.monotonic()
    verdicts = box.run(list(ENDLESS.values()))
    assert time.monotonic() - start < 15
    for name, verdict in zip(ENDLESS, verdicts, strict=True):
        assert verdict.passed == 0 and (
            "killed at a limit" in verdict.why or "it took too long" in verdict.why
        ), name
    nothing_left(())


def test_much_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "MemoryError" in fails("def f(x): return len(bytearray(10 << 30))")
    assert "MemoryError" in fails(
        "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 20))"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_value_that_is_too_large_to_hand_over():
    assert "too large" in fails("def f(x): return 'x' * (65 << 20)", memory=1024)
    fails("def f(x):\n    a = []\n    for _ in range(100_000): a = [a]\n    return a")


def test_a_crash():
    assert "crashed" in fails("import ctypes\ndef f(x): return ctypes.string_at(0)")


# ---------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("without", LAYERS)
def test_no_process_can_be_started(without):
    tried = (
        "os.fork() or os._exit(0)",
        "os.forkpty()",
        "subprocess.run(['true'])",
        "assert os.system('true') == 0",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
        "assert ctypes.CDLL(None).vfork() >= 0",
    )
    assert sees(attempts(*tried), without=without) == []


def test_a_fork_bomb():
    """See also what never ends."""
    assert "PermissionError" in fails("import os\ndef f(x):\n    while True: os.fork()")


def test_threads_work_and_end_with_the_program():
    program = (
        "import threading, time\ndef f(x):\n    out = []\n"
        "    t = threading.Thread(target=lambda: out.append(x + 1)); t.start(); t.join()\n"
        "    threading.Thread(target=time.sleep, args=(1000,)).start()\n    return out[0]"
    )
    assert run(calls(program, "assert f(1) == 2")).right
    bomb = (
        "import threading, time\ndef f(x):\n"
        "    while True: threading.Thread(target=time.sleep, args=(100,)).start()"
    )
    assert "RuntimeError" in fails(bomb)


@pytest.mark.parametrize("without", LAYERS)
def test_no_other_process_is_reached(without):
    tried = (
        "os.kill(os.getppid(), 0)",
        f"os.kill({os.getpid()}, signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        "os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        f"assert ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0",
        f"import resource; resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (1, 1))",
        f"os.sched_setaffinity({os.getpid()}, [0])",
        "import fcntl; fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())",
    )
    assert sees(attempts(*tried), without=without) == []


# -------------------------------------------------------------------------------------------- files


@pytest.fixture
def open_folder():
    """A folder that every user of this machine may write: what keeps a program out of it is the
    sandbox alone.
    """
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@pytest.mark.parametrize("without", LAYERS)
def test_nothing_is_written_outside(without, open_folder):
    kept, empty = open_folder / "kept", open_folder / "empty"
    kept.write_text("as it was")
    kept.chmod(0o666)
    empty.mkdir(mode=0o777)
    before = kept.stat()
    tried = (
        *(
            f"open({str(folder / 'new')!r}, 'w')"
            for folder in (open_folder, "/tmp" / Path(), Path("/dev/shm"), Path("/var/tmp"))
        ),
        *(f"open({str(kept)!r}, {mode!r})" for mode in ("w", "a", "r+")),
        *(
            f"os.open({str(kept)!r}, os.{flags})"
            for flags in ("O_WRONLY", "O_RDWR", "O_TRUNC", "O_RDONLY | os.O_TRUNC")
        ),
        f"os.open({str(open_folder)!r}, os.O_TMPFILE | os.O_RDWR)",
        f"os.open({str(open_folder / 'new')!r}, os.O_CREAT)",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.remove({str(kept)!r})",
        f"os.rename({str(kept)!r}, {str(open_folder / 'new')!r})",
        f"os.rename({str(kept)!r}, 'stolen')",
        f"os.link({str(kept)!r}, 'linked')",
        f"os.link({str(kept)!r}, {str(open_folder / 'new')!r})",
        f"os.symlink({str(kept)!r}, {str(open_folder / 'new')!r})",
        f"os.mkdir({str(open_folder / 'new')!r})",
        f"os.rmdir({str(empty)!r})",
        f"os.mkfifo({str(open_folder / 'new')!r})",
        f"os.chmod({str(kept)!r}, 0o600)",
        f"os.utime({str(kept)!r}, (0, 0))",
        f"os.setxattr({str(kept)!r}, 'user.x', b'1')",
        f"os.chdir({str(open_folder)!r}); open('new', 'w')",
        f"shutil.rmtree({str(open_folder)!r})",
        "assert ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, 0) == 0",
        "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    )
    assert sees(attempts(*tried), without=without) == []
    assert kept.read_text() == "as it was" and sorted(os.listdir(open_folder)) == ["empty", "kept"]
    assert kept.stat().st_mtime_ns == before.st_mtime_ns and kept.stat().st_mode == before.st_mode


def test_its_own_folder_is_empty_writable_and_gone_afterwards():
    holds("reading")  # Landlock, without which nothing is written at all
    program = (
        "import os\ndef f():\n    was = os.listdir()\n    open('a.txt', 'w').write('hello')\n"
        "    return [was, open(os.path.abspath('a.txt')).read(), os.getcwd()]"
    )
    was, read, folder = sees(program)
    assert (was, read) == ([], "hello") and not os.path.exists(folder)


def test_without_landlock_it_writes_nothing_at_all():
    tried = "open('mine', 'w')", "os.mkdir('mine')", "os.rename('a', 'b')"
    assert sees(attempts(*tried), without=("landlock",)) == []


def test_a_large_file_and_many_files_and_deep_folders():
    holds("reading")
    assert (
        sees(
            "def f():\n    try: open('a', 'wb').write(bytes(20 << 20))\n    except OSError as e: "
            "return e.errno"
        )
        == 27
    )  # EFBIG
    disk = (
        "def f(x):\n    for i in range(10**9):\n"
        "        with open(str(i), 'wb') as out: out.write(bytes(4 << 20))"
    )
    assert "[Errno 28]" in fails(disk, seconds=20)  # ENOSPC
    assert "[Errno 28]" in fails(
        "def f(x):\n    for i in range(1001): open(str(i), 'w').close()", seconds=20
    )
    assert (
        sees(attempts("os.mkdir('a')", "os.symlink('/', 'a')", "os.makedirs('/'.join('a' * 1000))"))
        == []
    )


@pytest.mark.parametrize("without", [(), ("user",)])
def test_it_reads_only_what_python_needs(without, open_folder):
    holds("reading", without)
    secret = open_folder / "secret"
    secret.write_text("token")
    secret.chmod(0o644)
    here = Path(sandbox.__file__)
    tried = [
        f"open({str(p)!r}).read()"
        for p in (secret, "/etc/passwd", "/proc/self/status", "/proc/cpuinfo", here)
    ]
    tried += [f"os.listdir({p!r})" for p in ("/", "/tmp", "/proc", str(Path.home()))]
    works = (
        "import colorsys, sqlite3, ssl",
        "open('/dev/null', 'w').write('x')",
        "open('/dev/urandom', 'rb').read(1)",
    )
    assert sees(attempts(*tried, *works), without=without) == list(works)


# ----------------------------------------------------------------------------- environment, network


@pytest.mark.parametrize("without", [(), ("user",), ("landlock",)])
def test_no_environment_is_read(without, monkeypatch):
    """Not its own, the workers' or ours: the last has secrets, and is seen by this process at
    least.
    """
    holds("neighbours", without)
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert Path(f"/proc/{os.getpid()}/environ").read_bytes()
    program = (
        "import os\ndef f():\n    seen = []\n    for pid in range(1, 70000):\n        try: "
        "seen.append(open(f'/proc/{pid}/environ', 'rb').read().decode('latin-1'))\n        except "
        "OSError: pass\n    return [sorted(os.environ), [s for s in seen if s]]"
    )
    environment, seen = sees(program, without=without)
    assert environment == ["MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    # its own, without Landlock
    assert [s for s in seen if not s.startswith(("PYTHONHASHSEED", "LD_LIBRARY_PATH"))] == []


@pytest.mark.parametrize("without", LAYERS)
def test_no_socket_is_opened(without):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local,
    ):
        path = f"/tmp/opdkit-{os.getpid()}-{len(without)}"
        local.bind("\0" + path)
        server.settimeout(0)
        local.settimeout(0)
        port = server.getsockname()[1]
        tried = (
            f"socket.create_connection(('127.0.0.1', {port}))",
            *(
                f"socket.socket(socket.{family})"
                for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET")
            ),
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
            f"socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '\\0{path}')",
            f"socket.socketpair(type=socket.SOCK_DGRAM)[0].connect('\\0{path}')",
            f"socket.socketpair(type=socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, '\\0{path}')",
            # io_uring_setup
            "assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0",
        )
        assert sees(attempts(*tried), without=without) == []
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(BlockingIOError):
            local.recv(1)


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="other processors have one way into the kernel"
)
def test_the_kernels_other_doors_are_shut():
    """32-bit system calls, and those of the x32 kind, have other numbers: a filter that forgets
    them lets everything through.
    """
    program = (
        "import ctypes, mmap\nlibc = ctypes.CDLL(None)\ndef f(code):\n    if code == 'x32': return "
        "libc.syscall(0x40000000 + 39)\n    page = mmap.mmap(-1, 4096, prot=7)\n    "
        "page.write(bytes.fromhex(code))\n    return "
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    )
    # mov eax, 7; ret
    assert run(calls(program, "assert f('b807000000c3') == 7", "assert f('x32') == -1")).right
    # mov eax, 20 (getpid); int 0x80; ret
    assert "signal 31" in fails(program, "f('b814000000cd80c3')")


def test_asyncio_works():
    program = (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x + 1\n"
        "def f(x): return asyncio.run(g(x))"
    )
    assert run(calls(program, "assert f(1) == 2")).right


def test_nothing_outlives_it_in_the_kernel():
    """System V memory and message queues would."""
    tried = (
        "assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
        "assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
        "assert ctypes.CDLL(None).mq_open(b'/x', 0o102, 0o600, 0) >= 0",
        "os.memfd_create('x')",
        "assert ctypes.CDLL(None).syscall(248, b'user', b'x', b'y', 1, -2) >= 0",  # add_key
    )
    assert sees(attempts(*tried)) == []


# ------------------------------------------------------------------------------------------- output


def test_a_gigabyte_of_output():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loud = (
        "import sys\ndata = b'x' * (1 << 20)\n"
        "for _ in range(1024): sys.stdout.buffer.write(data)\ndef f(x): return x + 1"
    )
    assert run(calls(loud, "assert f(1) == 2")).right  # it goes nowhere
    flood = run(Prints((loud,), ("",), ("x",)))
    assert not flood.right and "it printed more than 1048578 bytes" in flood.why
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


# ------------------------------------------------------------------------------ verdicts not earned


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os\ndef f(x): os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "def f(x): raise KeyboardInterrupt",
        "def f(x): raise GeneratorExit",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): exit()",
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGTERM)",
        "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\nimport time; "
        "time.sleep(1)",
    ],
)
def test_ending_early_is_no_pass(program):
    fails(program)
    assert not run(calls(program, "try: f(1)\nexcept Exception: pass", "assert f(1) == 2")).right


@pytest.mark.parametrize(
    "program",
    [
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nbuiltins.all = "
        "builtins.any = lambda x: True\nbuiltins.abs = builtins.round = lambda *a: 2\ndef f(x): "
        "return 3",
        "import sys\nsys.modules['math'] = sys.modules['unittest'] = sys.modules['__main__']\ndef "
        "f(x): return 3",
        "import sys\ndef trace(frame, *_):\n    frame.f_locals.update(x=2, wanted=2)\n    return "
        "trace\nsys.settrace(trace)\ndef f(x): return 3",
        "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        "
        "frame.f_globals['check'] = lambda c: None\n        frame = frame.f_back\n    for o in "
        "gc.get_objects():\n        if isinstance(o, dict) and 'check' in o: o['check'] = print\n"
        "    return 3",
        "def check(candidate): pass\nassert_equal = abs = all = math = set = check\ndef f(x): "
        "return 3",
        "def f(x): raise AssertionError",
        "__builtins__ = {}\ndef f(x): return 3",
    ],
)
def test_tampering_with_python_reaches_no_test(program):
    check = (
        "def check(f):\n    import math\n"
        "    assert all([abs(f(1)) == 2, set([f(1)]) == set([2]), math.fabs(f(1)) == 2])"
    )
    assert not run(calls(program, "check(f)", setup=(check,))).right
    fails(program)


ALWAYS = """
class Always{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __hash__(self): return 0
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __abs__ = __round__ = __mul__ = __getitem__ = __iter__ = __sub__
    def __instancecheck__(self, other): return True
    @property
    def __class__(self): return int
"""


@pytest.mark.parametrize(
    "base", ["", "(int)", "(str)", "(list)", "(float)", "(tuple)", "(dict)", "(set)"]
)
def test_a_value_that_equals_everything_equals_nothing(base):
    program = ALWAYS.format(base=base) + "def f(x): return Always()"
    for test in (
        "assert f(1) == 2",
        "assert 2 == f(1)",
        "assert not f(1) != 2",
        "assert f(1) in (2, 3)",
        "assert 2 in {f(1): 0}",
        "assert abs(f(1) - 2) < 1e-6",
        "assert [f(1)] == [2]",
        "assert isinstance(f(1), int) and f(1) > 1",
        "import math; assert math.isclose(f(1), 2)",
    ):
        assert not run(calls(program, test)).right, test
    if base == "(set)":
        assert not run(calls(program, "assert f(1) == {2}")).right


def test_comparing_two_of_its_own_objects_is_the_programs_business():
    program = (
        "class P:\n    def __init__(self, x): self.x = x\n"
        "    def __eq__(self, o): return self.x == o.x\ndef f(x): return P(x)"
    )
    assert run(
        calls(program, "assert f(1) == P(1) and f(1) != P(2) and f(1) != 1", wanted=("f", "P"))
    ).right


@pytest.mark.parametrize(
    "written",
    ["b'.' * 9", "b'#.' * 9", "b'\\xff' * 999", "b'\\x03\\x00\\x00\\x00[1]'", "b'\\x00' * 99999"],
)
def test_writing_to_all_open_files_forges_nothing(written):
    program = (
        f"import os\nfor fd in range(99):\n    try: os.write(fd, {written})\n"
        "    except OSError: pass\n"
    )
    fails(program + "def f(x): return 3", seconds=1)
    fails(f"def f(x):\n    exec({program!r})\n    return 3", seconds=1)


def test_a_program_that_speaks_the_protocol_can_still_only_answer():
    """It may write any message; what a test gets from one is a value of its own types."""
    speak = (
        "import os, json\ndef say(*m):\n    d = json.dumps(m).encode(); os.write(3, "
        "len(d).to_bytes(4, 'little') + d)\ndef f(x):\n    {}\n    import time; time.sleep(1)"
    )
    for message in (
        "say('value', ['mine', 0], [])",
        "say('value', True, [])",
        "say('error', 'SystemExit', [0])",
        "say('error', 'Gone', [])",
        "say('call', 0, [], {}); say('do', 0, ['__getattr__', '__class__'], {})",
        "say('ready', {'check': 1})",
        "say('value', ['ndarray', '|O', 1], [])",
        "say('value', ['type', 'eval'], [])",
        "say('value')",
    ):
        fails(speak.format(message), seconds=1)


def test_tests_and_expected_values_are_not_in_its_memory():
    """Nor those of an earlier case of the same worker."""
    search = (
        "import gc, sys\ndef f(x):\n    word = '_'.join(['needle', str(7340 + x)])\n    found = "
        "0\n    seen = gc.get_objects()\n    for o in list(seen): seen += [r for r in "
        "gc.get_referents(o) if isinstance(r, (str, bytes))]\n    for o in seen:\n        if "
        "isinstance(o, str): found += word in o\n        if isinstance(o, bytes): found += "
        "word.encode() in o\n    frame = sys._getframe().f_back\n    while frame:\n        found "
        "+= word in repr(frame.f_locals)\n        frame = frame.f_back\n    return found"
    )
    for _ in range(2):
        assert run(
            calls(search, "assert f(1) == len('needle_7341') - 11", "assert f(1) == 0")
        ).right


def test_a_program_may_not_look_into_what_a_test_gives_it():
    """A generator's frame would lead to the test's own variables."""
    program = (
        "def f(given):\n    for name in ('gi_frame', 'gi_code', '__globals__', '__self__', "
        "'__code__', 'f_back'):\n        try: return str(getattr(given, name))\n        except "
        "AttributeError: pass\n    return 'nothing'"
    )
    for given in ("(i for i in [1])", "lambda: 1", "print", "object()", "Exception('x')"):
        assert run(calls(program, f"assert f({given}) == 'nothing'")).right, given


# ------------------------------------------------------------------------------- around the sandbox


def test_it_dies_with_the_process_that_asked():
    holds("reading")
    script = (
        "from opdkit.rewards.sandbox import *\nbox = Sandbox(Limits(60), workers=1)\n"
        "box.check()\nworker = Sandbox().programs.idle[0]\nprint(worker.process.pid, worker.base, "
        "flush=True)\nbox.run([Calls(('open(\"started\", \"w\")\\nwhile True: pass',), ('f()',), "
        "('f',))])"
    )
    asking = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    pid, base = asking.stdout.readline().split()
    until(lambda: os.path.exists(f"/proc/{pid}/root{base}/program/started"))
    until(lambda: len(descendants(int(pid))) == 3)  # the parent of programs, program, tests
    started = [int(pid), *descendants(int(pid))]
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    asking.stdout.close()
    until(lambda: not any(map(alive, started)))
    until(lambda: not os.path.exists(base))


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_that_dies_is_replaced():
    Sandbox(workers=1).check()
    workers = list(Sandbox().programs.idle)
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    until(lambda: not any(os.path.exists(worker.base) for worker in workers))
    assert run(calls("def f(x): return 2", "assert f(1) == 2")).right


def test_many_at_once_keep_their_order():
    cases = [calls(f"def f(x): return x + {i}", "assert f(0) % 3") for i in range(60)]
    seen: list[int] = []
    verdicts = Sandbox(workers=3).run([*cases, *cases], seen.append)
    assert [v.right for v in verdicts] == [i % 3 > 0 for i in range(60)] * 2
    assert seen[-1] == 120 and seen == sorted(seen)


def test_the_same_program_gives_the_same_answer():
    program = "import random\ndef f(): return [random.random(), hash('x'), list({'a', 'b', 'c'})]"
    assert sees(program) == sees(program)


def test_protection_says_what_holds():
    lines = protection()
    assert "no network: no socket can be opened" in lines
    assert len(
        [line for line in lines if line.removeprefix("NOT enforced: ") in workers.HELD.values()]
    ) == len(workers.HELD)


def test_limits_that_let_nothing_start():
    for limits in ({"seconds": 0}, {"seconds": 0.5}, {"memory": 1}):
        with pytest.raises(UserError, match="must be a whole number"):
            Limits(**limits)


def test_a_machine_that_cannot_confine_is_refused_unless_one_insists():
    without = "landlock", "seccomp"
    with pytest.raises(
        UserError,
        match=r"cannot be confined. Not enforced: no network.*no other "
        r"processes.*Code\(unprotected=True\)",
    ):
        Sandbox(without=without).check()
    insisting = Sandbox(Limits(1), workers=1, without=without, unprotected=True)
    program = "import os\nos.fork()\nwhile True: pass"
    assert [
        v.right
        for v in insisting.run(
            [calls("def f(x): return 2", "assert f(1) == 2"), calls(program, "f(1)")]
        )
    ] == [
        True,
        False,
    ]
    [worker] = Sandbox(without=without).programs.idle
    until(lambda: len([p for p in descendants(worker.process.pid) if alive(p)]) == 1)
