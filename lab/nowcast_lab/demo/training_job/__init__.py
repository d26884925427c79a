"""A training job to try Nowcast on: `python -m nowcast_lab.demo.training_job`; it needs the client and torch only."""
