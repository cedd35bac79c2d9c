"""Ratios against peers and floors: one command each, prints a table and writes JSON with date and hardware."""
