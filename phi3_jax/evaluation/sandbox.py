"""Runs model-written Python (HumanEval, MBPP) without harm to this machine: Linux and the standard library only.

Each program has a process of its own, `python -I -S` with an empty environment, no input, and an empty directory that is
deleted afterwards. What holds it there, each layer enough for what it names and all of them set where the kernel agrees:

- limits (always): CPU and wall time, address space, file size, open files, no core dump, no second process or thread.
- seccomp (always): no socket, fork, thread, exec, signal, ptrace, chmod, user namespace, io_uring: such calls fail.
- namespaces (root, or a user namespace): all mounts read-only but for a small tmpfs, an empty network, its own processes.
- landlock (Linux 6.2 on): writes only in its directory; reads only there, in the standard library, /usr and /lib.
- uid (root only): a uid that nobody uses, without capabilities.

One of namespaces and landlock is required: a machine with neither is refused, nothing ever runs unprotected. With
landlock alone the sum of a program's files is not limited, only each of them; with namespaces alone it may read what
its uid may. Threads and subprocesses are refused, so an honest program that starts one fails. A pass means that the
program ran to its end: tests share the interpreter with the solution, so one that is made to cheat (patch the tests,
search the frames for the token) can; `sys.exit(0)` or guessing cannot.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import marshal
import os
import pwd
import resource
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from phi3_jax.errors import UserError

CHOICES = (("namespaces", "landlock"), ("namespaces",), ("landlock",))  # best first
GRACE = 30.0  # seconds for the launcher to start and end, beyond the program's own
DETAIL = 400  # characters
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column of DENIED
# Calls with their numbers on x86_64 and aarch64 (- where it has none). Those from 424 on (io_uring, pidfd, clone3, the
# new mount and xattr calls) are the same everywhere and all answered with ENOSYS, for which libc has fallbacks.
DENIED = """
socket 41 198  connect 42 203  accept 43 202  sendto 44 206  sendmsg 46 211  bind 49 200  listen 50 201
socketpair 53 199  accept4 288 242  sendmmsg 307 269  clone 56 220  fork 57 -  vfork 58 -  execve 59 221
execveat 322 281  kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  setpgid 109 154  setsid 112 157  prctl 157 167
prlimit64 302 261  setpriority 141 140  sched_setparam 142 118  sched_setscheduler 144 119  sched_setaffinity 203 122
sched_setattr 314 274  migrate_pages 256 238  move_pages 279 239  chmod 90 -  fchmod 91 52  fchmodat 268 53
chown 92 -  lchown 94 -  fchown 93 55  fchownat 260 54  utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88
setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7  removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
unshare 272 97  bpf 321 280  memfd_create 319 279  shmget 29 194  semget 64 190  msgget 68 186  mq_open 240 180
add_key 248 217  request_key 249 218  keyctl 250 219  perf_event_open 298 241  userfaultfd 323 282
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use: wall and CPU seconds, bytes of memory, of each file, of all files and of all output."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    disk_bytes: int = 1 << 24  # binds with namespaces only
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended: status is passed, failed, timed out, killed or too much output; detail the end of stderr."""

    passed: bool
    status: str
    detail: str


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Runs a program to its end or its limits; passed if its last statement was reached without an exception.

    Raises:
      UserError: this machine cannot isolate it; the program has not run.
    """
    return _launch(program, limits, layers())


def run_all(programs: Sequence[str]) -> list[Outcome]:
    """Outcomes of programs, in their order, two at a time."""
    layers()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, programs))


@functools.cache
def layers() -> tuple[str, ...]:
    """Names of the layers (module docstring) that this machine really has, found by running an empty program."""
    refusals = []
    for choice in CHOICES if sys.platform == "linux" else ():
        try:
            if (outcome := _launch("", Limits(), choice)).passed:
                return ("limits", "seccomp", *choice, *(["uid"] if os.geteuid() == 0 else []))
            refusals.append(f"{' + '.join(choice)}: {outcome.status}, {outcome.detail}")
        except UserError as error:
            refusals.append(f"{' + '.join(choice)}: {error}")
    raise UserError(
        f"this machine cannot isolate model-written code ({'; '.join(refusals) or sys.platform}); use Linux 6.2 or newer "
        "with Landlock, or a container that allows namespaces (docker run --cap-add SYS_ADMIN, or podman)"
    )


