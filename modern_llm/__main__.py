"""`python -m modern_llm VERB` is `modern-llm VERB`; launchers start their processes so."""

import sys

from modern_llm.cli import leave_together, main

if __name__ == "__main__":
    status = main()
    if status == 0:
        leave_together()
    sys.exit(status)
