"""`python -m medground` is the `medground` command."""

import sys

from medground.cli import main

sys.exit(main())
