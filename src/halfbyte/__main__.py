"""``python -m halfbyte`` is ``halfbyte``."""

from halfbyte.cli import main

raise SystemExit(main())
