"""What fastast costs, beside what one would use instead.

``python -m bench ops e2e memory`` measures, ``python -m bench report`` writes the results up. A
benchmark gives every contender the same work; each contender's outputs and gradients are compared
with a reference in float64 before anything is timed, and one that disagrees is an error, not a
row. Needs torch, numpy and triton alone.
"""
