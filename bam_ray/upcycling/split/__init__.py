"""Splitting of one dense FFN into experts: the assignment of its neurons (LLaMA-MoE, arXiv 2406.16554)."""
