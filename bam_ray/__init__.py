"""One pretrained language model into a mixture of experts: branch, upcycle, mix, evaluate, serve."""
