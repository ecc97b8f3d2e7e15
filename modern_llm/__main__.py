"""`python -m modern_llm VERB` is `modern-llm VERB`."""

import sys

from modern_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
