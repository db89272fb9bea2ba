"""The CPU kernels under AddressSanitizer, and in the long run ThreadSanitizer: of `make sanitize`
a part, of which all also looks for undefined behaviour, with every instruction set.

Built are the programs of one instruction set, the widest here, each in its own folder and again
only where a source has changed.
"""

from __future__ import annotations

import pytest
import sanitize
from filelock import FileLock

SANITIZERS = {"memory": "address", "threads": sanitize.THREADS}  # UBSan doubles the compiler's time
PLANTED = {
    "overflow": "AddressSanitizer",
    "use-after-free": "heap-use-after-free",
    "leak": "LeakSanitizer: detected memory leaks",
    "race": "ThreadSanitizer: data race",
}


@pytest.fixture(scope="module", params=["memory", pytest.param("threads", marks=pytest.mark.slow)])
def program(request):
    why = sanitize.missing()
    if why:
        pytest.skip(why)
    isa = sanitize.instruction_sets()[0]
    folder = f"quick-{request.param}"
    sanitize.BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(sanitize.BUILD / f"{folder}.lock"):  # processes share what is built
        built = sanitize.build(folder, SANITIZERS[request.param], f"sanitize_{isa}")
    return built / f"sanitize_{isa}"


def test_random_calls(program):
    done = sanitize.call(program, "40", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count(": 40 calls") == 9


@pytest.mark.parametrize("kind", PLANTED)
def test_errors_are_seen(program, kind):
    """What is planted is reported by the sanitizer that looks for it."""
    if ("threads" in str(program)) != (kind == "race"):
        pytest.skip("another sanitizer's")
    done = sanitize.call(program, "--plant", kind)
    assert done.returncode != 0
    assert PLANTED[kind] in done.stderr
