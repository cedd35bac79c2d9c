"""Clusters to run on: the local one, several Ray nodes and an S3 server on one machine."""
