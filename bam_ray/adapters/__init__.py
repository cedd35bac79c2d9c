"""Adapters: one LoRA per topic on a frozen base model, as in MoIN (arXiv 2410.09687).

Text is clustered into topics. Each topic has an adapter, which is trained without the others. The server chooses the
adapter of a request, and a batch may use many of them.
"""
