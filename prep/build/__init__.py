"""Building one split of a store: estimate, plan, build the shards, resume after an interruption, assemble."""
