"""Checkpoints and artifacts: manifests, leases, and folders of tensors in and out of the blob store."""
