"""`python -m tokenpo`, and `accelerate launch -m tokenpo` for several processes."""

import sys

from tokenpo.cli import main

sys.exit(main())
