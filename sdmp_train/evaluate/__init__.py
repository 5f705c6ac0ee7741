"""What a trained backbone is worth: one file per protocol."""
