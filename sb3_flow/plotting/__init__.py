"""Figures. Importing this package does not import matplotlib, drawing one does."""
