"""Ablations: does a change of the model or its training help, and how surely.

`reading` opens its file, `plan` sets the budgets, `turns` trains, `folder` has
the results, `differences` the statistics, `outcome` the verdicts, `report` the
page.
"""
