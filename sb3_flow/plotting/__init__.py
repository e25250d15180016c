"""Figures. Importing this package does not import matplotlib, drawing one does."""

from typing import Any

import numpy as np

#: Colors that remain distinct without color vision (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9A9A9A"


def new_figure(**kwargs) -> Any:
    """
    A matplotlib figure that no window belongs to.

    :param kwargs: See ``matplotlib.figure.Figure``
    :return: figure
    :raises ImportError: if matplotlib is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed, it comes with: pip install "sb3-flow[plots]"') from error
    return Figure(layout="constrained", **{"dpi": 120, **kwargs})


def entropy(shares: np.ndarray) -> float:
    """
    How evenly something is spread.

    :param shares: Shares, or numbers, of each kind
    :return: entropy in bits: zero for a single kind, one for two as many
    """
    shares = shares[shares > 0] / max(shares.sum(), 1e-12)
    return float(-(shares * np.log2(shares)).sum()) + 0.0
