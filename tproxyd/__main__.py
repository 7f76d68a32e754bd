"""`python -m tproxyd` is the command `tproxyd`."""

import sys

from tproxyd.cli import main

sys.exit(main())
