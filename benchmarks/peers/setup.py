"""Sets up the peers, each in a virtual environment of its own outside of the repository: some GB and minutes.

python benchmarks/peers/setup.py ~/peers
python benchmarks/compression.py --peers ~/peers
"""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

PEERS = {
    "llmcompressor": ["llmcompressor==0.14.*", "torch==2.13.0"],
    "torchao": ["torchao==0.18.*", "torch==2.13.0", "transformers"],
    "torch-pruning": ["torch-pruning==1.6.*", "torch==2.13.0", "transformers"],
}
"""Environment -> what pip installs there. torch is pinned to one whose CPU build is at hand."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", type=Path)
    parser.add_argument("--only", choices=PEERS, nargs="*", default=list(PEERS))
    arguments = parser.parse_args()
    for name in arguments.only:
        place = arguments.where / name
        if not (place / "bin" / "python").exists():
            venv.create(place, with_pip=True)
        subprocess.run([place / "bin" / "python", "-m", "pip", "install", "-q", *PEERS[name]], check=True)
        print(f"{name}: {place}")


if __name__ == "__main__":
    main()
