"""The ops, one folder each; every folder has the same files (see CONTRIBUTING.md, "Adding an op")."""
