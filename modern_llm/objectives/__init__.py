"""Objectives: pure functions of log-prob tensors, and a table of the preference losses.

`catalogue` lists the losses and their options, without torch; `preference` and `language` compute
them. The functions take tensors and numbers only: no model, no configuration object, no rank.
"""
