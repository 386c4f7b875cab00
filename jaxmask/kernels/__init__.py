"""Attention kernels that take a mask by its tiles, one file for each."""
