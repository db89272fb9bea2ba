"""The CPU kernels under AddressSanitizer and ThreadSanitizer: a part of `make sanitize`.

Built are the programs of one instruction set, the widest here, each in its own folder and again
only where a source has changed.
"""

from __future__ import annotations

import pytest
import sanitize

# With what of UBSan takes the compiler no longer: all of it takes minutes.
QUICK = "address,bounds,float-cast-overflow,pointer-overflow,shift,signed-integer-overflow"
PLANTED = {
    "overflow": "AddressSanitizer",
    "use-after-free": "heap-use-after-free",
    "leak": "LeakSanitizer: detected memory leaks",
    "race": "ThreadSanitizer: data race",
}


@pytest.fixture(scope="module", params=["memory", "threads"])
def program(request):
    why = sanitize.missing()
    if why:
        pytest.skip(why)
    isa = sanitize.instruction_sets()[0]
    folder, sanitizers = f"quick-{request.param}", {"memory": QUICK, "threads": sanitize.THREADS}
    return sanitize.build(folder, sanitizers[request.param], f"sanitize_{isa}") / f"sanitize_{isa}"


def test_random_calls(program):
    done = sanitize.call(program, "60", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count(": 60 calls") == 9


@pytest.mark.parametrize("kind", PLANTED)
def test_errors_are_seen(program, kind):
    """What is planted is reported by the sanitizer that looks for it."""
    if ("threads" in str(program)) != (kind == "race"):
        pytest.skip("another sanitizer's")
    done = sanitize.call(program, "--plant", kind)
    assert done.returncode != 0
    assert PLANTED[kind] in done.stderr
