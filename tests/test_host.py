import subprocess
import sys

from tnl import host


def test_a_process_knows_its_memory() -> None:
    """The peak stays when what was held is given back."""
    program = "import numpy; from tnl import host; x = numpy.ones(1 << 25); print(host.resident()); del x; print(host.peak_resident())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, peak = map(int, done.stdout.split())
    assert held > 256 * 2**20 and abs(peak - held) < 32 * 2**20
    assert host.resident() <= host.peak_resident() and host.available() > 0
