"""Choosing a sub-network under a budget: the most utility that the budgets allow, by a mixed-integer solver (HiGHS).

Every place with a width takes one of its allowed widths (one binary variable each), every block is open or closed, and
costs are sums of products (`polar_deploy.costs`). A product of two widths is linear in z_k = [width is the k-th] *
other width:

    sum over k of z_k = other width,        low * x_k <= z_k <= high * x_k

which is the convex hull of that product and exact at whole x. Where all widths fit into one program, its optimum is the
answer. Larger problems are solved on a grid of widths around the best state so far, which gets finer from pass to pass,
and are improved by exchanges of one or two widths between the passes; the bound then comes from a program that is
cheaper and more useful than the network at every state: cells of widths, each with the cost of its cheapest and the
utility of its most useful width. Needs no torch.
"""

from polar_deploy.gating.solver.choice import smallest, solve, unreachable
from polar_deploy.gating.solver.problem import Problem, Site, Solution

__all__ = ["Problem", "Site", "Solution", "smallest", "solve", "unreachable"]
