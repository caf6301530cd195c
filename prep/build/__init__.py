"""Building one split of a store: estimate, plan, build the shards, put them together."""
