"""Ablations: does a change of the model or its training help, and how surely.

`plan` reads an ablation and sets its budgets, `turns` trains, `differences` has
the statistics, `outcome` the verdicts, `report` the page.
"""
