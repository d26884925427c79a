"""Several processes that train one model: DDP and FSDP2."""
