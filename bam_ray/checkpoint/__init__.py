"""Checkpoints and artifacts: manifests, leases, and folders of tensors that are read from and written to the store."""