def _launch(program: str, limits: Limits, choice: Sequence[str]) -> Outcome:
    token, work = secrets.token_hex(16), tempfile.mkdtemp(prefix="sandbox-")
    control, writer = os.pipe()
    job = asdict(limits) | dict(program=program, token=token, work=work, control=writer, choice=tuple(choice))
    job |= {"denied": DENIED, "machines": MACHINES}
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _source(), work]  # work: to know it by in a process list
    try:
        with tempfile.TemporaryFile() as file:
            file.write(marshal.dumps(job))
            file.seek(0)
            try:
                process = subprocess.Popen(
                    command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    pass_fds=(writer,), env={}, cwd="/", start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(writer)
        with process:
            try:
                report, stderr, over = _read(process, control, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):  # not reaped yet, so the number is still its own
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(control)
        _remove(work)
    if over:
        return Outcome(False, "too much output", f"over {limits.output_bytes} bytes")
    lines, detail = report.split("\n"), "\n".join(stderr.strip().split("\n")[-3:])[-DETAIL:]
    if lines[0] != "ready":
        raise UserError(f"the sandbox did not start: {lines[0] or detail or 'no answer'}")
    status = {"exit": "failed", "timed": "timed out"}.get(lines[-1].split(" ")[0], "killed")
    if lines == ["ready", token, "exit 0"]:
        return Outcome(True, "passed", detail)
    return Outcome(False, status, detail or f"ended before its last statement: {lines[-1]}")


def _read(process: subprocess.Popen, control: int, limits: Limits) -> tuple[str, str, bool]:
    """The control channel, the end of stderr, and whether output went over its limit (the rest is then dropped)."""
    assert process.stdout is not None and process.stderr is not None  # pipes
    stderr, total, over = process.stderr.fileno(), 0, False
    tails, deadline = dict.fromkeys((control, stderr, process.stdout.fileno()), b""), time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        for pipe in tails:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and (ready := selector.select(max(0, deadline + GRACE - time.monotonic()))):
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                total, tails[key.fd] = total + len(chunk), (tails[key.fd] + chunk)[-limits.output_bytes :]
                if not chunk:
                    selector.unregister(key.fd)
            if total > limits.output_bytes and not over:
                over = True
                process.terminate()  # the launcher then kills and reaps the program
    return tails[control].decode(errors="replace"), tails[stderr].decode(errors="replace"), over


def _remove(top: str) -> None:
    """Deletes a tree by flattening it: depth, name length and permissions chosen by a program must not matter."""
    while entries := list(os.scandir(top)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # or it cannot be moved
                os.rename(inner.path, os.path.join(top, secrets.token_hex(16)))
            os.rmdir(entry.path)
    os.rmdir(top)


# What follows runs in the launcher, a fresh single-threaded interpreter that gets the source of these functions.
def _source() -> str:
    parts: list[Callable[..., object]] = [_main, _namespaces, _confine, _landlock, _seccomp, _call, _program]
    body = "\n".join(inspect.getsource(part) for part in parts)
    modules = "ctypes, marshal, os, pwd, resource, signal, struct, sys, types"
    return f"from __future__ import annotations\nimport {modules}\n{body}\n_main()\n"


def _main() -> None:
    """Forks the program's process and waits: with it as the first of its PID namespace, all it started die with it."""
    job, uid = marshal.load(sys.stdin.buffer), os.geteuid()
    libc, control, token = ctypes.CDLL(None, use_errno=True), job["control"], job["token"]
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGCHLD, signal.SIGTERM})
        _call(libc.prctl, 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if "namespaces" in job["choice"]:
            _namespaces(libc, uid)
        if not (child := os.fork()):
            _confine(libc, job, uid)
    except Exception as error:
        os.write(control, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    if not child:
        return _program(job.pop("program"), f"{token}\n".encode(), control, os.write, os._exit)
    woken = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, job["seconds"])
    os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    killed, cpu = os.WIFSIGNALED(status), used.ru_utime + used.ru_stime
    # Of the limit's two signals; the kernel's own count of CPU time and the one it reports differ on a busy machine.
    limited = killed and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) and cpu > 0.75 * job["cpu_seconds"]
    if woken is None or limited:
        verdict = f"timed out: {job['seconds']} s, or {job['cpu_seconds']} s of CPU"
    else:
        verdict = f"signal {os.WTERMSIG(status)}" if killed else f"exit {os.WEXITSTATUS(status)}"
    os.write(control, verdict.encode())
    os._exit(0)


def _namespaces(libc: ctypes.CDLL, uid: int) -> None:
    """New mount, PID, network, IPC and UTS namespaces; everything mounted becomes private and read-only."""
    gid = os.getegid()
    _call(libc.unshare, 0x6C020000 | (0x10000000 if uid else 0))  # CLONE_NEW{NS,PID,NET,IPC,UTS}, and USER
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"} if uid else {}
    for file, line in maps.items():
        with open(f"/proc/self/{file}", "w") as target:
            target.write(line)
    _call(libc.mount, None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, MOUNT_ATTR_RDONLY), Linux 5.12
    _call(libc.syscall, 442, -100, b"/", 0x8000, struct.pack("4Q", 1, 0, 0, 0), 32)


