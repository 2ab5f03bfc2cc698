"""``python -m fastast.cli`` is ``fastast``."""

import sys

from fastast.cli import main

sys.exit(main())
