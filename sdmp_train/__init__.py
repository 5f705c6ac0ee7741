"""Self-supervised pretraining with SDMP: `python -m sdmp_train`."""
