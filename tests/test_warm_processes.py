"""Scripts that start warm behave as those that Python starts."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import QUIET, run_program, run_python
from tests.warm_processes import CAN_BE_WARM, WarmProcess

SCRIPTS = {
    "tells": """import os, sys
print(sys.argv[1:], os.getcwd(), __name__, sys.path[0], os.environ["OMP_NUM_THREADS"])
print("and here", file=sys.stderr)
""",
    "fails": "raise ValueError('of this kind')",
    "exits": "import sys; sys.exit(3)",
    "exits with words": "import sys; sys.exit('not so')",
    "at its end": "import atexit; atexit.register(print, 'last'); print('first')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "thread": """import threading, time
threading.Thread(target=lambda: (time.sleep(0.1), print("slow"))).start()
""",
}

pytestmark = pytest.mark.skipif(not CAN_BE_WARM, reason="nothing starts warm here")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_warm_start_does_what_a_cold_one_does(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[name], encoding="utf-8")
    (tmp_path / "folder").mkdir()
    warm = run_python(script, "a b", folder=tmp_path / "folder", check=False)
    cold = run_program(sys.executable, script, "a b", folder=tmp_path / "folder", check=False)
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_a_warm_process_is_signalled_and_waited_for(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text("import time\nopen('started', 'w').close()\ntime.sleep(60)", encoding="utf-8")
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, -15)):
        process = WarmProcess([str(script)], tmp_path, QUIET, log, log)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=30) == code
        process.kill()
