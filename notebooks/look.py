"""The style of the notebooks' pictures."""

from __future__ import annotations

from matplotlib import pyplot

from experiments.page import COLOURS


def use() -> None:
  """Sets the style of all pictures from here on."""
  pyplot.rcParams.update(
    {
      'figure.dpi': 110,
      'font.size': 11,
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.prop_cycle': pyplot.cycler(color=COLOURS),
      'figure.constrained_layout.use': True,
    }
  )
