"""What can be seen on Linux of how Windows and macOS differ: missing names of Python, and narrow consoles."""

import ast
import re
from pathlib import Path

import pytest

from package.staging import find_rooms
from tests.commands import ROOT, assert_user_error, run_python, run_script

# what Python has not on Windows, without what only calls with a descriptor or a user need
OF_UNIX = {
    "os": {
        *(
            "fork",
            "forkpty",
            "killpg",
            "getpgid",
            "setsid",
            "setpgid",
            "getuid",
            "geteuid",
            "getgid",
            "uname",
        ),
        *(
            "chown",
            "fchown",
            "lchown",
            "fchmod",
            "mkfifo",
            "nice",
            "getloadavg",
            "sysconf",
            "statvfs",
            "sync",
        ),
        *("sched_getaffinity", "sched_setaffinity", "register_at_fork", "posix_fadvise", "posix_fallocate"),
        *("pread", "pwrite", "sendfile", "wait", "wait3", "wait4", "waitid", "WNOHANG", "O_NOFOLLOW"),
        *("O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC", "memfd_create", "openpty", "getgroups", "getegid"),
        *("sync", "uname"),
    },
    "signal": {
        *("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGQUIT", "SIGPIPE", "SIGSTOP"),
        *("SIGCONT", "SIGTSTP", "alarm", "setitimer", "pause", "pthread_kill", "pthread_sigmask", "sigwait"),
    },
    "socket": {"AF_UNIX", "SO_REUSEPORT"},
}
UNIX_MODULES = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "readline", "curses", "syslog"}
# a function that uses such a name asks one of these before; the last two ask in their turn
GUARDS = ("sys.platform", "os.name", "hasattr(os", "ImportError", "_read_held()", "_SHOWS_OWNERS")
NAMES = "|".join(sorted({name for names in OF_UNIX.values() for name in names} | UNIX_MODULES))
MAY_USE = re.compile(rf"\b(?:{NAMES})\b")  # parsing all files takes a quarter of a minute
# imports all modules of the product, the last arguments, without those names
IMPORT_ALL = f"""
import builtins, importlib, os, signal, socket, sys
import accelerate, cv2, onnxruntime, PIL.Image, safetensors.torch, starlette.applications, torch
import diffusers.loaders.peft, huggingface_hub.hf_file_system, psutil, transformers, uvicorn
from types import ModuleType
from unittest.mock import patch

def import_as_there(name, values=None, *rest):
    ours = {str(ROOT)!r} in (values or {{}}).get("__file__", "") and "site-packages" not in values["__file__"]
    if name in {UNIX_MODULES!r} and ours:
        raise ModuleNotFoundError(name)
    return real_import(name, values, *rest)

# other packages have asked which system this is
real_import, builtins.__import__ = builtins.__import__, import_as_there
for module in (os, signal, socket):
    for name in {OF_UNIX!r}[module.__name__]:
        vars(module).pop(name, None)
locks = sys.modules["msvcrt"] = ModuleType("msvcrt")
with patch.object(sys, "platform", "win32"):  # the one module that takes the other branch when it is imported
    import modules.file_locks
assert modules.file_locks.msvcrt is locks
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, repr(error))
"""


def product_files() -> list[Path]:
    """All files of the product."""
    inside = [path for room in (*find_rooms(ROOT), "package") for path in (ROOT / room).rglob("*.py")]
    return sorted({*inside, *ROOT.glob("*.py")})


def enclosing(tree: ast.Module) -> dict[ast.AST, ast.AST]:
    """Each node's function, or its statement at the top of the file."""
    found: dict[ast.AST, ast.AST] = {}
    for statement in tree.body:
        for node in ast.walk(statement):
            found[node] = statement
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            found |= dict.fromkeys(ast.walk(function), function)
    return found


def is_of_unix(node: ast.AST) -> bool:
    """Whether a node takes a name that Windows lacks."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr in OF_UNIX.get(node.value.id, ())
    if isinstance(node, ast.Import):
        return any(alias.name in UNIX_MODULES for alias in node.names)
    return isinstance(node, ast.ImportFrom) and node.module in (*UNIX_MODULES, *OF_UNIX)


def test_names_that_windows_lacks_are_asked_for_before() -> None:
    unguarded = []
    num_uses = 0
    for path in product_files():
        text = path.read_text(encoding="utf-8")
        if not MAY_USE.search(text):
            continue
        tree = ast.parse(text)
        around = enclosing(tree)
        for node in filter(is_of_unix, ast.walk(tree)):
            num_uses += 1
            said = ast.get_source_segment(text, around[node]) or ""
            if not any(guard in said for guard in GUARDS):
                unguarded.append(f"{path.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]
    assert unguarded == []
    assert num_uses >= 10


def test_what_other_programs_say_is_decoded_whatever_it_is() -> None:
    """A console of Windows has one of many encodings, and a text in another one must not end a page."""
    strict = []
    for path in product_files():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text if "subprocess." in text else "")):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
                given = {word.arg for word in node.keywords}
                if given & {"text", "universal_newlines", "encoding"} and "errors" not in given:
                    strict.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert strict == []


def test_a_file_is_replaced_by_what_waits_for_programs_that_have_it_open() -> None:
    direct = []
    for path in product_files():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text if ".replace(" in text else "")):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_of_path = len(node.args) == 1 and not node.keywords  # a text's method takes two
                owner = ast.unparse(node.func.value)
                if node.func.attr == "replace" and (owner == "os" or is_of_path):
                    direct.append(f"{path.relative_to(ROOT).as_posix()}: {ast.unparse(node)}")
    assert direct == ["modules/open_files.py: os.replace(file, path)"]


def test_every_module_is_imported_without_what_windows_lacks() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in product_files()]
    modules = [name.removesuffix(".__init__") for name in names if not name.startswith("package.reelsmith")]
    done = run_python("-c", IMPORT_ALL, *modules, folder=ROOT)
    assert done.stdout == ""


@pytest.mark.parametrize("encoding", ["cp932", "ascii"])
def test_a_console_that_cannot_show_a_name_ends_no_command(encoding: str, tmp_path: Path) -> None:
    """Commands speak UTF-8 to pipes, whatever the console that they were started from can show."""
    folder = tmp_path / "Käse 猫 \U0001f63a"
    environment = {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    done = run_script("reelsmith.py", "new", folder, "--family", "wan", environment=environment, check=False)
    assert_user_error(done, folder.name)
