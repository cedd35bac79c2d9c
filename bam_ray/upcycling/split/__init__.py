"""Splitting one dense model into experts (LLaMA-MoE): which neurons and which heads go to which expert."""
