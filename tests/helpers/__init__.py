"""What tests share: tiny models, processes that talk to each other, rules about the source."""
