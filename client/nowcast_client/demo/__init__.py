"""A training job to try Nowcast on: `python -m nowcast_client.demo`. It needs torch, which is the training's own."""
