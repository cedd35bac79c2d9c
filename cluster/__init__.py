"""The local cluster (several Ray nodes and an S3 server on one machine), and the files of cloud clusters."""
