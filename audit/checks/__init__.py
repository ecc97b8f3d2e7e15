"""The checks: one module each, in the order of the page."""

NAMES = (
    "step_one",
    "log_probs",
    "template_ids",
    "truncation",
    "packing",
    "accumulation",
    "world_size",
    "reference_cache",
    "resume",
    "kill_in_save",
    "flipped_bit",
    "bad_row",
    "speed",
)
