"""The adapters: one module a trainer, each with the same operations, run in its environment."""

NAMES = ("modern_llm", "trl", "llamafactory", "ms_swift")
TITLES = {
    "modern_llm": "modern_llm",
    "trl": "TRL",
    "axolotl": "Axolotl",
    "ms_swift": "ms-swift",
    "llamafactory": "LLaMA-Factory",
    "openrlhf": "OpenRLHF",
    "unsloth": "Unsloth",
}
