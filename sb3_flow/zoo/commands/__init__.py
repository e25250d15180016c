"""The commands of ``sb3-flow``, a file for each group of them."""
