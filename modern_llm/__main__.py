"""`python -m modern_llm VERB` is `modern-llm VERB`; launchers start their processes so."""

from modern_llm.cli import run

if __name__ == "__main__":
    run()
