"""The program in a checkout: `python run.py compression=int8 precision=16-mixed`. Same as the console script `leanfit`.

Shell completion of Hydra looks for the literal @hydra.main in this file; it stands on a function in pipeline/app.py.
"""

import sys

from pipeline import interrupts

if __name__ == "__main__":
    interrupts.install()
    from pipeline.app import main

    sys.exit(main())