def _confine(libc: ctypes.CDLL, job: dict[str, Any], uid: int) -> None:
    """All the rest, in the program's own process; the order is what each step still has to be allowed to do."""
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    ids = (uid, os.getegid())
    if uid == 0:
        used, first = {entry.pw_uid for entry in pwd.getpwall()}, 60_000 + os.getpid() % 4000
        ids = (next(free for free in range(first, 65_000) if free not in used),) * 2
    if "namespaces" in job["choice"]:
        options = f"size={job['disk_bytes']},nr_inodes=4096,mode=700,uid={ids[0]},gid={ids[1]}"
        _call(libc.mount, b"tmpfs", job["work"].encode(), b"tmpfs", 6, options.encode())  # MS_NOSUID | MS_NODEV
    elif uid == 0:
        os.chown(job["work"], *ids)
    os.chdir(job["work"])
    readable = [path for path in sys.path if os.path.isdir(path)]
    if uid == 0:  # the interpreter may lie below /root: from here on it is reached by descriptor, not by path
        moved = {path: f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in readable}
        for module in [module for module in sys.modules.values() if hasattr(module, "__path__")]:
            module.__path__ = [f"{moved[os.path.dirname(path)]}/{os.path.basename(path)}" for path in module.__path__]
        sys.path[:] = readable = list(moved.values())
        os.setgroups([])
        os.setresgid(ids[1], ids[1], ids[1])
        os.setresuid(ids[0], ids[0], ids[0])
    _call(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24))
    _call(libc.prctl, 1, signal.SIGKILL)  # a new uid clears it
    _call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if "landlock" in job["choice"]:
        _landlock(libc, readable)
    sizes = {"CPU": job["cpu_seconds"], "AS": job["memory_bytes"], "FSIZE": job["file_bytes"]}
    for name, most in (sizes | {"NOFILE": 64, "NPROC": 0, "CORE": 0, "MSGQUEUE": 0}).items():
        hard = resource.getrlimit(limit := getattr(resource, f"RLIMIT_{name}"))[1]
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard),) * 2)
    _seccomp(libc, job["denied"], *job["machines"][os.uname().machine])
    os.write(job["control"], b"ready\n")


def _landlock(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Denies all file access but to the working directory and, for reading, the libraries; and TCP where it can."""
    if (abi := _call(libc.syscall, 444, None, 0, 1)) < 3:
        raise OSError(f"Landlock version {abi} cannot forbid truncation, 3 (Linux 6.2) can")
    write, read_file, read_dir, all_files = 2, 4, 8, (1 << (15 if abi < 5 else 16)) - 1  # LANDLOCK_ACCESS_FS_*
    handled = [all_files, *([3] if abi >= 4 else []), *([3] if abi >= 6 else [])]  # files, TCP, signals and sockets
    rules = struct.pack(f"{len(handled)}Q", *handled)
    ruleset = _call(libc.syscall, 444, rules, len(rules), 0)
    grants = dict.fromkeys((*readable, f"{sys.base_prefix}/lib", "/usr", "/lib", "/lib64"), read_file | read_dir)
    grants |= {".": all_files, "/dev/null": read_file | write, "/dev/urandom": read_file}
    for path, access in grants.items():
        if os.path.exists(path):
            rule = struct.pack("=Qi", access, os.open(path, os.O_PATH | os.O_CLOEXEC))
            _call(libc.syscall, 445, ruleset, 1, rule, 0)
    _call(libc.syscall, 446, ruleset, 0)


def _seccomp(libc: ctypes.CDLL, denied: str, arch: int, column: int) -> None:
    """Installs the filter: another architecture kills, calls from 424 on give ENOSYS, those denied EPERM."""
    numbers = [int(number) for number in denied.split()[1 + column :: 3] if number != "-"]
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(above, 0, 1, 424), (answer, 0, 0, 0x50000 | 38)]
    for number in numbers:
        code += [(equal, 0, 1, number), (answer, 0, 0, 0x50000 | 1)]
    code += [(answer, 0, 0, 0x7FFF0000)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    _call(libc.prctl, 22, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters)), 0, 0)


def _call(function: Callable[..., int], *arguments: Any) -> int:
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if (result := function(*words)) == -1:
        raise OSError(number := ctypes.get_errno(), f"{function.__name__} {arguments[0]}: {os.strerror(number)}")
    return result


def _program(
    source: str, token: bytes, control: int, write: Callable[[int, bytes], int], leave: Callable[[int], object]
) -> None:
    """Runs it as __main__ and ends at once, before any atexit; write and leave are bound before it can patch them."""
    sys.dont_write_bytecode = True
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)
    write(control, token)
    leave(0)
