"""The program in a checkout: `python run.py compression=int8 precision=16-mixed`. Same as the console script `leanfit`.

Shell completion of Hydra looks for the literal @hydra.main in this file; it stands on a function in pipeline/app.py.
"""

import sys

from pipeline import interrupts

if __name__ == "__main__":
    interrupts.install()
    try:
        from pipeline.app import main
    except ModuleNotFoundError as missing:
        print(f"error: {missing}: this Python lacks what leanfit needs; pip install -e . here first", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
