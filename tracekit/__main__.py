"""``python -m tracekit`` is the ``tracekit`` command."""

import sys

from tracekit.cli import main

sys.exit(main())
