"""One model over several processes: rank 0 decides and leads, the others carry out its orders on their shards."""
