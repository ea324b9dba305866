"""Raw images -> shards, offline: sources, listing, preparing, writing, verifying."""
