"""Objectives: pure functions of log-prob tensors, and a table of the preference losses.

`catalogue` says what losses exist and what they take, without torch; `preference` and `language`
compute. Nothing here knows a model, a configuration object or a rank; the callers are the tasks of
the three stages.
"""
