"""Instruction sets as data, one file each."""
