"""Objectives: pure functions of log-prob tensors, and a table of the preference losses.

`catalogue` lists the losses and their options, without torch; `losses` computes each of them,
`preference` and `language` the loss and statistics of a run. The functions take tensors and numbers
only: no model, no configuration object, no rank.
"""
