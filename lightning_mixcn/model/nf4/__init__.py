"""Store weights in 4 bits (NF4) as plain parameters that FSDP can shard."""
